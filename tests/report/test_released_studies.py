"""What the released studies claim of themselves: trained to a plateau, tuned on validation data, teachers above students."""

import pytest
from conftest import ROOT

from kdfast.report import tuning as chosen
from kdfast.report.latex import load
from kdfast.study.plan import released


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def need(*names: str) -> None:
    """Skip where a study has no released records: it is then said to be not run."""
    missing = [name for name in names if name not in released()]
    if missing:
        pytest.skip(f"no released records of {', '.join(missing)}")


def test_every_network_of_digits_was_trained_to_its_plateau():
    _, records, runs = load("digits", "released")
    fell = runs.assign(fell=[r.plateau["valid_nll_fell"] for r in records], teacher=runs.teacher.fillna("baseline"))
    assert (fell.groupby(["student", "teacher"]).fell.mean() < 0.01).all()


def test_learning_rates_alpha_and_temperature_are_the_best_of_the_tuning_on_validation_data():
    need("digits_tuning")
    study, _, _ = load("digits", "released")
    tuning, _, runs = load("digits_tuning", "released")
    baselines = runs[runs.teacher.isna()]
    for model, lr in chosen.best_swept(tuning, baselines).items():
        assert study.training_of(model)["lr"] == tuning.training_of(model)["lr"] == lr, model
    best = chosen.method_means(runs[runs.teacher.notna()]).iloc[0]
    (method,) = study.methods
    assert " ".join(f"{k}={v}" for k, v in method.args.items()) == best.method_args
    assert not set(study.seeds) & set(tuning.seeds)


def test_students_leave_room_and_teachers_are_above_them():
    study, _, runs = load("digits", "released")
    baseline = 100 * runs[runs.teacher.isna()].groupby("student").test_top1.mean()
    assert ((baseline[study.students] >= 90) & (baseline[study.students] <= 96)).all()
    assert baseline[study.teachers].min() > baseline[study.students].max()


def test_released_runs_share_one_fingerprint_and_say_which_commit_made_them():
    for name in released():
        _, records, runs = load(name, "released")
        assert all(record.code["commit"] and not record.code["dirty"] for record in records)
        assert runs.groupby(["student", "teacher", "method"], dropna=False).code_hash.nunique().max() == 1
        assert runs.fingerprint.nunique() == 1


def test_the_page_on_robustness_tells_what_was_measured():
    from kdfast.report.robustness import PAGE, page

    assert PAGE.read_text() == page()


def test_readme_and_docs_tell_what_records_and_benchmarks_say():
    from kdfast.report.readme import PARTS, page

    for path in PARTS:
        assert (ROOT / path).read_text() == page(path), f"{path}: run python -m kdfast.report.readme"
