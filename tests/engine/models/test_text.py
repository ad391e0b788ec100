"""The cache of prompt embeddings: once each, rows in the order asked for, within its budget."""

import shutil
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import tiny
import torch
from cdpo.engine.basics.errors import DataError
from cdpo.engine.models import fingerprint_store, load_backbone, pipelines, sd, text_here
from cdpo.engine.models.sd import StableDiffusionText
from cdpo.engine.models.sd3 import StableDiffusion3Text
from cdpo.engine.models.sdxl import StableDiffusionXLText
from cdpo.engine.models.text import ROWS, PromptCache, told_of_long
from refusals import refused
from torch import Tensor

CPU = torch.device("cpu")
ROW_BYTES = 4 + 8  # of what the embedder below gives for a prompt


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_prompts_that_are_longer_than_the_text_encoder_are_counted_once(family):
    pipeline = tiny.PIPELINES[family]()
    text = (StableDiffusionText if family == "sd" else StableDiffusionXLText)(pipeline)
    most = pipeline.tokenizer.model_max_length
    words = ["a"] * (most - 2)
    backbone = SimpleNamespace(seen_tokens=text.seen_tokens)
    assert told_of_long(backbone, [" ".join(words), "", "x"]) is None
    long = [" ".join([*words, "b"]), " ".join([*words, "c", "d"])]
    told = told_of_long(backbone, ["x", *long, *long])
    assert told is not None and told.startswith(f"2 prompts have more than the {most} tokens")
    assert repr(long[0][:200]) in told


def test_a_tokenizer_whose_t5_is_not_there_reads_nothing():
    """A folder may keep the tokenizer of a Stable Diffusion 3 without its T5."""
    letters = tiny.t5_tokenizer()
    for change, most in (({}, 256), ({"t5": False, "tokenizer_3": letters}, 24)):
        pipeline = tiny.sd3_pipeline(**change)
        assert StableDiffusion3Text(pipeline).seen_tokens("red apple " * 40) == most


