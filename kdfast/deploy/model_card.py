"""The model card of an exported student: what it is, what it takes, how good it is, where it came from.

Without a date or the machine's name: the same student has the same card.
"""

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from fastai.data.core import TfmdDL
from fastai.learner import Learner
from safetensors.torch import save

from kdfast.core.config import BASELINE
from kdfast.core.errors import KdfastError
from kdfast.core.records import Record
from kdfast.distill.callback import Distill
from kdfast.distill.teacher import Stats, normalisation, vocabulary
from kdfast.models.registry import count_parameters
from kdfast.training.learner import to_cpu

CARD = "README.md"


@dataclass
class Facts:
    """What the card says of a student, but for its files."""

    name: str  # of the architecture
    classes: tuple[str, ...]
    stats: Stats
    size: tuple[int, int]  # of its images in pixels, height and width
    parameters: int
    weights: bytes  # as a safetensors file
    origin: dict[str, str]  # data set, teacher, method and run, where they are known
    int8: str = ""  # how it was quantised: static, dynamic, or not at all
    calibrated: str = ""  # with which images

    def properties(self) -> dict[str, str]:
        """What a program needs to use the file: its metadata."""
        mean, std = self.stats
        facts = {"classes": self.classes, "image_size": self.size, "mean": mean, "std": std}
        return {key: json.dumps(value, ensure_ascii=False) for key, value in facts.items()} | {"architecture": self.name}


def facts_of(learn: Learner, dl: TfmdDL, record: Record | None, name: str) -> Facts:
    """What is known of a Learner's network and, if given, of the run that trained it; `dl` shows images as it takes them."""
    classes, stats = vocabulary(learn.dls), normalisation(learn.dls)
    if classes is None:
        raise KdfastError("the Learner's DataLoaders do not name their classes (vocab): an exported student must")
    if stats is None:
        raise KdfastError(
            "how the Learner's DataLoaders normalise images is unknown: use Normalize.from_stats(mean, std) in them"
        )
    shapes = [tuple(part.shape) for part in dl.one_batch()]
    if [len(shape) for shape in shapes] != [4, 1] or shapes[0][1] != 3:
        raise KdfastError(f"a student takes RGB images (N, 3, H, W) and gives each a class (N,); the batches are {shapes}")
    weights = save(to_cpu(learn.model.state_dict()))
    if record is not None and record.model["weights_sha256"] != hashlib.sha256(weights).hexdigest():
        raise KdfastError(f"the Learner's weights are not those of run {record.id}: load that run's, or leave the record out")
    name = name or (record.parameters["student"] if record else type(learn.model).__name__)
    return Facts(name, classes, stats, shapes[0][2:], count_parameters(learn.model), weights, _origin(learn, record))


def _origin(learn: Learner, record: Record | None) -> dict[str, str]:
    """Of the Distill callback if the Learner has one, else of the record."""
    origin = {}
    distill = next((cb for cb in learn.cbs if isinstance(cb, Distill)), None)
    if record is not None:
        origin |= {"Data": record.data["name"], "Run": f"`{record.id}`"}
    if record is not None and record.parameters["method"] != BASELINE:
        arguments = ", ".join(f"{k}={v}" for k, v in record.parameters["method_args"].items())
        origin |= {"Teacher": f"`{record.teacher['run']}`", "Method": f"{record.parameters['method']}({arguments})"}
    if distill is not None:
        teacher = distill.teacher
        if teacher.record is not None:
            origin["Teacher"] = f"`{teacher.record.id}`"
        elif not teacher.is_lazy:
            origin["Teacher"] = ", ".join(type(model).__name__ for model in teacher.models)
        origin["Method"] = repr(distill.method)
    return origin


def write_card(folder: Path, facts: Facts, accuracy: dict[str, float], images: str, tolerance: float) -> None:
    """README.md beside the files; `images` says on which the accuracies were measured."""
    (height, width), (mean, std), n = facts.size, facts.stats, len(facts.classes)
    rows = {
        "Architecture": facts.name,
        "Parameters": f"{facts.parameters:,}",
        "Input": f"`image`, float32 (batch, 3, {height}, {width}): RGB, 0…1; any batch size",
        "Output": f"`logits`, float32 (batch, {n}); their softmax gives probabilities",
        "Normalisation": f"within the network: mean {_numbers(mean)}, standard deviation {_numbers(std)}",
        **facts.origin,
        "Weights": f"SHA-256 `{hashlib.sha256(facts.weights).hexdigest()}` (as safetensors)",
    }
    files = {"onnx": "student.onnx", "int8": "student.int8.onnx"}
    sizes = {kind: (folder / file).stat().st_size for kind, file in files.items() if kind in accuracy}
    measured = [("torch, as safetensors", f"{len(facts.weights):,}", accuracy["torch"])]
    measured += [(f"`{files[kind]}`", f"{size:,}", accuracy[kind]) for kind, size in sizes.items()]
    tags = ["kdfast", *(["knowledge-distillation"] if "Method" in facts.origin else [])]
    packages = ", ".join(f"{package} {version(package)}" for package in ("kdfast", "torch", "onnxruntime"))
    text = f"""---
library_name: onnx
pipeline_tag: image-classification
tags: [{", ".join(tags)}]
---
# {facts.name}, {n} classes

{_table(("", ""), rows.items())}

## Files

{_table(("File", "Bytes", f"Accuracy, {images}"), [(file, size, f"{value:.4f}") for file, size, value in measured])}

The ONNX file's logits are torch's within {tolerance:g} on validation images.{_int8(facts)}
Made with {packages}.

## Classes

In the order of the logits, also in the files' metadata:

```json
{json.dumps(facts.classes, ensure_ascii=False)}
```

## Use

```python
{_USE.format(width=width, height=height)}
```
"""
    (folder / CARD).write_text(text, encoding="utf-8")


_USE = """import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("student.onnx")
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
image = ImageOps.exif_transpose(Image.open("image.png")).convert("RGB")
image = ImageOps.fit(image, ({width}, {height}), Image.Resampling.BILINEAR)
x = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)[None] / 255
print(classes[session.run(None, {{"image": x}})[0].argmax()])"""


def _int8(facts: Facts) -> str:
    if not facts.int8:
        return ""
    if facts.int8 == "dynamic":
        return " In int8: the weights of linear layers; their inputs are quantised as they come (dynamic)."
    return f" In int8: weights and activations, calibrated with {facts.calibrated} (static)."


def _numbers(values) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _table(head: tuple[str, ...], rows) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
