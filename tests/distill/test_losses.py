"""`kdfast.distill.losses` against `reference_losses` (numpy, from the definitions) and against numbers worked out by hand."""

import inspect
from dataclasses import dataclass, field
from math import e, exp, expm1, log, sqrt
from zlib import crc32

import numpy as np
import pytest
import reference_losses as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn.functional import cross_entropy

from kdfast.distill import losses

SIGNATURES = {
    "kd": "student, teacher, T=4",
    "hard": "student, teacher",
    "standardize": "logits",
    "dkd": "student, teacher, target, T=4, alpha=1, beta=8",
    "dist": "student, teacher, T=1, beta=1, gamma=1",
    "nkd": "student, teacher, target, T=1, gamma=1.5",
    "wsld": "student, teacher, target, T=4",
    "fitnet": "student, teacher",
    "at": "students, teachers, p=2",
    "nst": "students, teachers",
    "ofd": "student, teacher, margin",
    "cat": "student, teacher, size=2, normalize=False",
    "review": "students, teachers",
    "sp": "student, teacher",
    "rkd": "student, teacher, distance=25, angle=50",
    "pkt": "student, teacher",
    "cc": "student, teacher",
}
TAKE_TARGETS = ("dkd", "nkd", "wsld")
FROM_LOGITS = ("kd", "kd_of_standardized", "hard", "dkd", "dist", "nkd", "wsld")
FROM_STAGES = ("at", "nst", "review")
FROM_EMBEDDINGS = ("sp", "rkd", "pkt", "cc")


# ---------------------------------------------------------------------------------------------------------- cases


@dataclass
class Case:
    """A loss, its arguments, and the shapes of what student and teacher hand to it (a list: stage maps)."""

    name: str
    student: tuple | list
    teacher: tuple | list | None = None  # None: the student's shapes
    kwargs: dict = field(default_factory=dict)
    relu: bool = False
    seed: int = 0

    def __str__(self):
        arguments = ",".join(f"{k}={v}" for k, v in self.kwargs.items())
        return f"{self.name}({arguments})-{self.student}-{self.teacher or 'same'}{'-relu' * self.relu}-{self.seed}"

    def inputs(self):
        """(student, teacher, and the target or margin for those that take one), float64 numpy."""
        rng = np.random.default_rng(crc32(str(self).encode()))

        def draw(shape):
            x = rng.normal(0, 3 if self.name in FROM_LOGITS else 1, shape)
            return exact_in_float32(np.maximum(x, 0) if self.relu else x)

        def draw_all(shapes):
            return [draw(shape) for shape in shapes] if isinstance(shapes, list) else draw(shapes)

        student, teacher = draw_all(self.student), draw_all(self.teacher or self.student)
        return student, teacher, *extras(self.name, self.student, rng)


def extras(name, shape, rng):
    if name in TAKE_TARGETS:
        return (rng.integers(0, shape[1], shape[0]),)
    if name == "ofd":
        return (exact_in_float32(-rng.uniform(0.2, 1.0, (1, shape[1], 1, 1))),)
    return ()


def exact_in_float32(x):
    """So that float32 and float64 are given the same numbers."""
    return x.astype(np.float32).astype(np.float64)


def loss_of(module, name):
    """The loss `name` of `kdfast.distill.losses` or of the reference; and one that composes two."""
    if name == "kd_of_standardized":
        return lambda student, teacher, **kw: module.kd(module.standardize(student), module.standardize(teacher), **kw)
    return getattr(module, name)


def each(f, x):
    return [f(v) for v in x] if isinstance(x, list) else f(x)


def tensor(x, dtype=torch.float64):
    x = torch.as_tensor(x)
    return x.to(dtype) if x.is_floating_point() else x


def tensors(inputs, dtype=torch.float64):
    """Arrays to tensors of `dtype`; the student's ask for a gradient, targets stay integers."""
    student, *rest = (each(lambda v: tensor(v, dtype), x) for x in inputs)
    return each(lambda v: v.requires_grad_(), student), *rest


def gradients(value, student):
    """The gradient of `value` in one flat vector, over all stages."""
    value.backward()
    return torch.cat([v.grad.flatten() for v in (student if isinstance(student, list) else [student])])


def numeric_gradient(f, student, step=1e-5):
    """Central differences of f over every number of the student's arrays."""
    stages = student if isinstance(student, list) else [student]
    out = []
    for x in stages:
        for index in np.ndindex(x.shape):
            before = x[index]
            x[index] = before + step
            above = f(student)
            x[index] = before - step
            below = f(student)
            x[index] = before
            out.append((above - below) / (2 * step))
    return np.array(out)


