"""What a method is: a loss, which features it compares, what it trains, how it is weighted; and methods by name.

    @register("mine")
    class Mine(Method):
        features = ("logits",)

        def __init__(self, T: float = 4, weight: float = 1, ce: float = 1):
            super().__init__(weight, ce, T=T)

        def loss(self, student, teacher, target):
            return my_loss(student.logits, teacher.logits, self.T)

in a file of the folder `plugins/` makes `-p method mine` work and `method: mine` in study files.
"""

import importlib
import inspect
import itertools
from collections.abc import Mapping
from copy import copy
from typing import Any, ClassVar

from torch import Tensor, nn

from kdfast.core.errors import KdfastError, unknown
from kdfast.core.plugins import load_plugins
from kdfast.distill.features import Outputs
from kdfast.distill.schedules import Weight, checked_weight

_REGISTRY: dict[str, type["Method"]] = {}

FIELDS = ("logits", "stages", "pre_relu", "last", "pooled", "cam")  # of kdfast.distill.features.Outputs

# Ranges of arguments by name: the test and the words for it
_ABOVE_0 = (lambda v: v > 0, "above 0")
_FROM_0 = (lambda v: v >= 0, "at least 0")
_COUNT = (lambda v: v >= 1 and v == int(v), "a whole number above 0")
RANGES = {
    **dict.fromkeys(("T", "p"), _ABOVE_0),
    **dict.fromkeys(("alpha", "beta", "gamma", "distance", "angle"), _FROM_0),
    **dict.fromkeys(("size", "stage", "dim"), _COUNT),
}


class Method:
    """total = ce · (the student's own loss) + weight · loss(student, teacher, target).

    Methods add up: `DKD() + AT()`.
    """

    name = "method"
    features: ClassVar[tuple[str, ...]] = ("logits",)  # what of `Outputs` the loss reads
    targets = False  # whether the loss reads the target; it then returns a value per example (B,)
    formula = ""  # name of the function of kdfast.distill.losses, for the documentation
    trains = ""  # what `build` makes, in words

    def __init__(self, weight: Weight = 1.0, ce: Weight = 1.0, **arguments: Any):
        for key, value in arguments.items():
            setattr(self, key, value)
            fits, words = RANGES.get(key, (None, None))
            if fits and not fits(value):
                what = "the temperature T" if key == "T" else key
                raise KdfastError(f"{what} of method {self.name} must be {words}, not {value}")
        self.weight, self.ce = checked_weight(self.name, "weight", weight), checked_weight(self.name, "ce", ce)
        self.arguments = arguments
        self.projectors: nn.Module | None = None

    def build(self, student: Outputs, teacher: Outputs) -> nn.Module | None:
        """What is trained beside the student, made to fit the shapes of both; at hand in `loss` as `self.projectors`."""
        return None

    def loss(self, student: Outputs, teacher: Outputs, target: Tensor) -> Tensor:
        """The distillation loss, unweighted: a scalar, or (B,) if the method reads the target (class ids, (B,))."""
        raise NotImplementedError

    @property
    def parts(self) -> list["Method"]:
        return [self]

    def __add__(self, other: "Method") -> "Sum":
        return Sum([*self.parts, *other.parts])

    def __repr__(self) -> str:
        values = {**self.arguments, "weight": self.weight, "ce": self.ce}
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in values.items())})"


class Sum(Method):
    """Several methods at once, each with its own weight.

    The student's own loss counts once, with the smallest of their `ce`: KD's 0.1, which leaves the rest to the teacher,
    holds whatever is added to it; the others' 1 asks for nothing.
    """

    def __init__(self, parts: list[Method]):
        self._parts = [copy(part) for part in parts]
        names: list[str] = []
        for part in self._parts:  # each term has a name of its own in the history
            free = (f"{part.name}_{n}" for n in itertools.count(2))
            part.name = part.name if part.name not in names else next(name for name in free if name not in names)
            names.append(part.name)
        self.name = "+".join(names)
        self.features = tuple({feature for part in self._parts for feature in part.features})

    @property
    def parts(self) -> list[Method]:
        return self._parts

    def __repr__(self) -> str:
        return " + ".join(map(repr, self._parts))


# By name


def register(name: str):
    """Class decorator: make a Method available under `name` to papermill (`-p method name`) and study files."""

    def add(cls: type[Method]) -> type[Method]:
        odd = set(cls.features) - set(FIELDS)
        if odd:
            raise unknown("feature", sorted(odd)[0], FIELDS, f"method {name}")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def _load() -> None:
    """Have all methods registered, the published ones first."""
    importlib.import_module("kdfast.distill.methods")  # which imports this module
    load_plugins()


def method_names() -> list[str]:
    """All registered names."""
    _load()
    return sorted(_REGISTRY)


def method_class(name: str) -> type[Method]:
    """The Method of that name; an unknown one raises a KdfastError with the nearest."""
    _load()
    if name not in _REGISTRY:
        raise unknown("method", name, [*_REGISTRY, "baseline"])
    return _REGISTRY[name]


def create_method(name: str, args: Mapping[str, Any]) -> Method:
    """The method of that name with those arguments; a KdfastError names what is unknown or of the wrong type.

    A sum is written `dkd+at`, its arguments by method: `{dkd: {T: 2}, at: {weight: 500}}`.
    """
    if "+" in name:
        names = name.split("+")
        if len(set(names)) < len(names):
            raise KdfastError(f"method {name} names a method twice: name each once")
        for key, value in args.items():
            if key not in names:
                raise unknown(f"argument of method {name}", key, names)
            if not isinstance(value, Mapping):
                raise KdfastError(f"argument {key} of method {name} must be a mapping of {key}'s arguments, not {value!r}")
        return Sum([create_method(part, args.get(part, {})) for part in names])
    cls = method_class(name)
    known = inspect.signature(cls).parameters
    for key, value in args.items():
        if key not in known:
            raise unknown(f"argument of method {name}", key, known)
        default = known[key].default
        if key in ("weight", "ce") or (known[key].annotation == Weight and isinstance(value, Mapping)):
            checked_weight(name, key, value)
        elif isinstance(default, bool):
            if not isinstance(value, bool):
                raise KdfastError(f"argument {key} of method {name} must be true or false, not {value!r}")
        elif isinstance(default, (int, float)) and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise KdfastError(f"argument {key} of method {name} must be a number, not {value!r}")
    return cls(**args)
