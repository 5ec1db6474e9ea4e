"""Paired gains, intervals, tests and correlations against scipy, statsmodels and simulations whose truth is known."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from scipy import special
from scipy import stats as scipy_stats
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.weightstats import DescrStatsW

from kdfast.core.errors import KdfastError
from kdfast.stats.intervals import (
    cell_estimates,
    gap_recovered,
    image_variance,
    image_variances,
    joint_df,
    seed_variance,
    teacher_quality,
)
from kdfast.stats.paired import (
    adjusted,
    estimate,
    family_difference,
    family_gain,
    family_test,
    gains,
    power_table,
    rank_correlation,
    sign_flip,
    t_interval,
)

COVERS = (0.92, 0.98)  # what is asked of a 95 % interval


def table(gain: dict[tuple[str, str], float], seeds: int = 5, spread: float = 0.002, seed: int = 0) -> pd.DataFrame:
    """Synthetic runs: every student alone, and distilled by each teacher with a known gain (a fraction)."""
    rng = np.random.default_rng(seed)
    rows = []
    for s in range(seeds):
        for student in {student for _, student in gain}:
            alone = 0.9 + rng.normal(0, spread)
            rows.append({"id": f"{student}{s}", "student": student, "seed": s, "teacher": None, "test_top1": alone})
            rows += [
                {"id": f"{t}{of}{s}", "student": of, "seed": s, "teacher": t, "test_top1": alone + g + rng.normal(0, spread / 4)}
                for (t, of), g in gain.items()
                if of == student
            ]
    return pd.DataFrame(rows)


def grid(gain: np.ndarray, **columns: np.ndarray) -> pd.DataFrame:
    """Distilled runs of gains in points (students, teachers, seeds), NaN where there is no run."""
    students, teachers, seeds = (axis.ravel() for axis in np.indices(gain.shape))
    rows = {"student": students.astype(str), "teacher": teachers.astype(str), "method": "kd", "seed": seeds, "gain": gain.ravel()}
    return pd.DataFrame(rows | {k: np.broadcast_to(v, gain.shape).ravel() for k, v in columns.items()}).dropna(subset="gain")


# Pairs


def test_gains_are_paired_with_the_same_student_and_seed():
    runs = table({("t", "a"): 0.01, ("u", "a"): -0.02, ("t", "b"): 0.03}, spread=0)
    distilled = gains(runs)
    found = distilled.groupby(["teacher", "student"]).gain.mean()
    assert found["t", "a"] == pytest.approx(1) and found["u", "a"] == pytest.approx(-2) and found["t", "b"] == pytest.approx(3)
    assert (distilled.baseline_id == distilled.student + distilled.seed.astype(str)).all()


def test_a_twin_is_trained_alike():
    rows = [{"student": "a", "seed": 0, "teacher": None, "lr": lr, "test_top1": top1} for lr, top1 in ((0.1, 0.9), (0.3, 0.8))]
    runs = pd.DataFrame([*rows, {"student": "a", "seed": 0, "teacher": "t", "lr": 0.3, "test_top1": 0.85}])
    assert gains(runs).gain.tolist() == pytest.approx([5])


# An interval


def test_the_interval_is_students_t():
    x = np.random.default_rng(1).normal(0.5, 1, 5)
    found = estimate(x)
    assert (found.low, found.high) == pytest.approx(DescrStatsW(x).tconfint_mean(0.05))
    assert (found.mean, found.p, found.n) == pytest.approx((x.mean(), scipy_stats.ttest_1samp(x, 0).pvalue, 5))


def test_a_known_variance_is_joined_with_satterthwaites_degrees_of_freedom():
    low, high, p = t_interval(1.0, 0.0, 4, known=4.0)
    assert (low, high, p) == pytest.approx((1 - 1.96 * 2, 1 + 1.96 * 2, 2 * scipy_stats.norm.sf(0.5)), abs=1e-3)
    _, high, p = t_interval(1.0, 3.0, 2, known=3.0)  # two equal parts, of 2 and of infinitely many degrees: 4 times 2
    assert (high, p) == pytest.approx((1 + scipy_stats.t.ppf(0.975, 8) * 6**0.5, 2 * scipy_stats.t.sf(6**-0.5, 8)))


def test_one_seed_has_no_interval_and_no_verdict():
    one = estimate(np.array([3.0]))
    assert one.low == -np.inf and one.verdict == "open" and np.isnan(one.p)
    assert estimate(np.array([3.0]), image_variance=1.0).high == np.inf


def test_equal_gains_are_certain():
    assert estimate(np.ones(3)).p == 0 and estimate(np.ones(3)).verdict == "raises"
    assert estimate(np.zeros(3)).p == 1 and estimate(np.zeros(3)).verdict == "open"


# A cell


def drawn(n: int, studies: int = 1000, images: int = 200) -> tuple[pd.DataFrame, pd.Series]:
    """Studies of two students by two teachers, `n` seeds, on test images drawn anew: distilled runs, and image variances.

    An image is solved where skill + ease > noise (probit). Skill varies with the training seed of the student and of its teacher,
    a student's undistilled run is shared by its cells; ease is that of the image plus what each network finds easy in it.
    """
    rng, own, noise, taught, gain = np.random.default_rng(n), 0.8, 0.06, 0.04, np.array([[0.0, 0.1], [0.2, 0.4]])

    def solved(skill: np.ndarray, ease: np.ndarray) -> np.ndarray:
        chance = special.ndtr(skill[..., None] + ease[..., None, :] + own * rng.normal(size=ease.shape)[..., None, :])
        return rng.random(chance.shape, np.float32) < chance

    found, variances = [], {}
    for study in range(studies):
        ease = np.broadcast_to(rng.normal(size=images), (2, 2, images))
        alone = solved(0.5 + noise * rng.normal(size=(2, n)), ease[0])[:, None]
        teacher = taught * rng.normal(size=(2, n))
        distilled = solved(0.5 + gain[..., None] + noise * rng.normal(size=(2, 2, n)) + teacher, ease)
        found.append(100 * (distilled.mean(-1) - alone.mean(-1)))
        for s, t in product(range(2), range(2)):
            variances[study, str(t), str(s), "kd"] = image_variance(distilled[s, t], alone[s, 0])
    spread = np.sqrt(1 + 1 + own**2 + noise**2)
    truth = special.ndtr((0.5 + gain) / np.hypot(spread, taught)) - special.ndtr(0.5 / spread)
    one = grid(np.zeros((2, 2, n)), truth=100 * truth[..., None])
    runs = one.loc[np.tile(one.index, studies)].assign(study=np.repeat(range(studies), len(one)), gain=np.ravel(found))
    return runs, pd.Series(variances).rename_axis(["study", "teacher", "student", "method"])


@pytest.mark.parametrize("n", [3, 5, 10])
def test_a_cells_interval_covers_the_gain_over_seeds_and_images(n):
    runs, variances = drawn(n)
    truth = runs.groupby(["study", "teacher", "student", "method"]).truth.first().to_numpy()
    joint, seeds_only = (cell_estimates(runs, known, within=["study"]) for known in (variances, None))
    assert COVERS[0] <= ((joint.low <= truth) & (truth <= joint.high)).mean() <= COVERS[1]
    assert ((seeds_only.low <= truth) & (truth <= seeds_only.high)).mean() < COVERS[0]
    values = runs.set_index(["study", "teacher", "student", "method", "seed"]).gain.unstack("seed").to_numpy()
    if n == 3:  # the percentile bootstrap, all 27 resamples
        means = values[:, list(product(range(3), repeat=3))].mean(-1)
        low, high = np.quantile(means, (0.025, 0.975), axis=1)
        assert ((low <= truth) & (truth <= high)).mean() < 0.8


def test_image_variance_is_what_an_analysis_of_variance_leaves_to_the_images():
    rng = np.random.default_rng(0)
    alone, distilled = rng.random((2, 4, 60)) < np.stack([np.full(60, 0.5), rng.random(60)])[:, None]
    d = 100.0 * (distilled.astype(int) - alone)
    cells = pd.DataFrame({"d": d.ravel(), "seed": np.repeat(range(4), 60), "image": np.tile(range(60), 4)})
    squares = anova_lm(smf.ols("d ~ C(seed) + C(image)", cells).fit())
    mean_square = squares.sum_sq / squares.df
    assert image_variance(distilled, alone) == pytest.approx((mean_square["C(image)"] - mean_square["Residual"]) / 4 / 60)
    assert image_variance(distilled[:1], alone[:1]) == pytest.approx(d[0].var(ddof=1) / 60)


def test_images_without_effect_of_their_own_have_no_variance():
    alone, distilled = np.random.default_rng(0).random((2, 10, 5000)) < 0.7
    noise = (100.0 * (distilled.astype(int) - alone)).mean(0).var(ddof=1) / 5000  # counted by the variance over seeds
    assert image_variance(distilled, alone) < 0.1 * noise


def test_image_variances_are_looked_up_by_run_and_averaged_over_a_groups_cells():
    runs = gains(table({("t", "a"): 0.01, ("u", "a"): 0.01})).assign(method="kd", pair="same")
    rng = np.random.default_rng(0)
    solved = {run: rng.random(50) < 0.7 for run in {*runs.id, *runs.baseline_id}}
    a, ta, ua = (np.stack([solved[f"{name}{s}"] for s in range(5)]) for name in ("a", "ta", "ua"))
    by_cell = image_variances(runs, solved.get)
    assert by_cell["t", "a", "kd"] == pytest.approx(image_variance(ta, a), rel=1e-4)
    assert image_variances(runs, solved.get, ["pair"])["same"] == pytest.approx(image_variance((1.0 * ta + ua) / 2, a), rel=1e-4)


@pytest.mark.parametrize("n", [[4, 4, 4, 4, 4, 4], [6, 6, 3, 3, 2, 1]], ids=["even", "uneven"])
def test_the_pooled_seed_variance_is_unbiased_and_has_the_degrees_of_freedom_that_it_claims(n):
    rng, student = np.random.default_rng(0), np.array(list("aaaabb"))
    values = rng.normal(size=(4000, 6, 6)) - rng.normal(size=(4000, 2, 6))[:, [0, 0, 0, 0, 1, 1]]
    values[:, np.arange(6) >= np.array(n)[:, None]] = np.nan
    found = [seed_variance(v, student) for v in values]
    variance, df = np.array(found).T
    assert variance.mean() == pytest.approx(2, rel=0.02)
    assert df[0] == pytest.approx(2 * variance.mean() ** 2 / variance.var(), rel=0.1)
    assert df[0] < 0.8 * (np.array(n) - 1).sum()  # fewer than independent cells would have


def test_a_lone_cell_has_its_own_t_interval_and_a_lone_run_none():
    gain = np.array([[[1.0, 2.0, 4.0]]])
    row, own = cell_estimates(grid(gain)).iloc[0], estimate(gain.ravel())
    assert (row["mean"], row.low, row.high, row.p, row.n) == pytest.approx((own.mean, own.low, own.high, own.p, 3))
    lone = cell_estimates(grid(gain[..., :1])).iloc[0]
    assert (lone["mean"], lone.low, lone.high) == (1, -np.inf, np.inf) and np.isnan(lone.p)


def test_a_cell_of_one_seed_borrows_the_others_variance():
    rows = cell_estimates(grid(np.array([[[1.0, 2.0, 3.0], [5.0, np.nan, np.nan]]]))).set_index("teacher")
    assert rows.loc["1", "n"] == 1 and rows.loc["1", "spread"] == pytest.approx(1)
    half = scipy_stats.t.ppf(0.975, 2)
    assert rows.loc["1", "high"] == pytest.approx(5 + half) and rows.loc["0", "high"] == pytest.approx(2 + half / 3**0.5)


def test_arguments_of_a_method_are_averaged_seed_by_seed():
    twice = pd.concat([grid(np.array([[[1.0, 2.0, 4.0]]])), grid(np.array([[[3.0, 2.0, 0.0]]]))])
    assert cell_estimates(twice)[["mean", "n", "spread"]].iloc[0].tolist() == pytest.approx([2, 3, 0])


def test_students_that_differ_in_spread_are_pooled_apart():
    gain = np.random.default_rng(0).normal(size=(2, 3, 5)) * np.array([1.0, 10.0])[:, None, None]
    apart = cell_estimates(grid(gain), within=["student"]).groupby("student").spread.first()
    assert apart["1"] > 5 * apart["0"]
    assert cell_estimates(grid(gain)).spread.nunique() == 1


# A family


def families(n: int, studies: int, rng: np.random.Generator):
    """Gains (2 students, 3 teachers, n seeds) without effect, of cells that share their undistilled student and teachers."""
    for _ in range(studies):
        alone, teacher, own = (rng.normal(size=shape) for shape in ((2, 1, n), (1, 3, n), (2, 3, n)))
        yield own / 2 + teacher / 2 - alone


@pytest.mark.parametrize("n", [3, 5, 10])
def test_a_familys_interval_and_test_hold_although_cells_share_their_student(n):
    frame = grid(np.zeros((2, 3, n)))
    found, naive = [], []
    for gain in families(n, 400, np.random.default_rng(n)):
        found.append(family_test(frame.assign(gain=gain.ravel())))
        naive.append(scipy_stats.ttest_1samp(gain.ravel(), 0).pvalue)
    assert COVERS[0] <= np.mean([e.low <= 0 <= e.high for e in found]) <= COVERS[1]
    level = max(0.05, found[0].least_p)
    assert found[0].least_p == {3: 0.25, 5: 0.0625}.get(n, 2**-9)
    assert np.mean([e.p <= level for e in found]) == pytest.approx(level, abs=3 * np.sqrt(level / 400))
    assert np.mean(np.array(naive) <= 0.05) > 0.15  # as if all runs were independent


def test_signs_flip_as_in_scipy():
    x = np.random.default_rng(2).normal(0.4, 1, 8)
    exact = scipy_stats.permutation_test((x,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip(x) == pytest.approx((exact.pvalue, 2**-7))
    assert sign_flip(np.array([1.0, 2.0, 3.0])) == (0.25, 0.25) and sign_flip(np.ones(5)) == (0.0625, 0.0625)
    assert sign_flip(np.zeros(4))[0] == 1


def test_beyond_twelve_seeds_flips_are_drawn():
    x = np.random.default_rng(0).normal(0.4, 1, 25)
    p, least = sign_flip(x)
    assert p == pytest.approx(scipy_stats.ttest_1samp(x, 0).pvalue, abs=0.02) and 0 < least < 1e-4
    assert sign_flip(np.ones(25))[0] == pytest.approx(least)


def test_a_family_counts_the_seeds_that_all_its_cells_have():
    gain = np.array([[[1.0, 2.0, 3.0, 90.0], [3.0, 4.0, 5.0, np.nan]]])
    assert (family_test(grid(gain)).mean, family_test(grid(gain)).n) == (3, 3)
    assert family_gain(grid(gain)) == family_test(grid(gain))
    with pytest.raises(KdfastError, match="no seed has every cell"):
        family_test(grid(np.array([[[1.0, np.nan], [np.nan, 1.0]]])))


def test_a_familys_interval_widens_by_the_test_images():
    gain = grid(np.array([[[1.0, 2.0, 3.0]]]))
    assert family_test(gain, image_variance=4.0).high > family_test(gain).high + 1


def test_the_difference_of_families_is_paired_by_seed():
    rng = np.random.default_rng(0)
    alone = rng.normal(0, 5, (2, 1, 5))
    gain = np.array([2.0, 2.0, 0.5])[:, None] + 0.01 * rng.normal(size=(2, 3, 5)) - alone
    found = family_difference(grid(gain, pair=np.array(["same", "same", "cross"])[:, None]))
    assert found.mean == pytest.approx(1.5, abs=0.02) and found.high - found.low < 0.1  # the shared student cancels
    assert (found.n, found.p, found.least_p) == (5, 0.0625, 0.0625)


def test_students_weigh_alike_in_both_families():
    level = np.array([10.0, 0.0])[:, None, None]  # the first student gains more from anyone, and has most of the "same" teachers
    pair = np.array([["same", "same", "cross"], ["same", "cross", "cross"]])[..., None]
    runs = grid(level + (pair == "same") + np.arange(3.0), pair=pair)
    assert family_difference(runs).mean == pytest.approx(1)  # of the families' averages it is 13/3
    with pytest.raises(KdfastError, match="does not hold both"):
        family_difference(runs[runs.pair == "same"])
    with pytest.raises(KdfastError, match="no student has both"):
        family_difference(runs[(runs.pair == "same") == (runs.student == "0")])


def test_p_values_are_adjusted_for_their_number():
    p = [0.01, 0.04, np.nan, 0.03]
    np.testing.assert_allclose(adjusted(p), [0.03, 0.06, np.nan, 0.06])
    np.testing.assert_allclose(adjusted(p, "fdr_bh"), [0.03, 0.04, np.nan, 0.04])
    assert np.isnan(adjusted([np.nan])).all()


# The gap


def against_teacher(gain: list[float], gap: list[float]) -> pd.DataFrame:
    """One cell's runs; both in points, one value a seed."""
    return grid(np.array([[gain]])).assign(baseline_top1=0.7, teacher_top1=0.7 + np.array(gap) / 100)


