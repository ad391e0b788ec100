"""Train one of the two miniature CLIP models; writes assets/emoji/reward or assets/emoji/judge.

    python assets/emoji/train_clip.py reward --seed 1
    python assets/emoji/train_clip.py judge --seed 2

Both learn from the real pairs only, from different seeds and augmentations. Half of the pictures
go through the VAE with noise on their latents, since both will score generated images, which are
decoded and sometimes smeared.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from augment import for_judge, for_reward
from data import BUILD, load_pairs, sampling_weights, tidy, to_unit
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

HERE = Path(__file__).resolve().parent
SLIPS = (0.05, 0.2, 0.4)  # latent noise of the VAE bank; the latents' own deviation is 1
AUGMENTATIONS = {"reward": for_reward, "judge": for_judge}


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """About 0.8 M parameters: 4x4 patches of 8x8 pixels, captions of at most 24 tokens."""
    text = {
        "hidden_act": "gelu",
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_act": "gelu",  # one operation; CLIP's quick_gelu is three
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def image_processor() -> CLIPImageProcessorPil:
    """Pixels to -1..1 at 32x32."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


@torch.no_grad()
@torch.autocast("cpu", torch.bfloat16)
def decoded_bank(pixels: torch.Tensor, seed: int) -> torch.Tensor:
    """(variants, N, 3, 32, 32) uint8: every picture decoded from its latent with noise added."""
    vae = AutoencoderKL.from_pretrained(HERE / "sd" / "vae", torch_dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    bank = [[] for _ in SLIPS]
    for part in pixels.split(256):
        latents = vae.encode(to_unit(part)).latent_dist.mode()
        for images, slip in zip(bank, SLIPS, strict=True):
            noise = torch.randn(latents.shape, generator=generator) * slip
            output = vae.decode(latents + noise / vae.config.scaling_factor).sample.float()
            images.append((output.clamp(-1, 1) * 127.5 + 127.5).round().byte())
    return torch.stack([torch.cat(images) for images in bank])


def contrastive_loss(model: CLIPModel, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric cross-entropy over the batch, in float32 from the embeddings on."""
    images = model.get_image_features(pixels.to(model.dtype)).pooler_output
    texts = model.get_text_features(ids).pooler_output
    images = nn.functional.normalize(images.float(), dim=-1)
    texts = nn.functional.normalize(texts.float(), dim=-1)
    logits = model.logit_scale.float().exp() * images @ texts.T
    answers = torch.arange(len(ids))
    loss = nn.functional.cross_entropy(logits, answers)
    return (loss + nn.functional.cross_entropy(logits.T, answers)) / 2


def main() -> None:
    """Train one model from its last checkpoint on and save it in half precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", choices=AUGMENTATIONS)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, help="default: build/emoji/WHICH.pt")
    args = parser.parse_args()
    checkpoint = args.checkpoint or BUILD / f"{args.which}.pt"
    torch.manual_seed(args.seed)
    pixels, captions = load_pairs()
    bank = decoded_bank(pixels, args.seed)
    folder = HERE / args.which
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer(captions, padding=True, return_tensors="pt").input_ids
    model = build_clip(tokenizer).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), args.lr, (0.9, 0.98), weight_decay=0.05, fused=True
    )
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    # The steps run on a bf16 copy; autocast would spend a quarter of the time on casts.
    fast = copy.deepcopy(model).bfloat16()
    fast.set_attn_implementation("eager")  # PyTorch's fused attention is slow backwards on CPUs
    # Between even and the UNet's: skin tones are worth telling apart, but not most of the work.
    weights = sampling_weights(captions).sqrt()
    started = time.time()
    for step in range(first, args.steps):
        generator = torch.Generator().manual_seed(args.seed * 10**7 + step)
        rate = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate
        picked = torch.multinomial(weights, args.batch, generator=generator)
        real = pixels[picked]
        variant = torch.randint(0, len(SLIPS), (args.batch,), generator=generator)
        through = torch.rand(args.batch, generator=generator) < 0.5
        real = torch.where(through.view(-1, 1, 1, 1), bank[variant, picked], real)
        changed = AUGMENTATIONS[args.which](real.float() / 255, generator)
        with torch.no_grad():
            torch._foreach_copy_(list(fast.parameters()), list(model.parameters()))
        fast.zero_grad()
        loss = contrastive_loss(fast, changed * 2 - 1, ids[picked])
        loss.backward()
        for param, source in zip(model.parameters(), fast.parameters(), strict=True):
            param.grad = source.grad.float()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 50 == 49:
            seconds = time.time() - started
            print(
                f"{step + 1} loss {loss.item():.3f} scale {model.logit_scale.exp().item():.1f} "
                f"{seconds:.0f}s",
                flush=True,
            )
        if step % 500 == 499 or step + 1 == args.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            torch.save({**state, "step": step + 1}, checkpoint)
    model.half().save_pretrained(folder)
    image_processor().save_pretrained(folder)
    tidy(folder)


if __name__ == "__main__":
    main()
