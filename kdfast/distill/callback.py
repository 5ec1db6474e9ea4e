"""The fastai callback that adds a distillation loss to a Learner.

student = vision_learner(dls, resnet18, metrics=accuracy, cbs=Distill(teacher, DKD(beta=2)))
student.fine_tune(10)
"""

import time
from collections.abc import Sequence
from copy import copy, deepcopy
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.mixup import MixHandler
from fastai.learner import ValueMetric
from fastai.torch_core import get_model
from torch import Tensor, nn

from kdfast.core.errors import KdfastError
from kdfast.core.rng import OwnStream
from kdfast.distill.features import Features, Outputs
from kdfast.distill.hooks import evaluating, unwatch, watch_once, watching
from kdfast.distill.method import Method
from kdfast.distill.projector_training import ProjectorOptimizer, Trained
from kdfast.distill.projectors import margin
from kdfast.distill.schedules import weight_now
from kdfast.distill.stages import pair, probe
from kdfast.distill.teacher import as_teacher
from kdfast.distill.teacher_outputs import Cached, CachedOutputs

# Losses whose output is no distribution over classes, of torch and (as BaseLoss.func) of fastai
NOT_CLASSIFICATION = (
    nn.BCELoss, nn.BCEWithLogitsLoss, nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.MultiLabelSoftMarginLoss,
)  # fmt: skip


