"""Load an artifact and call it on named tensors, without the code that made it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchworker.contract import INT8_OF

SIGNATURE = "signature"
"""Where AOTInductor packages and ExecuTorch programs hold names, dtypes, shapes and ranges of their inputs, as JSON."""

_READING = (
    "torch.export.pt2_archive._package", "torch.export._trace", "torch.export._unlift", "torch._export.db.logging",
    "torch._export.passes.collect_tracepoints_pass", "torch._functorch.partitioners", "torch._inductor.codecache",
    "torch._inductor.sizevars", "torch.fx.experimental.validator", "sympy.tensor.tensor",
)  # fmt: skip
"""What torch.export imports when it first reads an archive."""

Call = Callable[[Mapping[str, Tensor]], list[Tensor]]
"""Inputs by name → outputs in the order of the signature."""


FOLDED_INTO = frozenset({"Conv", "ConvTranspose", "Gemm"})
"""Operators of ONNX whose weights take up those of a batch norm behind them, under their own names."""


def _without_names(_: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    return iter(())


@dataclass(frozen=True)
class Loaded:
    """An artifact, and the tensors that it holds by the names of the model's."""

    call: Call
    weights: Callable[[Collection[str]], Iterator[tuple[str, Tensor]]] = _without_names
    """Given the model's names, those that were not changed on purpose, one after the other; none of a format that keeps
    no names."""
    graph: Callable[[], Any] | None = None
    """Of ONNX, its onnx_ir.Graph, for what is in there under other names."""


def load_artifact(kind: str, path: Path, threads: int) -> Call:
    """The artifact alone, as of `load_with_weights`."""
    return load_with_weights(kind, path, threads).call


def load_with_weights(kind: str, path: Path, threads: int) -> Loaded:
    """kind: a key of FORMAT_FILES or INT8_FILES; threads: intra-op threads of the runtime."""
    kind = INT8_OF.get(kind, kind)
    if kind in _OWN_THREADS:
        return _OWN_THREADS[kind](path, threads)
    torch.set_num_threads(threads)
    return {"torchscript": _torchscript, "pt2": _pt2, "aoti": _aoti}[kind](path)


def require_hashes(folder: Path, hashes: Mapping[str, str]) -> None:
    """What is loaded here is what was published: read and hashed by the process that loads it next.

    Args:
        folder: that holds the files.
        hashes: path in the folder, or an absolute one, to hexadecimal SHA-256.

    Raises:
        RuntimeError: naming the file, and both hashes.
    """
    for name, sha256 in hashes.items():
        with (folder / name).open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
        if got != sha256:
            raise RuntimeError(f"{folder / name}: expected SHA-256 {sha256}, got {got}")


def prepare_runtime(kind: str, threads: int) -> None:
    """Import what loading this format needs, so that its own cost can be told apart."""
    torch.set_num_threads(threads)
    kind = INT8_OF.get(kind, kind)
    if kind == "onnx":
        importlib.import_module("onnxruntime")
    elif kind == "pt2":
        import_archive_reader()
    elif kind == "aoti":
        importlib.import_module("torch._inductor.package")
    elif kind == "executorch":
        _executorch_library()


def load_libraries(paths: Iterable[Path]) -> None:
    """Shared libraries with custom operators, before any artifact that needs them."""
    for path in paths:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]


def import_archive_reader() -> None:
    """What torch.export would import when it first writes or reads an archive: half a second of CPU and more."""
    for name in _READING:
        # Private names. Where they are others, torch imports what it needs when it needs it.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def import_onnx_exporter() -> None:
    """What torch.onnx would import when it first exports, and find out for each export: 0.8 s of CPU."""
    # Private names, as above.
    with contextlib.suppress(ImportError, AttributeError):
        for name in ("torch.onnx._internal.exporter._compat", "onnxscript.function_libs.torch_lib.ops"):
            importlib.import_module(name)
        # It parses the sources of 500 functions to list them, which are the same each time.
        translations = importlib.import_module("torch.onnx._internal._lazy_import").onnxscript_apis
        known = translations.get_torchlib_ops()
        translations.get_torchlib_ops = lambda: known


def flat(outputs: Any) -> list[Tensor]:
    """The tensors of what a program returned, in order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if outputs is None:
        return []
    if isinstance(outputs, Mapping):
        outputs = outputs.values()
    return [tensor for item in outputs for tensor in flat(item)]


def _torchscript(path: Path) -> Loaded:
    program = load_script(path)
    return Loaded(partial(call_script, program), lambda _: iter(program.state_dict().items()))


def load_script(path: Path) -> Any:
    """A TorchScript program on the CPU."""
    with warnings.catch_warnings():
        ignore_script_deprecation()
        return torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]


def ignore_script_deprecation() -> None:
    """Let torch not say at every call that TorchScript is deprecated; docs/leaving-torchscript.md says what to do.

    torch 2.13 says it as a DeprecationWarning, 2.14 as a FutureWarning, which Python shows to everybody.
    """
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", r"`torch\.jit\.", category)


def call_script(program: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Call a TorchScript program: by position, or by name where a parameter before the last is left out."""
    names = [argument.name for argument in program.forward.schema.arguments][1:]
    with torch.no_grad():
        if len(names) == len(inputs) or names[: len(inputs)] == list(inputs):
            return flat(program(*inputs.values()))
        return flat(program(**inputs))


