"""One run on two processes: the same as on one, but for rounding, where nothing is computed of a batch as a whole."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from conftest import copy_checkout
from safetensors.torch import load_file

from kdfast.core.errors import KdfastError
from kdfast.experiment import distributed

# a network and a method without normalisation, so that halves of a batch give the gradients of the whole
PLUGIN = """
    from torch import nn
    from torch.nn.functional import mse_loss
    from kdfast.all import Method, register, register_model

    def build(n_classes, image_size):
        body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, n_classes))

    register_model("bare", "bare", build)

    @register("linear")
    class Linear(Method):
        features = ("pooled",)

        def build(self, student, teacher):
            return nn.Linear(student.pooled.shape[1], teacher.pooled.shape[1])

        def loss(self, student, teacher, target):
            return mse_loss(self.projectors(student.pooled), teacher.pooled)
"""
RUN = """
    import json, sys, torch
    from safetensors.torch import load_file
    from kdfast.experiment.runner import Experiment
    torch.set_num_threads(1)
    run = Experiment(json.loads(sys.argv[1]), "runs")
    from kdfast.training.learner import history
    run.load(); learn = run.learner(); run.fit(progress=False)
    seen = history(learn), {k: v.clone() for k, v in learn.model.state_dict().items()}
    record = run.finish()
    kept = load_file(run.folder / "weights.safetensors")
    assert seen[0] == record.history and all(torch.equal(kept[k], v) for k, v in seen[1].items())  # for those who explore
    print(record.id)
"""
SGD = {"student": "bare", "epochs": 3, "optimizer": "sgd", "lr": 0.1, "augment": "crop"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    root = copy_checkout(tmp_path_factory.mktemp("processes") / "checkout")
    (root / "plugins").mkdir()
    (root / "plugins" / "bare.py").write_text(textwrap.dedent(PLUGIN))
    (root / "run.py").write_text(textwrap.dedent(RUN))
    return root


def start(root, parameters):
    environment = os.environ | {"KDFAST_CHECKPOINT_S": "0", "PYTHONPATH": str(root)}
    return subprocess.Popen([sys.executable, "run.py", json.dumps(parameters)], cwd=root, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def train(root, parameters):
    """Folder of the finished run."""
    said, errors = (process := start(root, parameters)).communicate()
    assert process.returncode == 0, errors
    return root / "runs" / "digits" / said.split()[-1]


def record(folder):
    return json.loads((folder / "record.json").read_text())


def assert_equal_but_for_rounding(one, two):
    a, b = (load_file(folder / "weights.safetensors") for folder in (one, two))
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-5
    a, b = record(one), record(two)
    assert b["parameters"]["processes"] == 2 and a["history"]["valid_loss"] == pytest.approx(b["history"]["valid_loss"], abs=1e-5)
    assert a["last"]["test"]["nll"] == pytest.approx(b["last"]["test"]["nll"], abs=1e-5)


@pytest.fixture(scope="module")
def teacher(checkout):
    return train(checkout, SGD | {"seed": 1})


@pytest.fixture
def taught(teacher):
    return SGD | {"teacher": teacher.name, "method": "linear"}


def test_two_processes_train_what_one_trains(checkout, teacher):
    assert_equal_but_for_rounding(teacher, train(checkout, SGD | {"seed": 1, "processes": 2}))


def test_adapters_are_trained_as_by_one_process_too(checkout, taught):
    one, two = (train(checkout, taught | {"processes": n}) for n in (1, 2))
    assert_equal_but_for_rounding(one, two)


def test_a_killed_run_goes_on_and_ends_as_an_undisturbed_one_bit_for_bit(checkout, taught):
    long = taught | {"epochs": 12, "processes": 2}
    process = start(checkout, long)
    deadline = time.monotonic() + 120
    while not (saved := list((checkout / "runs").glob("*/bare.linear.*/checkpoint.pt"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    killed = train(checkout, long)
    of_killed = record(killed)
    shutil.rmtree(killed)
    undisturbed = record(train(checkout, long))
    assert saved and of_killed["time"].get("resumed") == 1 and "resumed" not in undisturbed["time"]
    for part in ("model", "history", "last", "best"):
        assert of_killed[part] == undisturbed[part]


def test_what_goes_wrong_in_a_process_is_one_sentence(checkout):
    process = start(checkout, SGD | {"lr": 1e30, "processes": 2})
    assert "lower lr" in process.communicate()[1].strip().splitlines()[-1] and process.returncode


@pytest.mark.parametrize(("batch_size", "images", "said"), [(63, 1000, "shared equally by 2"), (64, 60, "do not fill")])
def test_unequal_shares_are_refused(batch_size, images, said):
    with pytest.raises(KdfastError, match=said):
        distributed.check(batch_size, images, 2)


def test_shares_of_a_batch_are_disjoint_and_together_the_batch():
    from kdfast.data.datasets import load_data
    from kdfast.data.loaders import dataloaders
    from kdfast.training.learner import set_seed

    seen = []
    for share in ((0, 1), (0, 2), (1, 2)):
        set_seed(0)
        loader = dataloaders(load_data("digits"), 64)[0]
        loader.share = share
        images, labels = next(iter(loader))
        assert len(images) == len(labels) == 64 // share[1] and torch.equal(loader.dataset.labels[loader.shown], labels)
        seen.append(loader.shown.tolist())
    assert seen[0][::2] == seen[1] and seen[0][1::2] == seen[2]
