"""Weights of losses that change while a student is trained."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kdfast.core.errors import KdfastError

Weight = float | Callable[[float], float]  # a number, or a schedule of the part of training that is done (0…1)


@dataclass(frozen=True)
class ramp:  # lower case as fastai's sched_lin
    """A weight that grows evenly over the first `epochs` epochs of a fit and reaches `end` in the last of them."""

    epochs: int
    end: float = 1

    def at(self, pct: float, epoch: int) -> float:
        return self.end * min((epoch + 1) / self.epochs, 1)

    def __mul__(self, factor: float) -> "ramp":
        return ramp(self.epochs, self.end * factor)

    def __repr__(self) -> str:
        return f"ramp({self.epochs})" if self.end == 1 else f"ramp({self.epochs}, {self.end:g})"


@dataclass(frozen=True)
class scaled:
    """start + factor · schedule: what is left to the other side (1 − alpha), or a multiple of a schedule."""

    schedule: Any
    factor: float
    start: float = 0

    def at(self, pct: float, epoch: int) -> float:
        return self.start + self.factor * weight_now(self.schedule, pct, epoch)


def is_schedule(weight: Any) -> bool:
    return callable(weight) or hasattr(weight, "at")


def weight_now(weight: Weight, pct: float, epoch: int) -> float:
    """A weight's value after the part `pct` of training, in `epoch` (from 0)."""
    if hasattr(weight, "at"):
        return weight.at(pct, epoch)
    return float(weight(pct)) if callable(weight) else weight


def checked_weight(method: str, name: str, value: Any) -> Weight:
    """A number, a schedule, or, from papermill and study files, `{ramp: epochs, end: value}`."""
    if isinstance(value, Mapping) and {"ramp"} <= set(value) <= {"ramp", "end"}:
        value = ramp(value["ramp"], value.get("end", 1))
    if isinstance(value, ramp) and not value.epochs > 0:
        raise KdfastError(f"{name} of method {method} must grow over at least one epoch, not {value.epochs}")
    if is_schedule(value):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise KdfastError(
            f"argument {name} of method {method} must be a number from 0, a schedule or {{ramp: epochs}}, not {value!r}"
        )
    return value