def test_the_gap_recovered_is_a_ratio_of_means_with_fiellers_interval():
    gain, gap = np.array([2.0, 3.0, 2.5, 2.2]), np.array([5.0, 6.0, 4.0, 5.5])
    found = gap_recovered(against_teacher(gain, gap)).iloc[0]
    assert found.recovered == pytest.approx(gain.mean() / gap.mean()) and found.low < found.recovered < found.high
    for end in (found.low, found.high):  # there, and only there, the interval of gain − r · gap touches zero
        of_zero = estimate(gain - end * gap)
        assert min(abs(of_zero.low), abs(of_zero.high)) == pytest.approx(0, abs=1e-9)


def test_the_gap_recovered_is_withheld_where_the_teacher_is_not_better():
    for gap in ([0.0, 0.0, 0.0], [-1.0, -2.0, 2.0]):
        assert gap_recovered(against_teacher([1.0, 2.0, 3.0], gap))[["recovered", "low", "high"]].isna().all(axis=None)
    doubtful = gap_recovered(against_teacher([1.0, 2.0, 3.0], [-1.0, 0.5, 2.0])).iloc[0]
    assert doubtful.recovered == pytest.approx(4) and (doubtful.low, doubtful.high) == (-np.inf, np.inf)
    assert gap_recovered(against_teacher([1.0], [2.0])).iloc[0, 3:].tolist() == pytest.approx([0.5, -np.inf, np.inf, 1])


