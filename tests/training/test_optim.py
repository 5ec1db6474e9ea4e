"""How a network is trained: every option against a loop in plain torch, or against its formula."""

import math
import random
from copy import deepcopy

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.mixup import MixHandler
from torch import nn
from torch.nn.functional import cross_entropy

from kdfast.all import Experiment, KdfastError, Run, Teacher, create_learner, create_model, dataloaders, fit, load_data
from kdfast.core.config import Training, validated
from kdfast.data.augment import Augment

CIFAR = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 5e-4, "schedule": "step", "milestones": [1, 2], "gamma": 0.1}
TIGHT = {"rtol": 2e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def digits():
    """719 images to train on: 11 batches of 64, 5 of 128, one of 512."""
    return load_data("digits")


class Trace(Callback):
    """What every training step was given and what it made of the network; optionally without gradients, or in float64."""

    order = 1000  # after all others

    def __init__(self, zero=False, states=True, double=False):
        self.zero, self.keep, self.double = zero, states, double
        self.batches, self.losses, self.logits, self.states, self.rates, self.momenta = [], [], [], [], [], []

    def before_fit(self):
        if self.zero:  # so that nothing begins at 0, where decay would not show
            for p in self.model.parameters():
                nn.init.normal_(p)
        self.start = state(self.model)

    def before_batch(self):
        if self.double:
            self.learn.xb = (self.x.double(),)
        if self.training:
            self.batches.append((self.x.as_subclass(torch.Tensor).clone(), self.y.as_subclass(torch.Tensor).clone()))

    def after_loss(self):
        if self.training:
            self.losses.append(self.learn.loss_grad.item())
            self.logits.append(self.pred.detach().as_subclass(torch.Tensor).clone())

    def before_step(self):
        hypers = list(self.opt.hypers)
        self.rates.append([group["lr"] for group in hypers])
        self.momenta.append([group["mom"] for group in hypers])
        distill = getattr(self.learn, "distill", None)
        self.projectors = dict(distill.projectors.named_parameters()) if distill else {}
        if len(self.rates) == 1:
            self.adapters_before = {k: v.detach().clone() for k, v in self.projectors.items()}
        if self.zero:
            for p in [*self.model.parameters(), *self.projectors.values()]:
                p.grad.zero_()

    def after_step(self):
        if self.keep:
            self.states.append(state(self.model))


def state(module):
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def trained(data, *cbs, by=None, **options):
    """The Learner after the fit, with the teacher `by`; the Trace of it; and the network as it was before."""
    run = Run(**{"student": "mini_resnet_xs", "epochs": 2} | options)
    learn, trace = create_learner(run, data, by), Trace()
    for cb in cbs:
        trace = cb if isinstance(cb, Trace) else trace
    if trace.double:
        learn.model.double()
    before = deepcopy(learn.model)
    learn.add_cbs([trace, *[cb for cb in cbs if cb is not trace]])
    fit(learn, run, progress=False)
    return learn, trace, before


def by_hand(model, batches, optimizer, scheduler=None, steps_an_epoch=0):
    """The states after each step of the usual loop."""
    model.train()
    states = []
    for i, (x, y) in enumerate(batches, 1):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        if scheduler is not None and i % steps_an_epoch == 0:
            scheduler.step()
        states.append(state(model))
    return states


def close(one, other, rtol=TIGHT["rtol"], atol=TIGHT["atol"]):
    return one.keys() == other.keys() and all(torch.allclose(one[k], other[k], rtol=rtol, atol=atol) for k in one)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def parameters(model, states):
    """Of state dicts, what is trained."""
    names = dict(model.named_parameters())
    return [{k: v for k, v in each.items() if k in names} for each in states]


# Optimizers


@pytest.mark.parametrize("nesterov", [False, True], ids=["momentum", "nesterov"])
def test_the_cifar_protocol_is_torchs_sgd_with_its_multi_step_schedule_step_by_step(digits, nesterov):
    learn, trace, model = trained(digits, epochs=3, lr=0.05, **CIFAR, nesterov=nesterov)
    assert len(trace.batches) == 33

    # fused as ours: on some processors the two forms round differently, and a network amplifies that over 33 steps
    def reference(weight_decay=5e-4, nesterov=nesterov):
        net = deepcopy(model)
        sgd = torch.optim.SGD(net.parameters(), 0.05, 0.9, weight_decay=weight_decay, nesterov=nesterov, fused=True)
        return by_hand(net, trace.batches, sgd, torch.optim.lr_scheduler.MultiStepLR(sgd, [1, 2], 0.1), 11)

    expected = reference()
    assert all(close(ours, theirs) for ours, theirs in zip(trace.states, expected, strict=True))
    assert close(state(learn.model), expected[-1])
    assert not close(trace.states[-1], reference(weight_decay=0)[-1])  # what is tight enough tells these apart
    assert not close(trace.states[-1], reference(nesterov=not nesterov)[-1])


def test_the_last_smaller_batch_is_dropped_unless_it_is_the_only_one(digits):
    _, trace, _ = trained(digits, epochs=2, batch_size=100)
    assert [len(y) for _, y in trace.batches] == [100] * 14
    first, second = trace.batches[:7], trace.batches[7:]
    assert not all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second, strict=True))  # shuffled anew
    for epoch in (first, second):
        images = torch.cat([x for x, _ in epoch]).flatten(1)
        assert len(images.unique(dim=0)) > 690  # no image twice, but for the few that look alike
    _, trace, _ = trained(digits, epochs=1, batch_size=1000)
    assert [len(y) for _, y in trace.batches] == [719]


