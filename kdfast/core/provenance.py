"""What a record must say so that somebody can make it again: code, versions, machine. Imports nothing heavy."""

import hashlib
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
ROOT = PACKAGE.parent
NOTEBOOK = ROOT / "experiments" / "experiment.ipynb"
RUNS = ROOT / "runs" if NOTEBOOK.is_file() else Path("runs")  # every run of this checkout, shared by all studies
PLUGINS = ROOT / "plugins" if NOTEBOOK.is_file() else Path("plugins")  # a user's own methods and models, *.py
MEASURED = ("experiments/results", "benchmarks/results", "docs", "README.md")  # written from measurements
PACKAGES = ("torch", "torchvision", "fastai", "numpy", "scikit-learn", "pillow")


def plugins() -> list[Path]:
    """The files of the user's own methods and models, see `kdfast.core.code`."""
    return sorted(PLUGINS.glob("*.py"))


def digest(content) -> str:
    """16 hex digits of the SHA-256 of bytes or of an array's."""
    return hashlib.sha256(memoryview(content)).hexdigest()[:16]


def git_state(root: Path = ROOT) -> dict[str, str | bool | None]:
    """The commit, and whether tracked files differ from it but for what measurements write.

    Outside git the commit is what KDFAST_COMMIT names, for a copy of the sources on a machine that has no repository; or None.
    """

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno", "--", ".", *(f":!{path}" for path in MEASURED))
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": os.environ.get("KDFAST_COMMIT") or None, "dirty": False}


def versions() -> dict[str, str]:
    """Python's and the deciding packages' versions."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def hardware(device: str, threads: int) -> dict[str, str | int]:
    """The machine and how much of it a run used."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "device": device,
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    """The processor's own name: /proc/cpuinfo on Linux, Python's guess elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
