"""`make verify STUDY=…`: rerun a random cell of a released study and compare it with what was released.

On the same type of processor, thread count and versions the weights must be equal. Elsewhere rounding differs, and with it the
whole training; then the question is whether the new result is one more draw from where the released seeds came from: whether
it lies inside their 95 % prediction interval.
"""

import hashlib
import json
import random
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy import stats

from kdfast.core.code import code_of
from kdfast.core.config import Run, dataset_slug
from kdfast.core.errors import KdfastError, unknown
from kdfast.core.files import write_atomically
from kdfast.core.provenance import RUNS, git_state, hardware, versions
from kdfast.core.records import VERIFIED, WEIGHTS, Record, read_records
from kdfast.study.plan import RESULTS, released

FOLDER = Path("build/verify")  # where the runs are made again


@dataclass(frozen=True)
class Verdict:
    """What a rerun showed: `ok` or not, how, and why, in a sentence."""

    ok: bool
    outcome: str  # equal, not equal, inside or outside the seeds' prediction interval, or no interval
    words: str


class Verification(BaseModel):
    """A released record that was made again: an entry of its study's `verified.json`."""

    model_config = ConfigDict(extra="forbid")

    run: str
    released: str  # SHA-256 of the released run's weights
    code: str  # hash of the code that made it again
    commit: str | None
    processor: str
    outcome: str  # Verdict's
    when: str  # UTC


def prediction_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Where one more value of the same normal distribution falls with that probability; infinite for a single value."""
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return -np.inf, np.inf
    half = float(stats.t.ppf((1 + confidence) / 2, len(x) - 1) * x.std(ddof=1) * np.sqrt(1 + 1 / len(x)))
    return float(x.mean()) - half, float(x.mean()) + half


def cell_of(record: Record, records: list[Record]) -> list[Record]:
    """The records that differ from this one by their seed alone: of the same student, teacher's network and method."""

    def key(r: Record) -> tuple:
        own = {k: v for k, v in r.parameters.items() if k not in ("seed", "fold", "teacher", "view_seed")}
        return sorted((k, str(v)) for k, v in own.items()), r.teacher and r.teacher["model"]

    return [other for other in records if key(other) == key(record)]


def same_machine(record: Record) -> bool:
    """Whether this machine rounds as the record's did: processor, threads, versions and code."""
    here = hardware(record.hardware["device"], record.hardware["threads"])
    alike = all(here[k] == record.hardware[k] for k in ("processor", "threads", "system"))
    return alike and versions() == record.packages and code_of(Run(**record.parameters)) == record.code["hash"]


def compare(new: Record, old: Record, cell: list[Record]) -> Verdict:
    """The rerun beside the released run, and beside all seeds of its cell."""
    ours, theirs = (100 * r.last["test"]["top1"] for r in (new, old))
    if new.model["weights_sha256"] == old.model["weights_sha256"]:
        return Verdict(True, "equal", f"equal: the same weights, bit for bit, and test accuracy {ours:.2f} %")
    if same_machine(old):
        return Verdict(
            False,
            "not equal",
            f"NOT equal: {ours:.2f} % where {theirs:.2f} % is released, on the same processor, versions and code",
        )
    low, high = prediction_interval(np.array([100 * r.last["test"]["top1"] for r in cell]))
    if not np.isfinite(low):
        return Verdict(
            True, "no interval", f"test accuracy {ours:.2f} %, released {theirs:.2f} %: one released seed gives no interval"
        )
    inside = low <= ours <= high
    what = "inside" if inside else "OUTSIDE"
    return Verdict(
        inside,
        what.lower(),
        f"another processor, version or code, so not bit for bit: test accuracy {ours:.2f} %, released {theirs:.2f} %, {what} "
        f"the 95 % prediction interval of the {len(cell)} released seeds, {low:.2f} to {high:.2f} %",
    )


def choose(study: str, run: str = "", seed: int | None = None) -> tuple[Record, list[Record]]:
    """A released run of the study, at random unless named, and all of them."""
    if study not in released():
        raise unknown("released study", study, released(), str(RESULTS))
    records = read_records(RESULTS / study)
    if run:
        found = [record for record in records if record.id == run]
        if not found:
            raise unknown("run", run, [record.id for record in records], f"study {study}")
        return found[0], records
    return random.Random(seed).choice(records), records


