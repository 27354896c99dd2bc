"""What the measurements decide: which format a release recommends, and whether it is inside the job's limits.

Formats are compared by the CPU time of the calling thread, which other work on the machine does not stretch; limits in
milliseconds are held against the wall clock, which is what a user waits for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torchworker.contract import LATENCY, THROUGHPUT, Gate, Measured, Verdict


def recommended(measured: Mapping[str, Measured], serve: str) -> dict[str, str]:
    """`latency` and `throughput` to a name among the measured, or nothing.

    serve: `auto`, a name, or `none`. Latency is one call at the smallest batch; throughput the least time a sample at
    any batch.
    """
    if serve == "none":
        return {}
    if serve != "auto":
        return {LATENCY: serve, THROUGHPUT: serve}
    able = {name: item.speeds for name, item in measured.items() if item.speeds}
    if not able:
        return {}
    return {
        LATENCY: min(able, key=lambda name: able[name][0].thread_ms),
        THROUGHPUT: min(able, key=lambda name: min(speed.thread_ms / speed.batch for speed in able[name])),
    }


def asked(gate: str, measured: Mapping[str, Measured], serve: Mapping[str, str]) -> list[str]:
    """The names that a gate holds for: what is recommended, for times of a call what is recommended for latency.

    Without a recommendation any of them may serve, so it holds for all.
    """
    if not serve:
        return list(measured)
    if gate in ("p50_ms", "p99_ms"):
        return [serve[LATENCY]]
    return list(dict.fromkeys(serve.values()))


def judge(measured: Mapping[str, Measured], serve: Mapping[str, str], gates: Sequence[Gate]) -> list[Verdict]:
    """Fixed limits. What was not measured has failed."""
    verdicts = []
    for gate in gates:
        limit = f"<= {gate.max:g}"
        for name in asked(gate.name, measured, serve):
            item = measured.get(name)
            found = item.value(gate.name) if item is not None else None
            case = f"batch {item.speeds[0].batch}" if item and item.speeds and gate.name.startswith("p") else "artifact"
            note = "" if found is not None else (item.problem if item else "") or "could not be measured"
            assert gate.max is not None, "the job file allows nothing else"
            verdicts.append(
                Verdict(
                    format=name,
                    gate=gate.name,
                    case=case,
                    measured=found,
                    limit=limit,
                    passed=found is not None and found <= gate.max,
                    note=note,
                )
            )
    return verdicts
