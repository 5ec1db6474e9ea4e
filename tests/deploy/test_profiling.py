"""Operations against those that torchvision publishes and against a count by hand; what a measurement holds."""

import json
import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torchvision.models import get_model_weights

from kdfast.deploy import profiling
from kdfast.deploy.profiling import Settings, main, measure
from kdfast.models import registry
from kdfast.models.flops import flops
from kdfast.models.registry import count_parameters, create_model


@pytest.mark.parametrize("name", ["resnet18", "densenet169", "swin_t", "vit_b_16", "regnet_y_800mf", "mobilenet_v3_small"])
def test_operations_are_twice_the_published_multiply_adds(name):
    published = get_model_weights(name).DEFAULT.meta["_ops"]  # 10⁹ multiply-adds at 224 pixels
    assert flops(name, 1000, 224) / 2e9 == pytest.approx(published, rel=0.01)


def test_operations_of_a_convolution_are_those_counted_by_hand(monkeypatch):
    def build(n_classes, image_size):
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n_classes)
        )

    monkeypatch.setitem(registry._REGISTRY, "one_convolution", registry.Architecture("one_convolution", "odd", build))
    assert flops("one_convolution", 5, 12) == 2 * (6 * 6 * 8 * 3 * 3 * 3) + 2 * (8 * 5)


def test_counting_draws_no_random_numbers_and_leaves_attention_as_it_was():
    before, fast = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    flops.cache_clear()
    flops("regnet_y_400mf", 10, 64)
    flops("mini_vit_s", 10, 8)
    assert torch.equal(before, torch.get_rng_state()) and torch.backends.mha.get_fastpath_enabled() == fast


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What the command writes about mini_resnet_xs, measured hastily."""
    file = tmp_path_factory.mktemp("cost") / "deep" / "xs.json"
    hasty = ["--min-run-time", "0.01", "--repeats", "5", "--processes", "1", "--largest-batch", "4", "--threads", "2"]
    main(["mini_resnet_xs", "--classes", "7", "--image-size", "8", "--out", str(file), *hasty])
    assert [path.name for path in file.parent.iterdir()] == ["xs.json"]
    return json.loads(file.read_text())


def numbers(value, path=""):
    """All numbers of nested JSON, with where they are."""
    if isinstance(value, bool) or not isinstance(value, (dict, list, int, float)):
        return
    if isinstance(value, (int, float)):
        yield path, value
        return
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield from numbers(part, f"{path}/{key}")


def test_every_number_of_a_measurement_is_finite_and_positive(measured):
    found = dict(numbers(measured))
    assert len(found) > 60
    assert {path: v for path, v in found.items() if not (math.isfinite(v) and v > 0)} == {}


def test_a_measurement_says_what_was_measured_how_and_where(measured):
    model = create_model("mini_resnet_xs", 7, 8)
    assert (measured["name"], measured["classes"], measured["image_size"]) == ("mini_resnet_xs", 7, 8)
    assert measured["parameters"] == count_parameters(model) and measured["flops"] == flops("mini_resnet_xs", 7, 8)
    assert set(measured["bytes"]) == {"torch", "onnx", "int8"}
    assert measured["exported"]["int8"] == "static" and measured["exported"]["difference"] < 1e-4
    assert measured["settings"]["warm_up"] == 3 and measured["settings"]["repeats"] == 5
    assert measured["hardware"]["cores"] >= 1 and {"torch", "onnx", "onnxruntime"} <= set(measured["packages"])
    assert measured["code"]["hash"]


def test_speed_is_there_for_each_runtime_with_one_and_all_threads(measured):
    cpu = [row for row in measured["speed"] if row["device"] == "cpu"]
    assert [(row["runtime"], row["threads"]) for row in cpu] == [(kind, n) for kind in ("torch", "onnx", "int8") for n in (1, 2)]
    for row in cpu:
        assert row["latency_s"]["p95"] >= row["latency_s"]["median"] and row["latency_s"]["blocks"] >= 5
        best = row["throughput"]
        assert best["images_per_s"] == max(row["by_batch"].values()) == row["by_batch"][str(best["batch"])]


def test_training_needs_more_memory_than_inference(measured):
    peak = measured["peak_bytes"]
    assert set(peak) >= {"inference", "training", "onnx", "int8"}
    assert peak["training"] > peak["inference"]


def test_training_needs_memory_for_weights_gradients_and_two_moments():
    command = [sys.executable, "-m", "kdfast.deploy.memory", "training", "resnet18", "10", "32", "16", "2"]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    weights = 4 * count_parameters(create_model("resnet18", 10, 32))
    assert 4 * weights < peak < 12 * weights


def test_throughput_stops_growing_the_batch_when_it_falls(monkeypatch):
    seconds = {1: 1.0, 2: 1.5, 4: 2.0, 8: 6.0, 16: 9.0}
    monkeypatch.setattr(profiling, "_times", lambda call, threads, s, repeats: [seconds[len(call.args[0])]] * 3)
    found = profiling._speed(len, 4, 1, Settings())
    assert found["by_batch"] == {"1": 1.0, "2": 2 / 1.5, "4": 2.0, "8": 8 / 6}
    assert found["throughput"] == {"batch": 4, "images_per_s": 2.0}
    assert found["latency_s"] == {"median": 1.0, "p95": 1.0, "blocks": 3}


def test_a_network_that_onnx_cannot_express_is_measured_in_torch_alone(monkeypatch):
    monkeypatch.setattr(profiling, "peaks", lambda *args: {})
    monkeypatch.setattr(profiling, "_speeds", lambda model, size, files, s: [])

    def build(n_classes, image_size):
        return nn.Sequential(nn.AdaptiveAvgPool2d(5), nn.Flatten(), nn.Linear(75, n_classes))

    monkeypatch.setitem(registry._REGISTRY, "odd_pool", registry.Architecture("odd_pool", "odd", build))
    found = measure("odd_pool", 3, 8)
    assert set(found["bytes"]) == {"torch"} and "cannot be written as ONNX" in found["exported"]["obstacle"]


def test_an_unknown_architecture_is_told_in_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match="resnet18"):
        main(["resnet81", "--out", str(tmp_path / "x.json")])
    assert not (tmp_path / "x.json").exists()