LOGITS = [
    Case(name, shape, kwargs=kwargs, seed=seed)
    for name, variants in {
        "kd": [{}, {"T": 1}, {"T": 2.5}],
        "kd_of_standardized": [{}, {"T": 2}],
        "hard": [{}],
        "dkd": [{}, {"T": 1}, {"T": 2, "alpha": 0.5, "beta": 2}, {"beta": 0}, {"alpha": 0}],
        "dist": [{}, {"T": 4}, {"beta": 2, "gamma": 0}, {"T": 2, "beta": 0.5, "gamma": 3}],
        "nkd": [{}, {"T": 3, "gamma": 3.5}, {"gamma": 0}],
        "wsld": [{}, {"T": 1}, {"T": 2}],
    }.items()
    for kwargs in variants
    for shape in [(1, 6), (4, 5), (7, 10), (3, 100)]
    for seed in (0, 1)
]
TWO_CLASSES = [Case(name, (6, 2)) for name in FROM_LOGITS if name != "kd_of_standardized"]  # which is then 0 or noise
MAPS = [
    Case(name, student, teacher, kwargs, relu)
    for relu in (False, True)
    for name, student, teacher, kwargs in [
        ("fitnet", (3, 4, 5, 5), None, {}),
        ("fitnet", (2, 3, 4, 6), None, {}),
        ("at", [(2, 3, 4, 4)], None, {}),
        ("at", [(2, 3, 4, 6)], [(2, 5, 4, 6)], {}),
        ("at", [(2, 3, 8, 8), (2, 4, 4, 4), (2, 5, 2, 2)], [(2, 2, 4, 4), (2, 6, 4, 4), (2, 3, 4, 4)], {}),
        ("at", [(2, 3, 4, 4), (2, 3, 4, 4)], [(2, 3, 2, 2), (2, 3, 8, 8)], {"p": 4}),
        ("nst", [(2, 3, 4, 4)], None, {}),
        ("nst", [(3, 2, 4, 6)], [(3, 4, 4, 6)], {}),
        ("nst", [(2, 3, 8, 8), (2, 4, 4, 4), (2, 5, 2, 2)], [(2, 2, 4, 4), (2, 6, 4, 4), (2, 3, 4, 4)], {}),
        ("ofd", (3, 4, 5, 5), None, {}),
        ("ofd", (2, 3, 4, 6), None, {}),
        ("cat", (3, 5, 4, 4), None, {}),
        ("cat", (3, 5, 8, 8), (3, 5, 4, 4), {}),
        ("cat", (3, 5, 4, 8), (3, 5, 2, 6), {"normalize": True}),
        ("cat", (2, 5, 8, 8), None, {"size": 4, "normalize": True}),
        ("cat", (2, 5, 3, 3), (2, 5, 6, 6), {"size": 1}),
        ("review", [(2, 3, 8, 8)], None, {}),
        ("review", [(2, 3, 1, 1)], None, {}),
        ("review", [(2, 2, 8, 8), (2, 3, 4, 4), (2, 4, 2, 2), (2, 5, 1, 1)], None, {}),
    ]
]
EMBEDDINGS = [
    Case(name, (batch, width), (batch, other), relu=relu, seed=seed)
    for name in FROM_EMBEDDINGS
    for batch, width, other in [
        (2, 16, 16),
        (5, 16, 24),
        (8, 32, 16),
        (5, 4 * 3 * 3, 6 * 2 * 2),
    ]  # last: flattened maps
    for relu in (False, True)
    for seed in (0, 1)
    if name != "cc"
]
EMBEDDINGS += [Case("cc", shape, relu=relu) for shape in [(2, 16), (5, 8), (9, 32)] for relu in (False, True)]
EMBEDDINGS += [
    Case("rkd", (6, 8), (6, 12), {"distance": 1, "angle": 0}),
    Case("rkd", (6, 8), (6, 12), {"distance": 0, "angle": 2}),
]
ORDINARY = LOGITS + TWO_CLASSES + MAPS + EMBEDDINGS

# One small case for each way through each loss: no ReLU, since a central difference across a kink shows neither side.
SMALL = [
    *(Case(name, (3, 4)) for name in FROM_LOGITS),
    *(Case(name, (3, 4), kwargs={"T": 2}) for name in ("kd", "kd_of_standardized", "dkd", "dist", "nkd", "wsld")),
    Case("dkd", (3, 2)),
    Case("nkd", (3, 2)),
    Case("fitnet", (2, 2, 3, 3)),
    Case("at", [(2, 2, 4, 4), (2, 3, 2, 2), (2, 2, 3, 3)], [(2, 3, 2, 2), (2, 2, 4, 4), (2, 2, 3, 3)]),
    Case("at", [(2, 2, 3, 3)], kwargs={"p": 4}),
    Case("nst", [(2, 2, 4, 4), (2, 3, 2, 2), (2, 2, 3, 3)], [(2, 3, 2, 2), (2, 2, 4, 4), (2, 2, 3, 3)]),
    Case("ofd", (2, 3, 3, 3)),
    Case("cat", (2, 3, 4, 4)),
    Case("cat", (2, 3, 4, 4), (2, 3, 2, 2), {"normalize": True}),
    Case("review", [(1, 2, 8, 8), (1, 2, 4, 4), (2, 2, 2, 2), (2, 2, 1, 1)]),
    Case("sp", (4, 3), (4, 5)),
    Case("rkd", (4, 3), (4, 5)),
    Case("rkd", (4, 3), (4, 5), {"distance": 1, "angle": 0}),
    Case("rkd", (4, 3), (4, 5), {"distance": 0, "angle": 1}),
    Case("pkt", (4, 3), (4, 5)),
    Case("cc", (4, 5)),
]
ALIKE = [case for case in SMALL if case.teacher is None or case.student == case.teacher] + [
    Case("at", [(2, 2, 4, 4), (2, 3, 2, 2)]),
    Case("nst", [(2, 2, 4, 4), (2, 3, 2, 2)]),
    Case("cat", (2, 3, 4, 4), kwargs={"normalize": True}),
    *(Case(name, (5, 6)) for name in ("sp", "rkd", "pkt")),
]


def cases(some):
    return pytest.mark.parametrize("case", some, ids=str)


