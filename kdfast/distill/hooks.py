"""Running a network without leaving a trace: eval mode and hooks that are taken back, whatever happens."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

Point = tuple[str, str]  # (module path, "in" or "out")
Points = Iterable[Point]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode; each has its own mode back afterwards, whatever happens."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def watching(model: nn.Module, points: Points) -> Iterator[dict[Point, Tensor]]:
    """Collect what goes into ("in") or comes out of ("out") modules while inside; of several calls the last counts."""
    seen: dict[Point, Tensor] = {}
    handles = []

    def see(point: Point, inplace: bool) -> Callable:
        def hook(module, inputs, output=None):
            value = output if point[1] == "out" else inputs[0]
            seen[point] = value.clone() if inplace else value

        return hook

    modules = dict(model.named_modules()) if points else {}
    try:
        for path, side in points:
            module = modules[path]
            if side == "in":
                handles.append(module.register_forward_pre_hook(see((path, side), getattr(module, "inplace", False))))
            else:
                handles.append(module.register_forward_hook(see((path, side), False)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def watch_once(model: nn.Module, points: Points) -> dict[Point, Tensor]:
    """What `watching` collects in the next forward, whoever calls it; afterwards the model is as before.

    The hooks live inside that one call of `forward`, so an error or an interrupt there leaves none behind.
    """
    seen: dict[Point, Tensor] = {}

    def forward(*args, **kwargs):
        unwatch(model)
        with watching(model, points) as now:
            result = model.forward(*args, **kwargs)
        seen.update(now)
        return result

    forward.replaces = model.__dict__.get("forward")
    model.__dict__["forward"] = forward
    return seen


def unwatch(model: nn.Module) -> None:
    """Take back `watch_once` where the forward never came."""
    forward = model.__dict__.get("forward")
    if hasattr(forward, "replaces"):
        del model.__dict__["forward"]
        if forward.replaces is not None:
            model.__dict__["forward"] = forward.replaces