# Teachers


def quality(x: np.ndarray, y: np.ndarray, parameters: np.ndarray | float = 1.0) -> pd.DataFrame:
    """Distilled runs of teachers' accuracies (teachers, seeds) and students' (students, teachers, seeds), in %."""
    size = np.broadcast_to(parameters, len(x))[:, None]
    return grid(np.where(np.isnan(y), np.nan, 0.0), teacher_top1=x / 100, test_top1=y / 100, teacher_parameters=size)


def some_teachers(
    rng: np.random.Generator, teachers: int = 6, seeds: int = 5, slope: float = 0.4
) -> tuple[np.ndarray, np.ndarray]:
    """Teachers drawn from a population: their accuracies and two students' follow them by `slope`; ρ is that of r = 0.8."""
    mean = rng.normal(80, 2, (teachers, 1))
    x = mean + rng.normal(
        0, 0.5, (teachers, seeds)
    )  # a teacher of one seed is as good as it is, and its student has it from there
    own = rng.normal(0, 2 * slope * 0.75, (teachers, 1))  # 0.8 of the standard deviation is the teacher's accuracy, 0.6 is not
    return x, slope * x + own + rng.normal(60, 1, (2, 1, seeds)) + rng.normal(0, 0.3, (2, teachers, seeds))


def test_rank_correlation_is_spearmans_with_a_permutation_p():
    x, y = np.random.default_rng(0).normal(size=(2, 8))
    rho, p = rank_correlation(x, y)
    assert rho == pytest.approx(scipy_stats.spearmanr(x, y).statistic)
    assert 0 < p <= 1
    assert rank_correlation(x, x)[1] < 0.01


