"""How many defects between a model and its artifact are noticed, and how often a sound artifact is refused.

Each defect of defects.py is exported for real where a format can hold it (TorchScript, ONNX, torch.export in turn), and
called as a function where only a runtime does such a thing. Our gate stands beside four rules that people use, each
with its documented inputs and tolerances. Writes the table into docs/benchmarks.md.
"""

import argparse
import collections
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from defects import Call, Case, Defect, cases, defects, eager
from report import PAGE, machine, write
from torch import Tensor, nn
from torch.export import Dim
from torch.utils.data import Dataset

from torchworker.contract import ExportRequest, Project, Reference
from torchworker.parity.compare import Policy, compare
from torchworker.parity.probes import Probe
from torchworker.parity.reference import enlarged, read_probes, validation_key, write_reference
from torchworker.parity.rule import compare_tensors, usual_loss
from torchworker.runtimes.load import load_artifact

BATCH = 16


class Samples(Dataset):
    def __init__(self, data: Mapping[str, Tensor]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(next(iter(self.data.values())))

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        return {name: tensor[index] for name, tensor in self.data.items()}, torch.zeros(())


def questions(case: Case, folder: Path) -> tuple[list[Probe], list[Probe]]:
    """Our probes and the validation samples, as the export stage writes them."""
    nothing = Reference(target="defects:none", where="model.factory")
    project = Project(
        name=case.name,
        folder=str(Path(__file__).parent),
        model=nothing,
        data=nothing,
        collate=None,
        loss="mse_loss",
        metrics=[],
    )
    request = ExportRequest(
        project=project, folder=str(folder), weights="", formats=[], batch=BATCH, seed=0, validation_limit=10_000
    )
    named = enlarged({name: tensor[:BATCH] for name, tensor in case.data.items()}, BATCH)
    with torch.no_grad():
        write_reference(request, case.model, named, Samples(case.data))
    probes = [arranged(probe, case) for probe in read_probes(folder)]
    return probes, [arranged(probe, case) for probe in validation(folder)]


def arranged(probe: Probe, case: Case) -> Probe:
    return replace(probe, inputs={name: probe.inputs[name] for name in case.data})


def validation(folder: Path) -> list[Probe]:
    from safetensors.torch import load_file

    stored = load_file(folder / "validation.safetensors")
    found = []
    outputs = {key.partition(".")[2].rpartition("/")[0] for key in stored if "/" in key}
    for start in range(0, len(stored["target"]), BATCH):
        inputs = {
            key.removeprefix("input."): tensor[start : start + BATCH].contiguous()
            for key, tensor in stored.items()
            if key.startswith("input.")
        }
        parts = {
            part: {name: stored[key] for name in outputs if (key := validation_key(part, name, start)) in stored}
            for part in ("eager", "float64", "moved")
        }
        found.append(
            Probe(
                name="", group="", inputs=inputs, eager=parts["eager"], exact=parts["float64"], perturbed=parts["moved"]
            )
        )
    return found


# --- rules ----------------------------------------------------------------------------------------------------


def ours(call: Call, case: Case, probes: list[Probe], samples: list[Probe], kind: str) -> bool:
    """Whether the gate passes it."""
    if not all(item.passed for item in compare(kind, call, probes, case.outputs, Policy()).verdicts):
        return False
    usual = {
        name: usual_loss((probe.eager[name], probe.exact.get(name, probe.perturbed.get(name))) for probe in samples)
        for name in case.outputs
    }
    for probe in samples:
        got = call({name: tensor.clone() for name, tensor in probe.inputs.items()})
        for name, tensor in zip(case.outputs, got, strict=True):
            others = probe.exact.get(name), probe.perturbed.get(name)
            if not compare_tensors(tensor, probe.eager[name], *others, usual=usual[name]).passed:
                return False
    return True


def similar(case: Case, size: int, seed: int, low_high: bool = False) -> dict[str, Tensor]:
    """Random inputs as people make them: normal (or uniform in 0..1) floats; whole numbers and masks of samples."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, len(next(iter(case.data.values()))), (size,), generator=g)
    return {
        name: (torch.rand if low_high else torch.randn)((size, *tensor.shape[1:]), generator=g)
        if tensor.is_floating_point()
        else tensor[rows]
        for name, tensor in case.data.items()
    }


def assert_close(call: Call, case: Case) -> bool:
    """torch.testing.assert_close with its defaults on three random batches of the captured size."""
    for seed in range(3):
        inputs = similar(case, BATCH, seed)
        expected = eager(case.model)(inputs)
        torch.testing.assert_close(call({k: v.clone() for k, v in inputs.items()}), expected, equal_nan=True)
    return True


def verify(call: Call, case: Case) -> bool:
    """torch.onnx.export(verify=True): torch/onnx/_internal/exporter/_core.py, step 6, on the inputs of capture."""
    inputs = {name: tensor[:BATCH] for name, tensor in case.data.items()}
    for got, expected in zip(call({k: v.clone() for k, v in inputs.items()}), eager(case.model)(inputs), strict=False):
        difference = (got.double() - expected.double()).abs()
        relative = difference / (expected.double().abs() + 1e-7)
        if float(difference.max()) >= 5e-3 or float(relative.max()) >= 1e-1:
            return False
    return True


def polygraphy(call: Call, case: Case) -> bool:
    """`polygraphy run`: one iteration of uniform inputs in 0..1; each element within atol 1e-5 or rtol 1e-5."""
    inputs = similar(case, BATCH, 1, low_high=True)
    for got, expected in zip(call({k: v.clone() for k, v in inputs.items()}), eager(case.model)(inputs), strict=True):
        if got.shape != expected.shape:
            return False
        difference = (got.double() - expected.double()).abs()
        if bool(((difference > 1e-5) & (difference > 1e-5 * expected.double().abs())).any()):
            return False
    return True


def optimum(call: Call, case: Case) -> bool:
    """Optimum's validate_model_outputs: dummy inputs of batch 2, shapes equal, numpy.allclose with atol 1e-5."""
    inputs = similar(case, 2, 2)
    for got, expected in zip(call({k: v.clone() for k, v in inputs.items()}), eager(case.model)(inputs), strict=True):
        if got.shape != expected.shape or not torch.allclose(got.double(), expected.double(), rtol=1e-5, atol=1e-5):
            return False
    return True


PEERS: dict[str, Callable[[Call, Case], bool]] = {
    "assert_close": assert_close,
    "Polygraphy": polygraphy,
    "Optimum": optimum,
    "verify=True": verify,
}


def passes(rule: Callable[[Call, Case], bool], call: Call, case: Case) -> bool:
    try:
        return rule(call, case)
    except Exception:
        return False


# --- artifacts ------------------------------------------------------------------------------------------------


def exported(model: nn.Module, case: Case, kind: str, folder: Path) -> Call:
    """A real artifact of the model, loaded by the runtime that the clean room uses."""
    inputs = {name: tensor[:BATCH] for name, tensor in case.data.items()}
    path = folder / f"model.{kind}"
    if kind == "torchscript":
        torch.jit.trace(model, tuple(inputs.values()), check_trace=False).save(str(path))
    else:
        batch = Dim("batch", min=1)
        program = torch.export.export(
            model, tuple(inputs.values()), dynamic_shapes=tuple({0: batch} for _ in inputs), strict=False
        )
        if kind == "pt2":
            torch.export.save(program, str(path))
        else:
            made = torch.onnx.export(program, tuple(inputs.values()), input_names=list(inputs), verbose=False)
            made.save(str(path), external_data=False)
    return load_artifact(kind, path, 1)


@dataclass
class Score:
    defect: Defect
    kind: str
    caught: dict[str, bool]
    seconds: float


def study(chosen: list[str]) -> tuple[list[Score], list[tuple[str, str, dict[str, bool]]]]:
    scores: list[Score] = []
    clean: list[tuple[str, str, dict[str, bool]]] = []
    turn = 0
    with tempfile.TemporaryDirectory() as top:
        for case in cases():
            if chosen and case.name not in chosen:
                continue
            folder = Path(top) / case.name
            folder.mkdir()
            probes, samples = questions(case, folder)
            for kind in case.kinds or ("called",):
                call = exported(case.model, case, kind, folder) if case.kinds else eager(case.model)
                said = {name: not passes(rule, call, case) for name, rule in PEERS.items()}
                said["ours"] = not ours(call, case, probes, samples, kind)
                clean.append((case.name, kind, said))
            for defect in defects(case):
                made = defect.make(case.model)
                kind = "called"
                if not isinstance(made, nn.Module):
                    call = made
                elif not case.kinds:
                    call = eager(made)
                else:
                    kind, turn = case.kinds[turn % len(case.kinds)], turn + 1
                    call = exported(made, case, kind, folder)
                began = time.perf_counter()
                try:
                    caught = {"ours": not ours(call, case, probes, samples, kind)}
                except Exception:
                    caught = {"ours": True}
                seconds = time.perf_counter() - began
                for name, rule in PEERS.items():
                    # A call may keep state: each rule gets one of its own.
                    again = call if kind != "called" or isinstance(made, nn.Module) else defect.make(case.model)
                    caught[name] = not passes(rule, again, case)
                scores.append(Score(defect, kind, caught, seconds))
                print(
                    f"{case.name:12} {defect.kind:46} {kind:12} "
                    + " ".join(name if hit else "-" * len(name) for name, hit in caught.items()),
                    flush=True,
                )
    return scores, clean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="*", help="only these models; nothing is written then")
    chosen = parser.parse_args().case
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    scores, clean = study(chosen)
    rules = ["ours", *PEERS]
    total = {rule: sum(score.caught[rule] for score in scores) for rule in rules}
    alarms = {rule: sum(said[rule] for _, _, said in clean) for rule in rules}
    print(total, len(scores), "alarms", alarms, len(clean))
    missed = [
        f"{score.defect.case}: {score.defect.kind} ({score.kind})" for score in scores if not score.caught["ours"]
    ]
    print("missed:", missed)
    print("false alarms:", [(name, kind) for name, kind, said in clean if said["ours"]])
    if chosen:
        return
    by_case: dict[str, collections.Counter[str]] = {}
    for score in scores:
        row = by_case.setdefault(score.defect.case, collections.Counter())
        row["seeded"] += 1
        row.update(rule for rule, hit in score.caught.items() if hit)
    seconds = sorted(score.seconds for score in scores)
    head = "| model | seeded | " + " | ".join(rules) + " |\n|---|---|" + "---|" * len(rules)
    lines = [
        f"| {name} | {row['seeded']} | " + " | ".join(str(row[rule]) for rule in rules) + " |"
        for name, row in by_case.items()
    ]
    lines.append(f"| **all** | **{len(scores)}** | " + " | ".join(f"**{total[rule]}**" for rule in rules) + " |")
    share = " | ".join(f"{total[rule] / len(scores):.0%}" for rule in rules)
    lines.append(f"| caught | | {share} |")
    lines.append(
        "| sound artifacts refused | of " + f"{len(clean)} | " + " | ".join(str(alarms[r]) for r in rules) + " |"
    )
    text = f"""## Seeded defects

{machine("torch", "onnxruntime")}
Measured with `make bench-parity`: {len(scores)} defects in {len(by_case)} kinds of model, exported for real where a
format can hold them. The gate took {seconds[len(seconds) // 2]:.2f} s an artifact in the median, {seconds[-1]:.1f} s at
most. Other rules with their documented inputs and tolerances: `torch.testing.assert_close` on three random batches;
Polygraphy (uniform inputs, 1e-5 absolute or relative); Optimum (batch of 2, `allclose` with 1e-5);
`torch.onnx.export(verify=True)` (0.005 absolute, 0.1 relative, on the inputs of capture).

{head}
{chr(10).join(lines)}

Missed by ours: {"; ".join(missed) or "none"}."""
    write(PAGE, "seeded_defects", text)


if __name__ == "__main__":
    main()
