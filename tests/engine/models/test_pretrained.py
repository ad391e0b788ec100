"""What is read of pretrained folders and hubs: the fingerprint is of every tensor and every name;
a hub that does not answer is one line, and soon.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest
import tiny
import torch
from cdpo.engine.basics.errors import OutsideError
from cdpo.engine.models import fingerprint, sd, sdxl
from cdpo.engine.models.pretrained import (
    SECONDS_TO_ANSWER,
    read_network,
    reading,
    why_offline,
)
from cdpo.engine.recipe import Model
from cdpo.engine.recipe.reward import (
    AestheticSpec,
    CaptionSimilaritySpec,
    ClipScoreSpec,
    HpsSpec,
    ImageRewardSpec,
    PickScoreSpec,
)
from cdpo.engine.rewards import load_reward
from diffusers import AutoencoderKL
from huggingface_hub import close_session, constants
from refusals import refused
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


# --------------------------------------------------------------------------------------------------
# The hub, and what is done without it

NOWHERE = "http://127.0.0.1:9"  # refused at once: no machine runs the discard service


class Answering(BaseHTTPRequestHandler):
    """Says 404 to everything, and keeps what it was asked."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def answering() -> Iterator[str]:
    Answering.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def silent() -> Iterator[str]:
    """Takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def hub_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Sets the hub's address, with an empty cache, as if nobody had said that we are offline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    why_offline.cache_clear()
    close_session()
    yield lambda url: monkeypatch.setattr(constants, "ENDPOINT", url)
    why_offline.cache_clear()
    close_session()


def read_vae(path: str) -> AutoencoderKL:
    return read_network(AutoencoderKL, path, torch.float32, key="model.vae", kind="VAE")


def test_a_hub_that_answers_is_asked_once_and_then_left_to_the_libraries(hub_at, answering):
    hub_at(answering)
    for _ in range(2):
        with (
            refused(OutsideError, "unreadable", "model.vae"),
            reading("model.vae=a/b", "VAE", "a/b"),
        ):
            assert not constants.is_offline_mode()
            raise OSError("what a library says")
    assert Answering.asked == ["/"]


def test_a_proxy_is_what_is_asked(hub_at, answering, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", answering)
    assert why_offline("http://hub.invalid") is None
    assert Answering.asked == ["http://hub.invalid/"]


def test_a_hub_that_refuses_costs_no_retries(hub_at):
    hub_at(NOWHERE)
    start = time.monotonic()
    with refused(OutsideError, "unreachable", "model.vae") as told:
        read_vae("nobody/nothing")
    assert time.monotonic() - start < 2
    assert "offline" in str(told.value) and "\n" not in str(told.value)
    assert not constants.is_offline_mode()  # shards behind hf:// have rules of their own


def test_the_clients_own_time_out_bounds_the_waiting(hub_at, silent, monkeypatch):
    assert SECONDS_TO_ANSWER < 3  # of the five in which a verb ends
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.2")
    hub_at(silent)
    start = time.monotonic()
    with refused(OutsideError, "unreachable"):
        read_vae("nobody/nothing")
    assert time.monotonic() - start < 2


def test_a_name_that_takes_long_to_look_up_does_not_hold_the_process(hub_at, monkeypatch):
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.1")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(5))
    start = time.monotonic()
    assert "no answer" in str(why_offline("http://hub.invalid"))
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("path", ["a folder", "/a/b", "./a/b", "a/b/c", "a" * 300 + "/b/c", ""])
def test_what_is_no_hub_id_asks_no_hub(hub_at, answering, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a folder").mkdir()
    hub_at(answering)
    with reading("model.vae", "VAE", path) as place:
        assert place == path
    assert Answering.asked == []


def test_what_is_in_the_cache_is_read_without_a_hub(hub_at, tiny_world, tmp_path):
    hub_at(NOWHERE)
    snapshot = "0" * 40
    cached = tmp_path / "hub" / "models--me--tiny"
    shutil.copytree(tiny_world / "sd", cached / "snapshots" / snapshot)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(snapshot)
    spec = Model(path="me/tiny", resolution=(16, 16))
    there = sd.load(spec, torch.device("cpu"), torch.float32)
    here = sd.load(
        spec.model_copy(update={"path": str(tiny_world / "sd")}), torch.device("cpu"), torch.float32
    )
    assert there.fingerprints() == here.fingerprints()
    (cached / "snapshots" / snapshot / "vae" / "config.json").write_text("{")
    with refused(OutsideError, "unreachable", "model.path") as told:
        sd.load(spec, torch.device("cpu"), torch.float32)
    assert "not in the hub's cache" not in str(told.value)  # the library's reason, and ours
    other = spec.model_copy(update={"backbone": "sdxl"})
    with refused(OutsideError, "unreadable", "model.path"):  # what it is does not hang on the hub
        sdxl.load(other, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    "spec",
    [
        ClipScoreSpec(path="nobody/nothing"),
        PickScoreSpec(path="assets/emoji/reward", processor="nobody/nothing"),
        HpsSpec(path="hps.pt", tokenizer="nobody/nothing"),
        ImageRewardSpec(path="image_reward.pt", tokenizer="nobody/nothing"),
        AestheticSpec(path="nobody/nothing", head="head.pt"),
        CaptionSimilaritySpec(path="nobody/nothing", sentence_model="nobody/nothing"),
    ],
    ids=lambda spec: spec.type,
)
def test_rewards_ask_no_hub_that_cannot_be_reached(hub_at, spec, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where assets/emoji/reward is that which is shipped
    hub_at(NOWHERE)
    start = time.monotonic()
    with refused(OutsideError, "unreachable"):
        load_reward(spec, torch.device("cpu"))
    assert time.monotonic() - start < 5


@pytest.mark.slow
@pytest.mark.long
def test_a_verb_ends_with_one_line_in_five_seconds(silent, tiny_world, tmp_path):
    """Counted from when libraries are imported, which takes seconds of its own."""
    code = (
        "import cdpo.engine.train as verb\n"
        "from cdpo.engine.ranks.launch import quieten_libraries; quieten_libraries()\n"
        "import cdpo.engine.training.dry_run.plan\n"
        "print('ready', flush=True)\n"
        "verb.run_verb('train', verb.main, verb.dry_run)"
    )
    overrides = ["model.path=nobody/nothing", f"run_dir={tmp_path / 'run'}", "--dry-run"]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    with subprocess.Popen(
        [sys.executable, "-c", code, "--recipe", str(tiny_world / "recipe.yaml"), *overrides],
        env=environment | {"HF_ENDPOINT": silent, "HF_HOME": str(tmp_path / "home")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as verb:
        assert verb.stdout is not None and verb.stdout.readline() == "ready\n"
        start = time.monotonic()
        printed, said = verb.communicate(timeout=60)
    assert time.monotonic() - start < 5
    assert verb.returncode == OutsideError.exit_code and printed == ""
    assert len(said.splitlines()) == 1 and "nobody/nothing" in said and "offline" in said
