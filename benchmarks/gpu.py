"""What a GPU is worth to kdfast, in minutes: `python -m benchmarks.gpu --minutes 9 --out DIR`

Three parts, each in a process of its own with its own time, written as they go: the tests that need a GPU (tests.log); the
step table, how many runs a GPU trains at once, and the card's measured limits (steps.json); with the rest, runs of a study
(runs.json, and records and checkpoints in runs.tar.00, …: join them with `cat`, unpack and go on another day).
`--dry` does it all on the CPU at tiny sizes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks import plain_loop
from benchmarks.common import photos, steps, synchronize
from benchmarks.gpu_runs import train
from kdfast.all import Run, Teacher, create_learner, create_model
from kdfast.core.provenance import ROOT, git_state, hardware, versions
from kdfast.models.flops import flops

PAIRS = [("cifar_resnet20", "cifar_resnet56", 32), ("mobilenet_v3_small", "resnet34", 128)]
FAST = {"precision": "bfloat16", "channels_last": True}
KINDS: dict[str, dict] = {
    "baseline": {},
    "cached": {"teacher_outputs": "float16"},
    "live": {"teacher_outputs": "live"},
    "baseline bf16": FAST,
    "live bf16": {"teacher_outputs": "live", **FAST},
}
AT_ONCE = (1, 4, 8, 16)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class Table:
    """Rows that are on disk as soon as they are measured."""

    def __init__(self, path: Path, seconds: float):
        self.path, self.end, self.rows = path, time.monotonic() + seconds, []

    def add(self, name: str, measure: Callable[[], dict]) -> None:
        """One more row; an error is one too, and so is what there was no time for."""
        start = time.monotonic()
        try:
            row = measure() if start < self.end else {"skipped": "no time left"}
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        self.rows.append({"row": name, **row, "took_s": round(time.monotonic() - start, 2)})
        print(json.dumps(self.rows[-1]), flush=True)
        found = {"rows": self.rows, "hardware": hardware(device(), torch.get_num_threads()), "packages": versions()}
        found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        self.path.write_text(json.dumps(found | {"code": git_state(), "date": time.strftime("%Y-%m-%d")}, indent=1) + "\n")


# Steps


def timed(step: Callable[[], object], batch: int, seconds: float) -> dict:
    """Milliseconds a step (median of seven stretches, the queue emptied after each), images a second and peak memory."""
    for _ in range(3):
        step()
    synchronize()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step()
    synchronize()
    each = max(1, int(seconds / 7 / (time.perf_counter() - start)))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(each):
            step()
        synchronize()
        times.append((time.perf_counter() - start) / each)
    ms = 1e3 * sorted(times)[3]
    peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    return {"ms": ms, "images/s": 1e3 * batch / ms, "steps": 7 * each, "spread": max(times) / min(times), "peak_mib": peak}


def kdfast_step(student: str, teacher: str, size: int, batch: int, n: int, options: dict, cache: str) -> Callable[[], None]:
    """The step of a run as a study has it: crops and flips, SGD, fastai's events, KD where there is a teacher."""
    data = photos(n, size, classes=100)
    taught = {"teacher": teacher, "method": "kd", "method_args": {"alpha": 0.9, "T": 4}} if "teacher_outputs" in options else {}
    common = {"lr": 0.05, "optimizer": "sgd", "augment": "crop+flip", "image_size": size, "batch_size": batch}
    run = Run(student=student, **common, **options, **taught)
    model = create_model(teacher, 100, size).eval().to(device()) if taught else None
    learn = create_learner(run, data, Teacher(model, chunk=batch) if taught else None, cache)
    learn.remove_cbs([cb for cb in learn.cbs if cb.name == "progress"])
    return steps(learn, wait=False)


