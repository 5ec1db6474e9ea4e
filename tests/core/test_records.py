"""Records: written whole or not at all, read or refused, tidy; predictions: small and right."""

import json
from importlib.metadata import version
from io import BytesIO

import numpy as np
import pytest
from conftest import finish
from scipy.special import log_softmax
from sklearn.metrics import log_loss

from kdfast.core.errors import KdfastError
from kdfast.core.files import write_atomically
from kdfast.core.records import pack_predictions, read_record, tidy
from kdfast.experiment.runner import Experiment


@pytest.fixture(scope="module")
def student(runs):
    """The folder of a distilled run."""
    method = {"teacher": "mini_resnet_s", "method": "kd", "method_args": {"T": 2, "alpha": 0.5}}
    experiment = Experiment({"student": "mini_resnet_xs", "epochs": 2, **method}, runs)
    finish(experiment)
    return experiment.folder


def test_a_record_says_what_is_needed_to_make_it_again(student):
    record = read_record(student / "record.json")
    assert record.id == student.name
    assert record.parameters["teacher"] == record.teacher["run"]
    assert len(record.teacher["weights_sha256"]) == 64
    assert record.data["fingerprint"] and record.data["counts"] == {"train": 719, "valid": 180, "test": 898}
    assert record.code["hash"] and record.packages["torch"] == version("torch")
    assert record.hardware["threads"] == 1 and record.hardware["processor"]
    assert record.time["training"] > 0 and record.time["total"] > record.time["training"]
    assert {len(column) for column in record.history.values()} == {2}
    assert {"train_loss", "valid_loss", "accuracy", "train_ce", "train_kd"} <= set(record.history)
    for epoch in (record.last, record.best):
        assert 0 <= epoch["test"]["top1"] <= 1 and epoch["valid"]["nll"] > 0
    assert record.model["parameters"] == 436


def test_the_best_epoch_is_the_one_with_the_lowest_validation_loss(student):
    record = read_record(student / "record.json")
    losses = record.history["valid_loss"]
    assert record.best["epoch"] == int(np.argmin(losses))
    assert record.best["valid"]["nll"] == pytest.approx(min(losses), rel=1e-5)
    assert record.last["valid"]["nll"] == pytest.approx(losses[-1], rel=1e-5)


def test_saved_weights_and_predictions_are_those_of_the_record(student):
    import hashlib

    import torch
    from safetensors.torch import load_file

    from kdfast.data.datasets import load_data
    from kdfast.data.loaders import dataloaders
    from kdfast.models.registry import create_model
    from kdfast.training.metrics import predict

    record = read_record(student / "record.json")
    weights = (student / "weights.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == record.model["weights_sha256"]
    model = create_model("mini_resnet_xs", 10, 8)
    model.load_state_dict(load_file(student / "weights.safetensors"))
    logits, labels = predict(model, dataloaders(load_data("digits"), 64)[2])
    kept = np.load(student / "predictions.npz")
    assert (kept["label"] == labels.numpy()).all()
    assert (kept["top5"][:, 0] == logits.argmax(1).numpy()).all()
    assert (kept["top5"][:, 0] == kept["label"]).mean() == pytest.approx(record.last["test"]["top1"])
    assert kept["nll"].astype(float).mean() == pytest.approx(record.last["test"]["nll"], rel=2e-3)
    assert torch.softmax(logits, 1).amax(1).numpy() == pytest.approx(kept["confidence"].astype(float), abs=1e-3)


def test_a_tidy_table_has_a_row_a_run(student):
    taught = read_record(student / "record.json")
    alone = read_record(student.parent / taught.teacher["run"] / "record.json")
    table = tidy([alone, taught]).set_index("student")
    assert table.loc["mini_resnet_xs", "pair"] == "same"
    assert table.loc["mini_resnet_xs", "teacher_top1"] == table.loc["mini_resnet_s", "test_top1"]
    assert table.loc["mini_resnet_xs", "method_args"] == "T=2 alpha=0.5"
    assert table.teacher.isna()["mini_resnet_s"]


@pytest.mark.parametrize("damage", [lambda t: t[: len(t) // 2], lambda t: t.replace('"plateau"', '"plato"'), lambda t: ""])
def test_a_damaged_record_is_named_and_refused(student, tmp_path, damage):
    path = tmp_path / "record.json"
    path.write_text(damage((student / "record.json").read_text()))
    with pytest.raises(KdfastError, match=f"{path} is not a whole record") as error:
        read_record(path)
    assert "\n" not in str(error.value)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_atomically(path, b"old")

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_predictions_keep_top5_confidence_and_nll():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 3, (500, 12)), rng.integers(0, 12, 500)
    kept = pack_predictions(logits, labels)
    p = np.exp(log_softmax(logits, axis=1))
    assert (np.take_along_axis(logits, kept["top5"].astype(int), 1) == -np.sort(-logits, 1)[:, :5]).all()
    assert kept["confidence"].astype(float) == pytest.approx(p.max(1), abs=5e-4)
    assert kept["nll"].astype(float).mean() == pytest.approx(log_loss(labels, p, labels=range(12)), rel=1e-3)


@pytest.mark.parametrize("classes", [100, 1000])
def test_predictions_of_10000_images_stay_below_150_kb(classes):
    rng = np.random.default_rng(0)
    packed = BytesIO()
    np.savez_compressed(packed, **pack_predictions(rng.normal(size=(10000, classes)), np.arange(10000) * classes // 10000))
    assert packed.tell() <= 150_000


def test_records_are_valid_json_with_a_line_a_section(student):
    text = (student / "record.json").read_text()
    assert set(json.loads(text)) >= {"id", "parameters", "history"}
    assert len(text.splitlines()) == len(json.loads(text)) + 2
