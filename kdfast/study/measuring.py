"""`make efficiency STUDY=…`: measure every network of a study, one after the other, and the exported students' accuracy.

Results lie in `benchmarks/results/efficiency/`, one JSON file an architecture, image size and number of classes, and
`exported-<study>.json`; what is there is not measured again.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil
from rich.progress import track

from kdfast.core.config import Run
from kdfast.core.errors import KdfastError
from kdfast.core.files import write_atomically
from kdfast.core.records import RECORD, WEIGHTS, Record, read_record
from kdfast.study.plan import record_path, study_named
from kdfast.study.study_file import Study

EFFICIENCY = Path("benchmarks/results/efficiency")
AS_IT_IS = {"teacher_outputs": "live", "fallback": False, "precision": "float32", "weights": "", "compile": False}  # for export
BUSY = 15  # per cent of all processors, above which times would be of no use
EXPORTED = Path("build/exported")  # the students' ONNX files and model cards


def result_path(name: str, image_size: int, classes: int) -> Path:
    """Where an architecture's measurements lie."""
    return EFFICIENCY / f"{name}-{image_size}px-{classes}.json"


def any_record(study: str) -> Record:
    """One of the study's records, the user's own or released, for its image size and number of classes."""
    for kind in ("runs", "released"):
        for run in study_named(study).baseline_runs():
            path = Path(record_path(run, study, kind))
            if path.is_file():
                return read_record(path)
    raise KdfastError(
        f"study {study} has no record yet, so that its number of classes is not known: make reproduce STUDY={study}"
    )


def measure_study(study: str, options: Iterable[str] = ()) -> None:
    """Measure what is not measured yet; `options` go to `python -m kdfast.deploy.profiling`. Refused on a busy machine."""
    busy = psutil.cpu_percent(interval=2)
    if busy > BUSY:
        raise KdfastError(f"the machine is busy ({busy:.0f} % of its processors): measure when nothing else runs")
    plan, data = study_named(study), any_record(study).data
    size, classes = data["image_size"], len(data["classes"])
    names = dict.fromkeys([*plan.teachers, *plan.students])
    wanted = [name for name in names if not result_path(name, size, classes).is_file()]
    for name in track(wanted, description=f"{len(wanted)} networks"):
        shape = ["--image-size", str(size), "--classes", str(classes), "--out", str(result_path(name, size, classes))]
        command = [sys.executable, "-m", "kdfast.deploy.profiling", name, *shape, *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise KdfastError(f"measuring {name} failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    rows = [row for run in _to_export(plan) if (row := _exported(run)) is not None]
    if rows:
        write_atomically(EFFICIENCY / f"exported-{study}.json", (json.dumps(rows, indent=1) + "\n").encode())


def _to_export(plan: Study) -> list[Run]:
    """Of the first seed: every student's baseline, and taught by the first of its teachers."""
    seed, found = plan.seeds[0], {}
    for run in [*plan.baseline_runs(), *plan.distilled_runs()]:
        if run.seed == seed and run.student in plan.students:
            found.setdefault((run.student, bool(run.teacher)), run)
    return list(found.values())


def _exported(run: Run) -> dict | None:
    """Export the network of a finished run of this checkout and say what it is worth; None where its weights are not here."""
    folder = Path("runs") / run.folder_name
    if not (folder / RECORD).is_file() or not (folder / WEIGHTS).is_file():
        return None
    from safetensors.torch import load_file

    from kdfast.deploy.export import export_student
    from kdfast.experiment.runner import Experiment
    from kdfast.models.pretrained import load_weights

    record, plain = read_record(folder / RECORD), run.model_dump() | {"teacher": "", "method": "baseline", "method_args": {}}
    experiment = Experiment(plain | AS_IT_IS, "runs")
    experiment.load()
    learn = experiment.learner()
    load_weights(learn.model, load_file(folder / WEIGHTS))
    exported = export_student(learn, EXPORTED / run.id, record=record)
    size = {"onnx_bytes": exported.onnx.stat().st_size, "int8_bytes": exported.int8.stat().st_size}
    teacher = record.teacher["model"] if record.teacher else None
    about = {"run": run.id, "weights": record.model["weights_sha256"], "student": run.student, "teacher": teacher}
    return about | {"accuracy": exported.accuracy, "difference": exported.difference, **size}
