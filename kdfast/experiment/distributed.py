"""One run on several processes of one machine: each has its share of every batch, and gradients are averaged.

fastai's DistributedTrainer (on Accelerate and torch's DistributedDataParallel) trains; the loader cuts the shares, so that the
batches, their number and the schedule are those of one process. What is computed of a batch as a whole sees the share alone:
BatchNorm's statistics on a CPU (on GPUs SyncBatchNorm shares them), distillation losses that relate a batch's images to each
other, and the training means in the history, which are the first process's. Every process validates on all images.

`Experiment.fit` starts `python -m torch.distributed.run … -m kdfast.experiment.worker REQUEST` for a run with `processes`
above 1.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from fastai.learner import Learner
from fastai.torch_core import num_distrib, rank_distrib

from kdfast.core.children import die_with_parent
from kdfast.core.errors import KdfastError
from kdfast.core.extras import require


def join(learn: Learner) -> None:
    """Make a Learner of `create_learner` one of the processes that this one was started with."""
    require("paper", "accelerate")
    from fastai.distributed import DistributedTrainer  # with accelerate: a second that other runs need not spend

    class Processes(DistributedTrainer):
        def _wrap_dl(self, dl):  # the loader has its share already
            return dl

    learn.dls.train.share = rank_distrib(), num_distrib()
    cuda = torch.cuda.is_available()
    learn.add_cb(Processes(sync_bn=cuda, cpu=not cuda))  # SyncBatchNorm is for GPUs alone


def check(batch_size: int, images: int, processes: int) -> None:
    """A KdfastError where the processes' shares of a batch would not be equal."""
    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise KdfastError(f"{processes} processes want a GPU each, and {gpus} are seen here: lower processes")
    if batch_size % processes:
        raise KdfastError(f"batch_size {batch_size} cannot be shared equally by {processes} processes")
    if images < batch_size:
        raise KdfastError(f"{images} training images do not fill a batch of {batch_size}: use one process")


def train(parameters: dict[str, Any], runs: Path, tracker: str, count: int) -> None:
    """Train that run in so many processes, of which the first writes its record; a KdfastError says why if they fail."""
    with TemporaryDirectory() as folder:
        request = Path(folder) / "request.json"
        request.write_text(json.dumps({"parameters": parameters, "runs": str(runs.resolve()), "tracker": tracker}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        with subprocess.Popen(
            [*command, "-m", "kdfast.experiment.worker", str(request)], env=_environment(), preexec_fn=die_with_parent,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            said = [line.strip() for line in process.stderr]
    if process.returncode:
        own = [line.removeprefix("kdfast: ") for line in said if line.startswith("kdfast: ")]
        raise KdfastError((own or [line for line in said if "Error" in line] or said or ["processes were killed"])[0])


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
