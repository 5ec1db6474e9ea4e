"""Losses of feature maps (B, C, H, W), or lists of them, one a stage, shallow to deep."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.distill.losses.contract import contract, gap_of, unit


def _stages(students, teachers) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of maps, the larger average-pooled to the smaller (one that fits already stays as it is)."""
    for s, t in zip(students, teachers, strict=True):
        size = [min(lengths) for lengths in zip(s.shape[2:], t.shape[2:], strict=True)]
        yield F.adaptive_avg_pool2d(s, size), F.adaptive_avg_pool2d(t, size)


@contract
def fitnet(student: Tensor, teacher: Tensor) -> Tensor:
    """mean (f_s − f_t)² over all elements. Equal shapes: a regressor on the student comes first.

    Romero et al.: FitNets: Hints for Thin Deep Nets, ICLR 2015, arXiv:1412.6550. The paper has ½ · the sum.
    """
    return gap_of(student, teacher).square().mean()


@contract
def at(students: Sequence[Tensor], teachers: Sequence[Tensor], p: float = 2) -> Tensor:
    """Σ_stages mean (q_s − q_t)² over B·H·W, q = mean_c f^p as a vector of length 1 over H·W.

    Stage maps (B, ·, H, W): any channels, the larger map average-pooled to the smaller.
    Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017, arXiv:1612.03928. The paper has |f|^p, the same
    for even p, and the norm of the difference, not its mean square.
    """
    pairs = ([unit(f.pow(p).mean(1).flatten(1), dim=1) for f in pair] for pair in _stages(students, teachers))
    return sum(gap_of(q_s, q_t).square().mean() for q_s, q_t in pairs)


@contract
def nst(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """Σ_stages mean k(t, t) + mean k(s, s) − 2 · mean k(s, t), k(a, b) = ⟨a, b⟩² over the channels a, b of an example.

    Stage maps (B, ·, H, W), channels of length 1 over H·W; any channels, the larger map average-pooled to the smaller;
    means over B and the pairs of channels: a squared MMD.
    Huang, Wang: Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, arXiv:1707.01219.
    """

    def kernel(a, b):
        return (a @ b.mT).square().mean()

    pairs = ([unit(f.flatten(2), dim=2) for f in pair] for pair in _stages(students, teachers))
    return sum(kernel(t, t) + kernel(s, s) - 2 * kernel(s, t) for s, t in pairs)


@contract
def ofd(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """mean_i Σ_{C,H,W} (s − m(t))² where s > m(t) or t > 0, else 0; m(t) = max(t, margin).

    Maps before the ReLU (B, C, H, W), the student's from a connector; margin (1, C, 1, 1) < 0. A teacher below 0 only
    says "off": a student lower still is right already.
    Heo et al.: A Comprehensive Overhaul of Feature Distillation, ICCV 2019, arXiv:1904.01866.
    """
    target = torch.maximum(teacher, margin)
    wrong = (student > target) | (target > 0)
    return (gap_of(student, target).square() * wrong).flatten(1).sum(1).mean()


@contract
def cat(student: Tensor, teacher: Tensor, size: int = 2, normalize: bool = False) -> Tensor:
    """mean (a_s − a_t)² over all elements, a = class activation maps average-pooled to size × size.

    Maps (B, C, ·, ·), C classes; `normalize` makes each pooled map a vector of length 1 (the code: for some pairs).
    Guo et al.: Class Attention Transfer Based Knowledge Distillation, CVPR 2023, arXiv:2304.12777.
    """
    maps = [F.adaptive_avg_pool2d(f, size) for f in (student, teacher)]
    if normalize:
        maps = [unit(f, dim=(2, 3)) for f in maps]
    return gap_of(*maps).square().mean()


@contract
def review(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """Hierarchical context loss: Σ_stages Σ_k w_k · MSE(pool_k f_s, pool_k f_t) / Σ_k w_k.

    Stage maps (B, C, H, W), the student's fused to equal shapes: as they are, w = 1, then average-pooled to k×k for
    those of k = 4, 2, 1 below H, w halved each time. MSE over all elements.
    Chen et al.: Distilling Knowledge via Knowledge Review, CVPR 2021, arXiv:2104.09044.
    """
    total = 0
    for s, t in zip(students, teachers, strict=True):
        gap = gap_of(s, t)  # pooling is linear: pool the difference
        levels = [gap, *(F.adaptive_avg_pool2d(gap, k) for k in (4, 2, 1) if k < gap.shape[2])]
        weights = [2.0**-i for i in range(len(levels))]
        total = total + sum(w * x.square().mean() for w, x in zip(weights, levels, strict=True)) / sum(weights)
    return total
