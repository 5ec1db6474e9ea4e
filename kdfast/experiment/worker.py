"""What each process of a run on several does: `python -m torch.distributed.run … -m kdfast.experiment.worker REQUEST`."""

import json
import os
import sys
from pathlib import Path

import torch
from fastai.torch_core import rank_distrib

from kdfast.core.children import die_with_parent
from kdfast.core.errors import KdfastError
from kdfast.experiment.distributed import join
from kdfast.experiment.runner import Experiment


def main(request: str) -> None:
    die_with_parent()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    asked = json.loads(Path(request).read_text())
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    first = rank_distrib() == 0
    experiment = Experiment(asked["parameters"], asked["runs"], asked["tracker"] if first else "none")
    experiment.load()
    join(experiment.learner())
    experiment.fit(progress=False)
    if first:
        experiment.finish()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except KdfastError as error:
        print(f"kdfast: {error}", file=sys.stderr, flush=True)
        os._exit(1)
