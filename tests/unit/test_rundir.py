from __future__ import annotations

from pathlib import Path

from train_and_ship.infra.rundir import StageFolder, link_or_copy


def finished(run: Path) -> StageFolder:
    stage = StageFolder(run, "train", inputs="a")
    (stage.begin() / "weights").write_text("1")
    stage.finish()
    return stage


def test_a_finished_stage_is_complete_for_the_same_inputs_only(tmp_path: Path) -> None:
    stage = finished(tmp_path)
    assert stage.is_complete()
    assert not stage.work.exists()
    assert not StageFolder(tmp_path, "train", inputs="b").is_complete()


def test_a_stage_that_died_midway_is_not_complete_and_its_leftovers_go(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path, "train", inputs="a")
    (stage.begin() / "half").write_text("1")
    assert not stage.is_complete()
    assert list(stage.begin().iterdir()) == []


def test_a_changed_missing_or_added_file_makes_a_stage_incomplete(tmp_path: Path) -> None:
    for change in (
        lambda folder: (folder / "weights").write_text("2"),
        lambda folder: (folder / "weights").unlink(),
        lambda folder: (folder / "extra").write_text(""),
    ):
        stage = finished(tmp_path)
        change(stage.path)
        assert not stage.is_complete()


def test_a_large_file_gets_another_name_and_a_small_one_a_copy(tmp_path: Path) -> None:
    source, target = tmp_path / "weights", tmp_path / "again"
    source.write_bytes(b"12345678")
    target.write_bytes(b"of before")
    for least, same in ((9, False), (8, True), (8, True)):
        link_or_copy(source, target, least)
        assert target.read_bytes() == b"12345678" and target.samefile(source) == same
