"""Recurrent layers in ONNX: right at every length and at every size of a batch."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from torchworker.contract import DynamicDim, Project, Reference
from torchworker.exporters.onnx_export import onnx_model
from torchworker.exporters.subject import Subject
from torchworker.parity.compare import same_weights
from torchworker.process.failure import UserError
from torchworker.runtimes.load import Call, import_onnx_exporter, load_artifact, load_with_weights

Kind = type[nn.LSTM] | type[nn.GRU] | type[nn.RNN]


class Tagger(nn.Module):
    """sequence [B, T, 3] and state [2·layers, B, 5] → what the layers say [B, T, 10], and their states."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.cells = kind(3, 5, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, sequence: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        given = (state, 2 * state) if isinstance(self.cells, nn.LSTM) else state
        said, left = self.cells(sequence, given)
        return said, left[1] if isinstance(left, tuple) else left


class Last(nn.Module):
    """sequence [B, T, 3] → the state that one layer ends with [1, B, 5], as the operator gives it."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.cells = kind(3, 5, batch_first=True)

    def forward(self, sequence: Tensor) -> Tensor:
        left = self.cells(sequence)[1]
        return left[0] if isinstance(left, tuple) else left


class Packs(nn.Module):
    """sequence [B, T, 3] and lengths [B] → the state after each sample's last step [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(3, 5, batch_first=True)

    def forward(self, sequence: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(sequence, lengths, batch_first=True, enforce_sorted=False)
        return self.cells(packed)[1][0]


class Gathers(Packs):
    """The same as the refusal of Packs says."""

    def forward(self, sequence: Tensor, lengths: Tensor) -> Tensor:
        said = self.cells(sequence)[0]
        return said.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, said.shape[2]))[:, 0]


def loaded(model: nn.Module, folder: Path, outputs: list[str], **axes: int) -> Call:
    nothing = Reference(target="a:b", where="model.factory")
    shapes = {
        "sequence": torch.randn(3, 7, 3),
        "state": torch.randn(4, 3, 5),
        "lengths": torch.tensor([7, 2, 5]),
    }
    subject = Subject(
        model=model.eval().requires_grad_(False),
        inputs={name: shapes[name] for name in axes},
        outputs=outputs,
        dims=[
            DynamicDim(name="batch", min=1, max=20, axes={name: (axis,) for name, axis in axes.items()}),
            DynamicDim(name="length", min=1, max=50, axes={"sequence": (1,)}),
        ],
        project=Project(
            name="plain", folder="/nowhere", model=nothing, data=nothing, collate=None, loss="mse_loss", metrics=[]
        ),
    )  # fmt: skip
    import_onnx_exporter()
    onnx_model(subject, folder / "model.onnx")
    return load_artifact("onnx", folder / "model.onnx", 1)


@pytest.mark.parametrize("kind", [nn.LSTM, *(pytest.param(kind, marks=pytest.mark.soak) for kind in (nn.GRU, nn.RNN))])
def test_layers_answer_as_the_model_at_every_length_and_every_size_of_a_batch(tmp_path: Path, kind: Kind) -> None:
    torch.manual_seed(0)
    model = Tagger(kind)
    call = loaded(model, tmp_path, ["said", "left"], sequence=0, state=1)
    for batch, length in ((1, 1), (3, 7), (20, 50), (0, 7), (2, 1)):
        sequence, state = torch.randn(batch, length, 3), torch.randn(4, batch, 5)
        got, expected = call({"sequence": sequence, "state": state}), model(sequence, state)
        for one, two in zip(got, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)

    # Gates in ONNX's order, directions and biases put together: it holds what was trained.
    weights = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), weights)
    (held,) = same_weights("onnx", load_with_weights("onnx", tmp_path / "model.onnx", 1), weights)
    assert held.passed and held.note == "16 of 16 tensors held bit for bit"
    for name in ("weight_ih_l0", "weight_hh_l1_reverse", "bias_hh_l0"):
        changed = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        changed[f"cells.{name}"].view(-1)[3] *= 1 + 3e-7
        save_file(changed, weights)
        (off,) = same_weights("onnx", load_with_weights("onnx", tmp_path / "model.onnx", 1), weights)
        assert not off.passed and off.note == f"other values than were trained: cells.{name}"

    # What the file says of its outputs has the names of what varies.
    said, left = onnx.load(tmp_path / "model.onnx").graph.output
    assert [size.dim_param or size.dim_value for size in said.type.tensor_type.shape.dim] == ["batch", "length", 10]
    assert [size.dim_param or size.dim_value for size in left.type.tensor_type.shape.dim] == [4, "batch", 5]


