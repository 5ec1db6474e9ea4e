"""The data sets known by name, and how each is used unless a study says otherwise. Imports nothing: planning is quick."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Usual:
    """What stands for 0, "" and -1 in the parameters of a run on this data set."""

    image_size: int  # side in pixels
    augment: str
    valid_pct: float  # share of the training images held out for validation; 0: none, see kdfast.data.splits.HoldOut
    crop: float = 1.0  # share of the shorter side that the centre crop keeps
    official: int = 0  # images of the official release; 0: there is none


FOLDER = Usual(64, "crop+flip", 0.2)
NAMED = {
    "digits": Usual(8, "none", 0.2),
    "cifar100": Usual(32, "crop+flip", 0, official=60_000),
    "imagenette": Usual(128, "crop+flip", 0.2, official=13_394),
    "pets": Usual(224, "none", 0.2, crop=224 / 256, official=7_349),
    "weather": Usual(128, "flip", 0.2 / 0.9, official=6_862),  # 70/20/10
}


def usual(dataset: str) -> Usual:
    """Of a data set by its name, or of a folder by its path."""
    return NAMED.get(dataset, FOLDER)