def fasterai_step(student: str, teacher: str, size: int, batch: int, n: int) -> Callable[[], None]:
    from benchmarks.common import learner
    from benchmarks.step import fasterai

    cbs = fasterai(create_model(teacher, 100, size).to(device()))
    return steps(learner(student, photos(n, size, classes=100), batch, cbs, "crop+flip", device()), wait=False)


def teacher_step(teacher: str, size: int, batch: int) -> Callable[[], object]:
    model, images = create_model(teacher, 100, size).eval().to(device()), torch.randn(batch, 3, size, size, device=device())
    return lambda: torch.inference_mode()(model)(images)


def measure_steps(out: Path, seconds: float, dry: bool) -> None:
    """Everything in steps.json, what is worth most first."""
    torch.set_num_threads(1)
    table, each = Table(out / "steps.json", seconds), 0.1 if dry else 2.0
    for student, teacher, size in PAIRS[: 1 if dry else 2]:
        batch, n = (4, 40) if dry else (64, 64 * 50)
        about = f"{student} {size} px"
        kinds = {kind: options for kind, options in KINDS.items() if not dry or "precision" not in options}  # slow on a CPU
        with tempfile.TemporaryDirectory() as cache:
            for kind, options in kinds.items():
                make = lambda o=options: kdfast_step(student, teacher, size, batch, n, o, cache)  # noqa: B023, E731
                table.add(f"{about}, {kind}", lambda: timed(make(), batch, each))  # noqa: B023
        table.add(f"{about}, teacher alone", lambda: timed(teacher_step(teacher, size, batch), batch, each))  # noqa: B023
        table.add(f"{about}, fasterai", lambda: timed(fasterai_step(student, teacher, size, batch, n), batch, each))  # noqa: B023
        for kind, of in (("plain loop", ""), ("plain loop, KD", teacher)):
            step = lambda of=of: plain_loop.step(student, of, photos(n, size, 100), batch, device(), 1 if dry else 8)  # noqa: B023, E731
            table.add(f"{about}, {kind}", lambda: timed(step(), batch, 2 * each))  # noqa: B023
        table.add(f"{about}, GFLOP a step", lambda: gigaflops(student, teacher, size, batch))  # noqa: B023
        if size == PAIRS[0][2]:
            for name, measure in limits(dry):
                table.add(name, measure)
            several(table, dry)


def gigaflops(student: str, teacher: str, size: int, batch: int) -> dict:
    """Of a step, forward and backward counted as three forwards."""
    own, taught = flops(student, 100, size) * batch / 1e9, flops(teacher, 100, size) * batch / 1e9
    return {"student": 3 * own, "teacher": taught}


def limits(dry: bool) -> Iterator[tuple[str, Callable[[], dict]]]:
    """The card's measured rates: matrix products (bf16, TF32, float32) and a copy, bytes read and written counted."""
    n = 256 if dry else 8192

    def product(dtype: torch.dtype, tf32: bool) -> dict:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(n, n, device=device(), dtype=dtype) for _ in range(2))
        found = timed(lambda: a @ b, 1, 0.3)
        torch.backends.cuda.matmul.allow_tf32 = False
        return {"tflop/s": 2 * n**3 / found["ms"] / 1e9, "n": n}

    def copy() -> dict:
        a = torch.zeros(n * n * 4, device=device())
        b = torch.empty_like(a)
        return {"gb/s": 2 * a.numel() * 4 / timed(lambda: b.copy_(a), 1, 0.3)["ms"] / 1e6}

    kinds = {"bf16": (torch.bfloat16, False), "tf32": (torch.float32, True), "fp32": (torch.float32, False)}
    for name, (dtype, tf32) in kinds.items():
        yield f"limit, product {name}", lambda dtype=dtype, tf32=tf32: product(dtype, tf32)
    yield "limit, copy", copy


