"""Training as it went: the records' histories as one table, and the metrics at its end. TeX source."""

from collections.abc import Iterable

import pandas as pd

from kdfast.core.records import Record
from kdfast.report.figures import short
from kdfast.report.latex import tex

BASELINE = "baseline"


def by_epoch(records: Iterable[Record]) -> pd.DataFrame:
    """One row a run and epoch (from 1): student, teacher (`alone` without one), seed, losses in nats, validation accuracy."""
    tables = []
    for record in records:
        history = {k: record.history[k] for k in ("train_loss", "valid_loss", "accuracy")}
        teacher = record.teacher["model"] if record.teacher else BASELINE
        table = pd.DataFrame(history).assign(
            student=record.parameters["student"], teacher=teacher, seed=record.parameters["seed"]
        )
        tables.append(table.assign(epoch=range(1, len(table) + 1)))
    return pd.concat(tables, ignore_index=True)


def metrics_table(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """One row a student and teacher: loss / accuracy in % at the best epoch and the last; means over seeds.

    The best epoch is that of the lowest validation loss. A distilled student's training loss includes its teacher's part.
    """
    last = curves[curves.epoch == curves.groupby(["student", "teacher", "seed"]).epoch.transform("max")]
    train = last.groupby(["student", "teacher"]).train_loss.mean()
    rows = []
    for (student, teacher), cell in runs.assign(teacher=runs.teacher.fillna(BASELINE)).groupby(["student", "teacher"]):
        rows.append({
            "network": tex(short(student)),
            "taught by": "--" if teacher == BASELINE else tex(short(teacher)),
            "best valid.": _both(cell.best_valid_nll, cell.best_valid_top1),
            "training": f"{train[student, teacher]:.3f}",
            "last valid.": _both(cell.valid_nll, cell.valid_top1),
            "test": _both(cell.test_nll, cell.test_top1),
            "_order": (student, teacher != BASELINE, teacher),
        })  # fmt: skip
    return pd.DataFrame(rows).sort_values("_order").drop(columns="_order")


def _both(loss: pd.Series, accuracy: pd.Series) -> str:
    return f"{loss.mean():.3f} / {100 * accuracy.mean():.1f}"
