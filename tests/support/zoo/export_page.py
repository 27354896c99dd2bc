"""Takes every model of the zoo through export and the clean room, and tells it as docs/exports.md does."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch.utils import cpp_extension

from tests.support.zoo.animals import ZOO, Animal
from torchworker.contract import FORMAT_FILES, ExportRequest, ExportResult, ValidateRequest, ValidateResult, decode
from torchworker.exporters import operators
from torchworker.parity.reference import read_probes
from torchworker.runtimes.load import load_artifact
from train_and_ship.infra.errors import JobError
from train_and_ship.infra.fork_server import ForkServer
from train_and_ship.registry.job.load import load_job
from train_and_ship.tasks.requests import dynamic_dims, project_of, user_modules
from train_and_ship.tasks.worker import call_worker

MODELS = Path(__file__).with_name("models")
EDGE = ("executorch",)
"""Asked apart: it needs an extra, and a largest batch, which the others are not told."""
USUAL = tuple(kind for kind in FORMAT_FILES if kind not in EDGE)
MAX_BATCH = 17
AT_ONCE = 3
"""Models that are exported side by side; each exports its formats side by side as well."""
INITIALISED = """
import os
import sys
import torch
import torch.distributed as dist
from torchworker.contract import Project
from torchworker.training.results import save_trained
from torchworker.project.user_code import build_dataset, build_model, enter
from pathlib import Path
torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    pid = os.fork()
    if pid == 0:
        project = Project.read(folder / "project.json")
        store = dist.FileStore(str(folder / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        torch.manual_seed(0)
        enter(project)
        model, data = build_model(project).eval(), build_dataset(project, "validation")
        save_trained(model, data, project, folder / "trained", torch.device("cpu"))
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, folder
"""
"""Weights as training would leave them. Random ones do: what matters here is what is computed with them."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What became of one model in one format."""

    outcome: str
    """`exact`, `within`, `refused`."""
    how: str
    """How it was captured, or why it was refused."""


Row = dict[str, Cell]
"""By format; without those that were not asked."""


def operator_library() -> Path | None:
    """libclamp.so, built once with the wheel's own headers and kept in the user's cache; None without a compiler."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    source = MODELS / "clamp.cpp"
    key = hashlib.sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "train-and-ship" / "zoo" / key
    built = cache / "libclamp.so"
    if not built.exists():
        cache.mkdir(parents=True, exist_ok=True)
        headers = [f"-I{path}" for path in cpp_extension.include_paths()]
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        part = cache / f"libclamp.{os.getpid()}.so"
        command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", *headers, str(source), *libraries]
        subprocess.run([*command, "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(part)], check=True, timeout=240)
        part.replace(built)
    return built


def visit(folder: Path, kinds: Sequence[str], animals: Sequence[Animal] = ZOO) -> dict[str, Row]:
    """Every model's row, by name. folder: empty or not there, for projects and artifacts; kinds: USUAL or EDGE."""
    library = operator_library()
    seen = [animal for animal in animals if library is not None or not animal.libraries]
    for position, animal in enumerate(seen):
        _write_project(folder / str(position), animal, library, MAX_BATCH if kinds == EDGE else None)
    folders = [str(folder / str(position)) for position in range(len(seen))]
    subprocess.run([sys.executable, "-c", INITIALISED, *folders], check=True, timeout=240)
    fork_server = ForkServer(folder / "host.log")
    try:
        rows = asyncio.run(_visit_all(fork_server, folder, seen, kinds))
    finally:
        fork_server.close()
    return {animal.name: row for animal, row in zip(seen, rows, strict=True)}


async def _visit_all(
    fork_server: ForkServer, folder: Path, animals: Sequence[Animal], kinds: Sequence[str]
) -> list[Row]:
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(position: int, animal: Animal) -> Row:
        async with turn:
            return await _visit_one(fork_server, folder / str(position), animal, kinds)

    return await asyncio.gather(*(one(position, animal) for position, animal in enumerate(animals)))


def _write_project(folder: Path, animal: Animal, library: Path | None, max_batch: int | None) -> None:
    folder.mkdir(parents=True)
    for code in MODELS.glob("*.py"):
        shutil.copy(code, folder)
    for name in animal.libraries:
        assert library is not None
        shutil.copy(library, folder / name)
    job = {
        "name": "zoo",
        "model": {"factory": animal.model, "args": dict(animal.args)},
        "data": {"factory": animal.data},
        "train": {"epochs": 1},
        "export": {
            "batch": 8,
            "max_batch": max_batch,
            "dynamic": dict(animal.dynamic),
            "libraries": list(animal.libraries),
        },
        "parity": {"coupled": "allowed" if animal.coupled else "refused"},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    for name in ("trained", "export", "validate"):
        (folder / name).mkdir()
    project_of(*load_job(folder / "job.yaml")).write(folder / "project.json")


async def _visit_one(fork_server: ForkServer, folder: Path, animal: Animal, kinds: Sequence[str]) -> Row:
    job, project_folder = load_job(folder / "job.yaml")
    project = project_of(job, project_folder)
    asked = [kind for kind in kinds if kind != "aoti" or animal.compiled]
    export = ExportRequest(
        project=project,
        folder=str(folder / "export"),
        weights=str(folder / "trained" / "weights.safetensors"),
        formats=asked,
        auto=True,
        batch=job.export.batch,
        seed=0,
        validation_limit=1000,
        dynamic=dynamic_dims(job),
        max_batch=job.export.max_batch,
        libraries=[str(project_folder / name) for name in job.export.libraries],
    )
    try:
        exported: ExportResult = decode(
            ExportResult, await call_worker(fork_server, "export", export, folder / "export")
        )
    except JobError as error:
        # `auto` leaves out what does not fit, unless nothing is left.
        return {kind: Cell(outcome="refused", how=str(error)) for kind in asked}
    validate = ValidateRequest(
        folder=str(folder / "export"),
        formats={kind: artifact.file for kind, artifact in exported.artifacts.items()},
        libraries=exported.libraries,
        inputs=exported.inputs,
        outputs=exported.outputs,
        metrics=(),
        gates=(),
        forbidden_modules=user_modules(job, project_folder),
        forbidden_folder=str(project_folder),
        threads=1,
        not_finite=job.parity.not_finite,
        refusals=job.parity.refusals,
        max_batch=job.export.max_batch,
    )
    validated: ValidateResult = decode(
        ValidateResult, await call_worker(fork_server, "validate", validate, folder / "validate")
    )
    row = {}
    for kind in asked:
        if kind in exported.left_out:
            row[kind] = Cell(outcome="refused", how=exported.left_out[kind])
        else:
            failed = [item for item in validated.verdicts if item.format == kind and item.ran and not item.passed]
            how = exported.artifacts[kind].method
            if failed:
                why = f"captured by {how}, but the clean room refuses it: {failed[0].case}: {failed[0].note}"
                row[kind] = Cell(outcome="refused", how=why)
            else:
                outcome = "exact" if _is_exact(folder / "export", kind, exported) else "within"
                row[kind] = Cell(outcome=outcome, how=how)
    return row


def _is_exact(folder: Path, kind: str, exported: ExportResult) -> bool:
    """Whether every declared answer is the model's own, bit for bit."""
    for library in exported.libraries:
        torch.ops.load_library(str(folder / library))
    call = load_artifact(kind, folder / exported.artifacts[kind].file, threads=1)
    for probe in read_probes(folder):
        if not probe.declared or probe.eager is None:
            continue
        got = call({spec.name: probe.inputs[spec.name].clone() for spec in exported.inputs})
        for name, tensor in zip((spec.name for spec in exported.outputs), got, strict=True):
            expected = probe.eager[name]
            if tensor.shape != expected.shape or not torch.equal(tensor.nan_to_num(), expected.nan_to_num()):
                return False
    return True


HEAD = """# What can be exported

Written by `python -m tests.zoo > docs/exports.md`; a test takes every model through export and the clean room
and compares. *exact*: bit for bit what the model gives, on every probe. *within*: inside the model's own rounding.
*refused*: nothing is released, for the reason below the table. An empty cell was not asked: compiling takes long.
Exact or within may differ from processor to processor; this page was written on {capability}.

ExecuTorch is asked by name only, with its extra installed and batches of 1 to 17; [edge.md](edge.md) says what is held
against what.

"""


OTHERWISE = """## Operators that a format computes otherwise

Found in the captured graph, because samples may not show them: each is named with your line in the log of the export,
in the report and on the model version's page. What usual inputs show is refused; the rest is a note, and whether it
matters is for you to say. Tests ask the real runtimes whether each row still holds, and whether what to write instead
is right.

{table}

What no graph tells, and the gate asks instead: samples and their neighbours where whole numbers are above 2^24, real
samples shifted by 100 standard deviations, and NaN in the whole input. What nobody asks: sums of int64 above 2^53,
which ONNX Runtime takes through float64; cumulative sums of millions of floats, which ONNX Runtime adds up in float32
one by one (4 % off). Which of equal values `topk` and `sort` name first is nobody's answer: items whose values are
equal in float64 too may come in any order, as long as they are the same items.

## Recurrent layers

`nn.LSTM`, `nn.GRU` and `nn.RNN`, of any number of layers and directions, go to TorchScript, ONNX and pt2 at any length
that `export.dynamic` declares; an ONNX file has ONNX's own operators for them ([how fast](benchmarks.md)).

Packed sequences (`pack_padded_sequence`) have the lengths of one batch in their shape: TorchScript takes them, by
script, and every other format refuses. Call the layer on the padded batch, and take what it says at each last step:

```python
said = self.cells(sequence)[0]  # [B, T, hidden], with batch_first=True
last = said.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, said.shape[2]))[:, 0]
```

In one direction that is what packing gives, whatever the padding holds. The way back of a bidirectional layer would
begin in the padding: use a second layer, and give it each sequence reversed up to its own length:

```python
places = (lengths[:, None] - 1 - torch.arange(sequence.shape[1])).clamp(min=0)
back = self.back(sequence.gather(1, places[:, :, None].expand_as(sequence)))[0]
```

## State

A model that changes its own parameters or buffers in eval mode is refused before it is trained, and once more before a
format is made, for every format. ONNX has no state, and a package of AOTInductor loses a buffer of one element without
a word (torch 2.13: eager 2 4 6, package 2 2 2). pt2 and TorchScript count on, each server process by itself, so that an
answer depends on which of them gave it and on when it was started: no better.

`nn.Embedding` and `nn.EmbeddingBag` with `max_norm` shorten their weights whenever they are asked.
`F.embedding(ids, torch.renorm(weight, 2, 0, max_norm))` gives the same and changes nothing.

Buffers that are filled once, and buffers that are not saved (a table of angles that grows), ship as long as the answers
stay the same.
"""


def page(rows: dict[str, Row]) -> str:
    """docs/exports.md."""
    lines = ["| model | " + " | ".join(FORMAT_FILES) + " |", "|---|" + "---|" * len(FORMAT_FILES)]
    reasons = []
    for name, row in rows.items():
        cells = [row[kind].outcome if kind in row else "" for kind in FORMAT_FILES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        told: dict[str, list[str]] = {}
        for kind, cell in row.items():
            told.setdefault(f"{cell.outcome}: {_steady(cell.how)}", []).append(kind)
        reasons.append(f"### {name}\n\n" + "\n".join(f"- {', '.join(kinds)}: {why}" for why, kinds in told.items()))
    head = HEAD.format(capability=torch.backends.cpu.get_cpu_capability())
    more = OTHERWISE.format(table=operators.page())
    return head + "\n".join(lines) + "\n\n## How, and why not\n\n" + "\n\n".join(reasons) + "\n\n" + more


def told(text: str) -> tuple[dict[tuple[str, str], str], dict[tuple[str, str], str]]:
    """What a page says, by model and format: the cells of its table, and the lines below it."""
    text = text.partition("\n## Operators")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    kinds = lines[0][1:]
    cells = {(row[0], kind): cell for row in lines[2:] for kind, cell in zip(kinds, row[1:], strict=True) if cell}
    reasons = {}
    for section in text.split("\n### ")[1:]:
        name, *said = section.strip().splitlines()
        for line in filter(None, said):
            named, _, reason = line.removeprefix("- ").partition(": ")
            reasons |= {(name, kind): reason for kind in named.split(", ")}
    return cells, reasons


def _steady(text: str) -> str:
    """Without what changes from machine to machine, and without the advice that every refusal ends with."""
    text = re.split(r"[.;] (?:Ways out:|or leave|leave|take|declare) ", " ".join(text.split()))[0]
    text = text.removeprefix("export: ").replace("exact: ", "").replace("within: ", "")
    return re.sub(r"\d\.\de[-+]\d\d", "…", text)
