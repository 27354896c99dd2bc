"""Pickles are found by what is in a file, whatever its name."""

from __future__ import annotations

import collections
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from train_and_ship.infra.errors import ReleaseError
from train_and_ship.registry.release.manifest import build_manifest
from train_and_ship.registry.release.pickles import find_pickle, is_pickle


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "value", [RunsCode(), {"a": 1}, collections.OrderedDict(x=[1.5] * 1000)], ids=["code", "plain", "class"]
)
def test_a_pickle_under_another_name_is_refused(tmp_path: Path, value: Any, protocol: int) -> None:
    (tmp_path / "labels.txt").write_bytes(pickle.dumps(value, protocol))
    with pytest.raises(ReleaseError, match=r"labels\.txt: expected no pickle in a release, got one \(it is a pickle\)"):
        build_manifest(tmp_path, model="digits", formats={}, signature={}, metrics={})


def test_a_pickle_too_long_to_be_read_to_its_end_is_found(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(pickle.dumps([RunsCode(), list(range(10**6))]))
    assert find_pickle(tmp_path / "x", None) == "it is a pickle"


def test_what_torch_saves_is_found_in_both_of_its_forms(tmp_path: Path) -> None:
    for name, options in (("new", {}), ("old", {"_use_new_zipfile_serialization": False})):
        torch.save({"w": torch.zeros(3)}, tmp_path / name, **options)
        assert "pickle" in (find_pickle(tmp_path / name, None) or "")


def test_weights_that_begin_like_a_pickle_are_none() -> None:
    for second in range(2, 6):
        assert not is_pickle(bytes([0x80, second]) + bytes(range(1, 200)) * 10)
    assert not is_pickle(b"") and not is_pickle(b"\x80\x04")


def test_archives_without_pickles_are_let_through(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.json", "{}")
        archive.writestr("weights", bytes(1000))
    assert find_pickle(tmp_path / "x.zip", None) is None
    with zipfile.ZipFile(tmp_path / "x.zip", "a") as archive:
        archive.writestr("hidden.bin", pickle.dumps(RunsCode()))
    for kind in (None, "onnx", "torchscript", "pt2"):
        assert find_pickle(tmp_path / "x.zip", kind) == "hidden.bin in it is a pickle"
