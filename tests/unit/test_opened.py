"""Which files of the user's code are seen to be read, by Python and natively."""

from __future__ import annotations

import itertools
import os
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from torchworker.contract import OpenedFile, Project, Reference
from torchworker.project import user_code
from torchworker.project.opened import Opened

NAMES = itertools.count()
DATA = """
    class Lines(torch.utils.data.Dataset):
        def __len__(self): return 3
        def __getitem__(self, index):
            value = float((HERE / "rows.csv").read_text().split()[index])
            return torch.tensor([value]), torch.tensor([value])
    def build_dataset(split):
        from safetensors import safe_open
        (HERE / "splits.txt").read_text()
        if (HERE / "data.safetensors").exists():
            with safe_open(HERE / "data.safetensors", "pt") as file:
                file.keys()
        return Lines()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a project; `elsewhere` lies beside it."""
    project = tmp_path / "project"
    for part in (project / "weights", tmp_path / "elsewhere"):
        part.mkdir(parents=True)
    return project


def reference(module: str, name: str) -> Reference:
    return Reference(target=f"{module}:{name}", where="model.factory")


def project_in(folder: Path, code: str) -> Project:
    module = f"opens{next(NAMES)}"
    start = "import json, os, torch\nfrom pathlib import Path\nfrom torch import nn\nHERE = Path(__file__).parent\n"
    (folder / f"{module}.py").write_text(start + textwrap.dedent(code) + textwrap.dedent(DATA))
    return Project(
        name="opens", folder=str(folder), model=reference(module, "build_model"),
        data=reference(module, "build_dataset"), loss="mse_loss", metrics=(),
    )  # fmt: skip


def seen(project: Project, **how: bool) -> dict[str, OpenedFile]:
    """By path from the project, after the model was built and all data read; without the code itself."""
    opened = Opened(project, **how)
    user_code.enter(project)
    user_code.build_model(project)
    list(DataLoader(user_code.build_dataset(project, "train")))
    user_code.resolve(project.model, project)
    files, _ = opened.close()
    found = {os.path.relpath(file.path, project.folder): file for file in files}
    return {name: file for name, file in found.items() if not name.endswith(".py")}


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text("1\n2\n3\n")


def test_what_the_factory_and_its_imports_read_is_seen_and_what_the_data_reads_is_not(folder: Path) -> None:
    write(folder, "config.yaml", "rows.csv", "splits.txt", "unrelated.json", "weights/vocabulary.txt")
    torch.save({"weight": torch.zeros(1)}, folder / "weights" / "pretrained.pt")
    code = """
        CONFIG = (HERE / "config.yaml").read_text()
        def build_model():
            (HERE / "weights" / "vocabulary.txt").read_text()
            torch.load(HERE / "weights" / "pretrained.pt")
            os.stat(HERE / "unrelated.json")
            return nn.Linear(1, 1)
    """
    found = seen(project_in(folder, code))
    assert set(found) == {"config.yaml", "weights/vocabulary.txt", "weights/pretrained.pt"}
    about = (folder / "config.yaml").stat()
    assert tuple(found["config.yaml"].identity) == (about.st_ino, 6, about.st_mtime_ns, about.st_ctime_ns)
    assert not any(file.native for file in found.values())


def test_what_a_library_opens_natively_is_seen_by_the_watch_alone(folder: Path) -> None:
    write(folder, "rows.csv", "splits.txt")
    for name in ("weights/pretrained", "data"):
        save_file({"weight": torch.zeros(1)}, folder / f"{name}.safetensors")
    linked = folder.with_name("elsewhere") / "linked.safetensors"
    save_file({"weight": torch.zeros(1)}, linked)
    (folder / "link.safetensors").symlink_to(linked)
    code = """
        from safetensors import safe_open
        def build_model():
            for name in ("weights/pretrained.safetensors", "link.safetensors"):
                with safe_open(HERE / name, "pt") as file:
                    file.get_tensor("weight")
            return nn.Linear(1, 1)
    """
    found = seen(project_in(folder, code))
    assert set(found) == {"weights/pretrained.safetensors", "link.safetensors"}
    assert all(file.native for file in found.values())
    # What the export asks, to know what another process has opened by chance.
    again = seen(project_in(folder, code), python=False)
    assert set(found) <= set(again) and "data.safetensors" not in again


