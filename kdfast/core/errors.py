"""What a user sees when the input is wrong: one sentence."""

import os
from collections.abc import Iterable
from difflib import get_close_matches


class KdfastError(Exception):
    """One sentence: what is wrong, where, and what would be right. Shown without a traceback in notebooks."""

    def __init__(self, sentence: str):
        super().__init__(sentence)
        self.sentence = sentence  # fastai rewrites `args` of whatever a callback raises

    def __str__(self) -> str:
        return self.sentence

    def _render_traceback_(self) -> list[str]:  # IPython's hook for how an exception is shown
        return [f"KdfastError: {self}"]


def unknown(kind: str, name: str, known: Iterable[str], where: str = "") -> KdfastError:
    """The error for a name that is not one of `known`, with the nearest known names."""
    known = sorted(known)
    near = get_close_matches(str(name), known, n=3, cutoff=0.5) or known[:12]
    place = f" in {where}" if where else ""
    return KdfastError(f"unknown {kind} {name!r}{place}; the nearest known: {', '.join(near)}")


def number_given(name: str, default: float, unit: str) -> float:
    """The number in an environment variable, or `default` where it is not set; a KdfastError if it is none."""
    given = os.environ.get(name, "")
    try:
        return float(given) if given else default
    except ValueError:
        raise KdfastError(f"{name} must be a number of {unit}, not {given!r}") from None
