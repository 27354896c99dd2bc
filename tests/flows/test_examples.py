"""The examples of tables, of text, of sound, of sequences and of a decoding loop, through the whole flow."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.fixture_types import Ship
from tests.support.projects import REPOSITORY
from torchworker.runtimes.load import load_artifact
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.bucket.releases import fetch_release
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.release.manifest import Manifest

OURS = re.compile(r"^\s*(from|import) (flows|tasks|registry|infra|torchworker|ship|shipreader)\b", re.M)


def shipped(ship: Ship, store: ObjectStore, example: str, folder: Path) -> Manifest:
    """Runs the example's job, downloads what it made live into the folder, and returns its manifest."""
    return shipped_by(ship, store, REPOSITORY / "examples" / example / "job.yaml", folder)


def shipped_by(ship: Ship, store: ObjectStore, path: Path, folder: Path) -> Manifest:
    """The same of a job file."""
    assert len(path.read_text().splitlines()) < 25
    for module in path.parent.glob("*.py"):
        assert not OURS.search(module.read_text())
    ended = ship("run", str(path))
    assert ended.status == 0, ended.text
    assert "Traceback" not in ended.text
    name = yaml.safe_load(path.read_text())["name"]
    pointer = read_pointer(Channel(store, name, "prod"))
    assert pointer is not None
    manifest = fetch_release(store, name, pointer.release, folder)
    return manifest


@pytest.mark.soak
def test_a_table_of_measurements_is_classified_and_its_own_metric_gated(
    ship: Ship, store: ObjectStore, tmp_path: Path
) -> None:
    manifest = shipped(ship, store, "tumours", tmp_path / "release")
    metrics = manifest.metrics
    assert set(manifest.formats) == {"torchscript", "onnx", "pt2"}
    assert metrics["accuracy"] >= 0.93 and metrics["recall"] >= 0.88
    assert manifest.signature["inputs"][0]["shape"] == ["batch", 30]


@pytest.mark.soak
def test_a_table_with_categories_that_init_has_written_ships_them_and_live_is_asked_with_its_own(
    ship: Ship, store: ObjectStore, tmp_path: Path
) -> None:
    job = tmp_path / "mine" / "job.yaml"
    job.parent.mkdir()
    assert ship("init", str(job.parent), "--example", "tabular").status == 0
    manifest = shipped_by(ship, store, job, tmp_path / "release")
    assert manifest.signature["labels"] == ["stays", "leaves"]
    shipped_categories = json.loads((tmp_path / "release" / "files" / "categories.json").read_text())
    assert shipped_categories["plan"] == ["basic", "business", "family", "student", "trial"]

    # The codes of all plans become others; what is live goes on with those that it has learnt.
    table = job.with_name("customers.csv")
    table.write_text(table.read_text().replace("family", "a-family"))
    again = ship("run", str(job))
    assert again.status == 0, again.text
    told = re.search(r"prepare (\d+) of 300 samples otherwise", again.text)
    assert told is not None and int(told[1]) > 0, again.text


@pytest.mark.soak
def test_messages_are_sorted_by_tokens_of_a_tokenizer_that_the_release_has(
    ship: Ship, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mail").mkdir()
    assert ship("init", str(tmp_path / "mail"), "--example", "text").status == 0
    manifest = shipped_by(ship, store, tmp_path / "mail" / "job.yaml", tmp_path / "release")
    monkeypatch.syspath_prepend(str(tmp_path / "mail"))
    messages = __import__("messages")
    monkeypatch.delitem(sys.modules, "messages")
    tokens = messages.Tokenizer.load(tmp_path / "release" / "files" / "tokenizer.json").encode
    asked = torch.tensor([tokens("my parcel never arrived"), tokens("i cannot log in, the password is wrong")])
    for kind, file in manifest.formats.items():
        scores = load_artifact(kind, tmp_path / "release" / file, 1)({"tokens": asked})[0]
        assert [manifest.signature["labels"][best] for best in scores.argmax(1)] == ["delivery", "account"], kind


@pytest.mark.soak
def test_sequences_are_classified_at_any_length(ship: Ship, store: ObjectStore, tmp_path: Path) -> None:
    manifest = shipped(ship, store, "sequence", tmp_path / "release")
    assert set(manifest.formats) == {"torchscript", "onnx", "pt2"}
    assert manifest.metrics["accuracy"] >= 0.68
    assert manifest.signature["inputs"][0]["shape"] == ["batch", "length"]
    for kind, file in manifest.formats.items():
        call = load_artifact(kind, tmp_path / "release" / file, 1)
        # What padding adds must not matter.
        tokens = torch.tensor([list(b"schweizerisch")])
        short = call({"tokens": tokens})[0]
        assert torch.allclose(short, call({"tokens": torch.nn.functional.pad(tokens, (0, 9))})[0], atol=1e-4)
        assert int(short.argmax()) == 0, f"{kind}: not German"


@pytest.mark.soak
def test_sound_is_classified_as_it_was_recorded_with_its_spectrogram_inside(
    ship: Ship, store: ObjectStore, tmp_path: Path
) -> None:
    manifest = shipped(ship, store, "audio", tmp_path / "release")
    assert set(manifest.formats) == {"torchscript", "onnx", "pt2"}
    assert manifest.metrics["accuracy"] >= 0.95
    (sound,) = manifest.signature["inputs"]
    assert (sound["dtype"], sound["shape"]) == ("int16", ["batch", 2000])
    assert manifest.signature["labels"] == ["rising", "falling", "level", "wavering"]
    time = torch.arange(2000) / 8000
    # 1,000 Hz at the beginning and 2,000 Hz at the end, and back.
    pitches = torch.stack([1000 + 4000 * time, 2000 - 4000 * time])
    pcm = (0.3 * torch.sin(2 * torch.pi * pitches.cumsum(1) / 8000) * 32767).to(torch.int16)
    for kind, file in manifest.formats.items():
        chances = load_artifact(kind, tmp_path / "release" / file, 1)({"pcm": pcm})[0]
        assert chances.argmax(1).tolist() == [0, 1], kind
        assert torch.allclose(chances.sum(1), torch.ones(2)), kind


@pytest.mark.soak
def test_a_translator_ships_with_its_beam_search_and_every_format_writes_cyrillic(
    ship: Ship, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = shipped(ship, store, "translate", tmp_path / "release")
    metrics = manifest.metrics
    assert set(manifest.formats) == {"torchscript", "pt2"}
    assert metrics["exact_match"] >= 0.55 and metrics["character_error_rate"] <= 0.14
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples" / "translate"))
    translate = __import__("translate")
    monkeypatch.delitem(sys.modules, "translate")
    golden = load_file(tmp_path / "release" / "golden.safetensors")
    names = torch.tensor([translate.encode("estonija", "sr_Latn"), translate.encode("madagaskar", "uz")])
    for kind, file in manifest.formats.items():
        call = load_artifact(kind, tmp_path / "release" / file, 1)
        letters, score = call({"source": names})
        assert [translate.decode(row) for row in letters.tolist()] == ["естонија", "мадагаскар"]
        assert score.shape == (2,)
        assert torch.equal(call({"source": golden["batch_33.input.source"]})[0], golden["batch_33.eager.letters"])
