"""What a method is: a loss, what it taps, what it trains, how it is weighted; and methods by name.

    @register("mine")
    class Mine(Method):
        taps = ("logits",)

        def __init__(self, T: float = 4, weight: float = 1, ce: float = 1):
            super().__init__(weight, ce, T=T)

        def loss(self, student, teacher, target):
            return my_loss(student.logits, teacher.logits, self.T)

in a file of the folder `plugins/` makes `-p method mine` work and `method: mine` in study files.
"""

import hashlib
import importlib.util
import inspect
import itertools
import sys
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from typing import Any, ClassVar

from torch import Tensor, nn

from kdfast import provenance
from kdfast.errors import KdfastError, unknown
from kdfast.taps import Outputs

_REGISTRY: dict[str, type["Method"]] = {}
_LOADED: dict[str, str] = {}  # plugin file -> digest of what was loaded

Weight = float | Callable[[float], float]  # a number, or a schedule of the part of training that is done (0…1)
FIELDS = ("logits", "stages", "pre_relu", "last", "pooled", "cam")  # of kdfast.taps.Outputs

# Ranges of arguments by name: the test and the words for it
_ABOVE_0 = (lambda v: v > 0, "above 0")
_FROM_0 = (lambda v: v >= 0, "at least 0")
_COUNT = (lambda v: v >= 1 and v == int(v), "a whole number above 0")
RANGES = {
    **dict.fromkeys(("T", "p"), _ABOVE_0),
    **dict.fromkeys(("alpha", "beta", "gamma", "distance", "angle"), _FROM_0),
    **dict.fromkeys(("size", "stage", "dim"), _COUNT),
}


@dataclass(frozen=True)
class ramp:  # lower case as fastai's sched_lin
    """A weight that grows evenly over the first `epochs` epochs of a fit and reaches `end` in the last of them."""

    epochs: int
    end: float = 1

    def at(self, pct: float, epoch: int) -> float:
        return self.end * min((epoch + 1) / self.epochs, 1)

    def __mul__(self, factor: float) -> "ramp":
        return ramp(self.epochs, self.end * factor)

    def __repr__(self) -> str:
        return f"ramp({self.epochs})" if self.end == 1 else f"ramp({self.epochs}, {self.end:g})"


@dataclass(frozen=True)
class scaled:
    """start + factor · schedule: what is left to the other side (1 − alpha), or a multiple of a schedule."""

    schedule: Any
    factor: float
    start: float = 0

    def at(self, pct: float, epoch: int) -> float:
        return self.start + self.factor * weight_now(self.schedule, pct, epoch)


def is_schedule(weight: Any) -> bool:
    return callable(weight) or hasattr(weight, "at")


def weight_now(weight: Weight, pct: float, epoch: int) -> float:
    """A weight's value after the part `pct` of training, in `epoch` (from 0)."""
    if hasattr(weight, "at"):
        return weight.at(pct, epoch)
    return float(weight(pct)) if callable(weight) else weight


def checked_weight(method: str, name: str, value: Any) -> Weight:
    """A number, a schedule, or, from papermill and study files, `{ramp: epochs, end: value}`."""
    if isinstance(value, Mapping) and {"ramp"} <= set(value) <= {"ramp", "end"}:
        value = ramp(value["ramp"], value.get("end", 1))
    if isinstance(value, ramp) and not value.epochs > 0:
        raise KdfastError(f"{name} of method {method} must grow over at least one epoch, not {value.epochs}")
    if is_schedule(value):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise KdfastError(
            f"argument {name} of method {method} must be a number from 0, a schedule or {{ramp: epochs}}, not {value!r}"
        )
    return value


class Method:
    """total = ce · (the student's own loss) + weight · loss(student, teacher, target).

    Methods add up: `DKD() + AT()`.
    """

    name = "method"
    taps: ClassVar[tuple[str, ...]] = ("logits",)  # what of `Outputs` the loss reads
    targets = False  # whether the loss reads the target; it then returns a value per example (B,)
    formula = ""  # name of the function of kdfast.losses, for the documentation
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
        self.adapters: nn.Module | None = None

    def build(self, student: Outputs, teacher: Outputs) -> nn.Module | None:
        """What is trained beside the student, made to fit the shapes of both; at hand in `loss` as `self.adapters`."""
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
        self.taps = tuple({tap for part in self._parts for tap in part.taps})

    @property
    def parts(self) -> list[Method]:
        return self._parts

    def __repr__(self) -> str:
        return " + ".join(map(repr, self._parts))


# By name


def register(name: str):
    """Class decorator: make a Method available under `name` to papermill (`-p method name`) and study files."""

    def add(cls: type[Method]) -> type[Method]:
        odd = set(cls.taps) - set(FIELDS)
        if odd:
            raise unknown("tap", sorted(odd)[0], FIELDS, f"method {name}")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


class _AsItIs(SourceFileLoader):
    """Without bytecode, which takes a file that changed within a second to the same length for unchanged."""

    def get_code(self, fullname: str):
        return self.source_to_code(self.get_data(self.path), self.path)


def load_plugins() -> None:
    """Import the methods and models of `plugins/*.py`, each file again when it has changed."""
    import kdfast.methods  # noqa: F401  the published ones come first

    for path in provenance.plugins():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if _LOADED.get(str(path)) == digest:
            continue
        name = f"kdfast_plugin_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path, loader=_AsItIs(name, str(path)))
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except KdfastError:
            raise
        except Exception as error:
            raise KdfastError(f"plugin {path} does not load ({type(error).__name__}: {error}): mend it or remove it") from error
        _LOADED[str(path)] = digest


def method_names() -> list[str]:
    """All registered names."""
    load_plugins()
    return sorted(_REGISTRY)


def method_class(name: str) -> type[Method]:
    """The Method of that name; an unknown one raises a KdfastError with the nearest."""
    load_plugins()
    if name not in _REGISTRY:
        raise unknown("method", name, [*_REGISTRY, "plain"])
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
