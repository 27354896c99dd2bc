"""What the parts of a job file share: strict models, and references to things in your code."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import itertools
import json
import textwrap
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    JsonValue,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema

MOST_ENTRIES = 10_000
"""Of a list, or of keys with values, in a job."""


def _is_reference(value: str) -> str:
    module, colon, attribute = value.partition(":")
    parts = [*module.split("."), *attribute.split(".")]
    if not colon or not all(part.isidentifier() for part in parts):
        raise ValueError("a reference module:attribute, such as digits:build_model")
    return value


class Part(BaseModel):
    """A mapping of a job file: unknown keys and near types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    came_later: ClassVar[frozenset[str]] = frozenset()
    """Keys that earlier versions did not have. What is recorded has them only where they are not the default, so that
    the digest of a job without them is what it was."""
    most: ClassVar[Mapping[str, int]] = {}
    """How many entries a key may have, where that is not MOST_ENTRIES."""

    @model_validator(mode="before")
    @classmethod
    def _few_entries(cls, given: Any) -> Any:
        # Before anything looks at each of them: a job may come out of somebody else's release.
        for name in cls.model_fields.keys() & given.keys() if isinstance(given, dict) else ():
            most = cls.most.get(name, MOST_ENTRIES)
            if isinstance(given[name], list | tuple | dict) and len(given[name]) > most:
                raise ValueError(f"at most {most:,} entries in {name}, which has {len(given[name]):,}")
        return given

    @model_serializer(mode="wrap")
    def _recorded(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return self.recorded(dump(self))

    def recorded(self, values: dict[str, Any]) -> dict[str, Any]:
        """Of all values by key those that are recorded."""
        fields = type(self).model_fields
        return {
            name: value
            for name, value in values.items()
            if name not in self.came_later or getattr(self, name) != fields[name].default
        }

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core)
        for name, text in descriptions(cls).items():
            handler.resolve_ref_schema(schema)["properties"][name]["description"] = text
        return schema


@functools.cache
def descriptions(part: type[BaseModel]) -> dict[str, str]:
    """The sentence under each field of a part, by its name. Read from the source when somebody asks.

    pydantic's `use_attribute_docstrings` does the same for every process that imports the models, and takes 50 ms.
    """
    found: dict[str, str] = {}
    for kind in reversed(part.__mro__):
        if issubclass(kind, Part):
            (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
            assert isinstance(node, ast.ClassDef)
            for field, below in itertools.pairwise(node.body):
                match field, below:
                    case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))) if (
                        name in part.model_fields
                    ):
                        found[name] = " ".join(text.split())
    return found


def digest(value: Any) -> str:
    """16 hexadecimal digits of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


Target = Annotated[str, AfterValidator(_is_reference)]


class Factory(Part):
    """A callable in your code and the keyword arguments it is called with."""

    factory: Target
    """module:attribute, in the project folder or installed"""
    args: dict[str, JsonValue] = Field(default_factory=dict)
    """keyword arguments"""
