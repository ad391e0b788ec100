"""Sentence embeddings from folders of sentence-transformers, by transformers alone.

Such a folder is a transformer and the way its token embeddings become one: `modules.json` lists the
parts, `1_Pooling/config.json` says which pooling. Reimers and Gurevych, arXiv 1908.10084.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModel
from transformers.utils import cached_file

from ..models import fingerprint
from ..models.pretrained import reading
from .clip import PROMPTS_KEPT, read_tokenizer

POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}


class SentenceModel:
    """A frozen sentence-transformers model in float32; the latest sentences are kept."""

    def __init__(self, path: str, device: torch.device) -> None:
        what, kind = f"reward.sentence_model={path}", "sentence-transformers model"
        with reading(what, kind, path) as place:
            modules = _read_json(place, "modules.json") or []
            _refuse_unknown(modules)
            self.pooling = _pooling(place, modules)
            own = next((m["path"] for m in modules if _kind(m) == "Transformer"), "")
            settings = _read_json(place, f"{own}/sentence_bert_config.json".lstrip("/")) or {}
            self.model, report = AutoModel.from_pretrained(
                place, subfolder=own, dtype=torch.float32, output_loading_info=True
            )
            missing = [key for key in report["missing_keys"] if "pooler" not in key]
            if missing:
                raise ValueError(f"its weights lack {min(missing)}")
        self.tokenizer = read_tokenizer(what, kind, path, subfolder=own)
        longest = getattr(self.model.config, "max_position_embeddings", 512)
        self.max_length = settings.get("max_seq_length") or longest
        self.model.requires_grad_(False).eval().to(device)
        self.device = device
        self.embed_kept = lru_cache(maxsize=PROMPTS_KEPT)(lambda text: self.embed([text])[0])

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights, and of how a sentence is made of its tokens."""
        return f"{self.pooling} {self.max_length} {fingerprint(self.model)}"

    @torch.no_grad()
    def embed(self, sentences: Sequence[str]) -> torch.Tensor:
        """float32 (N, width), of length 1."""
        tokens = self.tokenizer(
            list(sentences),
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        ).to(self.device)
        states = self.model(**tokens).last_hidden_state
        return F.normalize(self._pooled(states, tokens["attention_mask"][..., None]), dim=-1)

    def _pooled(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self.pooling == "cls":
            return states[:, 0]
        if self.pooling == "max":
            return states.masked_fill(mask == 0, -torch.inf).amax(1)
        return (states * mask).sum(1) / mask.sum(1).clamp(min=1)


def _read_json(path: str, name: str) -> Any:
    """Of a folder or a hub id; None where there is no such file."""
    found = cached_file(
        path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if found is None:
        return None
    with open(found, encoding="utf-8") as file:
        return json.load(file)


def _kind(module: dict[str, Any]) -> str:
    return str(module.get("type", "")).rpartition(".")[2]


def _refuse_unknown(modules: Sequence[dict[str, Any]]) -> None:
    """ValueError for parts other than those whose work is done here; lengths do not count."""
    unknown = {_kind(module) for module in modules} - {"Transformer", "Pooling", "Normalize"}
    if unknown:
        raise ValueError(f"its part {min(unknown)} is not supported")


def _pooling(path: str, modules: Sequence[dict[str, Any]]) -> str:
    folder = next((m["path"] for m in modules if _kind(m) == "Pooling"), None)
    config = _read_json(path, f"{folder}/config.json") if folder else None
    if config is None:  # as sentence-transformers treats a plain transformer
        return "mean"
    chosen = [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    if len(chosen) != 1 or chosen[0] not in POOLINGS:
        raise ValueError(f"its pooling {' + '.join(chosen) or 'is none, which'} is not supported")
    return POOLINGS[chosen[0]]
