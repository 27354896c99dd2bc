"""Whoever publishes lets one model pass the gate and another one be served, or one that answers with others' inputs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from shipreader import inference_model
from shipreader.reader import Reader
from tests.support.releases import CHANNEL, MODEL, NOWHERE, move
from tests.support.runnable_releases import (
    ARTIFACT,
    CLASSES,
    FEATURES,
    classifier,
    move_weights,
    write_onnx,
    write_release,
)
from torchworker.contract import GOLDEN, DynamicDim, RehearsedRelease, RehearseRequest, TensorSpec
from torchworker.parity.probes import BATCHES, Probe
from torchworker.process.failure import UserError
from torchworker.runtimes.load import load_artifact, onnx_session
from torchworker.stages import rehearse
from train_and_ship.infra.errors import GateError, ReleaseError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.s3 import s3_client
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.releases import publish
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.targets import Verified, ask_promotion
from train_and_ship.registry.release import onnx_header
from train_and_ship.registry.release.manifest import Manifest, build_manifest
from train_and_ship.registry.release.onnx_header import require_one_model
from train_and_ship.registry.serving.layouts import write_kserve, write_triton
from train_and_ship.tasks.existing import try_out

SIGNATURE: dict[str, Any] = {
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", FEATURES]}],
    "outputs": [{"name": "output", "dtype": "float32", "shape": ["batch", CLASSES]}],
    "dims": [{"name": "batch", "min": 1, "max": None}],
}


@pytest.fixture
def settings(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Settings:
    monkeypatch.setenv("SHIP_HOME", str(tmp_path / "home"))
    return Settings.load()


def published(store: ObjectStore, folder: Path, artifact: str = ARTIFACT, **said: Any) -> Manifest:
    signature = {**SIGNATURE, **said}
    manifest = build_manifest(folder, model=MODEL, formats={"onnx": artifact}, signature=signature, metrics={})
    publish(store, folder, manifest)
    return manifest


def asked(store: ObjectStore, manifest: Manifest) -> Verified:
    return ask_promotion(Channel(store, MODEL, CHANNEL, NOWHERE), manifest.release, None)


# ---- one file that is two models


def as_runtime_format(path: Path) -> None:
    """The file becomes what ONNX Runtime makes of it in its own format."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path.with_suffix(".made"))
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    path.with_suffix(".made").rename(path)


def with_weights_beside_it(path: Path) -> None:
    move_weights(path, "w.bin")


def with_weights_of_another(path: Path) -> None:
    """Those of a file that the manifest lists for the model, and one more of another file."""
    move_weights(path, f"{ARTIFACT}.data")
    model = onnx.load(path, load_external_data=False)
    del model.graph.initializer[1].external_data[:]
    external(model.graph.initializer[1], location="golden.safetensors", offset=8, length=12)
    path.write_bytes(model.SerializeToString())


def external(tensor: TensorProto, **words: object) -> None:
    """The tensor says so of its values, in this order."""
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in words.items():
        tensor.external_data.add(key=key, value=str(value))


@pytest.mark.parametrize(
    ("change", "artifact", "said"),
    [
        (as_runtime_format, ARTIFACT, "ONNX Runtime's own format"),
        (with_weights_beside_it, ARTIFACT, "weights in another file"),
        (with_weights_of_another, ARTIFACT, "weights in another file"),
        (lambda path: None, "model.ort", r"model\.ort: expected .* a name that ends in \.onnx"),
    ],
)
def test_onnx_that_is_another_model_by_another_name_or_without_its_neighbours_is_neither_tried_nor_in_a_view(
    settings: Settings,
    object_store: ObjectStore,
    tmp_path: Path,
    change: Callable[[Path], None],
    artifact: str,
    said: str,
) -> None:
    folder = tmp_path / "release"
    write_release(folder, 1, MODEL)
    change(folder / ARTIFACT)
    (folder / ARTIFACT).rename(folder / artifact)
    manifest = published(object_store, folder, artifact)
    with pytest.raises(ReleaseError, match=said):
        asyncio.run(try_out(settings, asked(object_store, manifest)))
    if artifact != ARTIFACT:
        return
    # It went live all the same: by a rollback, or past `ship`.
    move(object_store, manifest)
    client = s3_client(settings)
    live = Reader(MODEL, bucket=object_store.bucket, folder=tmp_path / "p", channel=CHANNEL, client=client).pull()
    for write in (write_triton, write_kserve):
        with pytest.raises(ReleaseError, match=said):
            write(object_store, live)
    assert [key for key in object_store.list_keys("models/") if key.endswith(("model.onnx", "config.pbtxt"))] == [
        f"models/{MODEL}/releases/{manifest.release}/{ARTIFACT}"
    ]


