"""Checkpoints of rewards in the formats they are published in, small, with random weights.

The vocabulary is CLIP's own and one sentence model is real: they come with two packages of data
that `make` installs without what those ask for (see the Makefile). Where they are not there, the
tests that need them are skipped, and say so.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPTokenizer,
)

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])  # of CLIP's training images
STD = np.array([0.26862954, 0.26130258, 0.27577711])
WORDS = ["an", "the", "dog", "cat", "bike", "soup", "riding", "on", "red", "apple", "house", "tree"]

Tensors = dict[str, torch.Tensor]


def data_of(package: str, name: str) -> Path:
    """A file or folder of a package that is installed, and not imported; skips where it is not."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed: `make .venv/installed-test` brings it")
    return Path(spec.submodule_search_locations[0]) / name


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer, from the list of merges that open_clip ships, saved in ``folder``."""
    merges = gzip.decompress(data_of("open_clip", "bpe_simple_vocab_16e6.txt.gz").read_bytes())
    lines = merges.decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(_bytes_to_letters())
    tokens = letters + [letter + "</w>" for letter in letters]
    tokens += ["".join(line.split()) for line in lines] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[tuple(line.split()) for line in lines],
        model_max_length=77,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def _bytes_to_letters() -> Sequence[str]:
    """GPT-2's printable stand-ins of the 256 bytes: those that print first, in their order."""
    printing = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printing]
    return [chr(byte) for byte in printing] + [chr(256 + place) for place in range(len(others))]


def pictures(count: int, size: tuple[int, int] = (16, 16), seed: int = 0) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def normalised(images: Sequence[Image.Image]) -> torch.Tensor:
    """float64 (N, 3, H, W), as CLIP wants pixels."""
    stacked = np.stack([np.asarray(image) for image in images]) / 255.0
    return torch.from_numpy((stacked - MEAN) / STD).permute(0, 3, 1, 2)


class Random:
    """Draws tensors of seed 0, small enough for a forward to stay finite."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(*shape, generator=self.generator)

    def norm(self, width: int) -> dict[str, torch.Tensor]:
        return {"weight": 1 + self(width), "bias": self(width)}

    def linear(self, inputs: int, outputs: int) -> dict[str, torch.Tensor]:
        return {"weight": self(outputs, inputs), "bias": self(outputs)}


def nested(**layers: dict[str, torch.Tensor]) -> Tensors:
    return {
        f"{name.replace('__', '.')}.{kind}": value
        for name, parts in layers.items()
        for kind, value in parts.items()
    }


# --------------------------------------------------------------------------------------------------
# open_clip


def open_clip_tensors(vocabulary: int, width: int = 32, embed: int = 24) -> Tensors:
    """A ViT of patch 8 for 16x16 pixels, two blocks a tower, in open_clip's names."""
    draw = Random()
    tensors = {
        "positional_embedding": draw(77, width),
        "text_projection": draw(width, embed),
        "token_embedding.weight": draw(vocabulary, width),
        "logit_scale": torch.tensor(4.6),
        "visual.class_embedding": draw(width),
        "visual.positional_embedding": draw(5, width),
        "visual.proj": draw(width, embed),
        "visual.conv1.weight": draw(width, 3, 8, 8),
    }
    norms = nested(
        ln_final=draw.norm(width), visual__ln_pre=draw.norm(width), visual__ln_post=draw.norm(width)
    )
    tensors |= norms
    for tower in ("", "visual."):
        for number in range(2):
            block = f"{tower}transformer.resblocks.{number}."
            layers = nested(
                ln_1=draw.norm(width),
                ln_2=draw.norm(width),
                attn__out_proj=draw.linear(width, width),
                mlp__c_fc=draw.linear(width, 4 * width),
                mlp__c_proj=draw.linear(4 * width, width),
            )
            layers["attn.in_proj_weight"] = draw(3 * width, width)
            layers["attn.in_proj_bias"] = draw(3 * width)
            tensors |= {block + name: value for name, value in layers.items()}
    return tensors


# --------------------------------------------------------------------------------------------------
# ImageReward


