"""A world small enough for unit tests: random weights, but real classes in the real folder format.

`build(folder)` writes a Stable Diffusion pipeline, two CLIP models and prompt files, and returns a
recipe for them; `build(folder, "sdxl")`, "sd3" and "lcm" do so with a Stable Diffusion XL, a Stable
Diffusion 3 and with a latent consistency model. Tokenizers are those of `assets/emoji`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    LlavaProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "assets" / "emoji" / "sd" / "tokenizer"
PROMPTS = ["red apple", "grinning face", "cat face", "blue car", "house", "yellow sun", "tree"]
HELDOUT = ["dog face", "green book", "rocket"]
PICTURES = "train.sample_every=3"  # for tests that look at what the trainer draws
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
# As the base model's on the hub, with what other schedulers than Euler's are to read in it.
XL_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(TOKENIZER)


def text_config(tokens: CLIPTokenizer, **changes: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokens),
        max_position_embeddings=tokens.model_max_length,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        **{"projection_dim": 16, **TEXT, **changes},
    )


def unet(**changes: Any) -> UNet2DConditionModel:
    """A UNet of 8x8 latents with 4 channels, halved once."""
    config: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 8,
    }
    return UNet2DConditionModel(**config | changes)


def vae(**changes: Any) -> AutoencoderKL:
    """A VAE that halves 16x16 pixels."""
    config: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "scaling_factor": 0.5,
    }
    return AutoencoderKL(**config | changes)


def pipeline(seed: int = 0, prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """A Stable Diffusion of some 30,000 parameters: 16x16 pixels, 8x8 latents of 4 channels."""
    torch.manual_seed(seed)
    tokens = tokenizer()
    return StableDiffusionPipeline(
        unet=unet(),
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(tokens)),
        tokenizer=tokens,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            clip_sample=False,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def xl_pipeline(seed: int = 0, **changes: Any) -> StableDiffusionXLPipeline:
    """A Stable Diffusion XL of that size: text of widths 16 and 24, pooled to 12, and time ids."""
    torch.manual_seed(seed)
    tokens = tokenizer()
    second = text_config(tokens, hidden_size=24, num_hidden_layers=2, projection_dim=12)
    parts: dict[str, Any] = {
        "unet": unet(
            cross_attention_dim=16 + 24,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=12 + 6 * 8,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
        ),
        "vae": vae(),
        "text_encoder": CLIPTextModel(text_config(tokens, num_hidden_layers=2)),
        "text_encoder_2": CLIPTextModelWithProjection(second),
        "tokenizer": tokens,
        "tokenizer_2": tokens,
        "scheduler": EulerDiscreteScheduler.from_config(XL_SCHEDULE),
    }
    return StableDiffusionXLPipeline(**parts | changes, add_watermarker=False)


def t5_tokenizer() -> T5Tokenizer:
    """Letters, and nothing longer."""
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(chr(ord("a") + i), -3.0 - i / 100) for i in range(26)]
    return T5Tokenizer(vocab=[*marks, *letters], extra_ids=0, model_max_length=512)


def t5_config(letters: T5Tokenizer) -> T5Config:
    return T5Config(
        vocab_size=len(letters),
        d_model=48,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )


def sd3_pipeline(
    seed: int = 0, *, t5: bool = True, text_width: int = 48, **changes: Any
) -> StableDiffusion3Pipeline:
    """A Stable Diffusion 3.5 of that size: patches of 2x2 latents, two blocks of which the first
    attends twice, text as wide as its T5; of width 40, both CLIPs', it was made without one.
    """
    torch.manual_seed(seed)
    tokens = tokenizer()
    second = text_config(tokens, hidden_size=24, num_hidden_layers=2, projection_dim=12)
    first = text_config(tokens, num_hidden_layers=2)
    letters = t5_tokenizer()
    parts: dict[str, Any] = {
        "transformer": SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=text_width,
            caption_projection_dim=16,
            pooled_projection_dim=16 + 12,
            pos_embed_max_size=12,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        "vae": vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        "text_encoder": CLIPTextModelWithProjection(first),
        "text_encoder_2": CLIPTextModelWithProjection(second),
        "text_encoder_3": T5EncoderModel(t5_config(letters)) if t5 else None,
        "tokenizer": tokens,
        "tokenizer_2": tokens,
        "tokenizer_3": letters if t5 else None,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    return StableDiffusion3Pipeline(**parts | changes)


def flux_pipeline(seed: int = 0, *, dev: bool = True, **changes: Any) -> FluxPipeline:
    """A FLUX.1 of that size, dev or schnell: a block of each kind, text of width 48."""
    torch.manual_seed(seed)
    tokens, letters = tokenizer(), t5_tokenizer()
    parts: dict[str, Any] = {
        "transformer": FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * 4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=48,
            pooled_projection_dim=16,
            guidance_embeds=dev,
            axes_dims_rope=(2, 2, 4),
        ),
        "vae": vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        "text_encoder": CLIPTextModel(text_config(tokens)),
        "text_encoder_2": T5EncoderModel(t5_config(letters)),
        "tokenizer": tokens,
        "tokenizer_2": letters,
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dev),
    }
    return FluxPipeline(**parts | changes)


def sana(**changes: Any) -> SanaTransformer2DModel:
    """A SANA of 8x8 latents with 4 channels, two blocks, text of width 16."""
    config: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 16,
        "sample_size": 8,
        "timestep_scale": 0.5,
    }
    return SanaTransformer2DModel(**config | changes)


def gemma_tokenizer() -> GemmaTokenizer:
    """Letters, and nothing longer; what is none of them is unknown."""
    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    letters = [chr(ord("a") + i) for i in range(26)]
    vocabulary = {mark: number for number, mark in enumerate([*marks, *letters])}
    made = GemmaTokenizer(vocab=vocabulary, model_max_length=4096)
    begin = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", made.bos_token_id)])
    made.backend_tokenizer.post_processor = begin
    return made


def sana_pipeline(seed: int = 0, **changes: Any) -> SanaPipeline:
    """A SANA of that size, whose VAE quarters 32x32 pixels, the least that the pipeline takes."""
    torch.manual_seed(seed)
    letters = gemma_tokenizer()
    text = Gemma2Config(
        vocab_size=len(letters),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=4096,
    )
    vae: dict[str, Any] = {
        "latent_channels": 4,
        "attention_head_dim": 8,
        "scaling_factor": 0.5,
    }
    for half in ("encoder", "decoder"):
        vae[f"{half}_block_out_channels"] = (8, 8, 8)
        vae[f"{half}_layers_per_block"] = (1, 1, 1)
        vae[f"{half}_qkv_multiscales"] = ((), (), ())
    parts: dict[str, Any] = {
        "transformer": sana(),
        "vae": AutoencoderDC(**vae),
        "text_encoder": Gemma2Model(text),
        "tokenizer": letters,
        "scheduler": DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
        ),
    }
    return SanaPipeline(**parts | changes)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Bytes, and the marks of a chat."""
    letters = {letter: number for number, letter in enumerate(bytes_to_unicode().values())}
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    template = (
        "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n"
        "{% endfor %}<|im_start|>assistant\n"
    )
    made = Qwen2Tokenizer(vocab=letters, merges=[], chat_template=template)
    made.add_special_tokens({"additional_special_tokens": marks[1:]})
    return made


