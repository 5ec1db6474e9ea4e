"""Training of what is trained beside the student: its projectors' optimizer, and their state."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastai.torch_core import norm_bias_params
from fastcore.foundation import L
from torch import nn

from kdfast.core.errors import KdfastError
from kdfast.distill.features import Outputs
from kdfast.distill.method import Method


class ProjectorOptimizer:
    """The projectors' optimizer: of the same kind as the student's, with the settings of its last group at every step.

    fastai builds a Learner's optimizer from the student's parameters and cannot extend it, and what is in it is saved
    and exported with the student. A second one follows schedules, freezing, discriminative rates and `lr_find`, and
    leaves the first as it is without distillation.
    """

    def __init__(self, learn: Learner, projectors: nn.Module):
        self.of = learn.opt
        params = list(projectors.parameters())
        self.opt = _same_kind(learn)(params)
        if not learn.wd_bn_bias and not isinstance(self.opt, OptimWrapper):
            for p in norm_bias_params(projectors, True):
                self.opt.state[p]["do_wd"] = False

    @property
    def param_groups(self):  # with `step`, what GradScaler wants of an optimizer
        return self.opt.param_groups

    def step(self) -> None:
        if isinstance(self.opt, OptimWrapper):  # torch's own names and values
            last = self.of.opt.param_groups[-1]
            self.opt.opt.param_groups[0].update({k: v for k, v in last.items() if k != "params"})
        else:
            self.opt.hypers[0].update(self.of.hypers[-1])
        self.opt.step()

    def zero_grad(self) -> None:
        self.opt.zero_grad()


def _same_kind(learn: Learner) -> Callable:
    if isinstance(learn.opt, OptimWrapper):
        torchs = learn.opt.opt
        takes = inspect.signature(type(torchs)).parameters
        defaults = {k: v for k, v in torchs.defaults.items() if k in takes}
        return lambda params: OptimWrapper(opt=type(torchs)(params, **defaults))
    return partial(learn.opt_func, lr=learn.lr)


class Trained:
    """The projectors of a Distill callback and their ProjectorOptimizer, from the first batch of the first fit on."""

    def __init__(self):
        self.pending: dict[str, Any] | None = None  # a state that waits for projectors
        self.stepping = False
        self.forget()

    def forget(self) -> None:
        """Drop projectors and optimizer; the next first batch makes new ones."""
        self.projectors, self.projector_optimizer = nn.ModuleDict(), None

    def build(self, learn: Learner, parts: Sequence[Method], student: Outputs, teacher: Outputs) -> None:
        """Make projectors to fit these outputs; those of an earlier fit stay if they still do."""
        made = nn.ModuleDict()
        for part in parts:
            built = part.build(student, teacher)
            if built is not None:
                made[part.name] = built
        if _shapes(made) != _shapes(self.projectors):
            self.projectors, self.projector_optimizer = made, None
        self.projectors.to(next(learn.model.parameters()).device).train()
        for part in parts:
            part.projectors = dict(self.projectors.items()).get(part.name)
        if len(self.projectors) and (self.projector_optimizer is None or self.projector_optimizer.of is not learn.opt):
            self.projector_optimizer = ProjectorOptimizer(learn, self.projectors)
        if self.pending is not None:
            self.load_state_dict(self.pending)

    def average(self) -> None:
        """Of the projectors' gradients over the processes that train together; the student's are torch's DDP's to average."""
        if self.stepping and torch.distributed.is_initialized():
            for p in self.projectors.parameters():
                if p.grad is not None:
                    torch.distributed.all_reduce(p.grad)
                    p.grad /= torch.distributed.get_world_size()

    def step(self, scaler: torch.amp.GradScaler | None) -> None:
        """The projectors' optimizer step, if one is due, through the student's GradScaler where there is one."""
        if self.stepping:
            scaler.step(self.projector_optimizer) if scaler is not None else self.projector_optimizer.step()
            self.skip()

    def skip(self) -> None:
        """No step for this batch: its gradients are dropped."""
        self.stepping = False
        if self.projector_optimizer is not None:
            self.projector_optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The projectors' weights and their optimizer's state."""
        return {
            "projectors": self.projectors.state_dict(),
            "optimizer": None if self.projector_optimizer is None else _plain(self.projector_optimizer.opt.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a `state_dict`, at once or, where the projectors are not built yet, when they are."""
        if state["projectors"] and not len(self.projectors):
            self.pending = state
            return
        if {k: v.shape for k, v in state["projectors"].items()} != _shapes(self.projectors):
            raise KdfastError("the checkpoint's projectors do not fit this student, teacher and method: load it elsewhere")
        self.projectors.load_state_dict(state["projectors"])
        if self.projector_optimizer is not None and state["optimizer"] is not None:
            self.projector_optimizer.opt.load_state_dict(state["optimizer"])
        self.pending = None


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}


def _plain(value: Any) -> Any:
    """Lists, dicts, numbers and tensors alone, which torch.load takes without running code."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, L)):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
