"""The loader's share of a training step: `python benchmarks/loader.py`

Digits with the smallest student, and photos of 64 pixels (cropped and flipped) with resnet18 and mobilenet_v3_small.
"""

import argparse
import statistics

import torch

from benchmarks.common import interleaved, learner, photos, ratio, save, say, steps
from kdfast.all import load_data

LIMIT = 0.1


def measure(student: str, data, batch_size: int, augment: str, rounds: int) -> dict:
    """Milliseconds of a batch and of a step, and their ratio."""
    learn = learner(student, data, batch_size, augment=augment)
    batches = len(learn.dls.train)

    def loader() -> None:
        for _ in learn.dls.train:
            pass

    step = steps(learner(student, data, batch_size, augment=augment))
    times = interleaved({"loader": loader, "step": lambda: [step() for _ in range(batches)]}, rounds)
    return {
        "data": data.name,
        "student": student,
        "batch": batch_size,
        "augment": augment,
        "batch (ms)": 1e3 * statistics.median(times["loader"]) / batches,
        "step (ms)": 1e3 * statistics.median(times["step"]) / batches,
        "loader / step": ratio(times["loader"], times["step"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    digits, large = load_data("digits"), photos(320, 64)
    rows = [
        measure("mini_resnet_xs", digits, 64, "none", args.rounds),
        measure("resnet18", large, 64, "crop+flip", args.rounds),
        measure("mobilenet_v3_small", large, 64, "crop+flip", args.rounds),
    ]
    say("loader, one thread, no workers", rows)
    worst = max(row["loader / step"] for row in rows)
    print(f"loader / step: at most {worst:.3f}; asked for {LIMIT}: {'reached' if worst <= LIMIT else 'MISSED'}")
    print(save("loader", rows, {"limit": LIMIT, **vars(args)}))


if __name__ == "__main__":
    main()