def image_reward_tensors(vocabulary: int, vision: int = 128, text: int = 64) -> Tensors:
    """BLIP's two encoders, patch 8 for 16x16 pixels, one and two blocks, and the rating layers."""
    draw = Random()
    tensors = {
        "blip.visual_encoder.cls_token": draw(1, 1, vision),
        "blip.visual_encoder.pos_embed": draw(1, 5, vision),
        "blip.text_encoder.embeddings.position_ids": torch.arange(64)[None],
        "blip.text_encoder.embeddings.word_embeddings.weight": draw(vocabulary, text),
        "blip.text_encoder.embeddings.position_embeddings.weight": draw(64, text),
        "blip.visual_encoder.patch_embed.proj.weight": draw(vision, 3, 8, 8),
        "blip.visual_encoder.patch_embed.proj.bias": draw(vision),
    }
    tensors |= {
        f"blip.visual_encoder.{name}": value
        for name, value in nested(
            norm=draw.norm(vision),
            blocks__0__norm1=draw.norm(vision),
            blocks__0__norm2=draw.norm(vision),
            blocks__0__attn__qkv=draw.linear(vision, 3 * vision),
            blocks__0__attn__proj=draw.linear(vision, vision),
            blocks__0__mlp__fc1=draw.linear(vision, 2 * vision),
            blocks__0__mlp__fc2=draw.linear(2 * vision, vision),
        ).items()
    }
    tensors |= {
        f"blip.text_encoder.embeddings.LayerNorm.{kind}": value
        for kind, value in draw.norm(text).items()
    }
    for number in range(2):
        block = f"blip.text_encoder.encoder.layer.{number}."
        for attention, seen in (("attention", text), ("crossattention", vision)):
            layers = nested(
                self__query=draw.linear(text, text),
                self__key=draw.linear(seen, text),
                self__value=draw.linear(seen, text),
                output__dense=draw.linear(text, text),
                output__LayerNorm=draw.norm(text),
            )
            tensors |= {f"{block}{attention}.{name}": value for name, value in layers.items()}
        layers = nested(
            intermediate__dense=draw.linear(text, 2 * text),
            output__dense=draw.linear(2 * text, text),
            output__LayerNorm=draw.norm(text),
        )
        tensors |= {block + name: value for name, value in layers.items()}
    return tensors | rating_tensors(text, "mlp.layers.")


def rating_tensors(width: int, prefix: str = "layers.") -> Tensors:
    """Five linear layers at the places of LAION's and ImageReward's."""
    draw, tensors = Random(5), {}
    for place, outputs in {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}.items():
        layer = draw.linear(width, outputs)
        tensors |= {f"{prefix}{place}.{kind}": value for kind, value in layer.items()}
        width = outputs
    return tensors


# --------------------------------------------------------------------------------------------------
# Sentences and captions


def bert_tokenizer(folder: Path) -> BertTokenizer:
    """A BERT tokenizer of some words and all letters, saved in ``folder``."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *letters, *WORDS]
    pieces += [f"##{letter}" for letter in letters]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = BertTokenizer(vocab=vocabulary, model_max_length=64)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_sentence_model(folder: Path, pooling: str = "pooling_mode_mean_tokens") -> Path:
    """A BERT of 16 numbers in the folder format of sentence-transformers."""
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(bert_tokenizer(folder)),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
    (folder / "1_Pooling").mkdir()
    modes = ("pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_max_tokens")
    config_of_pooling = {"word_embedding_dimension": 16} | {mode: mode == pooling for mode in modes}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config_of_pooling))
    return folder


def save_captioner(folder: Path) -> Path:
    """A BLIP that captions 16x16 pixels, in transformers' folder format."""
    torch.manual_seed(4)
    tokenizer = bert_tokenizer(folder)
    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 16,
        "initializer_range": 0.5,
    }
    config = BlipConfig(
        text_config=small
        | {
            "vocab_size": len(tokenizer),
            "encoder_hidden_size": 16,
            "bos_token_id": tokenizer.convert_tokens_to_ids("[DEC]"),
            "sep_token_id": tokenizer.sep_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "max_position_embeddings": 64,
        },
        vision_config=small | {"image_size": 16, "patch_size": 8},
    )
    BlipForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    BlipProcessor(BlipImageProcessorPil(size=size), tokenizer).save_pretrained(folder)
    return folder
