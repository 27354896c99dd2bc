"""Charts as inline SVG, for pages without scripts: drawn 360 units wide, which a phone shows about as they are.

Built with ElementTree, which escapes all text. Colors come from the page's classes (`a` and `b` are two series, `bad`
is what failed), so that they follow its light or dark theme.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, fromstring, tostring

from torchworker.contract import ERROR_DECADES
from train_and_ship.registry.text import clean, number

WIDTH = 360
POINTS = 200
"""Most points of a line: more cannot be told apart."""
LABEL = 26
"""Most characters of a label in a chart; the rest is in its tooltip."""
SERIES = ("a", "b")
ERROR_BINS = ("same", f"<1e{ERROR_DECADES[0]}", *(f"1e{decade}" for decade in ERROR_DECADES), "not finite")
"""Of torchworker.contract.ErrorCounts: powers of ten at which the bins begin."""
STYLE = "text{fill:#808080;font:11px sans-serif}.a{fill:#4878a8}.bad,text.bad{fill:#c8443c}.axis{stroke:#808080}"
"""Of an image that stands in somebody else's page, light or dark."""
Shown = Callable[[float], str]


@dataclass(frozen=True, kw_only=True)
class Span:
    """An interval beside a limit."""

    name: str
    low: float
    high: float
    middle: float | None
    """What was measured; None where only the interval is known."""
    limit: float
    """Where it would pass."""
    passed: bool


def lines(series: Mapping[str, Sequence[tuple[float, float]]], over: str) -> str:
    """One or two curves.

    Args:
        series: Points (x, y) by name, finite, x ascending.
        over: What x is.
    """
    series = {name: _thinned(points) for name, points in series.items() if points}
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    low, high = min(ys), max(ys)
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    left, top, bottom, height = 48, 28, 30, 200
    svg = _svg(height, f"{', '.join(series)} over {over}")

    def x_of(x: float) -> float:
        return left + (WIDTH - left - 10) * ((x - min(xs)) / (max(xs) - min(xs)) if max(xs) > min(xs) else 0.5)

    def y_of(y: float) -> float:
        return top + (height - top - bottom) * (1 - (y - low) / (high - low))

    for tick in ticks:
        _line(svg, left, y_of(tick), WIDTH - 10, y_of(tick), "grid")
        _text(svg, left - 6, y_of(tick) + 4, _tick(tick, ticks), anchor="end")
    for x in dict.fromkeys((min(xs), max(xs))):
        anchor = "middle" if min(xs) == max(xs) else "start" if x == min(xs) else "end"
        _text(svg, x_of(x), height - 12, f"{over} {x:g}", anchor=anchor)
    for css, (name, points) in zip(SERIES, series.items(), strict=False):
        if len(points) > 1:
            path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
            _title(SubElement(svg, "polyline", {"points": path, "class": f"line {css}"}), name)
        if len(points) <= 30:
            for x, y in points:
                _shape(svg, "circle", css, f"{name}, {over} {x:g}: {number(y)}", cx=x_of(x), cy=y_of(y), r=2.5)
    _legend(svg, list(series))
    return _written(svg)


def bars(
    rows: Sequence[tuple[str, Sequence[float | None]]], series: Sequence[str], shown: Shown = number, limit: float = 0.0
) -> str:
    """Horizontal bars from zero: one group a row, one bar a series.

    Args:
        rows: Label and a value for each of the series, not negative, None where there is none.
        series: Their names.
        shown: A value in words.
        limit: Drawn as a line, when it is not 0.
    """
    thick = 14 if len(series) == 1 else 11
    group = 20 + thick * len(series) + 6
    top = 24 if len(series) > 1 else 4
    svg = _svg(top + group * len(rows), f"{', '.join(series)}: {', '.join(label for label, _ in rows)}")
    most = max([limit, *(value for _, values in rows for value in values if value is not None)]) or 1.0
    room = WIDTH - 84
    if limit:
        _line(svg, room * limit / most, top, room * limit / most, top + group * len(rows), "axis dashed")
    for place, (label, values) in enumerate(rows):
        y = top + group * place
        _text(svg, 0, y + 14, label, longest=44)
        for turn, (css, name, value) in enumerate(zip(SERIES, series, values, strict=False)):
            if value is None:
                continue
            at = y + 19 + thick * turn
            long = max(1.0, room * value / most)
            said = f"{label}, {name}: {shown(value)}"
            _shape(svg, "rect", css, said, x=0, y=at, width=long, height=thick - 2, rx=1.5)
            _text(svg, long + 5, at + thick - 3.5, shown(value), small=True)
    if len(series) > 1:
        _legend(svg, series)
    return _written(svg)


