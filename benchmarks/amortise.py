"""What distillation costs as a grid grows, with a live teacher and with cached teacher outputs: `python -m benchmarks.amortise`

One teacher, `--runs` students of it, one after another on one thread: alone, with the live teacher, with cached teacher outputs
in a store that starts empty. Cumulative seconds at 1, 2, 5, … runs, beside a model of three numbers: a distilled run
without its teacher, the live teacher's part of a run, the computing of the cached outputs.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import save, say
from kdfast.all import Run, Teacher, create_learner, create_model, fit, load_data

POINTS = (1, 2, 5, 10, 20, 50, 100)


def one(run: Run, data, teacher: Teacher | None, store: Path) -> tuple[float, float]:
    """Seconds of one training, and those of the teacher among them."""
    learn = create_learner(run, data, teacher, store)
    start = time.perf_counter()
    fit(learn, run, progress=False)
    return time.perf_counter() - start, learn.distill.teacher_s if teacher else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", default="mini_resnet_xs")
    parser.add_argument("--teacher", default="mini_resnet_xl")
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--runs", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = load_data("digits", args.size)
    torch.manual_seed(0)
    teacher = Teacher(create_model(args.teacher, len(data.classes), data.size), classes=data.classes, chunk=64)
    common = {"image_size": args.size, "augment": "crop", "view_seed": 0, "student": args.student, "epochs": args.epochs}
    kinds = {
        "baseline": {},
        "live": {"teacher": "t", "method": "kd"},
        "cached": {"teacher": "t", "method": "kd", "teacher_outputs": "float16"},
    }
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        for extra in kinds.values():  # not in the store that is measured
            one(Run(**common | extra), data, teacher if extra else None, Path(folder) / "warm-up")
        for seed in range(args.runs):
            for kind, extra in kinds.items():
                run = Run(**common | extra, seed=seed)
                seconds[kind].append(one(run, data, teacher if extra else None, Path(folder) / "store"))
    plain = statistics.median(took for took, _ in seconds["baseline"])
    per_run = statistics.median(taught for _, taught in seconds["live"])
    once = seconds["cached"][0][1]
    distilled = statistics.median(took - taught for took, taught in seconds["cached"])
    rows = []
    for n in (p for p in POINTS if p <= args.runs):
        total = {kind: sum(took for took, _ in each[:n]) for kind, each in seconds.items()}
        model = {"live, model (s)": n * (distilled + per_run), "cached, model (s)": n * distilled + once}
        rows.append({"runs": n, **{f"{kind} (s)": value for kind, value in total.items()}, **model})
    say(f"{args.student} taught by {args.teacher}, {args.size} pixels, {args.epochs} epochs", rows)
    settings = {"baseline_s": plain, "distilled_s": distilled, "live_teacher_s": per_run, "cached_teacher_s": once, **vars(args)}
    print(save("amortise", rows, settings))


if __name__ == "__main__":
    main()
