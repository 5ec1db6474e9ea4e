"""The studies of real images, end to end, on small made-up folders of their data sets' layouts, with untrained networks."""

import shlex

import pytest
from conftest import ROOT, finish
from papermill.cli import _resolve_type
from test_datasets import MAKERS

from kdfast.core.config import Run
from kdfast.experiment.runner import Experiment
from kdfast.report import curves
from kdfast.study.plan import Plan
from kdfast.study.study_file import load_study

SMALLER = {"epochs": 1, "batch_size": 8, "precision": "float32", "channels_last": False, "weights": ""}
SMALL = {
    "cifar100": {"milestones": [1]},
    "imagenette": {"image_size": 32},
    "pets": {"image_size": 32},
    "weather": {"image_size": 32},
}


@pytest.mark.parametrize("name", SMALL)
def test_a_study_runs_end_to_end_on_a_small_folder_of_its_layout(name, tmp_path, monkeypatch):
    folder, maker = MAKERS[name]
    monkeypatch.setenv("KDFAST_DATA", str(tmp_path / "data"))
    maker(tmp_path / "data" / folder)
    study = load_study(ROOT / "experiments" / "studies" / f"{name}.yaml")
    distilled = study.distilled_runs()[0]
    plain = study.baseline_run(distilled.teacher.split(".")[0], distilled.seed)
    teacher = finish(Experiment(Run(**plain.model_dump() | SMALLER | SMALL[name]).model_dump(), tmp_path / "runs"))
    student = finish(Experiment(distilled.model_dump() | SMALLER | SMALL[name] | {"teacher": teacher.id}, tmp_path / "runs"))
    assert student.teacher["run"] == teacher.id and (student.data["name"], student.data["source"]) == (name, folder)
    assert student.parameters["folds"] == study.folds
    history = curves.by_epoch([teacher, student])
    assert list(history.epoch) == [1, 1] and len(student.history["train_kd"]) == 1


@pytest.mark.parametrize("path", sorted((ROOT / "experiments" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_names_networks_and_methods_that_exist_and_its_runs_fit_papermill(path):
    study = load_study(path)
    study.check_names()
    plan = Plan({path.stem: study}, "runs", {run.folder_name: run for run in study.runs()})
    for folder, run in plan.runs.items():
        given = shlex.split(plan.papermill_arguments(folder))
        values = dict(zip(given[1::3], map(typed, given[2::3]), strict=True))
        assert Run(**{k: v for k, v in values.items() if k != "explore"}).id == run.id


def typed(value: str):
    """As papermill reads what follows -p."""
    return _resolve_type(value)
