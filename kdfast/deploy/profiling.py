"""What a network costs to run: parameters, operations, size, memory, latency and throughput, in torch and as exported.

`python -m kdfast.deploy.profiling resnet18 --image-size 64 --classes 10 --out resnet18.json`, with nothing else on the machine.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from kdfast.core.errors import KdfastError
from kdfast.deploy.memory import inferring, noise, peaks
from kdfast.models.flops import flops
from kdfast.models.registry import count_parameters, create_model


@dataclass(frozen=True)
class Settings:
    """How it is measured."""

    warm_up: int = 3  # calls before each timing
    repeats: int = 20  # blocks of calls timed for latency, at least
    batch_repeats: int = 3  # for throughput
    min_run_time: float = 2.0  # seconds of timing, at least
    largest_batch: int = 64  # tried for throughput
    train_batch: int = 32  # images a training step whose memory is measured
    steps: int = 4  # forwards or training steps after which memory is read
    processes: int = 3  # of whose peak memory the median is taken
    calibration: int = 32  # images of noise with which int8 is calibrated
    threads: int = 0  # that "all threads" means; 0: torch's number here


def measure(name: str, n_classes: int, image_size: int, settings: Settings = Settings()) -> dict[str, Any]:
    """What one architecture costs, with random weights, as plain JSON values; nothing else may run meanwhile.

    `parameters`; `flops` of one image; `bytes` of the file of weights (torch: safetensors) or network (onnx, int8);
    `peak_bytes`: see `kdfast.deploy.memory.peaks`; `speed`: see `_speed`, a row for each runtime, device and number of threads;
    `exported`: how int8 was made and by how much an ONNX logit differs from torch's at most, or the obstacle.
    """
    model = _network(name, n_classes, image_size)
    with TemporaryDirectory() as folder:
        files, exported = _export(model, image_size, Path(folder), settings)
        return {
            "name": name, "classes": n_classes, "image_size": image_size, "parameters": count_parameters(model),
            "flops": flops(name, n_classes, image_size), "exported": exported,
            "bytes": {"torch": len(save(model.state_dict()))} | {kind: path.stat().st_size for kind, path in files.items()},
            "peak_bytes": peaks((name, n_classes, image_size), files, settings.train_batch, settings.steps, settings.processes),
            "speed": _speeds(model, image_size, files, settings), "settings": asdict(settings),
        }  # fmt: skip


def _export(model: nn.Module, image_size: int, folder: Path, s: Settings) -> tuple[dict[str, Path], dict[str, Any]]:
    """The network as ONNX files, and what became of it; no files where ONNX cannot express it."""
    from kdfast.deploy.onnx import runner, write_int8, write_onnx  # not for those who count operations

    files, images = {kind: folder / f"{kind}.onnx" for kind in ("onnx", "int8")}, noise(s.calibration, image_size)
    try:
        write_onnx(model, (image_size, image_size), files["onnx"])
    except KdfastError as error:
        return {}, {"obstacle": str(error)}
    int8, few = write_int8(files["onnx"], files["int8"], images), images[:4]
    with torch.inference_mode():
        return files, {"int8": int8, "difference": (model(few) - runner(files["onnx"])(few)).abs().max().item()}


def _network(name: str, n_classes: int, image_size: int) -> nn.Module:
    """Random weights, and statistics of noise in the normalisations, so that numbers are of the usual size."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = create_model(name, n_classes, image_size)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = None  # the mean of all batches: here of one
        model.train()(noise(8, image_size))
    return model.eval()


# Time


def _speeds(model: nn.Module, image_size: int, files: dict[str, Path], s: Settings) -> list[dict[str, Any]]:
    from kdfast.deploy.onnx import runner

    def on_cpu(path: Path | None, threads: int) -> dict[str, Any]:
        network = inferring(model) if path is None else runner(path, threads)
        return {"threads": threads, "device": "cpu"} | _speed(network, image_size, threads, s)

    counts = sorted({1, s.threads or torch.get_num_threads()})
    kinds = {"torch": None, **files}
    rows = [{"runtime": kind, **on_cpu(path, threads)} for kind, path in kinds.items() for threads in counts]
    if torch.cuda.is_available():  # Timer waits for it
        found = _speed(inferring(model.to("cuda")), image_size, 1, s, "cuda")
        rows.append({"runtime": "torch", "threads": 1, "device": torch.cuda.get_device_name(), **found})
        model.to("cpu")
    return rows


def _speed(network: Callable[[Tensor], Any], image_size: int, threads: int, s: Settings, device: str = "cpu") -> dict[str, Any]:
    """`latency_s` at batch 1: `median` and `p95` over `blocks` of calls, seconds a call; `by_batch`: images a second at 1, 2, 4,
    … until they fall by more than 5 %; `throughput`: the best of these."""
    by_batch: dict[str, float] = {}
    batch = 1
    while batch <= s.largest_batch and (batch == 1 or by_batch[str(batch // 2)] >= 0.95 * max(by_batch.values())):
        call = partial(network, noise(batch, image_size).to(device))
        times = _times(call, threads, s, s.repeats if batch == 1 else s.batch_repeats)
        if batch == 1:
            latency = {"median": median(times), "p95": float(np.percentile(times, 95)), "blocks": len(times)}
        by_batch[str(batch)] = batch / median(times)
        batch *= 2
    best = max(by_batch, key=by_batch.__getitem__)
    throughput = {"batch": int(best), "images_per_s": by_batch[best]}
    return {"latency_s": latency, "throughput": throughput, "by_batch": by_batch}


def _times(call: Callable[[], Any], threads: int, s: Settings, repeats: int) -> list[float]:
    """Seconds a call in each block of calls, after a warm-up; torch works with so many threads."""
    timer = Timer("call()", globals={"call": call}, num_threads=threads)
    timer.timeit(s.warm_up)
    times: list[float] = []
    while len(times) < repeats:
        times += timer.blocked_autorange(min_run_time=s.min_run_time).times
    return times


def main(argv: list[str] | None = None) -> None:
    from kdfast.core.code import code_hash
    from kdfast.core.files import write_atomically
    from kdfast.core.provenance import git_state, hardware, versions

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", help="of the architecture, see kdfast.all.model_names()")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--image-size", type=int, default=32, help="side in pixels")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    for field in fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, default=field.default)
    args = parser.parse_args(argv)
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    try:
        found = measure(args.name, args.classes, args.image_size, settings)
    except KdfastError as error:
        raise SystemExit(f"kdfast: {error}") from None
    found |= {
        "hardware": hardware(device, settings.threads or torch.get_num_threads()),
        "packages": versions() | {package: version(package) for package in ("onnx", "onnxruntime")},
        "code": {"hash": code_hash(roots=("kdfast.deploy.profiling",), notebook=None), **git_state()},
    }
    write_atomically(args.out, (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())


if __name__ == "__main__":
    main()