def _pt2(path: Path) -> Loaded:
    exported = torch.export.load(str(path))
    program = exported.module()
    positional = exported.call_spec.in_spec.child(0).num_children

    def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        given = list(inputs.items())
        with torch.no_grad():
            return flat(program(*(tensor for _, tensor in given[:positional]), **dict(given[positional:])))

    return Loaded(call, lambda _: iter(exported.state_dict.items()))


def _aoti(path: Path) -> Loaded:
    package = torch._inductor.aoti_load_package(str(path))

    def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        # Compiled code reads memory in the order that it was compiled for.
        given = [tensor.contiguous() for tensor in inputs.values()]
        with torch.no_grad():
            return list(package.loader.run(given))

    return Loaded(checked(call, path))


def checked(call: Call, path: Path) -> Call:
    """The call of an AOTInductor package, refusing what the package was not compiled for."""
    return _guarded(call, json.loads(torch._inductor.aoti_load_package(str(path)).get_metadata()[SIGNATURE]))


def _guarded(call: Call, signature: Mapping[str, Any]) -> Call:
    def guarded(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        _require_signature(inputs, signature)
        return call(inputs)

    return guarded


def _require_signature(inputs: Mapping[str, Tensor], signature: Mapping[str, Any]) -> None:
    """Raises ValueError for a dtype or size that the artifact was not made for; its runtime does not look."""
    sizes: dict[str, int] = {}
    for spec in signature["inputs"]:
        tensor = inputs[spec["name"]]
        # Words are made only when they are needed: a call of a small model takes some ten microseconds.
        wrong = tensor.dtype is not getattr(torch, spec["dtype"]) or tensor.dim() != len(spec["shape"])
        for size, found in zip(spec["shape"], tensor.shape, strict=False):
            if isinstance(size, str):
                low, high = signature["dims"][size]
                wrong = wrong or found != sizes.setdefault(size, found) or found < low or found > (high or found)
            else:
                wrong = wrong or size != found
        if wrong:
            expected = f"{spec['dtype']} {spec['shape']} with {signature['dims']}"
            got = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            raise ValueError(f"input {spec['name']}: expected {expected}, got {got}")


def onnx_session(model: str | bytes, threads: int, *, as_written: bool = False, folder: Path | None = None) -> Any:
    """An onnxruntime.InferenceSession on the CPU.

    Args:
        model: path or content.
        threads: intra-op threads.
        as_written: without its optimizations.
        folder: of its external data, where content is given.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Whatever it is called: by the ending .ort it would be read as another format, and so as another model.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _onnx(path: Path, threads: int) -> Loaded:
    session = onnx_session(str(path), threads)
    wanted: Sequence[str] = [item.name for item in session.get_inputs()]
    # Without them `run` asks the session for them at every call.
    returned = [item.name for item in session.get_outputs()]

    def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        fed = {name: inputs[name].contiguous().numpy() for name in wanted}
        return [torch.from_numpy(array) for array in session.run(returned, fed)]

    return Loaded(call, partial(_initializers, path), partial(_graph, path))


def _graph(path: Path) -> Any:
    import onnx_ir

    return onnx_ir.load(path).graph


def _initializers(path: Path, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    graph = _graph(path)
    statistics = {name for name in names if name.endswith("running_var")}
    folded = {value.name for node in graph if node.op_type in FOLDED_INTO for value in node.inputs if value is not None}
    skipped = folded if statistics - graph.initializers.keys() else set()
    for name, value in graph.initializers.items():
        if name in names and name not in skipped and value.const_value is not None:
            # Types that numpy does not have come as its own kinds, which torch does not take.
            with contextlib.suppress(TypeError):
                yield name, torch.from_numpy(value.const_value.numpy().copy())


def _executorch_library() -> Any:
    try:
        # The module that executorch.runtime wraps; the way there imports the compiler, for seconds.
        return importlib.import_module("executorch.extension.pybindings._C")
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"ExecuTorch's runtime is not installed ({error}): pip install 'executorch==1.5.1'"
        ) from error


def _executorch_program(path: Path) -> Any:
    library = _executorch_library()
    return library._load_program(str(path), program_verification=library.Verification.InternalConsistency)


def planned_shapes(path: Path) -> list[tuple[int, ...]]:
    """The largest shape of each input of an ExecuTorch program, in order."""
    method = _executorch_program(path).method_meta("forward")
    return [tuple(method.input_tensor_meta(position).sizes()) for position in range(method.num_inputs())]


def _executorch(path: Path, threads: int) -> Loaded:
    # One pool a process; what is loaded later uses it.
    _executorch_library()._unsafe_reset_threadpool(threads)
    program = _executorch_program(path)
    (signature,) = program.load_method(SIGNATURE)([])
    method = program.load_method("forward")

    def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return flat(method([tensor.contiguous() for tensor in inputs.values()]))

    return Loaded(_guarded(call, json.loads(signature)))


_OWN_THREADS: Mapping[str, Callable[[Path, int], Loaded]] = {"onnx": _onnx, "executorch": _executorch}
"""Loaders of runtimes with threads of their own; the others compute with torch's."""