# ------------------------------------------------------------------------------------------------- the definitions


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_and_defaults_are_those_of_the_definition(name):
    parameters = dict(inspect.signature(getattr(losses, name)).parameters)
    reduction = parameters.pop("reduction", None)
    found = [p.name if p.default is p.empty else f"{p.name}={p.default + 0:g}" for p in parameters.values()]
    assert ", ".join(found) == SIGNATURES[name].replace("False", "0")
    if name in TAKE_TARGETS:
        assert reduction.default == "mean"


@cases(ORDINARY)
def test_value_is_the_reference(case):
    expected = loss_of(reference, case.name)(*case.inputs(), **case.kwargs)
    for dtype, tolerance in [(torch.float32, 1e-4), (torch.float64, 1e-9)]:
        value = loss_of(losses, case.name)(*tensors(case.inputs(), dtype), **case.kwargs)
        assert value.shape == () and value.dtype == dtype
        # pkt: near 1e-4, the remainder of shares of order 1 that cancel, of which float32 holds seven digits
        cancelled = 1e-7 if case.name == "pkt" and dtype == torch.float32 else 1e-12
        assert value.item() == pytest.approx(expected, rel=tolerance, abs=cancelled)


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_standardize_is_the_reference(classes):
    z = np.random.default_rng(classes).normal(0, 3, (5, classes)).astype(np.float32)
    for dtype, tolerance in [(torch.float32, 1e-4), (torch.float64, 1e-9)]:
        value = losses.standardize(tensor(z, dtype))
        assert value.dtype == dtype
        np.testing.assert_allclose(value.numpy(), reference.standardize(z), rtol=tolerance, atol=tolerance / 100)


@cases(SMALL)
def test_gradient_is_that_of_the_reference(case):
    student, *rest = case.inputs()
    kwargs = dict(case.kwargs)
    if case.name == "wsld":
        kwargs["weights"] = reference.wsld_weights(student, *rest)  # no gradient flows through them
    expected = numeric_gradient(lambda s: loss_of(reference, case.name)(s, *rest, **kwargs), student)
    assert np.abs(expected).max() > 1e-6
    for dtype, tolerance in [(torch.float32, 1e-5), (torch.float64, 1e-7)]:
        inputs = tensors(case.inputs(), dtype)
        found = gradients(loss_of(losses, case.name)(*inputs, **case.kwargs), inputs[0]).double().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=tolerance * np.abs(expected).max())


def test_gradient_of_standardize_is_that_of_the_reference():
    rng = np.random.default_rng(0)
    z, weights = rng.normal(0, 3, (3, 5)), rng.normal(size=(3, 5))
    expected = numeric_gradient(lambda x: (reference.standardize(x) * weights).sum(), z)
    (logits,) = tensors((z,))
    found = gradients((losses.standardize(logits) * tensor(weights)).sum(), logits).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


@cases(SMALL)
def test_gradient_passes_gradcheck(case):
    inputs = case.inputs()
    if case.name == "wsld":  # gradcheck would see the detached weights move: with a sure and right teacher they are 1
        inputs[1][np.arange(len(inputs[2])), inputs[2]] += 60
    student, teacher, *extra = tensors(inputs)

    def loss(*s):
        return loss_of(losses, case.name)(list(s) if isinstance(student, list) else s[0], teacher, *extra, **case.kwargs)

    assert torch.autograd.gradcheck(loss, student if isinstance(student, list) else (student,))


@cases([case for case in ORDINARY if case.name in TAKE_TARGETS])
def test_reduction_none_gives_one_value_per_example(case):
    loss, inputs = getattr(losses, case.name), tensors(case.inputs())
    each_value = loss(*inputs, **case.kwargs, reduction="none")
    expected = getattr(reference, case.name)(*case.inputs(), **case.kwargs, reduction="none")
    assert each_value.shape == (case.student[0],)
    np.testing.assert_allclose(each_value.detach().numpy(), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(each_value.mean(), loss(*inputs, **case.kwargs))
    torch.testing.assert_close(each_value.mean(), loss(*inputs, **case.kwargs, reduction="mean"))


# ----------------------------------------------------------------------------------------------------- good manners


@cases(SMALL)
def test_teacher_receives_no_gradient(case):
    student, teacher, *extra = tensors(case.inputs())
    asking = each(lambda v: v.requires_grad_(), teacher)
    loss_of(losses, case.name)(student, asking, *extra, **case.kwargs).backward()
    assert all(v.grad is None for v in (teacher if isinstance(teacher, list) else [teacher]))
    silent = each(lambda v: v.detach(), student)
    assert not loss_of(losses, case.name)(silent, asking, *extra, **case.kwargs).requires_grad


@cases(SMALL)
def test_inputs_are_left_as_they_were(case):
    inputs = tensors(case.inputs())
    loss_of(losses, case.name)(*inputs, **case.kwargs)
    for left, original in zip(inputs, tensors(case.inputs()), strict=True):
        for a, b in zip(*(v if isinstance(v, list) else [v] for v in (left, original)), strict=True):
            assert torch.equal(a, b)


LAYOUTS = {
    "transposed": lambda v: v.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every other number of a larger tensor": lambda v: torch.stack([v, v], -1)[..., 0],
    "channels last": lambda v: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v,
}


@cases(SMALL)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(case, layout):
    loss, (student, teacher, *extra) = loss_of(losses, case.name), tensors(case.inputs())
    laid_out = [each(lambda v: LAYOUTS[layout](v.detach()), x) for x in (student, teacher)]
    torch.testing.assert_close(loss(*laid_out, *extra, **case.kwargs), loss(student, teacher, *extra, **case.kwargs).detach())


@cases(SMALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_autocast_computes_in_float32(case, dtype):
    """bfloat16 inputs, and float32 ones whose matrix products autocast would round to bfloat16."""
    loss, inputs = loss_of(losses, case.name), tensors(case.inputs(), dtype)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*inputs, **case.kwargs)
    in_float32 = [each(lambda v: v.float() if v.is_floating_point() else v, x) for x in tensors(case.inputs(), dtype)]
    in_float32[0] = each(lambda v: v.detach().requires_grad_(), in_float32[0])
    expected = loss(*in_float32, **case.kwargs)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    found, expected = gradients(value, inputs[0]).float(), gradients(expected, in_float32[0])
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol / 10 * expected.abs().max().item())


