"""Runs of a study, several at a time, until the time is over: the part `runs` of `benchmarks/gpu.py`."""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import torch

from kdfast.all import Run, load_study
from kdfast.core.provenance import ROOT
from kdfast.core.records import RECORD
from kdfast.experiment.runner import CHECKPOINT

PIECE, PIECES = 15 * 2**20, 6  # bytes of a piece of the archive, and how many pieces there may be
TRAIN = """
import json, sys, torch
from kdfast.all import Experiment
torch.set_num_threads(1)
experiment = Experiment(json.loads(sys.argv[1]), sys.argv[2])
experiment.load(); experiment.learner(); experiment.fit(progress=False); experiment.finish()
"""


def wanted(args: argparse.Namespace) -> list[Run]:
    """The study's runs of the models, methods and seeds that were asked for, teachers first, by seed."""
    if args.dry:
        return [Run(student="mini_resnet_s", epochs=2), Run(student="mini_resnet_xs", epochs=400)]
    study = load_study(ROOT / "experiments" / "studies" / f"{args.study}.yaml")
    models, methods = args.models.split(","), args.methods.split(",")
    seeds = [int(seed) for seed in args.seeds.split(",")]
    study = study.model_copy(update={"seeds": seeds})
    if args.epochs:
        study = study.model_copy(update={"training": study.training.model_copy(update={"epochs": args.epochs, "milestones": []})})
    teachers = {run.id: run.student for run in study.baseline_runs()}
    runs = [
        run
        for run in study.runs()
        if run.student in models and run.method in methods and (not run.teacher or teachers[run.teacher] in models)
    ]
    return sorted(runs, key=lambda run: (bool(run.teacher), seeds.index(run.seed), models.index(run.student)))


def train(args: argparse.Namespace) -> None:
    """Start what can be started, look every second, write what there is every two minutes, end what runs at the end."""
    end = time.monotonic() + args.seconds - (3 if args.dry else 12)
    folder = Path(args.runs or args.out / "runs").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    waiting, running, failed, written = wanted(args), {}, {}, time.monotonic()
    started = list(waiting)
    waiting = [run for run in waiting if not (folder / run.folder_name / RECORD).is_file()]
    try:
        while time.monotonic() < end and (waiting or running):
            for run in [r for r in waiting if len(running) < args.at_once and taught(r, folder)][: args.at_once - len(running)]:
                waiting.remove(run)
                running[run] = start(run, folder, args.out)
            for run, process in list(running.items()):
                if process.poll() is not None:
                    del running[run]
                    if process.returncode:
                        failed[run] = process.returncode
            if time.monotonic() - written > 120:
                report(started, folder, failed, args.out)
                written = time.monotonic()
            time.sleep(1)
    finally:
        for process in running.values():
            process.terminate()  # what is on disk is whole: checkpoints and records come to their names in one step
        for process in running.values():
            process.wait()
        report(started, folder, failed, args.out)


def taught(run: Run, folder: Path) -> bool:
    """Whether a run's teacher has a record, if it has a teacher."""
    return not run.teacher or (folder / run.folder_name).parent.joinpath(run.teacher, RECORD).is_file()


def start(run: Run, folder: Path, out: Path) -> subprocess.Popen:
    environment = {"KDFAST_CHECKPOINT_S": "20", "OMP_NUM_THREADS": "1"} | dict(os.environ)
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    with (logs / f"{run.id}.log").open("a") as log:
        command = [sys.executable, "-c", TRAIN, json.dumps(run.model_dump()), str(folder)]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def report(runs: list[Run], folder: Path, failed: dict[Run, int], out: Path) -> None:
    """How far every run is, and records and checkpoints in pieces."""
    logs = folder / "logs"
    rows = [{"run": run.id, **state(folder / run.folder_name, failed.get(run), logs / f"{run.id}.log")} for run in runs]
    (out / "runs.json").write_text(json.dumps({"rows": rows, "date": time.strftime("%Y-%m-%d")}, indent=1) + "\n")
    print(json.dumps(rows), flush=True)
    pack(folder, out)


def state(folder: Path, code: int | None, log: Path) -> dict:
    """Finished, with its test accuracy; on its way, with its last epoch; failed, with the end of its log; or not begun."""
    if (folder / RECORD).is_file():
        record = json.loads((folder / RECORD).read_text())
        return {"state": "finished", "training_s": record["time"]["training"], "test": record["last"]["test"]}
    found = {"state": "failed" if code else "begun" if log.is_file() else "not begun"}
    if code:
        found |= {"exit": code, "log": log.read_text()[-1500:]}
    if (folder / CHECKPOINT).is_file():
        kept = torch.load(io.BytesIO((folder / CHECKPOINT).read_bytes()[32:]), map_location="cpu", weights_only=True)
        last = kept["state"]["recorder"]["values"][-1]
        found |= {"epochs": kept["epoch"] + 1, "training_s": kept["seconds"], "last": last}
    return found


def pack(folder: Path, out: Path) -> None:
    """All but caches in one archive, cut in pieces; what does not fit is left out, finished runs' weights first."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and "cache" not in f.relative_to(folder).parts]
    files.sort(key=lambda f: f.suffix == ".safetensors")
    buffer, room = io.BytesIO(), PIECE * PIECES - 2**16
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for file in files:
            if buffer.tell() + file.stat().st_size + 2048 < room:
                archive.add(file, Path("runs") / file.relative_to(folder))
    content = buffer.getvalue()
    for old in out.glob("runs.tar.*"):
        old.unlink()
    for i in range(0, len(content), PIECE):
        (out / f"runs.tar.{i // PIECE:02d}").write_bytes(content[i : i + PIECE])
