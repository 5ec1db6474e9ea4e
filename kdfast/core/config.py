"""A run: a set of parameters, checked, with a readable id and a content hash.

Nothing here imports torch: planning thousands of runs must be quick.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from kdfast.core.defaults import NAMED, usual
from kdfast.core.errors import KdfastError, unknown

BASELINE = "baseline"  # the method of a run without a teacher
OutputsFrom = Literal["live", "float16", "float32"]


def _mapping(value: Any) -> Any:
    """papermill's -p passes `{T: 4, alpha: 0.5}` as a string."""
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value) or {}
        except yaml.YAMLError:
            raise ValueError("must be a mapping such as {T: 4, alpha: 0.5}") from None
    value = exponents(value)
    if isinstance(value, dict):  # 4 and 4.0 are one value and must give one id
        value = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in value.items()}
    return value


def _sequence(value: Any) -> Any:
    """papermill's -p passes `[150, 180]` as a string."""
    if isinstance(value, str):
        try:
            return yaml.safe_load(value) or []
        except yaml.YAMLError:
            raise ValueError("must be a list such as [150, 180, 210]") from None
    return value


SWITCH = {"yes": True, "true": True, "on": True, "1": True, "no": False, "false": False, "off": False, "0": False}


def switch(name: str, value: Any) -> bool:
    """A yes or no in YAML's words, any case, as papermill's -p and people write it; a KdfastError for anything else."""
    word = str(value).strip().lower()
    if word not in SWITCH:
        raise KdfastError(f"{name} must be yes or no (or true, false, on, off, 1, 0), not {value!r}")
    return SWITCH[word]


def exponents(value: Any) -> Any:
    """Numbers such as 1e-3, which YAML takes for text unless they are written 1.0e-3, as numbers, in lists and mappings too."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    if isinstance(value, dict):
        return {k: exponents(v) for k, v in value.items()}
    return [exponents(v) for v in value] if isinstance(value, list) else value


class Strict(BaseModel):
    """No unknown keys, no infinities, no silent conversion of strings but YAML's words for yes and no and numbers like 1e-3."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _as_people_write_it(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kinds = {name: field.annotation for name, field in cls.model_fields.items()}
        read = {k: v if kinds.get(k) is str else exponents(v) for k, v in values.items()}
        words = {k: SWITCH.get(v.strip().lower(), v) for k, v in read.items() if kinds.get(k) is bool and isinstance(v, str)}
        return read | words


class Training(Strict):
    """How a network is trained (`kdfast.training.optim`); unless said otherwise, AdamW with one cycle of the learning rate."""

    epochs: int = Field(40, ge=1)
    batch_size: int = Field(64, ge=2)
    lr: float = Field(0.01, gt=0)  # the highest
    weight_decay: float = Field(0.01, ge=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = Field(0.9, ge=0, lt=1)  # of SGD; the one-cycle schedule moves it
    nesterov: bool = False
    decay: Literal["usual", "coupled", "decoupled"] = "usual"  # decoupled is AdamW's, coupled with the gradient torch's SGD's
    decay_norms: bool = True  # whether norms and biases decay too
    schedule: Literal["onecycle", "cosine", "step", "constant"] = "onecycle"
    milestones: Annotated[list[int], BeforeValidator(_sequence)] = []  # of step: epochs after which the rate is times gamma
    gamma: float = Field(0.1, gt=0)
    t_max: int = Field(0, ge=0)  # of cosine: epochs from lr to 0; 0: all
    warmup: int = Field(0, ge=0)  # epochs in which the rate rises linearly from lr/25; one-cycle has its own
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0)  # of MixUp's Beta(mixup, mixup); 0: none
    cutmix: float = Field(0.0, ge=0)  # of CutMix's
    ema: float = Field(0.0, ge=0, lt=1)  # decay of the weights' moving average, which is then the result; 0: none
    weights: str = ""  # to begin with: "" random, imagenet (torchvision's), or a .safetensors or .pth file
    head: Literal["linear", "mlp"] = "linear"  # the classifier; mlp: half as wide a hidden layer with dropout 0.4
    precision: Literal["float32", "bfloat16", "float16"] = "float32"  # the latter two: mixed precision
    channels_last: bool = False  # memory format of images and convolutions
    compile: bool = False  # torch.compile for student and live teacher
    processes: int = Field(1, ge=1)  # of one machine, which share every batch: one for each GPU

    @model_validator(mode="after")
    def _options_fit_each_other(self) -> "Training":
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise ValueError("nesterov is for the optimizer sgd with momentum")
        if self.milestones and self.schedule != "step":
            raise ValueError("milestones are for the schedule step")
        if self.warmup and (self.schedule == "onecycle" or self.warmup >= (self.t_max or self.epochs)):
            raise ValueError("warmup is for the schedules cosine, step and constant and is shorter than they are")
        if self.schedule == "cosine" and 0 < self.t_max < self.epochs:
            raise ValueError("t_max is at least epochs: after it the cosine would rise again")
        if self.mixup and self.cutmix:
            raise ValueError("give one of mixup and cutmix")
        return self


