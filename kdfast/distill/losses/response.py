"""Losses of logits (B, C)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.linalg import vector_norm

from kdfast.distill.losses.contract import contract, reduce, varying


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) of each row, both given as log-probabilities."""
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)


def _decouple(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The prediction in two parts, in logs: b = (p_y, 1−p_y), (B, 2), and q = softmax of the others, (B, C−1).

    The target's column is taken out: −inf in its place ends in NaN, −1000 is not always low enough. b comes from the
    log-odds of y against the others: 1−p_y and log p_y stay exact where p_y rounds to 1.
    """
    others = torch.arange(logits.shape[1] - 1, device=logits.device)
    others = logits.gather(1, others + (others >= target[:, None]))
    odds = logits.gather(1, target[:, None]) - others.logsumexp(1, keepdim=True)
    return F.logsigmoid(torch.cat([odds, -odds], 1)), others.log_softmax(1)


@contract
def kd(student: Tensor, teacher: Tensor, T: float = 4) -> Tensor:
    """T² · mean_i KL(p_t ‖ p_s). Logits (B, C); mean over B, not over B·C.

    Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, arXiv:1503.02531.
    """
    return T**2 * _kl((student / T).log_softmax(1), (teacher / T).log_softmax(1)).mean()


@contract
def hard(student: Tensor, teacher: Tensor) -> Tensor:
    """mean_i −log softmax(z_s)[argmax z_t]: cross-entropy with the teacher's decision. Logits (B, C).

    Touvron et al.: Training data-efficient image transformers & distillation through attention, arXiv:2012.12877.
    """
    return F.cross_entropy(student, teacher.argmax(1))


@contract
def standardize(logits: Tensor) -> Tensor:
    """(z − mean z) / (1e-7 + std z) over the classes, std unbiased. Logits (B, C) → (B, C), for `kd`, `dkd`, ….

    The gradient passes through mean and std; it is 0 at constant logits (1e7 in the code).
    Sun et al.: Logit Standardization in Knowledge Distillation, CVPR 2024, arXiv:2403.01427.
    """
    logits = varying(logits, 1)
    return (logits - logits.mean(1, keepdim=True)) / (1e-7 + logits.std(1, keepdim=True))


@contract
def dkd(student, teacher, target, T: float = 4, alpha: float = 1, beta: float = 8, *, reduction="mean") -> Tensor:
    """T² · mean_i [alpha · KL(b_t ‖ b_s) + beta · KL(q_t ‖ q_s)], b = (p_y, 1−p_y), q = softmax over the others of z/T.

    Logits (B, C); of two classes, the second term is 0.
    Zhao et al.: Decoupled Knowledge Distillation, CVPR 2022, arXiv:2203.08679. The code takes logs of probabilities and
    masks with −1000: the same number, but infinite or wrong for large logits.
    """
    (b_s, q_s), (b_t, q_t) = _decouple(student / T, target), _decouple(teacher / T, target)
    return reduce(T**2 * (alpha * _kl(b_s, b_t) + beta * _kl(q_s, q_t)), reduction)


def _pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Correlation along `dim`. 1e-8 is added, as in the code of DIST: probabilities vary little, so it can be seen."""
    a, b = (x - x.mean(dim, keepdim=True) for x in (varying(a, dim), b))
    return (a * b).sum(dim) / (vector_norm(a, dim=dim) * vector_norm(b, dim=dim) + 1e-8)


@contract
def dist(student: Tensor, teacher: Tensor, T: float = 1, beta: float = 1, gamma: float = 1) -> Tensor:
    """T² · [beta · (1 − mean_i ρ(p_s[i, :], p_t[i, :])) + gamma · (1 − mean_c ρ(p_s[:, c], p_t[:, c]))], ρ Pearson's.

    Logits (B, C). A constant correlates with nothing, so for a batch of one the second term is gamma·T².
    Huang et al.: Knowledge Distillation from A Stronger Teacher, NeurIPS 2022, arXiv:2205.10536. T and T² are from the
    code for classification; that for segmentation has neither.
    """
    p_s, p_t = (student / T).softmax(1), (teacher / T).softmax(1)
    inter, intra = (1 - _pearson(p_s, p_t, dim).mean() for dim in (1, 0))
    return T**2 * (beta * inter + gamma * intra)


@contract
def nkd(student, teacher, target, T: float = 1, gamma: float = 1.5, *, reduction="mean") -> Tensor:
    """mean_i [−p_t[y] · log p_s[y] − gamma · T² · Σ_{c≠y} q_t[c] · log q_s[c]], q = softmax over the others of z/T.

    Logits (B, C); p is at temperature 1 whatever T. Cross-entropies, so not 0 where student and teacher agree.
    Yang et al.: From Knowledge Distillation to Self-Knowledge Distillation, ICCV 2023, arXiv:2303.13005.
    """
    (b_s, _), (b_t, _) = _decouple(student, target), _decouple(teacher, target)
    (_, q_s), (_, q_t) = _decouple(student / T, target), _decouple(teacher / T, target)
    on_target = -b_t[:, 0].exp() * b_s[:, 0]
    return reduce(on_target - gamma * T**2 * (q_t.exp() * q_s).sum(1), reduction)


@contract
def wsld(student, teacher, target, T: float = 4, *, reduction="mean") -> Tensor:
    """T² · mean_i w_i · (−Σ_c p_t · log p_s), w_i = 1 − exp(−CE_s / (CE_t + 1e-7)) at temperature 1, without gradient.

    Logits (B, C). An example that the student knows better than the teacher does weighs less.
    Zhou et al.: Rethinking Soft Labels for Knowledge Distillation, ICLR 2021, arXiv:2102.00650; 1e-7 is the code's.
    """
    ce_s, ce_t = (-_decouple(z.detach(), target)[0][:, 0] for z in (student, teacher))
    weight = -torch.expm1(-ce_s / (ce_t + 1e-7))
    soft = -((teacher / T).softmax(1) * (student / T).log_softmax(1)).sum(1)
    return reduce(T**2 * weight * soft, reduction)
