"""No process outlives the one that started it, however that ends."""

import ctypes
import signal
import sys


def die_with_parent() -> None:
    """For `preexec_fn` of subprocess.Popen, or in the child itself: be killed when the parent ends. Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
