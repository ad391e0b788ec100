"""What decides a result, by its content: fingerprints of a model's parts.

Products name the parts that made them by these, never by paths: a model may move, and its files may
change in place.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from typing import Any

from diffusers import ConfigMixin, DiffusionPipeline
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..recipe.family import FAMILIES, family_that_reads
from .pipelines import FLOW_KEYS, NOISE_KEYS, SOLVER_KEYS, TEXT_PARTS
from .pretrained import denoiser_in

PARTS = {
    "model": "denoiser",
    "model_config": "config of the denoiser",
    "quantization": "quantization of the denoiser",
    "vae": "VAE",
    "vae_config": "config of the VAE",
    "text": "text encoder or tokenizer",
    "noise": "noise schedule",
    "sampler": "sampling scheduler",
    "lcm_lora": "LCM-LoRA",
    "teacher": "teacher",
    "teacher_config": "config of the teacher",
    "start": "adapter to start from",
    "reward": "reward",
}
"""The parts by the names that products record, and what messages call them."""
# What a pipeline says of how it draws: FLUX.2 klein of guidance, Qwen-Image 2.1 of noise levels.
DRAWN_KEYS = ("is_distilled", "sample_sigmas")
# What configs say of files and versions, and what the recipe decides.
_NO_SETTINGS = {"transformers_version", "architectures", "dtype", "torch_dtype"}
_OURS = __name__.partition(".models")[0]


def fingerprint(part: object) -> str:
    """sha256 over names and float32 values of a module's state, the same for any file format; of a
    tokenizer, a processor or plain data over what decides what comes of them.
    """
    if isinstance(part, nn.Module):
        return fingerprint_of_tensors(part.state_dict())
    text = json.dumps(_described(part), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names and float32 values."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def settings_of(part: Any) -> dict[str, Any]:
    """What the config of a network or scheduler says otherwise than its class does: new options of
    a library change nothing.
    """
    config = part.config
    if not isinstance(part, ConfigMixin):
        own = config.to_diff_dict().items()
        return {key: value for key, value in own if key not in _NO_SETTINGS and key[0] != "_"}
    defaults = {n: p.default for n, p in inspect.signature(type(part).__init__).parameters.items()}
    own = ((key, value) for key, value in config.items() if key[0] != "_")
    return {key: value for key, value in own if key not in defaults or defaults[key] != value}


def fingerprints_of(pipeline: DiffusionPipeline) -> dict[str, str]:
    """Of all parts of a pipeline that decide what it draws and how it is trained; see `PARTS`."""
    parts = pipeline.components
    scheduler = parts["scheduler"]
    denoiser = parts[denoiser_in(parts)]
    family = family_that_reads(type(pipeline).__name__)
    noise: tuple[str, ...] = FLOW_KEYS if "shift" in scheduler.config else NOISE_KEYS
    if scheduler.config.get("use_flow_sigmas"):
        noise = SOLVER_KEYS
    sampler = {k: v for k, v in settings_of(scheduler).items() if k not in noise}
    sampler |= {key: pipeline.config[key] for key in DRAWN_KEYS if pipeline.config.get(key)}
    return {
        "model": fingerprint(denoiser),
        "model_config": fingerprint(settings_of(denoiser)),
        "vae": fingerprint(parts["vae"]),
        "vae_config": fingerprint(settings_of(parts["vae"])),
        "text": fingerprint_of_text(
            {
                name: told_of(part, chats=family is not None and FAMILIES[family].chats)
                for name, part in parts.items()
                if name.startswith(TEXT_PARTS) and part is not None
            },
            pipeline.config,
        ),
        "noise": fingerprint({key: scheduler.config.get(key) for key in noise}),
        "sampler": fingerprint([type(scheduler).__name__, sampler]),
    }


def fingerprint_of_text(told: Mapping[str, list[Any]], pipeline: Mapping[str, Any]) -> str:
    """Of what decides embeddings of prompts: text encoders and tokenizers by their names, as
    :func:`told_of` tells of them, and the config of their pipeline.
    """
    return fingerprint([told, pipeline.get("force_zeros_for_empty_prompt")])


def told_of(part: Any, *, chats: bool) -> list[Any]:
    """Fingerprint of a text encoder, with its settings, or of a tokenizer, also of one in a
    processor; where its family ``chats`` with the template of that, and where it pads.
    """
    if isinstance(part, nn.Module):
        return [fingerprint(part), settings_of(part)]
    reader = getattr(part, "tokenizer", part)
    told = [fingerprint(reader), None]
    sides = [reader.padding_side, reader.truncation_side]
    return [*told, part.chat_template, sides] if chats else told


def quantized_parts(quantization: str | None) -> dict[str, str]:
    """What is added to them where the denoiser was put into fewer bits as it was read."""
    return {} if quantization is None else {"quantization": fingerprint(quantization)}


def changed_parts(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names of the parts that are others, or that one side alone has."""
    return [name for name in {**then, **now} if then.get(name) != now.get(name)]


def named(parts: Iterable[str]) -> str:
    """``denoiser, noise schedule``."""
    return ", ".join(PARTS.get(part, part) for part in parts)


def _described(part: object) -> object:
    if isinstance(part, PreTrainedTokenizerBase):
        return _tokenizer(part)
    if isinstance(part, ProcessorMixin):
        inner = {name: _described(value) for name, value in vars(part).items() if _reads(value)}
        return inner | {"template": getattr(part, "chat_template", None)}
    if _reads(part):
        return part.to_dict()  # type: ignore[attr-defined]
    return part


def _reads(part: object) -> bool:
    """Whether it prepares texts or images for a network."""
    is_processor = hasattr(part, "to_dict") and "Processor" in type(part).__name__
    return isinstance(part, PreTrainedTokenizerBase) or is_processor


def _tokenizer(part: PreTrainedTokenizerBase) -> dict[str, Any]:
    found: dict[str, Any] = {"longest": part.model_max_length, "special": part.special_tokens_map}
    backend = getattr(part, "backend_tokenizer", None)
    if backend is None:
        return found | {"vocabulary": part.get_vocab()}
    whole = json.loads(backend.to_str())
    # Padding and truncation are those of the latest call.
    rules = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "model")
    return found | {name: whole.get(name) for name in rules}


def readers_in(holder: object) -> list[str]:
    """Fingerprints of what an object holds, at any depth of objects of ours, of tokenizers,
    processors and configs: all that goes with the weights of its networks.
    """
    found: list[str] = []
    for value in vars(holder).values():
        if isinstance(value, nn.Module):
            if hasattr(value, "config"):
                generation = getattr(value, "generation_config", None)
                how = generation.to_diff_dict() if generation is not None else {}
                how = {key: known for key, known in how.items() if key not in _NO_SETTINGS}
                found.append(fingerprint([settings_of(value), how]))
        elif isinstance(value, ProcessorMixin) or _reads(value):
            found.append(fingerprint(value))
        elif type(value).__module__.startswith(_OURS) and hasattr(value, "__dict__"):
            found += readers_in(value)
    return sorted(found)
