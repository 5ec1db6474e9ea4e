"""Metrics of a run against scikit-learn and definitions written out, from logits and from what is kept of them."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss, top_k_accuracy_score

from kdfast.core import predictions
from kdfast.core.errors import KdfastError
from kdfast.core.records import pack_predictions
from kdfast.training.metrics import beside_teacher, metrics


@pytest.fixture
def some():
    """Logits (400, 8) that know something of the labels, the labels, and a teacher's logits."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 8, 400)
    student, teacher = (2 * rng.normal(size=(400, 8)) for _ in range(2))
    student[np.arange(400), labels] += 2
    teacher[np.arange(400), labels] += 3
    return torch.tensor(student), torch.tensor(labels), torch.tensor(teacher)


def expected_calibration_error(confidence, hit, bins=15):
    total = 0.0
    for low in np.arange(bins) / bins:
        inside = (confidence > low) & (confidence <= low + 1 / bins)
        if inside.any():
            total += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    return total


def test_metrics_are_those_of_scikit_learn_and_of_the_definition(some):
    logits, labels, _ = some
    p, y = logits.softmax(1).numpy(), labels.numpy()
    found = metrics(logits, labels)
    assert found["top1"] == pytest.approx(accuracy_score(y, p.argmax(1)))
    assert found["top5"] == pytest.approx(top_k_accuracy_score(y, p, k=5))
    assert found["nll"] == pytest.approx(log_loss(y, p))
    assert found["macro_f1"] == pytest.approx(f1_score(y, p.argmax(1), average="macro"), abs=1e-6)
    assert found["ece"] == pytest.approx(expected_calibration_error(p.max(1), p.argmax(1) == y), abs=1e-6)


def test_a_student_beside_its_teacher(some):
    student, labels, teacher = some
    found = beside_teacher(student, teacher, labels)
    s, t, y = student.argmax(1).numpy(), teacher.argmax(1).numpy(), labels.numpy()
    assert found["agreement"] == pytest.approx((s == t).mean())
    assert found["top1_where_teacher_right"] == pytest.approx((s == y)[t == y].mean())
    assert found["top1_where_teacher_wrong"] == pytest.approx((s == y)[t != y].mean())
    p_t, p_s = teacher.softmax(1).numpy(), student.softmax(1).numpy()
    assert found["kl"] == pytest.approx((p_t * np.log(p_t / p_s)).sum(1).mean())


def test_a_teacher_that_is_never_wrong_leaves_that_cell_empty(some):
    student, labels, _ = some
    perfect = 10 * torch.nn.functional.one_hot(labels, 8).double()
    assert beside_teacher(student, perfect, labels)["top1_where_teacher_wrong"] is None


@pytest.fixture
def kept(some, tmp_path):
    """Two records' predictions: of the teacher and of the student."""
    student, labels, teacher = some
    for name, logits in {"student": student, "teacher": teacher}.items():
        np.savez(tmp_path / f"{name}.npz", **pack_predictions(logits.numpy(), labels.numpy()))
    return tmp_path


def test_what_is_kept_gives_the_same_calibration_and_classes(some, kept):
    student, labels, _ = some
    p = predictions.read_predictions(kept / "student.json")
    assert predictions.ece(p) == pytest.approx(metrics(student, labels)["ece"], abs=2e-3)  # confidences are kept in 16 bits
    hit, y = student.argmax(1).numpy() == labels.numpy(), labels.numpy()
    assert predictions.per_class(p, 9)[:8] == pytest.approx([hit[y == c].mean() for c in range(8)])
    assert np.isnan(predictions.per_class(p, 9)[8])
    bins = predictions.reliability(p)
    assert bins.share.sum() == pytest.approx(1) and (bins.accuracy * bins.share).sum() == pytest.approx(hit.mean())


class Stub:
    def __init__(self, id, teacher=None):
        self.id, self.teacher, self.data = id, teacher, {"classes": list("abcdefgh")}


def test_a_table_of_runs_has_students_beside_their_teachers(some, kept):
    student, labels, teacher = some
    records = [Stub("teacher"), Stub("student", {"run": "teacher"})]
    paths = [kept / "teacher.json", kept / "student.json"]
    found = predictions.table(pd.DataFrame({"id": ["teacher", "student"]}), records, paths).set_index("id")
    expected = beside_teacher(student, teacher, labels)
    assert found.agreement["student"] == pytest.approx(expected["agreement"]) and np.isnan(found.agreement["teacher"])
    assert found.right["student"] == pytest.approx(expected["top1_where_teacher_right"])
    assert found.wrong["student"] == pytest.approx(expected["top1_where_teacher_wrong"])
    assert found.macro_f1["student"] == pytest.approx(metrics(student, labels)["macro_f1"], abs=1e-6)


@pytest.mark.parametrize(
    "damage", [lambda f: f.unlink(), lambda f: f.write_bytes(f.read_bytes()[:50]), lambda f: f.write_bytes(b"")]
)
def test_missing_or_damaged_predictions_are_named(kept, damage):
    damage(kept / "student.npz")
    with pytest.raises(KdfastError, match=r"no whole predictions in .*student.npz"):
        predictions.read_predictions(kept / "student.json")
