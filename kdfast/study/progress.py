"""Snakemake with a progress bar: how many runs are done, which are running, how long it will take."""

import re
import subprocess
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kdfast.core.children import die_with_parent
from kdfast.study.failures import why

LINE_EVERY = 30  # seconds, where the output is no terminal


def run_with_progress(command: list[str], records: list[Path], products: list[Path], log: Path) -> int:
    """Run `command` with its output in `log`, drawing the progress of `records` (runs) and `products` (analysis, paper).

    Returns the command's exit code; why it failed is printed, a sentence for each job that did.
    """
    console = Console(stderr=True, soft_wrap=True)
    columns = [TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn()]
    columns += [TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[now]}")]
    begun = time.time()
    with log.open("w") as output, Progress(*columns, console=console, speed_estimate_period=600) as bar:
        done = sum(path.is_file() for path in records)
        bars = [bar.add_task("runs", total=len(records), completed=done, now="", visible=done < len(records)),
                bar.add_task("figures and paper", total=len(products), now="")]  # fmt: skip
        # a killed `make reproduce` leaves nothing running
        process = subprocess.Popen(command, stdout=output, stderr=output, preexec_fn=die_with_parent)
        left, said = [path for path in records if not path.is_file()], begun
        while process.poll() is None:
            time.sleep(0.5)
            left = [path for path in left if not path.is_file()]
            running = [path.parent.name for path in left if _is_newer(path.with_name("experiment.ipynb"), begun)]
            bar.update(bars[0], completed=len(records) - len(left), now=_names(running))
            bar.update(bars[1], completed=sum(_is_newer(path, begun) for path in products))
            if not console.is_terminal and left and time.time() - said > LINE_EVERY:
                said = time.time()
                console.print(f"{len(records) - len(left)} of {len(records)} runs, running: {_names(running)}")
        bar.update(bars[0], completed=sum(path.is_file() for path in records), now="")
        if process.returncode == 0:
            bar.update(bars[1], completed=sum(path.is_file() for path in products))
    if process.returncode:
        _explain(log, console, [path.with_name("experiment.ipynb") for path in left if not path.is_file()], begun)
    return process.returncode


def _is_newer(path: Path, moment: float) -> bool:
    return path.is_file() and path.stat().st_mtime >= moment


def _names(running: list[str]) -> str:
    return ", ".join(name.rsplit("-", 1)[0] for name in running[:4]) + (" …" if len(running) > 4 else "")


def _explain(log: Path, console: Console, unfinished: list[Path], begun: float) -> None:
    """The sentences that failed jobs left in Snakemake's output, or in notebooks (on a cluster), or its end where none did."""
    lines = log.read_text(errors="replace").splitlines()
    reasons = [line for line in lines if re.match(r"kdfast: |\S+ failed: |Cluster status command .* returned", line)]
    reasons = reasons or [f"{path.parent.name} failed: {why(path)}" for path in unfinished if _is_newer(path, begun)]
    for line in dict.fromkeys(reasons or [line for line in lines if line.strip()][-5:]):
        console.print(line, highlight=False, markup=False)
    console.print(f"(the whole output: {log})", highlight=False)