def test_adamw_is_torchs_and_coupled_it_is_adam_with_l2(digits):
    options = {"schedule": "constant", "lr": 0.004, "weight_decay": 0.3}
    for decay, kind, other in (("usual", torch.optim.AdamW, torch.optim.Adam), ("coupled", torch.optim.Adam, torch.optim.AdamW),
                               ("decoupled", torch.optim.AdamW, torch.optim.Adam)):  # fmt: skip
        _, trace, model = trained(digits, Trace(double=True), **options, decay=decay)  # Adam makes much of roundings
        assert len(trace.batches) == 22
        found = parameters(model, trace.states)

        def reference(kind, model=model, batches=trace.batches):
            net = deepcopy(model)
            return parameters(model, by_hand(net, batches, kind(net.parameters(), 0.004, weight_decay=0.3)))

        expected = reference(kind)
        assert all(close(a, b) for a, b in zip(found, expected, strict=True)), decay
        assert not close(found[-1], reference(other)[-1])


@pytest.mark.parametrize("nesterov", [False, True], ids=["momentum", "nesterov"])
def test_decoupled_sgd_shrinks_the_weights_and_leaves_the_gradient_alone(digits, nesterov):
    sgd = {"optimizer": "sgd", "momentum": 0.8, "nesterov": nesterov, "decay": "decoupled", "schedule": "constant"}
    _, trace, model = trained(digits, **sgd, lr=0.05, weight_decay=0.1)
    speeds = {k: torch.zeros_like(p) for k, p in model.named_parameters()}
    model.train()
    for (x, y), found in zip(trace.batches, trace.states, strict=True):
        model.zero_grad()
        cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for k, p in model.named_parameters():
                speeds[k] = 0.8 * speeds[k] + p.grad
                p.mul_(1 - 0.05 * 0.1)
                p.sub_(0.05 * (p.grad + 0.8 * speeds[k] if nesterov else speeds[k]))
        assert close(found, state(model), 1e-4, 1e-5)


# Decay alone


def coupled(w, rate, decay, momentum, steps):
    """v ← μ·v + λ·w, w ← w − η·v; a list of w."""
    v, found = np.zeros_like(w), []
    for _ in range(steps):
        v = momentum * v + decay * w
        w = w - rate * v
        found.append(w)
    return found


