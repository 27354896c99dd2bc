"""A file that is written one tensor after the other is the message that onnx_ir would have written at once."""

from __future__ import annotations

from pathlib import Path

import numpy
import onnx
import onnx_ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from torchworker.exporters import onnx_file
from torchworker.exporters.onnx_file import save_onnx
from torchworker.runtimes.load import load_artifact


def model() -> onnx.ModelProto:
    """y = x @ weight + bias, with what else a file may have."""
    weight = numpy.arange(12000, dtype=numpy.float32).reshape(3, 4000)
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["product"], name="first"),
        helper.make_node("Add", ["product", "bias"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4000])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(weight[0], "bias"),
         numpy_helper.from_array(numpy.zeros((0, 2), dtype=numpy.int64), "unused")],
        doc_string="a net",
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9, producer_name="test")
    helper.set_model_props(made, {"key": "value"})
    return made


def test_the_file_is_the_whole_model_and_what_was_saved_is_as_it_was(tmp_path: Path) -> None:
    loaded = onnx_ir.from_proto(model())
    expected = onnx_ir.to_proto(loaded)
    for turn in ("one.onnx", "two.onnx"):
        save_onnx(loaded, tmp_path / turn)
        assert onnx.load(tmp_path / turn) == expected
    # Not two graphs that readers would have to put together, and no byte more than the message has.
    assert (tmp_path / "one.onnx").stat().st_size == expected.ByteSize()
    onnx.checker.check_model(str(tmp_path / "one.onnx"), full_check=True)
    (y,) = load_artifact("onnx", tmp_path / "one.onnx", 1)({"x": torch.ones(2, 3)})
    assert y[1, 2].item() == 2 + 4002 + 8002 + 2


def test_a_file_that_protobuf_does_not_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "LARGEST", 60_000)
    with pytest.raises(ValueError, match=r"an ONNX file of 64,\d\d\d bytes, expected less than 60,000"):
        save_onnx(onnx_ir.from_proto(model()), tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()
