"""What pydantic says of a job, or of a part of one, in words: which key, what was expected, what was given."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import itertools
import json
import textwrap
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Keys = Sequence[int | str]
"""The way to a value: keys, and places in lists."""


def mistakes(root: type[BaseModel], error: ValidationError, *, written: bool) -> Iterator[tuple[Keys, str]]:
    """The way to each key that is wrong, and what is wrong with it.

    Args:
        root: what was validated.
        error: what came of it.
        written: whether the values were written as YAML.
    """
    # Unions add the name of the alternative that was tried; only the user's keys are shown.
    found = [([part for part in item["loc"] if _in_document(part)], item) for item in error.errors()]
    seen: set[str] = set()
    for keys, item in found:
        key = key_name(keys)
        deeper = any(len(other) > len(keys) and other[: len(keys)] == keys for other, _ in found)
        if key in seen or deeper:
            continue
        seen.add(key)
        alternatives = [other for same, other in found if same == keys]
        yield keys, _mistake(root, keys, item, alternatives, written=written)


def key_name(keys: Keys) -> str:
    """The way to a value as people write it: `train.epochs`; empty for the whole."""
    return ".".join(str(part) for part in keys)


def _mistake(
    root: type[BaseModel], keys: Keys, item: ErrorDetails, alternatives: Sequence[ErrorDetails], *, written: bool
) -> str:
    """What is wrong with one key.

    Args:
        root: what was validated.
        keys: the way to it.
        item: what pydantic says.
        alternatives: the same for each kind of value that it may have, this one among them.
        written: as of `mistakes`.
    """
    given = shown(item["input"])
    match item["type"]:
        case "extra_forbidden":
            return f"unknown key{_did_you_mean(root, keys)}"
        case "missing":
            return f"missing; expected {_describe_key(root, keys)}"
        case "value_error":
            return f"expected {item['ctx']['error']}, got {given}"
        case "string_pattern_mismatch":
            return f"expected lower-case letters, digits, dots, dashes or underscores, got {given}"
        case "literal_error" if keys[-1] in ("loss", "optimizer", "schedule"):
            return f"expected {item['ctx']['expected']} or {{factory: module:attribute}}, got {given}"
        case "float_type" if written and isinstance(item["input"], str) and _is_number(item["input"]):
            return f"YAML reads {item['input']} as text; write it with a point, such as 1.0e-3 or 0.001"
        case _:
            return f"expected {' or '.join(dict.fromkeys(map(_expected, alternatives)))}, got {given}"


def _expected(item: ErrorDetails) -> str:
    match item["type"]:
        case "tuple_type" | "list_type":
            return "a list, such as [a, b]"
        case "dict_type" | "model_type" | "model_attributes_type":
            return "keys with values, such as {key: value}"
        case _:
            return item["msg"].removeprefix("Input should be ").removeprefix("String should ")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _in_document(part: int | str) -> bool:
    return isinstance(part, int) or (
        part.isidentifier() and part not in ("Factory", "Quantize") and not part.startswith("literal")
    )


def shown(value: Any) -> str:
    """A value that was given, in short, and its type."""
    text = json.dumps(value, default=str)
    return f"{text if len(text) < 80 else text[:77] + '...'} ({type(value).__name__})"


def _model_at(root: type[BaseModel], keys: Keys) -> type[BaseModel] | None:
    """The part that holds the last key."""
    kinds: list[Any] = [root]
    for key in keys[:-1]:
        kinds = [inner for kind in kinds for inner in _inside(kind, key)]
    models = [option for kind in kinds for option in _options(kind) if _is_model(option)]
    return models[0] if models else None


def _options(kind: Any) -> Iterator[Any]:
    """What a field may be: the alternatives of its annotation."""
    if get_origin(kind) in (Union, UnionType):
        for option in get_args(kind):
            yield from _options(option)
    else:
        yield get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _inside(kind: Any, key: int | str) -> Iterator[Any]:
    """What lies below a key of something of this kind."""
    for option in _options(kind):
        if _is_model(option):
            field = option.model_fields.get(str(key))
            yield from [field.annotation] if field else []
        elif get_origin(option) in (dict, tuple, list):
            yield get_args(option)[1 if get_origin(option) is dict else 0]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _did_you_mean(root: type[BaseModel], keys: Keys) -> str:
    model = _model_at(root, keys)
    if model is None:
        return ""
    known = list(model.model_fields)
    close = difflib.get_close_matches(str(keys[-1]), known, n=1)
    # A key that there is, in another part.
    elsewhere = [".".join(place) for place in _places(root) if place[-1] == str(keys[-1])]
    if close or elsewhere:
        return f"; did you mean {' or '.join(elsewhere[:3] if elsewhere and keys[-1] not in close else close)}?"
    return f"; expected one of {', '.join(known)}"


def _places(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The way to each key of a model and of the parts below it."""
    for name, field in model.model_fields.items():
        yield (*above, name)
        for option in _options(field.annotation):
            if _is_model(option):
                yield from _places(option, (*above, name))


def _describe_key(root: type[BaseModel], keys: Keys) -> str:
    model = _model_at(root, keys)
    if model is None:
        return "a value"
    parts = [option for option in _options(model.model_fields[str(keys[-1])].annotation) if _is_model(option)]
    below = f"keys below it, such as {', '.join([*parts[0].model_fields][:3])}" if parts else "a value"
    return descriptions(model).get(str(keys[-1]), below)


@functools.cache
def descriptions(part: type[BaseModel]) -> dict[str, str]:
    """The sentence under each field of a part, by its name. Read from the source when somebody asks.

    pydantic's `use_attribute_docstrings` does the same for every process that imports the models, and takes 50 ms.
    """
    found: dict[str, str] = {}
    for kind in reversed(part.__mro__):
        if issubclass(kind, BaseModel) and kind is not BaseModel:
            (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
            assert isinstance(node, ast.ClassDef)
            for field, below in itertools.pairwise(node.body):
                match field, below:
                    case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))) if (
                        name in part.model_fields
                    ):
                        found[name] = " ".join(text.split())
    return found
