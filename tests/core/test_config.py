"""Parameters as people write them: words for yes and no, numbers like 1e-3, names that can be folders."""

import pytest

from kdfast.core.config import Run, check_parameters, dataset_slug, switch
from kdfast.core.errors import KdfastError
from kdfast.study import plan
from kdfast.study.study_file import load_study


@pytest.mark.parametrize(
    ("word", "value"), [("no", False), ("False", False), ("0", False), (0, False), (True, True), ("ON", True)]
)
def test_a_switch_is_what_yaml_means_by_the_word(word, value):
    assert switch("explore", word) is value
    assert (
        check_parameters({"student": "a", "channels_last": word if isinstance(word, (str, bool)) else bool(word)}).channels_last
        is value
    )


def test_a_switch_that_is_no_word_is_a_sentence():
    with pytest.raises(KdfastError, match=r"explore must be yes or no .*, not 'nope'"):
        switch("explore", "nope")
    with pytest.raises(KdfastError, match=r"the notebook's parameters: nesterov: .*valid boolean, not 'nope'"):
        check_parameters({"student": "a", "nesterov": "nope"})


def test_1e_3_is_a_number_in_parameters_study_files_and_method_arguments(tmp_path):
    run = check_parameters({"student": "a", "lr": "1e-3", "teacher": "t", "method": "kd", "method_args": "{alpha: 1e-1, T: 4}"})
    assert run.lr == 0.001 and run.method_args == {"alpha": 0.1, "T": 4}
    study = tmp_path / "s.yaml"
    study.write_text(
        "title: s\nseeds: [0]\nstudents: [a]\nteachers: [t]\ntraining: {lr: 1e-3}\nmodels: {t: {lr: 2e-2}}\n"
        "methods: [{name: kd, args: {alpha: [1e-1, 0.5]}}]\n"
    )
    found = load_study(study)
    assert found.training.lr == 0.001 and found.training_of("t")["lr"] == 0.02
    assert [args["alpha"] for args in found.methods[0].each()] == [0.1, 0.5]
    assert Run(student="a", lr=0.001).id == Run(student="a", lr="1e-3").id


def test_text_stays_text_and_words_are_no_numbers():
    assert Run(student="1e3").student == "1e3"
    with pytest.raises(KdfastError, match=r"lr: .*valid number, not 'fast'"):
        check_parameters({"student": "a", "lr": "fast"})


@pytest.mark.parametrize("seeds", ["[0, -1]", "[4294967296]", "[0, one]"])
def test_every_seed_of_a_study_is_checked(tmp_path, seeds):
    (tmp_path / "s.yaml").write_text(f"title: s\nseeds: {seeds}\nstudents: [a]\n")
    with pytest.raises(KdfastError, match=r"seeds\."):
        load_study(tmp_path / "s.yaml")


@pytest.mark.parametrize("name", ["flowers.v2", "my flowers", "blüten", "../up"])
def test_a_study_whose_name_cannot_be_a_folder_is_refused_with_the_rule(name):
    with pytest.raises(KdfastError, match="a study is named with letters, digits, - and _"):
        plan.study_named(name)


def test_a_study_is_known_by_its_path_too(monkeypatch):
    from conftest import ROOT

    monkeypatch.chdir(ROOT)
    assert plan.study_named("experiments/studies/digits.yaml") == plan.study_named("digits")


def test_folders_of_one_name_have_places_of_their_own(tmp_path, monkeypatch):
    a, b = dataset_slug(str(tmp_path / "2023" / "flowers")), dataset_slug(str(tmp_path / "2024" / "flowers"))
    assert a != b and a.startswith("flowers-")
    monkeypatch.chdir(tmp_path)
    assert dataset_slug("2023/flowers") == a and dataset_slug("digits") == "digits"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert dataset_slug("~/2023/flowers") == a
