"""A finished run as a teacher, or to be evaluated anew."""

import hashlib
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import nn

from kdfast.core.errors import KdfastError
from kdfast.core.records import RECORD, WEIGHTS, Record, read_record
from kdfast.data.datasets import load_data
from kdfast.data.loaders import ImageData, dataloaders
from kdfast.data.splits import HoldOut
from kdfast.distill.teacher import Teacher, difference
from kdfast.models.pretrained import load_weights
from kdfast.models.registry import create_model
from kdfast.training.metrics import metrics, predict


def load_teacher(folder: str | Path, data: ImageData, other_data: bool = False, **options: Any) -> Teacher:
    """The network of a finished run, from its record and weights; it is made when it first has to answer.

    `data` is the student's: a teacher whose classes differ in number, name or order raises a KdfastError, and so does one that
    was trained on other images, labels or another split (it may have seen the student's test images), unless `other_data`.
    `options` are Teacher's.
    """
    folder = Path(folder)
    record = read_record(folder / RECORD)
    check_classes(record, data)
    if not other_data:
        check_data(record, data)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise KdfastError(f"teacher run {record.id} has a record but no {weights}: train it again")

    def build() -> nn.Module:
        content = weights.read_bytes()
        if hashlib.sha256(content).hexdigest() != record.model["weights_sha256"]:
            raise KdfastError(f"{weights} is not what run {record.id} wrote: remove that run's folder and train it again")
        p = record.parameters
        model = create_model(p["student"], len(data.classes), p["image_size"], head=p.get("head", "linear"))
        load_weights(model, load(content))
        return model.eval().requires_grad_(False)

    return Teacher(build, record, classes=data.classes, **options)


def check_data(record: Record, data: ImageData) -> None:
    """The teacher was trained on these images with this split, of this size."""
    if record.data["fingerprint"] == data.fingerprint:
        return
    theirs, ours = record.data["image_size"], data.size
    what = f"images of {theirs} pixels, not {ours}" if theirs != ours else "other images, labels or another split"
    raise KdfastError(
        f"teacher {record.id} was trained on {what} (fingerprint {record.data['fingerprint']}, here {data.fingerprint}): train "
        "it on these data"
    )


def check_classes(record: Record, data: ImageData) -> None:
    """The teacher's logit c must mean the student's class c."""
    theirs, ours = tuple(record.data["classes"]), tuple(data.classes)
    if theirs != ours:
        what = difference(theirs, ours)
        raise KdfastError(f"teacher {record.id} does not fit the data: it has {what}; train a teacher on these classes")


def evaluate_run(folder: Path, record: Record) -> dict[str, float] | None:
    """Test metrics of the weights that lie in a run's folder; None where the data set is not what it was for that run."""
    p = record.parameters
    data = load_data(p["dataset"], p["image_size"], HoldOut(p["valid_pct"], p["folds"], p["fold"]))
    if data.fingerprint != record.data["fingerprint"]:
        return None
    model = create_model(p["student"], len(data.classes), data.size, head=p["head"])
    load_weights(model, load((folder / WEIGHTS).read_bytes()))
    return metrics(*predict(model, dataloaders(data, p["batch_size"], device="cpu")[2]))