def qwen_config(tokens: Qwen2Tokenizer) -> dict[str, Any]:
    """Of a language model that reads it, whatever its version."""
    return {
        "vocab_size": len(tokens),
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "pad_token_id": tokens.pad_token_id,
    }


def qwen_image_pipeline(seed: int = 0, **changes: Any) -> QwenImagePipeline:
    """A Qwen-Image of that size: a block, text of width 24, a VAE of videos of 4 channels."""
    torch.manual_seed(seed)
    tokens = qwen_tokenizer()
    seen = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    text = Qwen2_5_VLConfig(
        text_config={
            **qwen_config(tokens),
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 4]},
        },
        vision_config={**seen, "out_hidden_size": 24, "fullatt_block_indexes": [0]},
    )
    parts: dict[str, Any] = {
        "transformer": QwenImageTransformer2DModel(
            in_channels=4 * 4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=(2, 2, 4),
        ),
        "vae": qwen_vae(),
        "text_encoder": Qwen2_5_VLForConditionalGeneration(text),
        "tokenizer": tokens,
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift_terminal=0.02, time_shift_type="exponential"
        ),
    }
    return QwenImagePipeline(**parts | changes)


def qwen_vae(kind: type[Any] = AutoencoderKLQwenImage, **changes: Any) -> Any:
    """A VAE of videos that halves 16x16 pixels. Random weights tell little of one frame, of images
    in latents and of latents in images: they are made to tell more.
    """
    config: dict[str, Any] = {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False],
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [0.5, 0.6, 0.7, 0.9],
    }
    made = kind(**config | changes)
    made.encoder.conv_out.weight.data *= 16
    made.decoder.conv_out.weight.data *= 4
    return made


