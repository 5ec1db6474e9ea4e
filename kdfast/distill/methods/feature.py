"""Methods of feature maps, stage by stage or of the last; weights and layers follow the tables for CIFAR-100."""

from torch import Tensor, nn

from kdfast.distill.features import Outputs
from kdfast.distill.losses import feature as losses
from kdfast.distill.method import Method, register
from kdfast.distill.projectors import Regressor, connector, match
from kdfast.distill.schedules import Weight


@register("fitnet")
class FitNet(Method):
    """The teacher's map at a stage (from 1; the last where there are fewer), through a regressor on the student's."""

    formula, features = "fitnet", ("stages",)
    trains = "convolution to the teacher's channels and size, BatchNorm, ReLU"

    def __init__(self, stage: int = 2, weight: Weight = 100, ce: Weight = 1):
        super().__init__(weight, ce, stage=stage)

    def _maps(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
        i = min(int(self.stage), len(student.stages)) - 1
        return student.stages[i], teacher.stages[i]

    def build(self, student: Outputs, teacher: Outputs) -> nn.Module:
        return Regressor(*self._maps(student, teacher))

    def loss(self, student: Outputs, teacher: Outputs, target: Tensor) -> Tensor:
        s, t = self._maps(student, teacher)
        return losses.fitnet(*match(self.projectors(s), t))


@register("at")
class AT(Method):
    """Where the stages' maps have their energy."""

    formula, features = "at", ("stages",)

    def __init__(self, p: float = 2, weight: Weight = 1000, ce: Weight = 1):
        super().__init__(weight, ce, p=p)

    def loss(self, student: Outputs, teacher: Outputs, target: Tensor) -> Tensor:
        return losses.at(student.stages, teacher.stages, p=self.p)


@register("nst")
class NST(Method):
    """The distribution of the channels' patterns in the stages' maps."""

    formula, features = "nst", ("stages",)

    def __init__(self, weight: Weight = 50, ce: Weight = 1):
        super().__init__(weight, ce)

    def loss(self, student: Outputs, teacher: Outputs, target: Tensor) -> Tensor:
        return losses.nst(student.stages, teacher.stages)


@register("ofd")
class OFD(Method):
    """Maps before the ReLU that ends a stage, through connectors: Σ_i l_i / 2^(n−i−1), the deepest of n counts most."""

    formula, features = "ofd", ("pre_relu",)
    trains = "1×1 convolution and BatchNorm to the teacher's channels, a stage each"

    def __init__(self, weight: Weight = 0.001, ce: Weight = 1):
        super().__init__(weight, ce)

    def build(self, student: Outputs, teacher: Outputs) -> nn.Module:
        pairs = zip(student.pre_relu, teacher.pre_relu, strict=True)
        return nn.ModuleList(connector(s.shape[1], t.shape[1]) for s, t in pairs)

    def loss(self, student: Outputs, teacher: Outputs, target: Tensor) -> Tensor:
        total, n = 0, len(student.pre_relu)
        for i, (s, t, m) in enumerate(zip(student.pre_relu, teacher.pre_relu, teacher.margins, strict=True)):
            total = total + losses.ofd(*match(self.projectors[i](s), t), m) / 2 ** (n - i - 1)
        return total


@register("cat")
class CAT(Method):
    """Class activation maps: the classifier at every place of the last map."""

    formula, features = "cat", ("cam",)

    def __init__(self, size: int = 2, normalize: bool = False, weight: Weight = 15, ce: Weight = 1):
        super().__init__(weight, ce, size=size, normalize=normalize)

    def loss(self, student: Outputs, teacher: Outputs, target: Tensor) -> Tensor:
        return losses.cat(student.cam, teacher.cam, size=int(self.size), normalize=self.normalize)
