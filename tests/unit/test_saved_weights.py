"""Tensors and weights are written whatever their memory is like, and what is tied stays so."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from tests.support.projects import write_project
from torchworker.data.fingerprint import digest_of
from torchworker.project.user_code import build_model, enter
from torchworker.project.weights import load_weights, save_in_turn, save_tensors, save_weights, tied_names
from train_and_ship.registry.job.load import load_job
from train_and_ship.tasks.requests import project_of


class Model(nn.Module):
    """A layer, and whatever is put into it."""

    def __init__(self, **parts: nn.Module | nn.Parameter | Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)


def views_of_a_table() -> Model:
    table = torch.randn(2, 3, 4)
    return Model(a=table[0], b=table[1])


def views_that_overlap() -> Model:
    memory = torch.randn(10)
    return Model(a=memory[:8], b=memory[2:], c=memory.view(2, 5).t())


def parameters_of_one_memory() -> Model:
    flat = torch.randn(20)
    return Model(a=nn.Parameter(flat[:10].view(2, 5)), b=nn.Parameter(flat[10:].view(5, 2)))


def images_last() -> Model:
    model = Model(conv=nn.Conv2d(3, 8, 3), picture=torch.randn(2, 3, 4, 4))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def tied() -> Model:
    model = Model(other=nn.Linear(4, 4), turned=nn.Linear(4, 4, bias=False))
    model.other.weight = model.layer.weight
    model.turned.weight = nn.Parameter(model.layer.weight.detach().t())
    return model


@pytest.mark.parametrize(
    "make",
    [views_of_a_table, views_that_overlap, parameters_of_one_memory, images_last, tied],
    ids=lambda f: f.__name__,
)
def test_a_state_of_views_is_written_and_read_into_a_model_made_anew(make: Callable[[], Model], tmp_path: Path) -> None:
    trained, anew = make(), make()
    save_weights(trained, tmp_path / "w")
    load_weights(anew, tmp_path / "w")
    for name, value in trained.state_dict().items():
        assert torch.equal(anew.state_dict()[name], value), name


def test_what_is_tied_is_stored_once_and_stays_tied(tmp_path: Path) -> None:
    save_weights(tied(), tmp_path / "w")
    anew = tied()
    load_weights(anew, tmp_path / "w")
    stored = load_file(tmp_path / "w")
    assert len({"layer.weight", "other.weight"} & stored.keys()) == 1
    assert anew.other.weight is anew.layer.weight
    assert anew.turned.weight.data_ptr() == anew.layer.weight.data_ptr()


def test_what_became_one_tensor_in_training_is_given_to_both(tmp_path: Path) -> None:
    trained = Model(a=torch.zeros(3), b=torch.ones(3))
    trained.b = trained.a
    save_weights(trained, tmp_path / "w")
    anew = Model(a=torch.ones(3), b=torch.ones(3))
    load_weights(anew, tmp_path / "w")
    assert torch.equal(anew.a, torch.zeros(3)) and torch.equal(anew.b, torch.zeros(3))


def test_files_of_before_are_read(tmp_path: Path) -> None:
    """safetensors left out what shares memory with a tensor that covers it, and said so name by name."""
    whole = torch.randn(6)
    trained = Model(whole=whole, part=whole[:4], other=nn.Linear(4, 4))
    trained.other.weight = trained.layer.weight
    save_model(trained, str(tmp_path / "w"))
    memory = torch.zeros(6)
    anew = Model(whole=memory, part=memory[:4], other=nn.Linear(4, 4))
    anew.other.weight = anew.layer.weight
    load_weights(anew, tmp_path / "w")
    assert torch.equal(anew.part, whole[:4]) and torch.equal(anew.other.weight, trained.layer.weight)


def test_an_ordinary_model_is_the_file_that_it_was(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    save_weights(model, tmp_path / "ours")
    save_model(model, str(tmp_path / "theirs"))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_file_of_another_model_is_refused_with_its_names(tmp_path: Path) -> None:
    save_weights(views_of_a_table(), tmp_path / "w")
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"turned.weight".*Unexpected key.*"a", "b"'):
        load_weights(tied(), tmp_path / "w")


def test_many_ties_are_one_entry_of_the_header(tmp_path: Path) -> None:
    """safetensors 0.8 writes several in an order that is drawn anew in each process, and so other bytes."""
    layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(6))
    for layer in layers:
        layer.weight, layer.bias = layers[0].weight, layers[0].bias
    save_weights(layers, tmp_path / "w")
    with safe_open(tmp_path / "w", framework="pt") as file:
        assert len(file.metadata()) == 1 and set(file.keys()) == {"0.weight", "0.bias"}


def test_outputs_that_are_views_of_each_other_are_written_with_their_values(tmp_path: Path) -> None:
    scores = torch.arange(24.0).view(2, 3, 4)
    given = {
        "turned": scores.transpose(1, 2), "first": scores[0], "second": scores[1], "again": scores[1],
        "all": torch.ones(1).expand(5), "nothing": scores[:0], "learned": nn.Parameter(scores[0]),
    }  # fmt: skip
    save_tensors(given, tmp_path / "t", {"about": "them"})
    stored = load_file(tmp_path / "t")
    assert all(torch.equal(stored[name], value) for name, value in given.items())
    with pytest.raises(ValueError, match="contiguous"):
        save_file({"turned": given["turned"]}, tmp_path / "raw")


def test_a_model_is_made_with_memory_for_each_value_of_an_expanded_buffer(tmp_path: Path) -> None:
    extra = """
    class Expanded(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.register_buffer("scale", torch.ones(1).expand(3))
            self.register_buffer("hidden", torch.ones(1, 1).expand(2, 3), persistent=False)
    def expanded():
        return nn.Sequential(Expanded())
    """
    job, folder = load_job(write_project(tmp_path / "p", extra=extra, model={"factory": "plain:expanded"}))
    project = project_of(job, folder)
    enter(project)
    try:
        model = build_model(project)
    finally:
        sys.path.remove(project.folder)
        del sys.modules["plain"]
    for buffer in model.buffers():
        buffer.add_(torch.arange(3))
    assert list(model.state_dict()) == ["0.weight", "0.bias", "0.scale"]
    save_weights(model, tmp_path / "w")
    load_weights(model, tmp_path / "w")
    assert model[0].scale.tolist() == [1, 2, 3]  # type: ignore[index, union-attr, operator]


def test_what_torch_reads_with_another_sign_is_written_as_it_is_read(tmp_path: Path) -> None:
    spectrum = torch.fft.rfft(torch.arange(8.0))
    lazy = {"conjugate": spectrum.conj(), "negative": torch.tensor([1 + 2j]).conj().imag}
    assert lazy["conjugate"].is_conj() and lazy["negative"].is_neg()
    save_tensors(lazy, tmp_path / "w.safetensors")
    back = load_file(tmp_path / "w.safetensors")
    assert back["negative"].tolist() == [-2.0] and torch.equal(back["conjugate"], spectrum.conj())
    assert digest_of(torch.full((2, 2), 7.0)[:1, 0]) == digest_of(torch.tensor([7.0]))
    assert digest_of(lazy["negative"]) == digest_of(torch.tensor([-2.0])) != digest_of(torch.tensor([2.0]))


def test_files_have_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save_tensors({"w": torch.zeros(1)}, tmp_path / "w.safetensors")
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


KINDS = (
    torch.bool,
    torch.int8,
    torch.int64,
    torch.uint8,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.complex64,
)


@pytest.mark.parametrize("make", [tied, images_last], ids=lambda f: f.__name__)
def test_written_one_after_the_other_is_byte_by_byte_what_the_library_writes_at_once(
    make: Callable[[], Model], tmp_path: Path
) -> None:
    model = make()
    for kind in KINDS:
        model.register_buffer(f"of_kind_{KINDS.index(kind)}", torch.ones(3, 1, dtype=kind))
    model.register_buffer("count\u00fc", torch.tensor(7))
    model.register_buffer("empty", torch.zeros(0, 3))
    save_weights(model, tmp_path / "at once")
    state, seen = model.state_dict(), []
    whole_ones: list[weakref.ref[Tensor]] = []

    def whole(part: Tensor) -> Tensor:
        assert not any(one() is not None for one in whole_ones), "two are in memory"
        seen.append(id(part))
        made = part.clone()
        whole_ones.append(weakref.ref(made))
        return made

    names = tied_names(state)
    save_in_turn(state, names, whole, tmp_path / "in turn")
    assert (tmp_path / "in turn").read_bytes() == (tmp_path / "at once").read_bytes()
    # Other processes put the same tensors together in the same order, and write nothing.
    first, seen = seen, []
    save_in_turn(state, names, whole, None)
    assert seen == first and len(first) == len(state) - len(names)
