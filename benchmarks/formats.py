"""Each format of the same model, as a flow measures them before it recommends one: what leaving TorchScript costs or
brings.

    python benchmarks/formats.py [--nets cnn transformer reference] [--write docs/leaving-torchscript.md]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

from inference import FORMATS, NAMES, Stages, job_file
from report import ROOT, machine, write

from torchworker.contract import Measured
from train_and_ship.infra.fork_server import ForkServer

PAGE = ROOT / "docs/leaving-torchscript.md"


def measured(net: str, fork_server: ForkServer, folder: Path) -> Mapping[str, Measured]:
    """By format; a net that cannot be exported in one of them raises SystemExit."""
    stages = Stages(fork_server, job_file(folder, net, "none"), folder / net)
    stages.train()
    stages.export()
    found = stages.measure(stages.validate()).measured
    if missing := set(FORMATS) - {kind for kind, item in found.items() if not item.problem}:
        raise SystemExit(f"{net}: expected numbers of every format, got none of {', '.join(sorted(missing))}")
    return found


def table(results: Mapping[str, Mapping[str, Measured]]) -> str:
    """Times of calls against TorchScript's, the rest as it is."""
    batches = {net: [speed.batch for speed in found["torchscript"].speeds] for net, found in results.items()}
    small, large = {(sizes[0], sizes[-1]) for sizes in batches.values()}.pop()
    lines = [
        f"| net | format | speed at batch {small} | speed at batch {large} | load, ms | memory, MB | file, MB |",
        "|---" * 7 + "|",
    ]
    for net, found in results.items():
        first, last = found["torchscript"].speeds[0], found["torchscript"].speeds[-1]
        for kind in FORMATS:
            item = found[kind]
            faster = [first.thread_ms / item.speeds[0].thread_ms, last.thread_ms / item.speeds[-1].thread_ms]
            rest = [item.value("load_ms"), item.value("memory_mb"), item.bytes / 1e6]
            shown = " | ".join(
                [*(f"{value:.2f}" for value in faster), *(f"{value:.0f}" for value in rest[:2]), f"{rest[2]:.2f}"]
            )
            lines.append(f"| {NAMES[net]} | `{kind}` | {shown} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="*", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--write", type=Path, default=PAGE, help="the markdown file to update")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fork_server = ForkServer(folder / "host.log")
        try:
            results = {net: measured(net, fork_server, folder) for net in options.nets}
        finally:
            fork_server.close()
    text = (
        f"{machine('torch', 'onnxruntime')} Measured with `python benchmarks/formats.py`, one run: speed against "
        "TorchScript, above 1 is faster; CPU time of the calling thread, one thread, processes by turns, the quickest "
        "round. Load is from the file to the first answer, memory the largest that loading and answering added.\n\n"
        f"{table(results)}"
    )
    print(text)
    write(options.write, "formats", text)


if __name__ == "__main__":
    main()
