"""Digits that are served as they were scanned: normalisation and softmax are in what is exported and released."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from tests.support.fixture_types import Ship
from tests.support.projects import REPOSITORY, write_project
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.s3 import s3_client
from train_and_ship.infra.settings import Settings

pytestmark = pytest.mark.soak
AROUND = """

from torch.nn import Module


def build_raw(split):
    images, labels = build_dataset(split).tensors
    return TensorDataset((images * 16).to(torch.uint8), labels)


class Scans(Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, scan):
        return {"probability": self.model(scan / 16).softmax(1)}


class Counting(Scans):
    def __init__(self, model):
        super().__init__(model)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, scan):
        self.calls += 1
        return super().forward(scan)


def sharper(model):
    made = Scans(model)
    made.model = torch.nn.Sequential(model, Twice())
    return made


class Twice(Module):
    def forward(self, logits):
        return 2 * logits
"""


def job(folder: Path, serving: str = "Scans", **more: Any) -> str:
    digits = (REPOSITORY / "examples" / "digits" / "digits.py").read_text()
    return str(
        write_project(
            folder, code=digits + AROUND, name="scans", model={"factory": "plain:build_model", "args": {"width": 8}},
            data={"factory": "plain:build_dataset", "raw": "plain:build_raw"},
            train={"processes": 1, "epochs": 4, "batch_size": 64, "learning_rate": 0.01},
            export={"formats": ["onnx"], "serve": "none", "serving": f"plain:{serving}"}, parity={"cpp": "off"},
            gates={"accuracy": {"min": 0.8}}, **{"release": {"policy": "always"}, **more},
        )
    )  # fmt: skip


def test_raw_scans_go_in_and_probabilities_come_out_of_what_is_live(
    ship: Ship, store: ObjectStore, tmp_path: Path
) -> None:
    from shipreader.reader import Reader

    counts = ship("run", job(tmp_path, "Counting"))
    assert counts.status == 2 and "Traceback" not in counts.text
    assert "export.serving: forward changes the buffer 'calls' in eval mode: plain.py" in counts.text, counts.text
    checked = ship("check", job(tmp_path), COLUMNS="200")
    assert checked.status == 0, checked.text
    assert "plain:Scans(model), asked about what plain:build_raw gives" in checked.output
    assert "scan: uint8 [batch, 1, 8, 8]" in checked.output and "probability: float32 [batch, 10]" in checked.output

    ended = ship("run", job(tmp_path))
    assert ended.status == 0, ended.text
    client = s3_client(Settings.load())
    release = Reader("scans", bucket=store.bucket, folder=tmp_path / "pulled", client=client).pull()
    (given,) = release.manifest.signature["inputs"]
    assert (given["name"], given["dtype"], given["shape"]) == ("scan", "uint8", ["batch", 1, 8, 8])
    assert release.manifest.metrics["accuracy"] > 0.8

    from sklearn.datasets import load_digits

    scans = load_digits().images[:, None].astype("uint8")
    session = onnxruntime.InferenceSession(release.folder / "model.onnx")
    (probability,) = session.run(None, {"scan": scans})
    assert probability.sum(1) == pytest.approx(1, abs=1e-5)
    assert (probability.argmax(1) == load_digits().target).mean() > 0.8

    other = ship("run", job(tmp_path, "sharper"))
    assert other.status == 2 and "model: export.serving: plain:Scans → plain:sharper" in other.text, other.text


FITTED = """
import json
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

NAMES = Path(__file__).with_name("names.json")


def colours(split):
    # 0, 1 and 2 in turns, by the names that they have today.
    names = json.loads(NAMES.read_text())
    return [names[place % 3] for place in range(240 if split == "train" else 120)]


def prepared(split, known):
    rows = colours(split)
    columns = torch.tensor([[float(row == one) for one in known] for row in rows])
    weight = torch.rand(len(rows), 1, generator=torch.Generator().manual_seed(len(rows))) / 10
    green = torch.tensor([float(place % 3 == 1) for place in range(len(rows))])
    return TensorDataset(torch.cat([columns, weight], 1), green)


def fit():
    return sorted(set(colours("train")))


def build_dataset(split):
    return prepared(split, fit())


def for_live(split, files):
    return prepared(split, json.loads((files / "known.json").read_text()))


def write_extras(folder):
    (folder / "known.json").write_text(json.dumps(fit()))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, colour):
        return self.linear(colour).squeeze(1)


def build_model():
    return Net()
"""


def test_a_live_release_is_asked_about_inputs_that_its_own_files_prepare(ship: Ship, tmp_path: Path) -> None:
    def fitted(**data: str) -> str:
        return str(
            write_project(
                tmp_path, code=FITTED, name="fitted", data={"factory": "plain:build_dataset", **data},
                train={
                    "processes": 1, "epochs": 20, "batch_size": 24, "learning_rate": 0.1,
                    "loss": "binary_cross_entropy_with_logits",
                    "metrics": ["accuracy", {"factory": "plain:share", "better": "higher"}],
                },
                export={"formats": ["onnx"], "serve": "none", "extras": "plain:write_extras"}, parity={"cpp": "off"},
                release={"policy": "always"},
                extra="""
                    def share(outputs, target):
                        return ((outputs > 0) == (target > 0.5)).float().mean()
                """,
            )
        )  # fmt: skip

    (tmp_path / "names.json").write_text('["blue", "green", "red"]')
    first = ship("run", fitted(for_live="plain:for_live"))
    assert first.status == 0, first.text
    # Red has another name, and every column another place.
    (tmp_path / "names.json").write_text('["blue", "green", "amber"]')
    wrong = ship("run", fitted(), "--allow", "live_score")
    assert "files/known.json changed since it was made: if data.factory prepares inputs with that" in wrong.text
    assert "accuracy 1, live 0.3333" in wrong.text, wrong.text
    # Back to what was live first, and the same again.
    (tmp_path / "names.json").write_text('["blue", "green", "red"]')
    assert ship("run", fitted(for_live="plain:for_live"), "--allow", "live_score").status == 0
    (tmp_path / "names.json").write_text('["blue", "green", "amber"]')
    fair = ship("run", fitted(for_live="plain:for_live"))
    assert fair.status == 0, fair.text
    assert "its own files prepare 120 of 120 samples otherwise; it was asked about these" in fair.text, fair.text
    assert "accuracy 1, live 1" in fair.text and "share 1, live 1" in fair.text, fair.text