class Distill(Callback):
    """Train against `method`'s total of the student's own loss and its distillation losses.

    Validation loss and metrics stay the student's own. The training means of all terms are logged under the names
    `train_ce` and `train_<method>` in the Recorder. The Learner's model, optimizer and random numbers are those of a
    Learner without this callback; what is trained beside the student is in `projectors`, saved by `save` and `load`.
    Pickled or exported with its Learner, the callback becomes an empty one of fastai's.
    """

    order = 5  # before GradientAccumulation (6) divides the loss and MixedPrecision (10) leaves autocast
    run_valid = False

    def __init__(
        self,
        teacher: Any,  # what the student imitates: a Teacher, Learner, Module, or a list of the latter two
        method: Method,  # the losses between them and their weights
        stages: Sequence[str] | None = None,  # paths of the student's stages, shallow to deep; None: found
        teacher_stages: Sequence[str] | None = None,  # of the teacher's
        cached: Cached | None = None,  # compute the teacher's outputs once and share them; None: a live teacher
    ):
        self.teacher, self.method = as_teacher(teacher), method
        self.parts = [copy(part) for part in method.parts]  # they hold this student's projectors
        self.wanted = frozenset(feature for part in self.parts for feature in part.features)
        self.named, self.cached, self.cached_outputs = (stages, teacher_stages), cached, None
        self.obstacle: str | None = None  # why the teacher is live although its outputs were to be cached
        self.teacher_s = 0.0  # seconds of the last fit that the teacher took; on a GPU, to launch
        self.means = {name: _Mean() for name in ["ce", *(part.name for part in self.parts)]}
        self.trained = Trained()
        self.watch = _Watch(self) if self.wanted - {"logits"} else None
        if self.watch and not self.teacher.is_lazy and len(self.teacher.models) > 1:
            raise KdfastError(f"method {method.name} compares features with those of one teacher, not of several")

    # A property, so that whichever way a Learner gets or loses the callback, it gets or loses `watch`

    @property
    def learn(self):
        return self.__dict__.get("_learn")

    @learn.setter
    def learn(self, learn):
        old = self.learn
        self.__dict__["_learn"] = learn
        if self.watch is not None and learn is not old:
            if old is not None and self.watch in old.cbs:
                old.remove_cb(self.watch)
            if learn is not None and self.watch not in learn.cbs:
                learn.add_cb(self.watch)

    def __reduce__(self):
        return Callback, ()

    # A fit

    def before_fit(self):
        if self.learn.lock.locked():  # validate, get_preds, predict: nothing is trained
            return
        # of the projectors, and of whatever is drawn to make a teacher made only now: projectors must not depend on that
        self.stream, self.teachers_stream = OwnStream(), OwnStream()
        self.met, self.fitted, self.resumed = False, False, None
        self.teacher.meet(self.learn)
        self._check_loss()
        self._choose_source()
        self.learn.metrics = self._others_metrics() + [ValueMetric(m, f"train_{name}") for name, m in self.means.items()]
        self.seen, self.trained.stepping = {}, False
        self.kept = deepcopy(self.state_dict()) if hasattr(self.learn, "lr_finder") and self.projector_optimizer else None

    def after_fit(self):
        if self.learn.lock.locked():
            return
        self.learn.metrics = self._others_metrics()
        if self.kept is not None:  # as lr_find does with the student
            self.load_state_dict(self.kept)
        elif hasattr(self.learn, "lr_finder"):
            self.trained.forget()

    def _others_metrics(self) -> list:
        return [m for m in self.learn.metrics if not (isinstance(m, ValueMetric) and isinstance(m.func, _Mean))]

    def _choose_source(self):
        """A live teacher, or its cached teacher outputs."""
        self.cached_outputs, self.teacher_s = None, 0.0
        self.obstacle = self.cached.obstacle(self.learn, self.teacher, self.wanted) if self.cached else None
        if self.obstacle and not self.cached.fallback:
            raise KdfastError(f"teacher outputs cannot be cached here, for {self.obstacle}: use a live teacher, or fallback=True")
        with self.teachers_stream:
            if self.cached and not self.obstacle:
                wanted, shown = self.wanted | {"logits"}, hasattr(self.learn, "progress")
                loader, precision = self.learn.dls.train, _autocast(self.learn)
                self.cached_outputs = CachedOutputs(self.teacher, loader, self.cached, wanted, precision, shown)
            else:
                form = torch.channels_last if hasattr(self.learn, "channels_last") else torch.preserve_format
                self.teacher.to(next(self.learn.model.parameters()).device, form)

    def before_train(self):
        for mean in self.means.values():
            mean.reset()
        if self.cached_outputs is not None:
            augment = self.learn.dl.augment
            views = [augment.of_epoch(e) for e in range(self.epoch, self.n_epoch)] if augment else [0]
            with self.teachers_stream:
                self.cached_outputs.open(augment.view if augment else 0, ahead=list(dict.fromkeys(views)))

    def before_batch(self):
        if self.cached_outputs is not None:
            self.index = self.learn.dl.shown

    def prepare(self):
        """Called last thing before a training batch's forward: fit the features to both nets, once a fit, and watch."""
        if not self.fitted:
            with self.stream:
                self._find_features(tuple(x[:2] for x in self.xb))
            self.fitted = True
            self.stream.mine = self.resumed or self.stream.mine  # as it was before the run was interrupted
        self.seen = watch_once(get_model(self.learn.model), self.features.points)

    def after_loss(self):
        with self.stream:
            self._add_terms()

    def after_cancel_batch(self):
        if self.watch is not None:
            unwatch(get_model(self.learn.model))

    # The terms

    def _add_terms(self):
        own = self.learn.loss_grad
        prediction = self.learn.pred.as_subclass(Tensor)
        taught = self._taught()
        if not self.met:
            self._check_outputs(prediction, taught)
        student = self.features.outputs(prediction, self.seen) if self.watch else Outputs(prediction)
        if "pre_relu" in self.wanted:
            taught.margins = self.margins
        self.seen = {}
        self.means["ce"].add(own)
        ce = min(self._now(part.ce) for part in self.parts)
        total = own if ce == 1 else ce * own
        for part in self.parts:
            weight = self._now(part.weight)
            with torch.set_grad_enabled(weight != 0):
                value = self._value(part, student, taught.softened(getattr(part, "T", 1)))
            self.means[part.name].add(value)
            if weight != 0:
                total = total + weight * value
        if total is not own:
            self.learn.loss_grad = total
            self.learn.loss = self.learn.loss_grad.clone()

    def _taught(self) -> Outputs:
        """What the teacher says of this batch."""
        if self.cached_outputs is not None:
            self.teacher_s = self.cached_outputs.seconds
            return self.cached_outputs.outputs(self.index)
        if not self.met:
            self.teacher.check_dtype(self.x)
        start = time.perf_counter()
        taught = self.teacher.outputs(self.xb, self.teacher_features if self.watch else None)
        self.teacher_s += time.perf_counter() - start
        return taught

    def _now(self, weight) -> float:
        return weight_now(weight, self.learn.pct_train, self.learn.epoch)

    def _value(self, part: Method, student: Outputs, taught: Outputs) -> Tensor:
        """The unweighted loss of a method; where MixUp or CutMix mixed the targets, λ·L(y) + (1−λ)·L(y₁)."""
        if not part.targets:
            return part.loss(student, taught, self.y.as_subclass(Tensor) if isinstance(self.y, Tensor) else self.y)
        mix = next((cb for cb in self.learn.cbs if isinstance(cb, MixHandler) and cb.run and getattr(cb, "stack_y", False)), None)
        value = part.loss(student, taught, self.y.as_subclass(Tensor))
        if mix is not None:
            other = part.loss(student, taught, mix.yb1[0].as_subclass(Tensor))
            value = torch.lerp(other, value, mix.lam.to(value))
        return value.mean()

    # What is found and built

    def _find_features(self, inputs: tuple[Tensor, ...]):
        student = get_model(self.learn.model)
        ours = probe(student, inputs, self.named[0])
        if self.cached_outputs is not None:  # vectors alone
            self.features, self.margins = Features(student, ours, self.wanted, ()), []
            self.trained.build(self.learn, self.parts, self._example(inputs), self.cached_outputs.outputs(self.index[:2]))
            return
        self.teacher.check_dtype(inputs[0])
        theirs = probe(self.teacher.model, self.teacher.view(inputs), self.named[1])
        if None not in self.named and len(self.named[0]) != len(self.named[1]):
            raise KdfastError(f"{len(self.named[0])} stages of the student and {len(self.named[1])} of the teacher: name as many")
        paths = pair(ours, theirs)
        self.features = Features(student, ours, self.wanted, paths[0])
        self.teacher_features = Features(self.teacher.model, theirs, self.wanted, paths[1])
        self.margins = [margin(self.teacher_features.norm(path)) for path in paths[1]] if "pre_relu" in self.wanted else []
        self.trained.build(self.learn, self.parts, self._example(inputs), self.teacher.outputs(inputs, self.teacher_features))

    @torch.no_grad()
    def _example(self, inputs: tuple[Tensor, ...]) -> Outputs:
        with evaluating(self.features.model), watching(self.features.model, self.features.points) as seen:
            logits = self.features.model(*inputs)
        return self.features.outputs(logits, seen)

    # What is trained beside the student

    @property
    def projectors(self) -> nn.ModuleDict:
        """Of each method that has such, by its name."""
        return self.trained.projectors

    @property
    def projector_optimizer(self) -> ProjectorOptimizer | None:
        """Their optimizer."""
        return self.trained.projector_optimizer

    def before_step(self):
        self.trained.stepping = self.projector_optimizer is not None
        self.trained.average()

    def after_cancel_step(self):  # MixedPrecision skips a step whose gradients overflow
        self.trained.skip()

    def after_step(self):
        self.trained.step(getattr(self.learn, "scaler", None))

    # kdfast's own checkpoint

    def state_dict(self) -> dict[str, Any]:
        """The projectors' weights and their optimizer's state."""
        return self.trained.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a `state_dict`, at once or, where the projectors are not built yet, at the first batch."""
        self.trained.load_state_dict(state)

    def save(self, path: str | Path) -> Path:
        """Write the projectors and their optimizer's state; the student is saved by its Learner."""
        torch.save(self.state_dict(), path)
        return Path(path)

    def load(self, path: str | Path) -> "Distill":
        """Read what `save` wrote; a missing or foreign file raises a KdfastError."""
        try:
            self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except (OSError, KeyError, RuntimeError, TypeError, UnpicklingError) as error:
            raise KdfastError(f"{path} is no checkpoint of Distill.save ({type(error).__name__}): give one that is") from None
        return self

    # A run that goes on from kdfast.training.checkpoint

    def snapshot(self) -> dict[str, Any]:
        """What the next epochs depend on, and the seconds spent on the teacher."""
        spent = {"teacher_s": self.teacher_s, "waited": self.cached_outputs.waited if self.cached_outputs else 0.0}
        return self.state_dict() | {"streams": [self.stream.mine, self.teachers_stream.mine]} | spent

    def resume(self, state: dict[str, Any]) -> None:
        self.load_state_dict(state)
        self.stream.mine, self.teachers_stream.mine = state["streams"]
        self.resumed, self.teacher_s = self.stream.mine, state["teacher_s"]
        if self.cached_outputs is not None:
            self.cached_outputs.seconds, self.cached_outputs.waited = state["teacher_s"], state["waited"]

    # What cannot work

    def _check_loss(self):
        loss = self.learn.loss_func
        if isinstance(getattr(loss, "func", loss), NOT_CLASSIFICATION) and self.wanted & {"logits", "cam"}:
            name = type(loss).__name__
            raise KdfastError(
                f"method {self.method.name} compares distributions over classes, which {name} does not train: use "
                "CrossEntropyLossFlat, or a method of features (fitnet, at, sp, …)"
            )

    def _check_outputs(self, prediction: Tensor, taught: Outputs):
        if self.wanted & {"logits", "cam"}:
            if prediction.ndim != 2:
                raise KdfastError(f"method {self.method.name} needs logits (B, C), not outputs {tuple(prediction.shape)}")
            for logits in taught.members or [taught.logits]:
                self.teacher.check(logits[: len(prediction)], prediction)
        if any(part.targets for part in self.parts) and (self.y.is_floating_point() or self.y.ndim != 1):
            raise KdfastError(
                f"method {self.method.name} needs class ids (B,) as targets, not {self.y.dtype} of shape {tuple(self.y.shape)}: "
                "use fastai's CrossEntropyLossFlat (with MixUp and CutMix too), or a method without targets (kd, …)"
            )
        self.met = True


class _Watch(Callback):
    """Makes ready to see the student's features after every other callback's before_batch, right before the forward."""

    order, run_valid = 1_000_000, False

    def __init__(self, owner: Distill):
        self.owner = owner

    def before_batch(self):
        self.owner.prepare()

    def __reduce__(self):
        return Callback, ()


class _Mean:
    """Mean of the batches of an epoch, read when the epoch is over so that no step waits for the device."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.total, self.n = 0.0, 0

    def add(self, loss):
        self.total, self.n = self.total + loss.detach(), self.n + 1

    def __call__(self) -> float | None:
        return float(self.total) / self.n if self.n else None

    def __reduce__(self):  # a Learner pickled after a failed fit still has these among its metrics
        return partial, (float, "nan")


def _autocast(learn) -> torch.dtype | None:
    """The type in which the Learner's mixed precision computes, where its device has such."""
    mixed = getattr(learn, "mixed_precision", None)
    if mixed is None or (learn.dls.device.type != "cuda" and type(mixed) is MixedPrecision):  # fastai's does nothing there
        return None
    return torch.bfloat16 if mixed.amp_mode is AMPMode.BF16 else torch.float16
