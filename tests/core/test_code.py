"""The hash of a run's code: what counts, and what does not."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from kdfast.core import code, provenance
from kdfast.core.code import code_hash, plugin_digests, plugin_packages


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of kdfast, of which the hashes are."""
    shutil.copytree(ROOT / "kdfast", tmp_path / "kdfast", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code, "PACKAGE", tmp_path / "kdfast")
    monkeypatch.setattr(code, "METHODS", tmp_path / "kdfast" / "distill" / "methods")
    return tmp_path / "kdfast"


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PLUGINS", tmp_path / "plugins")
    (tmp_path / "plugins").mkdir()
    return tmp_path / "plugins"


def edit(path, old, new):
    source = path.read_text()
    assert old in source
    path.write_text(source.replace(old, new))


def test_comments_docstrings_and_formatting_do_not_count(package):
    before = code_hash("kd")
    edit(package / "distill/losses/response.py", '"""T² · mean_i', '# a remark\n    """T² times mean_i')
    bare = "    def zero_grad(self) -> None:\n"
    edit(
        package / "distill/projector_training.py", bare, '    def zero_grad(\n        self,\n    ) -> None:\n        """New."""\n'
    )
    assert code_hash("kd") == before


def test_what_a_run_imports_counts_however_deep(package):
    before = code_hash("kd")
    edit(package / "core/rng.py", "torch.set_rng_state(states[0])", "torch.set_rng_state(states[0].clone())")
    deep = code_hash("kd")
    assert deep != before
    edit(package / "distill/losses/response.py", "T**2 * _kl", "T * _kl")
    assert code_hash("kd") != deep


def test_methods_that_a_run_does_not_use_and_what_reads_records_do_not_count(package):
    before = code_hash("kd"), code_hash("at")
    edit(package / "distill/methods/feature.py", "p=self.p", "p=self.p + 1")
    edit(package / "report/claims.py", "import pandas as pd", "import pandas as pd\nnew = 1")
    assert code_hash("kd") == before[0] and code_hash("at") != before[1]
    assert code_hash("kd+at") not in before


def test_the_place_of_a_module_does_not_count(package):
    before = code_hash("kd")
    (package / "core/rng.py").rename(package / "distill/generators.py")
    for path in package.rglob("*.py"):
        path.write_text(path.read_text().replace("kdfast.core.rng", "kdfast.distill.generators"))
    assert code_hash("kd") == before


def test_the_hash_covers_every_module_that_a_run_loads():
    script = "import sys, kdfast.experiment.runner; print(*[m for m in sys.modules if m.startswith('kdfast.')])"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    files = {code._path(name) for name in loaded} - {code._path("kdfast.models._torchvision"), code._path(code.RUN[0])}
    modules = {path for path in files if path.name != "__init__.py"}  # of packages, docstrings alone
    assert modules <= set(code._below(code._path(code.RUN[0])))


def test_a_plugin_counts_for_the_runs_that_use_it_and_no_others(plugins):
    before = code_hash("kd", ["resnet18"]), code_hash("mine"), code_hash("kd", ["my_net"])
    (plugins / "mine.py").write_text("from kdfast.all import register\n\n@register('mine')\nclass Mine: ...\n")
    (plugins / "net.py").write_text(
        "import timm, yaml\nfrom kdfast.all import register_model\nregister_model('my_net', 'f', None)\n"
    )
    assert code_hash("kd", ["resnet18"]) == before[0]
    assert code_hash("mine") != before[1] and code_hash("kd", ["my_net"]) != before[2]
    assert plugin_digests("mine").keys() == {"mine.py"} and plugin_digests("kd", ["my_net"]).keys() == {"net.py"}
    assert "pyyaml" in plugin_packages("kd", ["my_net"]) and not plugin_packages("mine")


def test_a_plugin_that_makes_up_its_names_counts_for_all(plugins):
    before = code_hash("kd")
    (plugins / "nets.py").write_text("for n in (1, 2):\n    register_model(f'net{n}', 'f', None)\n")
    assert code_hash("kd") != before
