"""docs/python-reference.md, from docstrings: `python -m tests.support.python_reference > docs/python-reference.md`."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from typing import Any

from shipreader import canary, errors, observations, reader, records, rollouts, split

TITLE = """# Python

What can be imported, from its docstrings. `python -m tests.support.python_reference > docs/python-reference.md` writes
this page.
"""
API = "train_and_ship.api"
READERS = {
    "shipreader.reader": (reader.Reader, reader.Status),
    "shipreader.observations": (observations.Observer, observations.Observed),
    "shipreader.records": (records.Release,),
    "shipreader.rollouts": (rollouts.Candidate,),
    "shipreader.canary": (canary.Split, canary.Chosen, canary.Answer, canary.Shadow),
    "shipreader.split": (split.slot_of,),
    "shipreader.errors": (errors.ReaderError, errors.NothingLiveError, errors.RefusedError, errors.UnavailableError),
}


def page() -> str:
    """The page as markdown."""
    parts = {module: [(item.__name__, item) for item in items] for module, items in READERS.items()}
    if importlib.util.find_spec(API) is not None:
        module = importlib.import_module(API)
        parts = {API: [(name, getattr(module, name)) for name in module.__all__], **parts}
    lines = [TITLE]
    for module, items in parts.items():
        lines += [f"## {module}", ""]
        for name, item in items:
            lines += _described(name, item, 3)
            if inspect.isclass(item):
                for member, value in _members(item):
                    lines += _described(f"{name}.{member}", value, 4)
    return "\n".join(lines).rstrip() + "\n"


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that the class itself defines."""
    for name, value in vars(kind).items():
        if name.startswith("_") or not (inspect.isfunction(value) or isinstance(value, property | classmethod)):
            continue
        yield name, value


def _described(name: str, item: Any, depth: int) -> list[str]:
    called = item.__func__ if isinstance(item, classmethod) else item
    lines = [f"{'#' * depth} {name}", ""]
    # Exceptions and pydantic's models take what their fields say.
    if not isinstance(called, property) and not (inspect.isclass(called) and "__init__" not in vars(called)):
        lines += ["```python", f"{name}{_signature(called)}", "```", ""]
    lines += [*_text(item.__doc__ or ""), ""]
    if inspect.isclass(called):
        if "__init__" in vars(called) and not dataclasses.is_dataclass(called):
            lines += [*_text(called.__init__.__doc__ or ""), ""]
        if dataclasses.is_dataclass(called):
            lines += [
                *(f"- `{field.name}`: {str(field.type).strip(chr(39))}" for field in dataclasses.fields(called)),
                "",
            ]
    return lines


def _signature(called: Any) -> str:
    """A line, or a line for each parameter where that would be long."""
    signature = inspect.signature(called)
    parameters = [parameter for parameter in signature.parameters.values() if parameter.name != "self"]
    text = str(signature.replace(parameters=parameters))
    if len(text) > 80:
        starred = next((index for index, item in enumerate(parameters) if item.kind == item.KEYWORD_ONLY), None)
        shown = [f"    {item}," for item in parameters]
        if starred is not None:
            shown.insert(starred, "    *,")
        returned = text.rpartition(")")[2] if "->" in text else ""
        text = "\n".join(["(", *shown, f"){returned}"])
    # Annotations are kept as texts.
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)


def _text(doc: str) -> list[str]:
    """A docstring's paragraphs; Args and Raises become lists."""
    lines = []
    for line in inspect.cleandoc(doc).splitlines():
        if re.fullmatch(r"(Args|Raises|Returns):", line):
            lines += [f"**{line[:-1]}**", ""]
        elif named := re.fullmatch(r"    (\w+): (.*)", line):
            lines.append(f"- `{named[1]}`: {named[2]}")
        else:
            lines.append(line.strip())
    return lines


if __name__ == "__main__":
    print(page(), end="")
