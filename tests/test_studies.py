"""The studies of real images, end to end, on small made-up folders of their data sets' layouts, with untrained networks."""

import pytest
from conftest import ROOT, finish
from test_datasets import MAKERS

from kdfast import curves
from kdfast.experiment import Experiment
from kdfast.study import Run, load_study

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
    plain = study.plain_run(distilled.teacher.split(".")[0], distilled.seed)
    teacher = finish(Experiment(Run(**plain.model_dump() | SMALLER | SMALL[name]).model_dump(), tmp_path / "runs"))
    student = finish(Experiment(distilled.model_dump() | SMALLER | SMALL[name] | {"teacher": teacher.id}, tmp_path / "runs"))
    assert student.teacher["run"] == teacher.id and (student.data["name"], student.data["source"]) == (name, folder)
    assert student.parameters["folds"] == study.folds
    history = curves.by_epoch([teacher, student])
    assert list(history.epoch) == [1, 1] and len(student.history["train_kd"]) == 1
