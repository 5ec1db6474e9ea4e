"""Any teacher: a Learner, a Module, several, a run; on its own terms of size, normalisation and classes."""

import pickle

import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.transforms import Normalize
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from torch import nn

from kdfast.all import (
    AT,
    KD,
    Distill,
    Experiment,
    KdfastError,
    Teacher,
    create_learner,
    create_model,
    dataloaders,
    load_data,
    load_teacher,
)
from kdfast.core.config import Run
from kdfast.distill.teacher import as_teacher, normalisation, vocabulary

torch.set_num_threads(1)
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
HALF = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]


def folder(path, names="abc", size=16):
    generator = torch.Generator().manual_seed(0)
    for c in names:
        (path / c).mkdir(parents=True)
        for i in range(8):
            pixels = torch.randint(255, (size, size, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(path / c / f"{i}.png")
    return path


def fastai_dls(path, stats=None):
    tfms = [Normalize.from_stats(*stats, cuda=False)] if stats else []
    return ImageDataLoaders.from_folder(path, valid_pct=0.25, seed=0, bs=6, num_workers=0, device="cpu", batch_tfms=tfms)


def fit(learn, n=1):
    with learn.no_bar(), learn.no_logging():
        learn.fit(n, 1e-3)
    return learn


class Spy(nn.Module):
    """Keeps what it is given."""

    def __init__(self, classes=3):
        super().__init__()
        self.net, self.seen = create_model("mini_resnet_s", classes, 16), []

    def forward(self, x):
        self.seen.append(x.clone())
        return self.net(x)


def test_a_teacher_sees_images_normalised_and_sized_in_its_own_way(tmp_path):
    dls = fastai_dls(folder(tmp_path / "i"), IMAGENET)
    spy, given = Spy(), []

    class Listen(Callback):
        def after_pred(self):
            if self.training:
                given.append(self.x.clone())

    teacher = Teacher(spy, size=32, stats=HALF)
    learn = fit(Learner(dls, create_model("mini_resnet_xs", 3, 16), cbs=[Distill(teacher, KD()), Listen()]))
    mean, std = (torch.tensor(v)[:, None, None] for v in IMAGENET)
    expected = ((given[0].as_subclass(torch.Tensor) * std + mean) - 0.5) / 0.25
    expected = nn.functional.interpolate(expected, (32, 32), mode="bilinear", antialias=True)
    assert torch.allclose(spy.seen[0].as_subclass(torch.Tensor), expected, atol=1e-5) and spy.seen[0].shape[-1] == 32
    assert given[0].shape[-1] == 16 and learn.distill.teacher.student_stats[0] == pytest.approx(IMAGENET[0])


def test_features_of_a_teacher_that_takes_larger_images(tmp_path):
    dls = fastai_dls(folder(tmp_path / "i"), IMAGENET)
    teacher = Teacher(create_model("mini_resnet_s", 3, 32), size=32)
    learn = fit(Learner(dls, create_model("mini_resnet_xs", 3, 16), cbs=Distill(teacher, AT())))
    assert learn.recorder.values[0][2] > 0


def test_a_learners_normalisation_and_classes_are_known(tmp_path):
    path = folder(tmp_path / "i")
    one = Learner(fastai_dls(path, HALF), Spy(), path=tmp_path)
    teacher = as_teacher(one)
    assert teacher.classes == ("a", "b", "c") and teacher.stats[0] == HALF[0] and teacher.model is one.model
    one.export("teacher.pkl")
    loaded = load_learner(tmp_path / "teacher.pkl")
    assert as_teacher(loaded).stats == teacher.stats
    learn = fit(Learner(fastai_dls(path), create_model("mini_resnet_xs", 3, 16), cbs=Distill(loaded, KD())))
    assert learn.distill.teacher.student_stats == ([0.0] * 3, [1.0] * 3)  # images in 0…1


def test_data_without_known_normalisation_needs_it_said():
    x = torch.randn(12, 3, 16, 16)
    dls = ImageDataLoaders.from_dsets([(i, 0) for i in x], [(i, 0) for i in x], bs=6, num_workers=0, device="cpu")
    for options, fails in (({}, True), ({"student_stats": IMAGENET}, False)):
        teacher = Teacher(Spy(), stats=HALF, **options)
        learn = Learner(dls, create_model("mini_resnet_xs", 3, 16), CrossEntropyLossFlat(), cbs=Distill(teacher, KD()))
        if fails:
            with pytest.raises(KdfastError, match="student_stats="):
                fit(learn)
        else:
            fit(learn)


@pytest.mark.parametrize(
    "names, sentence", [("abd", "'d' as class 2 where the data has 'c'"), ("abcd", "4 classes, the data 3"), ("ab", "2 classes")]
)
def test_classes_that_differ_in_number_or_order(tmp_path, names, sentence):
    student = fastai_dls(folder(tmp_path / "student"))
    teacher = Learner(fastai_dls(folder(tmp_path / "teacher", names)), create_model("mini_resnet_s", len(names), 16))
    learn = Learner(student, create_model("mini_resnet_xs", 3, 16), cbs=Distill(teacher, KD()))
    with pytest.raises(KdfastError, match=sentence):
        fit(learn)


def test_several_teachers_must_agree(tmp_path):
    one = Learner(fastai_dls(folder(tmp_path / "a")), Spy())
    other = Learner(fastai_dls(folder(tmp_path / "b", "xyz")), Spy())
    with pytest.raises(KdfastError, match="differ in classes or normalisation"):
        as_teacher([one, other])
    assert len(as_teacher([one, other.model]).models) == 2


def test_a_teacher_is_never_pickled():
    with pytest.raises(KdfastError, match="remove the Distill callback"):
        pickle.dumps(Teacher(nn.Linear(1, 1)))


def test_kdfasts_own_data_have_classes_and_normalisation():
    data = load_data("digits")
    dls = dataloaders(data, 64)
    assert vocabulary(dls) == data.classes
    assert normalisation(dls)[0] == pytest.approx(data.stats[0]) and normalisation(dls)[1] == pytest.approx(data.stats[1])


def test_a_run_teaches(tmp_path):
    experiment = Experiment({"student": "mini_resnet_s", "epochs": 1}, tmp_path)
    data = experiment.load()
    experiment.learner()
    experiment.fit(progress=False)
    experiment.finish()
    teacher = load_teacher(experiment.folder, data)
    assert not any(p.requires_grad for p in teacher.model.parameters()) and not teacher.model.training
    run = Run(student="mini_resnet_xs", teacher=experiment.run.id, method="at", epochs=1)
    learn = fit(create_learner(run, data, teacher))
    x, _ = learn.dls.valid.one_batch()
    assert torch.equal(teacher(x), experiment.learn.model.eval()(x))
