"""The sentences follow the numbers, whatever they are."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection, PathCollection

from kdfast.report import claims, costs, figures
from kdfast.stats.comparison import compare
from kdfast.stats.paired import gains


def runs(same: float, cross: float, slope: float = 0, seeds: int = 5, teachers: int = 6, spread: float = 0.001) -> pd.DataFrame:
    """Synthetic runs of one student with known gains (fractions), the teacher's accuracy shifting them by `slope`."""
    rng, rows = np.random.default_rng(0), []
    for s in range(seeds):
        alone = 0.9 + rng.normal(0, spread)
        common = {"student": "mini_a", "seed": s, "parameters": 100, "family": "x"}
        rows.append(common | {"teacher": None, "test_top1": alone, "training_s": 2.0})
        for t in range(teachers):
            accuracy = 0.95 + 0.005 * t
            family = "same" if t % 2 else "cross"
            gain = (same if family == "same" else cross) + slope * t
            answers = {"teacher_outputs": "live" if t == 0 else "float32", "teacher_s": 0.6 if t == 0 else 0.0}
            taught = {"teacher": f"mini_t{t}", "pair": family, "teacher_top1": accuracy, "teacher_parameters": 1000 * (t + 1)}
            rows.append(common | taught | answers | {"training_s": 3.0, "test_top1": alone + gain + rng.normal(0, spread / 5)})
            rows.append({"student": f"mini_t{t}", "seed": s, "parameters": 1000, "family": "x", "teacher": None,
                         "test_top1": accuracy, "training_s": 9.0})  # fmt: skip
    return pd.DataFrame(rows)


def zero_mean(runs: pd.DataFrame) -> pd.DataFrame:
    """The same with gains that are noise alone."""
    noise = np.random.default_rng(1).normal(0, 0.01, len(runs))
    twins = runs[runs.teacher.isna()].set_index(["student", "seed"]).test_top1
    alone = twins.reindex(pd.MultiIndex.from_frame(runs[["student", "seed"]])).to_numpy()
    return runs.assign(test_top1=np.where(runs.teacher.isna(), runs.test_top1, alone + noise - noise.mean()))


@pytest.mark.parametrize(
    ("gain", "said", "counts"),
    [
        (0.01, "raised the student's accuracy", "all of the 3 pairs gain and none of the 3 pairs lose"),
        (-0.01, "lowered the student's accuracy", "none of the 3 pairs gain and all of the 3 pairs lose"),
        (0, "no effect of distillation is shown", "none of the 3 pairs gain and none of the 3 pairs lose"),
    ],
)
def test_the_verdict_follows_the_interval_and_pairs_are_counted_after_correction(gain, said, counts):
    compared = compare(runs(gain, gain) if gain else zero_mean(runs(0, 0)))
    sentence = claims.family_sentence(compared, "same")
    assert said in sentence and counts in sentence
    assert "5 seeds cannot give less than 0.062" in sentence
    assert claims.decided(compared).to_numpy().all() == bool(gain)


def test_a_family_without_pairs_and_a_single_seed_are_said_to_be_so():
    same = runs(0, 0)
    same = same[same.pair.isna() | (same.pair == "same")]
    assert claims.family_sentence(compare(same), "cross") == "This study has no cross-architecture pair."
    assert "one seed allows no interval" in claims.family_sentence(compare(runs(0.01, 0.01, seeds=1)), "same")


@pytest.mark.parametrize(
    ("same", "cross", "said"),
    [(0.02, 0.0, "own family was the better"), (0.0, 0.02, "another family was the better")],
)
def test_the_better_family_is_named(same, cross, said):
    assert said in claims.same_or_cross(compare(runs(same, cross)))


def test_equal_families_are_not_told_apart():
    assert "not shown that the family matters" in claims.same_or_cross(compare(zero_mean(runs(0, 0))))


@pytest.mark.parametrize(("slope", "said"), [(0.002, "went with a better student"), (-0.002, "went with a worse student")])
def test_better_teachers_are_credited_or_blamed_by_rank(slope, said):
    sentence = claims.better_teacher(compare(runs(0.01, 0.01, slope, teachers=10)))
    assert f"a better teacher {said}" in sentence and f"a larger teacher {said}" in sentence


