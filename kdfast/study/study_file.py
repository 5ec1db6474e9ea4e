"""A study: what a file in experiments/studies/ asks for, as a validated list of runs.

Nothing here imports torch: planning a study of thousands of runs must be quick.
"""

import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from kdfast.core.config import OutputsFrom, Run, Strict, Training, complaint, validated
from kdfast.core.errors import KdfastError, unknown

Pair = Annotated[list[str], Field(min_length=2, max_length=2)]


class MethodSpec(Strict):
    """A method of a study; where an argument is given a list, the study has a run for each of its values."""

    name: str
    args: dict[str, Any] = {}
    pairs: list[Pair] | None = None  # (teacher, student) that it is for; default: all of the study

    def each(self) -> list[dict[str, Any]]:
        values = [v if isinstance(v, list) else [v] for v in self.args.values()]
        return [dict(zip(self.args, combination, strict=True)) for combination in itertools.product(*values)]


class Resources(Strict):
    """What a cluster is asked for each run of a study; 0: estimated (`kdfast.study.resources`)."""

    gpu: int = Field(0, ge=0)  # how many
    mem_mb: int = Field(0, ge=0)
    minutes: int = Field(0, ge=0)  # a run that takes longer is ended, and goes on in the next attempt


class Study(Strict):
    """A study file. Teachers and students are trained on labels, then every pair by every method, each with every seed."""

    title: str
    note: str = ""  # what a reader of its results must know, in sentences; printed in the paper
    dataset: str = "digits"
    image_size: int = Field(0, ge=0)
    valid_pct: float = -1  # -1: the data set's usual; see Run
    folds: int = Field(0, ge=0)  # the run with seed s holds out fold s modulo folds
    augment: str = ""
    views: int = Field(0, ge=0)
    teacher_outputs: OutputsFrom = "float16"  # what runs with a teacher have; see Run
    fallback: bool = True
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(min_length=1)
    training: Training = Training()
    models: dict[str, dict[str, Any]] = {}  # what is trained otherwise than `training` says, by model
    distilled: dict[str, Any] = {}  # and by runs with a teacher, beside the teacher
    tracker: Literal["none", "csv", "tensorboard", "wandb"] = "none"  # where curves are logged beside the records
    resources: Resources = Resources()
    teachers: list[str] = []
    students: list[str] = Field(min_length=1)
    pairs: list[Pair] | None = None  # (teacher, student); default: all
    methods: list[MethodSpec] = []
    sweep: dict[str, list[float]] = {}  # training parameters to try on the baselines (tuning)
    tuned_by: str | None = None  # the study whose validation results chose this one's hyper-parameters

    def training_of(self, model: str) -> dict[str, Any]:
        return self.training.model_dump() | self.models.get(model, {})

    def _run(self, **parameters) -> Run:
        shared = ("dataset", "image_size", "valid_pct", "folds", "augment", "views")
        fold = parameters["seed"] % self.folds if self.folds else 0
        return Run(**{key: getattr(self, key) for key in shared}, fold=fold, **parameters)

    def baseline_run(self, model: str, seed: int) -> Run:
        """The run of a model trained without a teacher: a teacher's own run, or a student's baseline."""
        return self._run(student=model, seed=seed, **self.training_of(model))

    def baseline_runs(self) -> list[Run]:
        models = dict.fromkeys([*self.teachers, *self.students])
        return [self.baseline_run(model, seed) for seed in self.seeds for model in models]

    def distilled_runs(self) -> list[Run]:
        """The teacher of seed s teaches the students of seed s."""
        pairs = self.pairs if self.pairs is not None else itertools.product(self.teachers, self.students)
        return [
            self._run(
                student=student,
                teacher=self.baseline_run(teacher, seed).id,
                method=method.name,
                method_args=args,
                teacher_outputs=self.teacher_outputs,
                fallback=self.fallback,
                seed=seed,
                **self.training_of(student) | self.distilled,
            )
            for seed, (teacher, student), method in itertools.product(self.seeds, list(pairs), self.methods)
            if method.pairs is None or [teacher, student] in method.pairs
            for args in method.each()
        ]

    def swept_runs(self) -> list[Run]:
        combinations = [dict(zip(self.sweep, v, strict=True)) for v in itertools.product(*self.sweep.values())]
        swept = [run.model_copy(update=c) for run in self.baseline_runs() for c in combinations]
        return [Run(**run.model_dump()) for run in swept]  # model_copy does not validate

    def runs(self) -> list[Run]:
        """Every run, teachers before their students, each once."""
        return list(dict.fromkeys([*self.baseline_runs(), *self.swept_runs(), *self.distilled_runs()]))

    def check_names(self) -> None:
        """Every model and method is known and every method accepts its arguments. Imports torch: a few seconds."""
        from kdfast.data.augment import AUGMENTATIONS
        from kdfast.distill.method import create_method
        from kdfast.models.registry import architecture

        for name in [*self.teachers, *self.students, *self.models]:
            architecture(name)
        for method in self.methods:
            for args in method.each():
                create_method(method.name, args)
        if self.augment and "+".join(sorted(self.augment.split("+"))) not in AUGMENTATIONS:
            raise unknown("augmentation", self.augment, AUGMENTATIONS)


def load_study(path: Path) -> Study:
    """Read and validate a study file; what is wrong with it is said in one sentence."""
    path = Path(path)
    if not path.is_file():
        raise unknown("study", path.stem, [p.stem for p in path.parent.glob("*.yaml")], f"{path.parent}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise KdfastError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise KdfastError(f"{path} must be a mapping with the keys {', '.join(Study.model_fields)}")
    try:
        study = validated(Study, content, str(path))
    except RecursionError:
        raise KdfastError(f"{path} is not valid YAML: something in it contains itself") from None
    if set(study.sweep) - {"lr", "weight_decay"} or len(study.sweep) > 1:
        raise KdfastError(f"{path}: sweep tries the values of lr or of weight_decay, one of them, not {', '.join(study.sweep)}")
    if any(value <= 0 for values in study.sweep.values() for value in values):
        raise KdfastError(f"{path}: sweep: values must be above 0")
    try:
        study.baseline_run(study.students[0], study.seeds[0])
    except ValidationError as error:
        raise complaint(error, Run, str(path)) from None
    for where, changes in {**{f"models.{model}": c for model, c in study.models.items()}, "distilled": study.distilled}.items():
        validated(Training, study.training.model_dump() | changes, f"{path}, {where}")
    for teacher, student in [*(study.pairs or []), *(pair for method in study.methods for pair in method.pairs or [])]:
        for name, known in ((teacher, study.teachers), (student, study.students)):
            if name not in known:
                raise unknown("model", name, known, f"{path}, pairs")
    return study
