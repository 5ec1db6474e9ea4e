"""What a fastai user may rely on, each with a test named after it."""

import copy
import pickle
import random
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.all import (
    EarlyStoppingCallback,
    GradientAccumulation,
    GradientClip,
    MixUp,
    SaveModelCallback,
)
from fastai.callback.core import Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelTrainException
from fastai.callback.mixup import CutMix
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD, Adam, OptimWrapper
from fastai.torch_core import params
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from kdfast.all import (
    AT,
    CAT,
    CC,
    DIST,
    DKD,
    KD,
    NKD,
    NST,
    OFD,
    PKT,
    RKD,
    SP,
    WSLD,
    Distill,
    FitNet,
    HardLabel,
    KdfastError,
    Method,
    Standardized,
    Teacher,
    create_model,
    ramp,
    set_seed,
)  # fmt: skip

torch.set_num_threads(1)

ALL = {
    "kd": KD, "hard_label": HardLabel, "dkd": DKD, "dist": DIST, "nkd": NKD, "wsld": WSLD, "fitnet": FitNet, "at": AT, "nst": NST,
    "ofd": OFD, "cat": CAT, "sp": SP, "rkd": RKD, "pkt": PKT, "cc": CC, "kd_std": lambda **kw: Standardized(KD(2), **kw),
    "dkd_std": lambda **kw: Standardized(DKD(2), **kw),
}  # fmt: skip
ADAPTED = ("fitnet", "ofd", "cc")


def loaders(n=96, bs=16, size=8, classes=4, seed=0):
    """Images whose class is their brightest quarter: learnable in a few steps."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 3, size, size, generator=g), torch.randint(classes, (n,), generator=g)
    for image, c in zip(x, y.tolist(), strict=True):
        i, j = (c // 2 % 2) * size // 2, (c % 2) * size // 2
        image[:, i : i + size // 2, j : j + size // 2] += 1.5
    train = DataLoader(TensorDataset(x, y), bs=bs, shuffle=True, device=torch.device("cpu"))
    dls = DataLoaders(train, DataLoader(TensorDataset(x[:32], y[:32]), bs=bs, device=torch.device("cpu")), device="cpu")
    dls.c = classes
    return dls


@pytest.fixture
def folder(tmp_path):
    """Images in a folder, and fastai's own DataLoaders of them, which can be exported."""
    rng = np.random.default_rng(0)
    for c in range(4):
        (tmp_path / "images" / f"c{c}").mkdir(parents=True)
        for i in range(8):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "images" / f"c{c}" / f"{i}.png")
    return ImageDataLoaders.from_folder(tmp_path / "images", valid_pct=0.25, seed=0, bs=8, num_workers=0, device="cpu")


def net(name="mini_resnet_xs", classes=4, size=8, seed=1):
    torch.manual_seed(seed)
    return create_model(name, classes, size)


def student(method=None, teacher=None, name="mini_resnet_xs", loss=None, seed=0, cbs=(), dls=None, opt=Adam, **options):
    """A seeded Learner, distilled if there is a method."""
    model, teacher = net(name), net("mini_resnet_m", seed=2) if teacher is None else teacher
    set_seed(seed)
    dls = loaders() if dls is None else dls
    dls.rng = random.Random(seed)
    for dl in dls.loaders:
        dl.rng = random.Random(seed)
    distill = [Distill(teacher, method, **options)] if method is not None else []
    return Learner(dls, model, loss or CrossEntropyLossFlat(), opt, metrics=accuracy, cbs=[*distill, *cbs], lr=0.01)


def quiet(learn, how="fit", *args, **kwargs):
    with learn.no_logging(), learn.no_bar():
        getattr(learn, how)(*args, **kwargs)
    return learn


def state(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in m.__dict__) for m in model.modules())


def column(learn, name):
    i = list(learn.recorder.metric_names).index(name) - 1
    return [row[i] for row in learn.recorder.values]


@pytest.mark.parametrize("name", ALL)
def test_every_method_trains_a_same_and_a_cross_architecture_pair(name):
    for teacher in ("mini_resnet_m", "mini_mobile_m"):
        learn = quiet(student(ALL[name](), net(teacher, seed=2)), "fit", 2, 0.01)
        term = column(learn, f"train_{name}")
        assert np.isfinite(term).all()
        assert all(torch.isfinite(p).all() for p in learn.model.parameters())


# What the student's own numbers are


