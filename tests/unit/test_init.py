"""`ship init`: what it makes of a repository, what it asks, and what it refuses before it writes anything."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import textwrap
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from train_and_ship.infra.errors import JobError, RequestError
from train_and_ship.registry.job.load import job_schema, load_job
from train_and_ship.ship.candidates import find_candidates
from train_and_ship.ship.init import EXAMPLES, KINDS, Wanted, init, init_example
from train_and_ship.ship.main import app

NET = """
from torch import nn
class Block(nn.Module):
    def forward(self, x):
        return x
class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.block = Block()
"""
DATA = """
from torch.utils.data import Dataset, TensorDataset
def read(split):
    return split
def build_dataset(split) -> TensorDataset:
    return TensorDataset(read(split))
"""
WRITTEN = {"job.yaml", "job.schema.json", ".gitignore", ".github/workflows/ship.yaml"}


def repository(folder: Path, **files: str) -> Path:
    """A git repository with these files; two underscores are a slash."""
    (folder / ".git").mkdir(parents=True)
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return folder


def files_in(folder: Path) -> set[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if path.parts[0] != ".git"}


def job_in(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((folder / "job.yaml").read_text())
    return document


def refused(folder: Path, ask: Any = None, **wanted: Any) -> str:
    """What is said; nothing is written."""
    before = files_in(folder) if folder.is_dir() else set()
    with pytest.raises(RequestError) as caught:
        init(folder, Wanted(**wanted), ask)
    assert (files_in(folder) if folder.is_dir() else set()) == before
    return str(caught.value)


# ---- what is made


def test_a_tidy_project_gets_a_job_its_schema_an_entry_of_gitignore_and_a_workflow(tmp_path: Path) -> None:
    folder = repository(tmp_path / "Web Shop", shop__net=NET, shop__data=DATA)
    (folder / ".gitignore").write_text("*.ckpt")
    init(folder, Wanted(), None)
    assert files_in(folder) == WRITTEN | {"shop/net.py", "shop/data.py"}
    job, project = load_job(folder / "job.yaml")
    assert (job.name, job.model.factory, job.data.factory) == ("web-shop", "shop.net:Net", "shop.data:build_dataset")
    assert project == folder and (job.retrain.cron, job.retrain.timezone) == ("0 2 * * *", "UTC")
    assert (folder / "job.yaml").read_text().startswith("# yaml-language-server: $schema=job.schema.json\n")
    assert json.loads((folder / "job.schema.json").read_text()) == job_schema()
    assert (folder / ".gitignore").read_text() == "*.ckpt\n.ship/\n"
    (check,) = yaml.safe_load((folder / ".github/workflows/ship.yaml").read_text())["jobs"].values()
    assert check["steps"][-1] == {"run": "ship check job.yaml"} and "defaults" not in check


def test_code_below_src_is_imported_from_there_and_the_name_is_the_projects(tmp_path: Path) -> None:
    folder = repository(tmp_path / "x", src__shop__net=NET, src__shop__data=DATA, scripts__plot="import torch")
    (folder / "pyproject.toml").write_text('[project]\nname = "Shop.Models"\n')
    init(folder, Wanted(), None)
    job, project = load_job(folder / "job.yaml")
    assert (job.name, job.model.factory, project) == ("shop.models", "shop.net:Net", folder / "src")
    assert ".venv/bin/python -m pip install .\n" in (folder / ".github/workflows/ship.yaml").read_text()
    assert "pip install ${SHIP_WHEELS:?" in (folder / ".github/workflows/ship.yaml").read_text(), (
        "three words, if need be"
    )


def test_a_project_in_a_folder_of_a_repository_is_checked_in_its_folder(tmp_path: Path) -> None:
    folder = repository(tmp_path, models__a__net=NET + DATA) / "models" / "a"
    init(folder, Wanted(name="a"), None)
    assert files_in(folder) == (WRITTEN - {".github/workflows/ship.yaml"}) | {"net.py"}
    (check,) = yaml.safe_load((tmp_path / ".github/workflows/ship.yaml").read_text())["jobs"].values()
    assert check["defaults"] == {"run": {"working-directory": "models/a"}}


def test_a_function_that_makes_the_model_is_preferred_to_what_it_makes_however_that_is_imported(
    tmp_path: Path,
) -> None:
    factory = "from shop import Net\ndef build(depth: int, *, wide=False) -> Net:\n    return Net()\n"
    folder = repository(tmp_path, shop__net=NET, make=factory, data=DATA)
    (folder / "shop" / "__init__.py").write_text("from .net import Net")
    (model,) = find_candidates(folder).models
    assert (model.reference, model.place, model.needs) == ("make:build", "make.py:2", ("depth",))


def test_no_code_of_the_project_is_run(tmp_path: Path) -> None:
    folder = repository(tmp_path, net=NET + DATA + "raise SystemExit('imported')\n")
    init(folder, Wanted(), None)
    assert job_in(folder)["model"] == {"factory": "net:Net"}


@pytest.mark.parametrize(
    ("source", "loss", "gates"),
    [
        ("nn.MSELoss()", "mse_loss", None),
        ("F.cross_entropy", "cross_entropy", {"accuracy": {"vs_live": -0.01}}),
        ("nn.MSELoss(), nn.L1Loss()", "cross_entropy", {"accuracy": {"vs_live": -0.01}}),
    ],
)
def test_the_only_loss_that_the_sources_name_is_the_jobs(tmp_path: Path, source: str, loss: str, gates: Any) -> None:
    folder = repository(tmp_path, net=NET + DATA + f"chosen = lambda: ({source})\n")
    init(folder, Wanted(), None)
    assert job_in(folder)["train"]["loss"] == loss and job_in(folder).get("gates") == gates
    load_job(folder / "job.yaml")


def test_what_is_no_python_of_today_is_named_and_the_rest_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = "x = " + "(" * 5000 + ")" * 5000
    folder = repository(tmp_path, net=NET, data=DATA, old="print 'x'", deep=deep, half="a = '\\d'\n")
    (folder / "null.py").write_bytes(b"a = 1\0")
    (folder / "link.py").symlink_to("nowhere.py")
    (folder / "round.py").write_text("from round import A as B\nfrom round import B as A\nclass C(A): pass\n")
    init(folder, Wanted(), None)
    said = capsys.readouterr()
    named = [line.split(":")[1].strip() for line in said.err.splitlines()]
    assert named == ["deep.py", "null.py", "old.py"]


# ---- what is asked


def test_a_person_is_asked_for_what_the_sources_leave_open(tmp_path: Path) -> None:
    other = "from torch import nn\nclass Big(nn.Module):\n    def __init__(self, depth): ...\n"
    folder = repository(tmp_path, net=NET, data=DATA, big=other)
    asked: list[str] = []

    def ask(question: str, choices: Sequence[str], default: str) -> str:
        asked.append(question)
        return next((choice for choice in choices if "Big" in choice), {"Name of the model": "mine"}.get(question, "4"))

    init(folder, Wanted(), ask)
    assert [question.split()[0] for question in asked] == ["Which", "Name", "big:Big:"]
    assert job_in(folder)["name"] == "mine"
    assert job_in(folder)["model"] == {"factory": "big:Big", "args": {"depth": 4}}


def test_options_decide_and_other_keys_are_set_with_them(tmp_path: Path) -> None:
    other = "from torch import nn\nclass Big(nn.Module):\n    def __init__(self, depth): ...\n"
    folder = repository(tmp_path, net=NET, data=DATA, big=other)
    words = ["--model", "big:Big", "--data", "data:build_dataset", "--name", "mine", "--set", "model.args.depth=2"]
    shown = CliRunner().invoke(app, ["init", str(folder), *words, "--set", "train.epochs=3"])
    assert shown.exit_code == 0, shown.output
    assert "model    big:Big  big.py:2" in shown.output and "ship check" in shown.output
    job, _ = load_job(folder / "job.yaml")
    assert (job.name, job.model.args, job.train.epochs) == ("mine", {"depth": 2}, 3)


# ---- what is refused


def test_without_a_terminal_two_models_are_both_named(tmp_path: Path) -> None:
    folder = repository(tmp_path, net=NET, data=DATA, other=NET.replace("Net", "Other").replace("Block", "Part"))
    said = refused(folder)
    assert "found 2; say which:\n  --model net:Net  net.py:6\n  --model other:Other  other.py:6" in said


def test_parameters_without_a_default_are_named_with_how_to_give_them(tmp_path: Path) -> None:
    folder = repository(tmp_path, net=NET.replace("width=8", "width, *, depth"), data=DATA)
    said = refused(folder)
    assert "--set model.args.width=…   for net:Net  net.py:6\n  --set model.args.depth=…" in said


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"data": DATA}, "expected a torch.nn.Module, or a function that makes one"),
        ({"net": NET}, 'expected a dataset that can be called with split="train"'),
        (
            {"net": NET, "data": "from torch.utils.data import Dataset\nclass Images(Dataset):\n    pass\n"},
            "data:Images  data.py:2 takes no split. Write a function that makes both",
        ),
        ({"src__net": NET, "data": DATA}, "below one folder of the import path, got net:Net  src/net.py:6 in src"),
        ({"tests__test_net": NET + DATA}, "expected a torch.nn.Module"),
    ],
)
def test_a_project_without_what_a_job_needs_says_what_that_is(
    tmp_path: Path, files: dict[str, str], expected: str
) -> None:
    assert expected in refused(repository(tmp_path, **files))


def test_a_notebook_alone_is_no_code_that_a_job_can_import(tmp_path: Path) -> None:
    folder = repository(tmp_path)
    (folder / "train.ipynb").write_text("{}")
    assert "found notebooks alone (train.ipynb)" in refused(folder)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("model", "Net", "--model: expected module:attribute"),
        (
            "model",
            "net:Nett",
            "--model net:Nett: expected a name of net, found none such; there are net:Block, net:Net",
        ),
        ("data", "net:missing", "--data net:missing: expected a name of net"),
    ],
)
def test_what_an_option_names_has_to_be_there(tmp_path: Path, option: str, value: str, expected: str) -> None:
    assert expected in refused(repository(tmp_path, net=NET, data=DATA), **{option: value})


def test_a_name_that_no_model_can_have_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = repository(tmp_path, net=NET, data=DATA)
    with pytest.raises(JobError, match=r"job\.yaml:3: name: expected lower-case letters"):
        init(folder, Wanted(name="My Model"), None)
    with pytest.raises(JobError, match=r"train\.epochs: expected"):
        init(folder, Wanted(changes=["train.epochs=many"]), None)
    assert files_in(folder) == {"net.py", "data.py"}


def test_a_folder_that_is_no_repository_or_is_none_is_refused(tmp_path: Path) -> None:
    assert "expected a folder of a git repository" in refused(tmp_path)
    assert f"`mkdir {tmp_path / 'new'}` makes it" in refused(tmp_path / "new")
    (tmp_path / "file").write_text("")
    assert "expected a folder, got a file" in refused(tmp_path / "file")
    with pytest.raises(RequestError, match="expected a folder, found nothing"):
        init_example(tmp_path / "new", "digits")


def test_files_that_are_there_are_all_named_and_nothing_is_written(tmp_path: Path) -> None:
    folder = repository(tmp_path, net=NET, data=DATA)
    (folder / "job.yaml").write_text("mine")
    (folder / "job.schema.json").symlink_to("nowhere")
    said = refused(folder)
    assert "job.yaml" in said and "job.schema.json already; nothing was written" in said
    with pytest.raises(RequestError, match=r"customers\.py.*job\.yaml.* already"):
        (folder / "customers.py").write_text("mine")
        init_example(folder, "tabular")
    assert (folder / "job.yaml").read_text() == "mine" and not (folder / ".gitignore").exists()


def test_what_was_written_before_a_place_that_cannot_be_written_is_taken_back(tmp_path: Path) -> None:
    folder = repository(tmp_path, net=NET, data=DATA)
    (folder / ".github").write_text("a file")
    assert "expected a place that can be written, got" in refused(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_a_folder_of_somebody_else_is_refused() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = repository(Path(name) / "theirs", net=NET, data=DATA)
        Path(name).chmod(0o755)
        os.seteuid(65534)
        try:
            assert "expected a place that can be written, got Permission denied; nothing was left" in refused(folder)
            os.seteuid(0)
            folder.chmod(0o700)
            os.seteuid(65534)
            with pytest.raises(RequestError, match="expected a folder that can be read, got Permission denied"):
                init(folder, Wanted(), None)
        finally:
            os.seteuid(0)


def bare_environment(folder: Path) -> Path:
    """An environment without torch."""
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin" / "python"


def test_the_projects_own_environment_needs_no_key_and_what_it_lacks_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = repository(tmp_path, net=NET, data=DATA)
    (folder / "requirements.txt").write_text("torch")
    python = bare_environment(folder / ".venv")
    init(folder, Wanted(), None)
    assert f"`ship worker install --python {python}` puts it there" in capsys.readouterr().out
    assert "python" not in job_in(folder)
    (check,) = yaml.safe_load((folder / ".github/workflows/ship.yaml").read_text())["jobs"].values()
    made, checked = check["steps"][-2:]
    assert made["run"].splitlines() == [
        "python -m venv .venv", ".venv/bin/python -m pip install -r requirements.txt", "ship worker install",
    ]  # fmt: skip
    assert checked == {"run": "ship check job.yaml"}


def test_the_environment_that_is_activated_is_offered_and_never_taken_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = bare_environment(tmp_path / "env")
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "env"))
    folder = repository(tmp_path / "unasked", net=NET, data=DATA)
    init(folder, Wanted(), None)
    assert "python" not in job_in(folder) and f"--set python={python} would write it" in capsys.readouterr().out
    for answer, expected in (("yes", str(python)), ("no", None)):
        folder = repository(tmp_path / answer, net=NET, data=DATA)
        (folder / "requirements.txt").write_text("torch")
        init(folder, Wanted(name="x"), lambda question, choices, default, answer=answer: answer)
        assert job_in(folder).get("python") == expected
        other = " --set python=.venv/bin/python" if expected else ""
        assert f"run: ship check job.yaml{other}\n" in (folder / ".github/workflows/ship.yaml").read_text()
    assert "cannot run the code of the job: it has no torch" in capsys.readouterr().out


# ---- examples


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_is_written_anywhere_with_what_a_project_gets(tmp_path: Path, kind: str) -> None:
    tmp_path = tmp_path / "My shop"
    tmp_path.mkdir()
    init_example(tmp_path, kind)
    own = {path.name for path in (EXAMPLES / kind).iterdir() if path.is_file()}
    assert files_in(tmp_path) == own | WRITTEN
    job, project = load_job(tmp_path / "job.yaml")
    # Not the clone's, which may be on the same stack.
    assert job.name == "my-shop"
    assert project == tmp_path and (project / f"{job.model.factory.partition(':')[0]}.py").is_file()
    # Of itself it would make the same choice of a model.
    shutil.rmtree(tmp_path / ".github")
    (model,) = find_candidates(tmp_path).models
    assert model.reference == job.model.factory


def test_another_example_or_one_with_options_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--example: expected one of digits, tabular, text, got 'images'"):
        init_example(tmp_path, "images")
    shown = CliRunner().invoke(app, ["init", str(tmp_path), "--example", "text", "--name", "mine"])
    assert isinstance(shown.exception, RequestError) and files_in(tmp_path) == set()
