"""Which of a machine's GPUs a run gets: each run one (a run on several processes as many), so many runs a GPU at a time.

Snakemake counts GPUs (`--resources gpu=…`) and does not say which; SLURM does, and what it gave is shared out in the same way.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kdfast.core.errors import number_given

JOB = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")  # in which a queue tells its jobs their number


def visible() -> list[str]:
    """The GPUs that this process may use: those of CUDA_VISIBLE_DEVICES, or all that nvidia-smi lists."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [device for device in given.split(",") if device and device != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.splitlines()
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in listed))]


def runs_a_gpu() -> int:
    """How many runs share a GPU: KDFAST_GPU_RUNS, 1 unless set; small networks leave most of a GPU idle."""
    return max(1, int(number_given("KDFAST_GPU_RUNS", 1, "runs")))


@contextmanager
def taken(count: int = 1, folder: Path | None = None) -> Iterator[dict[str, str]]:
    """What to add to a run's environment, `CUDA_VISIBLE_DEVICES`, while it has `count` GPUs; waits until they are free.

    Nothing is added where there is no GPU, nor where there is one and KDFAST_GPU_RUNS is not set: all share it then. The GPUs of
    a holder that is killed are free again.
    """
    devices, places = visible(), runs_a_gpu()
    if not devices or (len(devices) == 1 and not os.environ.get("KDFAST_GPU_RUNS")):
        yield {}
        return
    from filelock import FileLock  # where there are GPUs alone: every run's caller imports this module

    job = "".join(os.environ.get(name, "") for name in JOB)  # in which a queue may count the GPUs from 0
    folder = folder or Path(tempfile.gettempdir()) / f"kdfast-gpus-{os.getuid()}" / (job or "here").replace("/", "_")
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        mine: list[str] = []
        while len(mine) < min(count, len(devices)):
            with FileLock(folder / "choosing.lock"):  # whoever wants several takes them in one go
                mine = _choose(devices, places, count, folder, held)
            if not mine:
                time.sleep(0.2)
        yield {"CUDA_VISIBLE_DEVICES": ",".join(mine)}


def _choose(devices: list[str], places: int, count: int, folder: Path, held: ExitStack) -> list[str]:
    """`count` devices, of which a place was free and is now held, those with the fewest runs first; or none."""
    from filelock import FileLock, Timeout

    with ExitStack() as trying:
        found: list[str] = []
        for place in range(places):
            for device in devices:
                if len(found) == min(count, len(devices)) or device in found:
                    continue
                lock = FileLock(folder / f"{device.replace('/', '_')}.{place}.lock", timeout=0, is_singleton=False)
                try:
                    trying.enter_context(lock.acquire())
                except Timeout:
                    continue
                found.append(device)
        if len(found) < min(count, len(devices)):
            return []
        held.push(trying.pop_all())
        return found
