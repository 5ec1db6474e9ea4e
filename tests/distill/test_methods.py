"""Methods: published weights, arguments, sums, schedules, names, plugins, documentation."""

import inspect
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.schedule import SchedCos, sched_lin

from kdfast.all import (
    AT,
    CC,
    DKD,
    KD,
    OFD,
    Distill,
    Experiment,
    FitNet,
    HardLabel,
    KdfastError,
    Outputs,
    Standardized,
    create_method,
    load_study,
    method_names,
    ramp,
)
from kdfast.core import plugins as loaded
from kdfast.core import provenance
from kdfast.core.code import code_hash
from kdfast.core.provenance import ROOT
from kdfast.distill import losses, method
from kdfast.distill.method import method_class
from kdfast.distill.projectors import Regressor, connector, margin
from kdfast.distill.schedules import weight_now
from kdfast.report import methods_doc

torch.set_num_threads(1)

PUBLISHED = {  # weight, ce: the tables for CIFAR-100
    "kd": (0.9, 0.1), "hard_label": (0.5, 0.5), "dkd": ("ramp(20)", 1), "dist": (2, 1), "nkd": (1, 1), "wsld": (2.25, 1),
    "kd_std": (9, 0.1), "dkd_std": ("ramp(20, 9)", 1), "fitnet": (100, 1), "at": (1000, 1), "nst": (50, 1), "ofd": (0.001, 1),
    "cat": (15, 1), "sp": (3000, 1), "rkd": (1, 1), "pkt": (30000, 1), "cc": (0.02, 1),
}  # fmt: skip


def test_defaults_are_the_published_weights():
    assert {name for name in method_names() if method_class(name).__module__.startswith("kdfast.distill.methods")} == set(
        PUBLISHED
    )
    for name, (weight, ce) in PUBLISHED.items():
        made = create_method(name, {})
        assert (str(made.weight) if isinstance(weight, str) else made.weight) == weight
        assert made.ce == pytest.approx(ce)


@pytest.mark.parametrize("name", [n for n in PUBLISHED if not n.endswith("_std")])
def test_a_method_takes_its_losss_arguments_with_its_losss_defaults(name):
    skip = {"student", "teacher", "students", "teachers", "target", "margin", "reduction"}
    loss = {
        k: p.default
        for k, p in inspect.signature(getattr(losses, method_class(name).formula)).parameters.items()
        if k not in skip
    }
    own = {k: p.default for k, p in inspect.signature(method_class(name)).parameters.items()}
    assert loss.items() <= own.items()


@pytest.mark.parametrize(
    "name, args, sentence",
    [
        ("dkkd", {}, "unknown method 'dkkd'; the nearest known: .*dkd"),
        ("dkd", {"bet": 2}, "unknown argument of method dkd 'bet'; the nearest known: beta"),
        ("dkd", {"beta": "2"}, "argument beta of method dkd must be a number, not '2'"),
        ("dkd", {"beta": True}, "must be a number, not True"),
        ("dkd", {"beta": -1}, "beta of method dkd must be at least 0, not -1"),
        ("kd", {"T": 0}, "the temperature T of method kd must be above 0, not 0"),
        ("kd", {"alpha": 1.5}, "alpha of method kd must lie in 0…1, not 1.5"),
        ("kd", {"alpha": "0.5"}, "must be a number, not '0.5'"),
        ("at", {"weight": "a lot"}, "argument weight of method at must be a number from 0, a schedule"),
        ("at", {"weight": -1}, "argument weight of method at must be a number from 0"),
        ("at", {"weight": {"ramp": 0}}, "must grow over at least one epoch"),
        ("at", {"weight": {"rump": 3}}, "must be a number from 0, a schedule"),
        ("cat", {"normalize": 1}, "argument normalize of method cat must be true or false, not 1"),
        ("cat", {"size": 1.5}, "size of method cat must be a whole number above 0, not 1.5"),
        ("fitnet", {"stage": 0}, "stage of method fitnet must be a whole number above 0"),
        ("dkd+att", {}, "unknown method 'att'"),
        ("dkd+at", {"beta": 2}, "unknown argument of method dkd\\+at 'beta'"),
        ("dkd+at", {"dkd": 2}, "argument dkd of method dkd\\+at must be a mapping"),
        ("dkd+dkd", {}, "names a method twice"),
    ],
)
def test_a_wrong_name_or_argument_is_said_in_one_sentence(name, args, sentence):
    with pytest.raises(KdfastError, match=sentence) as raised:
        create_method(name, args)
    assert "\n" not in str(raised.value)


def test_weights_from_papermill():
    assert create_method("at", {"weight": {"ramp": 5, "end": 100}}).weight == ramp(5, 100)
    both = create_method("dkd+at", {"dkd": {"beta": 2}, "at": {"weight": 10}})
    assert [part.name for part in both.parts] == ["dkd", "at"] and both.parts[0].beta == 2 and both.parts[1].weight == 10
    assert create_method("kd", {"alpha": {"ramp": 4}}).ce.at(0, 0) == 0.75


