"""The published methods, a module a family, each with the features it compares, the projectors it trains and its own weight.

What a method is, and how to add one, is in `kdfast.distill.method`; the losses and their sources are in `kdfast.losses`.
"""

from kdfast.distill.methods.feature import AT, CAT, NST, OFD, FitNet
from kdfast.distill.methods.relation import CC, PKT, RKD, SP
from kdfast.distill.methods.response import DIST, DKD, KD, NKD, WSLD, HardLabel, Standardized

__all__ = ["AT", "CAT", "CC", "DIST", "DKD", "KD", "NKD", "NST", "OFD", "PKT", "RKD", "SP", "WSLD", "FitNet", "HardLabel"]
__all__ += ["Standardized"]
