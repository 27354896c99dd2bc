"""How fast a release's artifacts are, as people read it and as MLflow keeps it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torchworker.contract import Int8, MeasureResult
from train_and_ship.registry.text import Table, file_size, number


def speed_table(found: MeasureResult, unproven: Collection[str] = ()) -> Table:
    """A row for each format and batch size.

    Args:
        found: the measurements.
        unproven: formats that were to be run in C++ and were not, which stands where they are recommended.
    """
    header = (
        "format", "batch", "p50 ms", "p99 ms", "CPU ms", "samples/s", "load ms", "size", "memory", "recommended for",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for name, item in found.measured.items():
        purposes = [purpose for purpose, chosen in found.serve.items() if chosen == name]
        for_what = " and ".join(purposes) + (", not run in C++" if purposes and item.format in unproven else "")
        whole = (number(item.load_ms), file_size(item.bytes), file_size(item.memory_bytes), for_what)
        if not item.speeds:
            rows.append((name, "", "not measured", "", "", "", *whole))
        for position, speed in enumerate(item.speeds):
            calls = (speed.p50_ms, speed.p99_ms, speed.thread_ms, float(round(speed.samples_per_second)))
            shown = [str(speed.batch), *(number(value) for value in calls)]
            rows.append((name, *shown, *(whole if position == 0 else ("",) * len(whole))))
    notes = [f"{name}: {item.problem}" for name, item in found.measured.items() if item.problem]
    return Table(header=header, rows=rows, notes=notes)


def how_measured(found: MeasureResult) -> str:
    """In how many threads, where, and how often."""
    calls = sorted({speed.calls for item in found.measured.values() for speed in item.speeds})
    over = list(dict.fromkeys(item.memory_over for item in found.measured.values() if item.memory_over))
    counted = f"{calls[0]} to {calls[-1]} calls" if calls else "no calls"
    return (
        f"{found.threads} {'thread' if found.threads == 1 else 'threads'} on {found.machine}; {counted}, all formats "
        "by turns. CPU ms is the time of the calling thread, by which formats are compared: other work on the machine "
        "does not stretch it. Memory is the peak above the empty process"
        + (f", over {'; '.join(over)}." if over else ".")
    )


def speed_metrics(found: MeasureResult) -> dict[str, float]:
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


def int8_table(variants: Mapping[str, Int8]) -> Table:
    """Every int8 variant that was made, with its numbers and what became of it."""
    rows = [
        (
            kind,
            f"{found.sqnr_db:.1f}",
            "" if found.agreement is None else f"{found.agreement:.2%}",
            "" if found.flip_margin is None else number(found.flip_margin),
            ", ".join(f"{name} {number(lost)}" for name, lost in found.losses.items()),
            ", ".join(f"{times:.2f} at {batch}" for batch, times in found.speedups.items()),
            f"left out: {found.reason}" if found.reason else "kept",
        )
        for kind, found in variants.items()
    ]
    header = ("variant", "SQNR, dB", "same predictions", "flip margin", "loses", "times as fast, at batch", "")
    return Table(header=header, rows=rows)
