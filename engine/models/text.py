"""Embedding prompts: what a family's text encoders must offer, and each prompt embedded once."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .protocol import Backbone, Conditioning, Framing, StoredPrompts

DEFAULT_BUDGET = 256 * 2**20  # bytes; SDXL's prompts take 0.3 MB each in half precision
Encoders = Mapping[str, Any]
"""Text encoders by what a pipeline calls them, of which configs alone are looked at."""
Inputs = Mapping[str, Tensor | Sequence[Tensor]]
"""Of a stock pipeline for N images, by argument: (N, ...), or a tensor for each."""
Embedded = tuple[Tensor | Sequence[Tensor], ...]
"""What an embedder makes of prompts."""
Told = dict[str, tuple[int, ...]]
"""Sizes of what a denoiser is told of an image: of `text`, and of extras by their names."""
ROWS = 8  # prompts in one call of the encoders


def told_of_long(backbone: Backbone, prompts: Iterable[str]) -> str | None:
    """What to warn of where text encoders see the beginning of some prompts alone."""
    long, first, seen = set[int](), "", 0
    for prompt in prompts:
        if tokens := backbone.seen_tokens(prompt):
            first, seen = (first, seen) if long else (prompt, tokens)
            long.add(hash(prompt))  # captions of a data set come up again
    if not long:
        return None
    return (
        f"{len(long)} prompts have more than the {seen} tokens that the text encoder sees, so that "
        f"their ends do not count, e.g. {first[:200]!r}"
    )


class TextConditioner(Protocol):
    """The text side of a family: one for each way of telling a denoiser what to draw."""

    cache: PromptCache

    def sizes(self, told: Mapping[str, tuple[int, ...]]) -> Sequence[tuple[int | None, ...]]:
        """Of what the cache holds of a prompt, by the family's ``told``; None is any from 1 on."""
        ...

    def encode(self, prompts: Sequence[str], framing: Framing | None) -> Conditioning:
        """What the denoiser is told of N images, framed as given if the family is told that."""
        ...

    def pipeline_inputs(self, prompts: Sequence[str]) -> Inputs:
        """The embeddings that the stock pipeline takes in place of prompts, by argument name."""
        ...

    def seen_tokens(self, prompt: str) -> int | None:
        """How many tokens, begin and end among them, the encoders see of a prompt that has more;
        None of one that has not.
        """
        ...


class CachedText:
    """What all have that embed a prompt with the encoders of a stock pipeline, once."""

    columns: tuple[str, ...] = ("text",)
    """What the cache holds of a prompt, by the names of :data:`Told`."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self._pipeline: Any = pipeline
        self.cache = PromptCache(self._embed_anew)

    def sizes(self, told: Mapping[str, tuple[int, ...]]) -> Sequence[tuple[int | None, ...]]:
        return [told[name] for name in self.columns]

    def seen_tokens(self, prompt: str) -> int | None:
        for tokenizer, most in self._readers():
            if len(prompt.encode()) <= most - 2:
                continue  # a token has a byte at least
            if len(tokenizer(prompt, verbose=False)["input_ids"]) > most:
                return most
        return None

    def _readers(self) -> list[tuple[Any, int]]:
        """The tokenizers beyond whose sight a prompt's end is lost, and how much each sees."""
        parts = self._pipeline.components
        found = [parts.get(name) for name in ("tokenizer", "tokenizer_2")]
        return [
            (tokenizer, int(tokenizer.model_max_length))
            for tokenizer in found
            if tokenizer is not None
        ]

    @abstractmethod
    def _embed_anew(self, prompts: list[str]) -> Embedded: ...


