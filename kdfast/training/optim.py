"""How a network is trained, as a study file says it: optimizer, decay, schedule, smoothed and mixed labels, averaged weights."""

import math
from collections.abc import Callable
from functools import partial

import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import ParamScheduler, SchedCos, SchedNo, combine_scheds
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper
from fastai.torch_core import get_model, norm_bias_params
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdfast.core.config import Training


class DecoupledSGD(torch.optim.SGD):
    """SGD whose weight decay shrinks the weights by lr·wd a step instead of joining the gradient (SGDW, arXiv:1711.05101)."""

    @torch.no_grad()
    def step(self, closure=None):
        decay = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
            group["weight_decay"] = 0
        loss = super().step(closure)
        for group, wd in zip(self.param_groups, decay, strict=True):
            group["weight_decay"] = wd
        return loss


def optimizer(t: Training) -> Callable[..., OptimWrapper]:
    """What a Learner takes as `opt_func`: torch's own optimizers, fused where they can be, for fastai's loop in Python."""
    if t.optimizer == "adamw":
        kind = torch.optim.Adam if t.decay == "coupled" else torch.optim.AdamW
        return partial(OptimWrapper, opt=partial(kind, fused=True))
    kind = DecoupledSGD if t.decay == "decoupled" else partial(torch.optim.SGD, fused=True)
    return partial(OptimWrapper, opt=partial(kind, momentum=t.momentum, nesterov=t.nesterov))


def groups(t: Training) -> Callable[[nn.Module], list]:
    """What a Learner takes as `splitter`: all parameters, or norms' and biases' before the others, see `decay_of_groups`."""

    def apart(model: nn.Module) -> list[list[nn.Parameter]]:
        spared = {id(p): p for p in norm_bias_params(model)}
        spared |= {id(p): p for name, p in model.named_parameters() if name.endswith("bias")}  # attention's too
        return [list(spared.values()), [p for p in model.parameters() if id(p) not in spared]]

    return (lambda model: list(model.parameters())) if t.decay_norms else apart


def decay_of_groups(t: Training) -> float | list[float]:
    """Weight decay of each of `groups`."""
    return t.weight_decay if t.decay_norms else [0.0, t.weight_decay]


def schedule(t: Training) -> ParamScheduler:
    """The learning rate, and for one-cycle the momentum, over a fit.

    `onecycle`: fastai's cycle (Smith, 2018, arXiv:1803.09820) over four fifths of training, a quarter of it up from lr/25 to
    `lr`, the rest down to lr/1e5, by cosines, with the momentum the other way round; then a fifth at that final rate, in which
    BatchNorm's averages settle. `cosine`: from `lr` to 0 over `t_max` epochs (0: all of them), step by step. `step`: times
    `gamma` after each of the epochs `milestones`. The latter three warm up over `warmup` epochs, linearly from lr/25.
    """
    if t.schedule == "onecycle":
        parts = [0.2, 0.6, 0.2]
        rates = [SchedCos(t.lr / 25, t.lr), SchedCos(t.lr, t.lr / 1e5), SchedNo(t.lr / 1e5, t.lr / 1e5)]
        momenta = [SchedCos(0.95, 0.85), SchedCos(0.85, 0.95), SchedNo(0.95, 0.95)]
        return ParamScheduler({"lr": combine_scheds(parts, rates), "mom": combine_scheds(parts, momenta)})
    return ParamScheduler({"lr": lambda done: t.lr * _factor(t, done * t.epochs)})


def _factor(t: Training, epoch: float) -> float:
    """Of the learning rate after so many epochs, parts of an epoch included."""
    if epoch < t.warmup:
        return (1 + 24 * epoch / t.warmup) / 25
    if t.schedule == "step":  # the sum of an epoch's steps may end a rounding error short of it
        return t.gamma ** sum(epoch > milestone - 1e-6 for milestone in t.milestones)
    if t.schedule == "cosine":
        return (1 + math.cos(math.pi * (epoch - t.warmup) / ((t.t_max or t.epochs) - t.warmup))) / 2
    return 1.0


class SmoothLabels(Callback):
    """Label smoothing (arXiv:1512.00567) in training alone: the validation loss stays the NLL of the labels."""

    order = -10  # sets the loss before MixUp wraps it

    def __init__(self, smoothing: float):
        self.smoothed, self.plain = CrossEntropyLossFlat(label_smoothing=smoothing), CrossEntropyLossFlat()

    def before_train(self):
        self.learn.loss_func = self.smoothed

    def before_validate(self):
        self.learn.loss_func = self.plain

    def after_fit(self):
        self.learn.loss_func = self.plain


class EMA(Callback):
    """An exponential moving average of weights and buffers; validation, the best and the last epoch see the average."""

    order = 50  # before KeepBest copies the weights

    def __init__(self, decay: float):
        self.decay = decay

    def before_fit(self):
        self.run = not hasattr(self.learn, "lr_finder")
        if self.run:
            self.average = AveragedModel(get_model(self.model), multi_avg_fn=get_ema_multi_avg_fn(self.decay), use_buffers=True)
            self.trained = None

    def before_train(self):
        if self.trained is not None:
            get_model(self.model).load_state_dict(self.trained)
            self.trained = None

    def after_step(self):
        self.average.update_parameters(get_model(self.model))

    def after_train(self):
        self.trained = {k: v.detach().clone() for k, v in get_model(self.model).state_dict().items()}
        get_model(self.model).load_state_dict(self.average.module.state_dict())

    def after_fit(self):
        self.average, self.trained = None, None

    def snapshot(self):
        return {"average": self.average.state_dict(), "trained": self.trained}

    def resume(self, state):
        self.average.load_state_dict(state["average"])
        self.trained = state["trained"]


def recipe_callbacks(t: Training) -> list[Callback]:
    """The callbacks of what is not optimizer or schedule."""
    chosen = {SmoothLabels: t.label_smoothing, MixUp: t.mixup, CutMix: t.cutmix, EMA: t.ema}
    return [callback(value) for callback, value in chosen.items() if value]
