"""What a study costs beyond its training: `python -m benchmarks.grid`

A copy of the checkout runs every run of the study through Snakemake, on all cores. The same runs are then trained and
evaluated one after another in one process on one core. Also: what a single run through papermill with a forked kernel
spends outside training and evaluation. Takes twice as long as the study; nothing else should run meanwhile.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import save, say
from kdfast.all import Experiment
from kdfast.core.provenance import ROOT
from kdfast.study.plan import study_named

LIMITS = {"grid": 1.25, "outside (s)": 0.8}


def checkout(folder: Path) -> Path:
    """What git tracks, with its changes, in a folder of its own."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for file in filter(None, files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, folder / file)
    return folder


def through_snakemake(root: Path, study: str) -> tuple[float, float]:
    """Seconds for every run of the study, analysis and paper left out; and those in the runs' loops, side by side."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "kdfast", "reproduce", "--study", study, "--", "--omit-from", "analysis", "teacher_cost"]
    subprocess.run(command, cwd=root, check=True)
    wall = time.perf_counter() - start
    times = [json.loads(path.read_text())["time"] for path in root.glob("runs/*/*/record.json")]
    return wall, sum(t["training"] + t["evaluation"] for t in times)


def alone(study: str, runs: Path) -> float:
    """Seconds of training and evaluation of the same runs, one after another on one core."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    seconds = 0.0
    for run in study_named(study).runs():
        experiment = Experiment(run.model_dump(), runs)
        experiment.load()
        experiment.learner()
        experiment.fit(progress=False)
        experiment.finish()
        seconds += sum(experiment.seconds.values())
    return seconds


def outside(root: Path, times: int) -> list[float]:
    """Seconds of single runs through papermill and a forked kernel, less those of their training and evaluation."""
    left = []
    for seed in range(1000, 1000 + times):
        given = f"-k kdfast-warm --engine kdfast-warm --no-progress-bar -p explore False -p epochs 5 -p seed {seed}"
        notebook = ["papermill", "experiments/experiment.ipynb", "build/out.ipynb", *given.split()]
        command, environment = [sys.executable, "-m", "kdfast.kernels.client", *notebook], os.environ | {"OMP_NUM_THREADS": "1"}
        start = time.perf_counter()
        subprocess.run(command, cwd=root, check=True, capture_output=True, env=environment)
        took = time.perf_counter() - start
        (record,) = (root / "runs" / "digits").glob(f"*.s{seed}-*/record.json")
        seconds = json.loads(record.read_text())["time"]
        left.append(took - seconds["training"] - seconds["evaluation"])
    return left[1:]  # the first starts the server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--study", default="digits")
    parser.add_argument("--keep", type=Path, help="leave the copy of the checkout with its runs here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an ordinary shell has compiled modules at hand
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as temporary:
        root = checkout(args.keep or Path(temporary) / "checkout")
        (root / "build").mkdir(exist_ok=True)
        wall, shared = through_snakemake(root, args.study)
        single = outside(root, 11)
        loops = alone(args.study, Path(temporary) / "baseline")
    row = {
        "study": args.study,
        "runs": len(study_named(args.study).runs()),
        "cores": cores,
        "wall (s)": wall,
        "loops alone (s)": loops,
        "loops side by side / alone": shared / loops,
        "wall × cores / loops": wall * cores / loops,
        "outside a run (s)": statistics.median(single),
    }
    say("the grid", [row])
    for what, value, limit in (("wall × cores / loops", row["wall × cores / loops"], LIMITS["grid"]),
                               ("seconds outside a run", row["outside a run (s)"], LIMITS["outside (s)"])):  # fmt: skip
        print(f"{what}: {value:.2f}; asked for {limit}: {'reached' if value <= limit else 'MISSED'}")
    print(save("grid", [row], {"outside": single, "limits": LIMITS}))


if __name__ == "__main__":
    main()
