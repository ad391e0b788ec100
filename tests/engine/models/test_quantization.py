"""A base in fewer bits: the weights of the libraries' own quantisers, which policy and reference
share, and gradients of the same weights made whole.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from batches import corrupted, train_a_little
from cdpo.engine.basics.errors import CdpoError, OutsideError, RecipeError
from cdpo.engine.models import known_fingerprints, load_backbone
from cdpo.engine.models.quantization import LIBRARIES, Quantized, QuantizedLinear, quantize
from cdpo.engine.objectives import build_objective
from cdpo.engine.recipe import Recipe
from cdpo.engine.recipe.family import FAMILIES
from cdpo.engine.training.networks import build_networks
from diffusers import AutoModel
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

CPU = torch.device("cpu")
PROMPTS = ["a red cube", "a blue ball on grass"]
# Largest error of a weight, of the largest in its block or row: half a step of the grid.
STEPS = {"nf4": 0.152, "int8": 0.5 / 127, "fp8": 2**-4}


def here(kind: str) -> object:
    missing = importlib.util.find_spec(LIBRARIES[kind]) is None
    why = f"{LIBRARIES[kind]} is not installed: pip install '.[quantization]'"
    return pytest.param(kind, marks=pytest.mark.skipif(missing, reason=why))


kinds = pytest.mark.parametrize("kind", [here(kind) for kind in LIBRARIES])
FLOW = [name for name, family in FAMILIES.items() if family.is_flow]


def made_whole(network: nn.Module) -> nn.Module:
    """A copy whose layers are PyTorch's own, of the same weights."""
    whole = copy.deepcopy(network)
    for layer in whole.modules():
        if isinstance(layer, QuantizedLinear):
            weight = layer.weight.clone()
            del layer.packed, layer.scales
            layer.__class__ = nn.Linear
            layer.weight = nn.Parameter(weight, requires_grad=False)
    return whole


@kinds
@pytest.mark.parametrize("family", [pytest.param("sd", marks=pytest.mark.long), *FLOW])
def test_policy_and_reference_share_one_base_and_begin_alike(
    recipe_of: Callable[..., Recipe], family: str, kind: str
) -> None:
    recipe = recipe_of(family, f"model.quantization={kind}")
    backbone = load_backbone(recipe.model, CPU)
    networks = build_networks(recipe, backbone, build_objective(recipe.objective))
    held = [
        {tensor.data_ptr() for tensor in (*net.buffers(), *net.parameters())}
        for net in (networks.reference, networks.policy)
    ]
    assert held[0] <= held[1]  # what the policy has beside it are adapters
    layers = [m for m in networks.reference.modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) > 10 and not any(type(m) is nn.Linear for m in networks.reference.modules())
    kept = sum(buffer.nbytes for layer in layers for buffer in layer.buffers())
    assert backbone.quantized is not None and kept == backbone.quantized.num_bytes
    batch = corrupted(backbone, PROMPTS)
    before = [buffer.clone() for buffer in networks.reference.buffers()]
    for _ in range(2):  # an order of the passes that would change what both share
        assert networks(batch).loss.item() == pytest.approx(math.log(2), abs=1e-6)
    for now, then in zip(networks.reference.buffers(), before, strict=True):
        assert torch.equal(now, then)