@pytest.mark.parametrize("name", ["kd", "dkd", "fitnet", "ofd"])
def test_valid_loss_and_metrics_are_those_of_the_undistilled_student(name):
    learn = quiet(student(ALL[name]()), "fit", 1)
    weights = learn.model.state_dict()
    alone = student()
    alone.model.load_state_dict(weights)
    with alone.no_bar():
        expected = alone.validate()
    assert [column(learn, "valid_loss")[0], column(learn, "accuracy")[0]] == list(expected)
    with learn.no_bar():
        assert list(learn.validate()) == list(expected)
        distilled, undistilled = (one.get_preds(with_loss=True) for one in (learn, alone))
    assert all(torch.equal(a, b) for a, b in zip(distilled, undistilled, strict=True))
    assert distilled[2].shape == (32,)


@pytest.mark.parametrize(
    "method", [KD(alpha=0), HardLabel(weight=0, ce=1), DKD(weight=0), FitNet(weight=0), OFD(weight=0) + AT(weight=0)]
)
@pytest.mark.parametrize("dropout", [False, True])
def test_no_weight_on_the_method_is_bit_identical_to_no_callback(method, dropout):
    class Noisy(nn.Module):  # a teacher that draws in every forward
        def __init__(self):
            super().__init__()
            self.net = net("mini_resnet_m")

        def forward(self, x):
            random.random(), np.random.rand(), torch.randn(1)
            return self.net(x)

    def run(method):
        learn = student(method, Noisy() if method else None)
        if dropout:
            learn.model.head = nn.Sequential(nn.Dropout(0.3), learn.model.head)
        quiet(learn, "fit_one_cycle", 2, 0.01)
        generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        return learn, generators, [dl.rng.getstate() for dl in learn.dls.loaders]

    (distilled, *generators), (alone, *expected) = run(method), run(None)
    assert equal(state(distilled.model), state(alone.model))
    assert generators == expected
    assert column(distilled, "valid_loss") == column(alone, "valid_loss")


@pytest.mark.parametrize("name", ["dkd", "fitnet", "cc"])
def test_two_runs_with_one_seed_are_bit_identical(name):
    one, two = (quiet(student(ALL[name]()), "fit", 2) for _ in range(2))
    assert equal(state(one.model), state(two.model))
    assert equal(state(one.distill.projectors), state(two.distill.projectors))
    other = quiet(student(ALL[name](), seed=1), "fit", 2)
    assert not equal(state(one.model), state(other.model))


def test_each_term_is_logged_by_its_name_and_the_total_is_their_weighted_sum():
    learn = student(KD(T=2, alpha=0.5) + AT(weight=10) + SP(weight=3))
    totals = []

    class Listen(Callback):
        order = 6

        def after_loss(self):
            if self.training:
                totals.append(self.learn.loss.item())

    learn.add_cb(Listen())
    quiet(learn, "fit", 1, 1e-3)
    ce, kd, at, sp = (column(learn, f"train_{n}")[0] for n in ("ce", "kd", "at", "sp"))
    assert np.mean(totals) == pytest.approx(0.5 * ce + 0.5 * kd + 10 * at + 3 * sp, rel=1e-5)
    assert min(ce, kd, at, sp) > 0


def test_any_weight_takes_a_schedule():
    from fastai.callback.schedule import SchedLin, sched_cos

    seen = []

    class Probe(Callback):
        def before_batch(self):
            if self.training:
                d = self.learn.distill
                seen.append([d._now(part.weight) for part in d.parts] + [d._now(d.parts[0].ce)])

    method = KD(alpha=SchedLin(0, 1)) + AT(weight=partial(sched_cos, 0, 10)) + DKD(weight=ramp(2, 4))
    quiet(student(method, cbs=[Probe()]), "fit", 3)
    w = np.array(seen)
    assert len(w) == 18 and w[0].tolist() == [0, 0, 2, 1]
    assert w[9, 0] == pytest.approx(0.5) and w[9, 1] == pytest.approx(5)
    assert np.allclose(w[:, 3], 1 - w[:, 0])
    assert w[::6, 2].tolist() == [2, 4, 4]


# The teacher


