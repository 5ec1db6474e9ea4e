"""What distillation minimises: pure functions of the student's tensors, first, and the teacher's, second. Torch alone.

The result is a scalar, a mean over the batch; functions of targets also give the values per example whose mean it is
(`reduction="none"`), so that mixed targets can be weighted. The teacher is a constant. float16 and bfloat16 become
float32, inside autocast too; float64 stays. The weight in the total loss is not in here.

`B` batch, `C` classes, `z` logits, `p = softmax(z/T)`, `s`/`t` student/teacher, `y` target ids (B,). "The code" is what
the authors, or the benchmarks RepDistiller and mdistiller, released. Where it differs from the paper, it is followed:
the published weights are its own.
"""

from kdfast.distill.losses.feature import at, cat, fitnet, nst, ofd, review
from kdfast.distill.losses.relation import cc, pkt, rkd, sp
from kdfast.distill.losses.response import dist, dkd, hard, kd, nkd, standardize, wsld

__all__ = ["at", "cat", "cc", "dist", "dkd", "fitnet", "hard", "kd", "nkd", "nst", "ofd", "pkt", "review", "rkd", "sp"]
__all__ += ["standardize", "wsld"]