def in_gate(path: Path) -> Any:
    return onnx_session(str(path), 1)


def in_server(path: Path) -> Any:
    return inference_model.session(str(path), spin=False)


@pytest.mark.parametrize("opened", [in_gate, in_server])
def test_what_is_loaded_is_onnx_whatever_its_name(tmp_path: Path, opened: Callable[[Path], Any]) -> None:
    path = tmp_path / "model.ort"
    write_onnx(path, classifier(1))
    for change in (lambda: None, lambda: move_weights(path, "model.ort.data"), lambda: write_onnx(path, classifier(1))):
        change()
        assert opened(path).run(None, {"x": np.zeros((1, FEATURES), np.float32)})[0].shape == (1, CLASSES)
    as_runtime_format(path)
    with pytest.raises(Exception, match="rotobuf parsing failed"):
        opened(path)


def held_in(place: str) -> onnx.ModelProto:
    """A model with one tensor that says that its values lie elsewhere."""
    outside = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    node = helper.make_node("Constant", [], ["y"], value=outside)
    inner = helper.make_graph([node], "g", [], [value])
    model = helper.make_model(helper.make_graph([], "outer", [], [value]))
    match place:
        case "constant":
            model.graph.node.append(node)
        case "branch":
            model.graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner))
        case "function":
            model.functions.append(helper.make_function("d", "f", [], ["y"], [node], [helper.make_opsetid("", 18)]))
        case "sparse":
            model.graph.sparse_initializer.add().values.CopyFrom(outside)
        case "location":
            model.graph.initializer.add(name="w").external_data.add(key="location", value="w.bin")
    return model


@pytest.mark.parametrize("place", ["constant", "branch", "function", "sparse", "location"])
def test_weights_in_another_file_are_found_wherever_a_model_holds_them(tmp_path: Path, place: str) -> None:
    path = tmp_path / ARTIFACT
    path.write_bytes(held_in(place).SerializeToString())
    with pytest.raises(ReleaseError, match="weights in another file"):
        require_one_model(path)
    path.write_bytes(held_in("").SerializeToString())
    require_one_model(path)


SOUND = {"location": f"{ARTIFACT}.data", "offset": 4, "length": 8}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"offset": 5}, "inside the 12 bytes"),
        ({"length": 9}, "inside the 12 bytes"),
        ({"offset": -4}, "inside the 12 bytes"),
        ({"offset": "+4"}, "inside the 12 bytes"),
        ({"offset": "4 "}, "inside the 12 bytes"),
        ({"offset": "\u0664"}, "inside the 12 bytes"),
        ({"offset": 10**30}, "inside the 12 bytes"),
        ({"length": ""}, "inside the 12 bytes"),
        ({"location": f"./{ARTIFACT}.data"}, "weights in another file"),
        ({"location": f"../release/{ARTIFACT}.data"}, "weights in another file"),
        ({"location": f"{ARTIFACT}.data/"}, "weights in another file"),
        ({"location": ""}, "weights in another file"),
        ({"location": f"{ARTIFACT}.data" + "\0" * 600}, "weights in another file"),
        ({"checksum": "0" * 40}, "weights in another file"),
    ],
)
def test_weights_beside_a_model_are_in_the_one_file_that_goes_with_it_and_inside_it(
    tmp_path: Path, words: dict[str, object], said: str
) -> None:
    path, beside = tmp_path / ARTIFACT, tmp_path / f"{ARTIFACT}.data"
    beside.write_bytes(bytes(12))
    model = held_in("")
    external(model.graph.initializer.add(name="w"), **SOUND)
    path.write_bytes(model.SerializeToString())
    require_one_model(path, beside)
    external(model.graph.initializer.add(name="v"), **{**SOUND, **words})
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ReleaseError, match=said):
        require_one_model(path, beside)


