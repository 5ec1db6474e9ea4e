"""From records to TeX: the numbers, tables and figures of a question put to a study, and the paper they go into.

An analysis notebook fills a Section; the paper reads its `numbers.tex`, in which every value has a name
`<study>/<question>/<name>`. A name that the paper uses and nobody wrote stops the build.
"""

import math
import os
import re
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from kdfast.core.defaults import usual
from kdfast.core.errors import KdfastError
from kdfast.core.files import write_atomically
from kdfast.core.records import Record, read_record, tidy
from kdfast.report import figures, protocol
from kdfast.stats.paired import Estimate
from kdfast.study.plan import record_path, study_named
from kdfast.study.study_file import Study
from kdfast.study.verify import standing

_LATIN = {*map(chr, range(0xA1, 0x180))} - {"\u00ad"} | set("–—‘’“”…×·")  # what the paper's encoding has
_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {c: "\\" + c for c in "&%$#_{}"}


def tex(text: object) -> str:
    """Plain text as TeX source: no character of it is a command, and one that the paper's fonts lack stands as its code."""
    return "".join(_TEX.get(c, c if c.isascii() and (c.isprintable() or c.isspace()) else _foreign(c)) for c in str(text))


def _foreign(c: str) -> str:
    return c if c in _LATIN else f"U+{ord(c):04X}"


def signed(value: float, digits: int = 2) -> str:
    """A difference with its sign, a real minus included."""
    return f"${value:+.{digits}f}$"


def interval(e: Estimate, digits: int = 2) -> str:
    """`+0.31 [−0.10, +0.72]`; a single seed has no interval."""
    if not math.isfinite(e.low):
        return signed(e.mean, digits)
    return f"{signed(e.mean, digits)} [{signed(e.low, digits)}, {signed(e.high, digits)}]"


class Section:
    """What one notebook found about one study: collected, then written together, `numbers.tex` last."""

    def __init__(self, study: str, question: str, out: str | Path):
        figures.use_paper_style()
        self.study, self.question, self.out = study, question, Path(out)
        self.values: dict[str, str] = {"folder": self.out.as_posix()}

    def text(self, name: str, value: str) -> None:
        """A value given as TeX source."""
        self.values[name] = value

    def number(self, name: str, value: float, form: str = "") -> None:
        """A number in Python's format `form`; one that is not finite is an error here rather than a blank in the paper."""
        if not math.isfinite(value):
            raise KdfastError(f"{self.study}/{self.question}/{name} is {value}: a number of the paper must be finite")
        self.values[name] = f"{value:{form}}"

    def figure(self, name: str, figure: Figure) -> Figure:
        figures.save(figure, self.out / f"{name}.pdf")
        self.values[f"{name}-figure"] = f"{self.out.as_posix()}/{name}.pdf"
        return figure

    def table(self, name: str, table: pd.DataFrame, align: str | None = None) -> pd.DataFrame:
        """A booktabs table, made smaller where it is wider than the text; the cells are TeX source."""
        body = table.to_latex(index=False, escape=False, column_format=align or "l" + "r" * (table.shape[1] - 1))
        fitted = f"\\begin{{adjustbox}}{{max width=\\textwidth}}\n{body}\\end{{adjustbox}}\n"
        write_atomically(self.out / f"{name}.tex", fitted.encode())
        self.values[f"{name}-table"] = f"{self.out.as_posix()}/{name}.tex"
        return table

    def write(self) -> Path:
        """Write `numbers.tex`, which says that the question is answered."""
        lines = [f"\\kdset{{{self.study}/{self.question}/{k}}}{{{v}}}" for k, v in self.values.items()]
        path = self.out / "numbers.tex"
        write_atomically(path, ("\n".join(lines) + "\n").encode())
        return path


def load(study: str, records: str) -> tuple[Study, list[Record], pd.DataFrame]:
    """A study, its records (`records`: "runs" or "released") and their tidy table."""
    plan = study_named(study)
    found = [read_record(path) for path in record_paths(plan, study, records)]
    prints = {(r.data["fingerprint"], r.parameters["fold"]) for r in found}
    if len(prints) > len({fold for _, fold in prints}):
        raise KdfastError(
            f"study {study} has records of different data ({', '.join(sorted(p for p, _ in prints))}): train it anew"
        )
    return plan, found, tidy(found)


def record_paths(plan: Study, study: str, records: str) -> list[Path]:
    """Where the records of a study lie, in the order of `load`."""
    return [Path(record_path(run, study, records)) for run in plan.runs()]


def describe(section: Section, study: Study, records: list[Record], runs: pd.DataFrame) -> None:
    """What the protocol and the reproduction sections say of a study: data, training, machine, time, code."""
    first = records[0]
    data, counts = first.data, first.data["counts"]
    section.text("title", tex(study.title))
    section.text("note", tex(study.note))
    section.text("dataset", tex(data["name"]))
    for part in ("train", "valid", "test"):
        section.number(f"{part}-images", counts[part], ",d")
    section.number("classes", len(data["classes"]))
    section.number("pixels", data["image_size"])
    section.text("split", tex(data["split"]))
    if data.get("source"):
        section.text("found", f"The images are those of the folder {tex(data['source'])}: {_release(data)}.")
    section.text("fingerprint", tex(", ".join(sorted(set(runs.fingerprint)))))
    section.number("runs", len(runs))
    section.number("seeds", runs.seed.nunique())
    section.text("recipe", protocol.sentences(records))
    section.table("recipe", protocol.table(records).map(tex), align="ll")
    section.text("methods", tex(_methods(runs)))
    section.text("teacher_outputs", _teacher_outputs(runs))
    section.number("plateau", int(runs.plateau_reached.sum()))
    section.number("cpu-minutes", runs.total_s.sum() / 60, ".1f")
    machines = sorted({f"{r.hardware['processor']} ({r.hardware['device']}, {r.hardware['threads']} thread(s) a run, "
                       f"{r.hardware['cores']} cores)" for r in records})  # fmt: skip
    section.text("hardware", tex("; ".join(machines)))
    section.text("versions", tex(", ".join(f"{k} {v}" for k, v in first.packages.items())))
    section.text("code", tex(", ".join(sorted(set(runs.code_hash)))))
    commits = sorted({(r.code["commit"] or "none")[:12] + (" with changes" if r.code["dirty"] else "") for r in records})
    section.text("commits", tex(", ".join(commits)))
    if "released" in section.out.parts:
        section.text("verified", tex(f"There are {standing(section.study)}."))
    section.text("date", max(datetime.fromisoformat(r.time["started"]) for r in records).strftime("%-d %B %Y"))