class PooledText(CachedText):
    """Token embeddings (N, T, D) and pooled ones (N, P), as a stock pipeline makes them.

    The pooled ones are told to the denoiser under the second name; framing is nothing.
    """

    columns = ("text", "pooled_projections")

    def encode(self, prompts: Sequence[str], framing: Framing | None) -> Conditioning:
        text, pooled = self.cache(prompts)
        return Conditioning(text, {self.columns[1]: pooled})

    def pipeline_inputs(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        text, pooled = self.cache(prompts)
        negative, negative_pooled = self.cache([""] * len(prompts))
        return {
            "prompt_embeds": text,
            "pooled_prompt_embeds": pooled,
            "negative_prompt_embeds": negative,
            "negative_pooled_prompt_embeds": negative_pooled,
        }


class T5Text(PooledText):
    """The same where a T5 reads along: what is beyond the others' sight is not lost."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        super().__init__(pipeline)
        # Of each prompt whose end the CLIPs do not see it would print all padding; what nobody sees
        # is counted (`seen_tokens`).
        diffusers_logging.get_logger(type(pipeline).__module__).setLevel(diffusers_logging.ERROR)


class OwnLengthText(CachedText):
    """Token embeddings of language models, (n, D) of a prompt of n tokens.

    Each prompt is embedded alone, as the stock pipeline does it that draws one image: beside longer
    ones it would be padded, and come out rounded otherwise. A batch has zeros up to its longest
    prompt, and says how long each is.
    """

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        super().__init__(pipeline)
        self.cache.rows = 1

    def sizes(self, told: Mapping[str, tuple[int, ...]]) -> Sequence[tuple[int | None, ...]]:
        return [(None, *told["text"][1:])]

    def encode(self, prompts: Sequence[str], framing: Framing | None) -> Conditioning:
        """Framing is nothing that these families are told of."""
        rows = [text for (text,) in self.cache.rows_of(prompts)]
        return Conditioning(pad_sequence(rows, batch_first=True), {}, tuple(map(len, rows)))

    def pipeline_inputs(self, prompts: Sequence[str]) -> Inputs:
        """Lists of embeddings, each as long as its prompt."""
        nothing = [""] * len(prompts)
        told = {"prompt_embeds": prompts, "negative_prompt_embeds": nothing}
        return {name: [text for (text,) in self.cache.rows_of(of)] for name, of in told.items()}


class LimitedText(OwnLengthText):
    """The same of so many tokens at most."""

    tokens: int
    """That are seen of a prompt in its template, without :attr:`dropped` ones."""

    def seen_tokens(self, prompt: str) -> int | None:
        read = self.in_template(prompt)
        if len(read.encode()) <= self.tokens:
            return None  # a token has a byte at least
        ids = self._pipeline.tokenizer(read, verbose=False)["input_ids"]
        return self.tokens if len(ids) - self.dropped > self.tokens else None

    @property
    def dropped(self) -> int:
        """Tokens of the template's beginning that are told to nobody."""
        return 0

    @abstractmethod
    def in_template(self, prompt: str) -> str:
        """What the encoder reads."""
        ...


class PromptCache:
    """Embeddings of prompts on the device: those used last, as many as ``budget`` bytes hold.

    ``embed`` gives, for a list of N prompts, tensors or lists with N rows each. It is always
    asked for ``rows`` prompts at once, some of them fillers: matrix products round differently at
    other sizes, and a prompt that is embedded again, after a restart or because it had to make
    room, must come out as it did the first time.
    """

    def __init__(self, embed: Callable[[list[str]], Embedded]) -> None:
        self.budget = DEFAULT_BUDGET
        self.rows = ROWS
        self._embed = embed
        self._rows: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()
        self._bytes = 0

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """The tensors of ``embed`` for these prompts, which may repeat."""
        return tuple(torch.stack(column) for column in zip(*self.rows_of(prompts), strict=True))

    def read_from(self, stored: StoredPrompts, device: torch.device) -> None:
        """Ask no encoder from now on, but what is stored of each prompt."""

        def read(prompts: list[str]) -> Embedded:
            [prompt] = prompts
            return tuple(value[None].to(device) for value in stored.row(prompt))

        self._embed, self.rows = read, 1

    @torch.no_grad()
    def rows_of(self, prompts: Sequence[str]) -> list[tuple[Tensor, ...]]:
        """The same as a list of rows, which may have sizes of their own."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        for start in range(0, len(missing), self.rows):
            self._add(missing[start : start + self.rows])
        wanted = [self._rows[prompt] for prompt in prompts]
        for prompt in prompts:
            self._rows.move_to_end(prompt)
        while self._bytes > self.budget:
            _, oldest = self._rows.popitem(last=False)
            self._bytes -= _num_bytes(oldest)
        return wanted

    def _add(self, prompts: list[str]) -> None:
        columns = self._embed(prompts + [""] * (self.rows - len(prompts)))
        for row, prompt in enumerate(prompts):
            # A copy: a view would keep the whole batch in memory when its neighbours have gone.
            self._rows[prompt] = tuple(column[row].clone() for column in columns)
            self._bytes += _num_bytes(self._rows[prompt])


def _num_bytes(row: tuple[Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in row)
