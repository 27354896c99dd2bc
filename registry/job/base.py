"""What the parts of a job file share: strict models, and references to things in your code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema

from train_and_ship.infra.errors import JobError
from train_and_ship.registry.job.mistakes import descriptions, key_name, mistakes

MOST_ENTRIES = 10_000
"""Of a list, or of keys with values, in a job."""


def _is_reference(value: str) -> str:
    module, colon, attribute = value.partition(":")
    parts = [*module.split("."), *attribute.split(".")]
    if not colon or not all(part.isidentifier() for part in parts):
        raise ValueError("a reference module:attribute, such as digits:build_model")
    return value


def _is_named(value: Any) -> Any:
    """What runs in other processes is named, and not handed over."""
    if callable(value):
        name, module = getattr(value, "__qualname__", ""), getattr(value, "__module__", None)
        known = name.isidentifier() and module not in (None, "__main__")
        such = f"{module}:{name}" if known else "digits:build_model, with the code in a file beside the job"
        raise ValueError(f"a reference module:attribute, which the processes that run your code import, such as {such}")
    return value


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


class _InWords(ModelMetaclass):
    """Of what is made in Python, where a mistake is told as one in a job file is; parsing is left as it is."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        try:
            return super().__call__(*args, **values)
        except ValidationError as error:
            found = mistakes(cast("type[BaseModel]", cls), error, written=False)
            lines = [": ".join(filter(None, [cls.__name__, key_name(keys), said])) for keys, said in found]
            raise JobError("\n".join(lines)) from None


class Part(BaseModel, metaclass=_InWords):
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


def digest(value: Any) -> str:
    """16 hexadecimal digits of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


Target = Annotated[str, BeforeValidator(_is_named), AfterValidator(_is_reference)]


class Factory(Part):
    """A callable in your code and the keyword arguments it is called with."""

    factory: Target
    """module:attribute, in the project folder or installed"""
    args: dict[str, JsonValue] = Field(default_factory=dict)
    """keyword arguments"""
