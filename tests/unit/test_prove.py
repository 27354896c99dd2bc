"""Parity checks of artifacts: each is the model with one thing wrong, written as a function."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset

from tests.support.parity import CODE, NOTHING, as_artifact, check, failed, questions
from torchworker.contract import (
    GOLDEN,
    PLACES,
    VALIDATION,
    DynamicDim,
    ExportRequest,
    Project,
    Reference,
    TensorSpec,
    Verdict,
)
from torchworker.parity import reference
from torchworker.parity.compare import KNOWN, Outside, Policy, compare
from torchworker.parity.probes import ROWS, Probe
from torchworker.parity.reference import read_golden, read_unasked, validation_batches, write_reference
from torchworker.parity.relative import compare_relative
from torchworker.process.failure import UserError
from torchworker.process.fork import ChildDiedError, CrashNote, ForkedCall
from torchworker.project.weights import save_tensors
from torchworker.runtimes.load import Call
from torchworker.stages.validate import outliving


def test_the_samples_of_the_gates_are_those_that_were_drawn_and_ignored_classes_are_padding(tmp_path: Path) -> None:
    project = Project(
        name="plain", folder=str(CODE), model=NOTHING, data=NOTHING, collate=None, loss="cross_entropy", metrics=[],
        group=Reference(target="builtins:repr", where="data.group"),
    )  # fmt: skip
    request = ExportRequest(
        project=project, folder=str(tmp_path), weights="", formats=[], batch=4, seed=0, validation_limit=5,
        drawn=[1, 4, 6, 9, 11], ignored=[0],
    )  # fmt: skip
    inputs, labels = torch.arange(12.0)[:, None].expand(12, 3).contiguous(), torch.arange(12) % 3
    model = nn.Linear(3, 3).eval()
    torch.set_num_threads(1)

    class Stream(IterableDataset[object]):
        def __iter__(self) -> Iterator[object]:
            return iter(TensorDataset(inputs, labels))

    readings = []
    for dataset in (TensorDataset(inputs, labels), Stream()):
        with torch.no_grad():
            _, read = write_reference(request, model, {"input": inputs[:4]}, dataset)
        kept = load_file(tmp_path / VALIDATION)
        # In the order in which they are asked, whatever the dataset is.
        assert kept["input.input"][:, 0].tolist() == kept[PLACES].tolist() == [11, 1, 4, 9, 6]
        assert (kept["target"].tolist(), kept["labels"].tolist()) == ([2, 1, 1, 0, 0], [2, 1, 1, -100, -100])
        assert kept["group"].tolist() == [4, 0, 1, 3, 2]
        readings.append(read)
    assert readings[0].samples == 5 and readings[0] == readings[1]


def by_first(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Sequences as long as the first number of the first one, each with a label a step."""
    length = int(items[0][0][0])
    return torch.stack([x[:length, None] for x, _ in items]), torch.stack([label[:length] for _, label in items])


