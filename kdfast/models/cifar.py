"""The networks for 32×32 images with which papers on distillation compare methods on CIFAR-100, under the papers' names.

What they compute, and so their number of parameters, is what those papers trained: the 3×3 or 1×1 stems keep more of the
resolution than the originals for ImageNet. All take float images (B, 3, 32, 32), larger ones too, and return logits
(B, classes). Every ReLU is a module, so that what it cuts off can be tapped; BatchNorm's momentum is torch's 0.1.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

SIDE = 32  # pixels of a side; with fewer the deepest maps of mobilenet_v2 would be single pixels


def conv_bn(c_in: int, c_out: int, size: int = 3, stride: int = 1, groups: int = 1, relu: bool = True) -> list[nn.Module]:
    """Convolution, BatchNorm and, unless told otherwise, ReLU; keeps the resolution at stride 1."""
    conv = nn.Conv2d(c_in, c_out, size, stride, padding=size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(c_out), *([nn.ReLU()] if relu else [])]


def kaiming(model: nn.Module) -> nn.Module:
    """Draw the convolutions as He et al. (arXiv:1502.01852), by their outputs; what else there is stays as torch draws it."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


class CifarNet(nn.Module):
    """A stem, stages, global average pooling, a classifier."""

    def __init__(self, stem: Sequence[nn.Module], stages: Sequence[nn.Module], width: int, n_classes: int):
        super().__init__()
        self.stem = nn.Sequential(*stem)
        self.stages = nn.Sequential(*stages)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.stages(self.stem(x))))


def stage(block: Callable[[int, int, int], nn.Module], c_in: int, c_out: int, n: int, stride: int) -> nn.Sequential:
    """`n` blocks, each made by `block(c_in, c_out, stride)`, the first with the stride."""
    return nn.Sequential(block(c_in, c_out, stride), *[block(c_out, c_out, 1) for _ in range(n - 1)])


# ResNet


class Residual(nn.Module):
    """Shortcut plus body, then ReLU (He et al., CVPR 2016, arXiv:1512.03385).

    The shortcut is a 1×1 convolution where the shape changes, the paper's option B, as papers on distillation have it.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, body: Sequence[nn.Module]):
        super().__init__()
        self.body = nn.Sequential(*body)
        same = c_in == c_out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv_bn(c_in, c_out, 1, stride, relu=False))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.shortcut(x) + self.body(x))


def basic(c_in: int, c_out: int, stride: int) -> nn.Module:
    """Two 3×3 convolutions."""
    return Residual(c_in, c_out, stride, [*conv_bn(c_in, c_out, 3, stride), *conv_bn(c_out, c_out, relu=False)])


def bottleneck(c_in: int, c_out: int, stride: int) -> nn.Module:
    """A 3×3 convolution, which has the stride, between two of 1×1 with four times its channels outside."""
    mid = c_out // 4
    body = [*conv_bn(c_in, mid, 1), *conv_bn(mid, mid, 3, stride), *conv_bn(mid, c_out, 1, relu=False)]
    return Residual(c_in, c_out, stride, body)


def resnet(n_classes: int, block: Callable, stem: int, widths: Sequence[int], depths: Sequence[int]) -> nn.Module:
    """ResNet with a 3×3 stem of `stem` channels; each stage but the first halves the resolution (arXiv:1512.03385).

    Widths 16-32-64 are the paper's for CIFAR, 6n+2 layers deep; "x4" means four times those, with a stem of 32 channels
    (Tian et al., ICLR 2020, arXiv:1910.10699).
    """
    inputs = (stem, *widths)
    stages = [stage(block, *inputs[i : i + 2], n, 2 if i else 1) for i, n in enumerate(depths)]
    return kaiming(CifarNet(conv_bn(3, stem), stages, widths[-1], n_classes))


# Wide ResNet


class PreActivation(nn.Module):
    """The block of Wide ResNet: BatchNorm and ReLU before each of two 3×3 convolutions, and none after the sum.

    Where the shape changes, the shortcut is a 1×1 convolution of what the first ReLU gives. `activated`: the input has been
    through a BatchNorm and ReLU already.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, activated: bool = False):
        super().__init__()
        self.activate = nn.Identity() if activated else nn.Sequential(nn.BatchNorm2d(c_in), nn.ReLU())
        self.body = nn.Sequential(*conv_bn(c_in, c_out, 3, stride), nn.Conv2d(c_out, c_out, 3, padding=1, bias=False))
        same = c_in == c_out and stride == 1
        self.shortcut = None if same else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.activate(x)
        return self.body(active) + (x if self.shortcut is None else self.shortcut(active))