def _teacher_outputs(runs: pd.DataFrame) -> str:
    """How the teachers' outputs were had, and in how many runs each way where there are several."""
    words = {
        "live": "computed anew in every step",
        "float32": "computed once and stored exactly, in 32 bits",
        "float16": "computed once and stored in 16 bits",
    }
    counts = runs[runs.method != "baseline"].teacher_outputs.fillna("live").value_counts()
    if len(counts) < 2:
        return words[counts.index[0]] if len(counts) else "not needed"
    return "; ".join(f"{words[source]} in {n} runs" for source, n in counts.items())


def _release(data: dict) -> str:
    """Whether a named data set has as many images as its official release."""
    n, official = sum(data["counts"].values()), usual(data["name"]).official
    if data["name"] == "cifar100" and data["counts"]["valid"] == data["counts"]["test"]:
        n -= data["counts"]["valid"]  # the same images twice
    if not official:
        return f"{n:,d} images"
    return f"{n:,d} images, " + ("as many as" if n == official else f"not the {official:,d} that") + " the official release has"


def _methods(runs: pd.DataFrame) -> str:
    used = runs[runs.method != "baseline"][["method", "method_args"]].drop_duplicates()
    return "; ".join(f"{m} ({a})" if a else m for m, a in used.itertuples(index=False)) or "none"


# The paper


def build_paper(pdf: Path, numbers: list[Path]) -> None:
    """Compile paper/paper.tex over these numbers; the same records give the same bytes. Raises KdfastError with TeX's
    first complaint."""
    if not shutil.which("latexmk"):
        raise KdfastError("no latexmk: `make tex` installs it on Debian and Ubuntu; elsewhere install TeX Live")
    work = pdf.parent / f"{pdf.stem}.tex"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    dates = re.findall(r"/date\}\{(.*?)\}", "".join(path.read_text() for path in numbers))
    newest = max(dates, key=_day, default="1 January 2026")
    root = f"{os.path.relpath('.', pdf.parent)}/"  # links to notebooks start there
    (work / "inputs.tex").write_text(_inputs(numbers, newest) + f"\\newcommand{{\\kdroot}}{{{root}}}\n")
    environment = os.environ | {
        "SOURCE_DATE_EPOCH": str(int(_day(newest).timestamp())),
        "FORCE_SOURCE_DATE": "1",
        "TZ": "UTC",
        "TEXINPUTS": f"{work}:paper:",
        "BIBINPUTS": "paper:",
    }
    command = ["latexmk", "-pdf", "-halt-on-error", "-interaction=nonstopmode", f"-outdir={work}", "paper/paper.tex"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    log = (work / "paper.log").read_text(errors="replace") if (work / "paper.log").is_file() else done.stdout
    undefined = re.search(r"(?:Citation|Reference) .*?undefined", log)
    if done.returncode or undefined:
        complaint = re.search(r"^! (.*)$", log, re.MULTILINE)
        what = complaint[1] if complaint else undefined[0] if undefined else done.stderr.strip()[-200:]
        raise KdfastError(f"the paper does not compile: {what} (log: {work / 'paper.log'})")
    (work / "paper.pdf").replace(pdf)


def _day(date: str) -> datetime:
    return datetime.strptime(f"{date} +0000", "%d %B %Y %z")


def _inputs(numbers: list[Path], date: str) -> str:
    """What paper.tex reads first: every number, the newest record's date, which studies compare and which tune."""
    found = [(path.parent.parent.name, path.parent.name) for path in numbers]
    kinds = {path.parts[path.parts.index("build") + 1] for path in numbers if "build" in path.parts}
    folder = "runs" if kinds == {"runs"} else "experiments/results/#1"
    lines = [
        f"\\newcommand{{\\kdfolder}}[1]{{{folder}}}",
        f"\\newcommand{{\\kddate}}{{{date}}}",
        *(f"\\input{{{path.as_posix()}}}" for path in numbers),
    ]
    for command, question in {
        "kdstudies": "all_pairs",
        "kdmethods": "methods",
        "kdtuning": "tuning",
        "kdbenchmarks": "teacher_cost",
        "kdliterature": "literature",
    }.items():
        lines.append(f"\\newcommand{{\\{command}}}{{{','.join(study for study, asked in found if asked == question)}}}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":  # python -m kdfast.report.latex OUT.pdf NUMBERS.tex …
    try:
        build_paper(Path(sys.argv[1]), [Path(p) for p in sys.argv[2:]])
    except KdfastError as error:
        sys.exit(f"kdfast: {error}")