def histogram(bins: Sequence[tuple[str, Sequence[float]]], series: Sequence[str], shown: Shown) -> str:
    """Upright bars side by side.

    Args:
        bins: Name and a value, not negative, for each of the series.
        series: Their names.
        shown: A value in words.
    """
    height, top, floor = 150, 26, 126
    svg = _svg(height, f"{', '.join(series)} in {', '.join(name for name, _ in bins)}")
    most = max((value for _, values in bins for value in values), default=0.0) or 1.0
    wide = WIDTH / len(bins)
    thick = (wide - min(6.0, wide / 4)) / len(series)
    for place, (name, values) in enumerate(bins):
        for turn, (css, of, value) in enumerate(zip(SERIES, series, values, strict=False)):
            tall = (floor - top) * value / most
            x = wide * place + (wide - thick * len(series)) / 2 + thick * turn
            said = f"{name}, {of}: {shown(value)}"
            _shape(svg, "rect", css, said, x=x, y=floor - tall, width=max(0.5, thick - 0.5), height=tall)
    _line(svg, 0, floor, WIDTH, floor, "axis")
    fits = all(6.5 * len(name) < wide for name, _ in bins)
    for place, (name, _) in enumerate(bins):
        if fits:
            _text(svg, wide * (place + 0.5), floor + 17, name, anchor="middle", small=True)
        elif place in (0, len(bins) - 1):
            x = 0 if place == 0 else WIDTH
            _text(svg, x, floor + 17, name, anchor=_anchor(x), small=True)
    _text(svg, WIDTH, 13, f"up to {shown(most)}", anchor="end", small=True)
    _legend(svg, series)
    return _written(svg)


def intervals(spans: Sequence[Span]) -> str:
    """One row an interval, each on a scale of its own, with zero and its limit."""
    row = 62
    svg = _svg(row * len(spans), "; ".join(f"{span.name}: {span.low:+.4g} to {span.high:+.4g}" for span in spans))
    for place, span in enumerate(spans):
        y = row * place + 34
        ends = [span.low, span.high, 0.0, span.limit, *([span.middle] if span.middle is not None else [])]
        low, high = min(ends), max(ends)
        wide = (high - low) or abs(high) or 1.0
        low, high = low - 0.08 * wide, high + 0.08 * wide

        def x_of(value: float, low: float = low, high: float = high) -> float:
            return 6 + (WIDTH - 12) * (value - low) / (high - low)

        css = "a" if span.passed else "bad"
        _text(svg, 0, y - 20, span.name, longest=44)
        _line(svg, 0, y, WIDTH, y, "grid")
        _line(svg, x_of(0), y - 12, x_of(0), y + 12, "axis")
        if span.limit:
            _line(svg, x_of(span.limit), y - 12, x_of(span.limit), y + 12, "axis dashed")
        wide, said = max(2.0, x_of(span.high) - x_of(span.low)), f"{span.name}: {span.low:+.4g} to {span.high:+.4g}"
        _shape(svg, "rect", css, said, x=x_of(span.low), y=y - 4, width=wide, height=8, rx=3)
        if span.middle is not None:
            said = f"{span.name}: {span.middle:+.4g}"
            _shape(svg, "circle", f"{css} dot", said, cx=x_of(span.middle), cy=y, r=6)
        _text(svg, x_of(0), y + 24, "0", anchor=_anchor(x_of(0)), small=True)
        for value in _ends_shown(span, x_of):
            _text(svg, x_of(value), y + 24, f"{value:+.3g}", anchor=_anchor(x_of(value)), small=True)
    return _written(svg)