def test_schedules():
    assert [ramp(4, 2).at(0, e) for e in range(6)] == [0.5, 1, 1.5, 2, 2, 2]
    assert weight_now(partial(sched_lin, 0, 2), 0.25, 9) == 0.5
    assert weight_now(SchedCos(0, 1), 1.0, 0) == 1
    assert weight_now(3, 0.5, 0) == 3
    scheduled = KD(alpha=partial(sched_lin, 0, 0.8))
    assert weight_now(scheduled.ce, 0.5, 0) == pytest.approx(0.6)
    twice = Standardized(DKD(weight=partial(sched_lin, 0, 1)))
    assert weight_now(twice.weight, 0.5, 0) == 4.5


def test_methods_add_up():
    total = DKD() + AT() + (HardLabel() + KD() + KD(T=1)) + KD(T=2)
    assert [part.name for part in total.parts] == ["dkd", "at", "hard_label", "kd", "kd_2", "kd_3"]
    assert total.name == "dkd+at+hard_label+kd+kd_2+kd_3" and set(total.features) == {"logits", "stages"}
    first = KD()
    _ = first + KD()
    assert first.name == "kd"


def test_standardized_is_the_inner_loss_of_standardized_logits():
    s, t, y = torch.randn(6, 5), torch.randn(6, 5), torch.randint(5, (6,))
    found = Standardized(KD(T=3)).loss(Outputs(s), Outputs(t), y)
    assert torch.equal(found, losses.kd(losses.standardize(s), losses.standardize(t), T=3))
    scale = Standardized(DKD(beta=2)).loss(Outputs(7 * s + 3), Outputs(t), y)
    assert scale.shape == (6,)
    assert torch.allclose(scale, Standardized(DKD(beta=2)).loss(Outputs(s), Outputs(t), y), atol=1e-5)
    assert create_method("kd_std", {"T": 3}).inner.T == 3 and (KD() + Standardized(KD())).parts[1].name == "kd_std"
    with pytest.raises(KdfastError, match=r"takes KD\(…\) or DKD\(…\)"):
        Standardized(AT())


def test_ofd_doubles_the_weight_from_stage_to_stage():
    maps = [torch.randn(2, 4, 4, 4) for _ in range(3)]
    taught = Outputs(torch.zeros(2, 2), pre_relu=[torch.randn_like(m) for m in maps], margins=[-torch.ones(1, 4, 1, 1)] * 3)
    student, ofd = Outputs(torch.zeros(2, 2), pre_relu=maps), OFD()
    ofd.projectors = torch.nn.ModuleList(torch.nn.Identity() for _ in maps)
    each = [losses.ofd(s, t, m) for s, t, m in zip(maps, taught.pre_relu, taught.margins, strict=True)]
    assert torch.allclose(ofd.loss(student, taught, None), each[0] / 4 + each[1] / 2 + each[2])


def test_ofds_margin_is_the_mean_of_what_the_relu_cuts_off():
    norm = torch.nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.1]))
        norm.bias.copy_(torch.tensor([0.0, 1.0, 3.0]))
    x = np.random.default_rng(0).normal(norm.bias.detach(), norm.weight.detach().abs(), (400_000, 3))
    expected = [x[x[:, c] < 0, c].mean() for c in (0, 1)]
    found = margin(norm).flatten()
    assert margin(norm).shape == (1, 3, 1, 1)
    assert found[:2].tolist() == pytest.approx(expected, abs=0.01)
    assert found[2].item() == pytest.approx(-0.3)  # hardly ever below 0


@pytest.mark.parametrize("side, kernel", [(8, (3, 3)), (2, (4, 4)), (5, (2, 2)), (4, (1, 1)), (3, (1, 1))])
def test_fitnets_regressor_fits_any_pair_of_maps(side, kernel):
    s, t = torch.randn(2, 4, side, side), torch.randn(2, 6, 4, 4)
    regressor = Regressor(s, t)
    assert regressor.layers[0].kernel_size == kernel
    assert regressor(s).shape == ((2, 6, 4, 4) if side != 3 else (2, 6, 3, 3)) and regressor(s).min() == 0
    fitnet = FitNet()
    fitnet.projectors = regressor
    assert torch.isfinite(fitnet.loss(Outputs(None, stages=[s]), Outputs(None, stages=[t]), None))
    assert connector(4, 6)(s).shape == (2, 6, side, side)


def test_ccs_embeddings_learn_on_both_sides():
    s, t = (Outputs(None, pooled=torch.randn(5, d)) for d in (8, 12))
    cc = CC(dim=16)
    cc.projectors = cc.build(s, t)
    loss = cc.loss(s, t, None)
    loss.backward()
    a, b = cc.projectors[0](s.pooled), cc.projectors[1](t.pooled)
    assert torch.allclose(loss, losses.cc(a, b))
    assert all(layer.weight.shape[0] == 16 and layer.weight.grad.abs().sum() > 0 for layer in cc.projectors)


