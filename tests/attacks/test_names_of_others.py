"""Who publishes writes names into a release that become paths of the machine on which it is compared, and lists of them
that are long."""

from __future__ import annotations

import json
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from shipreader.records import require_description
from tests.support.releases import make_release
from train_and_ship.infra.errors import JobError, ReleaseError
from train_and_ship.infra.file_hashes import FileHashes
from train_and_ship.registry.data.snapshots import SNAPSHOT, identify, take
from train_and_ship.registry.diff import ReleaseRecord
from train_and_ship.registry.job.data import Snapshot
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.kind import Kind, changes_in_kind
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


# ---- lists without end


def job(**parts: Any) -> Job:
    return Job.from_record({**{"name": "a", "model": {"factory": "p:b"}, "data": {"factory": "p:d"}}, **parts})


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"train": {"epochs": 1}, "export": {"files": ["a"] * 10_001}}, "10,000 entries in files, which has 10,001"),
        ({"train": {"epochs": 1, "metrics": ["accuracy"] * 1001}}, "at most 1,000 entries in metrics, which has 1,001"),
        ({"train": {"epochs": 1}, "gates": {str(n): {} for n in range(10_001)}}, "at most 10,000 entries in gates"),
        ({"train": {"epochs": 1}, "env": ["A"] * 99_000}, "at most 10,000 entries in env, which has 99,000"),
    ],
)  # fmt: skip
def test_a_job_with_a_list_that_nobody_would_write_is_refused_before_its_entries_are_looked_at(
    tmp_path: Path, parts: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError, match=said) as caught:
        job(**parts)
    assert caught.value.error_count() == 1


def test_names_of_a_job_are_asked_once_however_many_there_are() -> None:
    train = {"epochs": 1, "metrics": [{"factory": f"m:f{n}", "better": "higher"} for n in range(1000)]}
    files = [f"{n}/x" for n in range(10_000)]
    assert job(train=train, export={"files": files}).export.files == tuple(files)
    for more, said in (("0/x", "0/x is in 0/x"), ("0/x/y", "0/x/y is in 0/x"), ("9", "9/x is in 9")):
        with pytest.raises(ValidationError, match=f"each file once in files, and {said}"):
            job(train=train, export={"files": [*files[:9999], more]})
    with pytest.raises(ValidationError, match="give f7 another `name`"):
        job(train={**train, "metrics": [*train["metrics"][:999], train["metrics"][7]]})  # type: ignore[index]


def test_labels_of_data_are_counted_once_however_many_there_are() -> None:
    outputs = [{"name": "y", "dtype": "float32", "shape": ["batch", 99_000]}]
    few = Kind(signature={"outputs": outputs}, labels={"0": 20, "1": 20, "2": 20})
    rare = {str(label): 1 for label in range(99_000)}
    many, common = (Kind(signature={"outputs": outputs}, labels={**rare, "98999": count}) for count in (1, 20_000))
    began = time.process_time()
    # Of 60 samples 60/99,000 would be of each label: that there is none is chance. Of the last one it is ten.
    assert changes_in_kind(many, few) == []
    (change,) = changes_in_kind(common, few)
    assert str(change) == "trained on: 99000 (0, 1, 2, 3, 4, 5, …, 98997, 98998, 98999) → 3 (0, 1, 2)"
    assert time.process_time() - began < 5


def test_a_release_of_more_formats_than_there_are_is_refused_where_its_manifest_is_read() -> None:
    formats = {f"f{n}": "a" for n in range(101)}
    with pytest.raises(ValueError, match="expected at most 100 formats, got 101"):
        require_description(formats, {}, {})
    require_description(dict(list(formats.items())[:100]), {}, {})