def _ends_shown(span: Span, x_of: Callable[[float], float]) -> list[float]:
    """Those ends whose numbers overprint neither the zero mark nor each other: the outer one first."""
    kept: list[float] = []
    for value in sorted({span.low, span.high}, key=lambda end: -abs(end)):
        if abs(x_of(value) - x_of(0)) > 24 and all(abs(x_of(value) - x_of(other)) > 60 for other in kept):
            kept.append(value)
    return kept


def error_histogram(rows: Sequence[tuple[str, Sequence[int], bool]]) -> str:
    """Elements of outputs by how far they are from the model's, a row of logarithmic bars each.

    Args:
        rows: Label, counts in ERROR_BINS, and whether it failed.
    """
    row, foot = 58, 26
    wide = WIDTH / len(ERROR_BINS)
    svg = _svg(row * len(rows) + foot, f"counts by {', '.join(ERROR_BINS)} of {', '.join(label for label, *_ in rows)}")
    # One scale for all of them.
    most = math.log1p(max((count for _, counts, _ in rows for count in counts), default=0)) or 1.0
    for place, (label, counts, failed) in enumerate(rows):
        floor, label = row * (place + 1), label + (" ✗" if failed else "")
        _text(svg, 0, floor - 44, label, css="bad" if failed else "", longest=44)
        _line(svg, 0, floor, WIDTH, floor, "axis")
        for bin_, count in enumerate(counts):
            if not count:
                continue
            tall = max(2.0, 38 * math.log1p(count) / most)
            css, said = "bad" if failed else "a", f"{label}, {ERROR_BINS[bin_]}: {count:,}"
            _shape(svg, "rect", css, said, x=wide * bin_ + 1.5, y=floor - tall, width=wide - 3, height=tall)
    last = len(ERROR_BINS) - 1
    for bin_, name in enumerate(ERROR_BINS):
        if bin_ in (0, last) or bin_ % 3 == 2:
            x = 0 if bin_ == 0 else WIDTH if bin_ == last else wide * (bin_ + 0.5)
            _text(svg, x, row * len(rows) + 17, name, anchor=_anchor(x), small=True)
    return _written(svg)


def confusion(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """A confusion matrix: a row for each class that was right, a column for each answer.

    Args:
        counts: square.
        names: of the classes.
    """
    left, top = 58, 38
    cell = min(56.0, (WIDTH - left) / len(counts))
    svg = _svg(top + cell * len(counts) + 4, f"right class by row, answer by column: {', '.join(names)}")
    _text(svg, 0, 13, "right ↓  answered →", small=True, longest=44)
    shown = cell >= 22
    for row, found in enumerate(counts):
        y, whole = top + cell * row, sum(found) or 1
        if cell >= 11:
            _text(svg, left - 5, y + cell / 2 + 4, names[row], anchor="end", small=True, longest=8)
        for column, count in enumerate(found):
            said = f"{names[row]}, answered {names[column]}: {count:,}, {count / whole:.1%}"
            css, x = "a" if row == column else "bad", left + cell * column
            deep = 0.12 + 0.5 * count / whole if count else 0.03
            _shape(svg, "rect", css, said, x=x, y=y, width=cell - 1, height=cell - 1, fill_opacity=deep)
            if count and shown:
                _text(svg, x + cell / 2, y + cell / 2 + 4, f"{count}", anchor="middle")
    if cell >= 22:
        for column, name in enumerate(names):
            _text(svg, left + cell * (column + 0.5), top - 6, name, anchor="middle", small=True, longest=int(cell / 6))
    return _written(svg)


def residuals(counts: Sequence[Sequence[int]], low: float, high: float, most: float) -> str:
    """How far answers are from what was right, over what was right: darker where there are more.

    Args:
        counts: a row a bin of the distance, the most negative first, a column a bin of what was right.
        low: the smallest that was right.
        high: the largest.
        most: the largest distance.
    """
    left, top, tall = 58, 6, 200
    wide, high_ = (WIDTH - left) / len(counts[0]), tall / len(counts)
    svg = _svg(top + tall + 24, f"answer less what was right, {-most:.4g} to {most:.4g}, over {low:.4g} to {high:.4g}")
    largest = math.log1p(max(max(row) for row in counts)) or 1.0
    for row, found in enumerate(reversed(counts)):
        for column, count in enumerate(found):
            if count:
                place = {"x": left + wide * column, "y": top + high_ * row, "width": wide, "height": high_}
                _shape(svg, "rect", "a", f"{count:,}", **place, fill_opacity=0.15 + 0.85 * math.log1p(count) / largest)
    _line(svg, left, top + tall / 2, WIDTH, top + tall / 2, "axis")
    for value, y in ((f"{most:+.3g}", top + 10), ("0", top + tall / 2 + 4), (f"{-most:+.3g}", top + tall)):
        _text(svg, left - 5, y, value, anchor="end", small=True)
    _text(svg, left, top + tall + 16, f"{low:.4g}", small=True)
    _text(svg, WIDTH, top + tall + 16, f"{high:.4g}", anchor="end", small=True)
    return _written(svg)


def image(titled: Mapping[str, str]) -> str:
    """Charts under each other as one SVG document, for pages that do not have the styles of ours. titled: by title."""
    document, y = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "width": f"{WIDTH}"}), 0.0
    SubElement(document, "style").text = STYLE
    for title, svg in titled.items():
        _text(document, 0, y + 16, title, longest=WIDTH)
        chart = fromstring(svg)
        height = float(chart.attrib["viewBox"].split()[3])
        document.append(chart)
        chart.attrib |= {"y": f"{y + 24:g}", "width": f"{WIDTH}", "height": f"{height:g}"}
        y += height + 40
    document.set("viewBox", f"0 0 {WIDTH} {y:g}")
    document.set("height", f"{y:g}")
    return _written(document)


