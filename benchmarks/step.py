"""What a teacher costs per training step: live, stored, and with fasterai's callback. `python benchmarks/step.py`

A resnet18 student at 64 pixels and four teachers, one thread. Each round times every kind of step once; ratios are
medians over rounds. fasterai (PyPI) is asked to do the same: one forward of the teacher a step and KD at weight 0.9.
"""

import argparse
import tempfile

import torch

from benchmarks.common import interleaved, learner, photos, ratio, save, say, steps
from kdfast.all import KD, Cached, Distill, Teacher, create_model

LIMITS = {"cached / baseline": 1.05, "live / (baseline + teacher)": 1.05, "live / fasterai": 0.55, "cached / fasterai": 0.33}


def fasterai(teacher: torch.nn.Module) -> list:
    """fasterai's callback with its own soft-target loss at KD's temperature and weight."""
    from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
    from fasterai.distill.losses import SoftTarget

    return [KnowledgeDistillationCallback(teacher.eval(), SoftTarget, weight=0.9)]


def measure(name: str, args: argparse.Namespace) -> dict:
    """Milliseconds a step and the ratios, for one teacher."""
    data = photos(args.batch_size * 5, args.size)
    teacher = create_model(name, len(data.classes), data.size).to(args.device)
    batch = data.images[: args.batch_size].to(args.device).float() / 255
    live = Teacher(teacher, chunk=args.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        kinds = {
            "baseline": [],
            "cached": [Distill(live, KD(), cached=Cached(folder))],
            "live": [Distill(live, KD())],
            "fasterai": fasterai(create_model(name, len(data.classes), data.size).to(args.device)),
        }
        things = {
            kind: steps(learner(args.student, data, args.batch_size, cbs, device=args.device)) for kind, cbs in kinds.items()
        }
        things["teacher"] = lambda: live.outputs((batch,))
        times = interleaved(things, args.rounds)
    return {
        "teacher": name,
        **{f"{kind} (ms)": 1e3 * sorted(t)[len(t) // 2] for kind, t in times.items()},
        "cached / baseline": ratio(times["cached"], times["baseline"]),
        "live / baseline": ratio(times["live"], times["baseline"]),
        "live / (baseline + teacher)": ratio(times["live"], times["baseline"], times["teacher"]),
        "fasterai / baseline": ratio(times["fasterai"], times["baseline"]),
        "live / fasterai": ratio(times["live"], times["fasterai"]),
        "cached / fasterai": ratio(times["cached"], times["fasterai"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--teachers", nargs="*", default=["resnet50", "densenet169", "swin_s", "regnet_y_16gf"])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(name, args) for name in args.teachers]
    say(f"{args.student}, {args.size} pixels, batches of {args.batch_size}, {args.device}", rows)
    for what, limit in LIMITS.items():
        worst = max(row[what] for row in rows)
        print(f"{what}: at most {worst:.3f}; asked for {limit}: {'reached' if worst <= limit else 'MISSED'}")
    print(save("step" if args.device == "cpu" else f"step_{args.device}", rows, vars(args) | {"limits": LIMITS}, args.device))


if __name__ == "__main__":
    main()