def several(table: Table, dry: bool) -> None:
    """Images a second of 1, 4, 8, 16 processes that train at once, all started beforehand."""
    counts = (1, 2) if dry else AT_ONCE
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", *(["--dry"] if dry else [])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    workers = [subprocess.Popen(command, **pipes) for _ in range(max(counts))]

    def ask(count: int, options: str) -> dict:
        for worker in workers[:count]:
            print(f"{0.5 if dry else 4.0} {options}", file=worker.stdin, flush=True)
        rates = [float(worker.stdout.readline()) for worker in workers[:count]]
        return {"processes": count, "images/s": sum(rates), "slowest": min(rates)}

    try:
        table.add("processes start", lambda: {"ready": [w.stdout.readline().strip() for w in workers].count("ready")})
        for count in counts:
            table.add(f"{count} at once, baseline", lambda count=count: ask(count, "plain"))
            table.add(f"{count} at once, baseline bf16", lambda count=count: ask(count, "fast"))
    finally:
        for worker in workers:
            worker.kill()


def worker(dry: bool) -> None:
    """Train for as many seconds as each line of standard input says, then say how many images a second that were."""
    torch.set_num_threads(1)
    student, teacher, size = PAIRS[0]
    batch, n = (4, 40) if dry else (64, 64 * 50)
    options = {"plain": {}, "fast": {} if dry else FAST}
    kinds = {kind: kdfast_step(student, teacher, size, batch, n, given, "") for kind, given in options.items()}
    for step in kinds.values():
        for _ in range(2 if dry else 10):
            step()
    synchronize()
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, kind = line.split()
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < float(seconds):
            kinds[kind]()
            done += 1
            if done % 20 == 0:
                synchronize()  # so that the queue is not what is measured
        synchronize()
        print(done * batch / (time.perf_counter() - start), flush=True)


# The whole


def child(part: str, args: argparse.Namespace, seconds: float) -> None:
    """One part in a process of its own; after its time and a little more it is ended, with all that it started."""
    if part == "tests":
        found = sorted((ROOT / "tests").rglob("test_*.py"))
        files = [str(file) for file in found if "mark.cuda" in file.read_text()]  # others may need packages that are not there
        command = ["-m", "pytest", "-m", "cuda", "-q", "-n", "0" if args.dry else "4", "-p", "no:cacheprovider", "-rfE", *files]
    else:
        passed = [f"--{key.replace('_', '-')}={getattr(args, key)}" for key in STUDY]
        command = ["-m", "benchmarks.gpu", "--part", part, "--seconds", str(seconds), "--out", str(args.out), *passed]
        command += ["--dry"] * args.dry
    print(f"{part}: {seconds:.0f} s", flush=True)
    with (args.out / f"{part}.log").open("w") as log:
        running = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            running.wait(seconds + (0 if part == "tests" else 15))
        except subprocess.TimeoutExpired:
            print(f"{part}: ended", flush=True)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(running.pid, 9)
            running.wait()
    print("".join((args.out / f"{part}.log").read_text().splitlines(keepends=True)[-25:])[-3000:], flush=True)


STUDY = ("study", "models", "methods", "seeds", "epochs", "at_once", "runs")  # options that the part `runs` is told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--parts", default="tests,steps,runs")
    parser.add_argument("--study", default="cifar100")
    parser.add_argument("--models", default="cifar_resnet56,cifar_resnet20", help="whose runs, teachers and students")
    parser.add_argument("--methods", default="baseline", help="and of these methods")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=0, help="other than the study's")
    parser.add_argument("--at-once", type=int, default=6)
    parser.add_argument("--runs", default="", help="where runs are trained; DIR/runs unless given")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.dry)
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part == "steps":
        return measure_steps(args.out, args.seconds, args.dry)
    if args.part == "runs":
        return train(args)
    end = time.monotonic() + 60 * args.minutes
    most = {"tests": 40, "steps": 60, "runs": 30} if args.dry else {"tests": 90, "steps": 150, "runs": 1e9}
    for part in args.parts.split(","):
        left = end - time.monotonic() - 20
        if left > 15:
            child(part, args, min(left, most[part]))


if __name__ == "__main__":
    main()
