"""Predictions of a network and what they are worth."""

from contextlib import nullcontext

import torch
from fastai.data.core import TfmdDL
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_f1_score

from kdfast.distill.hooks import evaluating
from kdfast.distill.teacher import Teacher


@torch.no_grad()
def predict(model: nn.Module | Teacher, dl: TfmdDL) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and labels (N,) on the CPU, in the loader's order, with the model in eval mode; its modes are restored."""
    with evaluating(model) if isinstance(model, nn.Module) else nullcontext():  # a Teacher sees to it
        batches = [(model(x).float().cpu(), y.cpu()) for x, y in dl]
    logits, labels = zip(*batches, strict=True)
    return torch.cat(logits), torch.cat(labels)


BINS = 15  # of the calibration error, as in Guo et al.


def metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Of logits (N, C) and labels (N,), in float64: fractions but for `nll`, the mean in nats.

    `top1` and, above five classes, `top5` accuracy; `macro_f1`, the mean over classes (one that is neither there nor
    predicted does not count); `ece`, the expected calibration error over 15 bins of confidence (Guo et al., ICML 2017,
    arXiv:1706.04599).
    """
    z, classes = logits.double(), logits.shape[1]
    ranked = z.argsort(dim=1, descending=True, stable=True)[:, :5]
    hit = ranked == labels[:, None]
    found = {"top1": hit[:, 0].double().mean().item(), "nll": cross_entropy(z, labels).item()}
    if classes > 5:
        found["top5"] = hit.any(1).double().mean().item()
    found["macro_f1"] = multiclass_f1_score(ranked[:, 0], labels, classes, average="macro").item()
    found["ece"] = multiclass_calibration_error(z.softmax(1), labels, classes, n_bins=BINS, norm="l1").item()
    return found


def beside_teacher(student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, float | None]:
    """What a student made of its teacher, both as logits (N, C).

    `agreement`: fraction of examples to which both give the same class; `kl`: mean KL(teacher ‖ student) in nats at temperature
    1; the student's accuracy where the teacher is right and where it is wrong (None where it never is).
    """
    ours, theirs = student.argmax(1), teacher.argmax(1)
    right, correct = theirs == labels, (ours == labels).double()
    log_s, log_t = student.double().log_softmax(1), teacher.double().log_softmax(1)
    return {
        "agreement": (ours == theirs).double().mean().item(),
        "kl": kl_div(log_s, log_t, reduction="batchmean", log_target=True).item(),
        "top1_where_teacher_right": correct[right].mean().item() if right.any() else None,
        "top1_where_teacher_wrong": correct[~right].mean().item() if (~right).any() else None,
    }
