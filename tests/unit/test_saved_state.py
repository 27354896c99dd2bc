from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchworker.custom_loop.state import SKELETON, empty_tensors, plain, put_together, skeleton_of, tensors_of
from torchworker.training.checkpoint import use_threads_of


def round_trip(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    (folder / SKELETON).write_bytes(skeleton_of(state))
    tensors = empty_tensors(folder)
    for name, tensor in tensors_of(state).items():
        tensors[name].copy_(tensor)
    return put_together(folder, tensors)


def test_what_torch_flattens_with_loss_comes_back_whole(tmp_path: Path) -> None:
    state = {
        "number keys": {0: torch.ones(2), "0": torch.zeros(3, dtype=torch.int64)},
        "empty": {"dict": {}, "list": [], "tensor": torch.zeros(0, 2)},
        "nested": [1, (2.5, None, "text", {"deep": torch.tensor(7)}), True],
        "dtype": torch.bfloat16,
    }
    back = round_trip(state, tmp_path)

    assert torch.equal(back["number keys"][0], torch.ones(2)) and back["number keys"]["0"].dtype == torch.int64
    assert back["empty"]["dict"] == {} and back["empty"]["list"] == [] and back["empty"]["tensor"].shape == (0, 2)
    assert back["nested"][1][:3] == (2.5, None, "text") and back["nested"][1][3]["deep"] == 7
    assert back["nested"][2] is True and back["dtype"] is torch.bfloat16


def test_an_optimizer_goes_on_from_its_saved_state(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=5)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    schedule.step()
    back = round_trip(plain({"optimizer": optimizer, "schedule": schedule, "step": 1}), tmp_path)

    other = torch.optim.Adam(model.parameters(), lr=0.5)
    other.load_state_dict(back["optimizer"])
    assert str(other.state_dict()) == str(optimizer.state_dict())
    assert back["schedule"] == schedule.state_dict()
    assert back["step"] == 1


def test_what_could_not_be_read_again_is_refused_by_type() -> None:
    with pytest.raises(TypeError, match="a PosixPath, which cannot be saved; expected tensors"):
        skeleton_of({"a": [Path("x")]})
    with pytest.raises(TypeError, match="a function, which cannot be saved"):
        skeleton_of({"a": 1, "b": round_trip})


def test_what_goes_on_has_the_threads_that_it_began_with_and_says_so(request: pytest.FixtureRequest) -> None:
    now = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(now))
    assert use_threads_of({}) == use_threads_of({"threads": now}) == ""
    assert use_threads_of({"threads": now + 1}).endswith(f"a process, as it began, and not {now}")
    assert torch.get_num_threads() == now + 1
