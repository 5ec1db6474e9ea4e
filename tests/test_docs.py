"""README and docs: every command and snippet printed there is run, in its cheapest form, or at least understood; links resolve.

`CHEAP` are run as they stand, papermill's with one epoch; of the others Makefile, parsers and files say whether they exist.
"""

import importlib.util
import math
import re
import shlex
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from kdfast.__main__ import main

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(make|papermill|kdfast|python|snakemake|pip|uv|conda|git|jupyter|docker|\.venv/bin/\S+|\. \.venv)(\s|$)")
CHEAP = ("make help", "make status", "make cache", "papermill --help-notebook")
OLD = ["-o", "env", "-o", ".venv/ready"]  # make takes the environment for ready


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```", lambda m: textwrap.indent(m[0], "    "), text, flags=re.MULTILINE | re.DOTALL)


def blocks(path: Path) -> list[str]:
    """What is indented by four or fenced, without the indentation."""
    found = re.findall(r"(?:^|\n\n)((?: {4}.*(?:\n|$)|\n(?= {4}))+)", without_fences(path.read_text()))
    return [textwrap.dedent(block) for block in found]


def commands() -> list[tuple[str, str]]:
    """Page and command, of blocks and of words in backquotes, comments taken off and lines joined."""
    found = {}
    for path in PAGES:
        lines = [line for block in blocks(path) for line in block.replace("\\\n", " ").splitlines()]
        text = re.sub(r"^ {4}.*$", "", without_fences(path.read_text()), flags=re.MULTILINE)
        lines += re.findall(r"`((?:make|papermill|python -m|snakemake) [^`]+)`", text)
        for line in lines:
            if COMMAND.match(line.strip()):
                command = " ".join(re.sub(r"\s+#.*$", "", line).split())
                found[command.replace("…", "digits")] = path.name
    return [(page, command) for command, page in found.items()]


COMMANDS = commands()


def make(words: list[str], *options: str) -> str:
    done = subprocess.run(["make", *OLD, *options, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"make {' '.join(words)}: {done.stderr}"
    return done.stdout


def check_make(words: list[str]) -> None:
    """The targets exist, the Makefile knows the variables, and what it calls understands its arguments."""
    variables = [word.partition("=")[0] for word in words if "=" in word]
    assert all(re.search(rf"^{name} \?=", (ROOT / "Makefile").read_text(), re.MULTILINE) for name in variables), words
    for line in make(words, "-n").splitlines():
        for call in re.findall(r"-m kdfast ([^;&|\n]*)", line):
            understood(shlex.split(call))
        for module in re.findall(r"-m (kdfast\.[\w.]+|benchmarks\.\w+)", line):
            assert importlib.util.find_spec(module), line


def understood(arguments: list[str]) -> None:
    """By the parser of `python -m kdfast`, which is not let do anything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdfast.__main__._run", lambda _: 0)
        assert main(arguments) == 0


def check_python(words: list[str]) -> None:
    assert words[0] == "-m", words
    if words[1] == "kdfast":
        return understood(words[2:])
    assert words[1].startswith(("kdfast.", "benchmarks.")) and importlib.util.find_spec(words[1]), words


def check_papermill(words: list[str]) -> None:
    """The parameters exist; the two runs of the README are trained below."""
    from kdfast.core.config import Run

    given = {words[i + 1] for i, word in enumerate(words) if word == "-p"}
    assert given <= {*Run.model_fields, "tracker", "runs", "explore"} and all((ROOT / w).is_file() for w in words if "/" in w)


def check_snakemake(words: list[str]) -> None:
    assert all((ROOT / word).exists() for word in words if "/" in word)
    options = {word.split("=")[0] for word in words if "=" in word}
    assert options <= {"studies", "records", "grouped"}
    done = subprocess.run([sys.executable, "-m", "snakemake", "--help"], capture_output=True, text=True, check=True)
    assert all(word in done.stdout for word in words if word.startswith("-"))


def check_files(words: list[str]) -> None:
    """Of an installer or a shell: the files that it is given are there."""
    assert all((ROOT / word).exists() for word in words if re.search(r"\.(yml|txt|toml)$|/", word))


CHECKS = {
    "make": check_make,
    "python": check_python,
    "papermill": check_papermill,
    "snakemake": check_snakemake,
    "conda": check_files,
    ".": lambda words: None if words == [".venv/bin/activate"] else pytest.fail(str(words)),
}


@pytest.mark.parametrize("page, command", COMMANDS, ids=[command[:60] for _, command in COMMANDS])
def test_every_printed_command_is_known(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    first, *words = shlex.split(command)
    first = first.removeprefix(".venv/bin/")
    assert first in CHECKS, f"{page}: no test knows {command!r}"
    CHECKS[first](words)


@pytest.mark.parametrize("command", CHEAP)
def test_quick_commands_run(command):
    printed = [c for _, c in COMMANDS if c.startswith(command)]
    assert printed, f"{command} is printed nowhere"
    first, *words = shlex.split(min(printed, key=len))
    if first == "make":
        assert make(words)
    else:
        subprocess.run([sys.executable, "-m", first, *words], cwd=ROOT, check=True, capture_output=True)


def test_every_command_of_kdfast_explains_itself():
    subprocess.run([sys.executable, "-m", "kdfast", "--help"], cwd=ROOT, check=True, capture_output=True)


def test_the_readmes_runs_train(tmp_path):
    runs = [c for _, c in COMMANDS if c.startswith("papermill experiments/experiment.ipynb")]
    assert len(runs) >= 2
    for i, command in enumerate(sorted(runs, key=lambda c: "teacher" in c)):
        words = shlex.split(command)[1:]
        words[1] = str(tmp_path / f"{i}.ipynb")
        cheap = ["-p", "epochs", "1", "-p", "explore", "False", "-p", "runs", str(tmp_path / "runs"), "--no-progress-bar"]
        call = [sys.executable, "-m", "kdfast.kernels.client", "papermill", *words, *cheap, "-k", "kdfast-warm"]
        done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
    assert len(list(tmp_path.glob("runs/digits/*/record.json"))) == len(runs)


# Snippets


def snippet(page: str, begins: str) -> str:
    (found,) = (block for block in blocks(ROOT / page) if block.startswith(begins))
    return found


def test_the_readmes_study_is_one(tmp_path):
    from kdfast.study.study_file import load_study

    (tmp_path / "flowers.yaml").write_text(snippet("README.md", "title:"))
    load_study(tmp_path / "flowers.yaml").check_names()


def test_the_readmes_model_and_method_work_as_plugins(tmp_path, monkeypatch):
    import torch

    from kdfast.all import create_method, create_model
    from kdfast.core import plugins, provenance
    from kdfast.distill import method
    from kdfast.models import registry

    monkeypatch.setattr(provenance, "PLUGINS", tmp_path)
    monkeypatch.setattr(plugins, "_LOADED", {})
    for module in (method, registry):
        monkeypatch.setattr(module, "_REGISTRY", dict(module._REGISTRY))
    for name in ("tiny", "mse"):
        (tmp_path / f"{name}.py").write_text(snippet("README.md", f"# plugins/{name}.py"))
    assert create_method("mse", {"weight": 2}).weight == 2
    assert create_model("tiny", 10, 8)(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


def test_the_fastai_snippets_run(image_folder):
    from fastai.vision.all import ImageDataLoaders, Resize, vision_learner

    from kdfast.all import create_model

    dls = ImageDataLoaders.from_folder(image_folder, valid_pct=0.2, seed=0, item_tfms=Resize(32), bs=16, num_workers=0)
    names = {"dls": dls, "teacher": create_model("cifar_resnet20", 3, 32)}
    first, _, rest = snippet("README.md", "from fastai.vision.all").partition("\n\n")
    exec(first, names)
    names["vision_learner"] = partial(vision_learner, pretrained=False)  # nothing is downloaded
    exec(rest.replace("fine_tune(10)", "fine_tune(1)"), names)
    recorder = names["student"].recorder
    assert "train_dkd" in recorder.metric_names and all(map(math.isfinite, recorder.values[-1]))
    exec(snippet("docs/teacher-outputs.md", "cbs = ["), names)
    assert len(names["cbs"]) == 2


def test_yaml_in_the_docs_is_of_study_files():
    from kdfast.study.study_file import Study

    for path in PAGES:
        for block in blocks(path):
            if re.match(r"\w+: ", block) and not block.startswith("title:"):
                assert set(yaml.safe_load(block)) <= set(Study.model_fields), path.name


# What the pages say


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_readme_says_how_many_runs_digits_has():
    from kdfast.study.study_file import load_study

    runs = load_study(ROOT / "experiments" / "studies" / "digits.yaml").runs()
    assert f"{len(runs)} runs" in (ROOT / "README.md").read_text()


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_resolve_and_every_page_is_reached_from_the_readme():
    reached = set()
    for path in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            if link.startswith("http"):
                continue
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            assert target.exists() and (not anchor or anchor in anchors(target)), f"{path.name}: {link}"
            reached |= {target} if path.name == "README.md" else set()
    assert set(PAGES[1:]) <= reached


def test_variables_of_the_environment_are_read_somewhere():
    sources = "".join(p.read_text() for p in [*(ROOT / "kdfast").rglob("*.py"), ROOT / "experiments" / "Snakefile"])
    for path in PAGES:
        for name in re.findall(r"KDFAST_[A-Z_]+", path.read_text()):
            assert f'"{name}"' in sources, f"{path.name}: {name}"


def test_paths_in_the_pages_exist():
    for path in PAGES:
        for name in re.findall(
            r"`((?:kdfast|experiments|analysis|paper|benchmarks|tests|docs|\.ci)/[\w./-]*)`", path.read_text()
        ):
            yet_to_come = name.startswith("experiments/results/") or "flowers" in name
            assert yet_to_come or (ROOT / name).exists(), f"{path.name}: {name}"
