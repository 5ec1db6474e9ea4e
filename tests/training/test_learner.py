"""What training promises: repeatable, the teacher untouched, the student's own validation, errors in a sentence."""

import numpy as np
import pytest
import torch
from conftest import finish
from fastai.callback.core import Callback
from torch.nn.functional import cross_entropy, kl_div

from kdfast.core.errors import KdfastError
from kdfast.core.records import read_record
from kdfast.experiment.runner import Experiment
from kdfast.training.learner import plateau


def distilled(runs, **changes):
    given = {"student": "mini_resnet_xs", "teacher": "mini_resnet_s", "method": "kd", "method_args": {"T": 4, "alpha": 0.9}}
    return Experiment(given | {"epochs": 2} | changes, runs)


def started(experiment):
    experiment.load()
    return experiment.learner()


def test_two_runs_with_one_seed_are_equal_to_the_last_bit(runs, tmp_path):
    one, other = (finish(Experiment({"student": "mini_plain_xs", "epochs": 2}, tmp_path / name)) for name in "ab")
    assert one.history == other.history and one.model == other.model


def test_another_seed_gives_other_weights(tmp_path):
    one, other = (finish(Experiment({"student": "mini_plain_xs", "epochs": 1, "seed": s}, tmp_path)) for s in (0, 1))
    assert one.model["weights_sha256"] != other.model["weights_sha256"]


def test_without_weight_on_the_teacher_a_distilled_run_equals_the_plain_one(runs):
    plain = finish(Experiment({"student": "mini_resnet_xs", "epochs": 2}, runs))
    taught = finish(distilled(runs, method_args={"alpha": 0}))
    assert taught.model["weights_sha256"] == plain.model["weights_sha256"]
    assert taught.history["valid_loss"] == plain.history["valid_loss"]


def test_the_training_loss_is_the_weighted_sum_of_both_terms(runs):
    learn = started(distilled(runs, method_args={"T": 3, "alpha": 0.7}))
    x, y = (v.as_subclass(torch.Tensor) for v in learn.dls.train.one_batch())
    seen = {}

    class Peek(Callback):
        order = 6  # right after Distill

        def before_batch(self):
            self.learn.xb, self.learn.yb = (x,), (y,)

        def after_loss(self):
            seen.setdefault("loss", self.learn.loss_grad.item())
            seen.setdefault("logits", self.learn.pred.detach().clone())
            seen.setdefault("taught", learn.distill.teacher(x))

    learn.fit(1, cbs=Peek())
    p, q = (torch.log_softmax(z / 3, 1) for z in (seen["logits"], seen["taught"]))
    expected = 0.3 * cross_entropy(seen["logits"], y) + 0.7 * 9 * kl_div(p, q, log_target=True, reduction="batchmean")
    assert seen["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_teacher_never_changes(runs):
    experiment = distilled(runs)
    learn = started(experiment)
    model = experiment.teacher.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    learn.fit(1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not model.training


def test_validation_loss_is_the_students_own(runs):
    learn = started(distilled(runs))
    learn.fit(1)
    valid_loss = learn.recorder.values[-1][1]
    logits, labels = learn.get_preds(ds_idx=1, act=lambda z: z)
    assert valid_loss == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-5)


def test_each_term_is_logged_by_name(runs):
    learn = started(distilled(runs))
    learn.fit(1)
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1], strict=False))
    assert row["train_ce"] > 0 and row["train_kd"] > 0
    learn.fit(1)  # a second fit logs them once again, not twice
    assert learn.recorder.metric_names.count("train_kd") == 1


def test_the_learning_rate_finder_leaves_nothing_behind(runs):
    learn = started(distilled(runs))
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.lr_find(show_plot=False)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