# One's own


PLUGIN = '''
import torch
from kdfast.all import Method, register


@register("mine")
class Mine(Method):
    """Squared difference of the logits."""

    def __init__(self, power: float = 2, weight: float = 0.5, ce: float = 1):
        super().__init__(weight, ce, power=power)

    def loss(self, student, teacher, target):
        return (student.logits - teacher.logits).abs().pow(self.power).mean()
'''


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PLUGINS", tmp_path / "plugins")
    monkeypatch.setattr(method, "_REGISTRY", dict(method._REGISTRY))
    monkeypatch.setattr(loaded, "_LOADED", {})
    (tmp_path / "plugins").mkdir()
    return tmp_path / "plugins"


def test_ones_own_method_is_one_file(plugins, tmp_path):
    before = code_hash("mine")
    (plugins / "mine.py").write_text(PLUGIN)
    assert "mine" in method_names() and code_hash("mine") != before
    with pytest.raises(KdfastError, match="unknown argument of method mine 'pow'; the nearest known: power"):
        create_method("mine", {"pow": 1})
    study = tmp_path / "s.yaml"
    study.write_text("title: mine\nseeds: [0]\nstudents: [mini_resnet_xs]\nteachers: [mini_resnet_s]\nmethods: [{name: mine}]\n")
    load_study(study).check_names()
    for parameters in (
        {"student": "mini_resnet_s", "epochs": 1},
        {"student": "mini_resnet_xs", "teacher": "mini_resnet_s", "method": "mine", "method_args": "{weight: 2}", "epochs": 1},
    ):
        experiment = Experiment(parameters, tmp_path / "runs")
        experiment.load()
        experiment.learner()
        experiment.fit(progress=False)
        record = experiment.finish()
    assert record.parameters["method"] == "mine" and record.history["train_mine"][0] > 0
    assert record.code["hash"] == code_hash("mine")


def test_a_plugin_is_read_again_when_it_changes_and_a_broken_one_is_named(plugins):
    (plugins / "mine.py").write_text(PLUGIN)
    assert create_method("mine", {}).weight == 0.5
    (plugins / "mine.py").write_text(PLUGIN.replace("weight: float = 0.5", "weight: float = 0.7"))
    assert create_method("mine", {}).weight == 0.7
    (plugins / "mine.py").write_text("import nothing_of_that_name")
    with pytest.raises(KdfastError, match=r"mine\.py does not load \(ModuleNotFoundError"):
        create_method("kd", {})
    (plugins / "mine.py").write_text(PLUGIN.replace("Method):", "Method):\n    features = ('logit',)"))
    with pytest.raises(KdfastError, match="unknown feature 'logit' in method mine; the nearest known: logits"):
        create_method("kd", {})


def test_every_method_runs_from_a_studys_parameters(tmp_path):
    Experiment({"student": "mini_resnet_s", "epochs": 1}, tmp_path)
    teacher = Experiment({"student": "mini_resnet_s", "epochs": 1}, tmp_path)
    teacher.load()
    teacher.learner()
    teacher.fit(progress=False)
    teacher.finish()
    parameters = {"student": "mini_mobile_xs", "teacher": "mini_resnet_s", "method": "fitnet+cc", "epochs": 1}
    experiment = Experiment(parameters | {"method_args": "{cc: {dim: 16}}"}, tmp_path)
    experiment.load()
    experiment.learner()
    experiment.fit(progress=False)
    record = experiment.finish()
    assert {"train_ce", "train_fitnet", "train_cc"} <= record.history.keys()
    assert record.model["projector_parameters"] == sum(p.numel() for p in experiment.learn.distill.projectors.parameters()) > 0


# Documentation


def test_the_documentation_is_fresh():
    assert methods_doc.PAGE.read_text() == methods_doc.page(), "run python -m kdfast.report.methods_doc"


def test_the_documentation_names_every_method_with_formula_and_source():
    text = methods_doc.PAGE.read_text()
    for name in PUBLISHED:
        section = text.split(f"\n## `{name}`")[1].split("\n## ")[0]
        assert "arXiv" in section and "- loss `kdfast.distill.losses." in section and "- defaults:" in section


def test_the_study_of_all_methods_asks_for_each_on_both_pairs():
    study = load_study(ROOT / "experiments" / "studies" / "digits_methods.yaml")
    study.check_names()
    runs = study.distilled_runs()
    assert {run.method for run in runs} == set(PUBLISHED)
    assert {run.teacher.split(".")[0] for run in runs} == {"mini_resnet_m", "mini_mobile_l"} and len(runs) == 17 * 2 * 5
    assert all(not run.method_args for run in runs)


def test_distill_keeps_the_methods_it_was_given_unchanged():
    fitnet = FitNet()
    Distill(torch.nn.Linear(1, 1), fitnet).parts[0].projectors = torch.nn.Linear(1, 1)
    assert fitnet.projectors is None