def wide_resnet(n_classes: int, depth: int, k: int) -> nn.Module:
    """Wide ResNet, `k` times as wide as ResNet (Zagoruyko & Komodakis, BMVC 2016, arXiv:1605.07146), without dropout.

    A stage's last BatchNorm and ReLU are the next one's first in the paper: nobody else gets the sum between two stages, for
    the shape changes there. At the end of the stage they are where features are tapped, before the ReLU and after
    (OFD: Heo et al., ICCV 2019, arXiv:1904.01866).
    """
    n, stages, c_in = (depth - 4) // 6, [], 16
    for i, width in enumerate((16 * k, 32 * k, 64 * k)):
        blocks = [PreActivation(c_in, width, 2, activated=True) if i else PreActivation(c_in, width, 1)]
        blocks += [PreActivation(width, width, 1) for _ in range(n - 1)]
        stages.append(nn.Sequential(*blocks, nn.BatchNorm2d(width), nn.ReLU()))
        c_in = width
    return kaiming(CifarNet([nn.Conv2d(3, 16, 3, padding=1, bias=False)], stages, c_in, n_classes))


# VGG


def vgg(n_classes: int, depths: Sequence[int]) -> nn.Module:
    """VGG (Simonyan & Zisserman, ICLR 2015, arXiv:1409.1556) with BatchNorm and a single linear layer.

    Maps have sides of 32, 16, 8, 4 and 4: no pooling comes before the last stage, whose maps would be 2×2.
    """
    stages, c_in = [], 3
    for i, (width, n) in enumerate(zip((64, 128, 256, 512, 512), depths, strict=True)):
        layers = [nn.MaxPool2d(2)] if i in (1, 2, 3) else []
        for _ in range(n):
            layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            c_in = width
        stages.append(nn.Sequential(*layers))
    return kaiming(CifarNet([], stages, c_in, n_classes))


# MobileNetV2


class InvertedResidual(nn.Module):
    """1×1 to `expansion` times the channels, depthwise 3×3, 1×1 without ReLU; a shortcut where the shape stays."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int):
        super().__init__()
        mid = c_in * expansion
        body = [*conv_bn(c_in, mid, 1), *conv_bn(mid, mid, 3, stride, groups=mid), *conv_bn(mid, c_out, 1, relu=False)]
        self.body = nn.Sequential(*body)
        self.same = c_in == c_out and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.same else self.body(x)


def mobilenet_v2(n_classes: int) -> nn.Module:
    """MobileNetV2 (Sandler et al., CVPR 2018, arXiv:1801.04381) at half width; stages' sides are 16, 16, 8, 4, 4, 2, 2 and 2.

    As papers on distillation have it: ReLU in place of the paper's ReLU6, a 1×1 convolution even where it expands to once the
    channels, 1280 channels at the end in spite of the half width, and no dropout.
    """
    table = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    stages, c_in = [], 16
    for expansion, width, n, stride in table:
        stages.append(stage(partial(InvertedResidual, expansion=expansion), c_in, width // 2, n, stride))
        c_in = width // 2
    stages.append(nn.Sequential(*conv_bn(c_in, 1280, 1)))
    return kaiming(CifarNet(conv_bn(3, 16, stride=2), stages, 1280, n_classes))


# ShuffleNet


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channels (B, C, H, W) dealt out so that neighbours come from different groups."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleUnit(nn.Module):
    """ShuffleNet's unit: grouped 1×1, channels shuffled, depthwise 3×3, grouped 1×1; at stride 2 beside the pooled input."""

    def __init__(self, c_in: int, c_out: int, stride: int, groups: int = 3):
        super().__init__()
        grown = c_out if stride == 1 else c_out - c_in  # the pooled input makes up the rest
        mid, self.groups = grown // 4, 1 if c_in == 24 else groups  # the stem has too few channels to group
        self.reduce = nn.Sequential(*conv_bn(c_in, mid, 1, groups=self.groups))
        # ReLU after the depthwise convolution too, which papers on distillation have and the original has not
        self.grow = nn.Sequential(*conv_bn(mid, mid, 3, stride, groups=mid), *conv_bn(mid, grown, 1, groups=groups, relu=False))
        self.shortcut = nn.Identity() if stride == 1 else nn.AvgPool2d(3, stride, padding=1)
        self.relu, self.stride = nn.ReLU(), stride

    def forward(self, x: Tensor) -> Tensor:
        grown, x = self.grow(shuffle(self.reduce(x), self.groups)), self.shortcut(x)
        return self.relu(grown + x if self.stride == 1 else torch.cat([grown, x], 1))


