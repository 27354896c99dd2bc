"""What `ship deploy` sends of a project: what git knows, as it is now, the same bytes each time."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.projects import write_project
from tests.support.repositories import git, repository
from train_and_ship.infra import project_archive
from train_and_ship.infra.errors import JobError
from train_and_ship.infra.project_archive import About, archive_of, find_files, mark, pack, sha256_of, unpack
from train_and_ship.infra.provenance import git_commit, project_place
from train_and_ship.registry.job.load import load_job
from train_and_ship.ship.packing import _lock_file, pack_project

ABOUT = About(model="plain", job="job.yaml", commit="none", place={})


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository with a job, a file that git ignores and one that it does not know."""
    job = write_project(tmp_path / "shop/vision")
    (tmp_path / "shop/.gitignore").write_text("*.csv\n")
    repository(tmp_path / "shop")
    (tmp_path / "shop/vision/table.csv").write_text("1\n")
    (tmp_path / "shop/vision/new.py").write_text("x = 1\n")
    return job


def opened(archive: bytes, tmp_path: Path) -> Path:
    """Unpacked as a worker has it."""
    place = tmp_path / f"unpacked-{sha256_of(archive)[:8]}"
    place.mkdir()
    (tmp_path / "project.tar.gz").write_bytes(archive)
    unpack(tmp_path / "project.tar.gz", place)
    mark(place)
    return place


def test_what_git_knows_travels_as_it_is_in_the_folder_now_and_the_rest_is_named(project: Path, tmp_path: Path) -> None:
    (project.parent / "plain.py").write_text("changed = True\n")
    job, folder = load_job(project)
    packed = pack_project(job, project, folder)
    assert packed.job == "vision/job.yaml" and packed.files == 3
    (warning,) = packed.warnings
    assert warning.startswith("plain: git does not know vision/new.py, so they stay here; `git add` them")
    place = opened(packed.archive, tmp_path)
    assert (place / "tree/vision/plain.py").read_text() == "changed = True\n"
    assert not (place / "tree/vision/table.csv").exists() and not (place / "tree/vision/new.py").exists()


@pytest.mark.parametrize("deploy", [{"files": ["."]}, {"files": ["pipe"]}, {"lock": "pipe"}], ids=str)
def test_what_is_listed_and_is_no_file_is_refused_before_it_is_opened(project: Path, deploy: dict[str, object]) -> None:
    os.mkfifo(project.parent / "pipe")
    job = write_project(project.parent, deploy=deploy)
    loaded, folder = load_job(job)
    with pytest.raises(JobError, match=r"deploy\.(files|lock): expected .*/pipe"):
        pack_project(loaded, job, folder)
        _lock_file(loaded, job)


def test_a_repository_may_be_reached_over_a_link(project: Path, tmp_path: Path) -> None:
    (tmp_path / "over").symlink_to(project.parent.parent)
    linked = tmp_path / "over/vision/job.yaml"
    job, folder = load_job(linked)
    assert pack_project(job, linked, folder).archive == pack_project(job, project, folder).archive


def test_an_environment_that_no_worker_is_told_of_is_a_warning(project: Path) -> None:
    # A Python without torchworker.
    (project.parent / ".venv/bin").mkdir(parents=True)
    (project.parent / ".venv/bin/python").symlink_to("/usr/bin/env")
    job, folder = load_job(project)
    assert any(
        "the code runs under the Python of train-and-ship" in said
        for said in pack_project(job, project, folder).warnings
    )


def test_listed_files_travel_although_git_does_not_know_them(project: Path, tmp_path: Path) -> None:
    found = find_files(project, project.parent, ["table.csv", "../vision"])
    assert {"vision/table.csv", "vision/new.py", ".gitignore"} <= set(found.files) and found.unknown == []


def test_the_same_files_are_the_same_bytes_whenever_and_by_whomever_they_were_written(
    project: Path, tmp_path: Path
) -> None:
    found = find_files(project, project.parent, [])
    before = pack(found, ABOUT, "numpy==2.4.6\n")
    for name in found.files:
        os.utime(found.root / name, (1, 1))
        (found.root / name).chmod(0o600)
    assert pack(find_files(project, project.parent, []), ABOUT, "numpy==2.4.6\n") == before
    assert pack(found, ABOUT, "numpy==2.4.5\n") != before


