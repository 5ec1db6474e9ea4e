"""Published numbers beside ours, and the words for a study's training."""

import pandas as pd
import pytest
import yaml
from conftest import ROOT

from kdfast.core.errors import KdfastError
from kdfast.report import literature, protocol
from kdfast.study.study_file import load_study

STUDIES = ROOT / "experiments" / "studies"
SMALL = literature.Published(
    source={"teacher": "a table", "baseline": "a table", "kd": "another"},
    differences="none",
    pairs={"big small": {"teacher": 80.0, "baseline": 70.0, "kd": 72.0}, "big other": {"teacher": 80.0, "kd": 60.0}},
)


def runs(gain: float) -> pd.DataFrame:
    """Three seeds of a teacher at 80 %, a student at 70 % and, distilled, `gain` points above."""
    rows = []
    for seed, noise in enumerate((-0.001, 0.0, 0.001)):
        rows.append({"student": "big", "teacher": None, "method": "baseline", "seed": seed, "test_top1": 0.8 + noise})
        rows.append({"student": "small", "teacher": None, "method": "baseline", "seed": seed, "test_top1": 0.7 + noise})
        rows.append({"student": "small", "teacher": "big", "method": "kd", "seed": seed, "test_top1": 0.7 + gain / 100 + noise})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("gain", "verdict"), [(2.0, "open"), (1.0, "below"), (3.0, "above")])
def test_a_published_number_stands_beside_ours_with_the_difference_and_what_it_shows(gain, verdict):
    compared = literature.comparison(SMALL, runs(gain)).set_index("what")
    assert list(compared.index) == ["big", "small", "kd: big to small"]  # what was not run is not there, a teacher once
    row = compared.loc["kd: big to small"]
    assert row.difference.mean == pytest.approx(gain - 2) and row.seeds == 3
    assert literature.verdict(row.difference) == verdict
    n_below = {"below": "1 lie above", "open": "0 lie above", "above": "0 lie above"}[verdict]
    assert n_below in literature.sentence("x", SMALL, runs(gain))


def test_a_study_that_was_not_run_is_said_to_be_configured():
    assert literature.sentence("x", SMALL, None) == "x: 4 published numbers of 2 pairs; configured, not run by us."


def test_a_broken_list_of_published_numbers_is_refused(tmp_path):
    (tmp_path / "published.yaml").write_text(yaml.safe_dump({"x": {"source": {}, "differences": "", "pairs": {}}}))
    with pytest.raises(KdfastError, match=r"published.yaml, x: pairs"):
        literature.read_published(tmp_path / "published.yaml")


def test_every_published_pair_and_method_is_a_run_of_its_study():
    for name, known in literature.read_published(ROOT / "experiments" / "published.yaml").items():
        study = load_study(STUDIES / f"{name}.yaml")
        asked = {(run.teacher.split(".")[0], run.student, run.method) for run in study.distilled_runs()}
        for pair, values in known.pairs.items():
            for what in set(values) - {"teacher", "baseline"}:
                assert (*pair.split(), what) in asked, (name, pair, what)
            assert set(values) <= set(known.source)


# In words


class Stub:
    def __init__(self, run):
        self.parameters = run.model_dump()


def words(study):
    return protocol.sentences(Stub(run) for run in load_study(STUDIES / f"{study}.yaml").runs())


def test_a_recipe_is_told_in_words():
    cifar, pets = words("cifar100"), words("pets")
    assert "for 240 epochs with SGD with momentum 0.9, batches of 64 and weight decay 0.0005." in cifar
    assert "The learning rate is 0.01 to 0.05, times 0.1 after epochs 150, 180, 210." in cifar
    assert "from ImageNet weights" in pets and "hidden layer" in pets and "(float16)" in pets and "ends at epoch 10" in pets


def test_every_hyper_parameter_is_listed_with_all_its_values():
    rows = protocol.table(Stub(run) for run in load_study(STUDIES / "cifar100.yaml").runs()).set_index("parameter").value
    assert rows["epochs"] == "240" and rows["highest learning rate"] == "0.01, 0.05" and rows["momentum"] == "0.9"
    assert rows["initial weights"] == "random" and rows["decay of norms and biases"] == "yes" and rows["folds"] == "0"
    assert rows["methods"] == "at, dist, dkd, kd, kd_std, sp" and "beta=6" in rows["their arguments"]
