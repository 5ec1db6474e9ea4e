"""Losses of the relations between a batch's examples: embeddings (B, D), or maps, flattened; D may differ except in `cc`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.distill.losses.contract import contract, gap_of, unit


@contract
def sp(student: Tensor, teacher: Tensor) -> Tensor:
    """‖G_t − G_s‖²_F / B², G = F·Fᵀ with rows of L2 length 1, F = features (B, ·) flattened.

    Tung, Mori: Similarity-Preserving Knowledge Distillation, ICCV 2019, arXiv:1907.09682.
    """
    g_s, g_t = (unit(f @ f.T, dim=1) for f in (student.flatten(1), teacher.flatten(1)))
    return gap_of(g_s, g_t).square().mean()


def _relations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Distances between rows over their mean, (B, B), and cosines of the angles j–i–k, (B, B, B).

    Both from the differences: distances through x·xᵀ lose half the digits when rows are close. The clamp keeps those of
    equal rows positive, with gradient 0, so "the mean of the positive ones" is the mean off the diagonal.
    """
    x = x.flatten(1)
    difference = x[:, None] - x[None]
    others = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    distance = difference.square().sum(2).clamp_min(1e-12).sqrt() * others
    direction = unit(difference, dim=2)
    return distance / (distance.sum() / others.sum()), direction @ direction.mT


@contract
def rkd(student: Tensor, teacher: Tensor, distance: float = 25, angle: float = 50) -> Tensor:
    """distance · mean_{ij} ℓ(d_s, d_t) + angle · mean_{ijk} ℓ(cos_s, cos_t), ℓ = smooth L1 (Huber at 1).

    Features (B, ·); d = L2 distances over the mean of the positive ones, cos = ⟨e_ij, e_ik⟩ of unit difference vectors;
    means over all B² and B³, the zeros of equal indices included. One example: 0. Memory B²·D + B³.
    Park et al.: Relational Knowledge Distillation, CVPR 2019, arXiv:1904.05068.
    """
    if len(student) == 1:
        return 0 * student.sum()  # no relations, but still on the graph
    (d_s, cos_s), (d_t, cos_t) = _relations(student), _relations(teacher)
    return distance * F.smooth_l1_loss(d_s, d_t) + angle * F.smooth_l1_loss(cos_s, cos_t)


@contract
def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """mean_{ij} P_t · log((P_t + 1e-7) / (P_s + 1e-7)), P = (cos + 1)/2 between rows, each row over its sum.

    Features (B, ·), x / (‖x‖ + 1e-7); mean over B², where the paper sums, without the diagonal.
    Passalis, Tefas: Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018, arXiv:1803.10837.
    """

    def affinity(f):
        f = unit(f.flatten(1), dim=1, eps=1e-7)
        similarity = ((f @ f.T + 1) / 2).clamp_min(0)  # a cosine of −1 may round to less, and its log be NaN
        return similarity / similarity.sum(1, keepdim=True)

    p_s, p_t = affinity(student), affinity(teacher)
    return (p_t * ((p_t + 1e-7) / (p_s + 1e-7)).log()).mean()


@contract
def cc(student: Tensor, teacher: Tensor) -> Tensor:
    """mean_i Σ_d δ[i, d] · δ[i+1, d], δ = |f_s − f_t|, over the B−1 neighbours in the batch. One example: 0.

    Embeddings (B, D) of equal D: a linear layer on both comes first.
    Peng et al.: Correlation Congruence for Knowledge Distillation, ICCV 2019, arXiv:1904.01802. The paper compares
    kernel matrices of all pairs; this is the authors' code, by way of RepDistiller.
    """
    delta = gap_of(student, teacher).flatten(1).abs()
    return (delta[:-1] * delta[1:]).sum() / max(len(delta) - 1, 1)