def qwen_image21_pipeline(seed: int = 0, **changes: Any) -> QwenImage21Pipeline:
    """A Qwen-Image 2.1 of two blocks, text of width 24, and a VAE that halves 128x128 pixels four
    times. Its processor would need torchvision: another model's stands for it.
    """
    torch.manual_seed(seed)
    tokens = qwen_tokenizer()
    tokens.add_special_tokens({"additional_special_tokens": ["<|image_pad|>"]})
    seen = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4}
    text = Qwen3VLConfig(
        text_config={**qwen_config(tokens), "head_dim": 12, "rope_parameters": rope},
        vision_config={**seen, "out_hidden_size": 24, "deepstack_visual_indexes": [0]},
    )
    parts: dict[str, Any] = {
        "transformer": QwenImage21Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            context_in_dim=24,
            axes_dims_rope=(2, 2, 4),
        ),
        "vae": qwen_vae(
            AutoencoderKLQwenImage21,
            decoder_base_dim=8,
            dim_mult=[1, 1, 1, 1, 1],
            temperal_downsample=[False, True, True, True],
        ),
        "text_encoder": Qwen3VLForConditionalGeneration(text),
        "processor": LlavaProcessor(CLIPImageProcessorPil(), tokens, patch_size=14),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }
    parts["processor"].chat_template = tokens.chat_template.replace(
        "turn.content ", "turn.content[0].text "
    )
    return QwenImage21Pipeline(**parts | changes)


def z_image_pipeline(seed: int = 0, **changes: Any) -> ZImagePipeline:
    """A Z-Image of that size: a block of each kind, text of width 24."""
    torch.manual_seed(seed)
    tokens = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[600, 12, 12],
    )
    for mark in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(mark)
    parts: dict[str, Any] = {
        "transformer": transformer,
        "vae": vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        "text_encoder": Qwen3Model(Qwen3Config(head_dim=12, **qwen_config(tokens))),
        "tokenizer": tokens,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    return ZImagePipeline(**parts | changes)


def flux2_transformer(width: int, **changes: Any) -> Flux2Transformer2DModel:
    """A FLUX.2 of 8x8 latents with 4 channels: a block of each kind, text thrice as wide."""
    config: dict[str, Any] = {
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 3 * width,
        "timestep_guidance_channels": 16,
        "axes_dims_rope": (2, 2, 2, 2),
    }
    return Flux2Transformer2DModel(**config | changes)


def flux2_vae(**changes: Any) -> AutoencoderKLFlux2:
    """A VAE of 16x16 pixels, each a latent: 8x8 patches of four channels, with statistics."""
    config: dict[str, Any] = {
        "block_out_channels": (8,),
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 1,
    }
    made = AutoencoderKLFlux2(**config | changes)
    made.bn.running_mean.normal_(0, 0.2)
    made.bn.running_var.uniform_(0.3, 0.9)
    return made


def flux2_pipeline(
    seed: int = 0, *, dev: bool = True, distilled: bool = False, **changes: Any
) -> Flux2Pipeline | Flux2KleinPipeline:
    """A FLUX.2 of that size, dev or klein. dev's processor would need torchvision: that of another
    model stands for it.
    """
    torch.manual_seed(seed)
    tokens = qwen_tokenizer()
    parts: dict[str, Any] = {
        "transformer": flux2_transformer(16, guidance_embeds=dev),
        "vae": flux2_vae(),
        "tokenizer": tokens,
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }
    width = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
    if not dev:
        text = Qwen3Config(**qwen_config(tokens) | width | {"num_hidden_layers": 28})
        parts["text_encoder"] = Qwen3ForCausalLM(text)
        return Flux2KleinPipeline(**parts | changes, is_distilled=distilled)
    parts["tokenizer"] = LlavaProcessor(CLIPImageProcessorPil(), tokens, patch_size=14)
    parts["tokenizer"].chat_template = tokens.chat_template.replace(
        "turn.content", "turn.content[0].text"
    )
    seen = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    text = Mistral3Config(
        text_config={**qwen_config(tokens), **width, "num_hidden_layers": 31},
        vision_config={**seen, "num_attention_heads": 2, "model_type": "pixtral"},
        image_token_index=len(tokens) - 1,
    )
    parts["text_encoder"] = Mistral3ForConditionalGeneration(text)
    return Flux2Pipeline(**parts | changes)


PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd": pipeline,
    "sdxl": xl_pipeline,
    "sd3": sd3_pipeline,
    "flux": flux_pipeline,
    "flux2": flux2_pipeline,
    "sana": sana_pipeline,
    "qwen_image": qwen_image_pipeline,
    "qwen_image21": qwen_image21_pipeline,
    "z_image": z_image_pipeline,
    "lcm": pipeline,  # the teacher, and all of the LCM but its UNet
}


