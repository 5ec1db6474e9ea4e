"""The paper: no number typed by hand, unknown numbers and missing TeX refused, released studies in it."""

import re
import subprocess

import pytest
from conftest import ROOT, copy_checkout

from kdfast.core.errors import KdfastError
from kdfast.report.latex import build_paper

KNOWN = {"95", "5", "1", "15", "8", "32"}  # levels of interval and test, the plateau's percent, bins, int8, float32


def test_no_result_is_typed_in_the_paper():
    for path in (ROOT / "paper" / "sections").glob("*.tex"):
        text = re.sub(
            r"\\(result|ifresult|ref|citep|citet|kdfigure|kdtable|label|emph|includegraphics)\{[^}]*\}", "", path.read_text()
        )
        text = re.sub(r"\\begin\{tabular\}\{.*\}$", "", text, flags=re.MULTILINE)  # widths of columns
        text = re.sub(r"\$[^$]*\$|\\begin\{equation\}.*?\\end\{equation\}|%.*", "", text, flags=re.DOTALL)
        found = re.findall(r"\d+(?:\.\d+)?", text)
        assert set(found) <= KNOWN, f"{path.name}: {found}"


def test_an_unknown_number_stops_the_build(tmp_path, monkeypatch):
    root = copy_checkout(tmp_path / "c")
    monkeypatch.chdir(root)
    numbers = root / "build" / "runs" / "x" / "all_pairs" / "numbers.tex"
    numbers.parent.mkdir(parents=True)
    numbers.write_text(r"\kdset{x/all_pairs/title}{T}\kdset{x/all_pairs/date}{1 May 2026}")
    with pytest.raises(KdfastError, match=r"does not compile: no analysis wrote the number x/all_pairs/sentence"):
        build_paper(root / "build" / "paper.pdf", [numbers])
    assert not (root / "build" / "paper.pdf").exists()


def test_without_tex_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KdfastError, match="no latexmk: `make tex`"):
        build_paper(tmp_path / "paper.pdf", [])


def test_every_reference_is_cited_and_every_citation_has_a_reference():
    cited = set()
    for path in [*(ROOT / "paper").rglob("*.tex"), ROOT / "kdfast" / "report" / "protocol.py"]:
        for keys in re.findall(r"\\cite[pt]\{+([^}]*)\}", path.read_text()):
            cited |= {key.strip() for key in keys.split(",")}
    assert cited == set(re.findall(r"@\w+\{(\w+),", (ROOT / "paper" / "references.bib").read_text()))


def test_the_released_studies_are_in_git_whole():
    from kdfast.study.plan import RESULTS, released, study_named

    tracked = set(subprocess.run(["git", "ls-files", str(RESULTS)], cwd=ROOT, capture_output=True, text=True).stdout.split())
    assert "digits" in released()
    for name in released():
        wanted = {f"{RESULTS}/{name}/{run.id}{end}" for run in study_named(name).runs() for end in (".json", ".npz")}
        found = {path for path in tracked if path.startswith(f"{RESULTS}/{name}/")}
        assert wanted == found - {f"{RESULTS}/{name}/verified.json"}
