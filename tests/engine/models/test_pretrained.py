"""What is read of pretrained folders: the fingerprint is of every tensor and every name."""

import tiny
import torch
from cdpo.engine.models import fingerprint
from torch import nn


def test_fingerprint_sees_every_tensor_and_every_name():
    network = tiny.pipeline().vae
    found = {fingerprint(network)}
    state = network.state_dict()
    for value in state.values():
        flat = value.view(-1)
        before = flat[-1].clone()
        flat[-1] = torch.nextafter(before, torch.tensor(torch.inf))
        found.add(fingerprint(network))
        flat[-1] = before
    assert len(found) == 1 + len(state)
    one, two = nn.ParameterDict({"a": torch.ones(2)}), nn.ParameterDict({"b": torch.ones(2)})
    assert fingerprint(one) != fingerprint(two)
