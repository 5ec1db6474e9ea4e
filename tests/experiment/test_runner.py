"""A run's record, its weights and its history are those of one whole training."""

import shutil

import pytest
import torch
from conftest import finish, write_images
from safetensors.torch import load_file

from kdfast.all import Experiment, KdfastError, create_model, dataloaders, load_data, load_teacher, metrics, predict
from kdfast.core.records import RECORD, WEIGHTS
from kdfast.experiment.teachers import evaluate_run
from kdfast.models.pretrained import load_weights
from kdfast.study import doctor


def prepared(parameters, runs):
    experiment = Experiment(parameters, runs)
    experiment.load()
    experiment.learner()
    return experiment


def best_first(experiment):
    """Have the first epoch pass for the best, whatever its loss is."""
    keep = experiment.learn.keep_best
    after_epoch = type(keep).after_epoch

    def once(self):
        if self.epoch == 0:
            after_epoch(self)

    keep.after_epoch = once.__get__(keep)


@pytest.mark.parametrize("options", [{}, {"channels_last": True}, {"ema": 0.9}, {"student": "mnasnet0_5", "image_size": 32}])
def test_the_saved_weights_are_the_last_epochs_when_another_was_the_best(tmp_path, options):
    experiment = prepared({"student": "mini_resnet_s", "epochs": 3, "lr": 0.02} | options, tmp_path)
    best_first(experiment)
    experiment.fit(progress=False)
    record = experiment.finish()
    assert record.best["epoch"] == 0 and record.last["epoch"] == 2
    data = load_data("digits", record.data["image_size"])
    model = create_model(record.parameters["student"], 10, data.size)
    load_weights(model, load_file(experiment.folder / WEIGHTS))
    found = metrics(*predict(model, dataloaders(data, 64)[2]))
    assert found["nll"] == pytest.approx(record.last["test"]["nll"], rel=1e-4) and found["top1"] == record.last["test"]["top1"]
    assert found["nll"] != pytest.approx(record.best["test"]["nll"], rel=1e-3)
    assert not list(doctor.findings(tmp_path, tmp_path / "none", sample=None))


def test_the_doctor_finds_weights_that_are_not_the_records(tmp_path):
    experiment = prepared({"student": "mini_resnet_xs", "epochs": 2}, tmp_path)
    experiment.fit(progress=False)
    record = experiment.finish()
    other = record.model_copy(update={"last": record.last | {"test": record.last["test"] | {"nll": 0.1}}})
    (experiment.folder / RECORD).write_text(other.model_dump_json())
    assert any("weights with test accuracy" in finding.what for finding in doctor.findings(tmp_path, tmp_path / "none", None))


def test_a_second_fit_begins_anew(tmp_path):
    once = prepared({"student": "mini_resnet_xs", "epochs": 2}, tmp_path / "once")
    once.fit(progress=False)
    twice = prepared({"student": "mini_resnet_xs", "epochs": 2}, tmp_path / "twice")
    twice.fit(progress=False)
    twice.fit(progress=False)
    a, b = once.finish(), twice.finish()
    assert a.model["weights_sha256"] == b.model["weights_sha256"] and a.history == b.history


def test_an_interrupted_fit_is_refused_by_finish_and_goes_on_to_the_undisturbed_record(tmp_path, monkeypatch):
    monkeypatch.setenv("KDFAST_CHECKPOINT_S", "0")
    whole = prepared({"student": "mini_resnet_xs", "epochs": 4}, tmp_path / "whole")
    whole.fit(progress=False)
    broken = prepared({"student": "mini_resnet_xs", "epochs": 4}, tmp_path / "broken")
    before = type(broken.learn.keep_best).before_train if hasattr(type(broken.learn.keep_best), "before_train") else None

    def interrupt():
        if broken.learn.epoch == 2:
            raise KeyboardInterrupt

    broken.learn.keep_best.before_train = interrupt
    with pytest.raises(KeyboardInterrupt):
        broken.fit(progress=False)
    assert before is None
    with pytest.raises(KdfastError, match=r"trained in part, not trained to its last epoch: call fit\(\) before finish"):
        broken.finish()
    broken.fit(progress=False)
    assert broken.finish().model["weights_sha256"] == whole.finish().model["weights_sha256"]
    assert len(broken.learn.recorder.values) == 4


def test_a_run_that_was_not_trained_has_no_record(tmp_path):
    with pytest.raises(KdfastError, match="is new, not trained to its last epoch"):
        prepared({"student": "mini_resnet_xs", "epochs": 2}, tmp_path).finish()


def test_a_folder_that_cannot_be_written_is_said_before_training(tmp_path, monkeypatch):
    blocked = tmp_path / "runs"
    blocked.write_text("a file where a folder should be")
    with pytest.raises(KdfastError, match=r"cannot be written .*choose another folder for runs"):
        Experiment({"student": "mini_resnet_xs"}, blocked / "deep")


def test_a_failure_at_the_end_leaves_a_checkpoint_from_which_the_run_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("KDFAST_CHECKPOINT_S", "0.000001")
    experiment = prepared({"student": "mini_resnet_xs", "epochs": 2}, tmp_path)
    experiment.fit(progress=False)
    again = prepared({"student": "mini_resnet_xs", "epochs": 2}, tmp_path)
    assert again.learn.checkpoint.start == 2
    again.fit(progress=False)
    assert again.finish().model["weights_sha256"] == experiment.finish().model["weights_sha256"]


def test_two_folders_of_one_last_name_share_no_runs(tmp_path):
    folders = [write_images(tmp_path / year / "flowers", {"a": 10, "b": 10}, seed=i) for i, year in enumerate(("2023", "2024"))]
    runs = tmp_path / "runs"
    finish(Experiment({"dataset": str(folders[0]), "image_size": 8, "student": "mini_resnet_s", "epochs": 1}, runs))
    with pytest.raises(KdfastError, match="no run of teacher mini_resnet_s with seed 0"):
        Experiment(
            {
                "dataset": str(folders[1]),
                "image_size": 8,
                "student": "mini_resnet_xs",
                "teacher": "mini_resnet_s",
                "method": "kd",
            },
            runs,
        )


def test_a_teacher_of_other_data_is_refused_by_name_unless_asked_for(tmp_path):
    folder, runs = write_images(tmp_path / "fruit", {"a": 10, "b": 10}), tmp_path / "runs"
    experiment = Experiment({"dataset": str(folder), "image_size": 8, "student": "mini_resnet_s", "epochs": 1}, runs)
    finish(experiment)
    shutil.move(folder / "a" / "000.png", folder / "b" / "corrected.png")
    data = load_data(str(folder), 8)
    with pytest.raises(
        KdfastError, match=r"teacher mini_resnet_s\.baseline.* was trained on other images, labels or another split"
    ):
        load_teacher(experiment.folder, data)
    assert load_teacher(str(experiment.folder), data, other_data=True)(torch.zeros(1, 3, 8, 8)).shape == (1, 2)
    with pytest.raises(KdfastError, match="images of 8 pixels, not 16"):
        load_teacher(experiment.folder, load_data(str(folder), 16))
    assert evaluate_run(experiment.folder, experiment.finish()) is None


def test_what_a_killed_attempt_had_begun_to_write_goes_when_the_run_ends(tmp_path):
    experiment = prepared({"student": "mini_resnet_xs", "epochs": 1}, tmp_path)
    experiment.folder.mkdir(parents=True, exist_ok=True)
    (experiment.folder / ".predictions.npz.7.partial").write_text("half")
    experiment.fit(progress=False)
    experiment.finish()
    assert not list(experiment.folder.glob(".*"))
