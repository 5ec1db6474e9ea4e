"""A run that is killed goes on from its last checkpoint and ends as if nothing had happened, bit for bit.

A checkpoint holds all that the next epochs depend on: weights, optimizers, schedules, scaler, what callbacks keep, and the state
of every random generator. Callbacks that keep something have `snapshot()`, plain values and tensors, and `resume(state)`.
"""

import hashlib
import io
import random
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastai.callback.core import Callback, CancelEpochException
from fastai.learner import Learner
from fastai.torch_core import get_model, rank_distrib
from fastcore.foundation import L
from torch import Tensor

from kdfast.core.files import write_atomically
from kdfast.core.rng import set_torch_states, torch_states


class Checkpoint(Callback):
    """Write `path` after epochs, at most every so many seconds; take up what lies there if it is of the same `about`."""

    order = 10_000  # in before_fit and after_epoch after all who keep something

    def __init__(
        self,
        path: str | Path,
        about: dict[str, Any],  # what must be equal to go on: the run, its code, versions, processor
        every: float = 20.0,  # seconds; 0: after every epoch
    ):
        self.path, self.about, self.every = Path(path), about, every
        self.found = read(self.path, about)
        self.start = 0 if self.found is None else self.found["epoch"] + 1
        self.resumed = 0 if self.found is None else self.found["resumed"] + 1
        self.before = 0.0 if self.found is None else self.found["seconds"]  # spent on training before this process

    def before_fit(self):
        self.run = not hasattr(self.learn, "lr_finder")
        if not self.run:
            return
        self.began = self.written = time.perf_counter()
        if self.found is not None:
            restore(self.learn, self.found["state"])
            self.found = None

    def after_epoch(self):
        now = time.perf_counter()
        ended = self.epoch + 1 == self.n_epoch and self.before + now - self.began >= self.every > 0  # what follows may fail
        if rank_distrib() == 0 and (ended or (self.epoch + 1 < self.n_epoch and now - self.written >= self.every)):
            spent = {"epoch": self.epoch, "seconds": self.before + now - self.began, "resumed": self.resumed}
            try:
                write(self.path, {"about": self.about, **spent, "state": collect(self.learn)})
            except OSError as error:  # a full disk costs the checkpoint, not the run
                why = error.strerror or error
                warnings.warn(f"checkpoint {self.path} cannot be written ({why}): the run goes on", stacklevel=2)
            self.written = time.perf_counter()

    def remove(self) -> None:
        """Once the record is written."""
        self.path.unlink(missing_ok=True)

    def __reduce__(self):
        return Callback, ()


@contextmanager
def from_epoch(learn: Learner, start: int) -> Iterator[None]:
    """A `fit` inside begins with that epoch, from 0; fastai's SkipToEpoch would let callbacks see the skipped ones."""

    def epochs():
        for epoch in range(start, learn.n_epoch):
            learn.epoch = epoch
            learn._with_events(learn._do_epoch, "epoch", CancelEpochException)

    learn._do_fit = epochs
    try:
        yield
    finally:
        del learn._do_fit


def collect(learn: Learner) -> dict[str, Any]:
    """Everything that the epochs to come depend on, as plain values and tensors."""
    recorder = learn.recorder
    recorder.losses = _numbers(recorder.losses)
    scaler = getattr(learn, "scaler", None)
    return {
        "model": get_model(learn.model).state_dict(),
        "optimizer": learn.opt.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "train_iter": learn.train_iter,
        "recorder": {
            "values": [[None if v is None else float(v) for v in row] for row in recorder.values],
            "lrs": [float(v) for v in recorder.lrs],
            "losses": list(recorder.losses),
            "iters": list(recorder.iters),
            "smooth": [recorder.smooth_loss.count, recorder.smooth_loss.val.as_subclass(Tensor).detach()],
        },
        "callbacks": {cb.name: cb.snapshot() for cb in learn.cbs if hasattr(type(cb), "snapshot")},
        "random": _random(learn),
    }


def restore(learn: Learner, state: dict[str, Any]) -> None:
    """Take up what `collect` gave, after every callback's before_fit."""
    get_model(learn.model).load_state_dict(state["model"])
    learn.opt.load_state_dict(state["optimizer"])
    if state["scaler"] is not None:
        learn.scaler.load_state_dict(state["scaler"])
    learn.train_iter = state["train_iter"]
    kept, recorder = state["recorder"], learn.recorder
    recorder.values = [L(row) for row in kept["values"]]
    recorder.lrs, recorder.losses, recorder.iters = kept["lrs"], kept["losses"], kept["iters"]
    recorder.smooth_loss.count, recorder.smooth_loss.val = kept["smooth"]
    for cb in learn.cbs:
        if cb.name in state["callbacks"]:
            cb.resume(state["callbacks"][cb.name])
    _set_random(learn, state["random"])


def _numbers(values: list[Tensor | float]) -> list[float]:
    """One number for each; those that are still on a device come from it at once."""
    fetched = [v.as_subclass(Tensor) for v in values if isinstance(v, Tensor)]
    numbers = iter(torch.stack(fetched).tolist() if fetched else ())
    return [next(numbers) if isinstance(v, Tensor) else float(v) for v in values]


def _random(learn: Learner) -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch_states(),
        "loader": learn.dls.train.rng.getstate(),
    }


def _set_random(learn: Learner, states: dict[str, Any]) -> None:
    random.setstate(_tuples(states["python"]))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    set_torch_states([state.cpu() for state in states["torch"]])
    learn.dls.train.rng.setstate(_tuples(states["loader"]))


def _tuples(state: Any) -> tuple:
    version, internal, gauss = state
    return version, tuple(internal), gauss


# Files


def write(path: Path, content: dict[str, Any]) -> None:
    """The SHA-256 of the rest, and the rest: half a file, or an edited one, is known as such."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    body = buffer.getvalue()
    write_atomically(path, hashlib.sha256(body).digest() + body)


def whole(path: Path) -> bool:
    """Whether a checkpoint is as it was written."""
    content = path.read_bytes()
    return hashlib.sha256(content[32:]).digest() == content[:32]


def read(path: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """What `write` wrote; None where there is no file or, with a warning that says why, one that is damaged or of another run."""
    if not path.is_file():
        return None
    if not whole(path):
        warnings.warn(f"checkpoint {path} is damaged: the run begins anew", stacklevel=2)
        return None
    found = torch.load(io.BytesIO(path.read_bytes()[32:]), map_location="cpu", weights_only=True)
    differ = sorted(key for key in about if found["about"].get(key) != about[key])
    if differ:
        warnings.warn(f"checkpoint {path} is of another {', '.join(differ)}: the run begins anew", stacklevel=2)
        return None
    return found