def decoupled(w, rate, decay, momentum, steps):
    """w ← (1 − η·λ)·w."""
    return [w * (1 - rate * decay) ** (i + 1) for i in range(steps)]


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"optimizer": "sgd"}, coupled),
        ({"optimizer": "sgd", "decay": "coupled"}, coupled),
        ({"optimizer": "sgd", "decay": "decoupled"}, decoupled),
        ({"optimizer": "adamw"}, decoupled),
        ({"optimizer": "adamw", "decay": "decoupled"}, decoupled),
    ],
    ids=lambda v: " ".join(v.values()) if isinstance(v, dict) else v.__name__,
)
def test_without_gradients_weights_shrink_as_the_decays_own_recurrence_says(digits, options, rule):
    decay = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9, "schedule": "constant"}
    _, trace, model = trained(digits, Trace(zero=True), epochs=5, **decay, **options)
    begin, *after = parameters(model, [trace.start, *trace.states])
    for name, value in begin.items():
        expected = rule(value.numpy().astype(np.float64), 0.05, 0.1, 0.9, 50)
        for i in (0, 1, 9, 49):
            assert np.allclose(after[i][name], expected[i], rtol=1e-5, atol=1e-6), (name, i)
    begin, end = (torch.cat([v.flatten() for v in each.values()]).norm().item() for each in (begin, after[49]))
    assert end / begin == pytest.approx(abs(rule(1.0, 0.05, 0.1, 0.9, 50)[49]), rel=1e-4)


def norms_and_biases(model):
    """Names of norms' parameters and of every bias."""
    norms = [path for path, m in model.named_modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm))]
    return {k for k, _ in model.named_parameters() if k.rpartition(".")[0] in norms or k.endswith("bias")}


@pytest.mark.parametrize("student", ["mini_resnet_xs", "mini_vit_s"])
@pytest.mark.parametrize("options", [{"optimizer": "sgd", "decay": "decoupled"}, {"optimizer": "adamw"}], ids=["sgd", "adamw"])
def test_decay_can_leave_norms_and_biases_out(digits, student, options):
    decay = {"lr": 0.05, "weight_decay": 0.1, "schedule": "constant", "batch_size": 128, "epochs": 1} | options
    for decay_norms in (False, True):
        _, trace, model = trained(digits, Trace(zero=True), student=student, decay_norms=decay_norms, **decay)
        spared = set() if decay_norms else norms_and_biases(model)
        assert decay_norms or 5 <= len(spared) < len(list(model.parameters()))
        begin, end = parameters(model, [trace.start, trace.states[-1]])
        stayed = {name for name in begin if torch.equal(begin[name], end[name])}
        assert stayed == spared
        assert all(torch.allclose(end[k], begin[k] * (1 - 0.05 * 0.1) ** 5, rtol=1e-5, atol=1e-8) for k in begin.keys() - spared)


@pytest.mark.parametrize("decay_norms", [False, True], ids=["spared", "all"])
@pytest.mark.parametrize(
    ("options", "rule"),
    [({"optimizer": "sgd"}, coupled), ({"optimizer": "sgd", "decay": "decoupled"}, decoupled), ({}, decoupled)],
    ids=["sgd", "decoupled sgd", "adamw"],
)
def test_adapters_decay_as_the_student_does_also_where_norms_do_not(digits, options, rule, decay_norms):
    taught = {"teacher": "mini_resnet_s", "method": "fitnet", "decay_norms": decay_norms, "batch_size": 128}
    decay = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9, "schedule": "constant"}
    teacher = Teacher(create_model("mini_resnet_s", 10, 8))
    learn, trace, _ = trained(digits, Trace(zero=True, states=False), by=teacher, **taught, **decay, **options)
    weights = {k: v for k, v in learn.distill.projectors.named_parameters() if v.ndim > 1}
    assert weights and len(trace.rates) == 10
    for name, after in weights.items():
        before = trace.adapters_before[name].numpy().astype(np.float64)
        assert np.allclose(after.detach(), rule(before, 0.05, 0.1, 0.9, 10)[-1], rtol=1e-5, atol=1e-7)


# Rates


