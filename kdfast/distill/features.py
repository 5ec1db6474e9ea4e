"""What a method sees of a network: `Outputs`, taken at the layers that `kdfast.distill.stages` finds."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from kdfast.core.errors import KdfastError
from kdfast.distill.stages import Layout, kind


@dataclass
class Outputs:
    """One network's view of a batch; a field that no method asks for stays empty."""

    logits: Tensor  # (B, C)
    stages: list[Tensor] = field(default_factory=list)  # maps (B, C_i, H_i, W_i), shallow to deep, as many as the other net's
    pre_relu: list[Tensor] = field(default_factory=list)  # the same before the ReLU that ends the stage
    margins: list[Tensor] = field(default_factory=list)  # of `pre_relu`, (1, C_i, 1, 1): mean of what that ReLU cuts off
    last: Tensor | None = None  # the deepest map (B, C, H, W)
    pooled: Tensor | None = None  # the vector that follows it (B, D)
    cam: Tensor | None = None  # class activation maps (B, classes, H, W)
    members: list[Tensor] | None = None  # logits of each of several teachers

    def softened(self, T: float) -> "Outputs":
        """Of several teachers: the logits whose softmax at T is the mean of theirs at T."""
        if self.members is None:
            return self
        mean = torch.stack([(z / T).log_softmax(1) for z in self.members]).logsumexp(0)
        return replace(self, logits=T * mean)


@dataclass
class Features:
    """The points to watch in a model, and how to make `Outputs` of what was seen there."""

    model: nn.Module
    layout: Layout
    wanted: frozenset[str]  # names of Outputs' fields
    stages: tuple[str, ...]

    @property
    def points(self) -> list[tuple[str, str]]:
        layout, points = self.layout, []
        if "stages" in self.wanted:
            points += [(path, "out") for path in self.stages]
        if "last" in self.wanted:
            points.append((self.layout.stages[-1], "out"))
        if "pre_relu" in self.wanted:
            points += [self._pre_relu(path) for path in self.stages]
        if "pooled" in self.wanted:
            if layout.pooled is None:
                raise KdfastError(f"{self._name} has no vector after its last map: use a method of maps or logits")
            points.append((layout.pooled, "in"))
        if "cam" in self.wanted:
            if layout.cam is None:
                raise KdfastError(
                    f"class activation maps need average pooling and one linear layer at the end, which {self._name} lacks: "
                    "build it so (fastai: custom_head) or use another method"
                )
            points.append((layout.cam[0], "out"))
        return list(dict.fromkeys(points))

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def _pre_relu(self, path: str) -> tuple[str, str]:
        if path in self.layout.clipped:
            raise KdfastError(
                f"layer {path} of {self._name} ends in a ReLU that is no module: make it an nn.ReLU, or name others"
            )
        return (self.layout.relus[path], "in") if path in self.layout.relus else (path, "out")

    def outputs(self, logits: Tensor, seen: dict[tuple[str, str], Tensor]) -> Outputs:
        """Maps are (B, C, H, W) whatever the network's own order; tokens of classes are left out."""
        out = Outputs(logits)
        if "stages" in self.wanted:
            out.stages = [self._map(seen[path, "out"]) for path in self.stages]
        if "last" in self.wanted:
            out.last = self._map(seen[self.layout.stages[-1], "out"])
        if "pre_relu" in self.wanted:
            out.pre_relu = [self._map(seen[self._pre_relu(path)]) for path in self.stages]
        if "pooled" in self.wanted:
            out.pooled = seen[self.layout.pooled, "in"].as_subclass(Tensor).flatten(1)
        if "cam" in self.wanted:
            path, head = self.layout.cam
            linear = self.model.get_submodule(head)
            out.cam = torch.einsum("bdhw,cd->bchw", self._map(seen[path, "out"]), linear.weight)
            if linear.bias is not None:
                out.cam = out.cam + linear.bias[:, None, None]
        return out

    def norm(self, path: str) -> nn.BatchNorm2d:
        """The BatchNorm before the end of a stage."""
        if path not in self.layout.norms:
            raise KdfastError(f"layer {path} of the teacher has no BatchNorm2d before its end, from which OFD takes its margin")
        return self.model.get_submodule(self.layout.norms[path])

    def _map(self, x: Tensor) -> Tensor:
        x = x.as_subclass(Tensor)
        form = kind(x, self.layout.size)
        if form == "tokens":
            h, w = self.layout.grid or (int(x.shape[1] ** 0.5),) * 2
            return x[:, x.shape[1] - h * w :].transpose(1, 2).unflatten(2, (h, w))
        return x.permute(0, 3, 1, 2) if form == "channels last" else x
