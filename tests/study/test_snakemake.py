"""A small study through the real Snakemake, papermill and forked kernels, from its file to its PDF."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import yaml
from conftest import ROOT, copy_checkout, finish

from kdfast.core.errors import KdfastError
from kdfast.experiment.runner import Experiment
from kdfast.study import plan, snakemake

SMALL = {
    "title": "Small & quick_study",
    "seeds": [0, 1],
    "training": {"epochs": 1},
    "teachers": ["mini_resnet_s", "mini_plain_s"],
    "students": ["mini_resnet_xs"],
    "methods": [{"name": "kd", "args": {"T": 4, "alpha": 0.5}}],
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    root = copy_checkout(tmp_path_factory.mktemp("workflow") / "checkout")
    write_study(root, SMALL)
    return root


def write_study(root, study, name="small"):
    (root / "experiments" / "studies" / f"{name}.yaml").write_text(yaml.safe_dump(study))


def command(*args):
    return [sys.executable, "-m", "kdfast", *args]


def kdfast(root, *args, code=0):
    done = subprocess.run(command(*args), cwd=root, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def records(root):
    """Each finished run and when its record was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (root / "runs").glob("*/*/record.json")}


def status(root):
    lines = kdfast(root, "status", "--study", "small").splitlines()
    cells = [[c.strip() for c in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    return {state: int(n) for state, n in cells}


@pytest.fixture(scope="module")
def finished(checkout):
    """The small study, killed on the way and finished by a second call."""
    process = subprocess.Popen(command("reproduce", "--study", "small"), cwd=checkout, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.time() + 120
    while len(records(checkout)) < 3 and time.time() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = records(checkout)
    output = kdfast(checkout, "reproduce", "--study", "small")
    return before, output


def test_a_killed_study_is_finished_by_the_same_command_without_retraining_finished_runs(checkout, finished):
    before, _ = finished
    after = records(checkout)
    assert 3 <= len(before) < 10 and len(after) == 10
    assert {run: after[run] for run in before} == before
    assert (checkout / "build" / "small" / "paper.pdf").read_bytes().startswith(b"%PDF")


def test_progress_counts_runs_and_names_the_paper(finished):
    _, output = finished
    assert "10/10" in output and "11/11" in output
    assert "build/small/paper.pdf" in output


def test_every_run_leaves_record_weights_predictions_and_executed_notebook(checkout, finished):
    for folder in (checkout / "runs" / "digits").iterdir():
        names = {path.name for path in folder.iterdir()} - {"experiment.ipynb.err"}  # of a killed run, if any
        assert names == {"record.json", "weights.safetensors", "predictions.npz", "experiment.ipynb"}


def test_answers_of_each_teacher_were_stored_once_for_all_its_students(checkout, finished):
    stored = list((checkout / "runs" / ".teacher_outputs").rglob("*.safetensors"))
    assert len(stored) == 2 * 2 * 2  # two teachers, two seeds, train and test
    said = kdfast(checkout, "cache")
    assert len(re.findall(r"mini_plain_s\.baseline\.s[01]-\w{8}\.digits\.train", said)) == 2 and "MB of at most 20,000" in said


def test_the_longest_runs_start_first_and_teachers_before_their_students(checkout, finished):
    code = """
import json
from kdfast.study.plan import plan
made = plan(["small"], "runs")
print(json.dumps({folder: [place, made.runs[folder].teacher] for folder, place in made.priorities.items()}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=True)
    places = {folder.split("/")[1]: value for folder, value in json.loads(done.stdout).items()}
    assert all(places[teacher][0] > place for place, teacher in places.values() if teacher)
    assert (
        min(p for run, (p, _) in places.items() if ".baseline." in run and "_s." in run)
        > places[next(run for run in places if run.startswith("mini_resnet_xs.baseline"))][0]
    )


def test_students_learned_from_the_teacher_of_their_seed(checkout, finished):
    for path in (checkout / "runs" / "digits").glob("*.kd.*/record.json"):
        record = json.loads(path.read_text())
        teacher = json.loads((path.parents[1] / record["teacher"]["run"] / "record.json").read_text())
        assert teacher["parameters"]["seed"] == record["parameters"]["seed"]
        assert teacher["model"]["weights_sha256"] == record["teacher"]["weights_sha256"]


def test_a_second_call_does_nothing(checkout, finished):
    before, pdf = records(checkout), (checkout / "build/small/paper.pdf").stat().st_mtime_ns
    kdfast(checkout, "reproduce", "--study", "small")
    assert records(checkout) == before and (checkout / "build/small/paper.pdf").stat().st_mtime_ns == pdf


def test_the_paper_is_the_same_to_the_byte_when_built_again(checkout, finished):
    pdf = checkout / "build" / "small" / "paper.pdf"
    before = pdf.read_bytes()
    kdfast(checkout, "reproduce", "--study", "small", "--", "--forcerun", "analysis", "paper")
    assert pdf.read_bytes() == before


def test_released_records_make_the_paper_without_training(checkout, finished):
    assert "10 records copied" in kdfast(checkout, "release", "--study", "small")
    (checkout / "runs").rename(checkout / "elsewhere")
    try:
        kdfast(checkout, "paper", "--study", "small")
        assert (checkout / "build" / "paper.pdf").read_bytes().startswith(b"%PDF")
        assert not (checkout / "runs").exists()
    finally:
        (checkout / "elsewhere").rename(checkout / "runs")


def test_what_was_not_run_again_stays_as_it_was_released(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "STUDIES", tmp_path)
    runs = []
    for seeds in ("[0]", "[0, 1]"):
        (tmp_path / "s.yaml").write_text(f"{{title: s, seeds: {seeds}, training: {{epochs: 1}}, students: [mini_resnet_xs]}}")
        seed = len(runs)
        runs.append(finish(Experiment({"student": "mini_resnet_xs", "epochs": 1, "seed": seed}, "runs")))
        assert snakemake.release("s") == 1
        shutil.rmtree("runs")
    assert sorted(path.stem for path in (plan.RESULTS / "s").glob("*.json")) == sorted(run.id for run in runs)
    with pytest.raises(KdfastError, match="no record at runs/"):
        (tmp_path / "s.yaml").write_text("{title: s, seeds: [0, 1, 2], training: {epochs: 1}, students: [mini_resnet_xs]}")
        snakemake.release("s")
    assert len(list((plan.RESULTS / "s").glob("*"))) == 4


def test_another_seed_runs_its_own_runs_only(checkout, finished):
    before = records(checkout)
    write_study(checkout, SMALL | {"seeds": [0, 1, 2]})
    try:
        kdfast(checkout, "reproduce", "--study", "small", "--", "runs")
    finally:
        write_study(checkout, SMALL)
    after = records(checkout)
    assert {run: after[run] for run in before} == before
    assert len(after) == 15 and all(".s2-" in run for run in after.keys() - before.keys())


def test_runs_of_other_code_are_told_and_retrained_only_when_asked(checkout, finished):
    before = records(checkout)
    source = checkout / "kdfast" / "training" / "learner.py"
    original = source.read_text()
    source.write_text(original + "\nCHANGED = True\n")
    try:
        assert status(checkout)["stale"] == 10
        kdfast(checkout, "reproduce", "--study", "small", "--", "runs")
        assert records(checkout) == before
        kdfast(checkout, "reproduce", "--study", "small", "--rerun", "--", "runs")
        assert status(checkout) == {"done": 10, "stale": 0, "other data": 0, "failed": 0, "missing": 0}
        assert all(records(checkout)[run] > before[run] for run in before if ".s2-" not in run)
    finally:
        source.write_text(original)


def test_a_failed_run_is_named_with_its_reason_and_the_others_go_on(checkout, finished):
    broken = {"title": "x", "seeds": [7], "training": {"epochs": 1}, "models": {"mini_plain_xs": {"lr": 1e30}},
              "students": ["mini_plain_xs", "mini_resnet_xs"]}  # fmt: skip
    write_study(checkout, broken, "broken")
    said = kdfast(checkout, "reproduce", "--study", "broken", code=1)
    assert "mini_plain_xs.baseline.s7" in said and "lower lr" in said
    assert "lower lr" in kdfast(checkout, "status", "--study", "broken")
    assert any(run.startswith("mini_resnet_xs.baseline.s7") for run in records(checkout))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["reproduce", "--study", "smal"], "unknown study 'smal' in experiments/studies; the nearest known: small"),
        (["paper", "--study", "digits"], "records unreleased"),
        (["release", "--study", "digits"], "no record at"),
    ],
)
def test_wrong_calls_end_with_one_sentence(checkout, finished, args, said):
    output = kdfast(checkout, *args, code=2)
    assert said in output and len(output.strip().splitlines()) == 1


def test_nothing_of_a_killed_study_goes_on(checkout, finished):
    write_study(checkout, SMALL | {"seeds": [30, 31, 32], "training": {"epochs": 400}}, "long")
    process = subprocess.Popen(command("reproduce", "--study", "long"), cwd=checkout, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    folder = checkout / "runs" / "digits"
    deadline = time.time() + 60
    while not list(folder.glob("*.s30-*/experiment.ipynb")) and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(5)
    left = subprocess.run(["pgrep", "-f", "digits/.*s3[012]-"], capture_output=True, text=True).stdout.split()
    assert left == []


def readmes_plugin():
    """The README's example of a method of one's own."""
    block = re.search(r"\n    # plugins/mse\.py\n((?:    .*\n|\n)+)", (ROOT / "README.md").read_text())[1]
    return textwrap.dedent(block)


def test_the_readmes_method_of_ones_own_works_from_a_study_file_and_from_papermill(tmp_path):
    root = copy_checkout(tmp_path / "checkout")
    (root / "plugins").mkdir()
    (root / "plugins" / "mse.py").write_text(readmes_plugin())
    write_study(root, SMALL | {"teachers": ["mini_resnet_s"], "methods": [{"name": "kd"}, {"name": "mse"}]}, "mine")
    kdfast(root, "reproduce", "--study", "mine")
    answers = root / "build" / "runs" / "mine" / "methods"
    assert "mse" in (answers / "gains.tex").read_text() and "mse" in (answers / "numbers.tex").read_text()
    assert (answers / "forest.pdf").is_file() and (root / "build" / "mine" / "paper.pdf").is_file()
    given = [
        "student=mini_resnet_xs",
        "teacher=mini_resnet_s",
        "method=mse",
        "method_args={weight: 0.1}",
        "epochs=2",
        "explore=False",
    ]
    options = [part for pair in given for part in ("-p", *pair.split("=", 1))]
    notebook = ["papermill", "experiments/experiment.ipynb", "out.ipynb", "-k", "kdfast-warm", "--no-progress-bar", *options]
    subprocess.run([sys.executable, "-m", "kdfast.kernels.client", *notebook], cwd=root, check=True, capture_output=True)
    (record,) = (
        json.loads(p.read_text()) for p in (root / "runs/digits").glob("*.mse.*/record.json") if '"epochs": 2' in p.read_text()
    )
    assert record["parameters"]["method_args"] == {"weight": 0.1} and "train_mse" in record["history"]