def rates(data, **options):
    """The rate of every step and how many steps an epoch has."""
    learn, trace, _ = trained(data, Trace(states=False), **{"lr": 0.1, "batch_size": 128} | options)
    recorded = np.array(learn.recorder.lrs)
    for found, of_step in zip(recorded, trace.rates, strict=True):
        assert of_step == [found] * len(of_step)  # every group has it
    return recorded, len(learn.dls.train), trace


def warm(epochs, warmup):
    return 1 / 25 + (1 - 1 / 25) * epochs / warmup


@pytest.mark.parametrize("decay_norms", [True, False], ids=["one group", "two groups"])
def test_one_cycle_rises_in_a_fifth_falls_until_four_fifths_and_rests(digits, decay_norms):
    found, n, trace = rates(digits, epochs=5, decay_norms=decay_norms)

    def cos(start, end, part):
        return end + (start - end) * (1 + math.cos(math.pi * part)) / 2

    expected, momenta = [], []
    for i in range(5 * n):
        part = i / (5 * n) / 0.8
        if part < 0.25:
            expected.append(cos(0.1 / 25, 0.1, part / 0.25))
            momenta.append(cos(0.95, 0.85, part / 0.25))
        else:
            expected.append(cos(0.1, 0.1 / 1e5, min(1, (part - 0.25) / 0.75)))
            momenta.append(cos(0.85, 0.95, min(1, (part - 0.25) / 0.75)))
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-12)
    assert found[n] == found.max() == pytest.approx(0.1) and np.allclose(found[4 * n :], 1e-6, rtol=1e-6)
    assert np.allclose([each[0] for each in trace.momenta], momenta, rtol=1e-6)
    assert trace.momenta[0] == [trace.momenta[0][0]] * (1 if decay_norms else 2)


@pytest.mark.parametrize(("epochs", "t_max"), [(4, 0), (4, 4), (4, 7), (3, 30)])
def test_cosine_falls_from_the_rate_to_0_over_its_period(digits, epochs, t_max):
    found, n, trace = rates(digits, epochs=epochs, schedule="cosine", t_max=t_max, optimizer="sgd")
    expected = [0.1 * (1 + math.cos(math.pi * i / n / (t_max or epochs))) / 2 for i in range(epochs * n)]
    assert len(found) == epochs * n and np.allclose(found, expected, rtol=1e-6, atol=1e-12)
    assert {m for each in trace.momenta for m in each} == {0.9}