def test_four_teachers_or_equal_ones_allow_no_correlation():
    assert np.isnan(rank_correlation(np.arange(4.0), np.arange(4.0))).all()
    assert np.isnan(rank_correlation(np.ones(6), np.arange(6.0))).all()


def test_teacher_quality_is_spearmans_rho_and_a_line_with_an_intercept_a_student():
    x, y = some_teachers(np.random.default_rng(0))
    found = teacher_quality(quality(x, y))
    each = [scipy_stats.spearmanr(x.mean(1), student.mean(1)).statistic for student in y]
    means = pd.DataFrame({"x": np.tile(x.mean(1), 2), "y": y.mean(2).ravel(), "student": np.repeat(["a", "b"], 6)})
    assert found.rho.mean == pytest.approx(np.mean(each)) and (found.teachers, found.students, found.rho.n) == (6, 2, 5)
    assert found.slope.mean == pytest.approx(smf.ols("y ~ x + C(student)", means).fit().params["x"])
    one = teacher_quality(quality(x, y[:1]))
    assert one.rho.p == pytest.approx(rank_correlation(x.mean(1), y[0].mean(1))[1]) and one.rho.least_p == 2 / 720


def test_of_size_the_slope_is_points_a_doubling():
    size = 1000 * 2.0 ** np.arange(6)
    y = np.log2(size)[:, None] * 0.7 + np.random.default_rng(0).normal(0, 0.01, (2, 6, 3))
    found = teacher_quality(quality(np.full((6, 3), 80.0), y, size), "teacher_parameters")
    assert found.slope.low < 0.7 < found.slope.high and found.slope.mean == pytest.approx(0.7, abs=0.01)
    assert found.rho.mean == 1 and 0 < found.rho.low < 1 == pytest.approx(found.rho.high, abs=0.01)
    assert teacher_quality(quality(np.full((6, 3), 80.0), y, size)) is None  # equally good


