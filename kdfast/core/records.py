"""Records: one JSON file a run, written whole or not at all, and all of them as one tidy DataFrame.

Beside it lie the per-example test predictions. Imports no torch: analysis and planning are quick.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from kdfast.core.errors import KdfastError
from kdfast.core.files import write_atomically

SCHEMA = 2  # 1: before the weights on disk were those of the last epoch
RECORD, PREDICTIONS, WEIGHTS = "record.json", "predictions.npz", "weights.safetensors"
VERIFIED = (
    "verified.json"  # beside a study's released records: which of them were made again, by which code, see kdfast.study.verify
)


class Record(BaseModel):
    """Everything known of one run. Accuracies are fractions, NLL is in nats, times are in seconds."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[2] = SCHEMA  # one that is not known is refused
    id: str
    parameters: dict[str, Any]  # kdfast.core.config.Run
    model: dict[str, Any]  # family, parameters (count), weights_sha256, weights_bytes, projector_parameters where trained
    teacher: dict[str, Any] | None  # run, model, family, parameters, weights_sha256, test (its own metrics)
    teacher_outputs: dict[str, Any] | None = None  # source (live, float16, float32), views, teacher_s, waited_s, why_live
    data: dict[str, Any]  # name, fingerprint, classes, counts of each part, split rule, image_size
    code: dict[str, Any]  # hash, commit, dirty
    packages: dict[str, str]
    hardware: dict[str, Any]
    time: dict[str, Any]  # started (UTC), training, evaluation, total
    history: dict[str, list[float | None]]  # a list a column, an entry an epoch
    plateau: dict[str, Any]  # valid_nll_fell over the last tenth of the epochs, reached
    last: dict[str, Any]  # epoch, valid and test metrics of the weights after the last epoch: the headline
    best: dict[str, Any]  # the same of the epoch with the lowest validation NLL


def write_record(record: Record, path: Path) -> None:
    """The last thing a run does: its record's presence means that the run is done."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.model_dump(mode="json").items()]
    write_atomically(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())  # a line a section: small, and diffs are readable


def read_record(path: Path) -> Record:
    """The record in a file; a missing, truncated or foreign one raises a KdfastError that names it."""
    try:
        return Record.model_validate_json(Path(path).read_bytes())
    except OSError:
        raise KdfastError(f"no record at {path}: that run has not finished") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise KdfastError(f"{path} is not a whole record of schema {SCHEMA} ({where}: {first['msg']}): rerun it") from None


def read_records(folder: Path) -> list[Record]:
    """All released records of a study folder (`<id>.json`), in the order of their ids."""
    return [read_record(path) for path in record_files(folder)]


def record_files(folder: Path) -> list[Path]:
    """The files of a study folder's released records, in the order of their ids."""
    return sorted(path for path in Path(folder).glob("*.json") if path.name != VERIFIED)


def tidy(records: Iterable[Record]) -> pd.DataFrame:
    """One row a run. Metrics are those of the last epoch unless their name starts with `best_`; fractions, nats, seconds."""
    return pd.DataFrame([_row(record) for record in records])


def _row(r: Record) -> dict[str, Any]:
    p, t, k = r.parameters, r.teacher or {}, r.teacher_outputs or {}
    return {
        "id": r.id,
        "dataset": r.data["name"],
        "student": p["student"],
        "family": r.model["family"],
        "parameters": r.model["parameters"],
        "teacher": t.get("model"),
        "teacher_family": t.get("family"),
        "teacher_parameters": t.get("parameters"),
        "teacher_top1": t.get("test", {}).get("top1"),
        "pair": None if not t else "same" if t["family"] == r.model["family"] else "cross",
        "method": p["method"],
        "method_args": " ".join(f"{k}={v}" for k, v in p["method_args"].items()),
        **{key: p[key] for key in ("seed", "epochs", "batch_size", "lr", "weight_decay")},
        **{f"test_{k}": v for k, v in r.last["test"].items()},
        **{f"valid_{k}": v for k, v in r.last["valid"].items()},
        **{f"best_test_{k}": v for k, v in r.best["test"].items()},
        "best_epoch": r.best["epoch"],
        **{f"best_valid_{k}": v for k, v in r.best["valid"].items()},
        "plateau_reached": r.plateau["reached"],
        "teacher_outputs": k.get("source"),
        "teacher_s": k.get("teacher_s", float("nan")),
        "training_s": r.time["training"],
        "evaluation_s": r.time["evaluation"],
        "total_s": r.time["total"],
        "code_hash": r.code["hash"],
        "fingerprint": r.data["fingerprint"],
    }


def pack_predictions(logits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """What is kept of test logits (N, C): top-5 classes, confidence of the first, NLL of the label, the label.

    float16 for confidence and NLL (three digits): 10,000 images stay below 150 kB.
    """
    z = logits.astype(np.float64)
    log_p = z - z.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    top5 = np.argsort(-log_p, axis=1, kind="stable")[:, :5]
    small = np.uint8 if logits.shape[1] <= 256 else np.uint16
    rows = np.arange(len(labels))
    return {
        "top5": top5.astype(small),
        "confidence": np.exp(log_p[rows, top5[:, 0]]).astype(np.float16),
        "nll": np.minimum(-log_p[rows, labels], 60000).astype(np.float16),
        "label": labels.astype(small),
    }