@pytest.mark.parametrize("t_max", [0, 8])
def test_cosine_after_a_warm_up_begins_at_the_rate_and_ends_with_its_period(digits, t_max):
    found, n, _ = rates(digits, epochs=5, schedule="cosine", t_max=t_max, warmup=2)
    expected = [warm(i / n, 2) for i in range(2 * n)]
    expected += [(1 + math.cos(math.pi * i / n / ((t_max or 5) - 2))) / 2 for i in range(3 * n)]
    assert np.allclose(found, 0.1 * np.array(expected), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("batch_size", [64, 128, 512])
def test_a_step_falls_exactly_between_two_epochs(digits, batch_size):
    found, n, _ = rates(digits, epochs=4, schedule="step", milestones=[1, 3], gamma=0.2, batch_size=batch_size)
    assert np.allclose(found, np.repeat([0.1, 0.02, 0.02, 0.004], n), rtol=1e-9)


def test_a_step_falls_exactly_between_two_epochs_however_many_there_are(digits):
    milestones = [1, 2, 13, 25, 48]
    assert 1 / 49 * 49 < 1  # what a schedule by parts of the training must not stumble over
    found, n, _ = rates(digits, epochs=49, schedule="step", milestones=milestones, gamma=0.5, batch_size=512)
    expected = [0.1 * 0.5 ** sum(epoch >= m for m in milestones) for epoch in range(49)]
    assert n == 1 and np.allclose(found, expected, rtol=1e-9)


def test_steps_count_from_the_first_epoch_of_a_warm_up(digits):
    found, n, _ = rates(digits, epochs=4, schedule="step", milestones=[3], gamma=0.1, warmup=2)
    expected = [*(warm(i / n, 2) for i in range(2 * n)), *[1.0] * n, *[0.1] * n]
    assert np.allclose(found, 0.1 * np.array(expected), rtol=1e-6)


def test_a_constant_rate_is_constant_after_its_warm_up(digits):
    assert set(rates(digits, epochs=2, schedule="constant")[0]) == {0.1}
    found, n, _ = rates(digits, epochs=3, schedule="constant", warmup=1)
    assert np.allclose(found, 0.1 * np.array([*(warm(i / n, 1) for i in range(n)), *[1.0] * (2 * n)]), rtol=1e-6)
    assert found[0] == pytest.approx(0.1 / 25)


# Labels


@torch.no_grad()
def nll(model, dl, weights=None):
    """Mean NLL of a DataLoader's images under a network, or under one with these weights."""
    model = deepcopy(model)
    if weights is not None:
        model.load_state_dict(weights)
    model.eval()
    pairs = [(model(x.as_subclass(torch.Tensor)), y.as_subclass(torch.Tensor)) for x, y in dl]
    return cross_entropy(*map(torch.cat, zip(*pairs, strict=True))).item()


class PlainValidation(Callback):
    """Every epoch's validation loss beside the network's NLL."""

    order = 1000

    def before_fit(self):
        self.pairs = []

    def after_epoch(self):
        found = self.recorder.values[-1][self.recorder.metric_names.index("valid_loss") - 1]
        self.pairs.append((found, nll(self.model, self.dls[1])))


def assert_plain(learn):
    """The Learner's loss is the NLL of labels, outside of training."""
    logits, labels = torch.randn(6, 10), torch.randint(10, (6,))
    assert torch.allclose(learn.loss_func(logits, labels), cross_entropy(logits, labels))
    with learn.no_bar(), learn.no_logging():
        assert learn.validate()[0] == pytest.approx(nll(learn.model, learn.dls[1]), rel=1e-5)


def test_smoothed_labels_are_torchs_in_training_and_plain_in_validation(digits):
    valid = PlainValidation()
    learn, trace, _ = trained(digits, valid, label_smoothing=0.2)
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.2)
    for loss, logits, (_, y) in zip(trace.losses, trace.logits, trace.batches, strict=True):
        assert loss == pytest.approx(smoothed(logits, y).item(), rel=1e-5)
    assert all(found == pytest.approx(own, rel=1e-5) for found, own in valid.pairs) and len(valid.pairs) == 2
    assert_plain(learn)


def test_smoothed_labels_change_the_gradient_as_they_should(digits):
    _, trace, model = trained(digits, label_smoothing=0.2, optimizer="sgd", schedule="constant", lr=0.05, epochs=1)
    sgd = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=0.01)
    model.train()
    for x, y in trace.batches:
        sgd.zero_grad()
        cross_entropy(model(x), y, label_smoothing=0.2).backward()
        sgd.step()
    assert close(trace.states[-1], state(model))


class Unmixed(Callback):
    """The images before they are mixed."""

    order = -1000

    def before_fit(self):
        self.images = []

    def before_batch(self):
        if self.training:
            self.images.append(self.x.as_subclass(torch.Tensor).clone())


class Mixed(Callback):
    """What the mixing callback drew, at every batch."""

    order = 1001

    def before_fit(self):
        self.drawn = []

    def before_batch(self):
        if self.training:
            mix = next(cb for cb in self.learn.cbs if isinstance(cb, MixHandler))
            self.drawn.append((mix.lam.clone(), mix.yb1[0].as_subclass(torch.Tensor).clone()))