def test_autocast_standardizes_in_float32():
    z = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = losses.standardize(z)
    torch.testing.assert_close(value, losses.standardize(z.float()))


# -------------------------------------------------------------------------------------------------- extreme inputs


def assert_finite(name, student, teacher, *extra, **kwargs):
    """Value and gradient are finite in float32; returns both."""
    inputs = tensors((student, teacher, *extra), torch.float32)
    value = loss_of(losses, name)(*inputs, **kwargs)
    gradient = gradients(value, inputs[0])
    assert value.isfinite() and gradient.isfinite().all()
    return value.item(), gradient


def signs(shape, seed=0):
    return np.random.default_rng(seed).choice([-1.0, 1.0], shape)


def ordinary(shape, seed=0):
    return np.random.default_rng(seed).normal(0, 3, shape)


def peak(shape, at):
    z = np.zeros(shape)
    z[:, at] = 1e4
    return z


EXTREME_LOGITS = {
    "both huge": (1e4 * signs((4, 6), 1), 1e4 * signs((4, 6), 2)),
    "opposite": (1e4 * signs((4, 6), 1), -1e4 * signs((4, 6), 1)),
    "alike and huge": (1e4 * signs((4, 6), 1), 1e4 * signs((4, 6), 1)),
    "student huge": (1e4 * signs((4, 6)), ordinary((4, 6))),
    "teacher huge": (ordinary((4, 6)), 1e4 * signs((4, 6))),
    "sure of the same class": (peak((4, 6), 2), peak((4, 6), 2)),
    "sure of different classes": (peak((4, 6), 1), peak((4, 6), 2)),
    "sure it is not": (-peak((4, 6), 1), -peak((4, 6), 2)),
    "all equal": (np.full((4, 6), 3.3), np.full((4, 6), -1.7)),
    "all equal and huge": (np.full((4, 6), 1e4), np.full((4, 6), -1e4)),
    "all zero": (np.zeros((4, 6)), np.zeros((4, 6))),
    "student equal": (np.full((4, 6), 3.3), ordinary((4, 6))),
    "teacher equal": (ordinary((4, 6)), np.full((4, 6), 3.3)),
    "nearly equal": (3 + 1e-6 * ordinary((4, 6), 1), 1e-20 * ordinary((4, 6), 2)),
    "the same row": (np.tile(ordinary((1, 6), 1), (4, 1)), np.tile(ordinary((1, 6), 2), (4, 1))),
    "batch of 1": (ordinary((1, 6), 1), ordinary((1, 6), 2)),
    "batch of 1, huge": (1e4 * signs((1, 6), 1), 1e4 * signs((1, 6), 2)),
    "two classes": (ordinary((4, 2), 1), ordinary((4, 2), 2)),
    "two classes, huge": (1e4 * signs((4, 2), 1), 1e4 * signs((4, 2), 2)),
    "two classes, batch of 1": (ordinary((1, 2), 1), ordinary((1, 2), 2)),
}


def every_target(z):
    """One target vector for each class: in a huge row it is now the top class, now the bottom one."""
    return [np.roll(np.arange(len(z)), shift) % z.shape[1] for shift in range(z.shape[1])]


@pytest.mark.parametrize("situation", EXTREME_LOGITS)
@pytest.mark.parametrize("name", FROM_LOGITS)
def test_extreme_logits_stay_finite(name, situation):
    student, teacher = EXTREME_LOGITS[situation]
    for target in every_target(student) if name in TAKE_TARGETS else [None]:
        for kwargs in [{}] if name == "hard" else [{}, {"T": 1}, {"T": 4}]:
            assert_finite(name, student, teacher, *([] if target is None else [target]), **kwargs)


@pytest.mark.parametrize("situation", [s for s in EXTREME_LOGITS if "huge" in s or "sure" in s])
@pytest.mark.parametrize("name", ["kd", "dkd", "nkd", "wsld"])
def test_huge_logits_lose_only_rounding(name, situation):
    """No clamp, no epsilon, no mask of −1000 shows; but float32 steps by 1e-3 at 1e4, and T² = 16 follows."""
    student, teacher = EXTREME_LOGITS[situation]
    for target in every_target(student) if name in TAKE_TARGETS else [None]:
        inputs = (student, teacher) if target is None else (student, teacher, target)
        value, _ = assert_finite(name, *inputs)
        assert value == pytest.approx(loss_of(reference, name)(*inputs), rel=1e-4, abs=0.05)


@pytest.mark.parametrize("situation", [s for s in EXTREME_LOGITS if "equal" in s])
def test_equal_logits_are_standardized_to_finite_values(situation):
    for z in EXTREME_LOGITS[situation]:
        (logits,) = tensors((z,), torch.float32)
        value = losses.standardize(logits)
        assert value.isfinite().all() and gradients((value * tensor(ordinary(z.shape, 3))).sum(), logits).isfinite().all()


