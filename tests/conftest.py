"""Folders of images, a small trained run, and a copy of the checkout to run workflows in."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; tests run side by side
os.environ.setdefault("MPLBACKEND", "agg")

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import kdfast  # noqa: F401  before torchvision

ROOT = Path(__file__).parents[1]


LONGEST = ("test_slurm", "test_snakemake", "test_failures", "test_distributed", "test_bad_inputs", "test_checkpoint")


def pytest_collection_modifyitems(items):
    """The files that take minutes begin, so that no process is left alone with one of them at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


def write_images(folder: Path, classes: dict[str, int], size: int = 12, seed: int = 0) -> Path:
    """Folders of noisy images whose mean colour tells the class; returns `folder`."""
    rng = np.random.default_rng(seed)
    for c, (name, n) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 120, (size, size + i % 3, 3))
            pixels[..., c % 3] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i:03d}.png")
    return folder


@pytest.fixture
def image_folder(tmp_path):
    """Three classes of 20 images."""
    return write_images(tmp_path / "fruit", {"apple": 20, "kiwi": 20, "plum": 20})


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder of runs with one finished teacher: mini_resnet_s on digits, seed 0, two epochs."""
    from kdfast.experiment.runner import Experiment

    folder = tmp_path_factory.mktemp("runs")
    finish(Experiment({"student": "mini_resnet_s", "epochs": 2}, folder))
    return folder


def finish(experiment):
    """All that the notebook does; returns the record."""
    experiment.load()
    experiment.learner()
    experiment.fit(progress=False)
    return experiment.finish()


def copy_checkout(target: Path) -> Path:
    """What a workflow needs of this checkout, elsewhere: sources, notebooks, studies, paper and what was measured, without runs
    and their records."""
    for part in ("kdfast", "experiments", "analysis", "paper"):
        shutil.copytree(ROOT / part, target / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copytree(ROOT / "benchmarks" / "results", target / "benchmarks" / "results")
    shutil.copy(ROOT / "pyproject.toml", target)
    return target