class Steps(nn.Module):
    """sequence [B, T, 1] → scores of each step [B, T, 2], which depend on how long the sequence is."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(1, 2)

    def forward(self, sequence: Tensor) -> Tensor:
        return self.score(sequence - sequence.mean(1, keepdim=True))


def test_samples_are_asked_at_the_length_that_their_batch_was_padded_to(tmp_path: Path) -> None:
    project = Project(
        name="plain", folder=str(CODE), model=NOTHING, data=NOTHING, loss="cross_entropy", metrics=[],
        collate=Reference(target=f"{__name__}:by_first", where="data.collate"),
    )  # fmt: skip
    length = DynamicDim(name="length", min=1, max=6, axes={"sequence": (1,)})
    request = ExportRequest(
        project=project, folder=str(tmp_path), weights="", formats=[], batch=4, seed=0, validation_limit=10,
        dynamic=[length], ignored=[0],
    )  # fmt: skip
    rows = torch.arange(1.0, 7) * torch.tensor([5.0, 3, 3, 6, 2, 2, 2, 2, 6, 1])[:, None]
    dataset = TensorDataset(rows, torch.arange(60).view(10, 6) % 3)
    model = Steps().eval()
    torch.set_num_threads(1)
    with torch.no_grad():
        write_reference(request, model, {"sequence": by_first([dataset[i] for i in range(4)])[0]}, dataset)
    kept = load_file(tmp_path / VALIDATION)
    specs = [TensorSpec(name="sequence", dtype="float32", shape=("batch", "length", 1))]
    asked = list(validation_batches(kept, specs, 4, ["output"]))
    places = kept[PLACES].tolist()
    assert [tuple(probe.inputs["sequence"].shape) for probe, _ in asked] == [(4, 2, 1), (4, 6, 1), (2, 2, 1)]
    with torch.no_grad():
        for start, (probe, labels) in zip((0, 4, 8), asked, strict=True):
            sequence, targets = by_first([dataset[i] for i in places[start : start + 4]])
            assert torch.equal(probe.inputs["sequence"], sequence)
            assert torch.equal(labels, targets.masked_fill(targets == 0, -100))
            assert probe.eager is not None and torch.equal(probe.eager["output"], model(sequence))
    # Whoever asks with other batches, as a rehearsal does, never mixes lengths.
    shapes = [tuple(probe.inputs["sequence"].shape) for probe, _ in validation_batches(kept, specs, 3)]
    assert shapes == [(3, 2, 1), (1, 2, 1), (2, 6, 1), (2, 6, 1), (1, 2, 1), (1, 2, 1)]

    with (
        torch.no_grad(),
        pytest.raises(UserError, match=r"samples of \[\[2, 1\], \[2\]\] and of \[\[6, 1\], \[6\]\]; pad"),
    ):
        write_reference(replace(request, dynamic=[]), model, {"sequence": rows[:4, :5, None]}, dataset)


class Fraud(nn.Module):
    """The probability of an event of which there is one in a hundred thousand; scores vary by a few units."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.score = nn.Linear(6, 1)
        nn.init.constant_(self.score.bias, -11.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.score(x))


def in_onnx_runtime(model: Fraud) -> Call:
    """The same two operators, as exporters write them."""
    weight, bias = model.score.weight.detach().numpy(), model.score.bias.detach().numpy()
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Gemm", ["x", "w", "b"], ["score"], transB=1),
            onnx.helper.make_node("Sigmoid", ["score"], ["output"]),
        ],
        "fraud",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 6])],
        [onnx.helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, ["batch", 1])],
        [onnx.numpy_helper.from_array(weight, "w"), onnx.numpy_helper.from_array(bias, "b")],
    )
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(made.SerializeToString())
    return lambda inputs: [torch.from_numpy(session.run(None, {"x": inputs["x"].numpy()})[0])]


def test_probabilities_of_rare_events_are_compared_in_their_own_size_where_the_job_asks(tmp_path: Path) -> None:
    model = Fraud()
    inputs = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    probes = questions(model, tmp_path, inputs)
    ranked = Policy(relative=True)
    with torch.no_grad():
        rare, theirs = model(inputs), in_onnx_runtime(model)({"x": inputs})[0]
    assert 3e-6 < float(rare.median()) < 3e-5
    # By more than a thousandth of itself, which is nothing beside 1.
    assert float(((theirs - rare).abs() / rare).max()) > 1e-3 and float((theirs - rare).abs().max()) < 2.4e-7
    runtime = in_onnx_runtime(model)
    assert check(probes, runtime, "onnx") == ""
    assert "of its own size (parity.relative allows" in check(probes, runtime, "onnx", policy=ranked)
    # What computes it as torch does passes, another order of summation included.
    assert check(probes, as_artifact(model), policy=ranked) == ""
    halves = lambda inputs: [  # noqa: E731
        torch.sigmoid(inputs["x"][:, :3] @ model.score.weight[:, :3].T + (
            inputs["x"][:, 3:] @ model.score.weight[:, 3:].T + model.score.bias
        )).detach()
    ]  # fmt: skip
    assert check(probes, halves, policy=ranked) == ""


def test_outputs_that_may_be_negative_are_compared_as_ever(tmp_path: Path) -> None:
    probes = questions(Dense(), tmp_path, torch.randn(64, 6, generator=torch.Generator().manual_seed(1)))
    assert check(probes, as_artifact(Dense().eval()), policy=Policy(relative=True)) == ""
    negative = torch.tensor([1.0, -1.0])
    assert compare_relative(negative, negative, negative.double()) is None
    assert compare_relative(torch.tensor([1, 2]), torch.tensor([1, 2]), None) is None


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.classify = nn.Embedding(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.embed(x).mean(1))