def column(values, shape):
    """One value per example, ready to multiply an array of this shape."""
    return np.asarray(values).reshape(-1, *[1] * (len(shape) - 1))


EXTREME_FEATURES = {  # what is done to ordinary features: of the student, of the teacher
    "both zero": (lambda x: 0 * x, lambda x: 0 * x),
    "student zero": (lambda x: 0 * x, lambda x: x),
    "teacher zero": (lambda x: x, lambda x: 0 * x),
    "both constant": (lambda x: 0 * x + 0.7, lambda x: 0 * x - 1.3),
    "student constant": (lambda x: 0 * x + 0.7, lambda x: x),
    "teacher constant": (lambda x: x, lambda x: 0 * x + 0.7),
    "the same for all examples": (lambda x: 0 * x + x[:1], lambda x: 0 * x + x[:1]),
    "student the same for all examples": (lambda x: 0 * x + x[:1], lambda x: x),
    "first example zero": (lambda x: x * column(np.arange(len(x)) > 0, x.shape), lambda x: x),
    "tiny": (lambda x: 1e-23 * x, lambda x: 1e-23 * x),
    "student tiny": (lambda x: 1e-23 * x, lambda x: x),
    "large": (lambda x: 1e3 * x, lambda x: 1e3 * x),
    "as usual": (lambda x: x, lambda x: x),
}


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("situation", EXTREME_FEATURES)
@pytest.mark.parametrize("name", ["fitnet", "ofd", "cat", *FROM_STAGES, *FROM_EMBEDDINGS])
def test_extreme_features_stay_finite(name, situation, batch):
    student_change, teacher_change = EXTREME_FEATURES[situation]
    shapes = [(batch, 6)] if name in FROM_EMBEDDINGS else [(batch, 3, 4, 4), (batch, 2, 2, 2)]
    student = [student_change(ordinary(shape, 1)) for shape in shapes]
    teacher = [teacher_change(ordinary(shape, 2)) for shape in shapes]
    margin = [np.full((1, 3, 1, 1), -0.5)] if name == "ofd" else []
    for kwargs in [{}, {"normalize": True}] if name == "cat" else [{}]:
        if name in FROM_STAGES:
            assert_finite(name, student, teacher, **kwargs)
        else:
            assert_finite(name, student[0], teacher[0], *margin, **kwargs)


@pytest.mark.parametrize("name", ["rkd", "cc"])
def test_batch_of_one_has_no_relations(name):
    value, gradient = assert_finite(name, ordinary((1, 6), 1), ordinary((1, 6), 2))
    assert value == 0 and (gradient == 0).all()


@pytest.mark.parametrize("T", [1, 4])
def test_dkd_has_no_second_term_with_two_classes(T):
    student, teacher, target = Case("dkd", (5, 2)).inputs()
    second = losses.dkd(*tensors((student, teacher, target)), T=T, alpha=0)
    assert abs(second.item()) < 1e-12
    inputs = tensors((student, teacher, target))
    assert gradients(losses.dkd(*inputs, T=T, alpha=0), inputs[0]).abs().max() < 1e-12
    whole_is_kd = losses.dkd(*tensors((student, teacher, target)), T=T)
    torch.testing.assert_close(whole_is_kd, losses.kd(*tensors((student, teacher)), T=T))


SPECIAL = [float(np.float32(x)) for x in (0.0, 1.0, 1e4, -1e4, 1e-6, 1e-23)]


def any_numbers(shape):
    width = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
    return arrays(np.float32, shape, elements=st.one_of(st.sampled_from(SPECIAL), width))


fuzz = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("name", FROM_LOGITS)
def test_no_logits_break_it(name):
    @fuzz
    @given(st.data(), st.integers(1, 4), st.integers(2, 5), st.sampled_from([1.0, 2.0, 4.0]))
    def search(data, batch, classes, T):
        student, teacher = data.draw(any_numbers((batch, classes))), data.draw(any_numbers((batch, classes)))
        extra = [data.draw(arrays(np.int64, batch, elements=st.integers(0, classes - 1)))] * (name in TAKE_TARGETS)
        assert_finite(name, student, teacher, *extra, **({} if name == "hard" else {"T": T}))

    search()


@pytest.mark.parametrize("name", FROM_EMBEDDINGS)
def test_no_embeddings_break_it(name):
    @fuzz
    @given(st.data(), st.integers(1, 4), st.integers(1, 5))
    def search(data, batch, width):
        assert_finite(name, data.draw(any_numbers((batch, width))), data.draw(any_numbers((batch, width))))

    search()


@pytest.mark.parametrize("name", ["fitnet", "ofd", "cat", *FROM_STAGES])
def test_no_feature_maps_break_it(name):
    @fuzz
    @given(st.data(), st.integers(1, 2), st.sampled_from([2, 4]))
    def search(data, batch, side):
        student, teacher = (data.draw(any_numbers((batch, 2, side, side))) for _ in range(2))
        if name in FROM_STAGES:
            assert_finite(name, [student], [teacher])
        elif name == "ofd":
            assert_finite(name, student, teacher, np.full((1, 2, 1, 1), -0.5))
        elif name == "cat":
            assert_finite(name, student, teacher, normalize=True)
        else:
            assert_finite(name, student, teacher)

    search()


# ------------------------------------------------------------------------------------------ student equal to teacher