def verify(study: str, run: str = "", seed: int | None = None) -> Verdict:
    """Rerun one run, after its teacher where that is not here, in a folder of its own; says beforehand how long that takes."""
    record, records = choose(study, run, seed)
    teacher = next((r for r in records if record.teacher and r.id == record.teacher["run"]), None)
    if record.teacher and teacher is None:
        raise KdfastError(f"the teacher of {record.id} is not released with study {study}: verify a run without a teacher")
    shutil.rmtree(FOLDER, ignore_errors=True)
    needed = [teacher, record] if teacher and not _take_over(teacher) else [record]
    seconds = sum(r.time["total"] for r in needed)
    print(f"{' and '.join(r.id for r in needed)}: about {seconds:.0f} s on {record.hardware['processor']} …", flush=True)
    verdict = compare([_rerun(r) for r in needed][-1], record, cell_of(record, records))
    note(study, record, verdict)
    print(verdict.words)
    return verdict


def note(study: str, record: Record, verdict: Verdict) -> None:
    """Append what a rerun showed to the study's `verified.json`."""
    entry = Verification(
        run=record.id, released=record.model["weights_sha256"], code=code_of(Run(**record.parameters)),
        commit=git_state()["commit"], processor=hardware("cpu", 1)["processor"], outcome=verdict.outcome,
        when=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip
    lines = ",\n".join(e.model_dump_json() for e in [*verifications(RESULTS / study), entry])
    write_atomically(RESULTS / study / VERIFIED, f"[\n{lines}\n]\n".encode())


def verifications(folder: Path) -> list[Verification]:
    """What is noted of a study's released records, oldest first; a KdfastError where the file is damaged."""
    path = Path(folder) / VERIFIED
    if not path.is_file():
        return []
    try:
        return [Verification.model_validate(entry) for entry in json.loads(path.read_bytes())]
    except ValueError as error:
        raise KdfastError(f"{path} is damaged ({str(error).splitlines()[0]}): restore it from git, or remove it") from None


def standing(study: str) -> str:
    """By which code a study's released records were made, and by which they were last made again, in a sentence."""
    records, noted = read_records(RESULTS / study), verifications(RESULTS / study)
    made = sorted({(record.code["commit"] or "unknown")[:10] for record in records})
    said = f"{len(records)} released records, made by commit {', '.join(made)}"
    if not noted:
        return f"{said}; not verified since"
    last = noted[-1]
    now = "the present code" if last.code == code_of(_run_of(records, last.run)) else "code that has changed since"
    outcomes = ", ".join(f"{n} {outcome}" for outcome, n in Counter(entry.outcome for entry in noted).items())
    return (
        f"{said}; {len(noted)} made again ({outcomes}), last on {last.when[:10]} by commit {(last.commit or 'unknown')[:10]} "
        f"({now}) on {last.processor}"
    )


def _run_of(records: list[Record], name: str) -> Run:
    return Run(**next((record for record in records if record.id == name), records[0]).parameters)


def _take_over(teacher: Record) -> bool:
    """Use the teacher that lies in this checkout's runs, if it is the released one to the bit."""
    place = Path(dataset_slug(teacher.parameters["dataset"])) / teacher.id
    try:
        weights = (RUNS / place / WEIGHTS).read_bytes()
    except OSError:
        return False
    if hashlib.sha256(weights).hexdigest() != teacher.model["weights_sha256"]:
        return False
    shutil.copytree(RUNS / place, FOLDER / place)
    return True


def _rerun(record: Record) -> Record:
    import torch

    from kdfast.experiment.runner import Experiment  # with torch, which those who only read verifications need not wait for

    torch.set_num_threads(record.hardware["threads"])
    experiment = Experiment(Run(**record.parameters).model_dump(), FOLDER)
    experiment.load()
    if experiment.data.fingerprint != record.data["fingerprint"]:
        raise KdfastError(
            f"the data set {record.data['name']} here is not the released one (fingerprint {experiment.data.fingerprint}, not "
            f"{record.data['fingerprint']}): its runs cannot be verified"
        )
    experiment.learner()
    experiment.fit(progress=sys.stdout.isatty())
    return experiment.finish()
