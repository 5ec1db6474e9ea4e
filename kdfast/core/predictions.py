"""Per-example test predictions of finished runs: calibration, classes, and student beside teacher. No torch."""

from collections.abc import Iterable
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import pandas as pd
from sklearn.metrics import f1_score, recall_score

from kdfast.core.errors import KdfastError
from kdfast.core.records import PREDICTIONS, Record

BINS = 15


def predictions_path(record_path: str | Path) -> Path:
    """Where a record's predictions lie: beside it."""
    path = Path(record_path)
    return path.with_name(PREDICTIONS) if path.name == "record.json" else path.with_suffix(".npz")


def read_predictions(record_path: str | Path) -> dict[str, np.ndarray]:
    """`top5` (N, 5), `confidence` (N,), `nll` (N,), `label` (N,) of the last epoch on the test set."""
    path = predictions_path(record_path)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in ("top5", "confidence", "nll", "label")}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise KdfastError(f"no whole predictions in {path} ({type(error).__name__}): train the run again") from None


def correct(p: dict[str, np.ndarray]) -> np.ndarray:
    """Whether each example's first class is its label, (N,) bool."""
    return p["top5"][:, 0] == p["label"]


def reliability(p: dict[str, np.ndarray], bins: int = BINS) -> pd.DataFrame:
    """By bin of confidence (of equal width): mean confidence, accuracy and share of the examples; NaN where a bin is empty."""
    confidence = p["confidence"].astype(float)
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    table = pd.DataFrame({"bin": which, "confidence": confidence, "accuracy": correct(p).astype(float)})
    means = table.groupby("bin")[["confidence", "accuracy"]].mean().reindex(range(bins))
    return means.assign(share=np.bincount(which, minlength=bins) / len(which)).reset_index()


def ece(p: dict[str, np.ndarray], bins: int = BINS) -> float:
    """Expected calibration error (Guo et al., ICML 2017, arXiv:1706.04599)."""
    table = reliability(p, bins)
    return float(((table.accuracy - table.confidence).abs() * table.share).sum())


def per_class(p: dict[str, np.ndarray], classes: int) -> np.ndarray:
    """Accuracy of each class, (classes,); NaN for a class without test images."""
    return recall_score(p["label"], p["top5"][:, 0], labels=range(classes), average=None, zero_division=np.nan)


def table(runs: pd.DataFrame, records: Iterable[Record], paths: Iterable[str | Path]) -> pd.DataFrame:
    """`runs` (one row a record, in their order) with macro F1, ECE, the worst class, and student beside teacher, as fractions.

    `agreement`: both give the same class; `right`, `wrong`: the student's accuracy where its teacher is right or wrong.
    A teacher that is not among the records leaves them NaN.
    """
    read = {record.id: read_predictions(path) for record, path in zip(records, paths, strict=True)}
    rows = []
    for run, record in zip(runs.itertuples(), records, strict=True):
        p = read[run.id]
        first, classes = p["top5"][:, 0], len(record.data["classes"])
        row = {
            "id": run.id,
            "macro_f1": f1_score(p["label"], first, average="macro"),
            "ece": ece(p),
            "worst_class": float(np.nanmin(per_class(p, classes))),
        }
        taught = read.get(record.teacher["run"]) if record.teacher else None
        if taught is not None:
            hit, right = correct(p), correct(taught)
            row["agreement"] = float((first == taught["top5"][:, 0]).mean())
            row["right"] = float(hit[right].mean()) if right.any() else np.nan
            row["wrong"] = float(hit[~right].mean()) if (~right).any() else np.nan
        rows.append(row)
    wanted = ["id", "macro_f1", "ece", "worst_class", "agreement", "right", "wrong"]
    return runs.merge(pd.DataFrame(rows).reindex(columns=wanted), on="id")
