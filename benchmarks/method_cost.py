"""What each method costs per training step, relative to training without a teacher: `python -m benchmarks.method_cost`

One thread, mini_resnet_xs taught by a live mini_resnet_m on 8×8 digits (--student, --teacher, --size change that).
"""

import argparse
import statistics

import torch

from benchmarks.common import interleaved, learner, ratio, save, say, steps
from kdfast.all import Distill, Teacher, create_method, create_model, load_data, method_names

BASELINE = "baseline"


def measure(args: argparse.Namespace) -> list[dict]:
    """Milliseconds a step and ratios to plain training, by method."""
    data = load_data("digits", args.size)
    teacher = create_model(args.teacher, len(data.classes), data.size)
    methods = [BASELINE, *(args.methods or method_names())]
    things = {}
    for method in methods:
        cbs = [] if method == BASELINE else [Distill(Teacher(teacher), create_method(method, {}))]
        things[method] = steps(learner(args.student, data, args.batch_size, cbs))
    times = interleaved(things, args.rounds, args.steps, warm_up=3)
    return [{"method": m, "ms": 1e3 * statistics.median(t), "/ baseline": ratio(t, times[BASELINE])} for m, t in times.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", default="mini_resnet_xs")
    parser.add_argument("--teacher", default="mini_resnet_m")
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--methods", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(args)
    say(f"{args.student} taught by {args.teacher}, {args.size} pixels, batches of {args.batch_size}, one thread", rows)
    print(save("method_cost", rows, vars(args)))


if __name__ == "__main__":
    main()