def shufflenet_v1(n_classes: int) -> nn.Module:
    """ShuffleNet with 3 groups (Zhang et al., CVPR 2018, arXiv:1707.01083); maps have sides of 32 (stem), 16, 8 and 4."""
    widths, depths = (24, 240, 480, 960), (4, 8, 4)
    stages = [stage(ShuffleUnit, *widths[i : i + 2], n, 2) for i, n in enumerate(depths)]
    return CifarNet(conv_bn(3, 24, 1), stages, 960, n_classes)  # drawn as torch does, as papers on distillation have it


class ShuffleUnitV2(nn.Module):
    """ShuffleNetV2's unit: half of the channels go through 1×1, depthwise 3×3 and 1×1, then all are shuffled.

    At stride 2 all channels go through that, and through a depthwise 3×3 and 1×1 beside it. The ReLU that ends the branches
    stands after the shuffle, where it sees whole maps; to the half that passes untouched it does nothing: that is ≥ 0.
    """

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        half = c_out // 2
        self.given = c_in if stride > 1 else half  # channels that go through the body
        self.body = nn.Sequential(
            *conv_bn(self.given, half, 1),
            *conv_bn(half, half, 3, stride, groups=half, relu=False),
            *conv_bn(half, half, 1, relu=False),
        )
        beside = [*conv_bn(c_in, c_in, 3, stride, groups=c_in, relu=False), *conv_bn(c_in, half, 1, relu=False)]
        self.beside = nn.Sequential(*beside) if stride > 1 else nn.Identity()
        self.relu, self.stride = nn.ReLU(), stride

    def forward(self, x: Tensor) -> Tensor:
        left, right = (x, x) if self.stride > 1 else x.chunk(2, 1)
        return self.relu(shuffle(torch.cat([self.beside(left), self.body(right)], 1), 2))


def shufflenet_v2(n_classes: int) -> nn.Module:
    """ShuffleNetV2 at width 1 (Ma et al., ECCV 2018, arXiv:1807.11164) with a 1×1 stem; sides are 32 (stem), 16, 8, 4 and 4."""
    widths, depths = (24, 116, 232, 464), (4, 8, 4)
    stages = [stage(ShuffleUnitV2, *widths[i : i + 2], n, 2) for i, n in enumerate(depths)]
    return CifarNet(conv_bn(3, 24, 1), [*stages, nn.Sequential(*conv_bn(464, 1024, 1))], 1024, n_classes)


def _networks() -> dict[str, tuple[str, Callable[[int], nn.Module]]]:
    found = {}
    for depth in (8, 14, 20, 32, 44, 56, 110):
        sizes = {"stem": 16, "widths": (16, 32, 64), "depths": ((depth - 2) // 6,) * 3}
        found[f"resnet{depth}"] = "resnet", partial(resnet, block=basic, **sizes)
    for depth in (8, 32):
        sizes = {"stem": 32, "widths": (64, 128, 256), "depths": ((depth - 2) // 6,) * 3}
        found[f"resnet{depth}x4"] = "resnet", partial(resnet, block=basic, **sizes)
    sizes = {"stem": 64, "widths": (256, 512, 1024, 2048), "depths": (3, 4, 6, 3)}
    found["resnet50"] = "resnet", partial(resnet, block=bottleneck, **sizes)
    for depth, k in ((16, 1), (16, 2), (40, 1), (40, 2)):
        found[f"wrn_{depth}_{k}"] = "wide_resnet", partial(wide_resnet, depth=depth, k=k)
    for depth, depths in {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2)}.items():
        found[f"vgg{depth}"] = "vgg", partial(vgg, depths=depths)
    found["mobilenet_v2"] = "mobilenetv2", mobilenet_v2
    found["shufflenet_v1"] = "shufflenet", shufflenet_v1
    found["shufflenet_v2"] = "shufflenetv2", shufflenet_v2
    return found


NETWORKS = _networks()  # name -> (family, number of classes -> network with fresh weights)
