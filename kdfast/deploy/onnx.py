"""Networks as ONNX files, in float32 and in int8, and onnxruntime to run them."""

import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from kdfast.core.errors import KdfastError
from kdfast.core.extras import extra
from kdfast.models.flops import unfused

with extra("export"):
    import onnx
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.registry import QLinearOpsRegistry
    from onnxruntime.quantization.shape_inference import quant_pre_process

OPSET = 17
Network = Callable[[Tensor], Tensor]  # float images (N, 3, H, W) to logits (N, classes)


def write_onnx(network: nn.Module, size: tuple[int, int], path: Path, properties: dict[str, str] | None = None) -> None:
    """A network on the CPU in eval mode as an ONNX file: `image`, float32 (batch, 3, *size), to `logits` (batch, classes).

    Traced: torch's other exporter takes ten times as long and two more packages for a file that is no faster. What ONNX cannot
    express raises a KdfastError. `properties` become the file's metadata.
    """
    names = {"input_names": ["image"], "output_names": ["logits"]}
    axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
    with warnings.catch_warnings(), unfused():
        warnings.simplefilter("ignore")  # of the tracer: shapes are fixed but for the batch
        try:
            torch.onnx.export(
                network, (torch.zeros(2, 3, *size),), path, dynamo=False, dynamic_axes=axes, opset_version=OPSET, **names
            )
        except torch.onnx.OnnxExporterError as error:
            raise KdfastError(f"this network cannot be written as ONNX: {str(error).split(chr(10))[0]}") from error
    model = onnx.load(path)
    onnx.helper.set_model_props(model, properties or {})
    onnx.save(model, path)


def write_int8(source: Path, path: Path, images: Tensor) -> str:
    """An ONNX file in int8: "static", calibrated with images (N, 3, H, W), or "dynamic" for a network with attention.

    Static: weights a channel each, of 7 bits, so that no processor's sums saturate; activations by their extremes over the
    images. Dynamic: linear layers alone, activations as they come; attention loses too much otherwise.
    """
    with TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        dynamic = any(node.op_type == "Softmax" for node in onnx.load(prepared).graph.node)
        kinds = ["Gemm", "MatMul"] if dynamic else sorted(QLinearOpsRegistry)
        options = {"per_channel": True, "reduce_range": True, "weight_type": QuantType.QInt8, "op_types_to_quantize": kinds}
        if dynamic:
            quantize_dynamic(prepared, path, **options)
        else:
            quantize_static(prepared, path, _Reader(images), activation_type=QuantType.QUInt8, **options)
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {p.key: p.value for p in onnx.load(source).metadata_props})
    onnx.save(model, path)
    return "dynamic" if dynamic else "static"


class _Reader(CalibrationDataReader):
    """Images in the batches in which onnxruntime's calibration asks for them."""

    def __init__(self, images: Tensor):
        self.batches = iter(images.split(32))

    def get_next(self):
        batch = next(self.batches, None)
        return None if batch is None else {"image": batch.numpy()}


def runner(path: Path, threads: int = 0) -> Network:
    """An ONNX file in onnxruntime on the CPU, with so many threads (0: torch's number)."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads or torch.get_num_threads(), 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"image": images.numpy()})[0])
