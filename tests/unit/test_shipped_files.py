"""Files that a job ships beside its model: which are taken, where they lie, and what is refused before training."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from shipreader.errors import ReaderError
from shipreader.records import FileEntry, Manifest, Release
from tests.support.projects import write_project
from torchworker.contract import EXTRAS, Project, Reference
from torchworker.process.failure import UserError
from torchworker.project.extras import require_extras, write_extras
from torchworker.project.first_batch import try_batch
from torchworker.project.user_code import enter
from train_and_ship.infra.errors import JobError
from train_and_ship.infra.file_hashes import FileHashes
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.job.load import load_job
from train_and_ship.registry.made_of import differences, files_now, files_of
from train_and_ship.registry.release.manifest import build_manifest
from train_and_ship.registry.release.shipped import MOST, project_files, together, written_files
from train_and_ship.ship.check import check
from train_and_ship.tasks.register import _hashes, _sizes
from train_and_ship.tasks.requests import project_of, user_modules
from train_and_ship.tasks.shipped import add_files, files_digest


def write(folder: Path, **texts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = write(tmp_path / "project", labels_json='["cat", "dog"]')
    write(folder / "tokenizer" / "merges", vocab_txt="a\nb\n")
    write(folder / "tokenizer", tokenizer_json="{}")
    return folder


def job_of(folder: Path, **export: object) -> Job:
    return load_job(write_project(folder, export=export))[0]


def refused(project: Path, *names: str) -> str:
    with pytest.raises(JobError) as caught:
        project_files(project, names, "plain")
    return str(caught.value).replace(str(project), "PROJECT")


def test_files_and_folders_keep_their_paths(project: Path) -> None:
    job = job_of(project, files=["tokenizer/", "labels.json"])
    assert job.export.files == ("tokenizer", "labels.json")
    assert project_files(project, job.export.files, "plain") == {
        "labels.json": project / "labels.json",
        "tokenizer/merges/vocab.txt": project / "tokenizer/merges/vocab.txt",
        "tokenizer/tokenizer.json": project / "tokenizer/tokenizer.json",
    }


def test_a_file_that_git_ignores_is_shipped(project: Path) -> None:
    write(project, _gitignore="labels.json\n")
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    assert subprocess.run(["git", "check-ignore", "labels.json"], cwd=project, capture_output=True).returncode == 0
    assert list(project_files(project, ["labels.json"], "plain")) == ["labels.json"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["../labels.json"], "expected a file or folder of the project, such as tokenizer/ or data/labels.json"),
        (["tokenizer/../labels.json"], "no . or .. among them"),
        (["/etc/hosts"], "a relative path"),
        (["."], "a relative path"),
        (["./labels.json"], "a relative path"),
        ([""], "a relative path"),
        (["a\\b"], "a relative path"),
        (["tokenizer", "labels.json", "tokenizer/merges"], "tokenizer/merges is in tokenizer"),
        (["labels.json", "labels.json"], "each file once in files, and labels.json is in labels.json"),
        (["tokenizer/", "tokenizer"], "tokenizer is in tokenizer"),
    ],
)
def test_names_that_leave_the_project_or_stand_twice_are_refused_with_the_job_file(
    project: Path, names: list[str], said: str
) -> None:
    with pytest.raises(JobError, match=r"job\.yaml:\d+: export") as caught:
        job_of(project, files=names)
    assert said in str(caught.value)


def test_what_is_not_there_and_what_is_empty_is_named(project: Path) -> None:
    assert refused(project, "vocab.txt") == (
        "plain: export.files: expected a file or folder PROJECT/vocab.txt, found none"
    )
    (project / "tokenizer" / "extra").mkdir()
    assert "expected files in the folder PROJECT/tokenizer/extra, which is empty" in refused(project, "tokenizer")


def test_links_are_refused_wherever_they_stand(project: Path, tmp_path: Path) -> None:
    secret = write(tmp_path / "home", id_rsa="secret")
    (project / "key").symlink_to(secret / "id.rsa")
    assert "expected files, got the link PROJECT/key" in refused(project, "key")
    (project / "home").symlink_to(secret)
    assert "got the link PROJECT/home" in refused(project, "home")
    # On the way to a file, and inside a folder.
    assert "got the link PROJECT/home" in refused(project, "home/id.rsa")
    (project / "tokenizer" / "merges" / "more").symlink_to(project / "labels.json")
    assert "got the link PROJECT/tokenizer/merges/more" in refused(project, "tokenizer")
    (project / "nowhere").symlink_to(project / "nothing")
    assert "got the link PROJECT/nowhere" in refused(project, "nowhere")


def test_a_pipe_is_refused_and_not_read(project: Path) -> None:
    os.mkfifo(project / "tokenizer" / "pipe")
    assert "expected a regular file, got the special file PROJECT/tokenizer/pipe" in refused(project, "tokenizer")


def test_there_is_a_limit_to_how_many_files_are_shipped(project: Path) -> None:
    for number in range(MOST):
        (project / "tokenizer" / f"{number}.txt").touch()
    said = refused(project, "tokenizer")
    assert "expected at most 1,000 files, got more" in said and "put them into one archive" in said
    # Also of those that are written.
    one, rest = {"a": project}, {str(number): project for number in range(MOST)}
    assert len(together({}, rest, "plain")) == MOST
    with pytest.raises(JobError, match=r"export\.files and export\.extras: expected at most 1,000 files, got 1,001"):
        together(one, rest, "plain")


@pytest.mark.parametrize("name", ["model.onnx", "model.int8-static.onnx", "job.json", "weights.safetensors"])
def test_a_name_of_an_artifact_or_a_record_is_refused_at_the_top_and_taken_in_a_folder(
    project: Path, name: str
) -> None:
    (project / name).write_text("mine")
    assert f"expected another name than that of a file that every release has, {name}" in refused(project, name)
    (project / name).rename(project / "tokenizer" / name)
    assert f"tokenizer/{name}" in project_files(project, ["tokenizer"], "plain")


def test_the_manifest_has_its_name_alone(project: Path) -> None:
    write(project, MANIFEST_json="{}")
    assert "that every release has, MANIFEST.json" in refused(project, "MANIFEST.json")


def test_pickles_are_refused_by_name_and_by_content(project: Path) -> None:
    (project / "tokenizer" / "vocab.pkl").write_text("not even one")
    assert "PROJECT/tokenizer/vocab.pkl: expected no pickle in a release, got one (it ends so)" in refused(
        project, "tokenizer"
    )
    (project / "vocab.txt").write_bytes(pickle.dumps({"a": 1}))
    said = refused(project, "vocab.txt")
    assert (
        "expected no pickle in a release, got one (it is a pickle)" in said and "save tensors as .safetensors" in said
    )
    torch.save({"a": torch.zeros(2)}, project / "table.bin")
    assert "data.pkl in it is a pickle" in refused(project, "table.bin")


@pytest.mark.parametrize("name", [b"a#b", b"50%", b"why?", b"a\nb", b"\xff", b"x" * 241])
def test_names_that_are_no_keys_or_addresses_are_refused_on_one_line(project: Path, name: bytes) -> None:
    (Path(os.fsdecode(os.path.join(os.fsencode(project / "tokenizer"), name)))).touch()  # noqa: PTH118
    said = refused(project, "tokenizer")
    assert "expected a name of printable letters" in said and "\n" not in said
    said.encode()


def test_names_in_other_alphabets_and_with_spaces_are_taken(project: Path) -> None:
    (project / "tokenizer" / "словарь 1.txt").touch()
    assert "tokenizer/словарь 1.txt" in project_files(project, ["tokenizer"], "plain")


def test_check_refuses_before_anything_is_built(tmp_path: Path) -> None:
    job = write_project(tmp_path, code="raise SystemExit('imported')", export={"files": ["vocab.txt"]})
    with pytest.raises(JobError, match=r"export\.files: expected a file or folder .*vocab\.txt, found none"):
        check(job)


# ---- what a function writes

EXTRA = """
import json