def test_links_and_executables_stay_what_they_are(project: Path, tmp_path: Path) -> None:
    (project.parent / "run.sh").write_text("#!/bin/sh\n")
    (project.parent / "run.sh").chmod(0o755)
    (project.parent / "link.py").symlink_to("plain.py")
    git(project.parent, "add", "--all")
    about = About(model="plain", job="vision/job.yaml", commit="none", place={})
    tree = opened(pack(find_files(project, project.parent, []), about, ""), tmp_path) / "tree/vision"
    assert os.access(tree / "run.sh", os.X_OK) and not os.access(tree / "plain.py", os.X_OK)
    assert (tree / "link.py").readlink() == Path("plain.py")


def test_a_run_of_an_unpacked_project_knows_the_commit_that_was_deployed(project: Path, tmp_path: Path) -> None:
    git(project.parent, "remote", "add", "origin", "https://git.example/team/shop.git")
    job, folder = load_job(project)
    place = opened(pack_project(job, project, folder).archive, tmp_path)
    there = place / "tree/vision"
    assert git_commit(there) == git_commit(folder) == f"{git(folder, 'rev-parse', 'HEAD')}-dirty"
    assert project_place(there) == project_place(folder) == {"repository": "shop", "folder": "vision"}
    about = archive_of(there)
    assert about is not None and about.model == "plain"
    assert archive_of(folder) is None and archive_of(place) is None


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda job: git(job.parent, "rm", "--cached", "--quiet", "job.yaml"), "git does not know this file"),
        (lambda job: (job.parent / "out").symlink_to("/etc/hosts"), "is a link that leads out of"),
        (lambda job: (job.parent / "up").symlink_to("../../elsewhere"), "is a link that leads out of"),
    ],
)
def test_what_no_worker_could_use_is_refused(project: Path, spoil: Callable[[Path], object], said: str) -> None:
    spoil(project)
    if "link" in said:
        git(project.parent, "add", "--all")
    with pytest.raises(JobError, match=said):
        find_files(project, project.parent, [])


@pytest.mark.parametrize(
    ("listed", "said"),
    [("none.csv", "at .*none.csv, found none"), ("../../outside", "below .*shop, got ../../out")],
)
def test_files_that_are_listed_have_to_be_there_and_below_the_repository(
    project: Path, tmp_path: Path, listed: str, said: str
) -> None:
    (tmp_path / "outside").write_text("")
    with pytest.raises(JobError, match=f"deploy.files: expected a file or folder {said}"):
        find_files(project, project.parent, [listed])


def test_without_git_the_listed_files_are_all_and_without_a_list_there_are_three_ways(tmp_path: Path) -> None:
    job = write_project(tmp_path / "alone")
    with pytest.raises(JobError, match=r"`git init` .*`deploy\.files` lists .*--in-place"):
        find_files(job, job.parent, [])
    assert find_files(job, job.parent, ["plain.py", "job.yaml"]).files == ["job.yaml", "plain.py"]


def test_a_project_that_is_too_large_names_its_largest_files(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(project_archive, "MOST_BYTES", 100)
    with pytest.raises(JobError, match=r"vision/plain.py, .*ship snapshot"):
        find_files(project, project.parent, [])


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"format": 2}, "expected format 1, got 2; update train-and-ship here"),
        ({"job": "../job.yaml"}, "expected a job file in it"),
        ({"job": "/etc/hosts"}, "expected a job file in it"),
        ({"job": "none.yaml"}, "expected a job file in it"),
        ({"more": 1}, "as `ship deploy` packs it"),
    ],
)
def test_what_an_archive_says_of_itself_is_checked(tmp_path: Path, said: dict[str, object], message: str) -> None:
    document = {"model": "plain", "job": "job.yaml", "commit": "none", "place": {}, "python": "", "format": 1, **said}
    with tarfile.open(tmp_path / "project.tar.gz", "w:gz") as packed:
        for name, text in {"project.json": json.dumps(document), "tree/job.yaml": "name: x\n"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            packed.addfile(member, io.BytesIO(text.encode()))
    (tmp_path / "place").mkdir()
    with pytest.raises(JobError, match=message):
        unpack(tmp_path / "project.tar.gz", tmp_path / "place")
