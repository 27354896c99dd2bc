"""`ship check --no-export` of a public architecture, in a process of its own, and the page of what it said."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from tests.support.projects import REPOSITORY
from tests.support.public.architectures import ARCHITECTURES, Architecture
from tests.support.public.exporting import BATCHES, FORMATS
from torchworker.contract import LOSSES

HERE = Path(__file__).parent
PAGE = REPOSITORY / "docs" / "public-models.md"
BATCH = 8
INDEPENDENT = "Answers do not depend on the other samples of a batch"
SECONDS = 300
HEAD = """\
# Public architectures

What a run asks of a job before it trains must not refuse, nor warn of, a model that is all right. So it is asked of
{count} architectures that nobody here wrote, in tiny configurations with random weights, by
`ship check --no-export`, each with two processes, batches of {batch}, and TorchScript, ONNX and pt2: outputs that can
be shipped, pairs of outputs and targets, a finite loss, samples that depend on each other, a last batch of one, a loss
that is no mean, parameters that a step does not use, one training step, and the weights to a file and back.

*Nothing* is what is right for most of them. What is said of the others is true, and the last column says why. A model
whose answers do depend on the batch, as CLIP's logits or a BatchNorm without statistics, is no false alarm.

The first time (2026-11-29) one kind of false alarm was found: BERT, DistilBERT, GPT-2, Llama, Mixtral, T5's encoder and
a solver of torchdiffeq look at values (is there any padding?), and were said to decide which parameters a step uses.
The other answer is tried now. CLIP was refused with a wrong cause.

`make public` makes an environment of its own for them, with the versions below, in `build/public` (some 3 GB), and
asks all; neither `make test` nor `make soak` does. It exports them too: the second table.
`build/public/bin/python -m tests.public > docs/public-models.md` writes this page, and
[tests/support/public/architectures.py](../tests/support/public/architectures.py) is the table: a new one is a row.

Asked on {date}: {versions}.

| architecture | library | parameters | what is said of it | why that is right |
|---|---|---|---|---|
"""

FILES = f"""
## Files

Each in the three formats, captured as a run does and held against the model by the gate of a run, with its defaults and
64 validation samples: all that [parity](parity.md) asks, and at batches of {", ".join(map(str, BATCHES))}, cut and
repeated. Beside a name stands the largest batch that is declared, where there is one. A cell says how the file was
captured, or words of the refusal. What the gate refuses is true of the file: pooling in ONNX Runtime hides NaN
(`parity.not_finite`), a norm there loses more than float32 does on samples shifted by 100 standard deviations, and a
trace leaves out the check of a picture's size that the model makes (`parity.refusals`).

| architecture | {" | ".join(FORMATS)} |
|---|{"---|" * len(FORMATS)}
"""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the command said."""

    status: int
    text: str
    facts: Mapping[str, str]
    """The table that it prints, by its first column."""
    notes: Sequence[str]

    def mistakes(self, asked: Architecture) -> list[str]:
        """What is not as it should be: an alarm that is none, or one that is missing."""
        if asked.refused:
            refused = self.status == 2 and asked.refused in self.text
            return [] if refused else [f"expected to be refused with {asked.refused!r}: {self.text}"]
        if self.status:
            return [self.text]
        found = []
        if INDEPENDENT not in self.facts.get("samples", ""):
            found.append(f"samples: {self.facts.get('samples', 'nothing')}")
        found += [f"note: {note}" for note in self.notes if not any(words in note for words in asked.notes)]
        missing = [words for words in asked.notes if not any(words in note for note in self.notes)]
        return [*found, *(f"expected a note with {words!r}" for words in missing)]


def job_of(asked: Architecture) -> dict[str, object]:
    """The document of its job file."""
    named = {"args": {"name": asked.name}}
    return {
        "name": "public",
        "project": str(HERE),
        "model": {"factory": "architectures:build_model", **named},
        "data": {"factory": "architectures:build_dataset", **named},
        "train": {
            "epochs": 1,
            "processes": 2,
            "batch_size": BATCH,
            "loss": asked.loss if asked.loss in LOSSES else {"factory": f"architectures:{asked.loss}"},
            **asked.train,
        },
        "export": {"formats": ["torchscript", "onnx", "pt2"]},
    }


def ask(asked: Architecture, folder: Path) -> Answer:
    """Run the command. folder: gets the job file."""
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(job_of(asked)))
    # Nothing is downloaded; lines are as long as they need to be.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "2000"}
    ship = Path(sys.executable).with_name("ship")
    ended = subprocess.run(
        [ship, "check", file, "--no-export"], env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    rows = [cells for line in ended.stdout.splitlines() if len(cells := re.split("[│┃|]", line)) == 4]
    facts: dict[str, str] = {}
    notes = []
    for _, name, value, _ in rows:
        if name.strip() == "note":
            notes.append(value.strip())
        elif name.strip():
            facts[name.strip()] = value.strip()
    return Answer(status=ended.returncode, text=ended.stdout + ended.stderr, facts=facts, notes=notes)


def page(answers: Mapping[str, Answer], files: Mapping[str, Mapping[str, str]]) -> str:
    """docs/public-models.md. answers, and what became of each in each format: by the architecture's name."""
    libraries = dict.fromkeys(item.library for item in ARCHITECTURES)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in libraries]
    head = HEAD.format(
        count=len(ARCHITECTURES), batch=BATCH, date=datetime.date.today(),
        versions=", ".join([f"Python {sys.version.split()[0]}", f"torch {torch.__version__}", *versions]),
    )  # fmt: skip
    asked = "".join(f"| {' | '.join(_row(item, answers[item.name]))} |\n" for item in ARCHITECTURES)
    exported = "".join(f"| {' | '.join(_exported(item, files[item.name]))} |\n" for item in ARCHITECTURES)
    return head + asked + FILES + exported


def _row(asked: Architecture, answer: Answer) -> list[str]:
    found = re.search(r"([\d,]+) parameters", answer.facts.get("model", ""))
    said = asked.refused or "; ".join(asked.notes)
    return [asked.name, asked.library, found[1] if found else "–", f"… {said} …" if said else "nothing", asked.why]


def _exported(asked: Architecture, files: Mapping[str, str]) -> list[str]:
    largest = f", `export.max_batch: {asked.max_batch}`" if asked.max_batch else ""
    cells = [
        f"refused: … {asked.lost[kind]} …" if kind in asked.lost else files[kind].split(" → ")[0] for kind in FORMATS
    ]
    return [asked.name + largest, *cells]