@pytest.mark.parametrize("kind", [nn.LSTM, *(pytest.param(kind, marks=pytest.mark.soak) for kind in (nn.GRU, nn.RNN))])
def test_a_state_that_is_an_output_itself_keeps_its_name(tmp_path: Path, kind: Kind) -> None:
    torch.manual_seed(0)
    model = Last(kind)
    call = loaded(model, tmp_path, ["left"], sequence=0)
    for batch in (2, 0):
        sequence = torch.randn(batch, 4, 3)
        torch.testing.assert_close(call({"sequence": sequence})[0], model(sequence), rtol=1e-5, atol=1e-6)


def test_packed_sequences_are_refused_with_what_to_do_and_doing_it_gives_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Packs()
    with pytest.raises(UserError, match=r"torch.export cannot capture.*padded batch .*last step \(torch.gather\)"):
        loaded(model, tmp_path, ["output"], sequence=0, lengths=0)

    gathers = Gathers()
    gathers.load_state_dict(model.state_dict())
    call = loaded(gathers, tmp_path, ["output"], sequence=0, lengths=0)
    sequence, lengths = torch.randn(4, 9, 3), torch.tensor([9, 1, 4, 8])
    torch.testing.assert_close(
        call({"sequence": sequence, "lengths": lengths})[0], model(sequence, lengths), rtol=1e-5, atol=1e-6
    )


def test_the_way_back_over_packed_sequences_is_a_layer_over_each_sequence_reversed() -> None:
    torch.manual_seed(0)
    both, back = nn.GRU(3, 5, batch_first=True, bidirectional=True), nn.GRU(3, 5, batch_first=True)
    back.load_state_dict({name: getattr(both, f"{name}_reverse") for name in back.state_dict()})
    sequence, lengths = torch.randn(4, 9, 3), torch.tensor([9, 1, 4, 8])
    packed = nn.utils.rnn.pack_padded_sequence(sequence, lengths, batch_first=True, enforce_sorted=False)
    # As docs/exports.md says.
    places = (lengths[:, None] - 1 - torch.arange(sequence.shape[1])).clamp(min=0)
    said = back(sequence.gather(1, places[:, :, None].expand_as(sequence)))[0]
    last = said.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, said.shape[2]))[:, 0]
    torch.testing.assert_close(last, both(packed)[1][1], rtol=1e-5, atol=1e-6)


class Einstein(nn.Module):
    """Attention by torch.einsum, as many public models write it; also how long the answers are, which has no batch."""

    def forward(self, sequence: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.einsum("b i d, b j d -> b i j", sequence, sequence).softmax(-1)
        return torch.einsum("b i j, b j d -> i b d", scores, sequence), scores.sum(-1)


class Attends(nn.Module):
    def forward(self, sequence: Tensor) -> Tensor:
        kept = (sequence.sum(-1) > 0)[:, None]
        return nn.functional.scaled_dot_product_attention(sequence, sequence, sequence, attn_mask=kept)


@pytest.mark.parametrize(("model", "outputs"), [(Einstein(), ["said", "sums"]), (Attends(), ["said"])])
def test_attention_answers_as_the_model_at_every_size_of_a_batch(
    tmp_path: Path, model: nn.Module, outputs: list[str]
) -> None:
    torch.manual_seed(0)
    call = loaded(model, tmp_path, outputs, sequence=0)
    for batch, length in ((3, 7), (1, 1), (0, 7), (20, 50)):
        sequence = torch.randn(batch, length, 3)
        expected = model(sequence)
        for one, two in zip(call({"sequence": sequence}), expected if len(outputs) > 1 else [expected], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    shapes = [
        [size.dim_param for size in output.type.tensor_type.shape.dim]
        for output in onnx.load(tmp_path / "model.onnx").graph.output
    ]
    assert shapes[0][:2] == (["length", "batch"] if len(outputs) > 1 else ["batch", "length"])
