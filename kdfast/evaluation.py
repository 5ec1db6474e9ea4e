"""Predictions of a network and what they are worth."""

from contextlib import nullcontext

import torch
from fastai.data.core import TfmdDL
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kdfast.hooks import evaluating
from kdfast.teacher import Teacher


@torch.no_grad()
def predict(model: nn.Module | Teacher, dl: TfmdDL) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and labels (N,) on the CPU, in the loader's order, with the model in eval mode; its modes are restored."""
    with evaluating(model) if isinstance(model, nn.Module) else nullcontext():  # a Teacher sees to it
        batches = [(model(x).float().cpu(), y.cpu()) for x, y in dl]
    logits, labels = zip(*batches, strict=True)
    return torch.cat(logits), torch.cat(labels)


def metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and, above five classes, top-5 accuracy as fractions, and the mean NLL in nats; float64 inside."""
    z = logits.double()
    ranked = z.argsort(dim=1, descending=True, stable=True)[:, :5]
    hit = ranked == labels[:, None]
    found = {"top1": hit[:, 0].double().mean().item(), "nll": cross_entropy(z, labels).item()}
    if logits.shape[1] > 5:
        found["top5"] = hit.any(1).double().mean().item()
    return found


def agreement(student: Tensor, teacher: Tensor) -> float:
    """Fraction of examples to which both logits (N, C) give the same class."""
    return (student.argmax(1) == teacher.argmax(1)).double().mean().item()