@pytest.mark.parametrize("smoothing", [0, 0.1])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_images_are_trained_against_both_labels_and_validated_plainly(digits, kind, smoothing):
    valid, mixed, unmixed = PlainValidation(), Mixed(), Unmixed()
    learn, trace, _ = trained(digits, valid, mixed, unmixed, **{kind: 0.4}, label_smoothing=smoothing)
    for loss, logits, (_, y), (lam, y1) in zip(trace.losses, trace.logits, trace.batches, mixed.drawn, strict=True):
        own, other = (cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing) for labels in (y, y1))
        assert loss == pytest.approx((lam * own + (1 - lam) * other).mean().item(), rel=1e-5)
    for plain, (x, y), (lam, y1) in zip(unmixed.images, trace.batches, mixed.drawn, strict=True):
        lam = torch.as_tensor(lam).expand(len(x))[:, None, None, None]
        if kind == "cutmix":  # every pixel is of one image or of another
            own, others = x.eq(plain).all(1), x[:, None].eq(plain[None]).all(2)
            assert others.any(1).all() and (own.float().mean((1, 2)) >= lam.flatten() - 1e-6).all()
        else:  # what is left without the image itself is another one, which has the other label
            clear = lam.flatten() < 0.95
            rest = ((x - lam * plain) / (1 - lam))[clear].flatten(1)
            distance, other = torch.cdist(rest, plain.flatten(1), compute_mode="donot_use_mm_for_euclid_dist").min(1)
            assert distance.max() < 1e-3 and torch.equal(y[other], y1[clear])
    assert any((lam < 0.9).any() for lam, _ in mixed.drawn)
    assert all(found == pytest.approx(own, rel=1e-5) for found, own in valid.pairs) and len(valid.pairs) == 2
    assert_plain(learn)


@pytest.mark.parametrize("smoothing", [0, 0.1])
@pytest.mark.parametrize("method", ["kd", "dkd"])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_goes_with_distillation_and_repeats_itself(digits, kind, method, smoothing):
    torch.manual_seed(7)
    teacher = Teacher(create_model("mini_resnet_s", 10, 8))
    taught = {"teacher": "mini_resnet_s", "method": method, "epochs": 1, "label_smoothing": smoothing}
    one, other = (trained(digits, by=teacher, **taught, **{kind: 1})[0] for _ in range(2))
    unmixed = trained(digits, by=teacher, **taught)[0]
    assert equal(state(one.model), state(other.model)) and not equal(state(one.model), state(unmixed.model))
    values = dict(zip(one.recorder.metric_names[1:], one.recorder.values[-1], strict=False))
    assert math.isfinite(values[f"train_{method}"]) and values[f"train_{method}"] > 0
    assert values["valid_loss"] == pytest.approx(nll(one.model, one.dls[1]), rel=1e-5)


class Stop(Callback):
    """The user's own end of a fit, in the middle of the second epoch."""

    def after_batch(self):
        if self.training and self.epoch == 1 and self.iter == 2:
            raise CancelFitException


@pytest.mark.parametrize("options", [{}, {"mixup": 0.4}], ids=["baseline", "mixed"])
def test_a_fit_that_is_cut_short_leaves_the_loss_plain(digits, options):
    learn, trace, _ = trained(digits, Stop(), label_smoothing=0.2, **options)
    assert len(trace.losses) == 14
    assert_plain(learn)


# Averaged weights


class OwnAverage(Callback):
    """An average of one's own, and the validation losses of it."""

    order = 1000

    def __init__(self, decay):
        self.decay, self.mean, self.losses, self.means = decay, None, [], []

    def after_step(self):
        new = {k: v.double() if v.is_floating_point() else v for k, v in state(self.model).items()}
        if self.mean is not None:
            for k, v in new.items():
                new[k] = self.decay * self.mean[k] + (1 - self.decay) * v if v.is_floating_point() else v
        self.mean = new

    def after_epoch(self):
        self.means.append({k: v.float() if v.is_floating_point() else v for k, v in self.mean.items()})
        self.losses.append(nll(self.model, self.dls[1], self.means[-1]))


def floats(weights):
    return {k: v for k, v in weights.items() if v.is_floating_point()}


