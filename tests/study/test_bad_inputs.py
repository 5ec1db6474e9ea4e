"""Whatever a study file, a parameter, a record or an image holds: it works, or one sentence says what is wrong. Nothing else."""

import json
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import yaml
from conftest import copy_checkout, write_images
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from papermill.translators import PythonTranslator
from PIL import Image

from kdfast.core.config import Run, check_parameters
from kdfast.core.errors import KdfastError
from kdfast.core.records import Record, read_record
from kdfast.data.datasets import load_data
from kdfast.report.latex import tex
from kdfast.study.study_file import Study, load_study

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**12) | st.floats() | st.text(max_size=8) | st.just("mini_resnet_xs"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
GOOD = {
    "title": "t", "seeds": [0], "teachers": ["mini_resnet_s"], "students": ["mini_resnet_xs"],
    "methods": [{"name": "kd", "args": {"T": 4}}], "training": {"epochs": 2},
}  # fmt: skip
MANY = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def one_sentence(error: KdfastError) -> None:
    assert str(error) and "\n" not in str(error) and len(str(error)) < 2000


@MANY
@given(changes=st.dictionaries(st.sampled_from([*Study.model_fields, "nonsense"]), VALUES, max_size=3))
@example(changes={"seeds": [0, 0]})
@example(changes={"title": "\\input{/etc/passwd} $\\write18{rm}$"})
@example(changes={"models": {"mini_resnet_xs": {"epochs": 0}}})
@example(changes={"pairs": [["mini_resnet_s"]]})
def test_any_study_file_is_a_study_or_one_sentence(tmp_path, changes):
    path = tmp_path / "study.yaml"
    try:
        path.write_text(yaml.safe_dump(GOOD | changes, allow_unicode=True))
    except (yaml.YAMLError, UnicodeEncodeError):
        return
    try:
        study = load_study(path)
    except KdfastError as error:
        one_sentence(error)
        return
    assert all(isinstance(run, Run) and run.id for run in study.runs())


@MANY
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@example(content=b"!!python/object/apply:os.system ['touch /tmp/kdfast-was-here']")
@example(content=b"a: &a [*a]")
@example(content=b"\xff\xfe")
@example(content=b"&a [&b [*a, *a], *b, *b]")
def test_any_bytes_are_refused_as_a_study_in_one_sentence(tmp_path, content):
    (tmp_path / "study.yaml").write_bytes(content)
    with pytest.raises(KdfastError) as error:
        load_study(tmp_path / "study.yaml")
    one_sentence(error.value)


@MANY
@given(parameters=st.dictionaries(st.sampled_from([*Run.model_fields, "x"]), VALUES, max_size=4))
@example(parameters={"method_args": "{a: !!python/name:os.system }"})
@example(parameters={"milestones": "[1, 2"})
@example(parameters={"dataset": ["digits"]})
@example(parameters={"dataset": "../../../etc"})
def test_any_notebook_parameters_are_a_run_inside_its_folder_or_one_sentence(tmp_path, parameters):
    try:
        run = check_parameters({"student": "mini_resnet_xs"} | parameters)
    except KdfastError as error:
        one_sentence(error)
        return
    folder = (tmp_path / run.folder_name).resolve()
    assert folder.is_relative_to(tmp_path.resolve()) and len(folder.relative_to(tmp_path.resolve()).parts) == 2


@MANY
@given(content=st.binary(max_size=300) | VALUES.map(lambda v: yaml.safe_dump(v).encode()))
@example(content=b"{}")
@example(content=b'{"schema_version": 99}')
def test_any_bytes_are_refused_as_a_record_in_one_sentence(tmp_path, content):
    (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(KdfastError) as error:
        read_record(tmp_path / "record.json")
    one_sentence(error.value)


@MANY
@given(text=st.text())
def test_no_text_is_a_command_in_the_paper(text):
    source = tex(text)
    for known in ("textbackslash{}", "textasciitilde{}", "textasciicircum{}"):
        source = source.replace("\\" + known, "")
    for escaped in "&%$#_{}":
        source = source.replace("\\" + escaped, "")
    assert not set(source) & set("\\&%$#_{}~^")


def test_a_record_of_a_later_schema_is_refused_in_words(tmp_path):
    fields = {key: {} for key in Record.model_fields} | {"schema_version": 99, "id": "x"}
    (tmp_path / "record.json").write_text(json.dumps(fields))
    with pytest.raises(KdfastError, match=r"is not a whole record of schema 2 \(schema_version: Input should be 2"):
        read_record(tmp_path / "record.json")


@MANY
@given(text=st.text())
@example(text='"); import os; os.system("touch pwned"); ("')
@example(text="'''\nimport os\n'''")
def test_no_parameter_is_a_command_in_the_notebook(text):
    """papermill writes parameters into a cell as Python: whatever is given comes out as it was."""
    namespace: dict = {}
    try:
        exec(PythonTranslator.codify({"student": text, "method_args": {text: text}}), {}, namespace)
    except UnicodeEncodeError:  # half a surrogate pair is no text
        return
    assert namespace == {"student": text, "method_args": {text: text}}


def test_hostile_names_of_folders_and_classes_run_nothing_and_reach_the_paper_as_text(tmp_path):
    """A study on a folder whose names are commands, for a shell, for Snakemake's formatting and for TeX."""
    root = copy_checkout(tmp_path / "checkout")
    names = ["$(touch pwned1)", "; touch pwned2 #", "\\input{pwned}\\write18{touch pwned3}", "{wildcards} & 100 %_^~"]
    where = tmp_path / "a 'set' \"of\" $(touch pwned4) `touch pwned5` {x}"
    study = {
        "title": "\\immediate\\write18{touch pwned6} & $x_1$ #1", "note": "100 % {of} \\undefined", "seeds": [0], "image_size": 8,
        "dataset": str(write_images(where, dict.fromkeys(names, 12), size=8)), "training": {"epochs": 1},
        "teachers": ["mini_resnet_s"], "students": ["mini_resnet_xs"], "methods": [{"name": "kd"}],
    }  # fmt: skip
    (root / "experiments" / "studies" / "hostile.yaml").write_text(yaml.safe_dump(study))
    done = subprocess.run([sys.executable, "-m", "kdfast", "reproduce", "--study", "hostile"], cwd=root, capture_output=True)
    assert done.returncode == 0, done.stderr.decode() + (root / "build" / "snakemake.log").read_text()[-2000:]
    assert (root / "build" / "hostile" / "paper.pdf").read_bytes().startswith(b"%PDF")
    assert not list(tmp_path.rglob("pwned*"))


# Images


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "set", {"a": 6, "b": 6}, size=16)


def read(folder, name):
    data = load_data(str(folder), 8)
    return data.images[data.files.index(f"a/{name}")]


GREY = np.full((16, 16), 100, np.uint8)


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("grey.png", Image.fromarray(GREY)),
        ("16bit.png", Image.fromarray(GREY.astype(np.uint16) * 257)),
        ("16bit.tif", Image.fromarray(GREY.astype(np.uint16) * 257)),
        ("palette.png", Image.fromarray(GREY).convert("P")),
        ("alpha.png", Image.fromarray(np.dstack([GREY] * 3 + [GREY * 0 + 255]))),
        ("grey_alpha.png", Image.fromarray(GREY).convert("LA")),
        ("cmyk.tif", Image.fromarray(np.dstack([GREY] * 3)).convert("CMYK")),
        ("wrong_extension.jpg", Image.fromarray(np.dstack([GREY] * 3))),
        ("bilevel.png", Image.fromarray(GREY * 0 + 255).convert("1")),
    ],
)
def test_every_kind_of_pixels_gives_its_own_colours(folder, name, image):
    image.save(folder / "a" / name, format="PNG" if name.endswith(("jpg", "png")) else "TIFF")
    expected = 255 if name.startswith("bilevel") else 100
    assert (read(folder, name).int() - expected).abs().max() <= 1


def test_a_photo_taken_with_the_camera_turned_is_read_upright(folder):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, 8:] = 255  # right half; turned as orientation 6 says, the lower half
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(folder / "a" / "turned.png", exif=turned)
    upright = read(folder, "turned.png")
    assert upright[:, :3].max() == 0 and upright[:, 5:].min() == 255


def bomb(path):
    """A PNG of a few hundred bytes that claims 60,000 × 60,000 pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


DAMAGED = {
    "bomb": bomb,
    "nothing": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<?php system('id'); ?>"),
    "half": lambda path: path.write_bytes(path.read_bytes()[:60]),
    "a line": lambda path: Image.fromarray(np.zeros((1, 5000, 3), np.uint8)).save(path),
    "floats": lambda path: Image.fromarray(np.zeros((16, 16), np.float32)).save(path, format="TIFF"),
    "a loop": lambda path: (path.unlink(), path.symlink_to(path)),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_image_is_named_in_one_sentence(folder, damage):
    path = folder / "a" / "000.png"
    damage(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            data = load_data(str(folder), 8)
        except KdfastError as error:
            one_sentence(error)
            assert "000.png" in str(error)
        else:
            assert "a/000.png" not in data.files  # a broken link is no file