def test_what_the_code_writes_itself_is_not_read(folder: Path) -> None:
    write(folder, "rows.csv", "splits.txt", "read_and_written.json")
    code = """
        def build_model():
            (HERE / "log.txt").write_text("built")
            (HERE / "made.json").write_text("{}")
            json.loads((HERE / "made.json").read_text())
            (HERE / "read_and_written.json").read_text()
            (HERE / "read_and_written.json").write_text("of another size")
            return nn.Linear(1, 1)
    """
    found = seen(project_in(folder, code))
    assert set(found) == {"read_and_written.json"}
    assert found["read_and_written.json"].identity[1] == len("of another size")


def test_what_is_looked_for_in_vain_is_seen(folder: Path) -> None:
    write(folder, "rows.csv", "splits.txt")
    code = """
        def build_model():
            try:
                (HERE / "local.json").read_text()
            except FileNotFoundError:
                pass
            return nn.Linear(1, 1)
    """
    assert seen(project_in(folder, code)) == {"local.json": OpenedFile(path=str(folder / "local.json"))}


def test_files_elsewhere_count_and_those_of_tools_and_the_machine_do_not(folder: Path, tmp_path: Path) -> None:
    write(folder, "rows.csv", "splits.txt")
    write(folder.with_name("elsewhere"), "shared.json", "helping.py")
    for hidden in (folder / ".git", folder / "__pycache__", tmp_path / "elsewhere" / ".cache"):
        hidden.mkdir(exist_ok=True)
        write(hidden, "file.json")
    code = """
        import sys, tempfile
        def build_model():
            for name in ("shared.json", "helping.py", ".cache/file.json"):
                (HERE.parent / "elsewhere" / name).read_text()
            for name in (".git/file.json", "__pycache__/file.json", "/etc/passwd", "/proc/self/stat", nn.__file__):
                (HERE / name).read_bytes()
            with tempfile.NamedTemporaryFile("w") as file:
                Path(file.name).read_text()
            return nn.Linear(1, 1)
    """
    opened = Opened(project := project_in(folder, code))
    user_code.enter(project)
    user_code.build_model(project)
    files, _ = opened.close()
    elsewhere = folder.with_name("elsewhere")
    names = {Path(file.path) for file in files if file.path != f"{folder}/{project.model.target.partition(':')[0]}.py"}
    assert names == {elsewhere / "shared.json", elsewhere / "helping.py"}


def test_a_snapshot_of_data_and_the_folder_of_the_run_are_left_out(folder: Path) -> None:
    write(folder, "rows.csv", "splits.txt", "weights/in_the_snapshot.txt")
    (folder / "run").mkdir()
    write(folder, "run/request.json")
    code = """
        def build_model():
            (HERE / "weights/in_the_snapshot.txt").read_text()
            (HERE / "run/request.json").read_text()
            return nn.Linear(1, 1)
    """
    project = project_in(folder, code)
    project = Project(**{**vars(project), "snapshot": str(folder / "weights")})
    opened = Opened(project, [str(folder / "run")])
    user_code.enter(project)
    user_code.build_model(project)
    files, _ = opened.close()
    assert [Path(file.path).suffix for file in files] == [".py"]


def test_a_folder_whose_content_is_asked_for_is_told(folder: Path) -> None:
    write(folder, "rows.csv", "splits.txt", "weights/a.txt")
    code = """
        def build_model():
            for path in sorted((HERE / "weights").glob("*.txt")):
                path.read_text()
            return nn.Linear(1, 1)
    """
    opened = Opened(project := project_in(folder, code))
    user_code.enter(project)
    user_code.build_model(project)
    assert opened.close()[1] == [str(folder / "weights")]
