"""One channel of one model: what every function in this room is asked about."""

from __future__ import annotations

from dataclasses import dataclass, field

from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.registry.identity import require_name

PRODUCTION = "prod"


@dataclass(frozen=True)
class Channel:
    """A name under which one release of a model is live, and where to look. Names are proven when it is made.

    Raises RequestError for names that cannot be part of a key.
    """

    store: ObjectStore = field(repr=False)
    model: str
    name: str = PRODUCTION
    tracking_uri: str = ""
    """The MLflow whose aliases follow it; empty where nobody asks for them."""

    def __post_init__(self) -> None:
        require_name("model", self.model)
        require_name("channel", self.name)

    def __str__(self) -> str:
        """As messages call it: `digits prod`."""
        return f"{self.model} {self.name}"
