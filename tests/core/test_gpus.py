"""Which GPU a run gets, with an nvidia-smi that lists made-up ones."""

import os
import subprocess
import sys
import threading
import time

import pytest

from kdfast.core import gpus


@pytest.fixture(autouse=True)
def none_given(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("KDFAST_GPU_RUNS", raising=False)


@pytest.fixture
def two(tmp_path, monkeypatch):
    """A machine with two GPUs."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: Made-up (UUID: a)'\necho 'GPU 1: Made-up (UUID: b)'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "locks"


def test_a_machine_without_gpus_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with gpus.taken(folder=tmp_path / "locks") as added:
        assert added == {} and gpus.visible() == []


def test_a_single_gpu_is_shared_by_all_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with gpus.taken(folder=tmp_path) as one, gpus.taken(folder=tmp_path) as other:
        assert one == other == {}


def test_jobs_of_a_cluster_that_count_from_0_do_not_wait_for_each_other(two, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    with gpus.taken(2) as one:
        monkeypatch.setenv("SLURM_JOB_ID", "2")
        with gpus.taken(2) as other:
            assert one == other == {"CUDA_VISIBLE_DEVICES": "0,1"}


def test_those_given_are_those_seen(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert gpus.visible() == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus.visible() == []


@pytest.mark.parametrize(("places", "at_once"), [(1, 2), (3, 6)])
def test_runs_beside_each_other_are_spread_and_no_more_share_a_gpu_than_may(two, monkeypatch, places, at_once):
    monkeypatch.setenv("KDFAST_GPU_RUNS", str(places))
    now, most = {"0": 0, "1": 0}, []
    mutex = threading.Lock()

    def run():
        with gpus.taken(folder=two) as added:
            device = added["CUDA_VISIBLE_DEVICES"]
            with mutex:
                now[device] += 1
                most.append((max(now.values()), sum(now.values())))
            time.sleep(0.3)
            with mutex:
                now[device] -= 1

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(m for m, _ in most) == places and max(total for _, total in most) == at_once


def test_a_run_on_two_processes_gets_both_and_others_wait(two):
    with gpus.taken(2, two) as added:
        assert added == {"CUDA_VISIBLE_DEVICES": "0,1"}
        got = []

        def later():
            with gpus.taken(folder=two) as one:
                got.append(one)

        waiting = threading.Thread(target=later)
        waiting.start()
        time.sleep(0.5)
        assert got == []
    waiting.join(10)
    assert got == [{"CUDA_VISIBLE_DEVICES": "0"}]


def test_a_killed_holder_lets_go(two):
    code = f"import time; from pathlib import Path; from kdfast.core import gpus\nwith gpus.taken(2, Path({str(two)!r})):\n "
    code += "print('has', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "has\n"
    holder.kill()
    holder.wait()
    with gpus.taken(2, two) as added:
        assert added == {"CUDA_VISIBLE_DEVICES": "0,1"}
