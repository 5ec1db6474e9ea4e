"""The repository itself: one set of pins, notebooks without outputs, a code hash that sees what it should."""

import subprocess
import sys
import tomllib

import nbformat
import pytest
import yaml
from conftest import ROOT

from kdfast.core import provenance

NOTEBOOKS = sorted([*ROOT.glob("experiments/*.ipynb"), *ROOT.glob("analysis/*.ipynb")])


def direct_pins() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {*project["dependencies"], *project["optional-dependencies"]["dev"]}


def test_what_the_benchmarks_compare_with_is_pinned_exactly():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert all("==" in pin for pin in project["optional-dependencies"]["bench"])


def test_every_direct_dependency_is_pinned_exactly():
    assert all("==" in pin for pin in direct_pins())


def test_requirements_hold_the_same_pins():
    lines = {line.lower() for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")}
    assert {pin.lower() for pin in direct_pins()} <= lines
    assert all("==" in line for line in lines)


def test_conda_users_get_the_same_pins():
    pip = next(d["pip"] for d in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"] if isinstance(d, dict))
    assert {line for line in pip if not line.startswith("-e")} == direct_pins()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_committed_without_outputs(path):
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert cells and not any(cell.outputs or cell.execution_count for cell in cells)


def test_notebook_cells_are_short():
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, 4).cells:
            listed = "parameters" in cell.metadata.get("tags", [])  # a line each
            assert listed or len(cell.source.splitlines()) <= 20, f"{path.name}: {cell.source[:60]}"


def test_code_is_changed_by_sources_and_not_by_what_measurements_write(tmp_path):
    sources, measured = (
        ("kdfast/distill/losses.py", "experiments/studies/one.yaml"),
        ("docs/speed.md", "experiments/results/one.json", "README.md"),
    )
    for name in (*sources, *measured):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("as committed")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    for name in (*sources, *measured):
        (tmp_path / name).write_text("changed")
        assert provenance.git_state(tmp_path)["dirty"] == (name in sources), name
        (tmp_path / name).write_text("as committed")


def test_torchvision_imports_beside_this_torch_whoever_asks_first():
    import subprocess

    for code in ("import kdfast, torchvision", "import kdfast; from fastai.vision.all import *", "from kdfast.all import *"):
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
