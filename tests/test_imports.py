"""What an import brings with it: planning no torch, the library no optional package, Python's start the hook for torchvision."""

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT

from kdfast.core import extras
from kdfast.core.errors import KdfastError
from kdfast.study.snakemake import snakemake

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
MODULES = {
    "paper": ["accelerate", "ipykernel", "jupyterlab", "nbconvert", "notebook", "papermill", "seaborn", "snakemake",
              "snakemake_executor_plugin_cluster_generic", "snakemake_executor_plugin_slurm", "statsmodels"],
    "track": ["tensorboard", "wandb"],
    "export": ["onnx", "onnxruntime"],
}  # fmt: skip
OPTIONAL = [name for names in MODULES.values() for name in names]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def modules(package: str) -> list[str]:
    return [f"kdfast.{package}.{path.stem}" for path in sorted(ROOT.glob(f"kdfast/{package}/[a-z]*.py"))]


@pytest.mark.parametrize("names", [
    [name for name in modules("core") if name != "kdfast.core.rng"],
    modules("stats"),
    ["kdfast.study.study_file", "kdfast.study.plan", "kdfast.study.snakemake", "kdfast.__main__"],
], ids=["core", "stats", "planning"])  # fmt: skip
def test_records_statistics_and_planning_need_no_torch(names):
    """One after the other, so that the first that brings it is named."""
    heavy = "[m for m in ('torch', 'fastai', 'torchvision') if m in sys.modules]"
    python("import sys\n" + "\n".join(f"import {name}; assert not {heavy}, '{name}'" for name in names))


def test_the_library_needs_no_optional_package_and_may_be_imported_before_fastai():
    assert {name.replace("_", "-") for name in OPTIONAL} | {"matplotlib"} == {  # which comes with fastai
        line.partition(">=")[0] for extra in MODULES for line in EXTRAS[extra]
    }
    not_installed = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))\n"
    python(not_installed + "from kdfast.all import *\nimport kdfast.__main__, kdfast.losses\nfrom fastai.vision.all import *")


def put_pth(folder: Path) -> str:
    """Installs it there; returns code that does what Python does when it starts."""
    (folder / "kdfast_torchvision.pth").write_text((ROOT / "kdfast" / "models" / "_torchvision.pth").read_text())
    return f"import site, sys; site.addsitedir({str(folder)!r}); assert 'kdfast' not in sys.modules\n"


def test_fastai_may_be_imported_before_an_installed_kdfast(tmp_path):
    """Its .pth is read when Python starts, and must not import kdfast then."""
    python(put_pth(tmp_path) + "from fastai.vision.all import *\nfrom kdfast.all import *\nvision_learner, Distill, DKD")


@pytest.mark.parametrize("package", ["none", "other"])
def test_python_starts_without_a_word_where_kdfast_is_gone_or_has_no_hook(tmp_path, package):
    if package == "other":
        (tmp_path / "kdfast").mkdir()
        (tmp_path / "kdfast" / "__init__.py").touch()
    command = [sys.executable, "-I", "-S", "-c", put_pth(tmp_path)]  # no other kdfast is found
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_module_is_included_by_force():
    """Which would move it out of the package, see hatch."""
    wheel = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert not any(path.endswith(".py") for path in wheel["force-include"])


def test_whoever_only_looks_for_torchvision_loads_no_torch():
    seen = "bool(find_spec('torchvision')), 'torch' in sys.modules"
    assert python(f"import kdfast, sys\nfrom importlib.util import find_spec\nprint({seen})") == "True False"


@pytest.mark.parametrize("extra, package, module", [
    ("export", "onnx", "kdfast.deploy.onnx"),
    ("export", "onnxruntime", "kdfast.deploy.onnx"),
    ("paper", "seaborn", "kdfast.report.figures"),
    ("paper", "statsmodels", "kdfast.stats.paired"),
])  # fmt: skip
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, extra, package, module):
    for name in [name for name in sys.modules if name == module or name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(KdfastError) as error:
        import_module(module)
    assert str(error.value) == f'{package} is not installed, which this needs: pip install "kdfast[{extra}]"'


def test_a_study_without_snakemake_is_refused_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "snakemake" else name)
    with pytest.raises(KdfastError, match=r'snakemake is not installed.*"kdfast\[paper\]"'):
        snakemake(["digits"], "runs", [])
