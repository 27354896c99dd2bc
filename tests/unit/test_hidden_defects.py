"""Artifacts that are the model until a size, a token, a mask, a scale or a call comes that samples do not show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.support.parity import as_artifact, check, questions
from torchworker.contract import PLACES, VALIDATION, DynamicDim, TensorSpec
from torchworker.parity.compare import same_weights
from torchworker.parity.probes import BATCHES, MASKS, ROWS, Probe
from torchworker.parity.reference import other_batches, read_unasked, validation_batches
from torchworker.runtimes.load import Call, load_with_weights

Condition = Callable[[Mapping[str, Tensor]], bool]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Masked(nn.Module):
    """Tokens [batch, length], where 0 is padding, and which of them count."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.classify = nn.Embedding(50, 8, padding_idx=0), nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.classify((self.embed(x) * y[..., None]).sum(1))


def wrong_when(model: nn.Module, condition: Condition) -> Call:
    def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        (out,) = as_artifact(model)(inputs)
        return [out * 1.001 + 1e-4] if condition(inputs) else [out]

    return call


def asked_of(model: nn.Module, folder: Path, *inputs: Tensor, largest: int | None = None) -> list[Probe]:
    """All questions, with batches of other sizes made of the validation samples, as the clean room asks them."""
    probes = questions(model, folder, *inputs)
    names = ["x", "y"][: len(inputs)]
    specs = [TensorSpec(name=name, dtype="float32", shape=["batch"]) for name in names]
    samples = [probe for probe, _ in validation_batches(load_file(folder / VALIDATION), specs, 8, ["output"])]
    golden = [probe.size for probe in probes if probe.group == BATCHES]
    return [*probes, *other_batches(samples, golden, largest)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, list[Probe]]:
    model = Plain()
    return model, asked_of(
        model, tmp_path_factory.mktemp("plain"), torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    )


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, list[Probe]]:
    model = Masked()
    g = torch.Generator().manual_seed(1)
    kept = torch.arange(5) < torch.randint(1, 5, (40, 1), generator=g)
    tokens = torch.randint(1, 20, (40, 5), generator=g) * kept
    return model, asked_of(model, tmp_path_factory.mktemp("masked"), tokens, kept)


@pytest.mark.parametrize("size", [2, 3, 4, 16, 32, 64, 128])
def test_a_batch_size_at_which_an_artifact_errs_is_found(plain: tuple[nn.Module, list[Probe]], size: int) -> None:
    model, probes = plain
    assert check(probes, as_artifact(model)) == ""
    assert f"{size} samples: output" in check(probes, wrong_when(model, lambda given: len(given["x"]) == size))


def test_batches_stay_within_the_signature_and_are_made_of_different_samples(tmp_path: Path) -> None:
    inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    asked = asked_of(Plain(), tmp_path, inputs, largest=32)
    sizes = {probe.name: probe.inputs["x"] for probe in asked if probe.name.endswith(" samples")}
    # 1, 8 and 17 are asked anyway.
    assert list(sizes) == ["2 samples", "3 samples", "4 samples", "16 samples", "32 samples"]
    assert [tuple(tensor.shape) for tensor in sizes.values()] == [(2, 6), (3, 6), (4, 6), (16, 6), (32, 6)]
    assert torch.equal(sizes["3 samples"], inputs[load_file(tmp_path / VALIDATION)[PLACES]][2:5])
    assert asked_of(Plain(), tmp_path, inputs, largest=1)[-1].group != "batch sizes"


