"""Methods of logits: no feature is seen, so cached teacher outputs serve all of them. Losses: `kdfast.losses`."""

from torch import Tensor

from kdfast.core.errors import KdfastError
from kdfast.distill.features import Outputs
from kdfast.distill.losses import response as losses
from kdfast.distill.method import Method, register
from kdfast.distill.schedules import Weight, checked_weight, is_schedule, ramp, scaled

GROWING, GROWING_TO_9 = ramp(20), ramp(20, 9)  # DKD's code: evenly over the first 20 epochs


@register("kd")
class KD(Method):
    """(1−alpha)·CE + alpha·T²·KL(teacher ‖ student) of probabilities softened by T (Hinton et al., 2015, arXiv:1503.02531)."""

    formula = "kd"

    def __init__(self, T: float = 4, alpha: Weight = 0.9):
        alpha = checked_weight("kd", "alpha", alpha)
        if not is_schedule(alpha) and not alpha <= 1:
            raise KdfastError(f"alpha of method kd must lie in 0…1, not {alpha}")
        super().__init__(weight=alpha, ce=scaled(alpha, -1, 1) if is_schedule(alpha) else 1 - alpha, T=T)
        self.alpha = alpha

    def loss(self, student: Outputs, teacher: Outputs, target: Tensor) -> Tensor:
        return losses.kd(student.logits, teacher.logits, T=self.T)

    def __repr__(self) -> str:
        return f"KD(T={self.T}, alpha={self.alpha})"


@register("hard_label")
class HardLabel(Method):
    """Hard-label distillation: the teacher's decision as a second label."""

    formula = "hard"

    def __init__(self, weight: Weight = 0.5, ce: Weight = 0.5):
        super().__init__(weight, ce)

    def loss(self, student: Outputs, teacher: Outputs, target: Tensor) -> Tensor:
        return losses.hard(student.logits, teacher.logits)


@register("dkd")
class DKD(Method):
    """KD of the target and of the other classes, decoupled."""

    formula, targets = "dkd", True

    def __init__(self, T: float = 4, alpha: float = 1, beta: float = 8, weight: Weight = GROWING, ce: Weight = 1):
        super().__init__(weight, ce, T=T, alpha=alpha, beta=beta)

    def loss(self, student: Outputs, teacher: Outputs, target: Tensor) -> Tensor:
        return losses.dkd(student.logits, teacher.logits, target, **self.arguments, reduction="none")


@register("dist")
class DIST(Method):
    """Correlation of predictions, within an example and within a class."""

    formula = "dist"

    def __init__(self, T: float = 1, beta: float = 1, gamma: float = 1, weight: Weight = 2, ce: Weight = 1):
        super().__init__(weight, ce, T=T, beta=beta, gamma=gamma)

    def loss(self, student: Outputs, teacher: Outputs, target: Tensor) -> Tensor:
        return losses.dist(student.logits, teacher.logits, **self.arguments)


@register("nkd")
class NKD(Method):
    """Cross-entropies with the teacher on the target and on the other classes."""

    formula, targets = "nkd", True

    def __init__(self, T: float = 1, gamma: float = 1.5, weight: Weight = 1, ce: Weight = 1):
        super().__init__(weight, ce, T=T, gamma=gamma)

    def loss(self, student: Outputs, teacher: Outputs, target: Tensor) -> Tensor:
        return losses.nkd(student.logits, teacher.logits, target, **self.arguments, reduction="none")


@register("wsld")
class WSLD(Method):
    """Soft labels weighted by how much worse the student is than the teacher."""

    formula, targets = "wsld", True

    def __init__(self, T: float = 4, weight: Weight = 2.25, ce: Weight = 1):
        super().__init__(weight, ce, T=T)

    def loss(self, student: Outputs, teacher: Outputs, target: Tensor) -> Tensor:
        return losses.wsld(student.logits, teacher.logits, target, T=self.T, reduction="none")


class Standardized(Method):
    """`KD(…)` or `DKD(…)` of logits standardized over the classes, at the inner method's temperature.

    Published: 9 times KD with a tenth of the student's own loss; 9 times DKD with all of it.
    Sun et al.: Logit Standardization in Knowledge Distillation, CVPR 2024, arXiv:2403.01427.
    """

    formula = "standardize"

    def __init__(self, method: Method, weight: Weight | None = None, ce: Weight | None = None):
        if not isinstance(method, (KD, DKD)):
            raise KdfastError(f"Standardized takes KD(…) or DKD(…), not {method!r}")
        own = (9, 0.1) if isinstance(method, KD) else (_nine_times(method.weight), method.ce)
        self.inner, self.targets, self.name = method, method.targets, f"{method.name}_std"
        weight, ce = own[0] if weight is None else weight, own[1] if ce is None else ce
        super().__init__(weight, ce, **method.arguments)

    def loss(self, student: Outputs, teacher: Outputs, target: Tensor) -> Tensor:
        student, teacher = (Outputs(losses.standardize(net.logits)) for net in (student, teacher))
        return self.inner.loss(student, teacher, target)


def _nine_times(weight: Weight) -> Weight:
    return scaled(weight, 9) if is_schedule(weight) else 9 * weight


@register("kd_std")
class StandardizedKD(Standardized):
    """KD of standardized logits."""

    def __init__(self, T: float = 2, weight: Weight = 9, ce: Weight = 0.1):
        super().__init__(KD(T), weight, ce)


@register("dkd_std")
class StandardizedDKD(Standardized):
    """DKD of standardized logits."""

    def __init__(self, T: float = 2, alpha: float = 1, beta: float = 8, weight: Weight = GROWING_TO_9, ce: Weight = 1):
        super().__init__(DKD(T, alpha, beta), weight, ce)