AT_ITS_FLOOR = (
    "kd",
    "kd_of_standardized",
    "dkd",
    "fitnet",
    "at",
    "nst",
    "ofd",
    "cat",
    "review",
    "sp",
    "rkd",
    "pkt",
    "cc",
)


@cases([case for case in ALIKE if case.name in AT_ITS_FLOOR])
def test_identical_student_is_at_the_minimum_and_it_is_zero(case):
    student, _, *extra = case.inputs()
    inputs = tensors((student, student, *extra))
    inputs = [inputs[0], each(lambda v: v.detach().clone(), inputs[1]), *inputs[2:]]
    value = loss_of(losses, case.name)(*inputs, **case.kwargs)
    assert abs(value.item()) < 1e-12
    assert gradients(value, inputs[0]).abs().max() < 1e-7


def test_identical_student_leaves_dist_only_its_epsilon():
    z, _ = Case("dist", (5, 4)).inputs()
    left = reference.dist(z, z)
    assert 0 < left < 1e-4
    assert losses.dist(*tensors((z, z))).item() == pytest.approx(left, abs=1e-12)


def test_identical_student_in_a_batch_of_one_still_pays_the_intra_class_half_of_dist():
    z, _ = Case("dist", (1, 4)).inputs()
    assert losses.dist(*tensors((z, z)), T=2, gamma=3).item() == pytest.approx(2**2 * 3, abs=1e-5)


@pytest.mark.parametrize("name", ["hard", "nkd", "wsld"])
def test_cross_entropies_are_not_zero_for_an_identical_student(name):
    z, _, *extra = Case(name, (5, 4)).inputs()
    assert getattr(losses, name)(*tensors((z, z, *extra))).item() > 0.01


# ------------------------------------------------------------------------------- numbers anyone can work out by hand


def number(name, *inputs, **kwargs):
    def float64(x):
        return torch.tensor(x, dtype=torch.float64)

    inputs = [[float64(stage) for stage in x] if name in FROM_STAGES else float64(x) for x in inputs]
    return getattr(losses, name)(*inputs, **kwargs).item()


def with_target(name, student, teacher, target, **kwargs):
    student, teacher = (torch.tensor(z, dtype=torch.float64) for z in (student, teacher))
    return getattr(losses, name)(student, teacher, torch.tensor(target), **kwargs).item()


def stage(*rows):
    """One example with one channel."""
    return [[[list(row) for row in rows]]]


