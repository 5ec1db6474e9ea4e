"""What a record must say so that somebody can make it again: code, versions, machine. Imports nothing heavy."""

import ast
import hashlib
import json
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

PACKAGE = Path(__file__).parent
ROOT = PACKAGE.parent
NOTEBOOK = ROOT / "experiments" / "experiment.ipynb"
RUNS = ROOT / "runs" if NOTEBOOK.is_file() else Path("runs")  # every run of this checkout, shared by all studies
# The modules that can change the outcome of a run: what training and evaluation import. Analysis and workflow are left
# out, so that a new figure does not make hours of training look outdated.
RUN_MODULES = (
    "adapters", "augment", "catalogue", "checkpoint", "cifar", "companion", "data", "datasets", "distill", "evaluation",
    "experiment", "hooks", "images", "knowledge", "layers", "losses", "method", "methods", "models", "pretrained", "processes",
    "randomness", "recipe", "splits", "store", "taps", "teacher", "trackers", "training",
)  # fmt: skip
PLUGINS = ROOT / "plugins" if NOTEBOOK.is_file() else Path("plugins")  # a user's own methods and models, *.py
MEASURED = ("experiments/results", "benchmarks/results", "docs", "README.md")  # written from measurements
PACKAGES = ("torch", "torchvision", "fastai", "numpy", "scikit-learn", "pillow")


def plugins() -> list[Path]:
    """The files of the user's own methods and models, which are part of every run's code."""
    return sorted(PLUGINS.glob("*.py"))


def digest(content) -> str:
    """16 hex digits of the SHA-256 of bytes or of an array's."""
    return hashlib.sha256(memoryview(content)).hexdigest()[:16]


def code_hash(package: Path = PACKAGE, notebook: Path | None = NOTEBOOK, modules: tuple[str, ...] = RUN_MODULES) -> str:
    """12 hex digits over the notebook's code cells, the plugins and the modules that can change a run's outcome.

    Comments, docstrings and formatting do not count: a module is hashed by its syntax tree.
    """
    hasher = hashlib.sha256()
    for path in [*(package / f"{name}.py" for name in modules), *plugins()]:
        hasher.update(_syntax(path, path.stat().st_mtime_ns))
    if notebook is not None and notebook.is_file():
        for cell in json.loads(notebook.read_text())["cells"]:
            if cell["cell_type"] == "code":
                hasher.update("".join(cell["source"]).encode())
    return hasher.hexdigest()[:12]


@cache
def _syntax(path: Path, changed: int) -> bytes:
    """Digest of a module as it was at that time, without its docstrings; a run asks for several hashes of the same files.

    Not of what Python compiles: there a docstring leaves a trace even when it is stripped.
    """
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree).encode()).digest()


def git_state(root: Path = ROOT) -> dict[str, str | bool | None]:
    """The commit, and whether tracked files differ from it but for what measurements write; None and False outside git."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno", "--", ".", *(f":!{path}" for path in MEASURED))
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": False}


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