@pytest.mark.parametrize("decay", [0.5, 0.95])
def test_the_moving_average_is_validated_kept_and_left_behind(digits, decay):
    own = OwnAverage(decay)
    learn, trace, _ = trained(digits, own, epochs=3, ema=decay, schedule="constant")
    valid = [row[1] for row in learn.recorder.values]
    assert valid == pytest.approx(own.losses, rel=1e-5)
    assert close(floats(state(learn.model)), floats(own.means[-1]))
    assert any("running_mean" in k for k in floats(own.mean))  # buffers are averaged too
    assert not close(floats(state(learn.model)), floats(trace.states[-1]))
    assert state(learn.model)["stem.1.num_batches_tracked"].dtype == torch.int64
    best = int(np.argmin(own.losses))
    assert learn.keep_best.best_epoch == best and close(floats(learn.keep_best.best_state), floats(own.means[best]))
    with learn.no_bar(), learn.no_logging():
        assert learn.validate()[0] == pytest.approx(own.losses[-1], rel=1e-5)


def test_the_best_state_is_the_average_of_an_epoch_that_is_not_the_last(digits):
    own = OwnAverage(0.9)
    learn, _, _ = trained(digits, own, epochs=4, ema=0.9, schedule="constant", lr=0.2, optimizer="sgd", seed=3)
    best = int(np.argmin(own.losses))
    assert learn.keep_best.best_epoch == best and close(floats(learn.keep_best.best_state), floats(own.means[best]), 1e-4)


def test_a_fit_that_is_stopped_early_leaves_the_average_too(digits):
    class Early(Callback):
        order = 1001

        def after_epoch(self):
            raise CancelFitException

    own = OwnAverage(0.9)
    learn, trace, _ = trained(digits, Early(), own, ema=0.9)
    assert len(trace.states) == 11 and close(floats(state(learn.model)), floats(own.means[-1]))


@pytest.mark.parametrize("options", [{}, CIFAR], ids=["adamw", "cifar"])
def test_averaging_does_not_disturb_what_is_averaged(digits, options):
    _, with_average, _ = trained(digits, epochs=3, ema=0.9, **options)
    _, without, _ = trained(digits, epochs=3, **options)
    assert len(without.states) == 33
    assert all(equal(a, b) for a, b in zip(with_average.states, without.states, strict=True))
    assert with_average.losses == without.losses


def test_the_record_of_an_averaged_run_is_of_the_averages(tmp_path):
    experiment = Experiment({"student": "mini_resnet_xs", "epochs": 2, "ema": 0.9, "label_smoothing": 0.1}, tmp_path)
    experiment.load()
    own = OwnAverage(0.9)
    experiment.learner().add_cb(own)
    experiment.fit(progress=False)
    record = experiment.finish()
    assert record.last["valid"]["nll"] == pytest.approx(own.losses[-1], rel=1e-5)
    assert record.best["valid"]["nll"] == pytest.approx(min(own.losses), rel=1e-5)
    assert record.history["valid_loss"] == pytest.approx(own.losses, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"ema": 0.9}, {"label_smoothing": 0.1, "mixup": 0.4}, {"optimizer": "sgd", "nesterov": True}],
    ids=["ema", "labels", "sgd"],
)
def test_the_learning_rate_finder_leaves_nothing_of_the_recipe_behind(digits, options, tmp_path):
    learn = create_learner(Run(student="mini_resnet_xs", **options), digits)
    learn.path = tmp_path
    before = state(learn.model)
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(show_plot=False, num_it=12)
    assert equal(state(learn.model), before)
    assert_plain(learn)


