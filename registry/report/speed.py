"""How fast a release's artifacts are, as people read it and as MLflow keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from train_and_ship.registry.text import file_size, number, table, text_table


class Speed(Protocol):
    """Calls of one artifact at one batch size."""

    @property
    def batch(self) -> int: ...
    @property
    def calls(self) -> int: ...
    @property
    def p50_ms(self) -> float: ...
    @property
    def p99_ms(self) -> float: ...
    @property
    def thread_ms(self) -> float:
        """CPU time of the calling thread in a call."""

    @property
    def cpu_ms(self) -> float:
        """CPU time of all threads in a call."""

    @property
    def samples_per_second(self) -> float: ...


class Measured(Protocol):
    """One artifact."""

    @property
    def bytes(self) -> int: ...
    @property
    def load_ms(self) -> float | None: ...
    @property
    def memory_bytes(self) -> int | None: ...
    @property
    def speeds(self) -> Sequence[Speed]: ...
    @property
    def problem(self) -> str:
        """Why there are no numbers."""


class Measurement(Protocol):
    """All artifacts, side by side."""

    @property
    def measured(self) -> Mapping[str, Measured]: ...
    @property
    def serve(self) -> Mapping[str, str]:
        """`latency` and `throughput` to the name that is recommended."""

    @property
    def threads(self) -> int: ...
    @property
    def machine(self) -> str: ...


class Int8(Protocol):
    """What came of one int8 variant."""

    @property
    def reason(self) -> str:
        """Why it is not in the release; empty when it is."""

    @property
    def sqnr_db(self) -> float: ...
    @property
    def agreement(self) -> float | None: ...
    @property
    def flip_margin(self) -> float | None: ...
    @property
    def losses(self) -> Mapping[str, float]: ...
    @property
    def speedups(self) -> Mapping[str, float]: ...


HEADER = ("format", "batch", "p50 ms", "p99 ms", "CPU ms", "samples/s", "load ms", "size", "memory", "recommended for")


def speed_text(found: Measurement) -> str:
    """Aligned, for logs."""
    return text_table(HEADER, _rows(found))


def speed_markdown(found: Measurement) -> str:
    """With how it was measured."""
    calls = sorted({speed.calls for item in found.measured.values() for speed in item.speeds})
    counted = f"{calls[0]} to {calls[-1]} calls" if calls else "no calls"
    how = (
        f"{found.threads} {'thread' if found.threads == 1 else 'threads'} on {found.machine}; {counted}, all formats "
        "by turns. *CPU ms* is the time of the calling thread, by which formats are compared: other work on the "
        "machine does not stretch it. Memory is the peak above the empty process."
    )
    problems = [f"- {name}: {item.problem}" for name, item in found.measured.items() if item.problem]
    return "\n\n".join([how, table(HEADER, _rows(found)), *(["\n".join(problems)] if problems else [])])


def _rows(found: Measurement) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, item in found.measured.items():
        memory = file_size(item.memory_bytes) if item.memory_bytes is not None else "not measured"
        whole = (number(item.load_ms), file_size(item.bytes), memory, " and ".join(_purposes(found, name)))
        if not item.speeds:
            rows.append((name, "", "not measured", "", "", "", *whole))
        for position, speed in enumerate(item.speeds):
            calls = (speed.p50_ms, speed.p99_ms, speed.thread_ms, float(round(speed.samples_per_second)))
            shown = [str(speed.batch), *(number(value) for value in calls)]
            rows.append((name, *shown, *(whole if position == 0 else ("",) * len(whole))))
    return rows


def _purposes(found: Measurement, name: str) -> list[str]:
    return [purpose for purpose, chosen in found.serve.items() if chosen == name]


def speed_metrics(found: Measurement) -> dict[str, float]:
    """What MLflow keeps, by name: `onnx.p50_ms.batch_1`."""
    metrics: dict[str, float] = {}
    for name, item in found.measured.items():
        metrics[f"{name}.size_mb"] = item.bytes / 1e6
        if item.load_ms is not None:
            metrics[f"{name}.load_ms"] = item.load_ms
        if item.memory_bytes is not None:
            metrics[f"{name}.memory_mb"] = item.memory_bytes / 1e6
        for speed in item.speeds:
            for what, value in (
                ("p50_ms", speed.p50_ms),
                ("p99_ms", speed.p99_ms),
                ("thread_cpu_ms", speed.thread_ms),
                ("cpu_ms", speed.cpu_ms),
                ("samples_per_second", speed.samples_per_second),
            ):
                metrics[f"{name}.{what}.batch_{speed.batch}"] = value
    return metrics


def int8_table(variants: Mapping[str, Int8]) -> str:
    """Every int8 variant that was made, with its numbers and what became of it, as markdown."""
    rows = []
    for kind, found in variants.items():
        rows.append(
            (
                kind,
                f"{found.sqnr_db:.1f}",
                "" if found.agreement is None else f"{found.agreement:.2%}",
                "" if found.flip_margin is None else number(found.flip_margin),
                ", ".join(f"{name} {number(lost)}" for name, lost in found.losses.items()),
                ", ".join(f"{times:.2f} at {batch}" for batch, times in found.speedups.items()),
                f"left out: {found.reason}" if found.reason else "kept",
            )
        )
    header = ("variant", "SQNR, dB", "same predictions", "flip margin", "loses", "times as fast, at batch", "")
    return table(header, rows)
