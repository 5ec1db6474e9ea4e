"""How a study's networks were trained, in words for its paper. TeX source."""

from collections.abc import Callable, Iterable

import pandas as pd

from kdfast.core.config import Run
from kdfast.core.records import Record

OPTIMIZERS = {
    ("adamw", "decoupled"): "AdamW \\citep{loshchilov2019}",
    ("adamw", "coupled"): "Adam with coupled weight decay",
    ("sgd", "coupled"): "SGD with momentum {momentum:g}{nesterov}",
    ("sgd", "decoupled"): "SGD with momentum {momentum:g}{nesterov} and decoupled weight decay \\citep{{loshchilov2019}}",
}


def sentences(records: Iterable[Record]) -> str:
    """Of all of a study's runs; what differs between them is given as a range."""
    runs = [Run(**record.parameters) for record in records]
    epochs, batch, lr, decay = (spread(runs, key) for key in ("epochs", "batch_size", "lr", "weight_decay"))
    spared = "" if all(run.decay_norms for run in runs) else ", none on norms and biases"
    said = [
        f"Networks train from {_each(runs, weights)} for {epochs} epochs with {_each(runs, optimizer)}, batches of {batch} and "
        f"weight decay {decay}{spared}. {_each(runs, lambda run: schedule(run, lr), ' For others: ')}"
    ]
    more = [_each(runs, part, " ") for part in (regularisation, head, precision)]
    return " ".join([*said, *filter(None, more)])


def _each(runs: list[Run], words: Callable[[Run], str], join: str = " or ") -> str:
    """What is said of the runs, each thing once."""
    return join.join(dict.fromkeys(found for run in runs if (found := words(run))))


def spread(runs: list[Run], key: str) -> str:
    """The value of a parameter, or its range."""
    values = sorted({getattr(run, key) for run in runs})
    return f"{values[0]:g}" + (f" to {values[-1]:g}" if len(values) > 1 else "")


def optimizer(run: Run) -> str:
    usual = "decoupled" if run.optimizer == "adamw" else "coupled"
    kind = OPTIMIZERS[run.optimizer, usual if run.decay == "usual" else run.decay]
    if run.optimizer == "adamw":
        return kind
    return kind.format(momentum=run.momentum, nesterov=" and Nesterov's acceleration" if run.nesterov else "")


def schedule(run: Run, lr: str) -> str:
    warmup = f" after {run.warmup} epochs of linear warm-up" if run.warmup else ""
    return {
        "onecycle": f"The learning rate goes through one cycle \\citep{{smith2018}} with a maximum of {lr}, which ends, at a "
        "negligible rate, a fifth of the epochs before the end.",
        "step": f"The learning rate is {lr}{warmup}, times {run.gamma:g} after epochs {', '.join(map(str, run.milestones))}.",
        "cosine": f"The learning rate falls from {lr} by a cosine{warmup} that ends at epoch {run.t_max or run.epochs}.",
        "constant": f"The learning rate is {lr} throughout{warmup}.",
    }[run.schedule]


def weights(run: Run) -> str:
    if not run.weights:
        return "random weights"
    return "ImageNet weights" if run.weights.startswith("imagenet") else "the weights of a checkpoint"


def regularisation(run: Run) -> str:
    used = {
        f"label smoothing of {run.label_smoothing:g}": run.label_smoothing,
        f"MixUp with $\\alpha={run.mixup:g}$": run.mixup,
        f"CutMix with $\\alpha={run.cutmix:g}$": run.cutmix,
        f"a moving average of the weights with decay {run.ema:g}": run.ema,
    }
    found = [words for words, value in used.items() if value]
    augment = "no augmentation" if run.augment == "none" else f"the augmentation {run.augment.replace('+', ' and ')}"
    return f"Training images have {augment}{', with ' + ' and '.join(found) if found else ''}."


def head(run: Run) -> str:
    return "The classifier has a hidden layer of half its input's width with dropout 0.4." if run.head == "mlp" else ""


def precision(run: Run) -> str:
    return "" if run.precision == "float32" else f"Training is in mixed precision ({run.precision})."


NAMES = {
    "epochs": "epochs", "batch_size": "batch size", "lr": "highest learning rate", "schedule": "schedule",
    "milestones": "milestones", "gamma": "gamma", "t_max": "t_max", "warmup": "warm-up (epochs)",
    "optimizer": "optimizer", "momentum": "momentum", "nesterov": "Nesterov", "weight_decay": "weight decay",
    "decay": "form of decay", "decay_norms": "decay of norms and biases", "label_smoothing": "label smoothing",
    "mixup": "MixUp", "cutmix": "CutMix", "ema": "average of weights", "augment": "augmentation",
    "views": "views (0: one an epoch)", "image_size": "pixels", "weights": "initial weights", "head": "classifier",
    "precision": "precision", "channels_last": "channels last", "compile": "compiled",
    "valid_pct": "held out for validation", "folds": "folds", "method": "methods", "method_args": "their arguments",
    "teacher_outputs": "teacher's outputs",
}  # fmt: skip


def table(records: Iterable[Record]) -> pd.DataFrame:
    """Every hyper-parameter with all its values in the study, as plain text."""
    runs = [Run(**record.parameters) for record in records]
    return pd.DataFrame([{"parameter": name, "value": values(runs, key)} for key, name in NAMES.items()])


def values(runs: list[Run], key: str) -> str:
    """The distinct values of a parameter in words."""
    if key == "momentum" and runs[0].schedule == "onecycle":
        return "0.95 to 0.85 to 0.95, with the cycle"
    if key in ("method", "method_args", "teacher_outputs"):
        runs = [run for run in runs if run.teacher]
    found = {_arguments(run) if key == "method_args" else _plain(getattr(run, key)) for run in runs}
    return ", ".join(_word(key, value) for value in sorted(found)) or "none"


def _plain(value: object) -> object:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else value


def _word(key: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value == "":
        return "random" if key == "weights" else "defaults"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _arguments(run: Run) -> str:
    return " ".join(f"{k}={v}" for k, v in run.method_args.items())
