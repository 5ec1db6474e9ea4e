"""A run that is killed goes on where it was and ends as if nothing had happened."""

import io
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, finish

from kdfast.core.records import read_record
from kdfast.experiment import runner
from kdfast.experiment.runner import Experiment
from kdfast.training import checkpoint

BASE = {"student": "mini_resnet_xs", "epochs": 5, "augment": "crop"}
TAUGHT = {
    "kd, stored": {"method": "kd", "teacher_outputs": "float32"},
    "fitnet: projectors of their own optimizer": {"method": "fitnet"},
    "dkd: a weight that grows": {"method": "dkd"},
    "kd with mixup": {"method": "kd", "mixup": 0.4},
    "kd, smoothed labels, averaged weights": {"method": "kd", "label_smoothing": 0.1, "ema": 0.9},
}
BASELINE = {
    "adamw": {},
    "sgd by steps": {"optimizer": "sgd", "schedule": "step", "milestones": [2, 4], "nesterov": True, "decay_norms": False},
    "cutmix, averaged weights": {"cutmix": 1.0, "ema": 0.9},
    "bfloat16": {"precision": "bfloat16"},
    "randaugment": {"augment": "crop+randaugment"},
}


@pytest.fixture(autouse=True)
def every_epoch(monkeypatch):
    monkeypatch.setattr(runner, "EVERY", 0)


class Killed(Exception):
    pass


def killed_after(epoch: int, parameters: dict, folder):
    """As far as a run gets that ends in the middle of the epoch after that one."""
    run = Experiment(parameters, folder)
    run.load()
    learn = run.learner()
    seen = []

    def stop():
        seen.append(learn.epoch)
        if learn.epoch == epoch + 1 and seen.count(epoch + 1) == 3:
            raise Killed("now")

    learn.checkpoint.after_batch = stop
    with pytest.raises(Killed):
        run.fit(progress=False)


def outcome(record):
    """All that must be equal: everything but times."""
    return record.model_dump(exclude={"time", "teacher_outputs"})


@pytest.mark.parametrize("options", [*TAUGHT.values(), *BASELINE.values()], ids=[*TAUGHT, *BASELINE])
def test_an_interrupted_run_ends_with_the_record_of_an_undisturbed_one(options, runs, tmp_path):
    teacher = {"teacher": next((runs / "digits").glob("mini_resnet_s.*")).name} if "method" in options else {}
    records = {}
    for name, stops in {"undisturbed": [], "killed twice": [0, 2]}.items():
        folder = tmp_path / name
        (folder / "digits").mkdir(parents=True)
        for run in (runs / "digits").iterdir():
            (folder / "digits" / run.name).symlink_to(run)
        for epoch in stops:
            killed_after(epoch, BASE | options | teacher, folder)
        records[name] = finish(Experiment(BASE | options | teacher, folder))
        assert not list(folder.rglob("checkpoint.pt"))
    assert outcome(records["killed twice"]) == outcome(records["undisturbed"])
    assert records["killed twice"].time["resumed"] == 2 and "resumed" not in records["undisturbed"].time


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edited(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def of_other_code(path):
    content = torch.load(io.BytesIO(path.read_bytes()[32:]), weights_only=True)
    content["about"]["code"] = "another"
    checkpoint.write(path, content)


@pytest.mark.parametrize(("damage", "said"), [(half, "damaged"), (edited, "damaged"), (of_other_code, "of another code")])
def test_a_checkpoint_that_cannot_be_trusted_is_named_and_the_run_begins_anew(damage, said, tmp_path):
    expected = finish(Experiment(BASE, tmp_path / "a"))
    killed_after(1, BASE, tmp_path / "b")
    (path,) = (tmp_path / "b").rglob("checkpoint.pt")
    damage(path)
    with pytest.warns(UserWarning, match=f"{path} is {said}.*begins anew"):
        record = finish(Experiment(BASE, tmp_path / "b"))
    assert outcome(record) == outcome(expected) and "resumed" not in record.time


def test_a_tracker_has_every_epoch_once_after_an_interruption(tmp_path):
    import pandas as pd

    killed_after(1, BASE, tmp_path)
    run = Experiment(BASE, tmp_path, tracker="csv")  # it begins to track only now
    finish(run)
    assert list(pd.read_csv(run.folder / "history.csv").epoch) == [2, 3, 4]


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from kdfast.experiment import runner
runner.EVERY = 0
run = runner.Experiment({"student": "mini_resnet_s", "epochs": 30, "augment": "crop"}, sys.argv[1])
run.load(); run.learner(); print("go", flush=True); run.fit(progress=False); run.finish()
"""


def test_a_process_killed_at_random_moments_loses_nothing(tmp_path):
    def start(folder):
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "go\n"
        return process

    assert start(tmp_path / "whole").wait() == 0
    rng, kills = random.Random(0), 0
    for _ in range(20):
        process = start(tmp_path / "killed")
        time.sleep(rng.uniform(0.05, 1.0))
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        if kills == 3:
            assert start(tmp_path / "killed").wait() == 0
            break
    whole, killed = (read_record(next((tmp_path / name).rglob("record.json"))) for name in ("whole", "killed"))
    assert kills and outcome(whole) == outcome(killed)


def test_generators_are_taken_up_to_the_bit(tmp_path):
    from kdfast.core.config import Run
    from kdfast.data.datasets import load_data
    from kdfast.training.learner import create_learner

    learn = create_learner(Run(student="mini_resnet_xs"), load_data("digits"))
    states = checkpoint._random(learn)
    first = torch.rand(3), random.random(), learn.dls.train.rng.random()
    checkpoint.write(tmp_path / "c", {"about": {}, "states": states})
    checkpoint._set_random(learn, checkpoint.read(tmp_path / "c", {})["states"])
    again = torch.rand(3), random.random(), learn.dls.train.rng.random()
    assert torch.equal(first[0], again[0]) and first[1:] == again[1:]
