"""Selection bias, calibration and fidelity: sentences and tables, TeX source."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from kdfast.core.predictions import read_predictions, reliability
from kdfast.core.records import Record
from kdfast.report.curves import BASELINE
from kdfast.report.figures import short
from kdfast.report.latex import interval, signed, tex
from kdfast.stats.paired import estimate


def selection_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a student and teacher: test accuracy (%) of the last epoch, of the best-validation epoch, of the best seed."""
    rows = []
    for (student, teacher), cell in runs.assign(teacher=runs.teacher.fillna(BASELINE)).groupby(["student", "teacher"]):
        last, best = 100 * cell.test_top1, 100 * cell.best_test_top1
        rows.append({
            "network": tex(short(student)),
            "taught by": "--" if teacher == BASELINE else tex(short(teacher)),
            "last epoch": f"{last.mean():.2f}",
            "best-validation epoch": f"{best.mean():.2f}",
            "difference": signed((best - last).mean()),
            "best seed": f"{last.max():.2f}",
            "_order": (student, teacher != BASELINE, teacher),
        })  # fmt: skip
    return pd.DataFrame(rows).sort_values("_order").drop(columns="_order")


def selection_sentence(runs: pd.DataFrame) -> str:
    """What reporting the best-validation epoch, or the best of the seeds, would have added to the accuracies."""
    shift = 100 * (runs.best_test_top1 - runs.test_top1)
    epochs = estimate(shift.groupby(runs.seed).mean().to_numpy())
    cells = runs.assign(teacher=runs.teacher.fillna(BASELINE)).groupby(["student", "teacher", "method", "method_args"])
    seeds = 100 * (cells.test_top1.max() - cells.test_top1.mean())
    moved = (runs.best_test_top1 != runs.test_top1).mean()
    said = (
        "The epoch with the lowest validation loss is another than the last, with another accuracy, in "
        f"{100 * moved:.0f}\\,\\% of the runs; reporting it would have changed test accuracies by {interval(epochs)} points on "
        f"average (single runs by {signed(shift.min())} to {signed(shift.max())})."
    )
    n = runs.seed.nunique()
    best = f" Reporting the best of the {n} seeds in place of their mean would have added {seeds.mean():.2f} points."
    return said + best * (n > 1)


def evaluation_table(scored: pd.DataFrame) -> pd.DataFrame:
    """One row a student and teacher, means over seeds in % (`kdfast.core.predictions.table`)."""
    rows = []
    columns = {"macro_f1": "macro F1", "worst_class": "worst class", "ece": "ECE", "agreement": "agreement",
               "right": "teacher right", "wrong": "teacher wrong"}  # fmt: skip
    for (student, teacher), cell in scored.assign(teacher=scored.teacher.fillna(BASELINE)).groupby(["student", "teacher"]):
        means = 100 * cell[["test_top1", *columns]].mean()
        row = {"network": tex(short(student)), "taught by": "--" if teacher == BASELINE else tex(short(teacher)),
               "top-1": f"{means.test_top1:.1f}"}  # fmt: skip
        row |= {name: "--" if np.isnan(means[key]) else f"{means[key]:.1f}" for key, name in columns.items()}
        rows.append(row | {"_order": (student, teacher != BASELINE, teacher)})
    return pd.DataFrame(rows).sort_values("_order").drop(columns="_order")


def calibration_sentence(scored: pd.DataFrame) -> str:
    """Whether distilled students are better calibrated than their twins, and how they follow their teachers."""
    taught = scored[scored.teacher.notna()].copy()
    if taught.empty:
        return "This study distils nothing, so that there is no student to set beside its teacher."
    baseline = scored[scored.teacher.isna()].set_index(["student", "seed"]).ece
    twins = baseline.reindex(pd.MultiIndex.from_frame(taught[["student", "seed"]])).to_numpy()
    taught["shift"] = 100 * (taught.ece - twins)
    change = estimate(taught.groupby("seed")["shift"].mean().to_numpy())
    verdict = {"raises": "distillation worsens calibration", "lowers": "distillation improves calibration",
               "open": "no effect of distillation on calibration is shown"}[change.verdict]  # fmt: skip
    if change.n < 2:
        verdict = "one seed allows no verdict"
    said = f"Distillation changes the students' expected calibration error by {interval(change)} points: {verdict}."
    if taught.agreement.isna().all():
        return said
    means = 100 * taught[["agreement", "right", "wrong"]].mean()
    return (
        f"{said} Distilled students give the class that their teacher gives for {means.agreement:.1f}\\,\\% of the test images; "
        f"where the teacher is right they are right in {means.right:.1f}\\,\\%, where it is wrong in {means.wrong:.1f}\\,\\%."
    )


def reliability_bins(records: Iterable[Record], paths: Iterable[str | Path]) -> pd.DataFrame:
    """Bins of confidence of every student that has a teacher, and of its baseline, weighted means over seeds."""
    tables = []
    for record, path in zip(records, paths, strict=True):
        teacher = record.teacher["model"] if record.teacher else BASELINE
        tables.append(reliability(read_predictions(path)).assign(student=record.parameters["student"], teacher=teacher))
    bins = pd.concat(tables)
    bins = bins[bins.student.isin(bins[bins.teacher != BASELINE].student)].dropna()
    bins[["confidence", "accuracy"]] = bins[["confidence", "accuracy"]].mul(bins.share, axis=0)
    sums = bins.groupby(["student", "teacher", "bin"])[["confidence", "accuracy", "share"]].sum()
    sums[["confidence", "accuracy"]] = sums[["confidence", "accuracy"]].div(sums.share, axis=0)
    sums["share"] /= sums.groupby(["student", "teacher"]).share.transform("sum")
    return sums.reset_index()