class Embedder:
    """Embeds a prompt as its length, and as its length twice; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        assert len(prompts) == ROWS
        self.asked.append([prompt for prompt in prompts if prompt])
        lengths = torch.tensor([[float(len(prompt))] for prompt in prompts])
        return lengths, lengths.repeat(1, 2)


def test_rows_come_in_the_order_asked_for_and_are_embedded_once():
    embed = Embedder()
    cache = PromptCache(embed)
    lengths, twice = cache(["aaa", "b", "aaa"])
    assert lengths.tolist() == [[3], [1], [3]] and twice.tolist() == [[3, 3], [1, 1], [3, 3]]
    assert cache(["b", "cc"])[0].tolist() == [[1], [2]]
    assert embed.asked == [["aaa", "b"], ["cc"]]
    assert cache([""] * 2)[0].tolist() == [[0], [0]]


def test_more_prompts_than_a_call_takes():
    embed = Embedder()
    prompts = ["x" * length for length in range(1, 2 * ROWS + 4)]
    assert PromptCache(embed)(prompts)[0][:, 0].tolist() == list(range(1, 2 * ROWS + 4))
    assert [len(asked) for asked in embed.asked] == [ROWS, ROWS, 3]


def test_what_was_not_used_for_longest_makes_room():
    embed = Embedder()
    cache = PromptCache(embed)
    cache.budget = 3 * ROW_BYTES - 1
    assert cache(["a", "bb", "ccc"])[0].tolist() == [[1], [2], [3]]  # a batch may exceed it
    cache(["bb"])  # used last now, so that `ccc` makes room
    cache(["dddd"])
    cache(["bb"])
    assert embed.asked == [["a", "bb", "ccc"], ["dddd"]]
    cache(["ccc"])
    assert embed.asked[-1] == ["ccc"]


def test_the_budget_is_of_bytes_held():
    cache = PromptCache(lambda prompts: (torch.zeros(len(prompts), 64, dtype=torch.float16),))
    cache.budget = 10 * 128
    for number in range(40):
        cache([f"{number}", f"{number + 1}"])
    held = [tensor for row in cache._rows.values() for tensor in row]
    assert len(held) == 10
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) == 10 * 128


def test_without_a_budget_nothing_is_kept():
    embed = Embedder()
    cache = PromptCache(embed)
    cache.budget = 0
    for _ in range(2):
        assert cache(["a"])[0].tolist() == [[1]]
    assert embed.asked == [["a"], ["a"]]


def test_what_is_embedded_again_comes_out_the_same_to_the_last_bit():
    """In whatever company: CLIP itself, through the stock pipeline."""
    pipeline = tiny.pipeline()

    def embed(prompts: list[str]) -> tuple[Tensor]:
        return (pipeline.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)[0],)

    kept, forgetful = PromptCache(embed), PromptCache(embed)
    forgetful.budget = 0
    first = kept(tiny.PROMPTS)[0]
    for number, prompt in enumerate(tiny.PROMPTS):
        again = forgetful([*tiny.HELDOUT[: number % 3], prompt])[0][-1]
        assert torch.equal(again, first[number])


def test_the_pooled_embedding_of_xl_does_not_depend_on_its_company():
    """Its projection multiplies one row a prompt, and rounds otherwise for another number of them:
    full fine-tuning of SDXL, resumed, went on beside its curve.
    """
    prompts = [*tiny.PROMPTS, *tiny.HELDOUT]
    pipeline = tiny.xl_pipeline()
    together = StableDiffusionXLText(pipeline).encode(prompts, None)
    alone = StableDiffusionXLText(pipeline)
    for index in reversed(range(len(prompts))):
        one = alone.encode([prompts[index]], None)
        assert torch.equal(one.text[0], together.text[index])
        assert torch.equal(one.extras["text_embeds"][0], together.extras["text_embeds"][index])


class Stored:
    """Prompts that another text encoder made."""

    location, fingerprint = "sets/other", "f" * 64

    def row(self, prompt: str) -> tuple[torch.Tensor, ...]:
        return (torch.full((77, 16), float(len(prompt))),)

    def hold_to(self, columns: Sequence[tuple[int | None, ...]]) -> None:
        self.held_to = columns


def test_stored_prompts_of_another_encoder_are_refused_before_weights_are_read(
    tiny_recipe, monkeypatch
):
    monkeypatch.setattr(fingerprint_store, "SETTLED", 0.0)
    model = tiny_recipe().model
    with monkeypatch.context() as patch:
        patch.delattr(sd, "load")
        with refused(DataError, "mismatch", "data.text"):  # nothing is known yet: text is read
            load_backbone(model, CPU, "fp32", Stored())
    load_backbone(model, CPU).fingerprints()
    monkeypatch.delattr(sd, "load")
    monkeypatch.delattr(pipelines, "read_text_encoder")
    with refused(DataError, "mismatch", "data.text"):
        load_backbone(model, CPU, "fp32", Stored())


def test_stored_prompts_are_taken_for_encoders_whose_weights_are_not_here(
    tiny_recipe, tiny_world, tmp_path
):
    shutil.copytree(tiny_world / "sd", tmp_path / "sd")
    (tmp_path / "sd" / "text_encoder" / "model.safetensors").unlink()
    model = tiny_recipe(f"model.path={tmp_path / 'sd'}").model
    backbone = load_backbone(model, CPU, "fp32", Stored())
    assert backbone.pipeline.text_encoder is None
    assert backbone.fingerprints()["text"] == Stored.fingerprint
    assert backbone.encode_prompts(["four", "a", "four"]).text[:, 0, 0].tolist() == [4, 1, 4]


@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_stored_prompts_are_held_to_the_sizes_that_the_encoders_make(recipe_of, family):
    model, stored = recipe_of(family).model, Stored()
    backbone = load_backbone(model, CPU, "bf16")
    rows = backbone.embedded(["", "a red fox"])
    stored.fingerprint = backbone.fingerprints()["text"]
    load_backbone(model, CPU, "bf16", stored)
    for row in rows:
        assert {value.dtype for value in row} == {torch.bfloat16}  # as their files must say
        sizes = [value.shape for value in row]
        assert len(stored.held_to) == len(sizes)
        for asked, size in zip(stored.held_to, sizes, strict=True):
            assert [a or s for a, s in zip(asked, size, strict=True)] == list(size)
    assert text_here(model, torch.bfloat16) == stored.fingerprint
    own_lengths = len({row[0].shape for row in rows}) > 1
    assert own_lengths == (None in stored.held_to[0])
