"""The models whose training steps are timed, built with random weights from the configs of public
ones, which come along with cdpo for its dry run.

The tiny ones, for CPUs, are two levels or layers of the same blocks. Those of UNets are wide enough
that a core spends its time on arithmetic and not on calls, with VAEs as wide as it takes for
encoding an image to cost as much, in forwards of the UNet, as it does at real size. Those of flow
models are for trying alone: their texts are as long as at real size, and most of what they compute.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import diffusers
import torch
from cdpo.engine.models import flux, sana, sd3
from cdpo.engine.models.ddpm import DiscreteDDPM
from cdpo.engine.models.flow_matching import FlowMatching
from cdpo.engine.models.pretrained import denoiser_in
from cdpo.engine.models.protocol import NoiseProcess
from cdpo.engine.models.sd import StableDiffusionText
from cdpo.engine.models.sdxl import StableDiffusionXLText
from cdpo.engine.models.solver_grid import SolverGrid
from cdpo.engine.models.text import TextConditioner
from cdpo.engine.recipe import Model
from cdpo.engine.training.dry_run.networks import MetaModel, read_meta_model
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
)
from diffusers.schedulers import SchedulerMixin
from kernel_bench.unet_layers import TEXT_TOKENS
from measuring.provenance import ROOT
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Model,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5EncoderModel,
)

Config = dict[str, Any]
TOKENIZER = ROOT / "assets" / "emoji" / "sd" / "tokenizer"
SCHEDULE: Config = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SOLVER_STEPS, GUIDANCE = 50, (5.0, 15.0)
EMBEDDED_GUIDANCE = 3.5
INSTRUCTION = "\n".join(sana.INSTRUCTION.default)


@dataclass(frozen=True)
class StepFamily:
    """What a family of the engine's is beside its networks."""

    objective: Config
    """As a recipe has it: the published loss."""
    scheduler: Callable[[], SchedulerMixin]
    text: Callable[[Any], TextConditioner]
    """The engine's, with an empty cache of prompts, of a pipeline."""
    noise: Callable[[SchedulerMixin, torch.device, int], NoiseProcess]
    """The engine's, of a scheduler, for images of so many pixels a side."""
    denoiser: Config = field(default_factory=dict)
    """What differs in it from that of the pipeline it was made of."""
    options: Config = field(default_factory=dict)
    """Of the pipeline, beside its parts."""


def _flow(token_side: int) -> Callable[[SchedulerMixin, torch.device, int], NoiseProcess]:
    """``token_side`` is that of a token in pixels."""

    def noise(scheduler: Any, device: torch.device, side: int) -> FlowMatching:
        return FlowMatching(scheduler, device, (side, side), token_side, "logit_normal")

    return noise


DIFFUSION_DPO: Config = {"type": "diffusion_dpo", "beta": 5000.0}
FLOW_DPO = DIFFUSION_DPO | {"beta": 100.0}
FAMILIES = {
    "sd": StepFamily(
        DIFFUSION_DPO,
        partial(DDIMScheduler, **SCHEDULE),
        StableDiffusionText,
        lambda scheduler, device, _: DiscreteDDPM(scheduler, device),
        options={"requires_safety_checker": False},
    ),
    "sd3": StepFamily(
        FLOW_DPO,
        partial(FlowMatchEulerDiscreteScheduler, shift=3.0),
        sd3.StableDiffusion3Text,
        _flow(16),
    ),
    "flux": StepFamily(
        FLOW_DPO,
        partial(FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True),
        partial(flux.FluxText, guidance=EMBEDDED_GUIDANCE),
        _flow(16),
    ),
    "sana": StepFamily(
        FLOW_DPO,
        partial(
            DPMSolverMultistepScheduler,
            use_flow_sigmas=True,
            flow_shift=3.0,
            prediction_type="flow_prediction",
        ),
        sana.SanaText,
        _flow(32),
    ),
}
FAMILIES["sdxl"] = replace(
    FAMILIES["sd"], text=StableDiffusionXLText, options={"add_watermarker": False}
)
FAMILIES["lcm"] = replace(
    FAMILIES["sd"],
    objective={"type": "consistency_dpo", "beta": 200.0, "distance": "pseudo_huber"},
    noise=lambda scheduler, device, _: SolverGrid(
        scheduler, device, solver_steps=SOLVER_STEPS, guidance=GUIDANCE
    ),
    denoiser={"time_cond_proj_dim": 256},
)


