"""Training of what is trained beside the student: its adapters' optimizer, and their state."""

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


class Companion:
    """The adapters' optimizer: of the same kind as the student's, with the settings of its last group at every step.

    fastai builds a Learner's optimizer from the student's parameters and cannot extend it, and what is in it is saved
    and exported with the student. A second one follows schedules, freezing, discriminative rates and `lr_find`, and
    leaves the first as it is without distillation.
    """

    def __init__(self, learn: Learner, adapters: nn.Module):
        self.of = learn.opt
        params = list(adapters.parameters())
        self.opt = _same_kind(learn)(params)
        if not learn.wd_bn_bias and not isinstance(self.opt, OptimWrapper):
            for p in norm_bias_params(adapters, True):
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
    """The adapters of a Distill callback and their Companion, from the first batch of the first fit on."""

    def __init__(self):
        self.pending: dict[str, Any] | None = None  # a state that waits for adapters
        self.stepping = False
        self.forget()

    def forget(self) -> None:
        """Drop adapters and optimizer; the next first batch makes new ones."""
        self.adapters, self.companion = nn.ModuleDict(), None

    def build(self, learn: Learner, parts: Sequence[Method], student: Outputs, teacher: Outputs) -> None:
        """Make adapters to fit these outputs; those of an earlier fit stay if they still do."""
        made = nn.ModuleDict()
        for part in parts:
            built = part.build(student, teacher)
            if built is not None:
                made[part.name] = built
        if _shapes(made) != _shapes(self.adapters):
            self.adapters, self.companion = made, None
        self.adapters.to(next(learn.model.parameters()).device).train()
        for part in parts:
            part.adapters = dict(self.adapters.items()).get(part.name)
        if len(self.adapters) and (self.companion is None or self.companion.of is not learn.opt):
            self.companion = Companion(learn, self.adapters)
        if self.pending is not None:
            self.load_state_dict(self.pending)

    def average(self) -> None:
        """Of the adapters' gradients over the processes that train together; the student's are torch's DDP's to average."""
        if self.stepping and torch.distributed.is_initialized():
            for p in self.adapters.parameters():
                if p.grad is not None:
                    torch.distributed.all_reduce(p.grad)
                    p.grad /= torch.distributed.get_world_size()

    def step(self, scaler: torch.amp.GradScaler | None) -> None:
        """The adapters' optimizer step, if one is due, through the student's GradScaler where there is one."""
        if self.stepping:
            scaler.step(self.companion) if scaler is not None else self.companion.step()
            self.skip()

    def skip(self) -> None:
        """No step for this batch: its gradients are dropped."""
        self.stepping = False
        if self.companion is not None:
            self.companion.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The adapters' weights and their optimizer's state."""
        return {
            "adapters": self.adapters.state_dict(),
            "optimizer": None if self.companion is None else _plain(self.companion.opt.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a `state_dict`, at once or, where the adapters are not built yet, when they are."""
        if state["adapters"] and not len(self.adapters):
            self.pending = state
            return
        if {k: v.shape for k, v in state["adapters"].items()} != _shapes(self.adapters):
            raise KdfastError("the checkpoint's adapters do not fit this student, teacher and method: load it where it was saved")
        self.adapters.load_state_dict(state["adapters"])
        if self.companion is not None and state["optimizer"] is not None:
            self.companion.opt.load_state_dict(state["optimizer"])
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