@pytest.mark.parametrize("name", ["kd", "at", "ofd", "cat", "cc"])
def test_the_teachers_weights_gradients_statistics_modes_and_flags_never_change(name):
    teacher = net("mini_resnet_m", seed=2).train()
    teacher.stages[1].eval()
    teacher.head.weight.requires_grad_(False)
    teacher.stem[0].weight.grad = torch.ones_like(teacher.stem[0].weight)
    before, modes = state(teacher), [m.training for m in teacher.modules()]
    flags = [p.requires_grad for p in teacher.parameters()]
    in_eval = []
    handle = teacher.register_forward_hook(
        lambda m, i, o: in_eval.append((not any(k.training for k in m.modules()), not o.requires_grad))
    )
    quiet(student(ALL[name](), teacher), "fit", 1)
    handle.remove()
    assert len(in_eval) >= 6 and all(all(pair) for pair in in_eval)
    assert equal(state(teacher), before)
    assert [m.training for m in teacher.modules()] == modes
    assert [p.requires_grad for p in teacher.parameters()] == flags
    grads = [p.grad for p in teacher.parameters() if p.grad is not None]
    assert len(grads) == 1 and grads[0].eq(1).all()


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), CancelFitException()])
def test_the_teachers_modes_are_its_own_after_any_fit(error):
    teacher = net("mini_resnet_m", seed=2).train()
    learn = student(AT(), teacher)
    calls = []

    def fail(module, inputs):
        calls.append(1)
        if len(calls) > 4:
            raise error

    handle = teacher.stages.register_forward_pre_hook(fail)
    try:
        quiet(learn, "fit", 1)
    except (RuntimeError, KeyboardInterrupt):
        assert not isinstance(error, CancelFitException)
    handle.remove()
    assert len(calls) == 5 and all(m.training for m in teacher.modules()) and not hooks(teacher)


# No hook is left


EVENTS = [
    "before_batch",
    "after_pred",
    "after_loss",
    "before_backward",
    "before_step",
    "after_step",
    "after_batch",
    "after_train",
]
ERRORS = [RuntimeError, KeyboardInterrupt, CancelBatchException, CancelTrainException, CancelEpochException, CancelFitException]


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("order", [0, 50])
def test_no_hook_is_left_after_a_finished_cancelled_failed_or_interrupted_fit(event, error, order):
    def fail(self):
        if self.training and self.train_iter == 2:
            raise error("stop")

    breaker = type("Breaker", (Callback,), {"order": order, event: fail})()
    teacher = net("mini_resnet_m", seed=2)
    learn = student(OFD() + AT() + CAT() + RKD(), teacher, cbs=[breaker], dls=loaders(n=48))
    try:
        quiet(learn, "fit", 1)
    except (RuntimeError, KeyboardInterrupt):
        assert error in (RuntimeError, KeyboardInterrupt)
    except (CancelBatchException, CancelEpochException, CancelTrainException):
        assert error not in (RuntimeError, KeyboardInterrupt)  # fastai lets some through where nobody catches them
    assert hooks(learn.model) == hooks(teacher) == 0
    learn.remove_cb(breaker)
    quiet(learn, "fit", 1)
    assert hooks(learn.model) == hooks(teacher) == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_hook_is_left_when_the_students_forward_fails(error):
    learn = student(OFD() + AT())
    quiet(learn, "fit", 1)

    def fail(module, inputs):
        if module.training:
            raise error("stop")

    handle = learn.model.stages[1].register_forward_pre_hook(fail)
    with pytest.raises(error):
        quiet(learn, "fit", 1)
    handle.remove()
    assert hooks(learn.model) == 0
    quiet(learn, "fit", 1)


# Projectors


def vision_like_split(model):
    return [params(model.stem) + params(model.stages), params(model.head)]


WAYS = {
    "fit": lambda learn: quiet(learn, "fit", 2),
    "fit_one_cycle": lambda learn: quiet(learn, "fit_one_cycle", 2, slice(1e-4, 1e-2)),
    "fine_tune": lambda learn: quiet(learn, "fine_tune", 1),
}


@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("opt", [Adam, partial(OptimWrapper, opt=torch.optim.AdamW), partial(OptimWrapper, opt=torch.optim.SGD)])
def test_adapters_train_with_the_students_optimizer(name, way, opt):
    learn = student(ALL[name](), opt=opt)
    learn.splitter = vision_like_split
    first = {}

    class Remember(Callback):
        order = 7

        def after_loss(self):
            if self.training and not first:
                first.update(state(self.learn.distill.projectors))

    learn.add_cb(Remember())
    WAYS[way](learn)
    last = state(learn.distill.projectors)
    trained = [k for k, v in learn.distill.projectors.named_parameters()]
    # a bias before a BatchNorm has no gradient but rounding's: the regressor's convolution has one
    assert trained and all(not torch.equal(first[k], last[k]) for k in trained)
    ours = {id(p) for p in learn.distill.projectors.parameters()}
    assert not ours & {id(p) for group in learn.opt.param_lists for p in group}