def test_an_answer_that_the_next_call_overwrites_is_found(plain: tuple[nn.Module, list[Probe]]) -> None:
    model, probes = plain
    buffer = torch.zeros(256, 3)

    def one_memory(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        (out,) = as_artifact(model)(inputs)
        buffer[: len(out)] = out
        return [buffer[: len(out)]]

    found = check(probes, one_memory)
    assert found.startswith("called again: the answer to ") and "both are in the same memory" in found


@pytest.mark.parametrize("call", [2, 37, 50])
def test_an_artifact_that_errs_from_its_second_to_its_fiftieth_call_is_found(
    plain: tuple[nn.Module, list[Probe]], call: int
) -> None:
    model, probes = plain
    few = [probe for probe in probes if probe.group == BATCHES]
    for asked in (probes, few):
        count = 0

        def is_due(_: Mapping[str, Tensor]) -> bool:
            nonlocal count
            count += 1
            return count >= call

        assert check(asked, wrong_when(model, is_due)) != ""


@pytest.mark.parametrize("factor", [3, 10])
def test_a_value_that_is_cut_at_a_few_times_the_data_is_found(
    plain: tuple[nn.Module, list[Probe]], factor: float
) -> None:
    model, probes = plain
    limit = factor * 0.9 * max(float(probe.inputs["x"].abs().max()) for probe in probes if probe.group == BATCHES)
    assert check(probes, lambda given: as_artifact(model)({"x": given["x"].clamp(-limit, limit)})) != ""


def test_every_row_of_an_embedding_is_asked_and_padding_stays_padding(masked: tuple[nn.Module, list[Probe]]) -> None:
    model, probes = masked
    assert check(probes, as_artifact(model)) == ""
    for token in (1, 33, 49):
        found = check(probes, wrong_when(model, lambda given, token=token: bool((given["x"] == token).any())))  # type: ignore[misc]
        assert "rows0.x: output" in found or token < 20, token
        assert found != "", token
    for probe in probes:
        if probe.group == ROWS:
            # What was padding is padding: the mask of the sample still fits it.
            assert torch.equal(probe.inputs["x"] != 0, probe.inputs["y"])


def test_an_embedding_larger_than_the_questions_have_room_for_is_asked_as_far_as_they_go(tmp_path: Path) -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5000, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.embed(x)

    asked = questions(Large(), tmp_path, torch.randint(0, 9, (20,), generator=torch.Generator().manual_seed(1)))
    rows = torch.cat([probe.inputs["x"] for probe in asked if probe.group == ROWS])
    assert torch.equal(rows, torch.arange(4096))


def test_masks_of_all_and_of_nothing_are_asked_within_one_sample(masked: tuple[nn.Module, list[Probe]]) -> None:
    model, probes = masked
    (probe,) = [probe for probe in probes if probe.group == MASKS]
    assert probe.inputs["y"][0].all() and not probe.inputs["y"][3].any()
    whole = wrong_when(model, lambda given: bool(given["y"].all(1).any()))
    nothing = wrong_when(model, lambda given: bool((~given["y"].any(1)).any()))
    assert "masks.y: output" in check(probes, whole) and "masks.y: output" in check(probes, nothing)


def test_sizes_within_a_declared_range_and_pairs_of_them_are_asked(tmp_path: Path) -> None:
    class Average(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((1, 2))

    pictures = torch.randn(20, 9, 40, 2, generator=torch.Generator().manual_seed(1))
    dims = [
        DynamicDim(name="height", min=2, max=12, axes={"x": (1,)}),
        DynamicDim(name="width", min=2, max=500, axes={"x": (2,)}),
    ]
    model = Average()
    probes = questions(model, tmp_path, pictures, dynamic=dims)
    heights = {probe.inputs["x"].shape[1] for probe in probes if probe.declared and probe.inputs["x"].shape[2] == 40}
    assert heights >= set(range(2, 13))
    widths = {probe.inputs["x"].shape[2] for probe in probes if probe.declared and probe.inputs["x"].shape[1] == 9}
    assert len(widths) >= 18 and widths >= {2, 4, 8, 16, 32, 64, 128, 256, 500}
    assert check(probes, as_artifact(model)) == ""
    uneven = wrong_when(model, lambda given: given["x"].shape[2] > 30 * given["x"].shape[1])
    assert check(probes, uneven) != ""
    names = {probe.name: tuple(probe.inputs["x"].shape[1:3]) for probe in probes}
    assert names["smallest.height_largest.width"] == (2, 500) and names["smallest.width_largest.height"] == (12, 2)


def test_sizes_that_the_model_refuses_itself_are_told_in_a_few_words(tmp_path: Path) -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] % 2:
                raise ValueError("an even length")
            return x.unflatten(1, (2, -1)).sum((1, 2))

    length = DynamicDim(name="length", min=2, max=18, axes={"x": (1,)})
    questions(Halves(), tmp_path, torch.randn(20, 8, 3), dynamic=[length])
    told = read_unasked(tmp_path)
    assert len(told) == 5 and told[0] == "length_3, which the model refuses itself (ValueError: an even length)"
    assert told[-1].endswith(" more such sizes")


@pytest.mark.parametrize("kind", ["torchscript", "pt2", "onnx"])
def test_a_weight_of_an_artifact_is_the_trained_one_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(40, 8), nn.Linear(8, 8), nn.Linear(8, 3)).eval().requires_grad_(False)
    tokens = torch.arange(6).view(2, 3)
    path = tmp_path / "model"
    if kind == "torchscript":
        torch.jit.trace(model, (tokens,)).save(str(path))  # type: ignore[no-untyped-call]
    else:
        program = torch.export.export(model, (tokens,))
        if kind == "pt2":
            torch.export.save(program, path)
        else:
            torch.onnx.export(program, (tokens,), verbose=False).save(str(path), external_data=False)  # type: ignore[union-attr]
    trained = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), trained)
    (passed,) = same_weights(kind, load_with_weights(kind, path, 1), trained)
    assert passed.passed and passed.note.endswith(" of 5 tensors held bit for bit")
    assert int(passed.note.split()[0]) >= 3
    # A row that no sample asks for, off by less than any rule on values could see.
    model[0].weight[33, 5] = torch.nextafter(model[0].weight[33, 5], torch.tensor(9.0))
    save_file(model.state_dict(), trained)
    (failed,) = same_weights(kind, load_with_weights(kind, path, 1), trained)
    assert not failed.passed and failed.note == "other values than were trained: 0.weight"
    save_file({"another": torch.zeros(2)}, trained)
    assert same_weights(kind, load_with_weights(kind, path, 1), trained) == []


def test_a_batch_norm_that_onnx_folds_into_the_weights_before_it_is_no_other_weight(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)).eval()
    model.requires_grad_(False)[1].running_var.fill_(2.0)  # type: ignore[operator, union-attr]
    picture = torch.randn(2, 1, 4, 4)
    path, trained = tmp_path / "model.onnx", tmp_path / "weights.safetensors"
    torch.onnx.export(torch.export.export(model, (picture,)), (picture,), verbose=False).save(str(path))  # type: ignore[union-attr]
    save_file(model.state_dict(), trained)
    assert all(item.passed for item in same_weights("onnx", load_with_weights("onnx", path, 1), trained))
    assert "0.weight" not in dict(load_with_weights("onnx", path, 1).weights(set(model.state_dict())))
