"""What is trained beside the student so that its features can be compared with the teacher's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Regressor(nn.Module):
    """FitNets' regressor: a convolution to the teacher's channels and size, BatchNorm, ReLU. Maps (B, C, H, W).

    3×3 with stride 2 where the student's map is twice as large, transposed 4×4 with stride 2 where it is half, else
    valid with kernel 1 + H_s − H_t; where that does not exist (the student's map is smaller), 1×1, and `match` pools.
    """

    def __init__(self, student: Tensor, teacher: Tensor):
        super().__init__()
        (c_s, h_s, w_s), (c_t, h_t, w_t) = student.shape[1:], teacher.shape[1:]
        if (h_s, w_s) == (2 * h_t, 2 * w_t):
            conv = nn.Conv2d(c_s, c_t, 3, 2, 1)
        elif (2 * h_s, 2 * w_s) == (h_t, w_t):
            conv = nn.ConvTranspose2d(c_s, c_t, 4, 2, 1)
        else:
            conv = nn.Conv2d(c_s, c_t, (max(1 + h_s - h_t, 1), max(1 + w_s - w_t, 1)))
        self.layers = nn.Sequential(conv, nn.BatchNorm2d(c_t), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def connector(c_student: int, c_teacher: int) -> nn.Sequential:
    """OFD's: a 1×1 convolution without bias and BatchNorm, drawn and set as in its code."""
    conv, norm = nn.Conv2d(c_student, c_teacher, 1, bias=False), nn.BatchNorm2d(c_teacher)
    nn.init.normal_(conv.weight, 0, (2 / c_teacher) ** 0.5)
    return nn.Sequential(conv, norm)


def match(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The larger map average-pooled to the smaller; maps of one size as they are."""
    size = [min(lengths) for lengths in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    student, teacher = (x if list(x.shape[2:]) == size else F.adaptive_avg_pool2d(x, size) for x in (student, teacher))
    return student, teacher


def margin(norm: nn.BatchNorm2d) -> Tensor:
    """E[x | x < 0] for x ~ N(bias, weight²), a channel each, (1, C, 1, 1); −3·|weight| where x < 0 is rarer than 0.001.

    OFD's margin (arXiv:1904.01866): what the teacher's BatchNorm says of the values that its ReLU cuts off.
    """
    std, mean = norm.weight.detach().double().abs().clamp_min(1e-12), norm.bias.detach().double()
    below = torch.special.ndtr(-mean / std)
    density = torch.exp(-((mean / std) ** 2) / 2) / (2 * torch.pi) ** 0.5
    value = torch.where(below > 0.001, mean - std * density / below.clamp_min(1e-300), -3 * std)
    return value.to(norm.weight.dtype)[None, :, None, None]
