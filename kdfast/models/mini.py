"""Four families of small networks for small images (8 to 32 pixels): float images (B, 3, H, W) to logits (B, classes)."""

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from kdfast.core.errors import KdfastError


def conv_bn(c_in: int, c_out: int, size: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution, BatchNorm and ReLU, keeping the resolution at stride 1.

    BatchNorm averages over some twenty batches, not torch's ten: ten batches of 64 digits leave the validation loss
    jumping by percents from epoch to epoch.
    """
    conv = nn.Conv2d(c_in, c_out, size, stride, padding=size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(c_out, momentum=0.05), nn.ReLU()]


class Residual(nn.Module):
    """The basic block of ResNet (He et al., CVPR 2016, arXiv:1512.03385)."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(*conv_bn(c_in, c_out, stride=stride), *conv_bn(c_out, c_out)[:2])
        same = c_in == c_out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv_bn(c_in, c_out, size=1, stride=stride)[:2])
        self.relu = nn.ReLU()  # a module, so that what it cuts off can be tapped

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.shortcut(x) + self.body(x))


def plain_block(c_in: int, c_out: int, stride: int) -> nn.Module:
    """Two 3×3 convolutions without a shortcut (VGG: Simonyan & Zisserman, ICLR 2015, arXiv:1409.1556, with BatchNorm)."""
    return nn.Sequential(*conv_bn(c_in, c_out, stride=stride), *conv_bn(c_out, c_out))


def depthwise_block(c_in: int, c_out: int, stride: int) -> nn.Module:
    """A depthwise 3×3 and a pointwise convolution (MobileNet: Howard et al., 2017, arXiv:1704.04861)."""
    return nn.Sequential(*conv_bn(c_in, c_in, stride=stride, groups=c_in), *conv_bn(c_in, c_out, size=1))


class MiniConvNet(nn.Module):
    """A stem, two or three stages of which each but the first halves the resolution, global average pooling, a classifier."""

    def __init__(self, n_classes: int, block: Callable, widths: tuple[int, ...], depth: int):
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, widths[0]))
        stages, c_in = [], widths[0]
        for i, width in enumerate(widths):
            blocks = [block(c_in if j == 0 else width, width, 2 if i and j == 0 else 1) for j in range(depth)]
            stages.append(nn.Sequential(*blocks))
            c_in = width
        self.stages = nn.Sequential(*stages)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(c_in, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.stages(self.stem(x))))


class MiniViT(nn.Module):
    """A vision transformer (Dosovitskiy et al., ICLR 2021, arXiv:2010.11929) on a 4×4 grid of patches, mean-pooled.

    One 3×3 convolution comes before the patches: without it a few hundred images do not suffice to train it (early
    convolutions: Xiao et al., NeurIPS 2021, arXiv:2106.14881).
    """

    def __init__(self, n_classes: int, image_size: int, width: int, depth: int, grid: int = 4):
        super().__init__()
        if image_size % grid:
            raise KdfastError(f"a mini_vit needs an image size divisible by {grid}, not {image_size}")
        patch = image_size // grid
        self.stem = nn.Sequential(*conv_bn(3, width // 2))
        self.patches = nn.Conv2d(width // 2, width, patch, patch)
        self.position = nn.Parameter(torch.randn(1, grid * grid, width) * 0.02)
        layer = partial(nn.TransformerEncoderLayer, width, width // 16, 2 * width, 0.0, nn.functional.gelu)
        self.blocks = nn.Sequential(*[layer(batch_first=True, norm_first=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(self.stem(x)).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


def _networks() -> dict[str, tuple[str, Callable[[int, int], nn.Module]]]:
    """xs is sized to be a student of 8-pixel digits, the others to teach it; depthwise networks are wider for their size."""
    found = {}
    widths = {"xs": (2, 4), "s": (8, 16), "m": (16, 32), "l": (24, 48), "xl": (32, 64)}
    blocks = {"resnet": Residual, "plain": plain_block, "mobile": depthwise_block}
    for (family, block), size in itertools.product(blocks.items(), widths):
        width = (6, 12) if (family, size) == ("mobile", "xs") else widths[size]
        build = partial(lambda n, side, **kw: MiniConvNet(n, **kw), block=block, widths=width, depth=1)
        found[f"{family}_{size}"] = family, build
    for size, (width, depth) in {"s": (32, 2), "m": (48, 3), "l": (64, 4)}.items():
        found[f"vit_{size}"] = "vit", partial(MiniViT, width=width, depth=depth)
    return found


NETWORKS = _networks()  # name -> (family, (number of classes, image side in pixels) -> network with fresh weights)
