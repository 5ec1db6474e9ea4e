"""How much memory a network needs at most, each measured in a process of its own, one thread, on Linux.

`python -m kdfast.deploy.memory training resnet18 10 64 32 4` prints the bytes of 4 steps on 32 images of 64
pixels and 10 classes.
"""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.models.registry import create_model

Size = tuple[str, int, int]  # architecture, number of classes, side of the images in pixels


def noise(n: int, image_size: int) -> Tensor:
    """The same `n` normalised images (n, 3, image_size, image_size) each time."""
    return torch.randn(n, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))


def inferring(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A network's forward in torch's inference mode."""
    return torch.inference_mode()(model.forward)


def peaks(size: Size, files: dict[str, Path], train_batch: int, steps: int, processes: int) -> dict[str, int]:
    """Bytes beyond what a process holds after its imports, each the median of so many processes; {} where there is no /proc.

    Of `inference` at batch 1, of `training` with AdamW at `train_batch`, of each ONNX file at batch 1 by its name. With CUDA, of
    `cuda_inference` and `cuda_training` what torch allocates there.
    """
    if not Path("/proc/self/clear_refs").exists():
        return {}
    words = [*map(str, size), str(train_batch), str(steps)]

    def peak(what: str) -> int:
        command = [sys.executable, "-m", "kdfast.deploy.memory", what, *words]
        run = partial(subprocess.run, command, check=True, stdout=subprocess.PIPE)
        return int(median(int(run().stdout.split()[-1]) for _ in range(processes)))

    kinds = ["inference", "training"] + ["cuda_inference", "cuda_training"] * torch.cuda.is_available()
    return {kind: peak(kind) for kind in kinds} | {kind: peak(str(path)) for kind, path in files.items()}


def peak_here(what: str, size: Size, train_batch: int, steps: int) -> int:
    """Bytes that this process needs at most for [cuda_]inference, [cuda_]training or an ONNX file, beyond what it holds now."""
    torch.set_num_threads(1)
    begun, make = _begin(what, size, train_batch)
    step = make()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here: what making the network took is no part of it
    for _ in range(steps):
        step()
    return torch.cuda.max_memory_allocated() if what.startswith("cuda") else _memory("VmHWM") - begun


def _begin(what: str, size: Size, train_batch: int) -> tuple[int, Callable[[], Callable[[], Any]]]:
    """The bytes held after the imports, and what makes a function that does one step."""
    name, n_classes, image_size = size
    if what.endswith(".onnx"):
        from kdfast.deploy.onnx import runner

        return _memory("VmRSS"), lambda: partial(runner(Path(what)), noise(1, image_size))
    device = "cuda" if what.startswith("cuda") else "cpu"

    def make() -> Callable[[], Any]:
        model = create_model(name, n_classes, image_size).to(device)
        if what.endswith("training"):
            return _training(
                model, noise(train_batch, image_size).to(device), torch.arange(train_batch, device=device) % n_classes
            )
        return partial(inferring(model.eval()), noise(1, image_size).to(device))

    return _memory("VmRSS"), make


def _training(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _memory(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    what, name, *numbers = sys.argv[1:]
    n_classes, image_size, train_batch, steps = map(int, numbers)
    print(peak_here(what, (name, n_classes, image_size), train_batch, steps))
