"""Runs, their ids, study files, and what is said about wrong ones."""

import pytest
import yaml

from kdfast.core.config import Run, check_parameters
from kdfast.core.errors import KdfastError
from kdfast.study.study_file import Study, load_study

SMALL = {
    "title": "small",
    "seeds": [0, 1],
    "teachers": ["mini_resnet_s", "mini_plain_s"],
    "students": ["mini_resnet_xs"],
    "methods": [{"name": "kd", "args": {"T": [2, 4], "alpha": 0.5}}],
}


def test_equal_parameters_give_one_id_and_any_change_another():
    base = {"student": "mini_resnet_xs", "seed": 1}
    assert Run(**base).id == Run(**base, dataset="digits", epochs=40, lr=0.01, image_size=8).id
    changes = [
        {"views": 2},
        {"view_seed": 0},
        {"precision": "bfloat16"},
        {"compile": True},
        {"channels_last": True},
        {"seed": 2},
        {"lr": 0.02},
        {"epochs": 41},
        {"batch_size": 32},
        {"image_size": 16},
        {"augment": "crop"},
    ]
    assert len({Run(**base | change).id for change in changes} | {Run(**base).id}) == len(changes) + 1


def test_ids_stay_what_they_were():  # published records and users' runs are found by them
    assert Run(student="mini_resnet_xs").id == "mini_resnet_xs.baseline.s0-e11e6736"


def test_a_study_stores_what_its_teachers_say_unless_told_otherwise():
    distilled = Study(**SMALL).distilled_runs()
    assert {(run.teacher_outputs, run.fallback) for run in distilled} == {("float16", True)}
    assert {run.teacher_outputs for run in Study(**SMALL).baseline_runs()} == {"live"}
    live = Study(**SMALL | {"teacher_outputs": "live", "fallback": False, "views": 4}).distilled_runs()
    assert {(run.teacher_outputs, run.fallback, run.views) for run in live} == {("live", False, 4)}


def test_four_and_four_point_nought_are_one_temperature():
    def run(T):
        return Run(student="a", teacher="b.baseline.s0-0", method="kd", method_args={"T": T})

    assert run(4).id == run(4.0).id != run(2).id


def test_a_study_lists_teachers_before_students_and_each_run_once():
    runs = Study(**SMALL).runs()
    assert len(runs) == len(set(runs)) == 2 * 3 + 2 * 2 * 2
    ids = [run.id for run in runs]
    for run in runs:
        assert not run.teacher or ids.index(run.teacher) < ids.index(run.id)
        assert not run.teacher or run.teacher.split("-")[0].endswith(f".s{run.seed}")


def test_another_seed_adds_only_its_runs():
    before, after = Study(**SMALL).runs(), Study(**SMALL | {"seeds": [0, 1, 2]}).runs()
    added = set(after) - set(before)
    assert set(before) < set(after) and {run.seed for run in added} == {2}


def test_another_learning_rate_of_a_teacher_reruns_it_and_its_students_alone():
    changed = Study(**SMALL | {"models": {"mini_plain_s": {"lr": 0.02}}})
    new = set(changed.runs()) - set(Study(**SMALL).runs())
    assert {(run.student, run.teacher.split(".")[0]) for run in new} == {("mini_plain_s", ""), ("mini_resnet_xs", "mini_plain_s")}


def test_a_sweep_tries_every_value_on_every_network_alone():
    study = Study(**SMALL | {"sweep": {"lr": [0.1, 0.01]}, "methods": []})
    assert {(run.student, run.lr) for run in study.runs()} == {
        (model, lr) for model in ("mini_resnet_s", "mini_plain_s", "mini_resnet_xs") for lr in (0.1, 0.01)
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"techers": []}, r"unknown key 'techers' in .*study.yaml; the nearest known: teachers"),
        ({"seeds": []}, r"study.yaml: seeds: .*at least 1"),
        ({"seeds": [0.5]}, r"seeds.0: .*integer, not 0.5"),
        ({"training": {"epochs": 0}}, r"training.epochs: .*greater than or equal to 1, not 0"),
        ({"training": {"epoch": 3}}, r"unknown key 'training.epoch'"),
        ({"models": {"mini_resnet_s": {"lr": "fast"}}}, r"models.mini_resnet_s: lr: .*valid number, not 'fast'"),
        ({"pairs": [["mini_resnet_l", "mini_resnet_xs"]]}, r"unknown model 'mini_resnet_l' in .*pairs"),
    ],
)
def test_a_wrong_study_file_is_refused_in_one_sentence(tmp_path, change, said):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(SMALL | change))
    with pytest.raises(KdfastError, match=said) as error:
        load_study(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teachers": ["mini_resnt_s"]}, r"unknown model 'mini_resnt_s'; the nearest known: .*mini_resnet_s"),
        ({"methods": [{"name": "dk"}]}, r"unknown method 'dk'; the nearest known: .*kd"),
        ({"methods": [{"name": "kd", "args": {"temperature": 3}}]}, r"unknown argument of method kd 'temperature'"),
        ({"methods": [{"name": "kd", "args": {"T": [2, 0]}}]}, r"temperature T of method kd must be above 0, not 0"),
        ({"methods": [{"name": "kd", "args": {"alpha": 1.5}}]}, r"alpha of method kd must lie in 0…1, not 1.5"),
        ({"methods": [{"name": "kd", "args": {"T": "hot"}}]}, r"argument T of method kd must be a number, not 'hot'"),
        ({"augment": "flop"}, r"unknown augmentation 'flop'; the nearest known: .*flip"),
    ],
)
def test_unknown_names_in_a_study_are_refused_with_the_nearest_known(change, said):
    with pytest.raises(KdfastError, match=said):
        Study(**SMALL | change).check_names()


