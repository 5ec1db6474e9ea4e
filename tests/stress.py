"""Faults injected into a small study by chance, and what is left of it: nothing lost, nothing changed but times.

`make stress` (python tests/stress.py) injects many and writes the figures of docs/robustness.md; test_faults.py injects a few.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import yaml
from conftest import ROOT, copy_checkout
from rich.progress import track

from kdfast.core.records import read_record
from kdfast.study import doctor

RESULTS = ROOT / "benchmarks" / "results" / "robustness" / "stress.json"
STUDY = {
    "title": "To be killed",
    "seeds": [0, 1],
    "training": {"epochs": 40},
    "augment": "crop",
    "teachers": ["mini_resnet_s"],
    "students": ["mini_resnet_xs"],
    "methods": [{"name": "kd"}, {"name": "fitnet"}],
}
RUNS = 8
SHARED = {"KDFAST_WARM_DIR": ""}  # the server of kernels that other checkouts use too
VICTIMS = ("kernel", "papermill", "Snakemake", "its caller", "the server of kernels", "reproduce")


def new_checkout(folder: Path, **changes) -> Path:
    root = copy_checkout(folder)
    (root / "experiments" / "studies" / "stress.yaml").write_text(yaml.safe_dump(STUDY | changes))
    return root


def start(root: Path, **environment: str) -> subprocess.Popen:
    """`reproduce`, the paper left out, with servers and stores of its own and a checkpoint after every epoch."""
    own = {"KDFAST_WARM_DIR": str(root / "warm"), "KDFAST_CHECKPOINT_S": "0", "KDFAST_WARM_IDLE": "20"}
    words = [sys.executable, "-m", "kdfast", "reproduce", "--study", "stress", "--", "runs"]
    with open(root / "said.txt", "w") as said:
        return subprocess.Popen(words, cwd=root, env=os.environ | own | environment, stdout=said, stderr=said)


def finish(root: Path) -> int:
    return start(root, **SHARED).wait()


def finished_checkout(folder: Path, **changes) -> Path:
    root = new_checkout(folder, **changes)
    assert finish(root) == 0, (root / "said.txt").read_text()
    return root


def records(root: Path) -> dict[str, Path]:
    return {path.parent.name: path for path in (root / "runs").glob("*/*/record.json")}


def processes(root: Path, reproduce: psutil.Process) -> dict[str, list[psutil.Process]]:
    """Who is there to be killed, by name."""
    found: dict[str, list[psutil.Process]] = {name: [] for name in VICTIMS}
    found["reproduce"] = [reproduce]
    with suppress(psutil.Error):
        for process in reproduce.children(recursive=True):
            words = process.cmdline()
            if "snakemake" in words:
                found["Snakemake"].append(process)
            elif "kdfast.kernels.client" in words and "-c" not in words:
                found["its caller"].append(process)
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if f"{root}/warm" not in " ".join(process.cmdline()):
                continue
            if f"{root}/warm" not in " ".join(process.parent().cmdline()):
                found["the server of kernels"].append(process)
            else:  # forked from it
                listens = any(c.status == psutil.CONN_LISTEN for c in process.net_connections())
                found["kernel" if listens else "papermill"].append(process)
    return found


def kill_once(root: Path, victim: str, rng: random.Random) -> bool:
    """Go on with the study, `kill -9` one of those at a moment of the seconds after it came up; whether there was one."""
    process = start(root)
    reproduce = psutil.Process(process.pid)
    moment, killed = None, False
    while process.poll() is None and not killed:
        there = processes(root, reproduce)[victim]
        if there and moment is None:
            moment = time.monotonic() + rng.uniform(0, 3)
        if there and time.monotonic() > moment:
            with suppress(psutil.Error):
                rng.choice(there).kill()
                killed = True
        time.sleep(0.05)
    process.wait()
    return killed


def wait_for_the_end(root: Path, seconds: float = 15) -> int:
    """Of all that belongs to a killed study: how many processes are left after that time."""
    deadline = time.monotonic() + seconds
    while left := [p for victims in _without_reproduce(root).values() for p in victims]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return len(left)


def _without_reproduce(root: Path) -> dict[str, list[psutil.Process]]:
    found = processes(root, psutil.Process())
    return {name: found[name] for name in ("kernel", "papermill")}


def differences(undisturbed: Path, disturbed: Path) -> list[str]:
    """Runs whose record is missing or is another than the undisturbed one, but for times, and what the doctor finds."""
    expected, found = records(undisturbed), records(disturbed)
    differ = [name for name in expected if name not in found or outcome(expected[name]) != outcome(found[name])]
    examined = doctor.findings(disturbed / "runs", disturbed / "nowhere")
    return differ + [f"{one.path}: {one.what}" for one in examined if not str(one.path).endswith(".partial")]


def outcome(path: Path) -> dict:
    return read_record(path).model_dump(exclude={"time", "teacher_outputs"})


def kills(folder: Path, moments: int, undisturbed: Path, rng: random.Random) -> dict:
    """Kill at so many moments, a fresh study whenever one is finished; figures of what came of it."""
    done, left, differ, studies, resumed = Counter(), 0, [], 0, 0
    root = None
    for _ in track(range(moments), "kills"):
        killed = False
        while not killed:
            if root is None or len(records(root)) == RUNS:
                if root is not None:
                    differ += differences(undisturbed, root)
                    resumed += sum(read_record(path).time.get("resumed", 0) for path in records(root).values())
                    shutil.rmtree(root)
                root = new_checkout(folder / f"study{studies}")
                studies += 1
            victim = VICTIMS[(sum(done.values())) % len(VICTIMS)]
            killed = kill_once(root, victim, rng)
        done[victim] += 1
        left += wait_for_the_end(root)
    codes = finish(root)
    differ += differences(undisturbed, root)
    resumed += sum(read_record(path).time.get("resumed", 0) for path in records(root).values())
    return {"kills": dict(done), "studies": studies, "finished by one more command": codes == 0, "processes left": left,
            "records lost or changed": differ, "runs gone on from a checkpoint": resumed}  # fmt: skip


def disk_full(folder: Path, sizes_mb: list[float], undisturbed: Path, **changes) -> dict:
    """`runs/` on disks of so many MB: what was said, and whether the study is finished when there is room. Needs root."""
    differ, said = [], []
    for number, size in enumerate(track(sizes_mb, "full disks")):
        root = new_checkout(folder / f"full{number}", **changes)
        (root / "runs").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(size * 1000)}k", "tmpfs", str(root / "runs")], check=True)
        try:
            assert finish(root) != 0, f"{size} MB is enough for the study"
            said.append((root / "said.txt").read_text())
            subprocess.run(["mount", "-o", "remount,size=100m", str(root / "runs")], check=True)
            assert finish(root) == 0, (root / "said.txt").read_text()
            differ += differences(undisturbed, root)
        finally:
            subprocess.run(["umount", "-l", str(root / "runs")], check=True)
    named = sum("No space left on device" in text and "Traceback" not in text for text in said)
    return {"disks": len(sizes_mb), "said so in words": named, "records lost or changed": differ}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="random moments")
    parser.add_argument("--disks", type=int, default=8, help="full ones")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the moments")
    args = parser.parse_args()
    from kdfast.core.code import code_hash
    from kdfast.core.provenance import git_state, hardware

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        rng = random.Random(args.seed)
        undisturbed = finished_checkout(Path(folder) / "undisturbed")
        found = {"seed": args.seed, "kills": kills(Path(folder), args.kills, undisturbed, rng)}
        if os.geteuid() == 0:
            sizes = sorted(round(rng.uniform(0.02, 0.3), 2) for _ in range(args.disks))
            found["disk full"] = disk_full(Path(folder), sizes, undisturbed)
    found |= {"hardware": hardware("cpu", 1), "code": {"hash": code_hash(), **git_state()}}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
