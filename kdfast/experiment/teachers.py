"""A finished run as a teacher."""

import hashlib
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import nn

from kdfast.core.errors import KdfastError
from kdfast.core.records import RECORD, WEIGHTS, Record, read_record
from kdfast.distill.teacher import Teacher, difference
from kdfast.models.registry import create_model


def load_teacher(folder: Path, data, **options: Any) -> Teacher:
    """The network of a finished run, from its record and weights; it is made when it first has to answer.

    `options` are Teacher's.

    `data` is the student's ImageData: a teacher whose classes differ in number, name or order raises a KdfastError.
    """
    record = read_record(folder / RECORD)
    check_classes(record, data)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise KdfastError(f"teacher run {record.id} has a record but no {weights}: train it again")

    def build() -> nn.Module:
        content = weights.read_bytes()
        if hashlib.sha256(content).hexdigest() != record.model["weights_sha256"]:
            raise KdfastError(f"{weights} is not what run {record.id} wrote: remove that run's folder and train it again")
        p = record.parameters
        model = create_model(p["student"], len(data.classes), p["image_size"], head=p.get("head", "linear"))
        model.load_state_dict(load(content))
        return model.eval().requires_grad_(False)

    return Teacher(build, record, classes=data.classes, **options)


def check_classes(record: Record, data) -> None:
    """The teacher's logit c must mean the student's class c."""
    theirs, ours = tuple(record.data["classes"]), tuple(data.classes)
    if theirs != ours:
        what = difference(theirs, ours)
        raise KdfastError(f"teacher {record.id} does not fit the data: it has {what}; train a teacher on these classes")
