"""Peak memory of training with cached logits, and with a live teacher, relative to training alone: `python -m benchmarks.memory`

Each kind of training runs in a process of its own; its peak is counted from the end of its imports on (Linux).
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.common import learner, photos, save, say, steps
from kdfast.all import KD, Cached, Distill, Teacher, create_model

KINDS, LIMIT = ("baseline", "cached", "live"), 1.05


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def train(kind: str, args: argparse.Namespace, store: str) -> int:
    """Bytes that a few steps needed at most, beyond what the process held before."""
    torch.set_num_threads(1)
    begun = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    data = photos(args.batch_size * 10, args.size)

    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return create_model(args.teacher, len(data.classes), data.size)

    if kind == "baseline":
        cbs = []
    else:
        teacher = Teacher(make, chunk=args.batch_size)
        teacher.identity = lambda: {"model": args.teacher, "weights": "seed 0"}  # as of a run's record: it is not made for it
        cbs = [Distill(teacher, KD(), cached=Cached(store) if kind == "cached" else None)]
    step = steps(learner(args.student, data, args.batch_size, cbs))
    for _ in range(args.steps):
        step()
    return status("VmHWM") - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--teacher", default="resnet50")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--kind", choices=KINDS, help="measure this one here, and print bytes")
    parser.add_argument("--store", default="")
    args = parser.parse_args()
    if args.kind:
        print(train(args.kind, args, args.store))
        return
    with tempfile.TemporaryDirectory() as store:
        own = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--store", store, "--kind"]

        def peak(kind: str) -> int:
            return int(subprocess.run([*own, kind], check=True, capture_output=True, text=True).stdout.split()[-1])

        peak("cached")  # fills the store
        peaks = {kind: sorted(peak(kind) for _ in range(3))[1] for kind in KINDS}
    rows = [{"kind": kind, "peak (MB)": peaks[kind] / 1e6, "/ baseline": peaks[kind] / peaks["baseline"]} for kind in KINDS]
    say(f"{args.student} taught by {args.teacher}, {args.size} pixels, batches of {args.batch_size}", rows)
    worst = rows[1]["/ baseline"]
    print(f"cached / baseline: {worst:.3f}; asked for {LIMIT}: {'reached' if worst <= LIMIT else 'MISSED'}")
    print(save("memory", rows, {k: v for k, v in vars(args).items() if k not in ("kind", "store")} | {"limit": LIMIT}))


if __name__ == "__main__":
    main()
