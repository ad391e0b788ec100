"""What `train.py --dry-run` prints for each shipped recipe of a real model, one under each stage.

Sizes and operations are held against published figures, memory against a computation of its own.
"""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cdpo.engine.basics.errors import OutsideError
from cdpo.engine.display.terminal import Terminal
from cdpo.engine.recipe import Recipe
from cdpo.engine.recipe.reading import load_recipe
from cdpo.engine.training.dry_run import plan as plan_module
from cdpo.engine.training.dry_run.networks import read_meta_model
from cdpo.engine.training.dry_run.plan import print_plan
from huggingface_hub import constants
from refusals import refused

ROOT = Path(__file__).parents[4]
RANKS = 4
GIB = 1 << 30
VAE = 83_653_863


@dataclass(frozen=True)
class Expected:
    """Published figures of a recipe's model, and the adapter's size."""

    unet: int
    text: int
    adapter: int
    tera: float
    """Operations of a unit, 10^12 FLOP."""
    teacher: int = 0


def attention_adapter(widths: dict[int, int], context: int, rank: int = 8) -> int:
    """r (in + out) of to_q, to_k, to_v, to_out of self- and cross-attention, in so many
    transformer blocks of each width.
    """
    return sum(
        count * rank * (6 * 2 * width + 2 * (context + width)) for width, count in widths.items()
    )


SD_BLOCKS = {320: 5, 640: 5, 1280: 6}
XL_BLOCKS = {640: 5 * 2, 1280: 6 * 10}
SD15 = 859_520_964
EXPECTED = {
    "sd15": Expected(SD15, 123_060_480, attention_adapter(SD_BLOCKS, 768), 0.803),
    "sd21": Expected(865_910_724, 340_387_840, attention_adapter(SD_BLOCKS, 1024), 2.149),
    "sdxl": Expected(2_567_463_684, 817_720_320, attention_adapter(XL_BLOCKS, 2048), 6.761),
    # Stable Diffusion 1.5 and a projection of the guidance, 256 to 320; the adapter is that of
    # latent-consistency/lcm-lora-sdv1-5, whose page says 67.5 M.
    "lcm": Expected(SD15 + 256 * 320, 123_060_480, 67_500_000, 2.148, teacher=SD15),
}


def recipe_of(name: str, stage: int = 2) -> Recipe:
    return load_recipe(ROOT / "recipes" / f"{name}_cdpo.yaml", [f"deepspeed=zero{stage}"])


