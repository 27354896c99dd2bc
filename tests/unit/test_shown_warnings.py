"""What is shown in a stage's log is in the report, with the package that says it and its version."""

from __future__ import annotations

import platform
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch
import typing_extensions

from tests.support.html_pages import checked
from tests.support.run_report_files import page_of, run_files
from torchworker.contract import WARNINGS, ShownWarning
from torchworker.process import shown_warnings
from train_and_ship.registry.report.html import html
from train_and_ship.registry.report.page import markdown
from train_and_ship.registry.run_folder import _warnings as read_warnings


@pytest.fixture(autouse=True)
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process keeps what it shows. pytest takes the hook away after each test."""
    monkeypatch.setattr(shown_warnings, "_file", None)
    monkeypatch.setattr(shown_warnings, "_show", lambda *shown: None)
    folder = tmp_path / "train.work"
    folder.mkdir()
    shown_warnings.keep_warnings(folder)
    warnings.simplefilter("always")
    return folder


def kept(stage: Path) -> list[ShownWarning]:
    return list(read_warnings(stage.parent))


def test_a_warning_of_a_library_has_its_name_and_version_wherever_it_points(stage: Path) -> None:
    for _ in range(3):
        torch.nn.functional.mse_loss(torch.zeros(2, 1), torch.zeros(2))
    (shown,) = kept(stage)
    assert shown.text.startswith("Using a target size") and shown.where.startswith("test_shown_warnings.py:")
    assert (shown.package, shown.version, shown.category) == ("torch", torch.__version__, "UserWarning")
    # torch's own C++ warns in the name of the line that called it.
    warnings.warn("The given array is not writable (Triggered internally at tensor_new.cpp:1.)", stacklevel=1)
    assert kept(stage)[1].package == "torch"


def test_a_package_that_warns_of_its_version_is_kept_once(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site-packages"
    site.mkdir()
    (site / "warning_package.py").write_text(
        "import warnings\n"
        "def __getattr__(name):\n"
        "    warnings.warn(f'{name} is going', stacklevel=2)\n"
        "    return '1'\n"
        "def old():\n"
        "    warnings.warn('old', FutureWarning, stacklevel=2)\n"
    )
    monkeypatch.syspath_prepend(str(site))
    import_module("warning_package").old()
    assert [(shown.text, shown.package, shown.version) for shown in kept(stage)] == [("old", "warning_package", "")]


def test_what_cannot_be_kept_stops_nobody(stage: Path) -> None:
    stage.rmdir()
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn("baked in", stacklevel=1)
    shown_warnings.keep(caught[0])
    warnings.warn("shown", stacklevel=1)


def test_what_is_marked_deprecated_is_its_owners_and_yours_is_yours(stage: Path) -> None:
    def old() -> None:
        """A function of a library."""

    old.__module__ = "torch.ao"
    typing_extensions.deprecated("take the new one", category=FutureWarning)(old)()
    warnings.warn("of my own\nover two lines", DeprecationWarning, stacklevel=1)
    platform_old = typing_extensions.deprecated("gone")(lambda: None)
    platform_old.__wrapped__.__module__ = "json.decoder"
    platform_old()
    found = {shown.text: (shown.package, shown.version) for shown in kept(stage)}
    assert found == {
        "take the new one": ("torch", torch.__version__),
        "of my own over two lines": ("", ""),
        "gone": ("python", platform.python_version()),
    }


def test_a_warning_that_became_a_reason_is_kept_too(stage: Path) -> None:
    from torch.jit import TracerWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.warn("Converting a tensor to a Python boolean", TracerWarning, stacklevel=1)
    assert kept(stage) == []
    shown_warnings.keep(caught[0])
    assert [(shown.package, shown.category) for shown in kept(stage)] == [("torch", "TracerWarning")]


def test_many_different_texts_end_and_a_folder_that_is_gone_is_no_matter(
    stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(shown_warnings.MOST + 50):
        warnings.warn(f"loss {number}: {'x' * 600}", stacklevel=1)
    assert len(kept(stage)) == shown_warnings.MOST
    monkeypatch.setattr(shown_warnings, "_file", stage / "gone" / WARNINGS)
    shown_warnings._seen.clear()
    warnings.warn("still said", stacklevel=1)


def test_the_report_says_each_once_with_its_stages(stage: Path) -> None:
    warnings.warn("a <b>deprecated</b> call", FutureWarning, stacklevel=1)
    export = stage.parent / "export"
    export.mkdir()
    written = (stage / WARNINGS).read_text()
    # A process that was killed leaves a part of a line.
    (export / WARNINGS).write_text(written + written[:20])
    page = page_of(run_files(warnings=read_warnings(stage.parent)))
    found = checked(html(page))
    assert "Warnings" in found.headings and "FutureWarning: a <b>deprecated</b> call" in found.text
    assert "train, export" in found.text and "your code" in found.text
    assert markdown(page).count("FutureWarning") == 1
    assert "Warnings" not in checked(html(page_of(run_files()))).headings
