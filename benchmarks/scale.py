"""How a study of 100, 1,000 and 10,000 runs behaves before and after its runs: planning, files, bytes, analysis.

The runs are not trained: their records are those of released ones, under new names and seeds, with other accuracies.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from kdfast.core.records import PREDICTIONS, RECORD
from kdfast.study.study_file import Study

ROOT = Path(__file__).parents[1]
STUDY = {  # ten runs a seed
    "title": "Many runs",
    "teachers": ["mini_resnet_s", "mini_resnet_m", "mini_mobile_m"],
    "students": ["mini_resnet_xs"],
    "methods": [{"name": "kd"}, {"name": "dkd"}],
}
PLAN = "from kdfast.study.plan import plan; p = plan(['many'], 'runs'); p.targets; p.priorities; p.needs"
ANALYSIS = """
from kdfast.report import latex
from kdfast.stats.comparison import compare
study, records, runs = latex.load('many', 'runs')
compare(runs, latex.record_paths(study, 'many', 'runs'))
"""
SNAKEMAKE = ["-m", "snakemake", "-s", "experiments/Snakefile", "--cores", "1", "--nolock", "--rerun-triggers", "mtime", "input",
             "--config", "studies=many", "records=runs", "--quiet", "all", "-n", "runs"]  # fmt: skip


def measured(words: list[str], root: Path) -> dict[str, float]:
    """Seconds and the highest memory (MB) of a Python process."""
    begun = time.perf_counter()
    log = root / "said.txt"
    with log.open("w") as said:
        environment = os.environ | {"PYTHONPATH": str(root)}
        process = subprocess.Popen([sys.executable, *words], cwd=root, env=environment, stdout=said, stderr=said)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{words} failed: {log.read_text()[-2000:]}")
    return {"seconds": round(time.perf_counter() - begun, 2), "MB": round(used.ru_maxrss / 1024)}


def make_records(root: Path, study: Study) -> None:
    """A record and predictions for every run, each like one of the released digits study."""
    released = sorted((ROOT / "experiments" / "results" / "digits").glob("*.json"))
    plain = next(path for path in released if ".baseline." in path.name)
    taught = next(path for path in released if ".kd." in path.name)
    rng = random.Random(0)
    for run in study.runs():
        path = taught if run.teacher else plain
        record = json.loads(path.read_text())
        record |= {"id": run.id, "parameters": run.model_dump()}
        if run.teacher:
            record["teacher"] |= {"run": run.teacher, "model": run.teacher.split(".")[0]}
        for epoch in ("last", "best"):
            record[epoch]["test"]["top1"] = 0.9 + 0.05 * rng.random()
        folder = root / "runs" / run.folder_name
        folder.mkdir(parents=True)
        (folder / RECORD).write_text(json.dumps(record))
        shutil.copy(path.with_suffix(".npz"), folder / PREDICTIONS)
        for name in ("weights.safetensors", "experiment.ipynb"):
            (folder / name).touch()


STORE = """
import sys, time, torch
from pathlib import Path
from kdfast.distill.cache import Cache
store, answers = Cache(Path('store')), {'logits': torch.zeros(1000)}
for i in range(int(sys.argv[1])):
    store.write({'name': f'teacher{i}'}, 'view-0000', answers)
begun = time.perf_counter()
for i in range(20):
    store.write({'name': f'another{i}'}, 'view-0000', answers)
print((time.perf_counter() - begun) / 20 * 1000)
"""


def grow(folder: Path, n: int) -> dict:
    """What `n` runs take."""
    root = folder / str(n)
    for part in ("kdfast", "experiments", "analysis", "paper"):
        shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
    content = STUDY | {"seeds": list(range(n // 10))}
    (root / "experiments" / "studies" / "many.yaml").write_text(yaml.safe_dump(content))
    study = Study(**content)
    assert len(study.runs()) == n
    found = {"runs": n, "plan": measured(["-c", PLAN], root), "dry run, nothing done": measured(SNAKEMAKE, root)}
    make_records(root, study)
    found["dry run, all done"] = measured(SNAKEMAKE, root)
    found["analysis"] = measured(["-c", ANALYSIS], root)
    files = [path for path in (root / "runs").rglob("*") if path.is_file()]
    kept = [path for path in files if path.name in (RECORD, PREDICTIONS)]
    teachers = len(study.teachers) * len(study.seeds)
    found |= {"files": len(files), "MB of records and predictions": round(sum(p.stat().st_size for p in kept) / 1e6, 1)}
    entries = 2 * teachers  # answers to training and to test images, one view
    measured(["-c", STORE, str(entries)], root)
    return found | {"entries of the cache": entries, "ms to write one": round(float((root / "said.txt").read_text()), 1)}


def main() -> None:
    sizes = [int(word) for word in sys.argv[1:]] or [100, 1000, 10_000]
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for n in sizes:
            rows.append(grow(Path(folder), n))
            print(json.dumps(rows[-1]), flush=True)
    from benchmarks.common import save  # imports torch, whose memory the processes begun here would seem to have

    save("robustness/scale", rows, {"study": STUDY})


if __name__ == "__main__":
    main()
