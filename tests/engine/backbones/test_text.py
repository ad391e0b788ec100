"""The cache of prompt embeddings: once each, rows in the order asked for, bounded."""

import torch
from cdpo.engine.backbones.text import PromptCache
from torch import Tensor


class Embedder:
    """Embeds a prompt as its length, and as its length twice; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        self.asked.append(prompts)
        lengths = torch.tensor([[float(len(prompt))] for prompt in prompts])
        return lengths, lengths.repeat(1, 2)


def test_rows_come_in_the_order_asked_for_and_are_embedded_once():
    embed = Embedder()
    cache = PromptCache(embed)
    lengths, twice = cache(["aaa", "b", "aaa"])
    assert lengths.tolist() == [[3], [1], [3]] and twice.tolist() == [[3, 3], [1, 1], [3, 3]]
    assert cache(["b", "cc"])[0].tolist() == [[1], [2]]
    assert embed.asked == [["aaa", "b"], ["cc"]]


def test_the_oldest_go_first_and_a_batch_may_exceed_the_bound(monkeypatch):
    monkeypatch.setattr("cdpo.engine.backbones.text.MAX_CACHED", 2)
    embed = Embedder()
    cache = PromptCache(embed)
    assert cache(["a", "bb", "ccc"])[0].tolist() == [[1], [2], [3]]
    cache(["bb"])  # used last now, so that `ccc` makes room
    cache(["dddd"])
    cache(["bb"])
    assert embed.asked == [["a", "bb", "ccc"], ["dddd"]]
    cache(["ccc"])
    assert embed.asked[-1] == ["ccc"]