# What does not fit together


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"nesterov": True}, "nesterov"),
        ({"nesterov": True, "optimizer": "adamw"}, "nesterov"),
        ({"nesterov": True, "optimizer": "sgd", "momentum": 0.0}, "nesterov"),
        ({"milestones": [3]}, "milestones"),
        ({"milestones": [3], "schedule": "cosine"}, "milestones"),
        ({"warmup": 2}, "warmup"),
        ({"warmup": 5, "schedule": "cosine", "epochs": 5}, "warmup"),
        ({"warmup": 6, "schedule": "step", "epochs": 5}, "warmup"),
        ({"warmup": 5, "schedule": "constant", "epochs": 5}, "warmup"),
        ({"mixup": 0.4, "cutmix": 1.0}, "mixup and cutmix"),
        ({"optimizer": "lamb"}, "optimizer"),
        ({"schedule": "steps"}, "schedule"),
        ({"decay": "l2"}, "decay"),
        ({"momentum": 1.0}, "momentum"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"ema": 1.0}, "ema"),
        ({"mixup": -1.0}, "mixup"),
        ({"head": "conv"}, "head"),
        ({"milestones": "[3", "schedule": "step"}, "milestones"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_each_other_are_refused_in_a_sentence(options, said):
    for model in (Run, Training):
        student = {"student": "mini_resnet_xs"} if model is Run else {}
        with pytest.raises(KdfastError) as error:
            validated(model, student | options, "here")
        assert "\n" not in str(error.value) and str(error.value).startswith("here: ") and said in str(error.value)


def test_options_that_fit_each_other_are_taken():
    for options in (CIFAR | {"nesterov": True}, {"schedule": "cosine", "epochs": 3, "warmup": 2}, {"mixup": 0.4}, {"cutmix": 1},
                    {"milestones": "[150, 180]", "schedule": "step"}):  # fmt: skip
        run = validated(Run, {"student": "mini_resnet_xs"} | options, "here")
        assert isinstance(run.milestones, list) and all(isinstance(m, int) for m in run.milestones)


# RandAugment


@pytest.fixture(scope="module")
def photos():
    """Smooth coloured images of 32 pixels, which every operation changes visibly."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(60, 3, 4, 4, generator=generator) * 200 + 20
    return nn.functional.interpolate(small, (32, 32), mode="bicubic").clamp(0, 255).to(torch.uint8)


def views(photos, index, name="crop+flip+randaugment", seed=5, view=0):
    augment = Augment.named(name, 32, seed)
    augment.view = view
    return augment(photos[index], torch.as_tensor(index))


@pytest.mark.parametrize("name", ["randaugment", "flip+randaugment", "crop+randaugment", "crop+flip+randaugment"])
def test_randaugment_makes_other_bytes_of_about_every_image(photos, name):
    rest = name.removesuffix("randaugment").rstrip("+") or "none"
    before, everything = photos.clone(), list(range(60))
    seen = views(photos, everything, name)
    assert seen.dtype == torch.uint8 and seen.shape == photos.shape and torch.equal(photos, before)
    plain = photos if rest == "none" else views(photos, everything, rest)
    assert seen.ne(plain).flatten(1).any(1).float().mean() >= 0.85
    assert len(seen.flatten(1).unique(dim=0)) == 60


def test_a_view_by_randaugment_depends_on_seed_view_and_image_alone(photos):
    all_at_once = views(photos, list(range(60)))
    some = [41, 3, 59, 17]
    torch.manual_seed(99)  # no matter
    assert torch.equal(views(photos, some), all_at_once[some])
    assert torch.equal(torch.cat([views(photos, [i]) for i in range(60)]), all_at_once)
    for change in ({"seed": 6}, {"view": 1}):
        other = views(photos, list(range(60)), **change)
        assert other.ne(all_at_once).flatten(1).any(1).float().mean() > 0.85
    same = photos[:1].expand(60, 3, 32, 32)  # one image under sixty numbers: sixty draws
    assert len(Augment.named("randaugment", 32, 5)(same, torch.arange(60)).flatten(1).unique(dim=0)) > 30


def test_randaugment_leaves_the_generators_as_they_were(photos):
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    views(photos, list(range(20)))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1]) and random.getstate() == before[2]


def test_training_with_randaugment_shows_the_views_that_can_be_asked_for_again(digits):
    dls = dataloaders(digits, 64, "crop+flip+randaugment", seed=4)
    dls.train.augment.view = 2
    for _, (x, _y) in zip(range(2), dls.train, strict=False):
        assert torch.equal(x.as_subclass(torch.Tensor), dls.train.images(dls.train.shown, view=2).as_subclass(torch.Tensor))
    one, other = (trained(digits, epochs=1, augment="crop+flip+randaugment")[0] for _ in range(2))
    assert equal(state(one.model), state(other.model))
