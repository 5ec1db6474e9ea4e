"""What the benchmarks share: interleaved timing, learners, and results as JSON with the machine they were measured on."""

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper

from kdfast.all import create_model, dataloaders, set_seed
from kdfast.core.code import code_hash
from kdfast.core.provenance import git_state, hardware, versions
from kdfast.data.loaders import ImageData

RESULTS = Path(__file__).parent / "results"


def photos(n: int, size: int, classes: int = 10, seed: int = 0) -> ImageData:
    """`n` made-up images (noise: time does not depend on content), four fifths of them for training."""
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    index, names = torch.arange(n), tuple(f"class {c}" for c in range(classes))
    splits = {"train": index[: n * 4 // 5], "valid": index[n * 4 // 5 : n * 9 // 10], "test": index[n * 9 // 10 :]}
    return ImageData(f"noise{size}", images, index % classes, names, tuple(map(str, index.tolist())), splits, "in order")


def learner(student: str, data: ImageData, batch_size: int, cbs=(), augment: str = "none", device: str = "cpu") -> Learner:
    """A Learner as kdfast's runs have it, without the callbacks of a record and without progress bars."""
    set_seed(0)
    dls = dataloaders(data, batch_size, augment, device=device)
    optimizer = partial(OptimWrapper, opt=partial(torch.optim.AdamW, fused=True))
    model = create_model(student, len(data.classes), data.size)
    learn = Learner(dls, model, CrossEntropyLossFlat(), optimizer, cbs=list(cbs))
    learn.remove_cbs(learn.cbs.filter(lambda cb: isinstance(cb, ProgressCallback)))
    return learn


def steps(learn: Learner, wait: bool = True) -> Callable[[], None]:
    """A function that does the next training step, the cutting of its batch included, of a fit that never ends.

    With `wait` it returns when a GPU has done it, else when it is queued.
    """
    learn.create_opt()
    learn.n_epoch = learn.n_iter = 1
    learn.dl = learn.dls.train
    learn("before_fit")
    learn.epoch, learn.n_iter = 0, len(learn.dls.train)
    learn("before_epoch")
    learn("before_train")
    batches = _forever(learn)

    def step() -> None:
        learn.one_batch(0, next(batches))
        if wait:
            synchronize()

    return step


def _forever(learn: Learner) -> Iterator:
    while True:
        yield from learn.dls.train


def synchronize() -> None:
    """Wait for the GPU, if there is one in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def interleaved(things: dict[str, Callable[[], Any]], rounds: int, each: int = 1, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds a call, by name, one value a round; in each round everything is timed once, in a random order.

    Other load on the machine then falls on all of them: compare within a round.
    """
    for thing in things.values():
        for _ in range(warm_up):
            thing()
    order, times = random.Random(0), {name: [] for name in things}
    for _ in range(rounds):
        for name in order.sample(list(things), len(things)):
            start = time.perf_counter()
            for _ in range(each):
                things[name]()
            times[name].append((time.perf_counter() - start) / each)
    return times


def ratio(above: list[float], *below: list[float]) -> float:
    """Median over rounds of one time over the sum of others."""
    return statistics.median(a / sum(b) for a, *b in zip(above, *below, strict=True))


def say(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table, on its side where it has many columns."""
    table = pd.DataFrame(rows).map(lambda v: f"{v:.3g}" if isinstance(v, float) else v)
    print(f"\n{title}")
    print(table.T.to_string(header=False) if table.shape[1] > 8 else table.to_string(index=False))


def save(name: str, rows: list[dict[str, Any]], settings: dict[str, Any], device: str = "cpu") -> Path:
    """Write results with settings, machine, versions and code to benchmarks/results/<name>.json."""
    found = {
        "name": name, "settings": settings, "rows": rows, "hardware": hardware(device, torch.get_num_threads()),
        "packages": versions(), "code": {"hash": code_hash(), **git_state()}, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path