def test_a_loss_that_is_not_a_number_ends_the_run_with_its_name_and_epoch(tmp_path):
    experiment = Experiment({"student": "mini_plain_xs", "epochs": 2, "lr": 1e30}, tmp_path)
    with pytest.raises(KdfastError, match=r"loss of run mini_plain_xs.baseline.s0-\w+ is (nan|inf) in epoch \d+: lower lr"):
        finish(experiment)
    assert not (experiment.folder / "record.json").exists()


def test_a_missing_teacher_run_says_how_to_make_it(runs):
    with pytest.raises(KdfastError, match=r"no run of teacher mini_plain_m .* train it first .* -p student mini_plain_m"):
        distilled(runs, teacher="mini_plain_m")


def test_an_unknown_teacher_is_refused(runs):
    with pytest.raises(KdfastError, match="unknown model 'mini_resnet_z'; the nearest known: mini_resnet"):
        distilled(runs, teacher="mini_resnet_z")
    with pytest.raises(
        KdfastError, match=r"unknown teacher run 'mini_resnet_s.baseline.s0-0+'.* nearest known: .*mini_resnet_s.baseline"
    ):
        distilled(runs, teacher="mini_resnet_s.baseline.s0-00000000")


@pytest.mark.parametrize(
    ("classes", "said"),
    [(list("012345678"), "it has 9 classes, the data 10"), (list("1023456789"), "it has '1' as class 0 where the data has '0'")],
)
def test_a_teacher_of_other_classes_is_refused(runs, tmp_path, classes, said):
    import shutil

    shutil.copytree(runs, tmp_path / "runs")
    path = next((tmp_path / "runs").glob("digits/mini_resnet_s*/record.json"))
    record = read_record(path)
    path.write_text(path.read_text().replace(str(record.data["classes"]).replace("'", '"'), str(classes).replace("'", '"')))
    with pytest.raises(KdfastError, match=said):
        started(distilled(tmp_path / "runs"))


def test_a_folder_of_images_trains_from_its_path_to_a_record(image_folder, tmp_path):
    record = finish(Experiment({"dataset": str(image_folder), "image_size": 8, "student": "mini_plain_s", "epochs": 20,
                                "batch_size": 16}, tmp_path / "runs"))  # fmt: skip
    assert record.parameters["augment"] == "crop+flip"
    assert record.last["test"]["top1"] > 0.8  # the colour gives the class away
    assert list((tmp_path / "runs").glob(f"fruit-*/{record.id}/record.json"))


def test_a_plateau_is_less_than_a_percent_over_the_last_tenth():
    before = [*np.linspace(2, 1, 36), 1.0]  # the last tenth of 40 epochs begins here
    assert plateau([*before, 1.0, 1.0, 0.995])["reached"]
    assert not plateau([*before, 1.0, 1.0, 0.985])["reached"]
    assert plateau([*before, 1.0, 1.0, 1.2])["reached"]  # rising is no progress either


@pytest.mark.parametrize("options", [{"precision": "bfloat16"}, {"compile": True}], ids=["bfloat16", "compile"])
def test_options_of_speed_train_nearly_the_same_network_and_a_plain_state(tmp_path, options):
    plain = finish(Experiment({"student": "mini_resnet_s", "epochs": 2}, tmp_path))
    other = finish(Experiment({"student": "mini_resnet_s", "epochs": 2, **options}, tmp_path))
    assert other.model["weights_sha256"] != plain.model["weights_sha256"] or options.get("compile")
    assert other.last["test"]["nll"] == pytest.approx(plain.last["test"]["nll"], rel=0.05)
    assert other.model["weights_bytes"] == plain.model["weights_bytes"]


def test_a_cpu_refuses_float16_and_a_compiled_network_a_method_of_features(runs):
    student = {"student": "mini_resnet_xs", "epochs": 1, "teacher": "mini_resnet_s"}
    for more, said in (({"precision": "float16", "method": "kd"}, "needs a CUDA device: use bfloat16"),
                       ({"compile": True, "method": "at"}, "set compile to false")):  # fmt: skip
        with pytest.raises(KdfastError, match=said):
            finish(Experiment(student | more, runs))
