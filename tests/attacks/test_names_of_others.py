"""Who publishes writes names into a release that become paths of the machine on which it is compared, and lists of them
that are long."""

from __future__ import annotations

import json
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest

from tests.support.releases import make_release
from train_and_ship.infra.errors import JobError, ReleaseError
from train_and_ship.infra.file_hashes import FileHashes
from train_and_ship.registry.data.snapshots import SNAPSHOT, identify, take
from train_and_ship.registry.diff import ReleaseRecord
from train_and_ship.registry.job.data import Snapshot
from train_and_ship.registry.made_of import ABSENT, DIGITS, Files, files_now


def now(before: Files, project: Path) -> Files:
    return files_now(before, Files(), project, FileHashes(project.parent / "home", "project"))


# ---- names that nothing can have


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000 + "y", "x\0y", "x\ud800", "file.csv/x"])
def test_a_release_that_was_made_of_what_cannot_be_there_is_one_whose_files_are_gone(tmp_path: Path, name: str) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "file.csv").write_text("1")
    assert now(Files(opened={name: "aa"}, listed={name: ["a.csv"]}), project) == Files(opened={name: ABSENT})


def test_a_name_that_the_machine_cannot_look_at_is_the_fault_of_the_release_that_has_it(tmp_path: Path) -> None:
    record = ReleaseRecord(manifest=make_release(tmp_path / "release"), files={})
    with pytest.raises(ReleaseError, match=r"what it says of itself cannot be read: OSError: .*File name too long"):
        _look_at("x" * 300, record)


def _look_at(name: str, record: ReleaseRecord) -> None:
    with record.understood():
        Path(name).stat()


def test_a_snapshot_with_a_file_that_is_a_folder_too_is_refused_before_anything_is_downloaded(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a").write_text("1")
    take(data)
    said = json.loads((data / SNAPSHOT).read_bytes())
    said["files"]["a/b"] = said["files"]["a"]
    (data / SNAPSHOT).write_text(json.dumps(said))
    with pytest.raises(JobError, match="got a, a file, which is the folder of a/b"):
        identify(Snapshot(path=str(data)), tmp_path, lambda _: pytest.fail("no bucket"), tmp_path / "home")


# ---- many names of one thing


def test_a_folder_and_a_file_of_many_names_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    (project / "link").symlink_to("data")
    for name in ("a", "b", "c"):
        (project / "data" / f"{name}.csv").write_text(name)
    spelled = [*(f"data{'/.' * count}" for count in range(1000)), "data/../data", "link"]
    before = Files(listed={name: ["a.csv"] for name in spelled}, opened={f"{name}/a.csv": "aa" for name in spelled})
    asked: Counter[str] = Counter()
    iterdir, sha = Path.iterdir, FileHashes.sha256

    def listed(self: Path) -> object:
        asked[self.name] += 1
        return iterdir(self)

    def read(self: FileHashes, path: Path) -> str:
        asked[path.name] += 1
        return sha(self, path)

    monkeypatch.setattr(Path, "iterdir", listed)
    monkeypatch.setattr(FileHashes, "sha256", read)
    found = now(before, project)
    hashes = {name: sha256(name.encode()).hexdigest()[:DIGITS] for name in ("a", "b", "c")}
    added = {f"data/{name}.csv": hashes[name] for name in ("b", "c")}
    assert found.opened == {**{f"{name}/a.csv": hashes["a"] for name in spelled}, **added}
    assert asked == {"data": 1, "a.csv": 1, "b.csv": 1, "c.csv": 1}