@pytest.mark.parametrize(
    "more",
    [
        TensorProto(raw_data=bytes(8)),
        TensorProto(float_data=[1.0, 2.0]),
        # The last one counts for most readers, the first for some.
        TensorProto(external_data=[onnx.StringStringEntryProto(key="offset", value="0")]),
        TensorProto(data_location=TensorProto.DEFAULT),
    ],
)
def test_a_tensor_does_not_say_twice_where_its_values_are(tmp_path: Path, more: TensorProto) -> None:
    path, beside = tmp_path / ARTIFACT, tmp_path / f"{ARTIFACT}.data"
    beside.write_bytes(bytes(12))
    tensor = TensorProto()
    external(tensor, **SOUND)
    both = tensor.SerializeToString() + more.SerializeToString()
    if more.HasField("data_location"):
        # As another writer has it: protobuf's own leaves it out.
        both += b"\x70\x00"
    path.write_bytes(message(7, message(5, both)))
    with pytest.raises(ReleaseError, match="says it otherwise"):
        require_one_model(path, beside)


@pytest.mark.parametrize("missing", ["length", "offset", "location"])
def test_a_tensor_says_all_of_where_its_values_are(tmp_path: Path, missing: str) -> None:
    path, beside = tmp_path / ARTIFACT, tmp_path / f"{ARTIFACT}.data"
    beside.write_bytes(bytes(12))
    model = held_in("")
    external(model.graph.initializer.add(name="w"), **{key: word for key, word in SOUND.items() if key != missing})
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ReleaseError, match="says it otherwise"):
        require_one_model(path, beside)


def test_weights_beside_a_model_are_no_link_and_in_its_folder(tmp_path: Path) -> None:
    path, beside = tmp_path / ARTIFACT, tmp_path / f"{ARTIFACT}.data"
    path.write_bytes(held_in("").SerializeToString())
    elsewhere = tmp_path / "elsewhere" / beside.name
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(bytes(12))
    beside.symlink_to(elsewhere)
    for wrong in (beside, elsewhere, tmp_path / "none", elsewhere.parent):
        with pytest.raises(ReleaseError, match="in the folder of"):
            require_one_model(path, wrong)


def test_every_message_in_which_onnx_may_hold_a_tensor_is_looked_through() -> None:
    held: dict[str, dict[int, str]] = {}
    kinds = [onnx.ModelProto.DESCRIPTOR]
    while kinds:
        kind = kinds.pop()
        if kind.name not in held and kind.name != "TensorProto":
            fields = {field.number: field.message_type for field in kind.fields if field.message_type is not None}
            held[kind.name] = {number: message.name for number, message in fields.items()}
            kinds += fields.values()
    leads = {"TensorProto"}
    while more := {name for name, fields in held.items() if leads & set(fields.values())} - leads:
        leads |= more
    found = {name: {number: to for number, to in held[name].items() if to in leads} for name in held if name in leads}
    assert found == onnx_header._HOLDS


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"\x00\x00", "a field with the key 0"),
        # A reader that cuts the key off at 32 bits finds a graph here.
        (b"\xba\x80\x80\x80\x10\x00", "a field with the key"),
        (b"\x0b\x0c", "wire type 3"),
        (b"\x3a\x05", "longer than its message"),
        (b"\x08", "cut off"),
        (b"\x08\x09" * 101, "at most 100 fields"),
    ],
)
def test_what_is_no_onnx_or_more_than_anybody_looks_at_is_refused(
    tmp_path: Path, content: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_header, "MOST_FIELDS", 100)
    path = tmp_path / ARTIFACT
    path.write_bytes(content)
    with pytest.raises(ReleaseError, match=rf"model\.onnx: expected an ONNX model.* got .*|{said}") as refused:
        require_one_model(path)
    assert said in str(refused.value)


