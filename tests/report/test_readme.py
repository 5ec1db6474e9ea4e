"""The generated parts of README and docs: what they say with records, and without."""

import pandas as pd
import pytest
from conftest import ROOT
from test_claims import runs, zero_mean

from kdfast.report import readme
from kdfast.stats.comparison import compare


def row(table: str, begins: str) -> list[str]:
    assert table.splitlines()[1] == "|---|---|---|---|"
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {begins}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_says_what_was_shown():
    table = readme.table(compare(runs(0.02, 0.01)), None)
    _, gain, interval, shown = row(table, "gain of distillation, 3 same")
    assert gain.startswith("+2.") and gain.endswith(" points") and interval.startswith("[+") and shown.startswith("yes")
    assert row(table, "same-architecture minus")[3] == "yes, it is above zero"
    assert row(table, "training time")[1] == "1.50, 1.50 to 1.50 over the pairs" and "$" not in table and "\\" not in table
    open_ = readme.table(compare(zero_mean(runs(0, 0))), None)
    assert row(open_, "gain of distillation, 3 cross")[3] == "no, the interval includes zero"


def test_one_seed_shows_nothing():
    table = readme.table(compare(runs(0.02, 0.01, seeds=1)), None)
    assert row(table, "gain of distillation, 3 same")[2:] == ["", "one seed shows nothing"]


def test_methods_are_counted():
    made = runs(0.02, 0.02)
    worse = runs(-0.02, -0.02)
    worse = worse[worse.teacher.notna()]
    both = pd.concat([made.assign(method=made.teacher.map(lambda t: "kd" if isinstance(t, str) else "baseline")),
                      worse.assign(method="at")])  # fmt: skip
    table = readme.table(compare(made), compare(both))
    assert row(table, "2 methods")[1] == "1 gain, 1 lose"


def test_pages_without_released_records_say_so(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(readme, "complete", list)
    assert readme.answer() == readme.results() == readme.UNTOLD
    assert readme.NOT_RUN in readme.studies()


def test_a_study_whose_records_are_not_all_there_counts_as_not_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(readme, "with_records", lambda: ["digits", "of no study"])
    monkeypatch.setattr(readme, "unreleased", lambda name: ["one.json"])
    assert readme.complete() == []


def test_a_page_that_lost_its_marks_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("no marks")
    with pytest.raises(ValueError, match=r"README\.md lacks the marks of answer"):
        readme.page("README.md")