@dataclass(frozen=True)
class StepModel:
    """A model, the size of its images, and the adapter that is trained."""

    family: str
    """One of the engine's: objective, text encoders and noise process."""
    path: str
    """Hub id of the pipeline whose configs its networks have."""
    side: int
    """Height and width of its images, in pixels."""
    pairs: int
    """Pairs in a step, if they fit the device."""
    rank: int
    """Of the adapters on the attention, alpha the same."""
    changes: Mapping[str, Config] = field(default_factory=dict)
    """What differs in the config of a part."""
    clip_tokens: int = TEXT_TOKENS
    """How many of a prompt a CLIP reads."""
    target: str | None = None
    """What a consistency model is held to: `teacher` or `image`."""

    @property
    def spec(self) -> Model:
        """As a recipe names it."""
        teacher = {"teacher": "unused"} if self.target == "teacher" else {}
        size = (self.side, self.side)
        return Model(backbone=self.family, path=self.path, resolution=size, **teacher)

    @property
    def objective(self) -> Config:
        """As a recipe has it."""
        target = {} if self.target is None else {"target": self.target}
        return FAMILIES[self.family].objective | target


SD15, XL = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"
SD35, FLUX = "stabilityai/stable-diffusion-3.5-medium", "black-forest-labs/FLUX.1-dev"
SANA = "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers"
# Pairs of the flow models: what two steps, weights and text encoders of each, leave room for on an
# H200, by the memory that the dry run counts: 4.2, 14.8 and 8.3 GiB of activations a pair.
REAL = {
    "SD1.5@512": StepModel("sd", SD15, 512, 16, 8),
    "SDXL@1024": StepModel("sdxl", XL, 1024, 4, 8),
    "LCM@768": StepModel("lcm", SD15, 768, 8, 8, target="teacher"),
    "LCM-image@768": StepModel("lcm", SD15, 768, 8, 8, target="image"),
    "SD3.5-medium@512": StepModel("sd3", SD35, 512, 16, 32),
    "FLUX.1-dev@512": StepModel("flux", FLUX, 512, 2, 32),
    "SANA-1.6B@1024": StepModel("sana", SANA, 1024, 8, 32),
}

SMALL: Config = {
    "block_out_channels": (96, 192),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
TINY_SD: Config = SMALL | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
    "cross_attention_dim": 96,
}
TINY_XL: Config = SMALL | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (4, 8),
    "cross_attention_dim": 96 + 160,
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 160 + 6 * 32,
}
TINY_TEXT: Config = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "projection_dim": 96,
    "vocab_size": 2048,
}
TINY_TEXT_2 = TINY_TEXT | {"hidden_size": 160, "intermediate_size": 640, "projection_dim": 160}


def _tiny_vae(*widths: int) -> Config:
    return {"block_out_channels": widths, "norm_num_groups": 8}


# Of flow models: their texts, whose lengths are the stock pipelines', are most of a tiny step.
FLOW_TEXT = TINY_TEXT | {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 32}
FLOW_T5: Config = {
    "d_model": 64,
    "d_ff": 64,
    "d_kv": 16,
    "num_heads": 4,
    "num_layers": 1,
    "vocab_size": 2048,
}


def _tiny(name: str, side: int, **changes: Config) -> StepModel:
    return replace(REAL[name], side=side, pairs=4, rank=4, clip_tokens=10, changes=changes)


TINY = {
    "SD1.5@512": _tiny(
        "SD1.5@512", 64, unet=TINY_SD, vae=_tiny_vae(32, 40, 48, 48), text_encoder=TINY_TEXT
    ),
    "SDXL@1024": _tiny(
        "SDXL@1024",
        64,
        unet=TINY_XL,
        vae=_tiny_vae(16, 40, 72, 72),
        text_encoder=TINY_TEXT,
        text_encoder_2=TINY_TEXT_2,
    ),
    "LCM@768": _tiny(
        "LCM@768", 64, unet=TINY_SD, vae=_tiny_vae(24, 48, 56, 64), text_encoder=TINY_TEXT
    ),
    "SD3.5-medium@512": _tiny(
        "SD3.5-medium@512",
        64,
        transformer={
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "caption_projection_dim": 64,
            "joint_attention_dim": 64,
            "pooled_projection_dim": 32 + 32,
            "dual_attention_layers": (0,),
            "pos_embed_max_size": 6,
            "sample_size": 8,
        },
        vae=_tiny_vae(8, 16, 16, 16),
        text_encoder=FLOW_TEXT,
        text_encoder_2=FLOW_TEXT,
        text_encoder_3=FLOW_T5,
    ),
    "FLUX.1-dev@512": _tiny(
        "FLUX.1-dev@512",
        64,
        transformer={
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "axes_dims_rope": (4, 6, 6),
            "joint_attention_dim": 64,
            "pooled_projection_dim": 32,
        },
        vae=_tiny_vae(8, 16, 16, 16),
        text_encoder=FLOW_TEXT,
        text_encoder_2=FLOW_T5,
    ),
    "SANA-1.6B@1024": _tiny(
        "SANA-1.6B@1024",
        128,
        transformer={
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "cross_attention_head_dim": 16,
            "num_cross_attention_heads": 4,
            "cross_attention_dim": 64,
            "caption_channels": 32,
            "sample_size": 4,
        },
        vae={
            "attention_head_dim": 8,
            "encoder_block_out_channels": (8, 8, 8, 16, 16, 32),
            "encoder_layers_per_block": (1,) * 6,
            "decoder_block_out_channels": (8, 8, 8, 16, 16, 32),
            "decoder_layers_per_block": (1,) * 6,
        },
        text_encoder={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "layer_types": ["full_attention"],
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "vocab_size": 2048,
        },
    ),
}
TINY["LCM-image@768"] = replace(TINY["LCM@768"], target="image")
TINY = {name: TINY[name] for name in REAL}


