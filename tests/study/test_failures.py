"""A few of the faults of tests/stress.py, and who works at the same time in the same place."""

import json
import os
import random
import subprocess
import sys
import time

import pytest
import stress

from kdfast.study import doctor, failures
from kdfast.study.study_file import Study

BASELINE = {"seeds": [0], "training": {"epochs": 3}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return stress.finished_checkout(tmp_path_factory.mktemp("faults") / "undisturbed", seeds=[0])


def test_a_study_whose_kernel_and_snakemake_are_killed_ends_as_if_nothing_had_happened(tmp_path, undisturbed):
    root = stress.new_checkout(tmp_path / "checkout", seeds=[0])
    rng = random.Random(3)
    assert all(stress.kill_once(root, victim, rng) for victim in ("kernel", "Snakemake"))
    assert stress.wait_for_the_end(root) == 0
    assert stress.finish(root) == 0, (root / "said.txt").read_text()
    assert stress.differences(undisturbed, root) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk needs root")
def test_a_study_on_a_full_disk_says_so_and_is_finished_when_there_is_room(tmp_path, undisturbed):
    found = stress.disk_full(tmp_path, [0.08], undisturbed, seeds=[0])
    assert found == {"disks": 1, "said so in words": 1, "records lost or changed": []}


def test_out_of_memory_is_said_with_the_remedy(tmp_path):
    changes = BASELINE | {"image_size": 60_000, "teachers": [], "methods": []}  # 78 TB
    root = stress.new_checkout(tmp_path / "checkout", **changes)
    assert stress.finish(root) != 0
    assert "mini_resnet_xs.baseline.s0" in (said := (root / "said.txt").read_text())
    assert "out of memory" in said and "a smaller batch_size" in said and "Traceback" not in said


def test_a_killed_kernel_is_said_to_have_been_killed(tmp_path):
    notebook = tmp_path / "experiment.ipynb"
    (tmp_path / "experiment.ipynb.err").write_text("Traceback\nnbclient.exceptions.DeadKernelError: Kernel died\n")
    assert "was killed" in failures.why(notebook) and "checkpoint" in failures.why(notebook)
    (tmp_path / "experiment.ipynb.err").write_text("Executing notebook with kernel: kdfast-warm\n")  # papermill killed
    assert "ended without a word" in failures.why(notebook)


def test_two_reproduce_in_one_checkout_follow_each_other_and_train_each_run_once(tmp_path):
    root = stress.new_checkout(tmp_path / "checkout", **BASELINE)
    words = [sys.executable, "-m", "kdfast", "reproduce", "--study", "stress", "--", "runs"]
    both = [subprocess.Popen(words, cwd=root, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("waiting for another make" in text for text in said) == 1
    assert len(stress.records(root)) == 4 and list(doctor.findings(root / "runs", root / "nowhere")) == []


def test_two_checkouts_share_data_and_stored_answers(tmp_path, image_folder):
    """At the same time, with the same teacher: its answers are made once, and all records agree."""
    changes = BASELINE | {"dataset": str(image_folder), "image_size": 12, "methods": [{"name": "kd"}], "augment": "none"}
    roots = [stress.new_checkout(tmp_path / name, **changes) for name in ("one", "other")]
    shared = stress.SHARED | {"KDFAST_CACHE": str(tmp_path / "store"), "KDFAST_DECODED": str(tmp_path / "decoded")}
    both = [stress.start(root, **shared) for root in roots]
    assert [process.wait() for process in both] == [0, 0], (roots[0] / "said.txt").read_text()
    assert stress.differences(*roots) == [] and len(stress.records(roots[0])) == 3
    made = [path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.safetensors")]
    assert len(made) == 2 and not list((tmp_path / "store").rglob("*.partial"))  # of training and test images
    asked = [json.loads(path.read_text())["teacher_outputs"] for root in roots for path in stress.records(root).values()]
    assert all(one["source"] == "float16" for one in asked if one)


def test_no_kernel_outlives_a_killed_study(tmp_path):
    root = stress.new_checkout(tmp_path / "checkout", training={"epochs": 500}, seeds=[0])
    process = stress.start(root)
    deadline = time.monotonic() + 60
    while not list((root / "runs").glob("*/*/checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.1)
    there = stress._without_reproduce(root)
    process.kill()
    process.wait()
    assert there["kernel"] and stress.wait_for_the_end(root, 10) == 0


def test_the_stress_study_has_as_many_runs_as_it_says():
    assert len(Study(**stress.STUDY).runs()) == stress.RUNS