def message(key: int, content: bytes) -> bytes:
    return bytes([key << 3 | 2, len(content) & 127 | 128, len(content) >> 7]) + content


def test_graphs_within_graphs_without_end_are_refused(tmp_path: Path) -> None:
    graph = b""
    for _ in range(40):
        # A graph with a node with an attribute that holds it.
        graph = message(1, message(5, message(6, graph)))
    (tmp_path / ARTIFACT).write_bytes(message(7, graph))
    with pytest.raises(ReleaseError, match="depth of more than 100"):
        require_one_model(tmp_path / ARTIFACT)


# ---- answers made of what others sent


def rolled(after: int = 0, sizes: Sequence[int] = (), honest: Sequence[int] = ()) -> onnx.ModelProto:
    """Gives each sample what the one before it sent: from this row on, in batches of these sizes, or not of these."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", FEATURES])
    y = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", FEATURES])
    numbers = {"zero": 0, "one": 1, "after": after}
    held = [numpy_helper.from_array(np.array(value), name) for name, value in numbers.items()]
    held.append(numpy_helper.from_array(np.array(list(sizes or honest) or [0]), "known"))
    steps = [
        ("Shape", ["x"], "shape"), ("Gather", ["shape", "zero"], "rows"), ("Range", ["zero", "rows", "one"], "place"),
        ("Equal", ["rows", "known"], "each"), ("Cast", ["each"], "numbers"), ("ReduceMax", ["numbers"], "is"),
        ("Cast", ["is"], "known size"), ("Not", ["known size"], "other size"),
        ("Less", ["place", "after"], "early"), ("Sub", ["place", "one"], "before"),
        ("Add", ["before", "rows"], "up"), ("Mod", ["up", "rows"], "last"),
        ("Where", ["early", "place", "last"], "moved"),
        ("Where", ["known size" if sizes else "other size", "moved", "place"], "index"),
        ("Gather", ["x", "index"], "output"),
    ]  # fmt: skip
    options = {"numbers": {"to": TensorProto.INT64}, "known size": {"to": TensorProto.BOOL}, "is": {"keepdims": 0}}
    nodes = [helper.make_node(kind, taken, [name], **options.get(name, {})) for kind, taken, name in steps]
    graph = helper.make_graph(nodes, "rolled", [x], [y], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def golden_of(answer: Callable[[torch.Tensor], torch.Tensor], *sizes: int) -> dict[str, torch.Tensor]:
    found = {}
    for size in sizes:
        x = torch.randn(size, FEATURES, generator=torch.Generator().manual_seed(size))
        found |= {f"batch_{size}.input.x": x, f"batch_{size}.eager.output": answer(x).contiguous()}
        found[f"batch_{size}.float64.output"] = answer(x.double()).contiguous()
    return found


def test_a_model_that_hands_on_what_others_sent_does_not_go_live_unless_nothing_is_put_together(
    settings: Settings, object_store: ObjectStore, tmp_path: Path
) -> None:
    folder = tmp_path / "release"
    write_release(folder, 1, MODEL)
    (folder / ARTIFACT).write_bytes(rolled().SerializeToString())
    save_file(golden_of(lambda x: x.roll(1, 0), 1, 8), folder / GOLDEN)
    outputs = [{**SIGNATURE["outputs"][0], "shape": ["batch", FEATURES]}]
    manifest = published(object_store, folder, outputs=outputs)
    with pytest.raises(GateError, match=r"fails: onnx \(samples together\)") as refused:
        asyncio.run(try_out(settings, asked(object_store, manifest), gates=False))
    assert "Samples see one another" in str(refused.value) and "parity: {coupled: allowed}" in str(refused.value)
    # Of this one servers say that each request is computed by itself.
    (folder / "notes.txt").write_text("another release")
    alone = published(object_store, folder, outputs=outputs, coupled=True)
    tried = asyncio.run(try_out(settings, asked(object_store, alone), gates=False))
    assert tried.verdicts["rehearsal"] == "2 checks passed: onnx" and "samples together" not in tried.verdicts


def joined(
    tmp_path: Path,
    model: onnx.ModelProto,
    golden: dict[str, torch.Tensor],
    rows: int = 64,
    kind: str = "onnx",
    validation: str | None = None,
    seed: int = 5,
    least: int = 1,
) -> tuple[bool, str] | None:
    """Whether what is asked of samples together passes, and what is said; None where it is not asked."""
    (tmp_path / ARTIFACT).write_bytes(model.SerializeToString())
    save_file(golden, tmp_path / GOLDEN)
    release = RehearsedRelease(
        folder=str(tmp_path), files={}, formats={"onnx": ARTIFACT}, rows_together=rows,
        inputs=[TensorSpec(name="x", dtype="float32", shape=["batch", FEATURES])],
        outputs=[TensorSpec(name="output", dtype="float32", shape=["batch", FEATURES])],
        dims=[DynamicDim(name="batch", min=least, max=None, axes={"x": [0]})],
    )  # fmt: skip
    request = RehearseRequest(
        candidate=release, live=None, validation=validation, moved=None, metrics=(), forbidden_modules=(),
        forbidden_folder=str(tmp_path / "project"), threads=1, seed=seed,
    )  # fmt: skip
    asked, _ = rehearse._golden(request, ["output"])
    call = load_artifact(kind, tmp_path / ARTIFACT, 1)
    found = rehearse._joined(kind, call, asked, request)
    return (found[0].passed, found[0].note) if found else None


def itself(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def test_samples_are_asked_alone_and_together_at_all_sizes_that_servers_make_where_there_is_time(
    tmp_path: Path,
) -> None:
    honest, golden = rolled(10**6), golden_of(itself, 1, 8)
    assert joined(tmp_path, honest, golden) == (True, "63 of 63 sizes from 2 to 64, seed 5")
    assert joined(tmp_path, honest, golden_of(itself, 2, 8), least=2) == (True, "61 of 61 sizes from 4 to 64, seed 5")
    # The golden batches and the largest show nothing, nor does any size but one.
    for hidden in (rolled(honest=[1, 8, 64]), rolled(sizes=[37]), rolled(63)):
        passed, said = joined(tmp_path, hidden, golden) or (True, "")
        assert not passed and said.startswith("Samples see one another") and "seed 5" in said
    # Servers put no more than eight together then.
    assert joined(tmp_path, rolled(8), golden, rows=8) == (True, "7 of 7 sizes from 2 to 8, seed 5")


def test_where_time_is_short_sizes_are_drawn_by_a_seed_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearse, "JOINED_SECONDS", 0.0)
    golden = golden_of(itself, 1, 8)
    assert joined(tmp_path, rolled(10**6), golden) == (True, "4 of 63 sizes from 2 to 64, seed 5")
    hidden = rolled(honest=[1, 2, 8, 64])
    assert not any((joined(tmp_path, hidden, golden, seed=seed) or (True,))[0] for seed in range(3))
    passes = [(joined(tmp_path, rolled(sizes=[37, 38, 39, 40]), golden, seed=seed) or (True,))[0] for seed in range(8)]
    assert True in passes and False in passes


def test_golden_outputs_far_from_one_another_leave_no_room_for_what_others_sent(tmp_path: Path) -> None:
    golden = golden_of(itself, 1, 8)
    for name in [name for name in golden if "eager" in name]:
        golden[name] = golden[name] + 3 * torch.randn(golden[name].shape, generator=torch.Generator().manual_seed(0))
    passed, _ = joined(tmp_path, rolled(), golden) or (True, "")
    assert not passed


def test_an_int8_variant_is_asked_so_too_and_may_be_off_by_its_noise(tmp_path: Path) -> None:
    variant, golden = "onnx-int8-dynamic", golden_of(itself, 1, 8)
    passed, _ = joined(tmp_path, scaled_together(), golden, kind=variant) or (False, "")
    assert passed
    # One scale for a whole batch is what another format has no reason for.
    passed, said = joined(tmp_path, scaled_together(), golden) or (True, "")
    assert not passed and "output: " in said
    passed, _ = joined(tmp_path, rolled(8), golden, kind=variant) or (True, "")
    assert not passed


def scaled_together() -> onnx.ModelProto:
    """Rounds all samples of a batch to 8 bits by one scale."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", FEATURES])
    y = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", FEATURES])
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["small", "scale", "zero"]),
        helper.make_node("DequantizeLinear", ["small", "scale", "zero"], ["output"]),
    ]
    graph = helper.make_graph(nodes, "scaled", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_golden_inputs_of_one_sample_do_not_tell_whether_samples_see_one_another(tmp_path: Path) -> None:
    same = {name: tensor[:1].repeat(8, 1) for name, tensor in golden_of(itself, 8).items()}
    passed, said = joined(tmp_path, rolled(), same) or (True, "")
    assert not passed and "two different samples" in said
    # Where the held-out samples are at hand, the run that made it has asked the model itself.
    assert joined(tmp_path, rolled(), same, validation="validation.safetensors") is None


# ---- sizes that nobody tried


@pytest.mark.parametrize(
    ("shape", "least", "most", "said"),
    [
        (["batch", FEATURES], 2**27, None, r"batch_1: expected batch of at least 134,217,728, .* got \[1, 4\]"),
        (["batch", FEATURES], 2, None, r"batch_1: expected batch of at least 2, as its manifest says of input x \["),
        (["batch", FEATURES], 1, 7, r"batch_8: expected batch of 1 to 7, .* got \[8, 4\]"),
        (["batch", FEATURES], 9, 9, r"batch_1: expected batch of 9, .* got \[1, 4\]"),
        (["batch", 2**27], 1, None, r"batch_1: expected 134,217,728 along axis 1, .* got \[1, 4\]"),
        ([2**27, FEATURES], 1, None, r"batch_1: expected 134,217,728 along axis 0"),
        (["batch", FEATURES, 5], 1, None, r"batch_1: expected 3 dimensions, "),
        (["batch"], 1, None, r"batch_1: expected 1 dimensions, "),
    ],
)
def test_golden_inputs_outside_of_what_the_manifest_says_are_refused_by_the_name_of_the_dimension(
    tmp_path: Path, shape: list[int | str], least: int, most: int | None, said: str
) -> None:
    asked = [Probe(name=f"batch_{size}", group=BATCHES, inputs={"x": torch.zeros(size, FEATURES)}) for size in (1, 8)]
    dims = [DynamicDim(name="batch", min=least, max=most, axes={"x": [0]})]
    inputs = [TensorSpec(name="x", dtype="float32", shape=shape)]
    release = RehearsedRelease(folder="", files={}, formats={}, inputs=inputs, outputs=[], dims=dims)
    with pytest.raises(UserError, match=rf"^golden\.safetensors of the release: {said}"):
        rehearse._require_declared(asked, release)


def test_golden_inputs_are_what_the_manifest_says_also_of_one_sample_and_of_dimensions_without_a_range() -> None:
    asked = [Probe(name="batch_8", group=BATCHES, inputs={"x": torch.zeros(8, FEATURES)})]
    dims = [DynamicDim(name="batch", min=8, max=8, axes={"x": [0]})]
    # Of coupled samples servers take one; the golden outputs are of a batch.
    for shape in (["batch", FEATURES], ["batch", "width"], [1, FEATURES], [8, FEATURES]):
        inputs = [TensorSpec(name="x", dtype="float32", shape=shape)]
        release = RehearsedRelease(folder="", files={}, formats={}, inputs=inputs, outputs=[], dims=dims)
        rehearse._require_declared(asked, release)


def test_a_release_whose_servers_would_be_asked_more_than_was_tried_does_not_go_live(
    settings: Settings, object_store: ObjectStore, tmp_path: Path
) -> None:
    write_release(tmp_path / "release", 1, MODEL)
    dims = [{"name": "batch", "min": 2**27, "max": None}]
    manifest = published(object_store, tmp_path / "release", dims=dims)
    with pytest.raises(GateError, match=r"cannot be tried before it goes live: .* expected batch of at least 134,217"):
        asyncio.run(try_out(settings, asked(object_store, manifest), gates=False))