def test_teachers_that_do_not_matter_are_no_evidence():
    sentence = claims.better_teacher(compare(zero_mean(runs(0, 0, teachers=10))))
    assert "no evidence that a better teacher makes a better student" in sentence and "went with" not in sentence


def test_the_gap_recovered_is_not_reported_where_the_teacher_is_not_better():
    gap = 0.955 - 0.9  # of the only same-architecture teacher of two
    sentence = claims.family_sentence(compare(runs(0.4 * gap, 0, teachers=2)), "same")
    assert float(sentence.split("In the median pair, ")[1].split("\\,")[0]) == pytest.approx(40, abs=2)
    worse = runs(0.01, 0.01)
    worse.loc[worse.teacher.notna(), "teacher_top1"] = 0.5
    assert "of the gap" not in claims.family_sentence(compare(worse), "same")
    assert set(claims.pair_table(compare(worse), "same")["gap (\\%)"]) == {"--"}


def test_few_teachers_allow_no_verdict_on_quality():
    assert "no verdict on better teachers" in claims.better_teacher(compare(runs(0.01, 0.01, teachers=4)))


def test_students_above_their_teacher_are_named():
    assert "No distilled student" in claims.beats_teacher(compare(runs(0.01, 0.01)))
    assert "a above t0" in claims.beats_teacher(compare(runs(0.06, 0.06)))


def test_cost_is_a_ratio_of_training_times():
    every = runs(0.01, 0.01)
    said = costs.cost_sentence(gains(every), every[every.teacher.isna()])
    assert "took 1.50 to 1.50 times as long" in said and "9.0 to 9.0 seconds against 2.0" in said
    assert "cached teacher outputs (a live teacher in 5 of 30 runs)" in said and "was 3.3\\,\\% of" in said


def test_names_from_files_cannot_inject_tex():
    from kdfast.report.latex import tex

    assert tex(r"\input{/etc/passwd} $x_1$ 5% #&~^") == (
        r"\textbackslash{}input\{/etc/passwd\} \$x\_1\$ 5\% \#\&\textasciitilde{}\textasciicircum{}"
    )


# Marks and figures


def texts(axis):
    return [text.get_text() for text in axis.texts]


def test_the_matrix_brackets_what_is_not_decided_and_nothing_else():
    sure, open_ = compare(runs(0.02, 0.02)), compare(zero_mean(runs(0, 0)))
    for compared, bracketed in ((sure, False), (open_, True)):
        figure = figures.gain_matrix(compared.distilled, claims.decided(compared))
        assert [text.startswith("(") for text in texts(figure.axes[0])] == [bracketed] * 6
    assert all(text.startswith("+") for text in texts(figures.gain_matrix(sure.distilled, claims.decided(sure)).axes[0]))


def test_points_of_the_scatter_are_the_means_over_seeds():
    compared = compare(runs(0.02, 0.01))
    figure = figures.teacher_against_student(compared.distilled.assign(teacher_family="x"), compared.baselines)
    drawn = sorted(tuple(dots.get_offsets()[0]) for dots in figure.axes[0].collections if isinstance(dots, PathCollection))
    means = 100 * compared.distilled.groupby("teacher")[["teacher_top1", "test_top1"]].mean()
    assert np.allclose(drawn, sorted(map(tuple, means.to_numpy())))


def test_bars_of_the_scatter_are_the_standard_deviations_along_their_own_axes():
    compared = compare(runs(0.02, 0.01, spread=0.01))
    rng = np.random.default_rng(3)
    taught = compared.distilled.assign(teacher_family="x")
    taught["teacher_top1"] += rng.normal(0, 0.001, len(taught))  # far less than the students spread
    figure = figures.teacher_against_student(taught, compared.baselines)
    bars = [c for c in figure.axes[0].collections if isinstance(c, LineCollection)]
    segments = [segment for bar in bars for segment in bar.get_segments()]
    lengths = {way: sorted(abs(s[1] - s[0])[axis] for s in segments if abs(s[1] - s[0])[1 - axis] == 0)
               for axis, way in enumerate(("across", "up"))}  # fmt: skip
    spread = 200 * taught.groupby("teacher")[["teacher_top1", "test_top1"]].std()  # from one s.d. below to one above
    assert np.allclose(lengths["across"], sorted(spread.teacher_top1)) and np.allclose(lengths["up"], sorted(spread.test_top1))


