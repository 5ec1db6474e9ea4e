"""Does mixed precision, channels_last or torch.compile pay on this device? `python -m benchmarks.options`

A training step of a student alone with each option relative to none of them; compiling is over before the timing.
"""

import argparse
import statistics

import torch

from benchmarks.common import interleaved, photos, ratio, save, say, steps
from kdfast.all import create_learner, load_data
from kdfast.core.config import Run

OPTIONS = {
    "none": {},
    "bfloat16": {"precision": "bfloat16"},
    "channels_last": {"channels_last": True},
    "compile": {"compile": True},
}


def measure(student: str, data, batch_size: int, rounds: int, options: dict[str, dict]) -> list[dict]:
    things = {}
    for name, extra in options.items():
        learn = create_learner(Run(student=student, batch_size=batch_size, **extra), data)
        learn.remove_cbs([cb for cb in learn.cbs if cb.name in ("progress", "stop_on_na_n", "keep_best")])
        things[name] = steps(learn)
    times = interleaved(things, rounds, each=3, warm_up=4)
    return [
        {
            "student": student,
            "pixels": data.size,
            "option": name,
            "ms": 1e3 * statistics.median(t),
            "/ none": ratio(t, times["none"]),
        }
        for name, t in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    large = photos(160, 64)
    rows = []
    for student in ("resnet18", "mobilenet_v3_small"):
        rows += measure(student, large, 16, args.rounds, OPTIONS)
    few_channels = {name: extra for name, extra in OPTIONS.items() if name != "channels_last"}  # see the README's known limits
    rows += measure("mini_resnet_xs", load_data("digits"), 64, args.rounds, few_channels)
    say("options, one thread", rows)
    print(save("options", rows, vars(args)))


if __name__ == "__main__":
    main()
