"""What is said of the benchmarks: misses as misses, numbers as measured, missing results in a sentence."""

import json

import pytest

from kdfast.core.errors import KdfastError
from kdfast.report import benchmarks, figures

STEP = {"cached / baseline": 1.02, "live / baseline": 1.8, "live / (baseline + teacher)": 1.01, "fasterai / baseline": 3.6,
        "live / fasterai": 0.5, "cached / fasterai": 0.28}  # fmt: skip
COMMON = {"hardware": {"processor": "P & Q", "cores": 2}, "packages": {"torch": "2.13.0"}, "date": "2026-01-02"}


def results(grid=1.2):
    limits = {"cached / baseline": 1.05, "live / (baseline + teacher)": 1.05, "live / fasterai": 0.55, "cached / fasterai": 0.33}
    rows = {
        "step": [
            {"teacher": "resnet50", **STEP},
            {"teacher": "swin_s", **STEP | {"cached / baseline": 1.04, "live / baseline": 4.3}},
        ],
        "memory": [
            {"kind": "baseline", "/ baseline": 1},
            {"kind": "cached", "/ baseline": 1.016},
            {"kind": "live", "/ baseline": 1.33},
        ],
        "loader": [{"loader / step": 0.04}, {"loader / step": 0.01}],
        "amortise": [{"runs": n, "baseline (s)": n, "live (s)": 3.0 * n, "cached (s)": n + 2.0} for n in (1, 10, 100)],
        "grid": [{"study": "digits", "wall × cores / loops": grid, "outside a run (s)": 0.6, "loops side by side / alone": 1.1}],
        "options": [],
        "method_cost": [],
    }
    settings = {
        "step": {"student": "resnet18", "size": 64, "batch_size": 16, "limits": limits},
        "memory": {"limit": 1.05},
        "loader": {"limit": 0.1},
        "amortise": {
            "epochs": 5,
            "baseline_s": 1,
            "distilled_s": 1,
            "live_teacher_s": 2,
            "cached_teacher_s": 2,
            "teacher": "mini_resnet_xl",
        },
        "grid": {"limits": {"grid": 1.25, "outside (s)": 0.8}},
    }
    return {name: COMMON | {"name": name, "settings": settings.get(name, {}), "rows": rows[name]} for name in benchmarks.NAMES}


def test_results_are_read_by_name_and_a_missing_one_says_what_to_run(tmp_path):
    found = results()
    for name, content in found.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert benchmarks.load(tmp_path) == found
    (tmp_path / "grid.json").write_text("{")
    with pytest.raises(KdfastError, match=r"no benchmark results in .*grid\.json \(JSONDecodeError\): run make bench"):
        benchmarks.load(tmp_path)


def test_a_limit_that_was_not_kept_is_called_missed():
    table = benchmarks.readme(results(grid=1.38))
    (missed,) = (line for line in table.splitlines() if "missed" in line)
    assert "wall × cores" in missed and "1.38 (missed)" in missed and "≤ 1.25" in missed
    assert "missed" not in benchmarks.readme(results(grid=1.25))


def test_sentences_span_the_teachers_and_escape_what_tex_would_read():
    found = results()
    said = benchmarks.sentence(found)
    assert "1.02 to 1.04 times a step without a teacher, over 2 teachers" in said and "1.80 to 4.30 times" in said
    assert "1.02 times that without a teacher with cached logits, 1.33 times with a live one" in said
    assert "P \\& Q" in benchmarks.machine(found) and "2026-01-02" in benchmarks.machine(found)
    assert "3.00 times what training without a teacher costs with a live teacher, 1.02 times" in benchmarks.growth_sentence(
        found["amortise"]
    )


def test_the_growth_figures_points_lie_on_its_model_where_the_model_holds():
    axis = figures.growth(results()["amortise"]).axes[0]
    _, live_model, live, stored_model, stored = axis.lines
    assert list(live.get_ydata()) == [3, 3, 3] and set(live_model.get_ydata()) == {3}
    assert list(stored.get_ydata()) == pytest.approx([3, 1.2, 1.02])
    assert stored_model.get_ydata()[[0, -1]] == pytest.approx([3, 1.02])
