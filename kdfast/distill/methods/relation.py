"""Methods of the relations between a batch's images."""

import torch
from torch import Tensor, nn

from kdfast.distill.features import Outputs
from kdfast.distill.losses import relation as losses
from kdfast.distill.method import Method, register
from kdfast.distill.schedules import Weight


@register("sp")
class SP(Method):
    """Which examples of the batch have similar last maps."""

    formula, features = "sp", ("last",)

    def __init__(self, weight: Weight = 3000, ce: Weight = 1):
        super().__init__(weight, ce)

    def loss(self, student: Outputs, teacher: Outputs, target: Tensor) -> Tensor:
        return losses.sp(student.last, teacher.last)


@register("rkd")
class RKD(Method):
    """Distances and angles between the batch's pooled features."""

    formula, features = "rkd", ("pooled",)

    def __init__(self, distance: float = 25, angle: float = 50, weight: Weight = 1, ce: Weight = 1):
        super().__init__(weight, ce, distance=distance, angle=angle)

    def loss(self, student: Outputs, teacher: Outputs, target: Tensor) -> Tensor:
        return losses.rkd(student.pooled, teacher.pooled, **self.arguments)


@register("pkt")
class PKT(Method):
    """The probability of picking a neighbour by the cosine of pooled features."""

    formula, features = "pkt", ("pooled",)

    def __init__(self, weight: Weight = 30000, ce: Weight = 1):
        super().__init__(weight, ce)

    def loss(self, student: Outputs, teacher: Outputs, target: Tensor) -> Tensor:
        return losses.pkt(student.pooled, teacher.pooled)


@register("cc")
class CC(Method):
    """How the differences of neighbours in the batch correlate, in embeddings of both nets' pooled features."""

    formula, features = "cc", ("pooled",)
    trains = "linear layer to `dim` features on each of both nets"

    def __init__(self, dim: int = 128, weight: Weight = 0.02, ce: Weight = 1):
        super().__init__(weight, ce, dim=dim)

    def build(self, student: Outputs, teacher: Outputs) -> nn.Module:
        return nn.ModuleList(nn.Linear(net.pooled.shape[1], int(self.dim)) for net in (student, teacher))

    def loss(self, student: Outputs, teacher: Outputs, target: Tensor) -> Tensor:
        s, t = self.projectors[0](student.pooled), self.projectors[1](teacher.pooled)
        return losses.cc(s - t, torch.zeros_like(s))  # |s − t|, and the teacher's embedding learns too
