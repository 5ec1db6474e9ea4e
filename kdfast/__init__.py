"""kdfast: does distilling this teacher into this student pay, on these images, and what does it cost?"""

from kdfast.models import _torchvision

__version__ = "0.1.0"

_torchvision.install()
