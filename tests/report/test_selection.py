"""What choosing would have flattered, calibration in words, and the figures of both, on made-up runs with a known truth."""

import numpy as np
import pandas as pd
import pytest
from test_metrics import Stub

from kdfast.core import predictions
from kdfast.core.records import pack_predictions
from kdfast.report import diagrams, selection


def runs(best_minus_last: float = 0.0, ece_change: float = 0.0, n: int = 5) -> pd.DataFrame:
    """`n` seeds of a teacher, a student alone and distilled; the best epoch and calibration differ by so much (fractions)."""
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(n):
        for student, teacher, top1, ece in (("big", None, 0.9, 0.02), ("small", None, 0.7, 0.05), ("small", "big", 0.75, 0.05)):
            accuracy = top1 + rng.normal(0, 0.002)
            rows.append({
                "student": student, "teacher": teacher, "method": "kd" if teacher else "baseline", "method_args": "",
                "seed": seed,
                "test_top1": accuracy, "best_test_top1": accuracy + best_minus_last + rng.normal(0, 0.0005),
                "ece": ece + (ece_change if teacher else 0) + rng.normal(0, 0.001), "macro_f1": accuracy, "worst_class": 0.4,
                **dict(zip(("agreement", "right", "wrong"), (0.8, 0.82, 0.2) if teacher else [np.nan] * 3, strict=True)),
            })  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("shift", "expected"), [(0.01, 1.0), (-0.02, -2.0), (0.0, 0.0)])
def test_what_the_best_epoch_would_have_added_is_said_with_its_sign(shift, expected):
    said = selection.selection_sentence(runs(best_minus_last=shift))
    change = float(said.split("accuracies by $")[1].split("$")[0])
    assert change == pytest.approx(expected, abs=0.05)


def test_the_best_of_seeds_flatters_and_one_seed_says_nothing_of_it():
    many = runs()
    cells = 100 * many.assign(teacher=many.teacher.fillna("baseline")).groupby(["student", "teacher"]).test_top1.agg(
        ["max", "mean"]
    )
    flattery = (cells["max"] - cells["mean"]).mean()
    assert f"would have added {flattery:.2f} points" in selection.selection_sentence(many)
    assert "would have added" not in selection.selection_sentence(runs(n=1))


@pytest.mark.parametrize(("change", "verdict"), [(0.01, "worsens"), (-0.01, "improves"), (0.0, "no effect")])
def test_the_verdict_on_calibration_follows_the_numbers(change, verdict):
    said = selection.calibration_sentence(runs(ece_change=change))
    assert verdict in said and "in 82.0\\,\\%, where it is wrong in 20.0\\,\\%" in said


def test_one_seed_allows_no_verdict_on_calibration():
    assert "one seed allows no verdict" in selection.calibration_sentence(runs(n=1))


def test_a_study_without_distillation_has_no_teacher_to_be_set_beside():
    plain = runs()
    assert "distils nothing" in selection.calibration_sentence(plain[plain.teacher.isna()])


def test_tables_show_what_was_not_measured_as_such():
    table = selection.evaluation_table(runs()).set_index(["network", "taught by"])
    assert table.loc[("big", "--"), "agreement"] == "--" and table.loc[("small", "big"), "agreement"] == "80.0"
    assert list(selection.selection_table(runs())["taught by"]) == ["--", "--", "big"]


def test_reliability_bins_are_those_of_all_seeds_examples_together(tmp_path):
    rng = np.random.default_rng(1)
    records, paths, kept = [], [], []
    for seed in range(3):
        for teacher in (None, "big"):
            logits, labels = rng.normal(size=(200, 5)) * 2, rng.integers(0, 5, 200)
            path = tmp_path / f"{seed}{teacher}.npz"
            np.savez(path, **pack_predictions(logits, labels))
            record = Stub(str(path), {"model": teacher} if teacher else None)
            record.parameters = {"student": "small"}
            records.append(record)
            paths.append(path.with_suffix(".json"))
            if teacher:
                kept.append(predictions.read_predictions(paths[-1]))
    bins = selection.reliability_bins(records, paths)
    taught = bins[bins.teacher == "big"].set_index("bin")
    together = predictions.reliability({key: np.concatenate([p[key] for p in kept]) for key in kept[0]}).set_index("bin").dropna()
    for column in ("confidence", "accuracy", "share"):
        assert taught[column].to_numpy() == pytest.approx(together.loc[taught.index, column].to_numpy())
    figure = diagrams.reliability(bins)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["baseline", "big"]


def test_a_run_whose_best_epoch_is_better_lies_above_the_line():
    figure = diagrams.last_against_best(runs(best_minus_last=0.05))
    points = np.concatenate([dots.get_offsets() for dots in figure.axes[0].collections])
    assert len(points) == 15 and (points[:, 1] > points[:, 0]).all()
