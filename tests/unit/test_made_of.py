"""Which files a release is made of, and what has become of them."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.projects import write_project
from torchworker.contract import OpenedFile
from train_and_ship.infra.errors import JobError
from train_and_ship.infra.file_hashes import FileHashes, identity_of
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.job.load import load_job
from train_and_ship.registry.lineage import Inputs
from train_and_ship.registry.made_of import ABSENT, ALTERED, Files, differences, files_now, files_of, with_opened


class Made:
    """A project of which a release was made, and which is looked at again."""

    def __init__(self, folder: Path, **retrain: Any) -> None:
        self.folder, self.home = folder / "project", folder / "home"
        self.retrain = retrain
        self.hashes = FileHashes(self.home, "project")

    def job(self) -> Job:
        return load_job(write_project(self.folder, retrain=self.retrain or None))[0]

    def opened(self, *names: str, listed: tuple[str, ...] = ()) -> Files:
        files = [seen(self.folder / name) for name in names]
        _, before = files_of(self.job(), self.folder, self.hashes)
        folders = [str(self.folder / name) for name in listed]
        return with_opened(before, self.job(), self.folder, self.hashes, files, folders)

    def since(self, before: Files) -> list[str]:
        _, now = files_of(self.job(), self.folder, self.hashes)
        return differences(before, files_now(before, now, self.folder, self.hashes), self.job(), self.folder)


def seen(path: Path, *, native: bool = False) -> OpenedFile:
    return OpenedFile(path=str(path), identity=identity_of(path.stat()) if path.exists() else (), native=native)


def write(folder: Path, **texts: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name.replace("_", ".")).write_text(text)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    write(tmp_path / "project", config_json="{}", README_md="words", other_json="{}", edge_py="x = 1")
    return Made(tmp_path)


def test_reasons_are_files_with_what_became_of_them(made: Made) -> None:
    before = made.opened("config.json", "local.json")
    assert made.since(before) == []
    write(made.folder / "mypkg", edge_py="y = 1")
    (made.folder / "edge.py").unlink()
    write(made.folder, config_json="{1}", local_json="{}", README_md="other words", other_json="[]")
    assert made.since(before) == ["edge.py removed", "mypkg/edge.py added", "config.json changed", "local.json added"]
    (made.folder / "config.json").unlink()
    assert "config.json removed" in made.since(before)


def test_a_file_that_became_another_while_it_was_trained_on_is_a_reason(made: Made) -> None:
    opened = [seen(made.folder / "config.json"), seen(made.folder / "other.json"), seen(made.folder / "new.json")]
    about = (made.folder / "config.json").stat()
    write(made.folder, config_json="[]", new_json="{}")
    # The same size, and the time put back.
    os.utime(made.folder / "config.json", ns=(about.st_atime_ns, about.st_mtime_ns))
    (made.folder / "other.json").unlink()
    _, files = files_of(made.job(), made.folder, made.hashes)
    before = with_opened(files, made.job(), made.folder, made.hashes, opened, [])
    assert before.opened == {"config.json": ALTERED, "other.json": ALTERED, "new.json": ABSENT}
    changed = "changed while it was trained on"
    assert made.since(before) == [f"config.json {changed}", "new.json added", f"other.json {changed}"]


def test_what_was_opened_natively_counts_when_the_model_opens_it_again(made: Made) -> None:
    opened = [seen(made.folder / name, native=True) for name in ("config.json", "other.json")]
    _, files = files_of(made.job(), made.folder, made.hashes)
    before = with_opened(files, made.job(), made.folder, made.hashes, opened, [])
    kept = before.touched_again([str(made.folder / "config.json")], made.folder)
    assert set(kept.opened) == {"config.json"} and kept.native == ()


def test_code_is_what_the_job_says_where_it_says_so(tmp_path: Path) -> None:
    made = Made(tmp_path, code=["mypkg", "plain.py"])
    write(made.folder / "mypkg", edge_py="y = 1")
    write(made.folder, notebook_py="a", config_json="{}")
    before = made.opened("config.json", "notebook.py")
    assert set(before.code) == {"mypkg/edge.py", "plain.py"}
    write(made.folder, notebook_py="b", another_py="c")
    assert made.since(before) == []
    write(made.folder / "mypkg", edge_py="y = 2")
    write(made.folder, config_json="[]")
    assert made.since(before) == ["mypkg/edge.py changed", "config.json changed"]
    # A release of before the key was written has more.
    made.retrain = {}
    everything = made.opened()
    made.retrain = {"code": ["mypkg"]}
    write(made.folder, another_py="d")
    assert made.since(everything) == []


def test_files_that_the_job_names_count_and_those_that_it_takes_out_do_not(tmp_path: Path) -> None:
    made = Made(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere, lexicon_txt="a", lexicon_bin="b")
    write(made.folder, state_json="1", config_json="{}")
    silent = made.opened("state.json", "config.json")
    made.retrain = {"files": [f"{elsewhere}/*.txt", "prompts/**/*.md", "!state.*"]}
    assert made.since(silent) == [
        f"{elsewhere}/*.txt was not looked at before",
        "prompts/**/*.md was not looked at before",
    ]
    before = made.opened("state.json", "config.json")
    assert made.since(before) == []
    write(made.folder / "prompts" / "inner", one_md="1")
    write(elsewhere, lexicon_txt="other", lexicon_bin="other")
    write(made.folder, state_json="2")
    assert made.since(before) == [f"{elsewhere}/lexicon.txt changed", "prompts/inner/one.md added"]
    made.retrain = {}
    assert made.since(before) == ["state.json changed"]


def test_a_new_file_beside_those_that_the_code_has_looked_for_is_a_reason(tmp_path: Path) -> None:
    made = Made(tmp_path)
    write(made.folder / "words", a_txt="a", b_txt="b", b_csv="b")
    before = made.opened("words/a.txt", "words/b.txt", listed=("words",))
    write(made.folder / "words", c_csv="c", README_md="d")
    assert made.since(before) == []
    write(made.folder / "words", c_txt="c")
    assert made.since(before) == ["words/c.txt added"]


def test_a_name_is_the_same_on_every_machine_where_there_is_a_repository(tmp_path: Path) -> None:
    write(tmp_path / "one" / "common", words_txt="a")
    (tmp_path / "one" / ".git").mkdir()
    made = Made(tmp_path / "one" / "models")
    made.job()
    before = made.opened("../../common/words.txt")
    assert set(before.opened) == {"../../common/words.txt"}
    (tmp_path / "one").rename(tmp_path / "two")
    moved = Made(tmp_path / "two" / "models")
    assert moved.since(before) == []
    write(tmp_path / "two" / "common", words_txt="b")
    assert moved.since(before) == ["../../common/words.txt changed"]


def test_what_the_job_names_and_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    made = Made(tmp_path, code=["mypgk"], files=["lexicon.txt", "*.none", "!gone.json"])
    with pytest.raises(JobError) as mistake:
        made.job()
    code, files = str(mistake.value).splitlines()
    assert f"retrain.code: expected {made.folder}/mypgk, found none" in code
    assert f"retrain.files: expected {made.folder}/lexicon.txt, found none" in files


def test_a_release_of_somebody_else_makes_a_run_look_at_no_file_of_the_machine(tmp_path: Path) -> None:
    """What is told of it would say which files there are, and whether one is what somebody guesses."""
    made = Made(tmp_path)
    secret = tmp_path / "secret" / "key.pem"
    write(secret.parent, key_pem="x", other_pem="y")
    looked: list[Path] = []
    made.hashes.fresh = lambda path: looked.append(path) or "f" * 64  # type: ignore[method-assign,func-returns-value]
    for guess in (ABSENT, "0" * 16, "f" * 16):
        names = (f"{secret}", f"{secret.parent}/none", "/dev/zero", f"../../{secret.name}", "../secret/key.pem")
        said = made.since(Files(opened=dict.fromkeys(names, guess), listed={f"{secret.parent}": ["a.pem"]}))
        assert {words for words in said if "key" in words or "zero" in words or "none" in words} == {
            f"{name} is not looked at: no run here has opened it, and retrain.files does not name it" for name in names
        }
    assert secret not in looked and not any(path.is_relative_to("/dev") for path in looked)


def test_a_file_outside_of_the_project_counts_where_a_run_here_has_opened_it_or_the_job_names_it(
    tmp_path: Path,
) -> None:
    made = Made(tmp_path)
    lexicon = tmp_path / "elsewhere" / "lexicon.txt"
    write(lexicon.parent, lexicon_txt="a")
    before = made.opened(str(lexicon), f"{lexicon.parent}/none.txt")
    made.hashes = FileHashes(made.home, "project")
    assert made.since(before) == []
    write(lexicon.parent, lexicon_txt="b", none_txt="b")
    assert made.since(before) == [f"{lexicon} changed", f"{lexicon.parent}/none.txt added"]
    another = Made(tmp_path, files=[f"{lexicon.parent}/lex*"])
    another.home, another.hashes = tmp_path / "other", FileHashes(tmp_path / "other", "project")
    assert any(said == f"{lexicon} changed" for said in another.since(before))


# ---- hashes


@pytest.mark.timeout(20)
def test_what_is_no_regular_file_has_no_hash(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path(os.devnull)):
        with pytest.raises(OSError, match="expected a regular file"):
            FileHashes(tmp_path, "files").sha256(path)


def test_a_hash_is_remembered_until_the_file_is_touched_in_any_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train_and_ship.infra.file_hashes.SETTLED_SECONDS", 0.01)
    reads = []
    read = FileHashes.fresh
    monkeypatch.setattr(FileHashes, "fresh", lambda self, path: reads.append(path) or read(self, path))
    path = tmp_path / "file.bin"
    path.write_bytes(b"one")
    about = path.stat()
    first = hashes_of(tmp_path, path)
    assert hashes_of(tmp_path, path) == first and len(reads) == 1
    path.write_bytes(b"two")
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert path.stat().st_mtime_ns == about.st_mtime_ns and path.stat().st_size == about.st_size
    assert hashes_of(tmp_path, path) != first and len(reads) == 2
    # What is broken is read again.
    (kept,) = (tmp_path / "hashes").iterdir()
    kept.write_text("[1]")
    assert hashes_of(tmp_path, path) != first and len(reads) == 3


def hashes_of(home: Path, path: Path) -> str:
    time.sleep(0.05)
    hashes = FileHashes(home, "files")
    found = hashes.sha256(path)
    hashes.save()
    return found


def test_what_has_just_changed_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"one")
    hashes = FileHashes(tmp_path, "files")
    hashes.sha256(path)
    assert hashes.recall(str(path), identity_of(path.stat())) is None
    hashes.save()
    assert not (tmp_path / "hashes").exists()


def test_an_inputs_digest_has_the_files_that_are_opened(made: Made) -> None:
    plain = Inputs(code="c1", data="d1 v1", config="j1", environment={})
    one = dataclasses.replace(plain, files=Files(opened={"config.json": "1"}))
    other = dataclasses.replace(plain, files=Files(opened={"config.json": "2"}))
    assert len({found.digest("") for found in (plain, one, other)}) == 3