@dataclass(frozen=True)
class Networks:
    """A pipeline whose denoiser is to be trained, and the teacher of a consistency model."""

    pipeline: DiffusionPipeline
    teacher: ModelMixin | None

    @property
    def denoiser(self) -> ModelMixin:
        network: ModelMixin = getattr(self.pipeline, denoiser_in(self.pipeline.components))
        return network


def build(model: StepModel, device: torch.device, dtype: torch.dtype) -> Networks:
    """Random weights, frozen; the same ones every time."""
    torch.manual_seed(0)
    family, public = FAMILIES[model.family], _public(model.family, model.path)

    def built(part: nn.Module, **changes: Any) -> Any:
        with torch.device(device):
            made = _changed(part, changes)
        return nn.Module.to(made, dtype).requires_grad_(False).eval()

    name = denoiser_in(public.index)
    small = model.changes.get(name, {})
    teacher = built(public.denoiser, **small) if model.target == "teacher" else None
    parts: dict[str, Any] = {
        name: built(public.denoiser, **small, **family.denoiser),
        "vae": built(public.vae, **model.changes.get("vae", {})),
        "scheduler": family.scheduler(),
    }
    for name, encoder in public.text_encoders.items():
        tokens = TOKENIZERS[type(encoder)](model)
        reads = {
            "max_position_embeddings": tokens.model_max_length,
            **{f"{mark}_token_id": getattr(tokens, f"{mark}_token_id") for mark in MARKS},
        }
        parts[name] = built(encoder, **reads, **model.changes.get(name, {}))
        parts[name.replace("text_encoder", "tokenizer")] = tokens
    return Networks(_assemble(public.spec, parts | family.options), teacher)


@cache
def _public(family: str, path: str) -> MetaModel:
    """The networks of a pipeline on the meta device, for their classes and configs."""
    return read_meta_model(Model(backbone=family, path=path), torch.float32)


def _changed(part: Any, changes: Config) -> nn.Module:
    """A new network of a part's class and config, with changes to the latter."""
    if isinstance(part, PreTrainedModel):
        return type(part)(type(part.config).from_dict(part.config.to_dict() | changes))
    made: nn.Module = type(part).from_config(part.config, **changes)
    return made


def _assemble(spec: Model, parts: Config) -> DiffusionPipeline:
    """The stock pipeline of a family; parts that are not given are missing."""
    pipeline_class = getattr(diffusers, spec.family.pipelines[0])
    wanted = inspect.signature(pipeline_class.__init__).parameters.values()
    missing = {of.name: None for of in wanted if of.default is inspect.Parameter.empty}
    del missing["self"]
    pipeline: DiffusionPipeline = pipeline_class(**missing | parts)
    return pipeline


def _emoji_tokens(most: int) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=most)


def _instructed_tokens(_: StepModel) -> PreTrainedTokenizerFast:
    """Words and marks of SANA's instruction, a token each as nearly all are in Gemma's vocabulary,
    which is no public one; letters of other words.
    """
    words = Regex(r"\w+|[^\w\s]|\n")
    letters = [chr(ord("a") + i) for i in range(26)]
    marks = ["<pad>", "<bos>", "<eos>", "<unk>"]
    split = Split(words, "removed", invert=True)
    found = [word for word, _ in split.pre_tokenize_str(INSTRUCTION)]
    entries = dict.fromkeys([*marks, *found, *letters, *(f"##{letter}" for letter in letters)])
    numbered = {entry: number for number, entry in enumerate(entries)}
    made = Tokenizer(WordPiece(numbered, unk_token="<unk>"))
    made.pre_tokenizer = split
    made.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", numbered["<bos>"])]
    )
    named = {f"{mark}_token": f"<{mark}>" for mark in (*MARKS, "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=8192, **named)


MARKS = ("bos", "eos", "pad")
# How long a prompt's row of tokens is does not depend on its words, but for an instruction's.
TOKENIZERS: dict[type[PreTrainedModel], Callable[[StepModel], PreTrainedTokenizerBase]] = {
    CLIPTextModel: lambda model: _emoji_tokens(model.clip_tokens),
    CLIPTextModelWithProjection: lambda model: _emoji_tokens(model.clip_tokens),
    T5EncoderModel: lambda _: _emoji_tokens(512),
    Gemma2Model: _instructed_tokens,
}