def only_folder(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "ids.json").write_text("[1]")

def with_model(folder, *, model):
    (folder / "parts.json").write_text(json.dumps(sorted(model.state_dict())))

def fails(folder):
    raise KeyError("tokenizer")

def leaves(folder):
    raise SystemExit(0)

def takes_nothing():
    pass

def wants_more(folder, vocabulary):
    pass

def model_first(model):
    pass

number = 7
"""


@pytest.fixture
def extras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Project]:
    write(tmp_path / "code")
    (tmp_path / "code" / "extra_writers.py").write_text(EXTRA)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.delitem(sys.modules, "extra_writers", raising=False)

    def of(function: str) -> Project:
        nothing = Reference(target="a:b", where="model.factory")
        writer = Reference(target=f"extra_writers:{function}", where="export.extras")
        project = Project(
            name="plain", folder=str(tmp_path / "code"), model=nothing, data=nothing, loss="mse_loss", metrics=[],
            extras=writer,
        )  # fmt: skip
        enter(project)
        return project

    return of


def test_a_function_writes_into_its_folder_and_has_the_model_if_it_asks_for_it(
    extras: Callable[[str], Project], tmp_path: Path
) -> None:
    model = nn.Linear(2, 1)
    write_extras(extras("only_folder"), model, tmp_path / "one")
    assert (tmp_path / "one" / "sub" / "ids.json").read_text() == "[1]"
    write_extras(extras("with_model"), model, tmp_path / "two")
    assert json.loads((tmp_path / "two" / "parts.json").read_text()) == ["bias", "weight"]
    plain = Project(
        name="plain", folder="", model=extras("fails").model, data=extras("fails").data, loss="mse_loss", metrics=[]
    )
    write_extras(plain, model, tmp_path / "three")
    assert not (tmp_path / "three").exists()


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (
            "takes_nothing",
            r"export\.extras: extra_writers:takes_nothing is called as takes_nothing\(folder\), but takes",
        ),
        ("wants_more", r"wants_more\(folder\), but takes \(folder, vocabulary\): missing a required argument"),
        ("model_first", r"model_first\(folder, model=…\), but takes \(model\): multiple values"),
        ("number", r"expected something callable, got int"),
        ("absent", r"has no 'absent'; it has:"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_before_training(
    extras: Callable[[str], Project], function: str, said: str
) -> None:
    project = extras(function)
    with pytest.raises(UserError, match=said):
        require_extras(project)
    # As every rank and `ship check` ask.
    inputs = torch.randn(4, 2)
    with pytest.raises(UserError, match=said):
        try_batch(nn.Linear(2, 1).eval(), None, (inputs, torch.zeros(4, 1)), project, ["onnx"])


@pytest.mark.parametrize(("function", "said"), [("fails", "KeyError: 'tokenizer'"), ("leaves", "SystemExit")])
def test_a_function_that_fails_is_named_with_its_line(
    extras: Callable[[str], Project], tmp_path: Path, function: str, said: str
) -> None:
    with pytest.raises(UserError, match=rf"extra_writers:{function}\(folder\) failed: {said}.*extra_writers\.py:\d+"):
        write_extras(extras(function), nn.Linear(2, 1), tmp_path / "folder")


def test_what_was_written_is_held_to_the_same_rules(tmp_path: Path, project: Path) -> None:
    folder = tmp_path / "written"
    folder.mkdir()

    def told() -> str:
        with pytest.raises(JobError) as caught:
            written_files(folder, "plain")
        return str(caught.value)

    assert "plain: export.extras: expected it to write files into the folder that it is given, got none" in told()
    (folder / "link").symlink_to(project / "labels.json")
    assert "got the link" in told()
    (folder / "link").unlink()
    (folder / "empty").mkdir()
    assert "which is empty" in told()
    (folder / "empty").rmdir()
    (folder / "ids").write_bytes(pickle.dumps([1]))
    assert "expected no pickle" in told()
    (folder / "ids").write_text("[1]")
    assert written_files(folder, "plain") == {"ids": folder / "ids"}
    (folder / "ids").rename(tmp_path / "ids")
    folder.rmdir()
    assert "got none" in told()
    folder.symlink_to(project)
    assert "got the link" in told()
    folder.unlink()
    folder.write_text("a file")
    assert "got none" in told()


@pytest.mark.parametrize("name", ["labels.json", "tokenizer", "labels.json/part"])
def test_a_function_does_not_write_over_files_of_the_project(project: Path, name: str) -> None:
    mine = project_files(project, ["tokenizer", "labels.json"], "plain")
    with pytest.raises(JobError, match=rf"export\.extras wrote {name}, and export\.files has"):
        together(mine, {name: project}, "plain")
    assert "tokenizer/ids" in together(mine, {"tokenizer/ids": project}, "plain")


# ---- where they go


def exported(job: Job, project: Path, folder: Path) -> Path:
    """The folder of an export whose function has written one file."""
    write(folder / EXTRAS, ids_json="[1]")
    (folder / "model.onnx").write_bytes(b"onnx")
    add_files(job, project, folder)
    return folder


def test_a_release_has_them_below_files_and_a_reader_finds_them_by_name(project: Path, tmp_path: Path) -> None:
    job = job_of(project, files=["tokenizer", "labels.json"], extras="plain:write")
    folder = exported(job, project, tmp_path / "export")
    assert (project / "labels.json").exists() and not (folder / EXTRAS).exists()
    made = build_manifest(folder, model="plain", formats={"onnx": "model.onnx"}, signature={}, metrics={})
    names = ["ids.json", "labels.json", "tokenizer/merges/vocab.txt", "tokenizer/tokenizer.json"]
    assert list(made.files) == [*(f"files/{name}" for name in names), "model.onnx"]
    assert made.files["files/labels.json"] == FileEntry.of(project / "labels.json")

    manifest = Manifest("plain", made.release, made.files, made.formats, {}, {}, made.encode())
    release = Release("prod", 1, folder, manifest, "")
    assert release.file("tokenizer") == release.file("tokenizer/") == folder / "files" / "tokenizer"
    assert release.file("labels.json").read_text() == '["cat", "dog"]'
    for name in ("token", "model.onnx", "..", "", "/"):
        with pytest.raises(ReaderError, match=r"expected one of its files \(ids\.json, labels\.json, tokenizer\); got"):
            release.file(name)


def test_mlflow_gets_one_hash_and_one_line_for_all_of_them(project: Path, tmp_path: Path) -> None:
    job = job_of(project, files=["tokenizer", "labels.json"], extras="plain:write")
    folder = exported(job, project, tmp_path / "export")
    made = build_manifest(folder, model="plain", formats={"onnx": "model.onnx"}, signature={}, metrics={})
    hashes = json.loads(_hashes(made)["sha256"])
    assert list(hashes) == ["model.onnx", "files"]
    assert hashes["model.onnx"] == made.files["model.onnx"].sha256
    assert _sizes(made) == {"model.onnx": 4, "files/ (4)": 3 + 14 + 4 + 2}
    (folder / "files" / "labels.json").write_text('["dog", "cat"]')
    other = build_manifest(folder, model="plain", formats={"onnx": "model.onnx"}, signature={}, metrics={})
    assert json.loads(_hashes(other)["sha256"])["files"] != hashes["files"]


def test_a_shared_library_among_them_is_loaded_by_nobody(tmp_path: Path) -> None:
    folder = write(tmp_path / "release", model_onnx="onnx", operators_so="1")
    write(folder / "files", tool_so="2")
    made = build_manifest(folder, model="plain", formats={"onnx": "model.onnx"}, signature={}, metrics={})
    assert made.libraries == ["operators.so"] and list(made.shipped) == ["files/tool.so"]


def test_a_job_without_them_is_recorded_as_it_was(tmp_path: Path) -> None:
    job = load_job(write_project(tmp_path))[0]
    assert not {"files", "extras", "labels"} & job.model_dump(mode="json")["export"].keys()
    assert files_digest(job, tmp_path) == ""


def test_a_file_that_changed_makes_another_export_and_is_a_reason_to_train(project: Path, tmp_path: Path) -> None:
    job = job_of(project, files=["tokenizer", "labels.json"])
    hashes = FileHashes(tmp_path / "home", "project")
    before, (_, recorded) = files_digest(job, project), files_of(job, project, hashes)
    (project / "labels.json").write_text('["dog", "cat"]')
    write(project / "tokenizer", added_txt="c")
    assert files_digest(job, project) != before
    _, now = files_of(job, project, hashes)
    found = differences(recorded, files_now(recorded, now, project, hashes), job, project)
    assert sorted(found) == ["labels.json changed", "tokenizer/added.txt added"]


def test_the_clean_room_cannot_import_what_writes_them(tmp_path: Path) -> None:
    write(tmp_path, writers_py="def write(folder): ...\n")
    job = job_of(tmp_path, extras="writers:write")
    assert user_modules(job, tmp_path) == ["plain", "writers"]
    assert project_of(job, tmp_path).extras == Reference(target="writers:write", where="export.extras")
