"""Sample grids during training: the same prompts and seeds each time, so that a row is a story."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from PIL import Image
from torch import nn

from ..basics import keyed
from ..basics.failpoints import failpoint
from ..basics.keyed import Stream, content_id
from ..display.drawing import write_png
from ..display.grids import image_grid
from ..models import Backbone
from ..ranks import Ranks
from ..recipe import Recipe
from ..sources.prompts import sample_prompts


class TrainingSamples:
    """Draws `samples/step-N.png`: a row of training prompts, then of held-out ones."""

    def __init__(self, recipe: Recipe, backbone: Backbone, ranks: Ranks) -> None:
        self.every = recipe.train.sample_every
        self.last_step = recipe.train.steps
        self.folder = Path(recipe.run_dir) / "samples"
        self.recipe = recipe
        self.backbone = backbone
        self.ranks = ranks
        self.prompts = sample_prompts(recipe)

    def is_due(self, step: int) -> bool:
        """At the start, every N steps and at the end; a picture that exists is not drawn again."""
        if not self.every or (step % self.every and step != self.last_step):
            return False
        return not self.ranks.from_first(self.path(step).exists())

    def start_after(self, step: int) -> None:
        """Go on after ``step``: pictures of a run that went further, or of another one, go."""
        for path in self.folder.glob("step-*.png"):
            if step == 0 or int(path.stem.removeprefix("step-")) > step:
                path.unlink()

    def path(self, step: int) -> Path:
        """Where the picture of a step is kept."""
        return self.folder / f"step-{step:08d}.png"

    def draw(self, policy: nn.Module, step: int) -> None:
        """Sample on every rank (ZeRO-3 gathers for all or none), save on rank 0.

        Asked to stop they leave the picture to the next start.
        """
        shape = self.backbone.latent_shape(self.recipe.model.resolution)
        items = [content_id(prompt) for prompt in self.prompts]
        keys = keyed.make_keys(self.recipe.seed, Stream.SAMPLE_NOISE, items)
        noise = keyed.normal(keys.to(self.ranks.device), shape)
        sampler, batch = self.recipe.compare.sampler, self.recipe.compare.batch_size
        images: list[Image.Image] = []
        for start in range(0, len(self.prompts), batch):
            failpoint("train.sample")
            if self.ranks.asked_to_stop():
                return
            images += self.backbone.sample(
                policy,
                self.prompts[start : start + batch],
                noise[start : start + batch],
                steps=sampler.steps,
                guidance=sampler.guidance,
            )
        if self.ranks.is_first:
            row = row_of(images)
            write_png(row, self.path(step))


def row_of(images: list[Image.Image]) -> Image.Image:
    """Images side by side at their own size: what `progression` cuts into rows again."""
    width, height = images[0].size
    row = Image.new("RGB", (width * len(images), height))
    for index, image in enumerate(images):
        row.paste(image, (index * width, 0))
    return row


def progression(folder: Path, resolution: tuple[int, int]) -> Image.Image | None:
    """All sample rows of a run as one grid, a row a step; None if there are none. A picture that
    cannot be read is left out: they are for looking at.
    """
    rows, labels = [], []
    for path in sorted(folder.glob("step-*.png")):
        with suppress(OSError, ValueError, SyntaxError), Image.open(path) as picture:
            height, width = resolution
            boxes = [(x, 0, x + width, height) for x in range(0, picture.width, width)]
            rows.append([picture.crop(box) for box in boxes])
            labels.append(f"step {int(path.stem.removeprefix('step-'))}")
    return image_grid(rows, labels) if rows else None