@kinds
@pytest.mark.parametrize(
    ("family", "knob"),
    [
        *((family, "adapter.dora=true") for family in FLOW),
        pytest.param("sd", "adapter.rslora=true", marks=pytest.mark.long),
    ],
)
def test_gradients_are_those_of_the_same_weights_made_whole(
    recipe_of: Callable[..., Recipe], family: str, knob: str, kind: str
) -> None:
    recipe = recipe_of(family, f"model.quantization={kind}", knob)
    backbone = load_backbone(recipe.model, CPU)
    networks = build_networks(recipe, backbone, build_objective(recipe.objective))
    train_a_little(networks.policy)
    batch = corrupted(backbone, PROMPTS)
    found = networks(batch)
    found.loss.backward()
    whole = copy.copy(networks)
    whole._modules = dict(networks._modules)
    whole.policy, whole.reference = map(made_whole, (networks.policy, networks.reference))
    for parameter in whole.policy.parameters():
        parameter.grad = None
    truth = whole(batch)
    truth.loss.backward()
    assert found.loss.item() == truth.loss.item() != pytest.approx(math.log(2), abs=1e-4)
    theirs = dict(whole.policy.named_parameters())
    trained = {n: p for n, p in networks.policy.named_parameters() if p.requires_grad}
    assert len(trained) > 20
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, msg=name)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_is_near_what_it_was_and_keeps_nothing_whole(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(48, 20, dtype=dtype).requires_grad_(False)
    network = nn.Sequential(copy.deepcopy(plain))
    told = quantize(network, kind, CPU)
    layer = network[0]
    largest = plain.weight.abs().max().double()
    error = (layer.weight.double() - plain.weight.double()).abs().max() / largest
    eps = torch.finfo(dtype).eps
    assert 0 < error <= STEPS[kind] + eps
    assert layer.weight.dtype == dtype
    assert told == Quantized.of(nn.Sequential(plain), kind)
    assert told.num_bytes == sum(buffer.nbytes for buffer in layer.buffers())
    kept: list[tuple[int, ...]] = []
    x = torch.randn(3, 5, 48, dtype=dtype, requires_grad=True)
    with saved_tensors_hooks(
        lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda t: t
    ):
        y = network(x)
    assert kept == []
    y.backward(torch.ones_like(y))
    exact = torch.nn.functional.linear(x.double(), layer.weight.double(), plain.bias.double())
    torch.testing.assert_close(y.double(), exact, rtol=4 * eps, atol=4 * eps)
    summed = layer.weight.double().sum(0).expand(3, 5, 48)
    torch.testing.assert_close(x.grad.double(), summed, rtol=8 * eps, atol=8 * eps)
    # What casts a network, as DeepSpeed does, leaves the integers alone.
    before = [buffer.clone() for buffer in layer.buffers()]
    for buffer, then in zip(network.half().bfloat16()[0].buffers(), before, strict=True):
        assert torch.equal(buffer, then)
    assert list(network.state_dict()) == ["0.bias"]


@pytest.mark.parametrize("kind", [here("int8"), here("fp8")])
def test_weights_are_those_that_diffusers_loads(
    recipe_of: Callable[..., Recipe], kind: str
) -> None:
    """NF4 it loads on a GPU alone: below."""
    from diffusers import TorchAoConfig
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    config = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[kind]()
    model = recipe_of("sd3", f"model.quantization={kind}").model
    ours = load_backbone(model, CPU, "bf16").denoiser
    stock = AutoModel.from_pretrained(
        model.path,
        subfolder="transformer",
        dtype=torch.bfloat16,
        quantization_config=TorchAoConfig(config),
    )
    theirs = dict(stock.named_modules())
    layers = {n: m for n, m in ours.named_modules() if isinstance(m, QuantizedLinear)}
    for name, layer in layers.items():
        assert torch.equal(layer.weight, theirs[name].weight.dequantize()), name


@pytest.mark.parametrize("kind", [here("nf4")])
def test_weights_of_nf4_are_those_of_the_librarys_own_layer(kind: str) -> None:
    import bitsandbytes as bnb

    torch.manual_seed(0)
    plain = nn.Linear(128, 40, dtype=torch.bfloat16).requires_grad_(False)
    stock = bnb.nn.Params4bit(
        plain.weight.clone(), requires_grad=False, compress_statistics=False, quant_type="nf4"
    ).to("cpu")
    network = nn.Sequential(plain)
    quantize(network, kind, CPU)
    theirs = bnb.functional.dequantize_4bit(stock.data, stock.quant_state)
    assert torch.equal(network[0].weight, theirs)


@kinds
def test_parts_tell_it_and_are_otherwise_those_of_the_files(
    recipe_of: Callable[..., Recipe], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = recipe_of("sd3").model
    quantized = model.model_copy(update={"quantization": kind})
    monkeypatch.setattr("cdpo.engine.models.fingerprint_store.SETTLED", -1.0)
    ours = load_backbone(quantized, CPU).fingerprints()
    assert known_fingerprints(quantized) == ours
    whole = load_backbone(model, CPU).fingerprints()
    assert ours.keys() - whole.keys() == {"quantization"}
    assert whole.items() <= ours.items()
    assert known_fingerprints(model) == whole


@pytest.mark.parametrize("kind", LIBRARIES)
def test_a_missing_library_is_told_before_anything_is_read(
    recipe_of: Callable[..., Recipe], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == LIBRARIES[kind] else found(name, *rest),
    )
    model = recipe_of("sd3", f"model.quantization={kind}", f"model.path={tmp_path}").model
    with pytest.raises(OutsideError) as refusal:
        load_backbone(model, CPU)
    assert (refusal.value.key, refusal.value.kind) == ("model.quantization", "not-installed")
    assert LIBRARIES[kind] in str(refusal.value) and "cdpo[quantization]" in str(refusal.value)


@pytest.mark.parametrize(
    ("family", "knobs", "named"),
    [
        ("sd3", ("adapter.type=full", "export.formats=[merged]"), "adapter.type=full"),
        ("sd3", ("speed.compile=regional",), "speed.compile=regional"),
        ("lcm", (), "backbone=lcm"),
    ],
)
def test_what_it_does_not_go_with_is_refused(
    recipe_of: Callable[..., Recipe], family: str, knobs: tuple[str, ...], named: str
) -> None:
    with pytest.raises(CdpoError) as refusal:
        recipe_of(family, "model.quantization=nf4", *knobs)
    assert isinstance(refusal.value, RecipeError) and len(str(refusal.value).splitlines()) == 1
    assert "quantization=nf4" in str(refusal.value) and named in str(refusal.value)