def test_two_estimated_variances_join_as_in_welchs_test():
    a, b = np.random.default_rng(0).normal(size=(2, 8)) * [[1], [3]]
    welch = scipy_stats.ttest_ind(a, b[:5], equal_var=False)
    assert joint_df((a.var(ddof=1) / 8, 7), (b[:5].var(ddof=1) / 5, 4)) == pytest.approx(welch.df)
    assert joint_df((1.0, 4), (np.nan, 0)) == 0


def test_below_five_teachers_there_is_no_verdict():
    x, y = some_teachers(np.random.default_rng(0))
    assert teacher_quality(quality(x[:4], y[:, :4])) is None
    y[1, 4:] = np.nan  # the second student has four
    found = teacher_quality(quality(x, y))
    assert found.students == 1 and found.rho == teacher_quality(quality(x, y[:1])).rho


def test_a_single_seed_says_nothing_certain_of_teachers():
    x, y = some_teachers(np.random.default_rng(0), seeds=1)
    found = teacher_quality(quality(x, y))
    assert (found.rho.low, found.slope.high) == (-np.inf, np.inf) and found.rho.verdict == "open"


def test_a_seeds_teacher_and_student_go_together():
    rng = np.random.default_rng(0)
    x = np.linspace(70, 90, 6)[:, None] + rng.normal(0, 3, (6, 5))
    paired = teacher_quality(quality(x, x[None])).slope  # every student as good as the teacher that taught it
    assert (paired.mean, paired.low, paired.high) == pytest.approx((1, 1, 1))
    shuffled = teacher_quality(quality(x, x[None, :, ::-1])).slope
    assert shuffled.high - shuffled.low > 0.01


