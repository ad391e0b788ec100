"""Every name in a recipe that may lead to another machine, where there is no network and nobody has
said so: one line that tells what is missing, in seconds.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from cdpo.engine.basics.errors import CdpoError
from cdpo.engine.models import load_backbone
from cdpo.engine.models.pretrained import why_offline
from cdpo.engine.recipe import Data, Recipe, Reward
from cdpo.engine.rewards import load_reward
from cdpo.engine.shards.remote import fetch
from cdpo.engine.shards.remote.store import open_store
from cdpo.engine.sources.files import find_files
from cdpo.engine.sources.left_out import LeftOut
from cdpo.engine.sources.prompts import prompts_in
from huggingface_hub import close_session, constants
from pydantic import TypeAdapter

CPU = torch.device("cpu")
HUB_ID, HTTPS, HF = "nobody/nothing", "https://files.invalid/a/b", "hf://datasets/nobody/nothing/a"
REWARDS = {
    "reward of clip_score": "{type: clip_score, path: PLACE}",
    "processor": "{type: pick_score, path: FOLDER, processor: PLACE}",
    "tokenizer of hps": "{type: hps, path: none.pt, tokenizer: PLACE}",
    "tokenizer of image_reward": "{type: image_reward, path: none.pt, tokenizer: PLACE}",
    "aesthetic": "{type: aesthetic, path: PLACE, head: none.pth}",
    "captioner": "{type: caption_similarity, path: PLACE, sentence_model: PLACE}",
    "in a sum": "{type: weighted, rewards: [{reward: {path: PLACE}}]}",
}
FILES = {  # of which none is taken from a hub
    "hps": "{type: hps, path: PLACE, tokenizer: FOLDER}",
    "image_reward": "{type: image_reward, path: PLACE, tokenizer: FOLDER}",
    "head": "{type: aesthetic, path: FOLDER, head: PLACE}",
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Names are not found, what goes by a proxy is refused, and no cache has anything."""

    def getaddrinfo(host: Any, *_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    why_offline.cache_clear()
    close_session()
    yield
    why_offline.cache_clear()
    close_session()


def told(work: Callable[[], object]) -> str:
    """The line with which it ends, in time; it blames the network and not the thing."""
    start = time.monotonic()
    with pytest.raises(CdpoError) as error:
        work()
    assert time.monotonic() - start < 5
    line = str(error.value)
    assert "\n" not in line and ("network" in line or "offline" in line), line
    assert not re.search(" is no (?!folder)", line), line
    assert error.value.exit_code in (3, 6)
    return line


@pytest.mark.parametrize("place", [HUB_ID, HTTPS, HF])
@pytest.mark.parametrize("key", ["path", "vae", "unet"])
def test_models(tiny_recipe: Callable[..., Recipe], key, place):
    recipe = tiny_recipe(f'model.{key}="{place}"')
    assert f"model.{key}={place}" in told(lambda: load_backbone(recipe.model, CPU, "fp32"))


@pytest.mark.parametrize("place", [HUB_ID, HTTPS, HF])
@pytest.mark.parametrize("key", ["lcm_lora", "teacher"])
def test_what_an_lcm_needs(tiny_recipe: Callable[..., Recipe], key, place, tmp_path):
    recipe = tiny_recipe(
        "model.backbone=lcm", "objective.type=consistency_dpo", f'model.{key}="{place}"'
    )
    if key == "lcm_lora":
        assert f"model.lcm_lora={place}" in told(lambda: load_backbone(recipe.model, CPU, "fp32"))
        return
    tiny.lcm_unet().save_pretrained(tmp_path / "unet")
    model = recipe.model.model_copy(update={"unet": str(tmp_path / "unet")})
    backbone = load_backbone(model, CPU, "fp32")
    assert f"model.teacher={place}" in told(backbone.load_teacher)


@pytest.mark.parametrize(
    ("kind", "place"),
    [*product(REWARDS, [HUB_ID, HTTPS, HF]), *product(FILES, [HTTPS, HF])],
)
def test_rewards_and_judges(tiny_world, kind, place):
    section = (REWARDS | FILES)[kind].replace("PLACE", f'"{place}"')
    section = section.replace("FOLDER", str(tiny_world / "reward"))
    spec = TypeAdapter(Reward).validate_python(yaml.safe_load(section))
    assert place in told(lambda: load_reward(spec, CPU))


@pytest.mark.parametrize("place", [HTTPS, HF, "s3://bucket/a"])
def test_prompts_and_data_sets(place):
    assert place in told(lambda: list(prompts_in(place, "prompt", LeftOut())))
    assert place in told(lambda: find_files(place))


@pytest.mark.parametrize("place", [HTTPS, HF, "memory"])
def test_shards(place, tmp_path, monkeypatch):
    """With the retries of a recipe that does not speak of them. s3fs is not installed: its error
    is played.
    """
    if place == "memory":

        class EndpointConnectionError(OSError):
            pass

        def opening(*_: object) -> None:
            raise EndpointConnectionError("Could not connect to the endpoint URL")

        monkeypatch.setitem(fetch.SCHEMES, "memory", ("fsspec", ""))
        monkeypatch.setattr(fetch.RemoteFolder, "_open", opening)
        place = "memory://bucket/a"
    store = open_store(place, Data(cache=str(tmp_path / "cache")))
    assert place in told(store.manifest)
