"""A fastai Learner for a run, and the callbacks every run has."""

import math
import random
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import AvgSmoothLoss, Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import get_model, to_detach
from fastcore.foundation import L
from torch import Tensor
from torch.amp import GradScaler

from kdfast.core.config import Run
from kdfast.core.errors import KdfastError
from kdfast.data.loaders import ImageData, dataloaders
from kdfast.distill.callback import Distill
from kdfast.distill.method import create_method
from kdfast.distill.teacher import Teacher
from kdfast.distill.teacher_outputs import Cached
from kdfast.models.registry import create_model
from kdfast.training.checkpoint import from_epoch
from kdfast.training.optim import decay_of_groups, groups, optimizer, recipe_callbacks, schedule


def set_seed(seed: int) -> None:
    """Seed every generator a run draws from; deterministic kernels where torch has a choice."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # all devices
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


class StopOnNaN(Callback):
    """A loss that is not a number ends the run with a sentence instead of a worthless record."""

    def __init__(self, run_id: str):
        self.run_id = run_id

    def after_train(self):
        loss = self.loss.item()  # once an epoch: a device need not be waited for at every step
        if not math.isfinite(loss):
            raise KdfastError(
                f"the loss of run {self.run_id} is {loss} in epoch {self.epoch}: lower lr (at most {self.lr:g} now) or "
                "check the images"
            )


class SmoothLoss(AvgSmoothLoss):
    """fastai's smoothed training loss, which stays on the device: fastai's waits for the device at every step."""

    def accumulate(self, learn):
        self.count += 1
        loss = to_detach(learn.loss.mean(), cpu=False)
        self.val = torch.lerp(loss, self.val.to(loss.device), self.beta)


class KeepBest(Callback):
    """A copy in memory of the weights after the epoch with the lowest validation loss, which are recorded beside the last."""

    order = 60  # after the Recorder

    def before_fit(self):
        self.run = not hasattr(self.learn, "lr_finder")  # as fastai's own trackers: nothing to keep there
        self.best_loss, self.best_epoch, self.best_state = math.inf, 0, None

    def after_epoch(self):
        loss = self.recorder.values[-1][self.recorder.metric_names.index("valid_loss") - 1]
        if loss < self.best_loss:
            self.best_loss, self.best_epoch = loss, self.epoch
            self.best_state = {k: v.detach().clone() for k, v in get_model(self.model).state_dict().items()}

    def snapshot(self):
        return {"loss": self.best_loss, "epoch": self.best_epoch, "state": self.best_state}

    def resume(self, state):
        self.best_loss, self.best_epoch, self.best_state = state["loss"], state["epoch"], state["state"]


class Views(Callback):
    """Every epoch sees the next view of the training images."""

    def before_train(self):
        if self.dl.augment is not None:
            self.dl.augment.view = self.dl.augment.of_epoch(self.epoch)


def create_learner(run: Run, data: ImageData, teacher: Teacher | None = None, cache: str | Path = "cache") -> Learner:
    """A fastai Learner that is ready to `fit(learn, run)`; with a teacher it carries the Distill callback.

    `cache` is the folder of cached teacher outputs, for a run that asks for such. Everything random is seeded here: the same
    run gives the same weights on one type of processor and thread count.
    """
    set_seed(run.seed)
    model = create_model(run.student, len(data.classes), data.size, run.weights, run.head)
    view_seed = run.seed if run.view_seed < 0 else run.view_seed
    dls: DataLoaders = dataloaders(data, run.batch_size, run.augment, view_seed, run.views)
    cbs = [StopOnNaN(run.id), KeepBest(), Views(), *recipe_callbacks(run), *_speed(run, dls.device)]
    if teacher is not None:
        method = create_method(run.method, run.method_args)
        if run.compile and any(set(part.features) - {"logits"} for part in method.parts):
            raise KdfastError(f"method {run.method} compares features, which a compiled network hides: set compile to false")
        cached = None if run.teacher_outputs == "live" else Cached(cache, run.teacher_outputs, run.fallback)
        cbs.append(Distill(teacher, method, cached=cached))
    if run.compile:
        model.compile()  # in place: the state dict keeps its names
    learn = Learner(
        dls, model, CrossEntropyLossFlat(), optimizer(run), lr=run.lr, splitter=groups(run), wd=decay_of_groups(run),
        metrics=accuracy, cbs=cbs,
    )  # fmt: skip
    learn.recorder.smooth_loss = SmoothLoss(learn.recorder.smooth_loss.beta)
    return learn


class MixedPrecisionCPU(MixedPrecision):
    """fastai's, which knows CUDA alone, for bfloat16 on a CPU: it needs no scaled gradients."""

    name = "mixed_precision"

    def before_fit(self):
        self.autocast, self.learn.scaler, self.scales = (
            torch.autocast("cpu", torch.bfloat16),
            GradScaler("cpu", enabled=False),
            L(),
        )


def _speed(run: Run, device: torch.device) -> list[Callback]:
    """The callbacks of a run's precision and memory format; a KdfastError for what the device cannot do."""
    cbs: list[Callback] = [ChannelsLast()] if run.channels_last else []
    if run.precision == "float32":
        return cbs
    if device.type == "cuda":
        return [*cbs, MixedPrecision(AMPMode.BF16 if run.precision == "bfloat16" else AMPMode.FP16)]
    if run.precision == "float16":
        raise KdfastError("precision float16 needs a CUDA device: use bfloat16 or float32")
    return [*cbs, MixedPrecisionCPU(AMPMode.BF16)]


def fit(learn: Learner, run: Run, progress: bool = True) -> None:
    """Train as the run says, from the epoch after its checkpoint if it has one. Without `progress`, nothing is drawn."""
    start = learn.checkpoint.start if hasattr(learn, "checkpoint") else 0
    with ExitStack() as stack:
        stack.enter_context(from_epoch(learn, start))
        if not progress:
            bars = learn.cbs.filter(lambda cb: isinstance(cb, ProgressCallback))
            stack.enter_context(learn.removed_cbs(bars))
            stack.enter_context(learn.no_logging())
        learn.fit(run.epochs, run.lr, cbs=schedule(run))


def history(learn: Learner) -> dict[str, list[float | None]]:
    """The Recorder's table by column: losses are means of the epoch, `valid_loss` is the student's own NLL."""
    names = [name for name in learn.recorder.metric_names if name not in ("epoch", "time")]
    columns = zip(*learn.recorder.values, strict=True)
    return {name: [None if v is None else float(v) for v in column] for name, column in zip(names, columns, strict=True)}


def plateau(valid_loss: list[float]) -> dict[str, float | bool]:
    """Whether training had come to rest: over the last tenth of the epochs the validation NLL fell by less than 1 %."""
    tenth = max(2, round(len(valid_loss) / 10))
    fell = float(1 - valid_loss[-1] / valid_loss[-tenth]) if len(valid_loss) >= tenth else 1.0
    return {"valid_nll_fell": fell, "reached": fell < 0.01}


def to_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of a state dict as contiguous CPU tensors, as safetensors wants them.

    Always a copy: on a CPU `.cpu()` and mostly `.contiguous()` hand back the very tensors that the next `load_state_dict` fills.
    """
    return {name: torch.empty(value.shape, dtype=value.dtype).copy_(value.detach()) for name, value in state.items()}