@pytest.mark.parametrize(("teachers", "seeds"), [(6, 3), (8, 5)])
def test_intervals_on_teachers_cover_a_population_of_teachers_and_seeds(teachers, seeds):
    rng, rho, covered, width = np.random.default_rng(teachers), 6 / np.pi * np.arcsin(0.8 / 2), [], []
    for _ in range(200):
        x, y = some_teachers(rng, teachers, seeds)
        found = teacher_quality(quality(x, y))
        # as if these were all teachers there are: the slope of each seed, and their t interval
        by_seed = estimate([np.polyfit(x[:, k], y[:, :, k].mean(0), 1)[0] for k in range(seeds)])
        covered.append([e.low <= truth <= e.high for e, truth in ((found.rho, rho), (found.slope, 0.4), (by_seed, 0.4))])
        width.append(found.rho.high - found.rho.low)
    of_rho, of_slope, of_these_teachers = np.mean(covered, axis=0)
    assert 0.9 <= of_slope <= 0.99  # 95 % and the noise of 200 simulations
    assert of_rho >= 0.92 and np.mean(width) < 1.4  # of 2: rather too wide, but not empty
    assert of_these_teachers < 0.8


# Power


def test_as_many_seeds_as_the_power_table_says_find_the_gain():
    needed = power_table(0.6).set_index("gain").seeds
    assert needed.index.tolist() == [0.3, 0.5, 1.0] and needed.is_monotonic_decreasing
    rng = np.random.default_rng(0)
    for gain, n in needed.items():
        found = [
            (scipy_stats.ttest_1samp(rng.normal(gain, 0.6, (20000, seeds)), 0, axis=1).pvalue <= 0.05).mean()
            for seeds in (n, n - 1)
        ]
        assert found[0] > 0.79 and found[1] < 0.81


def test_a_huge_gain_needs_two_seeds_and_more_power_more():
    assert power_table(0.001).seeds.tolist() == [2, 2, 2]
    assert (power_table(1.0, power=0.9).seeds > power_table(1.0).seeds).all()
