"""`make doctor`: look at everything that runs left behind, and name what is damaged and what to do about it."""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open

from kdfast.core.errors import KdfastError
from kdfast.core.predictions import correct, predictions_path, read_predictions
from kdfast.core.records import RECORD, WEIGHTS, Record, read_record, record_files
from kdfast.data.decoding import decoded_folder
from kdfast.distill.cache import Cache, cache_folder
from kdfast.study.plan import RESULTS
from kdfast.training.checkpoint import whole

SAMPLE = 5  # runs whose weights are evaluated, unless told otherwise


@dataclass(frozen=True)
class Finding:
    """Something that cannot be trusted, and the way out."""

    path: Path
    what: str
    remedy: str


def findings(runs: Path = Path("runs"), results: Path = RESULTS, sample: int | None = SAMPLE) -> Iterator[Finding]:
    """Everything that is damaged among runs, released records, checkpoints, decoded images and cached teacher outputs.

    The weights of `sample` runs, drawn by chance (None: of all), are evaluated and compared with what their records say.
    """
    again = "remove its folder and train it again"
    records = sorted(runs.glob(f"*/*/{RECORD}"))
    for path in track(records, description=f"{len(records)} runs", transient=True):
        yield from _record(path, path.parent.name, again)
        yield from _weights(path, again)
    evaluated = records if sample is None else random.sample(records, min(sample, len(records)))
    for path in track(evaluated, description=f"{len(evaluated)} evaluated", transient=True):
        yield from _evaluation(path, again)
    for path in (path for folder in sorted(results.glob("*")) for path in record_files(folder)):
        yield from _record(path, path.stem, "restore it from git, or release the study again")
    for path in sorted(runs.glob("*/*/checkpoint.pt")):
        if not whole(path):
            yield Finding(path, "a damaged checkpoint", "remove it: the run then begins anew")
    for path in sorted(decoded_folder().glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                file.keys()
        except (OSError, SafetensorError):
            yield Finding(path, "a damaged copy of decoded images", "remove it: the images are decoded again")
    for path, why in Cache(cache_folder(runs)).damaged():
        yield Finding(path, f"cached teacher outputs that are not used: {why}", "remove it: they are computed again")
    for path in sorted([*runs.rglob(".*.partial"), *results.rglob(".*.partial")]):
        yield Finding(path, "what a killed process had begun to write", "remove it")


def _record(path: Path, name: str, remedy: str) -> Iterator[Finding]:
    """The record is whole, lies under its own name, and its predictions say what it says."""
    try:
        record = read_record(path)
        if record.id != name:
            yield Finding(path, f"the record of {record.id} under another name", remedy)
        yield from _epochs(path, record, remedy)
        yield from _predictions(path, record, remedy)
    except KdfastError as error:
        yield Finding(path, str(error), remedy)


def _epochs(path: Path, record: Record, remedy: str) -> Iterator[Finding]:
    """The history has the epochs that the run asked for, and the last of them is the one that is reported."""
    asked, lengths = record.parameters["epochs"], {len(column) for column in record.history.values()}
    if lengths != {asked} or record.last["epoch"] != asked - 1:
        what = f"a history of {max(lengths, default=0)} epochs and a last epoch {record.last['epoch']} of a run of {asked}"
        yield Finding(path, what, remedy)


def _predictions(path: Path, record: Record, remedy: str) -> Iterator[Finding]:
    hits = correct(read_predictions(path))
    said, found, n = record.last["test"]["top1"], float(hits.mean()), record.data["counts"]["test"]
    if len(hits) != n or abs(found - said) > 1e-9:
        what = f"predictions of {len(hits)} images with accuracy {found:.4f} beside a record of {n} with {said:.4f}"
        yield Finding(predictions_path(path), what, remedy)


def _weights(path: Path, remedy: str) -> Iterator[Finding]:
    weights = path.with_name(WEIGHTS)
    try:
        record = read_record(path)
        if hashlib.sha256(weights.read_bytes()).hexdigest() != record.model["weights_sha256"]:
            yield Finding(weights, f"not the weights that run {record.id} wrote", remedy)
    except OSError:
        yield Finding(weights, "missing beside its record", remedy)
    except KdfastError:
        return  # said of the record


def _evaluation(path: Path, remedy: str) -> Iterator[Finding]:
    """The weights, evaluated anew, are worth what the record says of the last epoch; rounding may differ a little elsewhere."""
    from kdfast.experiment.teachers import evaluate_run  # with torch

    try:
        record = read_record(path)
        found = evaluate_run(path.parent, record)
    except (KdfastError, OSError):
        return  # said of the record or its weights, or the data are not here
    said = record.last["test"]
    if found is not None and (
        abs(found["top1"] - said["top1"]) > 0.005 or abs(found["nll"] - said["nll"]) > 0.01 * said["nll"] + 1e-3
    ):
        what = f"weights with test accuracy {found['top1']:.4f} beside a record that says {said['top1']:.4f}"
        yield Finding(path.with_name(WEIGHTS), what, remedy)


def examine(sample: int | None = SAMPLE) -> int:
    """Print what is damaged; 0 if nothing is."""
    console, found = Console(), list(findings(sample=sample))
    for finding in found:
        console.print(f"{finding.path}: {finding.what}; {finding.remedy}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"{len(found)} damaged" if found else "everything that is there is whole")
    return 1 if found else 0