class Run(Training):
    """Everything that decides the outcome of one training, and nothing else.

    `image_size` 0, `augment` "" and `valid_pct` -1 stand for the data set's usual (`kdfast.core.defaults`); they are resolved on
    construction, so that equal runs have equal ids.
    """

    dataset: str = "digits"
    image_size: int = Field(0, ge=0)
    valid_pct: float = Field(0.2, ge=0, lt=1)  # share of the training images held out for validation; 0: none
    folds: int = Field(0, ge=0)  # instead: of so many folds of the training images, number `fold` is held out
    fold: int = Field(0, ge=0)
    augment: str = ""
    views: int = Field(0, ge=0)  # how many augmented views of the training images there are; 0: a new one each epoch
    view_seed: int = Field(-1, ge=-1, lt=2**32)  # of the views; -1: the run's seed
    student: str
    teacher: str = ""  # id of the teacher's run; "" for none
    method: str = BASELINE
    method_args: Annotated[dict[str, Any], BeforeValidator(_mapping)] = {}
    teacher_outputs: OutputsFrom = "live"  # the teacher runs in every step (live), or once, cached in float16 or float32
    fallback: bool = False  # whether a live teacher steps in where outputs cannot be cached (feature maps, MixUp)
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="before")
    @classmethod
    def _own_defaults(cls, values: Any) -> Any:
        values = dict(values)
        own = usual(str(values.get("dataset", "digits")))
        for key, stands_for_own in {"image_size": 0, "augment": "", "valid_pct": -1}.items():
            if values.get(key, stands_for_own) == stands_for_own:
                values[key] = getattr(own, key)
        if isinstance(values["augment"], str):  # in whatever order they are given, it is one augmentation
            values["augment"] = "+".join(sorted(values["augment"].split("+")))
        return values

    @model_validator(mode="after")
    def _fold_is_one_of_them(self) -> "Run":
        if self.folds == 1 or self.fold >= max(self.folds, 1):
            raise ValueError(f"fold {self.fold} of {self.folds}: folds are two or more, numbered from 0")
        return self

    @model_validator(mode="after")
    def _method_fits_teacher(self) -> "Run":
        if self.teacher and self.method == BASELINE:
            raise ValueError("a teacher needs a method: give one (kd, …) or no teacher")
        if not self.teacher and self.method != BASELINE:
            raise ValueError(f"method {self.method} needs a teacher: give a model's name or a run id")
        if not self.teacher and (self.teacher_outputs != "live" or self.fallback):
            raise ValueError("teacher_outputs and fallback are a teacher's: give one, or leave them out")
        return self

    @property
    def hash(self) -> str:
        """8 hex digits of the SHA-256 of all parameters that differ from their defaults.

        A parameter added later with a default that changes nothing leaves every id as it was; for the same reason a
        default must not change once records are released.
        """
        canonical = json.dumps(self.model_dump(exclude_defaults=True), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:8]

    def __hash__(self) -> int:  # pydantic's own cannot hash method_args
        return hash(self.hash)

    @property
    def id(self) -> str:
        """Readable and unique: student, method, teacher, seed and the hash of all parameters."""
        parts = [self.student, self.method, self.teacher.split(".")[0], f"s{self.seed}"]
        return ".".join(part for part in parts if part) + f"-{self.hash}"

    @property
    def folder_name(self) -> str:
        """`<dataset>/<id>`, below the folder of all runs."""
        return f"{dataset_slug(self.dataset)}/{self.id}"


def dataset_slug(dataset: str) -> str:
    """The data set's name in folder names: its own, or the last part of a path and 6 hex digits of the whole path's SHA-256.

    Two folders of one last name, `2023/flowers` and `2024/flowers`, are two data sets: neither may find the other's teachers.
    """
    if dataset in NAMED:
        return dataset
    path = Path(dataset).expanduser()
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", path.name) or "folder"
    return f"{name}-{hashlib.sha256(str(path.resolve()).encode(errors='surrogateescape')).hexdigest()[:6]}"


def check_parameters(namespace: Mapping[str, Any], resolve_teacher=None) -> Run:
    """The run that a notebook's variables describe.

    `namespace` is the notebook's `globals()`: every plain value in it must be a known parameter, for papermill only
    warns about names it does not know. `resolve_teacher(model or run id, dataset, seed)` gives the teacher's run id.
    """
    plain = (str, int, float, bool, dict, list, type(None))
    own = {"In", "Out", "explore", "runs", "tracker"}  # IPython's, and parameters that do not change the outcome
    given = {k: v for k, v in namespace.items() if not k.startswith("_") and type(v) in plain and k not in own}
    for name in given:
        if name not in Run.model_fields:
            raise unknown("parameter", name, [*Run.model_fields, "explore", "runs", "tracker"], "the notebook")
    run = validated(Run, given, "the notebook's parameters")
    if resolve_teacher and run.teacher:
        run = Run(**run.model_dump() | {"teacher": resolve_teacher(run.teacher, run.dataset, run.seed)})
    return run


def validated(model: type[BaseModel], values: dict[str, Any], where: str) -> BaseModel:
    """`model(**values)`, or a KdfastError made of pydantic's first complaint."""
    try:
        return model(**values)
    except ValidationError as error:
        raise complaint(error, model, where) from None


def complaint(error: ValidationError, model: type[BaseModel], where: str) -> KdfastError:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return unknown("key", place, model.model_fields, where)
    what = first["msg"].removeprefix("Value error, ")
    got = f", not {first['input']!r}" if place and first["type"] != "missing" else ""
    return KdfastError(f"{where}: {place + ': ' if place else ''}{what[0].lower() + what[1:]}{got}")