@pytest.mark.parametrize("T", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_kd_is_T_squared_times_the_batch_mean(batch, T):
    sure, clueless = [[1000.0, 0, 0, 0]] * batch, [[0.0, 0, 0, 0]] * batch
    assert number("kd", clueless, sure, T=T) == pytest.approx(T**2 * log(4))


def test_kd_scales_with_T_squared():
    student, teacher = tensors(Case("kd", (4, 5)).inputs())
    torch.testing.assert_close(losses.kd(3 * student, 3 * teacher, T=3), 9 * losses.kd(student, teacher, T=1))


def test_kd_weighs_by_the_teacher_not_by_the_student():
    third = log(1 / 3)
    expected = 0.5 * (log(0.5) - third) * 2  # the teacher halves its belief between two classes, the student thirds it
    assert number("kd", [[0.0, 0, 0]], [[0.0, 0, -1000]], T=1) == pytest.approx(expected)


def test_hard_is_cross_entropy_with_the_top_class_of_the_teacher():
    student, teacher = tensors(Case("hard", (6, 5)).inputs())
    torch.testing.assert_close(losses.hard(student, teacher), cross_entropy(student, teacher.argmax(1)))
    torch.testing.assert_close(losses.hard(student, 7 * teacher), losses.hard(student, teacher))


def test_standardize_divides_by_the_unbiased_std():
    z = losses.standardize(torch.tensor([[1.0, 2, 3], [-10, 0, 10]], dtype=torch.float64))
    torch.testing.assert_close(z, torch.tensor([[-1.0, 0, 1]] * 2, dtype=torch.float64), rtol=0, atol=2e-7)


def test_standardize_adds_its_epsilon_to_the_std():
    z = losses.standardize(1e-7 * torch.tensor([[1.0, 2, 3]], dtype=torch.float64))
    torch.testing.assert_close(z, torch.tensor([[-0.5, 0, 0.5]], dtype=torch.float64))


@pytest.mark.parametrize("T, alpha, beta", [(1, 1, 8), (4, 1, 8), (2, 3, 0.5)])
def test_dkd_of_a_clueless_student(T, alpha, beta):
    """Teacher: half on the target, the rest on one other class of three. Student: a quarter each."""
    teacher = [[0.0, 0, -1000 * T, -1000 * T]]
    target_term = 0.5 * log(0.5 / 0.25) + 0.5 * log(0.5 / 0.75)
    expected = T**2 * (alpha * target_term + beta * log(3))
    found = with_target("dkd", [[0.0] * 4], teacher, [0], T=T, alpha=alpha, beta=beta)
    assert found == pytest.approx(expected)


def test_dkd_with_the_teacher_as_weight_is_kd():
    """KL(p_t ‖ p_s) = target term + (1 − p_t[y]) · non-target term: the identity that the paper starts from."""
    student, teacher, target = tensors(Case("dkd", (1, 6)).inputs())
    rest = 1 - (teacher / 4).softmax(1)[0, target[0]].item()
    torch.testing.assert_close(losses.dkd(student, teacher, target, beta=rest), losses.kd(student, teacher))


def test_dist_adds_its_epsilon_to_the_product_of_the_norms():
    """Two classes at p = 1/2 ± d: the product of the norms is 2d². At 1e-8 the epsilon halves the correlation."""
    d = sqrt(1e-8 / 2)
    z = [[log((0.5 + d) / (0.5 - d)), 0.0]]
    assert number("dist", z, z, gamma=0) == pytest.approx(0.5, rel=1e-6)
    columns = [[z[0][0], 0.0], [0.0, z[0][0]]]  # each class: 1/2 ± d over the batch, the same product
    assert number("dist", columns, columns, beta=0) == pytest.approx(0.5, rel=1e-6)


def test_dist_of_opposite_beliefs_is_two_for_each_half():
    student, teacher = [[2.0, -2], [-2, 2]], [[-2.0, 2], [2, -2]]
    assert number("dist", student, teacher, beta=1, gamma=0) == pytest.approx(2)
    assert number("dist", student, teacher, beta=0, gamma=1) == pytest.approx(2)
    assert number("dist", student, teacher, T=2, beta=3, gamma=5) == pytest.approx(4 * (3 * 2 + 5 * 2), rel=1e-6)


@pytest.mark.parametrize("T, gamma", [(1, 1.5), (3, 3.5)])
def test_nkd_of_a_clueless_student(T, gamma):
    """Its target term has no temperature; the non-target term is log(C − 1) whatever the teacher thinks."""
    teacher = [[2.0, 0, 1, -1]]
    expected = e**2 / (e**2 + 1 + e + 1 / e) * log(4) + gamma * T**2 * log(3)
    assert with_target("nkd", [[0.0] * 4], teacher, [0], T=T, gamma=gamma) == pytest.approx(expected)


def test_nkd_is_not_dkd():
    student, teacher, target = tensors(Case("nkd", (4, 5)).inputs())
    nkd, dkd = losses.nkd(student, teacher, target, gamma=1), losses.dkd(student, teacher, target, T=1, beta=1)
    assert abs(nkd.item() - dkd.item()) > 0.1
    (by_nkd,), (by_dkd,) = (torch.autograd.grad(value, student) for value in (nkd, dkd))
    assert (by_nkd - by_dkd).abs().max() > 0.01


def test_wsld_weighs_by_how_much_harder_the_example_is_for_the_student():
    half = [[0.0, 0]]  # both at CE = log 2: weight 1 − 1/e
    assert with_target("wsld", half, half, [0], T=1) == pytest.approx((1 - 1 / e) * log(2), rel=1e-6)
    knows = [[1000.0, 0]]  # nothing left to learn from an easy example
    assert with_target("wsld", knows, half, [0]) == pytest.approx(0, abs=1e-12)
    assert with_target("wsld", half, knows, [0], T=4) == pytest.approx(16 * log(2))


def test_wsld_weights_have_no_temperature():
    student, teacher = [[log(3), 0]], [[0.0, 0]]
    weight = 1 - exp(-log(4 / 3) / (log(2) + 1e-7))
    soft = -0.5 * (log(sqrt(3) / (1 + sqrt(3))) + log(1 / (1 + sqrt(3))))  # at T=2 the odds 3:1 become √3:1
    assert with_target("wsld", student, teacher, [0], T=2) == pytest.approx(4 * weight * soft)


def test_wsld_adds_its_epsilon_to_the_cross_entropy_of_the_teacher():
    student, sure = [[-log(expm1(1e-7)), 0.0]], [[1000.0, 0]]  # cross-entropies 1e-7 and 0: the ratio is 1
    assert with_target("wsld", student, sure, [0], T=1) == pytest.approx((1 - 1 / e) * 1e-7, rel=1e-6, abs=0)


def test_fitnet_is_the_mean_over_all_elements():
    a = torch.zeros(2, 3, 4, 5)
    assert losses.fitnet(a + 2, a).item() == pytest.approx(4)


def test_at_compares_unit_maps_and_sums_over_stages():
    student, teacher = stage([3, 4]), stage([0, 1])  # squares 9 : 16 and 0 : 1
    a, b = 9 / sqrt(337), 16 / sqrt(337)
    expected = (a**2 + (1 - b) ** 2) / 2
    assert number("at", [student], [teacher]) == pytest.approx(expected)
    assert number("at", [student] * 3, [teacher] * 3) == pytest.approx(3 * expected)
    assert number("at", [student], [teacher], p=1) == pytest.approx((0.6**2 + 0.2**2) / 2)


def test_at_pools_the_larger_feature_map_before_the_power():
    large, small = stage([1, -1, 2, 0], [1, -1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]), stage([0, 0.5], [0, 1])
    assert number("at", [large], [small]) == pytest.approx(0, abs=1e-15)
    assert number("at", [small], [large]) == pytest.approx(0, abs=1e-15)


def test_nst_compares_squared_products_of_unit_channels():
    assert number("nst", [stage([1, 0])], [stage([0, 5])]) == pytest.approx(1 + 1)
    assert number("nst", [stage([1, 0])], [stage([3, 4])]) == pytest.approx(1 + 1 - 2 * 0.6**2)
    assert number("nst", [stage([1, 0])] * 2, [stage([-3, 0])] * 2) == pytest.approx(0, abs=1e-12)
    two = [[[[1.0, 0]], [[0, 1.0]]]]  # two channels at a right angle: k(s,s) has mean 1/2, k(s,t) too
    assert number("nst", [two], [stage([1, 0])]) == pytest.approx(1 + 0.5 - 2 * 0.5)


def test_ofd_asks_for_positives_and_only_bounds_negatives():
    m = [[[[-1.0]]]]
    for s, t, expected in [
        (0.0, -2.0, 1.0),  # far below the margin: come down to the margin, no further
        (-2.0, -3.0, 0.0),
        (1.0, -0.5, 2.25),  # between margin and 0: do not exceed the teacher
        (-0.7, -0.5, 0.0),
        (0.0, 2.0, 4.0),  # positive: match it, from both sides
        (3.0, 2.0, 1.0),
    ]:
        assert number("ofd", stage([s]), stage([t]), m) == pytest.approx(expected)


def test_ofd_sums_over_elements_and_averages_over_the_batch():
    ones, margin = torch.ones(4, 3, 2, 5), -torch.ones(1, 3, 1, 1)
    assert losses.ofd(ones + 1, ones, margin).item() == pytest.approx(3 * 2 * 5)


def test_cat_compares_what_is_left_after_pooling():
    student, teacher = stage([4, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 8]), stage([0, 0], [0, 1])
    assert number("cat", student, teacher) == pytest.approx((1 + 1) / 4)
    assert number("cat", student, teacher, size=1) == pytest.approx((0.75 - 0.25) ** 2)
    unit = [1 / sqrt(5), 2 / sqrt(5)]
    assert number("cat", student, teacher, normalize=True) == pytest.approx((unit[0] ** 2 + (1 - unit[1]) ** 2) / 4)


def test_cat_normalizes_each_class_by_itself():
    maps = torch.ones(2, 3, 4, 4) * torch.tensor([1.0, 10, 100]).view(1, 3, 1, 1)
    assert losses.cat(maps, torch.ones(2, 3, 4, 4), normalize=True).item() == pytest.approx(0, abs=1e-12)


def test_review_halves_the_weight_at_each_coarser_level():
    zero = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    checkered = zero.clone()
    checkered[..., ::2, ::2] = checkered[..., 1::2, 1::2] = 1
    checkered = 2 * checkered - 1  # MSE 1, and nothing is left after any pooling
    assert losses.review([checkered], [zero]).item() == pytest.approx(1 / (1 + 1 / 2 + 1 / 4 + 1 / 8))
    assert losses.review([checkered[..., :4, :4]], [zero[..., :4, :4]]).item() == pytest.approx(1 / (1 + 1 / 2 + 1 / 4))
    assert losses.review([checkered[..., :2, :2]], [zero[..., :2, :2]]).item() == pytest.approx(1 / (1 + 1 / 2))
    assert losses.review([checkered[..., :1, :1]], [zero[..., :1, :1]]).item() == pytest.approx(1)
    assert losses.review([zero + 3, zero + 3], [zero, zero]).item() == pytest.approx(2 * 9)


def test_sp_rows_have_length_one():
    """By L2 and not by sum: rows of [[1, 1], [1, 2]] become (1, 1)/√2 and (1, 2)/√5."""
    expected = ((1 - 1 / sqrt(2)) ** 2 + 1 / 2 + 1 / 5 + (1 - 2 / sqrt(5)) ** 2) / 4
    assert number("sp", [[1.0, 0], [1, 1]], [[1.0, 0], [0, 1]]) == pytest.approx(expected)


def test_rkd_compares_a_line_with_a_triangle():
    line, triangle = [[0.0], [1], [2]], [[0.0, 0], [1, 0], [0.5, sqrt(3) / 2]]
    distances = 2 * (0.25**2 / 2 + 0.5**2 / 2 + 0.25**2 / 2) / 9  # 3/4, 3/2, 3/4 against 1, 1, 1
    angles = (2 * 0.5**2 / 2 + 2 * (1.5 - 0.5) + 2 * 0.5**2 / 2) / 27  # cosines 1, −1, 1 against 1/2
    assert number("rkd", line, triangle, distance=1, angle=0) == pytest.approx(distances)
    assert number("rkd", line, triangle, distance=0, angle=1) == pytest.approx(angles)
    assert number("rkd", line, triangle) == pytest.approx(25 * distances + 50 * angles)


def test_rkd_does_not_see_scale_or_place():
    student, teacher = tensors(Case("rkd", (5, 6)).inputs())
    torch.testing.assert_close(losses.rkd(3 * student + 1, teacher), losses.rkd(student, teacher))


def test_pkt_compares_shares_of_similarity():
    """Right angle: rows (2/3, 1/3). Same direction: rows (1/2, 1/2)."""
    expected = 2 * (0.5 * log(0.5 / (2 / 3)) + 0.5 * log(0.5 / (1 / 3))) / 4
    assert number("pkt", [[1.0, 0], [0, 2]], [[1.0, 1], [3, 3]]) == pytest.approx(expected, rel=1e-5)


def test_pkt_adds_its_epsilon_to_the_norm():
    """Embeddings of length 1e-7 count half, so their squared cosine with themselves is a quarter."""
    s = [(0.25 + 1) / 2, (-0.25 + 1) / 2]
    share = [s[0] / sum(s), s[1] / sum(s)]
    expected = sum(2 * 0.5 * log(0.5 / p) for p in share) / 4
    assert number("pkt", [[1e-7], [-1e-7]], [[1.0], [1.0]]) == pytest.approx(expected, rel=1e-5)


def test_cc_multiplies_the_gaps_of_neighbours():
    student, teacher = [[1.0, 0], [0, 2], [3, 3]], [[0.0, 0], [3, 0], [3, 5]]  # gaps (1, 0), (3, 2), (0, 2)
    assert number("cc", student, teacher) == pytest.approx((3 + 4) / 2)
