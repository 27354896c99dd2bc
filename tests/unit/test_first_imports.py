"""Packages that are imported once for all processes of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from torchworker.process.first_imports import first_imports, forget_hidden, hidden


def request(folder: Path, *targets: str, entrypoint: str = "") -> dict[str, Any]:
    named = zip(("model", "data", "collate"), targets, strict=False)
    train = {"entrypoint": {"function": {"target": entrypoint}} if entrypoint else None}
    return {"project": {"folder": str(folder), "loss": "mse", **{key: {"target": target} for key, target in named}},
            "train": train}  # fmt: skip


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import sklearn.datasets, scipy\nfrom pandas import DataFrame\n", ["sklearn.datasets", "scipy", "pandas"]),
        ('"""Doc."""\nfrom __future__ import annotations\nimport os\nimport torch\nimport numpy as np\n', ["numpy"]),
        ("import os\nos.environ['A'] = 'b'\nimport scipy\n", []),
        ("import scipy\nif True:\n    import pandas\n", ["scipy"]),
        ("import something_else\nimport scipy\n", []),
        ("import torchvision\nimport scipy\n", []),
        ("def (:\n", []),
        ("", []),
    ],
)
def test_what_a_module_imports_before_anything_of_it_runs(tmp_path: Path, source: str, expected: list[str]) -> None:
    (tmp_path / "model.py").write_text(source)
    assert first_imports(request(tmp_path, "model:build")) == expected


def test_modules_of_the_project_are_read_and_those_that_hide_a_package_are_its_own(tmp_path: Path) -> None:
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("import scipy.linalg\n")
    (package / "model.py").write_text("from .layers import Net\nfrom . import data\nimport PIL.Image\n")
    (package / "layers.py").write_text("import numpy\n")
    (package / "data.py").write_text("import pandas\nimport sklearn\nfrom pkg import model\n")
    (tmp_path / "sklearn.py").write_text("import scipy.stats\n")
    (tmp_path / "loop.py").write_text("import scipy.fft\n")
    found = first_imports(request(tmp_path, "pkg.model:build", "elsewhere:data", entrypoint="loop:train"))
    assert found == ["scipy.linalg", "numpy", "pandas", "scipy.stats", "PIL.Image", "scipy.fft"]


def test_a_request_without_a_project_imports_nothing() -> None:
    assert first_imports({"folder": "x"}) == []


def test_a_project_that_hides_a_package_gets_its_own_also_after_another_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("scipy", "scipy.linalg", "pandas"):
        monkeypatch.setitem(sys.modules, name, sys)
    (tmp_path / "scipy.py").touch()
    forget_hidden(request(tmp_path, "model:build"))
    assert "pandas" in sys.modules and not {"scipy", "scipy.linalg"} & set(sys.modules)


def test_a_package_of_which_a_project_has_its_own_is_found(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "__init__.py").touch()
    asked = request(tmp_path, "model:build")
    assert hidden(asked, ("google", "onnx")) == ["onnx"]
    assert hidden({"project": None}, ("onnx",)) == hidden({}, ("onnx",)) == []
