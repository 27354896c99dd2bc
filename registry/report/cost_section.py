"""What a run cost, in its report."""

from __future__ import annotations

from collections.abc import Sequence

from train_and_ship.registry.cost import IN_PARALLEL, Rates, Spent, total
from train_and_ship.registry.report import charts
from train_and_ship.registry.report.page import Block, Chart, Section, Text
from train_and_ship.registry.text import Table, duration, money


def cost_section(costs: Sequence[Spent], rates: Rates) -> Section:
    """What each stage took, and its price."""
    spent = list(costs)
    if not spent:
        return Section(title="Cost", blocks=())
    whole = total(spent)
    gpus = whole.gpu > 0
    priced = rates.price(whole) is not None
    header = ["stage", "time", "CPU time", *(["GPU time"] if gpus else []), *(["price"] if priced else [])]
    rows = []
    for item in [*spent, whole]:
        beside = item.stage in IN_PARALLEL.values() and not item.wall
        row = [item.stage, "in parallel" if beside else duration(item.wall), duration(item.cpu)]
        row += [duration(item.gpu)] if gpus else []
        row += [money(rates.price(item), rates.currency)] if priced else []
        rows.append(row)
    said = (
        f"{whole.cpu / 3600:.4f} CPU-hours" + (f" and {whole.gpu / 3600:.4f} GPU-hours" if gpus else "")
        + f" in {duration(whole.wall)} until this report, of this process and all that it started, over all attempts"
        " that came to an end."
    )  # fmt: skip
    if priced:
        said += f" Price: {money(rates.price(whole), rates.currency)}, at {_rate(rates.cpu_hour, rates)} a CPU-hour" + (
            f" and {_rate(rates.gpu_hour, rates)} a GPU-hour." if gpus else "."
        )
    elif rates.cpu_hour is not None or rates.gpu_hour is not None:
        missing = "SHIP_CPU_HOUR_PRICE" if rates.cpu_hour is None else "SHIP_GPU_HOUR_PRICE"
        said += f" No price, because {missing} is not set."
    blocks: list[Block] = [Text(text=said)]
    if killed := {item.stage: item.killed for item in spent if item.killed}:
        names = ", ".join(f"{name} ({count})" for name, count in killed.items())
        blocks.append(Text(text=f"Killed before their end, and not counted: {names}."))
    stages = [item for item in spent if item.wall]
    drawn = charts.bars([(item.stage, [item.wall, item.cpu]) for item in stages], ["time", "CPU time"], duration)
    blocks += [Chart(title="Seconds by stage", svg=drawn), Table(header=header, rows=rows)]
    return Section(title="Cost", blocks=blocks)


def _rate(rate: float | None, rates: Rates) -> str:
    return f"{rate:g} {rates.currency}".strip() if rate is not None else ""