def test_adapters_follow_the_learning_rate_of_the_last_group_and_stand_still_at_zero():
    learn = student(FitNet(), opt=SGD)
    learn.splitter = vision_like_split
    quiet(learn, "fit", 1, slice(1e-5, 1e-2))
    assert learn.distill.projector_optimizer.opt.hypers[0]["lr"] == 1e-2
    weights = {k: v.clone() for k, v in learn.distill.projectors.named_parameters()}
    quiet(learn, "fit", 1, 0.0)
    assert all(torch.equal(weights[k], v) for k, v in learn.distill.projectors.named_parameters())


def test_an_optimizer_that_is_already_built_trains_adapters_too():
    model = net()
    opt = OptimWrapper(opt=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
    learn = Learner(loaders(), model, CrossEntropyLossFlat(), opt, cbs=Distill(net("mini_resnet_m"), FitNet()))
    quiet(learn, "fit", 1)
    before = state(learn.distill.projectors)
    quiet(learn, "fit", 1)
    assert not equal(before, state(learn.distill.projectors))


def test_lr_find_leaves_student_and_adapters_as_they_were(tmp_path):
    learn = student(FitNet() + CC())
    learn.path = tmp_path
    quiet(learn, "fit", 1)
    before, projectors = state(learn.model), state(learn.distill.projectors)
    quiet(learn, "lr_find", num_it=8, show_plot=False)
    assert equal(before, state(learn.model)) and equal(projectors, state(learn.distill.projectors))
    quiet(learn, "fit", 1)
    assert not equal(projectors, state(learn.distill.projectors))


def test_adapters_and_their_optimizer_live_in_kdfasts_own_checkpoint(tmp_path):
    learn = student(FitNet() + CC())
    quiet(learn, "fit", 1)
    path = learn.distill.save(tmp_path / "projectors.pth")
    other = student(FitNet() + CC())
    other.distill.load(path)  # before anything is built
    quiet(other, "fit", 1, 0.0)
    for k, v in learn.distill.projectors.named_parameters():
        assert torch.equal(v, dict(other.distill.projectors.named_parameters())[k])
    momentum = [s["grad_avg"] for s in learn.distill.projector_optimizer.opt.state_dict()["state"] if "grad_avg" in s]
    assert momentum and len(learn.distill.projector_optimizer.opt.state) == len(list(learn.distill.projectors.parameters()))
    with pytest.raises(KdfastError, match="do not fit"):
        learn.distill.load_state_dict({"projectors": {"x": torch.ones(1)}, "optimizer": None})
    (tmp_path / "no.pth").write_bytes(b"no")
    for wrong in ("no.pth", "none.pth"):
        with pytest.raises(KdfastError, match="no checkpoint"):
            learn.distill.load(tmp_path / wrong)


# Saving and exporting


@pytest.mark.parametrize("opt", [Adam, partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_save_export_and_pickle_hold_the_student_only(tmp_path, folder, opt):
    sizes = {}
    for name, method in (("baseline", None), ("distilled", FitNet() + CC() + KD())):
        learn = student(method, opt=opt, dls=folder)
        learn.path = tmp_path / name
        learn.path.mkdir()
        quiet(learn, "fit", 1)
        saved = learn.save("student")
        learn.export("export.pkl")
        pickled = re.sub(rb"\d{10,}", b"", pickle.dumps(learn.model))  # addresses, of 14 or 15 digits as it happens
        sizes[name] = saved.stat().st_size, (learn.path / "export.pkl").stat().st_size, len(pickled)
        quiet(learn, "fit", 1)  # and training goes on
        learn.load("student")
    assert sizes["distilled"][0] == sizes["baseline"][0] and sizes["distilled"][2] == sizes["baseline"][2]
    assert abs(sizes["distilled"][1] - sizes["baseline"][1]) < 1500
    assert b"kdfast.distill.callback" not in (tmp_path / "distilled" / "export.pkl").read_bytes()
    with learn.no_bar():
        loaded, x = load_learner(tmp_path / "distilled" / "export.pkl"), torch.randn(4, 3, 8, 8)
    alone = student(opt=opt, dls=folder)
    alone.path = tmp_path / "distilled"
    alone.load("student")  # optimizer state and all
    assert torch.equal(loaded.model.eval()(x), alone.model.eval()(x))


def test_an_export_loads_where_kdfast_is_not_installed(tmp_path, folder):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    )
    learn = Learner(folder, model, metrics=accuracy, path=tmp_path, cbs=Distill(net("mini_resnet_m"), KD() + CC()))
    quiet(learn, "fit", 1)
    learn.export("x.pkl")
    pickled = pickle.dumps(learn.model)
    code = (
        "import sys\n"
        "class No:\n"
        "    def find_spec(self, name, *a):\n"
        "        if name.split('.')[0] == 'kdfast': raise ImportError('kdfast is not installed')\n"
        "import kdfast.models._torchvision as t; t.install()\n"
        "for m in [m for m in sys.modules if m.startswith('kdfast')]: del sys.modules[m]\n"
        "sys.meta_path.insert(0, No())\n"
        "import torch, pickle, warnings; warnings.simplefilter('ignore')\n"
        "from fastai.learner import load_learner\n"
        f"learn = load_learner({str(tmp_path / 'x.pkl')!r})\n"
        f"pickle.loads({pickled!r})\n"
        "print(learn.model(torch.ones(2, 3, 8, 8)).shape, [type(c).__module__ for c in learn.cbs])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "torch.Size([2, 4])" in done.stdout, done.stderr
    assert "kdfast" not in done.stdout


def test_a_learner_pickles_after_a_failed_fit():
    learn = student(AT())
    learn.add_cb(Callback(after_step=lambda self: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        quiet(learn, "fit", 1)
    learn.cbs.pop()
    assert b"kdfast.distill.callback" not in pickle.dumps([learn.metrics, learn.cbs])


# fastai's ways to train


def test_gradient_accumulation_equals_one_large_batch_and_clipping_clips():
    def run(bs, *cbs):  # SGD, and no BatchNorm: then the sum of gradients is all there is
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
        with torch.no_grad():
            model[1].weight.copy_(torch.linspace(-0.1, 0.1, 768).view(4, 192))
            model[1].bias.zero_()
        dls = loaders(n=32, bs=bs)
        dls = DataLoaders(dls.train.new(shuffle=False), dls.valid)
        learn = Learner(dls, model, CrossEntropyLossFlat(), SGD, wd=0.0, cbs=[Distill(net("mini_resnet_m"), KD()), *cbs])
        quiet(learn, "fit", 1, 0.1)
        return model[1].weight.detach()

    assert torch.allclose(run(8, GradientAccumulation(32)), run(32), atol=1e-6)
    assert not torch.allclose(run(8), run(32), atol=1e-4)
    start = torch.linspace(-0.1, 0.1, 768).view(4, 192)
    assert (run(32, GradientClip(1e-3)) - start).norm() <= 1.01e-4


def test_adapters_accumulate_gradients_as_the_student_does():
    learn = student(FitNet(), cbs=[GradientAccumulation(48), GradientClip()])
    steps = []
    quiet(learn, "fit", 1)
    step = learn.distill.projector_optimizer.step
    learn.distill.projector_optimizer.step = lambda: (steps.append(1), step())
    quiet(learn, "fit", 1)
    assert len(steps) == 2  # 96 images, a step every 48


class Remember(Callback):
    """The method's loss as it was added, and what it was computed from."""

    order = 7

    def __init__(self):
        self.rows = []

    def after_loss(self):
        if self.training:
            mix = next(cb for cb in self.learn.cbs if isinstance(cb, (MixUp, CutMix)))
            self.rows.append((self.learn.distill.means, self.x.clone(), self.y.clone(), mix.yb1[0].clone(), mix.lam.clone()))


@pytest.mark.parametrize("mix", [MixUp, CutMix])
@pytest.mark.parametrize("loss", [CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat])
@pytest.mark.parametrize("name", ["dkd", "nkd", "wsld", "kd", "fitnet"])
def test_mixup_and_cutmix_mix_the_methods_targets_too(mix, loss, name):
    from kdfast.distill import losses

    teacher = net("mini_resnet_m", seed=2).eval()
    remember = Remember()
    method = ALL[name](weight=1) if name != "kd" else KD()
    learn = student(method, teacher, loss=loss(), cbs=[mix(), remember], dls=loaders(n=16, bs=16))
    model = copy.deepcopy(learn.model).train()
    quiet(learn, "fit", 1)
    _, x, y, y1, lam = remember.rows[0]
    assert lam.shape == ((16,) if mix is MixUp else (1,))
    if name in ("dkd", "nkd", "wsld"):
        with torch.no_grad():
            s, t = model(x), teacher(x)
        args = method.arguments
        a, b = (getattr(losses, name)(s, t, target, **args, reduction="none") for target in (y, y1))
        expected = (lam * a + (1 - lam) * b).mean()
        assert column(learn, f"train_{name}")[0] == pytest.approx(expected.item(), rel=1e-5)
        assert not torch.equal(y, y1)
    assert np.isfinite(column(learn, f"train_{name}")[0])


def test_nn_cross_entropy_with_mixup_raises_without_kdfast_too():
    for method in (None, KD()):
        with pytest.raises((RuntimeError, KdfastError)):
            quiet(student(method, loss=nn.CrossEntropyLoss(), cbs=[MixUp()]), "fit", 1)


def test_several_fits_early_stopping_and_save_model(tmp_path):
    learn = student(FitNet() + KD())
    learn.path = tmp_path
    cbs = [EarlyStoppingCallback(min_delta=100, patience=1), SaveModelCallback()]
    quiet(learn, "fit", 5, cbs=cbs)
    assert len(learn.recorder.values) == 2
    projectors = state(learn.distill.projectors)
    quiet(learn, "fit_one_cycle", 1)
    quiet(learn, "fit", 1, reset_opt=True)
    assert not equal(projectors, state(learn.distill.projectors))
    logged = [n.removeprefix("train_") for n in learn.recorder.metric_names if n.startswith("train_")]
    assert logged == ["loss", "ce", "fitnet", "kd"]
    assert [m.name for m in learn.metrics] == ["accuracy"]


def test_the_callback_may_join_and_leave_at_any_time():
    learn = student()
    quiet(learn, "fit", 1, cbs=Distill(net("mini_resnet_m"), AT()))
    assert "train_at" in learn.recorder.metric_names and len(learn.cbs) == len(student().cbs)
    learn.add_cb(Distill(net("mini_resnet_m"), SP()))
    quiet(learn, "fit", 1)
    learn.remove_cb(learn.distill)
    quiet(learn, "fit", 1)
    assert "train_sp" not in learn.recorder.metric_names and len(learn.cbs) == len(student().cbs)


def test_channels_last():
    def run(*cbs):
        learn = student(FitNet() + KD(), net("mini_resnet_l", seed=2), name="mini_resnet_m")  # ≥ 16 channels
        if cbs:
            learn.to_channelslast(use_amp=False)
        return quiet(learn, "fit", 1, 1e-3)

    one, two = run(True), run()
    assert column(one, "train_fitnet")[0] == pytest.approx(column(two, "train_fitnet")[0], rel=1e-2)
    assert next(one.model.parameters()).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="fastai does not autocast on a CPU")
@pytest.mark.parametrize("precision", ["to_fp16", "to_bf16"])
@pytest.mark.parametrize("name", ALL)
def test_mixed_precision(name, precision):
    dls = loaders()
    dls.device = torch.device("cuda")
    learn = student(ALL[name](), net("mini_resnet_l", seed=2), name="mini_resnet_m", dls=dls)
    learn.model.cuda()
    getattr(learn, precision)()
    quiet(learn, "fit", 2, 1e-3)
    assert np.isfinite(column(learn, f"train_{name}")).all()
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())
    if name in ADAPTED:
        before = state(learn.distill.projectors)
        quiet(learn, "fit", 1, 1e-3)
        assert not equal(before, state(learn.distill.projectors))
        assert all(torch.isfinite(p).all() for p in learn.distill.projectors.parameters())


def test_a_gradient_scaler_scales_the_adapters_step_too():
    """to_fp16's path without CUDA: a scaler of 1024 that skips nothing must not change what projectors learn."""

    class Scale(Callback):
        order = 10

        def before_fit(self):
            self.learn.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

        def before_backward(self):
            self.learn.loss_grad = self.learn.scaler.scale(self.loss_grad)

        def before_step(self):
            self.learn.scaler.unscale_(self.opt)

        def after_step(self):
            self.learn.scaler.update()

    one, two = (quiet(student(FitNet(), cbs=cbs, opt=SGD), "fit", 1) for cbs in ([Scale()], []))
    a, b = state(one.distill.projectors), state(two.distill.projectors)
    assert all(torch.allclose(a[k].float(), b[k].float(), rtol=1e-4, atol=1e-6) for k in a)


# What cannot work is said in one sentence


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: student(AT(), stages=["stages.3"]), "unknown layer 'stages.3' in MiniConvNet; the nearest known: stages"),
        (lambda: student(AT(), stages=["head"], teacher_stages=["stages"]), "layer head of MiniConvNet gives no map"),
        (lambda: student(AT(), stages=["stages"], teacher_stages=["stem", "stages"]), "1 stages of the student and 2"),
        (lambda: student(KD(), net("mini_resnet_m", classes=5)), "differ in output"),
        (lambda: student(KD(), net("mini_resnet_m").half()), "weights are float16 and the images float32"),
        (lambda: student(AT(), net("mini_resnet_m").double()), "weights are float64 and the images float32"),
        (lambda: student(KD(), loss=BCEWithLogitsLossFlat()), "kd compares distributions over classes"),
        (lambda: student(KD(), loss=nn.MSELoss()), "which MSELoss does not train"),
        (lambda: student(OFD(), net("mini_vit_s")), "no BatchNorm2d"),
        (lambda: student(AT(), [net("mini_resnet_m"), net("mini_resnet_s")]), "features with those of one teacher"),
        (lambda: student(KD(), "resnet18"), "a teacher is a Learner"),
        (lambda: student(KD(), []), "no teacher in the list"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(make, sentence):
    with pytest.raises(KdfastError, match=sentence) as raised:
        quiet(make(), "fit", 1)
    assert "\n" not in str(raised.value)


def test_the_student_cannot_teach_itself():
    model = net()
    learn = Learner(loaders(), model, CrossEntropyLossFlat(), cbs=Distill(model, KD()))
    with pytest.raises(KdfastError, match="the teacher is the student itself"):
        quiet(learn, "fit", 1)


def test_class_activation_maps_need_a_linear_end():
    learn = student(CAT())
    head = nn.Sequential(nn.Flatten(), nn.Linear(learn.model.head.in_features, 8), nn.ReLU(), nn.Linear(8, 4))
    learn.model.head = head
    with pytest.raises(KdfastError, match="one linear layer at the end"):
        quiet(learn, "fit", 1)


def test_layers_may_be_named():
    learn = quiet(student(AT(), stages=["stem", "stages"], teacher_stages=["stages.0", "stages.1"]), "fit", 1)
    assert learn.distill.features.stages == ("stem", "stages")


def test_an_ensemble_is_the_mean_of_softened_probabilities():
    a, b = net("mini_resnet_m", seed=2).eval(), net("mini_mobile_m", seed=3).eval()
    x = torch.randn(5, 3, 8, 8)
    taught = Teacher([a, b]).outputs((x,)).softened(3)
    expected = ((a(x) / 3).softmax(1) + (b(x) / 3).softmax(1)) / 2
    assert torch.allclose((taught.logits / 3).softmax(1), expected, atol=1e-6)
    learn = quiet(student(KD(), [Learner(loaders(), a, CrossEntropyLossFlat()), b]), "fit", 1)
    assert np.isfinite(column(learn, "train_kd")[0])


def test_a_method_sees_features_that_carry_gradients():
    class Far(Method):
        features = ("stages", "last", "pooled", "pre_relu", "cam")

        def loss(self, s, t, target):
            assert all(f.requires_grad for f in [*s.stages, *s.pre_relu, s.last, s.pooled, s.cam])
            assert not any(f.requires_grad for f in [*t.stages, *t.pre_relu, t.last, t.pooled, t.cam])
            assert [f.shape[2:] for f in s.stages] == [f.shape[2:] for f in t.stages]
            assert torch.allclose(s.cam.mean((2, 3)), s.logits, atol=1e-5)
            assert torch.allclose(s.last.mean((2, 3)), s.pooled, atol=1e-6)
            assert all(torch.equal(p.relu(), f) for p, f in zip(s.pre_relu, s.stages, strict=True))
            assert all(float(p.min()) < 0 for p in s.pre_relu)
            return s.pooled.mean()

    quiet(student(Far()), "fit", 1)
