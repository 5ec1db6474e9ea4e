"""Where a network's features are: found by one probing forward, overridden by module paths.

Stages of convolutional nets are found by resolution, those of transformers by depth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdfast.core.errors import KdfastError, unknown
from kdfast.distill.hooks import evaluating

Size = tuple[int, int]


@dataclass
class _Call:
    """One call of a module in the probing forward."""

    path: str
    module: nn.Module
    given: Tensor | None
    began: int  # on the clock of beginnings and ends of calls
    made: Tensor | None = None
    ended: int = 0


@dataclass(frozen=True)
class Layout:
    """Where a network's features are: module paths, found by `probe`."""

    stages: tuple[str, ...]  # shallow to deep
    by_depth: bool  # a transformer's: any of them may be left out
    size: tuple[int, int]  # of the images
    grid: tuple[int, int] | None  # of a transformer's patches
    relus: dict[str, str]  # stage -> the ReLU module that ends it
    clipped: frozenset[str]  # stages that end in a ReLU which is no module
    norms: dict[str, str]  # stage -> the BatchNorm that feeds its end
    pooled: str | None  # the module that gets the pooled vector
    cam: tuple[str, str] | None  # the module that makes the map whose mean the classifier gets, the classifier

    def chosen(self, n: int) -> tuple[str, ...]:
        """The `n` deepest stages of a convolutional net; `n` of a transformer, evenly spaced."""
        if not self.by_depth:
            return self.stages[len(self.stages) - n :]
        return tuple(self.stages[round(len(self.stages) * (i + 1) / n) - 1] for i in range(n))


def probe(model: nn.Module, inputs: Sequence[Tensor], stages: Sequence[str] | None = None) -> Layout:
    """Find the layers by one forward of `inputs` (a batch of two will do) in eval mode and without gradients.

    Leaves modes, BatchNorm statistics and hooks as they were. `stages` overrides what would be found; an unknown path
    raises a KdfastError with the nearest.
    """
    modules = dict(model.named_modules())
    for path in stages or ():
        if path not in modules or not path:
            raise unknown("layer", path, (p for p in modules if p), type(model).__name__)
    calls, logits = _calls(model, inputs)
    size = tuple(inputs[0].shape[-2:])
    found, by_depth = _stages(calls, size) if stages is None else (tuple(stages), False)
    if not found:
        raise KdfastError(f"found no stages in {type(model).__name__}: name the layers, stages=[…] or teacher_stages=[…]")
    last = {call.path: call for call in calls}  # of several calls, the last
    first = last[found[0]].began if found[0] in last else 0
    grids = [resolution(c.made, size) for c in calls if kind(c.made, size) == "map" and c.ended < first]  # patches come last
    for path in found:
        if path not in last or kind(last[path].made, size) not in ("map", "channels last", "tokens"):
            raise KdfastError(f"layer {path} of {type(model).__name__} gives no map: name one whose output is (B, C, H, W)")
    relus, clipped, norms = {}, set(), {}
    for path in found:
        relu, norm, bare = _ending(calls, last[path], size)
        relus |= {path: relu} if relu else {}
        norms |= {path: norm} if norm else {}
        clipped |= {path} if bare else set()
    pooled = _pooled(calls, last[found[-1]].ended)
    cam = _cam(calls, logits, size)
    return Layout(
        found, by_depth, size, grids[-1] if grids else None, relus, frozenset(clipped), norms, pooled and pooled.path, cam
    )


