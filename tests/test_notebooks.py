"""The experiment notebook under the real papermill and as somebody opens it."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "experiments" / "experiment.ipynb"


def papermill(*args, cwd=ROOT):
    warm = [sys.executable, "-m", "kdfast.kernels.client", "papermill", *map(str, args), "-k", "kdfast-warm", "--no-progress-bar"]
    shown = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}  # agg would suppress the pictures
    return subprocess.run(warm, cwd=cwd, env=shown, capture_output=True, text=True)


def test_it_runs_from_top_to_bottom_with_its_defaults_and_shows_what_one_looks_at(tmp_path):
    start = time.time()
    done = papermill(NOTEBOOK, tmp_path / "out.ipynb", "-p", "runs", tmp_path / "runs")
    assert done.returncode == 0, done.stderr[-2000:]
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    pictures = [o for c in cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) >= 5  # samples, learning rate finder, curves, confusion matrix, worst mistakes
    assert time.time() - start < 240  # a minute is for a quiet machine
    assert len(list((tmp_path / "runs").glob("digits/*/record.json"))) == 1


def test_a_batch_run_draws_nothing_and_a_plain_papermill_call_works(tmp_path, image_folder):
    parameters = {"dataset": image_folder, "image_size": 8, "student": "mini_plain_xs", "epochs": 2, "batch_size": 16,
                  "explore": False, "runs": tmp_path / "runs"}  # fmt: skip
    given = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    done = subprocess.run([sys.executable, "-m", "papermill", NOTEBOOK, tmp_path / "out.ipynb", *given, "-k", "python3"],
                          cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "runs").glob("fruit-*/*/record.json"))) == 1
    assert "image/png" not in (tmp_path / "out.ipynb").read_text()


def test_parameters_are_listed_typed_and_explained():
    done = subprocess.run([sys.executable, "-m", "papermill", "--help-notebook", NOTEBOOK], capture_output=True, text=True)
    from kdfast.core.config import Run

    for name in [*Run.model_fields, "tracker", "runs", "explore"]:
        assert re.search(rf"^  {name}: (str|int|float|bool|dict|list) \(default .*\)", done.stdout, re.MULTILINE), name
    assert "temperature > 0" in done.stdout


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        (["studnet", "mini_resnet_s"], "unknown parameter 'studnet' in the notebook; the nearest known: student"),
        (["student", "mini_resnt_s"], "unknown model 'mini_resnt_s'"),
        (["lr", "fast"], "lr: input should be a valid number, not 'fast'"),
        (["method", "kd"], "method kd needs a teacher"),
    ],
)
def test_wrong_parameters_stop_before_anything_runs_with_one_sentence(tmp_path, parameters, said):
    done = papermill(NOTEBOOK, tmp_path / "out.ipynb", "-p", *parameters, "-p", "runs", tmp_path / "runs")
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1] or said in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "runs").exists()


def test_the_notebooks_defaults_are_those_of_a_run():
    from kdfast.core.config import Run

    source = next(
        "".join(cell["source"])
        for cell in json.loads(NOTEBOOK.read_text())["cells"]
        if "parameters" in cell["metadata"].get("tags", [])
    )
    given: dict = {}
    exec(source, given)  # assignments alone
    run = Run(**{name: given[name] for name in Run.model_fields})
    assert run == Run(student=given["student"])
