"""The repository itself: one set of pins, notebooks without outputs, a code hash that sees what it should."""

import re
import subprocess
import tomllib
from itertools import chain

import grimp
import nbformat
import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kdfast.core import provenance

NOTEBOOKS = sorted([*ROOT.glob("experiments/*.ipynb"), *ROOT.glob("analysis/*.ipynb")])


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
WANTED = [
    Requirement(line) for line in chain(PROJECT["dependencies"], *(EXTRAS[name] for name in ("paper", "track", "export", "dev")))
]


def pins(lines: list[str]) -> dict[str, str]:
    """Version by name; every line pins one package exactly."""
    found = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines if not line.startswith(("#", "-e"))]
    assert all(found), lines
    return {canonicalize_name(name): version for name, version in (match.groups() for match in found)}


REQUIREMENTS = pins((ROOT / "requirements.txt").read_text().splitlines())


def test_what_the_benchmarks_compare_with_is_pinned_exactly():
    assert pins(EXTRAS["bench"])


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_pip_gets_lower_bounds_and_make_a_pin_that_they_allow(wanted):
    assert [spec.operator for spec in wanted.specifier] == [">="]
    assert wanted.specifier.contains(REQUIREMENTS[canonicalize_name(wanted.name)])


def test_conda_gets_the_same_pins_of_what_is_named():
    pip = next(d["pip"] for d in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"] if isinstance(d, dict))
    names = [canonicalize_name(wanted.name) for wanted in WANTED]
    assert pins(pip) == {name: REQUIREMENTS[name] for name in names}


def test_no_two_modules_import_each_other_by_whatever_detour():
    graph = grimp.build_graph("kdfast", cache_dir=None)
    imports = [(one, other) for one in sorted(graph.modules) for other in sorted(graph.find_modules_directly_imported_by(one))]
    assert ("kdfast.all", "kdfast.distill.callback") in imports
    assert [pair for pair in imports if graph.chain_exists(importer=pair[1], imported=pair[0])] == []


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
