"""What the measurements decide: which format a release recommends, and whether it is inside the job's limits.

Formats are compared by the CPU time of the calling thread, which other work on the machine does not stretch; limits in
milliseconds are held against the wall clock, which is what a user waits for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torchworker.contract import INT8_OF, LATENCY, THROUGHPUT, Gate, Measured, Verdict
from torchworker.gates.limits import at_most

CLOSE = 1.1
"""Artifacts that take up to so many times as long as the quickest may change places with it."""


def undecided(quickest: Mapping[str, float]) -> list[str]:
    """The names among which the quickest is still to be found, by their times so far; none where it is known."""
    close = [name for name, time in quickest.items() if time <= CLOSE * min(quickest.values())]
    return close if len(close) > 1 else []


def speedups(measured: Mapping[str, Measured]) -> dict[str, dict[str, float]]:
    """Of every int8 variant, how many times as fast as its float format it is, by batch size.

    Without that format (AOTInductor was not asked for) it is held against the fastest float format there is.
    """
    found: dict[str, dict[str, float]] = {}
    floats = {name: item for name, item in measured.items() if item.format not in INT8_OF and item.speeds}
    for name, item in measured.items():
        if item.format not in INT8_OF:
            continue
        rivals = [other for other in floats.values() if other.format == INT8_OF[item.format]] or list(floats.values())
        found[name] = {
            str(mine.batch): min(other.speeds[position].thread_ms for other in rivals) / mine.thread_ms
            for position, mine in enumerate(item.speeds)
            if rivals
        }
    return found


def too_slow(found: Mapping[str, Mapping[str, float]], limit: float) -> dict[str, str]:
    """The variants that are below the limit at the smallest batch and at the largest, in words."""
    slow: dict[str, str] = {}
    for name, by_batch in found.items():
        ends = [*by_batch.items()][:1] + [*by_batch.items()][-1:]
        if not any(times >= limit for _, times in ends):
            shown = " and ".join(dict.fromkeys(f"{times:.2f} times at batch {batch}" for batch, times in ends))
            slow[name] = (
                f"{shown or 'not measured'} as fast as its float format, expected {limit:g} times at one of them"
            )
    return slow


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


def apply_speed_limits(
    measured: Mapping[str, Measured], serve: Mapping[str, str], gates: Sequence[Gate]
) -> list[Verdict]:
    """Fixed limits. What was not measured has failed."""
    verdicts = []
    for gate in gates:
        assert gate.max is not None, "the job file allows nothing else"
        for name in asked(gate.name, measured, serve):
            item = measured.get(name)
            found = item.value(gate.name) if item is not None else None
            case = f"batch {item.speeds[0].batch}" if item and item.speeds and gate.name.startswith("p") else "artifact"
            note = "" if found is not None else (item.problem if item else "") or "could not be measured"
            verdicts.append(at_most(name, gate.name, case, found, gate.max, note))
    return verdicts