def test_a_missing_study_names_those_there_are(tmp_path):
    (tmp_path / "digits.yaml").write_text("{}")
    with pytest.raises(KdfastError, match=r"unknown study 'digts' in .*; the nearest known: digits"):
        load_study(tmp_path / "digts.yaml")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"student": "a", "studnet": "b"}, r"unknown parameter 'studnet' in the notebook; the nearest known: student"),
        ({"student": 3}, r"student: .*valid string, not 3"),
        ({"student": "a", "lr": "0.1"}, r"lr: .*valid number, not '0.1'"),
        ({"student": "a", "lr": float("nan")}, r"lr: .*finite"),
        ({"student": "a", "epochs": 2.5}, r"epochs: .*integer, not 2.5"),
        ({"student": "a", "seed": -1}, r"seed: .*greater than or equal to 0"),
        ({"student": "a", "method": "kd"}, r"method kd needs a teacher"),
        ({"student": "a", "teacher": "b"}, r"a teacher needs a method"),
        ({"student": "a", "method_args": "{T"}, r"method_args: must be a mapping"),
        ({}, r"student: field required"),
    ],
)
def test_wrong_notebook_parameters_are_refused_in_one_sentence(given, said):
    with pytest.raises(KdfastError, match=said) as error:
        check_parameters(given)
    assert "\n" not in str(error.value)


def test_a_notebooks_own_variables_are_no_parameters():
    import math

    namespace = {"student": "a", "In": [""], "Out": {}, "_": 1, "_oh": {}, "math": math, "explore": True, "runs": ""}
    assert check_parameters(namespace) == Run(student="a")


def test_method_arguments_may_come_as_text():  # as papermill's -p passes them
    run = check_parameters({"student": "a", "teacher": "b", "method": "kd", "method_args": "{T: 4, alpha: 0.5}"})
    assert run.method_args == {"T": 4, "alpha": 0.5}


def test_a_method_can_be_for_some_pairs_alone():
    pairs = [["mini_plain_s", "mini_resnet_xs"]]
    methods = [{"name": "kd"}, {"name": "dkd", "args": {"beta": 2}, "pairs": pairs}]
    runs = Study(**SMALL | {"methods": methods}).distilled_runs()
    teachers = {method: {run.teacher.split(".")[0] for run in runs if run.method == method} for method in ("kd", "dkd")}
    assert teachers == {"kd": {"mini_resnet_s", "mini_plain_s"}, "dkd": {"mini_plain_s"}}


def test_distilled_runs_can_be_trained_otherwise():
    study = Study(**SMALL | {"distilled": {"weight_decay": 0.5}})
    assert {run.weight_decay for run in study.distilled_runs()} == {0.5}
    assert {run.weight_decay for run in study.baseline_runs()} == {0.01}


def test_with_folds_every_seed_holds_out_another_fold_and_teachers_share_their_students():
    runs = Study(**SMALL | {"folds": 2, "seeds": [0, 1, 2]}).runs()
    assert {(run.seed, run.fold) for run in runs} == {(0, 0), (1, 1), (2, 0)}
    with pytest.raises(ValueError, match="fold 2 of 2"):
        Run(student="a", folds=2, fold=2)


def test_what_is_usual_for_a_data_set_need_not_be_said():
    said = Run(student="a", dataset="cifar100", image_size=32, augment="crop+flip", valid_pct=0)
    assert Run(student="a", dataset="cifar100").id == Run(student="a", dataset="cifar100", valid_pct=-1).id == said.id
    assert Run(student="a", dataset="weather").valid_pct == pytest.approx(2 / 9)


def test_a_list_from_papermill_is_a_list():
    sgd = {"optimizer": "sgd", "schedule": "step"}
    assert Run(student="a", **sgd, milestones="[2, 3]").id == Run(student="a", **sgd, milestones=[2, 3]).id