@torch.no_grad()
def _calls(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[list[_Call], Tensor]:
    """All modules' calls in the order in which they end, and the model's output."""
    clock, ended, running, handles = [0], [], [], []

    def begin(path: str) -> Callable:
        def hook(module, inputs):
            clock[0] += 1
            given = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
            running.append(_Call(path, module, given, clock[0]))

        return hook

    def end(module, inputs, output):
        clock[0] += 1
        call = running.pop()
        call.made, call.ended = output if isinstance(output, Tensor) else None, clock[0]
        ended.append(call)

    try:
        for path, module in model.named_modules():
            if path:
                handles += [module.register_forward_pre_hook(begin(path)), module.register_forward_hook(end)]
        with evaluating(model):
            logits = model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return ended, logits


def kind(x: Tensor | None, size: Size) -> str:
    """vector (B, D) or (B, D, 1, 1), tokens (B, N, D), map (B, C, H, W), channels last (B, H, W, C), or other."""
    if x is None or not x.is_floating_point():
        return "other"
    if x.ndim == 2 or (x.ndim == 4 and x.shape[2:] == (1, 1)):
        return "vector"
    if x.ndim == 4:
        aspect = size[0] / size[1]
        first, last = (abs(a / b / aspect - 1) for a, b in ((x.shape[2], x.shape[3]), (x.shape[1], x.shape[2])))
        return "map" if first <= last else "channels last"
    return "tokens" if x.ndim == 3 else "other"


def resolution(x: Tensor, size: Size) -> Size:
    return tuple(x.shape[2:]) if kind(x, size) == "map" else tuple(x.shape[1:3])


def _stages(calls: list[_Call], size: Size) -> tuple[tuple[str, ...], bool]:
    """Paths of the stages, and whether they are a transformer's."""
    maps = [c for c in calls if kind(c.made, size) in ("map", "channels last") and max(resolution(c.made, size)) > 1]
    blocks = [(c.path + ".", resolution(c.made, size)) for c in maps if _halves(c, size)]
    ends: dict[tuple[int, int], str] = {}
    for call in maps:
        here = resolution(call.made, size)
        inside = any(call.path.startswith(path) and here > after for path, after in blocks)
        if not inside and (not ends or here <= min(ends)):
            ends[here] = call.path
    layers = _blocks(calls, size)
    ended = {call.path: call.ended for call in calls}
    deep = layers and all(ended[path] < ended[layers[-1]] for path in ends.values())  # maps, if any, are a stem's
    return (layers, True) if deep else (tuple(ends.values()), False)


def _halves(call: _Call, size: Size) -> bool:
    """A block that lowers the resolution: what lies inside at the old one is not the end of a stage.

    A plain Sequential is a list of such blocks rather than one.
    """
    if type(call.module) is nn.Sequential or kind(call.given, size) not in ("map", "channels last"):
        return False
    before, after = resolution(call.given, size)[0], resolution(call.made, size)[0]
    return after < before <= 2 * after + 1 and any(call.module.children())


def _blocks(calls: list[_Call], size: Size) -> tuple[str, ...]:
    """A transformer's: the outermost siblings of one class that give tokens of one shape."""
    groups: dict[tuple, list[str]] = {}
    for call in calls:
        if kind(call.made, size) == "tokens" and any(True for _ in call.module.parameters()):
            parent = call.path.rpartition(".")[0]
            paths = groups.setdefault((parent.count(".") + bool(parent), parent, type(call.module), call.made.shape), [])
            paths += [call.path] if call.path not in paths else []
    several = [(depth, -len(paths), paths) for (depth, *_), paths in groups.items() if len(paths) > 1]
    return tuple(min(several)[2]) if several else ()


def _ending(calls: list[_Call], stage: _Call, size: Size) -> tuple[str | None, str | None, bool]:
    """Of a stage: the ReLU module that ends it, the BatchNorm before, and whether a ReLU that is no module ends it."""
    same = [c for c in calls if c.made is not None and c.made.data_ptr() == stage.made.data_ptr() and c.ended <= stage.ended]
    relus = [c for c in same if isinstance(c.module, (nn.ReLU, nn.ReLU6))]
    before = relus[-1].began if relus else stage.ended + 1
    norms = [
        c.path for c in calls if isinstance(c.module, nn.BatchNorm2d) and c.ended < before and c.made.shape == stage.made.shape
    ]
    x = stage.made
    bare = not relus and bool((x >= 0).all()) and bool((x == 0).any())
    return relus[-1].path if relus else None, norms[-1] if norms else None, bare


def _pooled(calls: list[_Call], after: int) -> _Call | None:
    """The first call that gets a vector once the last stage is through: before any dropout of the head."""
    heads = [c for c in calls if c.began > after and c.given is not None and kind(c.given, (1, 1)) == "vector"]
    return min(heads, key=lambda c: c.began) if heads else None


def _cam(calls: list[_Call], logits: Tensor, size: Size) -> tuple[str, str] | None:
    """The map and the linear classifier, if the classifier gets nothing but the map's mean."""
    linear = [c for c in calls if isinstance(c.module, nn.Linear) and c.made.shape == logits.shape and c.given.ndim == 2]
    if not linear:
        return None
    head = linear[-1]
    for call in reversed([c for c in calls if c.ended < head.began]):
        form = kind(call.made, size)
        if form in ("map", "channels last", "tokens"):
            mean = {"map": (2, 3), "channels last": (1, 2), "tokens": (1,)}[form]
            x = call.made.mean(mean)
            return (call.path, head.path) if x.shape == head.given.shape and torch.allclose(x, head.given, 1e-3, 1e-5) else None
    return None


def pair(student: Layout, teacher: Layout) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """As many stages of one as of the other: those that both have, counted from the deepest."""
    n = min(len(student.stages), len(teacher.stages))
    return student.chosen(n), teacher.chosen(n)
