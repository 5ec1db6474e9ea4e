"""What every loss keeps to: types, autocast, a constant teacher, no broadcasting; and directions of vectors that may be 0."""

import functools
import inspect
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.linalg import vector_norm


def _prepare(value, constant: bool):
    """A tensor, or each of a list of them, ready to compute with: plain, in float32 or wider, detached if constant."""
    if isinstance(value, Tensor):
        value = value.as_subclass(Tensor)  # fastai's tensor types do not mix in `gather`, and slow every operation
        value = value.detach() if constant else value
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_prepare(v, constant) for v in value]
    return value


def contract(loss):
    """Holds a function to what the module promises; what comes from the teacher is known by the argument's name."""
    signature = inspect.signature(loss)

    @functools.wraps(loss)
    def wrapped(*args, **kwargs):
        arguments = signature.bind(*args, **kwargs).arguments
        values = {k: _prepare(v, constant=k in ("teacher", "teachers", "margin")) for k, v in arguments.items()}
        student = next(iter(values.values()))
        student = student[0] if isinstance(student, list) else student
        with torch.autocast(student.device.type, enabled=False):
            return loss(**values)

    return wrapped


def reduce(values: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", not {reduction!r}')
    return values.mean() if reduction == "mean" else values


def gap_of(student: Tensor, teacher: Tensor) -> Tensor:
    """student − teacher, without broadcasting: a wrong shape would still give a number."""
    if student.shape != teacher.shape:
        raise ValueError(f"student and teacher differ in shape: {tuple(student.shape)} and {tuple(teacher.shape)}")
    return student - teacher


# Zero has no direction and a constant no shape. There the published losses have gradients of 1/eps (1e7 to 1e12, inf in
# float16) or NaN; here 0. It happens: dead channels, equal rows, torchvision's ViT, whose head starts at zero.


def unit(x: Tensor, dim, eps: float = 0) -> Tensor:
    """x / (‖x‖₂ + eps) over `dim`; without eps, `F.normalize`. A zero stays zero, with gradient 0."""
    norm = vector_norm(x, dim=dim, keepdim=True)
    return torch.where(norm > 1e-12, x, x.detach()) / (norm.clamp_min(1e-12) + eps)


def varying(x: Tensor, dim: int) -> Tensor:
    """x, with gradient 0 where it is constant along `dim`."""
    return torch.where(x.amax(dim, keepdim=True) > x.amin(dim, keepdim=True), x, x.detach())