def printed(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The rows of all tables by their names, as text."""
    monkeypatch.setenv("COLUMNS", "100")
    out = io.StringIO()
    print_plan(recipe, RANKS, Terminal(stdout=out))
    lines = (re.split(r"\s{2,}", line.strip()) for line in out.getvalue().splitlines())
    return {name: cells for name, *cells in lines if cells}


@pytest.mark.parametrize(
    "name",
    ["sdxl", "lcm", *(pytest.param(name, marks=pytest.mark.long) for name in ("sd15", "sd21"))],
)
def test_the_dry_run_of_a_shipped_recipe(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network, a cache or the clone: the configs of the models are shipped."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    expected, recipe = EXPECTED[name], recipe_of(name)
    rows = printed(recipe, monkeypatch)
    assert rows["configs"][0].endswith("as shipped: it is not in the hub's cache")
    assert rows["denoiser"] == [f"{expected.unet:,}", "0"]
    assert rows["VAE"] == [f"{VAE:,}", "0"]
    text = [int(rows[key][0].replace(",", "")) for key in rows if key.startswith("text_encoder")]
    assert sum(text) == expected.text and len(text) == (2 if name == "sdxl" else 1)
    adapter, trained = (int(cell.replace(",", "")) for cell in rows["adapter"])
    assert adapter == trained
    if name == "lcm":
        assert trained == pytest.approx(expected.adapter, rel=0.005)
    else:
        assert trained == expected.adapter

    unit = rows["forward, one image"]
    assert unit[0] == "1.00" and flops(unit[1]) / 1e12 == pytest.approx(expected.tera, rel=0.01)
    training = float(rows["forward and backward, one image"][0])
    frozen = 8 if name == "lcm" else 2
    assert rows["frozen passes, one pair"][0] == f"{frozen:.2f}"
    assert float(rows["all passes, one pair"][0]) == pytest.approx(2 * training + frozen, abs=0.02)
    a_step = recipe.train.global_batch * (2 * training + frozen)
    assert float(rows["all passes, one step"][0]) == pytest.approx(a_step, rel=0.005)

    assert_memory(rows, expected, trained, stage=2)
    assert float(rows["activations"][0]) > 1
    if name != "lcm":  # which has all that a stage can divide
        return
    # Stages differ in memory alone: the other two need not count what was counted.
    counted = {
        "forward_flops": int(flops(unit[1])),
        "training_flops": int(training * flops(unit[1])),
        "activation_bytes": int(float(rows["activations"][0]) * GIB),
    }
    for what, value in counted.items():
        monkeypatch.setattr(plan_module, what, lambda *_, value=value, **__: value)
    for stage in (1, 3):
        other = printed(recipe_of(name, stage), monkeypatch)
        assert f"{RANKS}, ZeRO-{stage} of zero{stage}" in other["ranks"]
        assert other["activations"][0] == rows["activations"][0]
        assert_memory(other, expected, trained, stage)


@pytest.mark.long
def test_the_dry_run_of_a_flow_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes as published, the adapter's and the operations of a forward pass by hand."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    rows = printed(recipe_of("sd35"), monkeypatch)
    assert rows["denoiser"] == ["2,243,171,520", "0"]
    assert rows["text_encoder_3"] == ["4,762,310,656", "0"]
    width, blocks, dual, rank = 1536, 24, 13, 32
    # q, k, v and out of the image, 13 times again, and of the text, which has no last out
    layers = 4 * (blocks + dual) + 4 * blocks - 1
    assert rows["adapter"] == [f"{layers * rank * 2 * width:,}"] * 2
    image, text = 32 * 32, 77 + 256
    linear = image * (12 * blocks + 4 * dual) + text * (12 * (blocks - 1) + 3)
    scores = blocks * (image + text) ** 2 + dual * image**2
    by_hand = 2 * width**2 * linear + 4 * width * scores + 2 * text * 4096 * width
    assert flops(rows["forward, one image"][1]) == pytest.approx(by_hand, rel=0.005)
    assert rows["beta"][0].startswith("100 of means, 0.00153 of sums over 65,536 numbers")
    assert rows["text encoders"][0] == "–"  # in host memory
    # A flash kernel saves no scores: those alone would be 48 heads x 1357^2 x 24 blocks, 4 GiB.
    assert 4 < float(rows["activations"][0]) < 12


@pytest.mark.long
def test_the_dry_run_of_sana(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1.6 B parameters and a Gemma 2 of 2.6 B as published; operations by hand: linear attention
    costs next to nothing beyond its projections.
    """
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    rows = printed(recipe_of("sana"), monkeypatch)
    assert rows["denoiser"] == ["1,604,641,952", "0"]
    assert rows["text_encoder"] == ["2,614,341,888", "0"]
    width, blocks, rank, image, text = 2240, 20, 32, 32 * 32, 300
    assert rows["adapter"] == [f"{8 * blocks * rank * 2 * width:,}"] * 2
    hidden = 2 * int(2.5 * width)  # a gate and what it lets through
    of_image = 4 + 2 + 1.5 * hidden / width  # projections, those to the text, the feed-forward
    linear = blocks * width**2 * (image * of_image + 2 * text) + text * (2304 + width) * width
    scores = blocks * 2 * width * image * text
    by_hand = 2 * (linear + scores)
    assert flops(rows["forward, one image"][1]) == pytest.approx(by_hand, rel=0.02)


@pytest.mark.long
def test_the_dry_run_of_flux_fits_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLUX.1 dev with its adapter on one of 80 GB: 12 B parameters, held once."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    rows = printed(recipe_of("flux"), monkeypatch)
    assert rows["denoiser"] == ["11,901,408,320", "0"]
    width, rank = 3072, 32  # q, k, v and out of image and text in 19 blocks; no out in 38 more
    assert rows["adapter"] == [f"{(19 * 8 + 38 * 3) * rank * 2 * width:,}"] * 2
    assert float(rows["policy weights"][0]) == pytest.approx(2 * 11_953_706_048 / GIB, abs=0.01)
    assert f"{32 // RANKS} in 80 GB" in rows["auto"][0] and float(rows["total"][0]) < 40


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "kind", "size", "card"),
    [
        ("sd35", "nf4", 4.5, "24 GB"),
        ("flux", "nf4", 4.5, "24 GB"),
        ("qwen_image", "fp8", 8, "80 GB"),
    ],
)
def test_a_quantised_base_fits_a_card_at_1024_pixels(
    name: str, kind: str, size: float, card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits a weight as published; of 8 bits a scale of each row comes to them."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(
        ROOT / "recipes" / f"{name}_cdpo.yaml",
        [f"model.quantization={kind}", "model.resolution=[1024, 1024]"],
    )
    rows = printed(recipe, monkeypatch)
    parameters = int(rows["denoiser"][0].replace(",", ""))
    held = float(rows["weights in fewer bits"][0])
    assert held == pytest.approx(parameters * size / 8 / GIB, rel=0.005, abs=0.01)
    assert f"none in {card}" not in rows["auto"][0] and rows["base"][0].startswith(f"{kind}: ")
    # Beside them the adapter, and a few million of norms and biases, in bf16.
    adapter = int(rows["adapter"][0].replace(",", ""))
    assert float(rows["policy weights"][0]) == pytest.approx(2 * adapter / GIB, abs=0.015)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "denoiser", "text", "adapter"),
    [
        # q, k, v, out and three layers to and from 10,240, in 30 layers and 4 that refine
        ("z_image", 6_154_908_736, 4_022_468_096, 34 * 32 * (11 * 3840 + 3 * 10240)),
        # those of image and text in 60 blocks, and two layers of each one's feed-forward
        ("qwen_image", 20_430_401_088, 8_292_166_656, 60 * 64 * (8 * 2 + 4 * 5) * 3072),
        # q, k, v, out and three layers to and from 12,288, in 32 blocks
        ("qwen_image21", 7_115_124_736, 8_767_123_696, 32 * 32 * (8 * 4096 + 3 * 4 * 4096)),
        # klein base: 5 blocks with those and a gated feed-forward of each, to 6 and from 3 widths;
        # 20 with a projection to 9 widths and one from 4
        ("flux2", 3_875_544_576, 4_022_468_096, 32 * 3072 * (5 * (16 + 2 * 11) + 20 * 15)),
    ],
)
def test_the_dry_run_of_a_model_whose_text_encoder_is_a_language_model(
    name: str,
    denoiser: int,
    text: int,
    adapter: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sizes as published, held once."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    rows = printed(recipe_of(name), monkeypatch)
    assert rows["denoiser"] == [f"{denoiser:,}", "0"]
    assert rows["text_encoder"] == [f"{text:,}", "0"]
    assert rows["adapter"] == [f"{adapter:,}"] * 2
    assert float(rows["policy weights"][0]) == pytest.approx(
        2 * (denoiser + adapter) / GIB, abs=0.01
    )
    assert rows["text encoders"][0] == "–"  # in host memory
    assert "none in 80 GB" not in rows["auto"][0]


@pytest.mark.parametrize(
    ("change", "kind", "key"),
    [
        ("model.resolution=[520,520]", "mismatch", "model.resolution"),
        ("model.backbone=sdxl", "unreadable", "model.path"),
    ],
)
def test_a_flow_model_that_does_not_fit_is_refused_by_its_configs(
    change: str, kind: str, key: str
) -> None:
    recipe = load_recipe(ROOT / "recipes" / "sd35_cdpo.yaml", [change])
    with refused(OutsideError, kind, key):
        read_meta_model(recipe.model, torch.bfloat16)


def assert_memory(rows: dict[str, list[str]], expected: Expected, trained: int, stage: int) -> None:
    """bf16 weights and gradients; AdamW keeps two moments and the weights in float32."""

    def shared(elements: int, since: int) -> int:
        return math.ceil(elements / RANKS) if stage >= since else elements

    policy = expected.unet + trained
    gathered = min(10**9, policy + expected.teacher) if stage == 3 else 0
    sizes = {
        "policy weights": 2 * shared(policy, 3),
        "teacher": 2 * shared(expected.teacher, 3),
        "gathered weights": 2 * gathered,
        "gradients": 2 * shared(trained, 2),
        "float32 gradients": 4 * shared(trained, 1),
        "AdamW, float32 weights": 12 * shared(trained, 1),
        "reduction buckets": 2 * 2 * min(50_000_000, trained),
        "text encoders": 2 * expected.text,
        "VAE, float32": 4 * VAE,
    }
    for name, size in sizes.items():
        if size:
            assert float(rows[name][0]) == pytest.approx(size / GIB, abs=0.0051), name
        else:
            assert name not in rows
    assert rows["reference"] == ["–", "the policy's own"]
    whole = sum(sizes.values()) / GIB + float(rows["activations"][0])
    assert float(rows["total"][0]) == pytest.approx(whole, abs=0.02)


def flops(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"GFLOP": 1e9, "TFLOP": 1e12, "PFLOP": 1e15}[unit]
