"""How often reward and judge pick the right caption out of 50; prints the README's table.

    python assets/emoji/score_clip.py

The 49 wrong captions are drawn at random from all 3,944, so now and then one of them names the
same emoji in another skin tone. `samples` are pictures drawn by the pipeline for our 90 prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from augment import UNSEEN, for_judge, for_reward
from data import load_pairs, read_prompts
from diffusers import AutoencoderKL
from show import load_pipeline, sample
from transformers import CLIPModel, CLIPTokenizer

HERE = Path(__file__).resolve().parent
CHOICES = 50


class Scorer:
    """One of the two CLIP models, loaded the way the engine loads it."""

    def __init__(self, name: str) -> None:
        self.model = CLIPModel.from_pretrained(HERE / name, torch_dtype=torch.float32).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(HERE / name)

    @torch.no_grad()
    def texts(self, captions: list[str]) -> torch.Tensor:
        """Normalised text embeddings (N, D)."""
        tokens = self.tokenizer(captions, padding=True, return_tensors="pt")
        features = self.model.get_text_features(**tokens).pooler_output
        return torch.nn.functional.normalize(features, dim=-1)

    @torch.no_grad()
    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised image embeddings (N, D) of pixels in 0..1."""
        features = [
            self.model.get_image_features(part * 2 - 1).pooler_output for part in pixels.split(256)
        ]
        return torch.nn.functional.normalize(torch.cat(features), dim=-1)


def accuracy(images: torch.Tensor, texts: torch.Tensor, own: torch.Tensor, seed: int) -> float:
    """Share of images whose own caption beats CHOICES - 1 others drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    shift = torch.rand(len(images), len(texts) - 1, generator=generator).topk(CHOICES - 1).indices
    wrong = (own[:, None] + 1 + shift) % len(texts)  # never the own caption
    similarity = images @ texts.T
    right = similarity.gather(1, own[:, None])
    return (right > similarity.gather(1, wrong)).all(dim=1).float().mean().item()


@torch.no_grad()
def reconstruct(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Through the VAE and back."""
    vae = AutoencoderKL.from_pretrained(HERE / "sd" / "vae", torch_dtype=torch.float32).eval()
    parts = [
        vae.decode(vae.encode(part * 2 - 1).latent_dist.mode()).sample for part in pixels.split(256)
    ]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def test_sets(
    pixels: torch.Tensor, own: torch.Tensor, captions: list[str], args: argparse.Namespace
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, pictures in 0..1 and the index of their captions, one row of the table each."""
    changes: dict[str, Callable] = {"clean": lambda p, g: p, "VAE reconstruction": reconstruct}
    changes |= {"reward's own": for_reward, "judge's own": for_judge}
    changes |= {f"{name} (unseen)": change for name, change in UNSEEN.items()}
    for name, change in changes.items():
        yield name, change(pixels, torch.Generator().manual_seed(args.seed)), own
    prompts = read_prompts("train", "heldout")
    of_prompts = torch.tensor([captions.index(prompt) for prompt in prompts])
    pipeline = load_pipeline()
    parts = [sample(pipeline, prompts, seed, args.steps, args.guidance) for seed in range(4)]
    yield f"{4 * len(prompts)} samples", torch.cat(parts), of_prompts.repeat(4)


def main() -> None:
    """Print the table row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--every", type=int, default=1, help="use every n-th picture only")
    args = parser.parse_args()
    pixels, captions = load_pairs()
    own = torch.arange(0, len(captions), args.every)
    scorers = [Scorer(name) for name in ("reward", "judge")]
    texts = [scorer.texts(captions) for scorer in scorers]
    print("| pictures | reward | judge |\n|---|---|---|")
    for name, images, indices in test_sets(pixels[own].float() / 255, own, captions, args):
        rates = [
            accuracy(scorer.images(images), text, indices, args.seed)
            for scorer, text in zip(scorers, texts, strict=True)
        ]
        print(
            f"| {name} | " + " | ".join(f"{100 * rate:.1f} %" for rate in rates) + " |", flush=True
        )


if __name__ == "__main__":
    main()