def test_areas_of_the_scatter_grow_with_the_teachers_parameters():
    compared = compare(runs(0.02, 0.01))
    figure = figures.teacher_against_student(compared.distilled.assign(teacher_family="x"), compared.baselines)
    dots = [c for c in figure.axes[0].collections if isinstance(c, PathCollection)]
    areas = {round(float(c.get_offsets()[0][0]), 6): float(c.get_sizes()[0]) for c in dots}
    sizes = compared.distilled.groupby("teacher")[["teacher_top1", "teacher_parameters"]].mean()
    expected = {
        round(100 * r.teacher_top1, 6): 20 + 130 * r.teacher_parameters / sizes.teacher_parameters.max()
        for r in sizes.itertuples()
    }
    assert areas == pytest.approx(expected)


def test_the_forest_has_the_best_method_on_top_and_words_name_it():
    rng, rows = np.random.default_rng(0), []
    for seed in range(5):
        alone = 0.9 + rng.normal(0, 0.001)
        common = {"student": "a", "seed": seed, "parameters": 10, "family": "x", "training_s": 1.0}
        rows.append(common | {"teacher": None, "test_top1": alone})
        for method, gain in {"good": 0.02, "idle": 0.0, "bad": -0.03}.items():
            taught = {"teacher": "t", "pair": "same", "teacher_top1": 0.95, "teacher_parameters": 100, "method": method}
            rows.append(common | taught | {"test_top1": alone + gain + rng.normal(0, 0.001)})
    compared = compare(pd.DataFrame(rows))
    assert [label.get_text() for label in figures.forest(claims.method_gains(compared)).axes[0].get_yticklabels()] == [
        "good", "idle", "bad",
    ]  # fmt: skip
    said = claims.methods_sentence(compared)
    assert "1 raise the student's accuracy (good) and 1 lower it (bad)" in said and "is that of good" in said


def test_the_power_of_a_study_follows_its_spread():
    narrow, wide = (claims.power(compare(zero_mean(runs(0, 0)).pipe(lambda r, k=k: spread_out(r, k)))) for k in (1, 4))
    seeds = [int(said.split("1 (")[1].split(" seeds")[0]) for said in (narrow, wide)]
    assert 10 < seeds[1] / seeds[0] < 20  # sixteen times the variance


def spread_out(table: pd.DataFrame, factor: float) -> pd.DataFrame:
    """Gains so many times as scattered."""
    twins = table[table.teacher.isna()].set_index(["student", "seed"]).test_top1
    alone = twins.reindex(pd.MultiIndex.from_frame(table[["student", "seed"]])).to_numpy()
    taught = alone + factor * (table.test_top1 - alone)
    return table.assign(test_top1=np.where(table.teacher.isna(), table.test_top1, taught))


def test_the_draw_of_test_images_widens_intervals_where_predictions_are_known(tmp_path):
    rng, rows, paths = np.random.default_rng(0), [], []
    labels, easy = rng.integers(0, 10, 300), rng.random(300)
    for seed in range(5):
        for student, teacher, pair, skill in (("a", None, None, 0.5), ("a", "t", "same", 0.55), ("a", "u", "cross", 0.55)):
            right = easy < skill + rng.normal(0, 0.002)
            path = tmp_path / f"{seed}{teacher}.json"
            top5 = np.where(right, labels, (labels + 1) % 10)[:, None].repeat(5, 1)
            np.savez(path.with_suffix(".npz"), top5=top5, label=labels, confidence=labels * 0.0, nll=labels * 0.0)
            rows.append({
                "id": path.stem, "student": student, "teacher": teacher, "pair": pair, "seed": seed, "test_top1": right.mean(),
                "teacher_top1": 0.9, "teacher_parameters": 10, "parameters": 5, "family": "x",
                "method": "kd" if teacher else "baseline",
            })  # fmt: skip
            paths.append(path)
    known, unknown = compare(pd.DataFrame(rows), paths), compare(pd.DataFrame(rows))
    assert set(known.images) == {"same", "cross", "all", "difference"} and min(known.images.values()) >= 0
    gain = 100 * 0.05
    expected = gain * (100 - gain) / 300  # images that are won: a share of them, each counts 100 points
    assert known.images["same"] == pytest.approx(expected, rel=0.35) and known.images["difference"] < known.images["same"]
    assert known.average("all").high - known.average("all").low > unknown.average("all").high - unknown.average("all").low
