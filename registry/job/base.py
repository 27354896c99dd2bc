"""What the parts of a job file share: strict models, and references to things in your code."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue


def _is_reference(value: str) -> str:
    module, colon, attribute = value.partition(":")
    parts = [*module.split("."), *attribute.split(".")]
    if not colon or not all(part.isidentifier() for part in parts):
        raise ValueError("a reference module:attribute, such as digits:build_model")
    return value


class Part(BaseModel):
    """A mapping of a job file: unknown keys and near types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def digest(value: Any) -> str:
    """16 hexadecimal digits of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


Target = Annotated[str, AfterValidator(_is_reference)]


class Factory(Part):
    """A callable in your code and the keyword arguments it is called with."""

    factory: Target = Field(description="module:attribute, importable from the project folder")
    args: dict[str, JsonValue] = Field(default_factory=dict, description="keyword arguments")