@pytest.fixture
def dense(tmp_path: Path) -> tuple[nn.Module, list[Probe]]:
    model = Dense()
    return model, questions(model, tmp_path, torch.randn(40, 6, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def words(tmp_path: Path) -> tuple[nn.Module, list[Probe]]:
    model = Words()
    tokens = torch.randint(0, 10, (40, 5), generator=torch.Generator().manual_seed(1))
    return model, questions(model, tmp_path, tokens)


def outlived(call: Call, probes: Sequence[Probe]) -> str:
    """What failed of an artifact that may end its process."""
    note, outside = CrashNote(), Outside()

    def asked() -> list[Verdict]:
        return compare("onnx", call, probes, ["output"], Policy(), outside).verdicts

    return failed(outliving(ForkedCall(asked, note), asked, note, outside))


def test_questions_outside_the_signature_that_end_the_process_cost_one_verdict(
    dense: tuple[nn.Module, list[Probe]],
) -> None:
    model, probes = dense

    def ends(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        if inputs["x"].shape[0] == 0 or inputs["x"].dtype == torch.float64:
            os._exit(3)
        return as_artifact(model)(inputs)

    (line,) = outlived(ends, probes).splitlines()
    assert "probes: 2 failed" in line and line.count("the process ended with status 3") == 2

    def ends_inside(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        if inputs["x"].shape[0] == 1:
            os._exit(3)
        return as_artifact(model)(inputs)

    with pytest.raises(ChildDiedError, match="ended with status 3"):
        outlived(ends_inside, probes)


def test_the_model_itself_passes(dense: tuple[nn.Module, list[Probe]], words: tuple[nn.Module, list[Probe]]) -> None:
    assert check(dense[1], as_artifact(dense[0])) == ""
    assert check(words[1], as_artifact(words[0])) == ""


def test_nothing_asked_is_nothing_proven(dense: tuple[nn.Module, list[Probe]]) -> None:
    assert "none was asked" in check([], as_artifact(dense[0]))


def test_probes_stay_in_the_domain_of_the_data(words: tuple[nn.Module, list[Probe]]) -> None:
    asked = [probe for probe in words[1] if probe.declared]
    assert len(asked) > 9
    (rows,) = [probe for probe in asked if probe.group == ROWS]
    assert rows.inputs["x"].unique().tolist() == list(range(12))
    others = [probe.inputs["x"] for probe in asked if probe is not rows]
    assert all(int(tensor.min()) >= 0 and int(tensor.max()) < 10 for tensor in others)


def test_masks_stay_with_the_samples_they_belong_to(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            if not bool((y.sum(1) > 0).all()) or bool(((y != 0) & (y != 1)).any()):
                raise ValueError("a mask of zeros and ones that keeps something")
            return (x * y).sum(1) / y.sum(1)

    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(6) <= torch.arange(40)[:, None] % 6).float()
    model = Masked()
    probes = questions(model, tmp_path, x, mask)
    assert {probe.group for probe in probes if probe.declared and probe.eager is None} == set()
    assert any(probe.name == "times1000" for probe in probes)
    assert check(probes, as_artifact(model)) == ""


def test_state_kept_between_calls_is_found(dense: tuple[nn.Module, list[Probe]]) -> None:
    calls = []

    def counting(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        calls.append(1)
        # Too little for any one comparison.
        return [as_artifact(dense[0])(inputs)[0] * (1 + 2e-9 * len(calls)) + 3e-9 * len(calls)]

    assert "it keeps state" in check(dense[1], counting)


def test_writing_into_an_input_is_found(dense: tuple[nn.Module, list[Probe]]) -> None:
    def scribbling(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        outputs = as_artifact(dense[0])(inputs)
        inputs["x"].mul_(2)
        return outputs

    assert "writes into its inputs: x" in check(dense[1], scribbling)


def test_an_artifact_that_reads_past_strides_is_found(dense: tuple[nn.Module, list[Probe]]) -> None:
    def contiguous_only(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        x = inputs["x"]
        return as_artifact(dense[0])({"x": x.as_strided(x.shape, (x.shape[1], 1)) if x.numel() else x})

    assert "not contiguous" in check(dense[1], contiguous_only)


def test_a_batch_baked_in_at_capture_is_found(dense: tuple[nn.Module, list[Probe]]) -> None:
    def baked(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        return [as_artifact(dense[0])(inputs)[0][:8]]

    assert "batch 17: batch_17: output: shape [8, 3], expected [17, 3]" in check(dense[1], baked)


def test_other_dtypes_and_arity_are_found(dense: tuple[nn.Module, list[Probe]]) -> None:
    assert "dtype torch.float64" in check(dense[1], lambda x: [as_artifact(dense[0])(x)[0].double()])
    assert "2 outputs, expected 1" in check(dense[1], lambda x: as_artifact(dense[0])(x) * 2)


def test_a_failure_names_probe_element_expected_and_got(dense: tuple[nn.Module, list[Probe]]) -> None:
    def off(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        output = as_artifact(dense[0])(inputs)[0]
        if len(output) == 17:
            output[11, 2] += 0.25
        return [output]

    found = compare("onnx", off, dense[1], ["output"], Policy()).findings
    (finding,) = [item for item in found if item.probe.name == "batch_17"]
    assert finding.outcome.worst is not None and finding.outcome.worst.index == (11, 2)
    assert finding.outcome.worst.got - finding.outcome.worst.expected == pytest.approx(0.25)
    assert any("1e-1" in line and "█" in line for line in finding.mismatch().distribution)


class Rare(Dense):
    """Takes another way for the one sample that the data have of its kind."""

    def forward(self, x: Tensor) -> Tensor:
        if bool(x[0, 0] > 100):
            return self.layers(x / 100)
        return self.layers(x)


def test_a_branch_that_one_sample_reaches_is_asked_for_by_itself(tmp_path: Path) -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    x[23, 0] = 200
    model = Rare()
    probes = questions(model, tmp_path, x)
    assert "sample23" in [probe.name for probe in probes]
    baked = Dense()
    baked.load_state_dict(model.state_dict())
    probes = [probe for probe in probes if probe.name.startswith(("batch", "sample"))]
    assert "sample23: output" in check(probes, as_artifact(baked.eval()))


def test_a_finite_answer_that_hides_a_nan_is_found_and_the_policy_decides(
    dense: tuple[nn.Module, list[Probe]],
) -> None:
    model, probes = dense

    def hides(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        return [as_artifact(model)({"x": inputs["x"].nan_to_num(0.0, 0.0, 0.0)})[0]]

    assert "hides the NaN or infinity that the model shows" in check(probes, hides)
    assert check(probes, hides, policy=Policy(not_finite="off")) == ""


def test_a_nan_that_reaches_other_samples_is_found(dense: tuple[nn.Module, list[Probe]]) -> None:
    model, probes = dense

    def spreads(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        return [as_artifact(model)(inputs)[0] + 0 * inputs["x"].sum()]

    assert "nan.x" in check(probes, spreads)


def test_another_pattern_of_nan_in_the_same_sample_is_for_the_strict_policy(
    dense: tuple[nn.Module, list[Probe]],
) -> None:
    model, probes = dense

    def one_element(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        output = as_artifact(model)(inputs)[0]
        output[:, 1:] = output[:, 1:].nan_to_num()
        return [output]

    assert check(probes, one_element) == ""
    assert "NaN or infinity in different places" in check(probes, one_element, policy=Policy(not_finite="same"))
    assert check(probes, as_artifact(model), policy=Policy(not_finite="same")) == ""


def test_declared_lengths_are_asked_at_both_ends_and_beyond(tmp_path: Path) -> None:
    class Positions(Words):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.randn(9, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.classify((self.embed(x) + self.position[: x.shape[1]]).mean(1))

    tokens = torch.randint(0, 10, (40, 5), generator=torch.Generator().manual_seed(1))
    length = DynamicDim(name="length", min=1, max=9, axes={"x": (1,)})
    model = Positions()
    probes = questions(model, tmp_path, tokens, dynamic=[length])
    sizes = {probe.name: probe.inputs["x"].shape[1] for probe in probes if "length" in probe.name}
    between = {f"length_{size}": size for size in range(2, 9)}
    assert sizes == {"smallest.length": 1, "largest.length": 9, "beyond.length": 10, **between}
    assert check(probes, as_artifact(model)) == ""

    def short(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        return as_artifact(model)({"x": inputs["x"][:, :7]})

    found = check(probes, short)
    assert "largest.length: output: max" in found and "answers where the model refuses: RuntimeError" in found


def test_two_declared_dimensions_are_asked_at_their_ends_together_too(tmp_path: Path) -> None:
    class Picture(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((1, 2)) + x.amax((1, 2))

    pictures = torch.randn(40, 5, 6, generator=torch.Generator().manual_seed(1))
    dims = [
        DynamicDim(name="height", min=2, max=8, axes={"x": (1,)}),
        DynamicDim(name="w", min=3, max=None, axes={"x": (2,)}),
    ]
    model = Picture()
    probes = questions(model, tmp_path, pictures, dynamic=dims)
    sizes = {probe.name: tuple(probe.inputs["x"].shape[1:]) for probe in probes if "est" in probe.name}
    assert sizes == {
        "smallest.height": (2, 6), "largest.height": (8, 6), "smallest.w": (5, 3), "largest.w": (5, 13),
        "all_smallest": (2, 3), "all_largest": (8, 13),
        "smallest.height_largest.w": (2, 13), "smallest.w_largest.height": (8, 3),
    }  # fmt: skip
    assert check(probes, as_artifact(model)) == ""


def test_what_the_model_refuses_an_artifact_refuses(words: tuple[nn.Module, list[Probe]]) -> None:
    model, probes = words

    def wraps(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        return as_artifact(model)({"x": torch.where(inputs["x"] == -1, 11, inputs["x"])})

    said = compare("onnx", wraps, probes, ["output"], Policy()).verdicts
    assert failed(said) == "" and any(KNOWN in item.note for item in said)
    assert "answers where the model refuses: IndexError" in check(probes, wraps, "onnx", Policy(refusals="same"))
    assert "answers where the model refuses: IndexError" in check(probes, wraps, "pt2")
    assert check(probes, wraps, "pt2", Policy(refusals="off")) == ""


def test_an_artifact_may_refuse_what_the_signature_does_not_promise(dense: tuple[nn.Module, list[Probe]]) -> None:
    def careful(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        if len(inputs["x"]) == 0:
            raise ValueError("at least one sample")
        return as_artifact(dense[0])(inputs)

    assert check(dense[1], careful) == ""


def test_a_model_that_only_runs_in_float32_is_held_to_its_own_rounding(tmp_path: Path) -> None:
    class Single(Dense):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x.float()) if self.layers[0].weight.dtype == torch.float32 else x.half()

    model = Single()
    probes = questions(model, tmp_path, torch.randn(40, 6, generator=torch.Generator().manual_seed(1)))
    assert not any(probe.exact for probe in probes) and all(probe.perturbed for probe in probes if probe.declared)
    assert check(probes, as_artifact(model)) == ""
    with torch.no_grad():
        model.layers[3].bias[0] += 1e-5
    assert "batch 8" in check(probes, as_artifact(model))


class Drawing(nn.Module):
    """x [B, 1, 15, 15] → [B, 2, 15, 15]: two normalisations, which divide by almost nothing where it is flat."""

    def __init__(self, in_order: bool = False) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second, self.last = (nn.Conv2d(*ends, 3, padding=1) for ends in ((1, 4), (4, 4), (4, 2)))
        self.in_order = in_order

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.normed(self.second(self.normed(self.first(x)).relu())))

    def normed(self, x: Tensor) -> Tensor:
        if not self.in_order:
            return nn.functional.instance_norm(x)
        # Row by row, as a runtime may add them.
        mean = sum(sum(x.split(1, -1)).split(1, -2)) / x[0, 0].numel()
        return (x - mean) / ((x - mean).square().mean((-2, -1), keepdim=True) + 1e-5).sqrt()


def test_on_a_flat_picture_an_artifact_may_lose_what_rounding_moves_the_model_by(tmp_path: Path) -> None:
    model = Drawing().eval()
    probes = questions(model, tmp_path, torch.randn(40, 1, 15, 15, generator=torch.Generator().manual_seed(1)))
    zero = next(probe for probe in probes if probe.name == "zero")
    assert [probe.name for probe in probes if probe.perturbed] == ["zero"], "of others eager is the measure"
    artifact = Drawing(in_order=True).eval()
    assert check(probes, as_artifact(artifact)) == ""
    assert "zero" in check([probes[0], replace(zero, perturbed={})], as_artifact(artifact)), (
        "by eager's own, it is too far"
    )
    with torch.no_grad():
        artifact.last.bias[0] += 0.01
    assert "zero" in check([probes[0], zero], as_artifact(artifact))


def test_a_model_that_takes_the_process_down_on_a_bad_index_is_not_asked_for_it(tmp_path: Path) -> None:
    class Fragile(Words):
        def forward(self, x: Tensor) -> Tensor:
            if bool((x < 0).any()):
                import os

                os._exit(9)
            return super().forward(x)

    tokens = torch.randint(0, 10, (40, 5), generator=torch.Generator().manual_seed(1))
    names = [probe.name for probe in questions(Fragile(), tmp_path, tokens)]
    assert "too_large.x" in names and "minus_one.x" not in names


def test_a_model_whose_project_has_threads_is_asked_what_it_refuses_too(tmp_path: Path) -> None:
    stop = threading.Event()
    threading.Thread(target=stop.wait, daemon=True).start()
    tokens = torch.randint(0, 10, (40, 5), generator=torch.Generator().manual_seed(1))
    try:
        asked = {probe.name: probe.error for probe in questions(Words(), tmp_path, tokens)}
    finally:
        stop.set()
    assert "IndexError" in asked["minus_one.x"] and "IndexError" in asked["too_large.x"]
    assert read_unasked(tmp_path) == []


def test_what_needs_a_thread_of_the_project_is_not_asked_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Threaded(Words):
        """Counts its words in a thread that a fork does not have."""

        def __init__(self) -> None:
            super().__init__()
            self.pool = ThreadPoolExecutor(1)

        def __deepcopy__(self, memo: object) -> nn.Module:
            return Words()

        def forward(self, x: Tensor) -> Tensor:
            self.pool.submit(x.numel).result()
            return super().forward(x)

    monkeypatch.setattr(reference, "REFUSAL_SECONDS", 0.5)
    tokens = torch.randint(0, 10, (40, 5), generator=torch.Generator().manual_seed(1))
    model = Threaded()
    names = [probe.name for probe in questions(model, tmp_path, tokens)]
    model.pool.shutdown()
    assert "batch_17" in names and "minus_one.x" not in names
    assert read_unasked(tmp_path)[0] == "minus_one.x (in a process of its own the model gives no answer after 0.5 s)"
    assert [line.partition(" ")[0] for line in read_unasked(tmp_path)] == ["minus_one.x", "too_large.x", "longer1.x"]


def test_a_declared_length_that_the_model_refuses_is_said(tmp_path: Path) -> None:
    class Short(Words):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] > 7:
                raise ValueError("at most seven words")
            return super().forward(x)

    tokens = torch.randint(0, 10, (40, 5), generator=torch.Generator().manual_seed(1))
    length = DynamicDim(name="length", min=1, max=9, axes={"x": (1,)})
    questions(Short(), tmp_path, tokens, dynamic=[length])
    assert read_unasked(tmp_path) == [
        f"{name}, which the model refuses itself (ValueError: at most seven words)"
        for name in ("largest.length", "length_8")
    ]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.classify = nn.GroupNorm(2, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.norm(x).mean(2))


class OnePass(Normed):
    """The variance as kernels have it that read their input once."""

    def forward(self, x: Tensor) -> Tensor:
        groups = x.unflatten(1, (2, 3)).flatten(2)
        mean = groups.mean(2, keepdim=True)
        variance = groups.square().mean(2, keepdim=True) - mean.square()
        return self.classify(((groups - mean) / (variance + 1e-5).sqrt()).reshape(x.shape).mean(2))


def test_a_variance_that_is_lost_far_from_zero_is_found_and_the_model_s_own_loss_is_not(tmp_path: Path) -> None:
    model, one_pass = Normed(), OnePass()
    x = torch.randn(40, 6, 5, generator=torch.Generator().manual_seed(1))
    probes = questions(model, tmp_path, x)
    (shifted,) = [probe for probe in probes if probe.name == "shifted"]
    assert 95 < float(shifted.inputs["x"].mean()) < 105
    assert check(probes, as_artifact(model)) == ""
    found = check(probes, as_artifact(one_pass))
    assert "1 failed: shifted: output" in found


def test_nan_everywhere_is_asked_too(tmp_path: Path) -> None:
    class Largest(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.amax((1, 2))[:, None] * torch.ones(3)

    def starts_at_the_lowest(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Finite only where everything is NaN, as a maximum that starts from the lowest number and skips NaN."""
        x = inputs["x"]
        lowest = torch.full_like(x, torch.finfo(x.dtype).min)
        return as_artifact(model)({"x": torch.where(x.isnan().all(2, keepdim=True).all(1, keepdim=True), lowest, x)})

    model = Largest()
    probes = questions(model, tmp_path, torch.randn(40, 6, 5, generator=torch.Generator().manual_seed(1)))
    assert check(probes, as_artifact(model)) == ""
    assert "all_nan.x: output: sample 0: a finite answer hides the NaN" in check(probes, starts_at_the_lowest)
    assert check(probes, starts_at_the_lowest, policy=Policy(not_finite="off")) == ""


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_whole_numbers_that_go_through_float32_are_found_by_the_neighbours_of_the_largest(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    class Buckets(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x % 7

    def through_float32(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        return as_artifact(model)({"x": inputs["x"].float().to(dtype)})

    model = Buckets()
    # float32 has each of these, and none of the odd numbers between them.
    x = (2**25 + 64 * torch.arange(40)).reshape(40, 1).repeat(1, 3).to(dtype)
    probes = questions(model, tmp_path, x)
    asked = {probe.name: int(probe.inputs["x"].max()) for probe in probes if probe.group == "largest whole numbers"}
    largest = 2**25 + 64 * 39
    assert asked == {"largest.x": largest, "next.x": largest + 1, "previous.x": largest - 1}
    assert check(probes, as_artifact(model)) == ""
    found = check(probes, through_float32)
    assert "next.x: output" in found and "previous.x: output" in found and "largest.x" not in found


def test_whole_numbers_that_float32_has_are_only_taken_from_samples(words: tuple[nn.Module, list[Probe]]) -> None:
    assert [probe.name for probe in words[1] if probe.group == "largest whole numbers"] == ["largest.x"]


class Balance(Dense):
    """Answers, and one number of the whole batch, as an auxiliary loss is."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        answers = self.layers(x)
        return answers, answers.softmax(-1).mean(0).square().sum()


def test_one_number_of_a_batch_is_compared_for_the_same_batch(tmp_path: Path) -> None:
    model = Balance()
    probes = questions(model, tmp_path, torch.randn(40, 6, generator=torch.Generator().manual_seed(1)))
    assert {probe.eager["output_1"].shape for probe in probes if probe.eager is not None} == {()}

    def failed_with(change: Callable[[Tensor], Tensor], policy: Policy | None = None) -> str:
        def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
            with torch.no_grad():
                answers, number = model(inputs["x"])
            return [answers, change(number)]

        return failed(compare("pt2", call, probes, ["output_0", "output_1"], policy or Policy()).verdicts)

    assert failed_with(lambda number: number) == ""
    assert failed_with(lambda number: number, Policy(not_finite="same")) == ""
    assert "output_1: max |Δ|" in failed_with(lambda number: number * (1 + 1e-5))
    assert "output_1: shape [1], expected []" in failed_with(lambda number: number[None])
    # NaN in a sample is NaN in what is of all samples.
    assert "hides the NaN" in failed_with(lambda number: number.nan_to_num(0.5))
    # Of no samples it says nothing: a mean of nothing is NaN in torch and 0 elsewhere.
    (empty,) = [probe for probe in probes if probe.name == "empty"]
    answers = {"output_0": torch.zeros(0, 3), "output_1": torch.tensor(0.0)}
    zero = compare("onnx", lambda _: list(answers.values()), [empty], list(answers), Policy()).verdicts
    assert failed(zero) == ""


class Ranked(nn.Module):
    """The four best of twelve items, of which many have the same score: 0."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.score = nn.Linear(6, 12)
        nn.init.constant_(self.score.bias, -0.6)

    def scores(self, x: Tensor) -> Tensor:
        return self.score(x).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x).topk(4).indices


def test_items_of_the_same_score_may_come_in_another_order_and_no_others(tmp_path: Path) -> None:
    model = Ranked()
    probes = questions(model, tmp_path, torch.randn(40, 6, generator=torch.Generator().manual_seed(1)))
    few = [int((model.scores(probe.inputs["x"]) > 0).sum(1).min()) for probe in probes if probe.name == "batch_17"]
    assert few[0] < 3, "there are samples in which two of the four tie"

    def check_order(change: Callable[[Tensor, Tensor], Tensor]) -> str:
        def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
            with torch.no_grad():
                scores = model.scores(inputs["x"])
                return [change(scores, model(inputs["x"]))]

        return check(probes, call, "onnx")

    def last_of_equal(scores: Tensor, _: Tensor) -> Tensor:
        return 11 - scores.flip(1).sort(dim=1, descending=True, stable=True).indices[:, :4]

    def turned(places: Tensor, shown: Tensor) -> Tensor:
        return torch.where(shown[:, None], places.roll(1, 1), places)

    assert check_order(lambda scores, _: scores.sort(dim=1, descending=True, stable=True).indices[:, :4]) == ""
    assert check_order(last_of_equal) == ""
    assert "elements differ" in check_order(lambda scores, places: turned(places, (scores > 0).sum(1) > 3))
    # One of those that tie, twice.
    twice = lambda _, places: torch.cat([places[:, :3], places[:, 2:3]], 1)  # noqa: E731
    assert "elements differ" in check_order(twice)


def test_all_items_in_order_are_the_same_items(tmp_path: Path) -> None:
    class Sorted(Ranked):
        def forward(self, x: Tensor) -> Tensor:
            return self.scores(x).argsort(1, descending=True)

    model = Sorted()
    probes = questions(model, tmp_path, torch.randn(40, 6, generator=torch.Generator().manual_seed(1)))

    def stable(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [model.scores(inputs["x"]).sort(dim=1, descending=True, stable=True).indices]

    def with_another(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        return [torch.where(found == found[:, -1:], found[:, -2:-1], found) for found in stable(inputs)]

    assert check(probes, stable, "onnx") == ""
    assert "elements differ" in check(probes, with_another, "onnx")


class HalfScore(nn.Module):
    """One score, computed in bfloat16 and given as float32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Linear(*sizes, dtype=torch.bfloat16) for sizes in ((6, 32), (32, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.to(self.first.weight.dtype)).relu()).float().squeeze(1)


def test_a_model_in_bfloat16_is_held_to_the_rounding_of_bfloat16_and_against_float64(tmp_path: Path) -> None:
    model = HalfScore()
    probes = questions(model, tmp_path, torch.randn(40, 6, generator=torch.Generator().manual_seed(1)))
    assert all(probe.exact and probe.roundoff == 2**-8 for probe in probes if probe.declared)
    assert all(probe.roundoff == 2**-8 for probe in read_golden(tmp_path, None))
    assert check(probes, as_artifact(model)) == ""

    def fused(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        # As compilers do it: what lies between is not rounded.
        with torch.no_grad():
            weights = [tensor.float() for tensor in model.parameters()]
            hidden = inputs["x"].bfloat16().float() @ weights[0].T + weights[1]
            return [(hidden.relu() @ weights[2].T + weights[3]).squeeze(1)]

    assert check(probes, fused) == ""
    assert "batch 8" in check(probes, lambda inputs: [fused(inputs)[0] * 1.3])


def test_what_a_file_says_of_its_rounding_is_one_of_two_numbers_or_nothing(tmp_path: Path) -> None:
    questions(HalfScore(), tmp_path, torch.randn(40, 6, generator=torch.Generator().manual_seed(1)))
    save_tensors(load_file(tmp_path / GOLDEN), tmp_path / GOLDEN, metadata={"roundoff": "0.5"})
    assert {probe.roundoff for probe in read_golden(tmp_path, None)} == {0.0}