# ---- parts


def _svg(height: float, described: str) -> Element:
    return Element(
        "svg",
        {"viewBox": f"0 0 {WIDTH} {height:g}", "role": "img", "aria-label": clean(described[:300]), "class": "chart"},
    )


def _written(svg: Element) -> str:
    return tostring(svg, encoding="unicode")


def _text(
    svg: Element, x: float, y: float, text: str, *, anchor: str = "start", css: str = "", small: bool = False,
    longest: int = LABEL,
) -> None:  # fmt: skip
    attributes = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    classes = " ".join(name for name in (css, "small" if small else "") if name)
    element = SubElement(svg, "text", attributes | ({"class": classes} if classes else {}))
    text = clean(text)
    element.text = text if len(text) <= longest else text[: longest - 1] + "…"
    if element.text != text:
        _title(element, text)


def _shape(svg: Element, tag: str, css: str, said: str, **place: float) -> None:
    """said: in its tooltip; place: attributes of an SVG element, such as `cx`."""
    attributes = {name.replace("_", "-"): f"{value:.4g}" for name, value in place.items()}
    _title(SubElement(svg, tag, attributes | {"class": css}), said)


def _title(element: Element, text: str) -> None:
    """A tooltip, which a screen reader tells too."""
    SubElement(element, "title").text = clean(text)


def _line(svg: Element, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
    ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    SubElement(svg, "line", {name: f"{value:.1f}" for name, value in ends.items()} | {"class": css})


def _legend(svg: Element, names: Sequence[str]) -> None:
    x = 0.0
    for css, name in zip(SERIES, names, strict=False):
        SubElement(svg, "rect", {"x": f"{x:.1f}", "y": "4", "width": "10", "height": "10", "class": css, "rx": "2"})
        _text(svg, x + 15, 13, name)
        x += 30 + 6.6 * min(len(name), LABEL)


def _anchor(x: float) -> str:
    return "start" if x < 40 else "end" if x > WIDTH - 40 else "middle"


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS of them, evenly, with the first and the last."""
    if len(points) <= POINTS:
        return list(points)
    step = (len(points) - 1) / (POINTS - 1)
    return [points[round(place * step)] for place in range(POINTS)]


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that span both."""
    raw = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * nice for nice in (1, 2, 5, 10) if size * nice >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [step * place for place in range(first, last + 1)]


def _tick(value: float, ticks: Sequence[float]) -> str:
    """With as many digits as tell it from its neighbours."""
    step = ticks[1] - ticks[0]
    largest = max(abs(tick) for tick in ticks)
    if largest >= 1e5 or step < 1e-4:
        return f"{value:.2g}" if value else "0"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