SIDES = {"sana": 32, "qwen_image21": 128}  # of images, in pixels; of other families 16


def lcm_unet(seed: int = 7, **changes: Any) -> UNet2DConditionModel:
    """A UNet that is told its guidance weight, otherwise of the size of `unet()`."""
    torch.manual_seed(seed)
    return unet(**{"time_cond_proj_dim": 10} | changes)


def save_clip(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    tokens = tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    config = CLIPConfig(
        text_config=text_config(tokens).to_dict(),
        vision_config=vision.to_dict(),
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(folder)


def build(folder: Path, backbone: str = "sd") -> dict[str, Any]:
    """Write the world under ``folder``; returns a recipe as plain data, run in ``folder/run``."""
    PIPELINES[backbone]().save_pretrained(folder / backbone)
    save_clip(folder / "reward", seed=1)
    save_clip(folder / "judge", seed=2)
    (folder / "train.txt").write_text("\n".join(PROMPTS))
    (folder / "heldout.txt").write_text("\n".join(HELDOUT))
    (folder / "zero2.json").write_text('{"zero_optimization": {"stage": 2}}')
    model, objective = {}, {}
    if backbone == "lcm":
        lcm_unet().save_pretrained(folder / "lcm_unet")
        model = {"unet": str(folder / "lcm_unet"), "guidance_range": [1.0, 4.0]}
        objective = {"type": "consistency_dpo", "beta": 200.0, "distance": "pseudo_huber"}
    return {
        "run_dir": str(folder / "run"),
        "seed": 3,
        "model": {
            "backbone": backbone,
            "path": str(folder / backbone),
            "resolution": [SIDES.get(backbone, 16)] * 2,
            **model,
        },
        "objective": objective,
        "prompts": {"train": str(folder / "train.txt"), "heldout": str(folder / "heldout.txt")},
        "reward": {"path": str(folder / "reward")},
        "prepare": {
            "candidates_per_prompt": 6,
            "sampler": {"steps": 2, "guidance": 2.0},
            "batch_size": 16,
            "precision": "fp32",
            "contact_sheet_prompts": 2,
        },
        "curriculum": {"tiers": 3, "steps_per_tier": 2, "pairs_per_prompt_per_tier": 6},
        "data": {"lanes": 2, "pairs_per_shard": 10},
        "adapter": {"rank": 2, "alpha": 2.0},
        "train": {
            "steps": 6,
            "global_batch": 8,
            "micro_batch": 4,
            "optimizer": {"lr": 1e-3},
            "precision": "fp32",
            "caption_dropout": 0.0,
            "log_every": 2,
            "sample_every": 0,  # pictures take longer than a tiny run's steps: see PICTURES
            "sample_prompts": 1,
            "threads": 1,
        },
        "deepspeed": str(folder / "zero2.json"),
        "checkpoint": {"every": 2},
        "compare": {
            "images_per_prompt": 2,
            "sampler": {"steps": 2, "guidance": 2.0},
            "batch_size": 16,
            "judge": {"path": str(folder / "judge")},
            "bootstrap": 200,
        },
    }


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path
