"""Random views of training images, as a function of (seed, view, image): no generator, no order, no workers.

What is drawn for an image depends on the seed, on the number of the view and on the image's index alone, so that a
teacher can be shown the very view that a student sees, now or later, on this machine or another.
"""

from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2 import RandAugment

from kdfast.core.errors import unknown

PARTS = ("crop", "flip", "randaugment")
AUGMENTATIONS = ("none", *("+".join(some) for n in (1, 2, 3) for some in combinations(PARTS, n)))


def uniform(seed: int, view: int, index: np.ndarray, draws: int) -> np.ndarray:
    """Numbers in [0, 1), shape (len(index), draws), each a hash of (seed, view, index, draw) by SplitMix64."""

    def mix(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        state = np.zeros((len(index), draws), np.uint64)
        for key in (np.uint64(seed), np.uint64(view), index.astype(np.uint64)[:, None], np.arange(draws)[None]):
            state = mix(state + golden + np.asarray(key, np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) / 2**53


@dataclass
class Augment:
    """Random crops of the zero-padded image, horizontal flips and RandAugment, drawn per image.

    RandAugment (arXiv:1909.13719) is torchvision's with its two operations of magnitude 9, on bytes. It draws from torch's
    generator, which is seeded for each image and put back.

    `view` is the number of the view that is drawn; whoever runs the epochs sets it (`kdfast.training.learner.Views`).
    """

    flip: bool
    padding: int  # pixels on each side; 0: no crop
    seed: int
    views: int = 0  # how many there are; 0: one an epoch
    view: int = field(default=0, compare=False)
    randaugment: bool = False

    @classmethod
    def named(cls, name: str, size: int, seed: int, views: int = 0) -> "Augment | None":
        """One of AUGMENTATIONS for images of `size` pixels; the crop pads by an eighth of the side (4 at 32 pixels)."""
        parts = name.split("+")
        if name != "none" and (set(parts) - set(PARTS) or len(set(parts)) < len(parts)):
            raise unknown("augmentation", name, AUGMENTATIONS)
        if name == "none":
            return None
        return cls("flip" in parts, size // 8 if "crop" in parts else 0, seed, views, randaugment="randaugment" in parts)

    def of_epoch(self, epoch: int) -> int:
        """The number of the view that is shown in an epoch, from 0."""
        return epoch % self.views if self.views else epoch

    def __call__(self, images: Tensor, index: Tensor) -> Tensor:
        """Images (B, C, H, W) of any dtype and their numbers in the data set (B,), on the CPU, to their views, same shape.

        What is drawn is drawn on the CPU; crops and flips are made where the images are, and nobody waits for them.
        """
        draws = torch.from_numpy(uniform(self.seed, self.view, index.numpy(), 3 + self.randaugment))
        if self.padding:
            images = self._crop(images, (draws[:, :2] * (2 * self.padding + 1)).long().to(images.device, non_blocking=True))
        if self.flip:
            flipped = draws[:, 2].lt(0.5).to(images.device, non_blocking=True)
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        return self._randaugment(images, (draws[:, 3] * 2**53).long()) if self.randaugment else images

    @staticmethod
    def _randaugment(images: Tensor, seeds: Tensor) -> Tensor:
        change, generator = RandAugment(), torch.default_generator
        outside = generator.get_state()
        changed = torch.empty_like(images)
        for i, seed in enumerate(seeds.tolist()):
            generator.manual_seed(seed)
            changed[i] = change(images[i])
        generator.set_state(outside)
        return changed

    def _crop(self, images: Tensor, corner: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        padded = pad(images, (self.padding,) * 4)
        rows = corner[:, 0, None] + torch.arange(height, device=images.device)
        columns = corner[:, 1, None] + torch.arange(width, device=images.device)
        batch = torch.arange(len(images), device=images.device)[:, None, None]
        return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
