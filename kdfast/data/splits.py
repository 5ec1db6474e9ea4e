"""Which images train, which validate, which test: stratified by class and fixed, for runs differ by their seed alone."""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch import Tensor

from kdfast.core.errors import KdfastError

SPLIT_SEED = 0  # one split for every run of every study
Parts = dict[str, Tensor]  # "train", "valid", "test" -> int64 indices


@dataclass(frozen=True)
class HoldOut:
    """How validation images are held out of those that may be trained on, where the data set has none of its own.

    `part` is their share; 0 holds out none, as the published CIFAR-100 tables do: the test set is shown in place of
    the validation set, and nothing may be chosen by it. With `folds`, fold number `fold` of as many is held out.
    """

    part: float = 0.2
    folds: int = 0
    fold: int = 0

    def __call__(self, index: np.ndarray, labels: Tensor, test: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
        """`index`, whose images may be trained on, in two (training, validation), and how, in words."""
        if self.folds:
            target = labels[index].numpy()
            if np.bincount(target).min() < self.folds:
                raise KdfastError(f"a class has fewer than {self.folds} training images: ask for fewer folds")
            cut = StratifiedKFold(self.folds, shuffle=True, random_state=SPLIT_SEED).split(index, target)
            train, valid = list(cut)[self.fold]
            rule = f"fold {self.fold + 1} of {self.folds} of the training images (stratified) is the validation set"
            return index[train], index[valid], rule
        if not self.part:
            return index, test, "all training images train; the test set stands in for a validation set, nothing is chosen by it"
        train, valid = _stratified(index, labels, self.part)
        return train, valid, f"{share(self.part)} of the training images (stratified) is the validation set"


def share(part: float) -> str:
    """A share in words."""
    return {0.1: "a tenth", 0.2: "a fifth", 0.25: "a quarter", 0.5: "half"}.get(part, f"{part:.0%}")


def cut(labels: Tensor, classes: tuple[str, ...], test: float, hold_out: HoldOut) -> tuple[Parts, str]:
    """A share `test` of all images, then the validation set of the rest."""
    counts = torch.bincount(labels, minlength=len(classes))
    if counts.min() < 5:
        scarce = classes[int(counts.argmin())]
        raise KdfastError(f"class {scarce!r} has {int(counts.min())} images; a split into train, valid and test needs at least 5")
    rest, test_index = _stratified(np.arange(len(labels)), labels, test)
    train, valid, rule = hold_out(rest, labels, test_index)
    return parts(train, valid, test_index), f"{share(test)} (stratified) is the test set, {rule}"


def given(part: np.ndarray, labels: Tensor, hold_out: HoldOut) -> tuple[Parts, str]:
    """A data set's own parts (N,) of names; a missing one is cut off the training images, never off the test set."""
    own = {name: np.flatnonzero(part == name) for name in set(part)}
    if len(own) == 3 and not hold_out.folds:
        return parts(**own), "the folder's own train, valid and test"
    name = "test" if "test" in own else "valid"
    may_train = np.sort(np.concatenate([own[other] for other in own if other != name]))
    train, valid, rule = hold_out(may_train, labels, own[name])
    return parts(train, valid, own[name]), f"the folder's own {name} is the test set, {rule}"


def parts(train: np.ndarray, valid: np.ndarray, test: np.ndarray) -> Parts:
    """Sorted indices of each part."""
    named = {"train": train, "valid": valid, "test": test}
    return {name: torch.as_tensor(np.sort(index), dtype=torch.int64) for name, index in named.items()}


def _stratified(index: np.ndarray, labels: Tensor, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Two parts of `index`, the second of `fraction`, at least one image a class, in the classes' proportions."""
    target = labels[index].numpy()
    held_out = max(round(fraction * len(index)), len(np.unique(target)))
    return train_test_split(index, test_size=held_out, stratify=target, random_state=SPLIT_SEED)
