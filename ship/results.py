"""What is done, found and live, as the Python API gives it back: frozen values that print as a table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_and_ship.infra.shown import on_one_line

if TYPE_CHECKING:
    from rich.console import RenderableType

    from train_and_ship.registry.channels.pointer import Pointer

# rich is imported when something is shown: in a terminal `print(value)` needs none of it.


class Shown(ABC):
    """A value with a title and a line for each fact: `print` shows the lines, rich and notebooks a table."""

    @property
    @abstractmethod
    def title(self) -> str:
        """A sentence on all of it."""

    @property
    @abstractmethod
    def rows(self) -> Iterable[tuple[str, str]]:
        """Name and value of each line."""

    def __str__(self) -> str:
        return "\n".join([self.title, *(f"  {name:<8} {on_one_line(value)}" for name, value in self.rows)])

    def json(self) -> str:
        """All fields by name, as `--json` prints them."""
        import json

        fields: Any = [asdict(item) for item in self] if isinstance(self, tuple) else asdict(self)  # type: ignore[call-overload]
        return json.dumps(fields, default=str, indent=1)

    def __rich__(self) -> RenderableType:
        from rich.table import Column, Table
        from rich.text import Text

        name, value = Column(style="bold"), Column(overflow="fold")
        table = Table(name, value, title=Text(self.title), show_header=False, title_justify="left")
        for called, said in self.rows:
            table.add_row(Text(called), Text(on_one_line(said)))
        return table

    def _repr_mimebundle_(self, include: Sequence[str] = (), exclude: Sequence[str] = (), **_: Any) -> dict[str, str]:
        """For notebooks, which ask for it: text/html and text/plain."""
        from rich.jupyter import JupyterMixin

        return JupyterMixin._repr_mimebundle_(self, include, exclude)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Checked(Shown):
    """What a job refers to, as `ship check` found it."""

    model: str
    """Name of the model."""
    project: Path
    """Absolute folder."""
    python: str
    """Interpreter that runs the code of the job."""
    parameters: int
    """How many numbers the model has."""
    train_samples: int | None
    """None for a stream without a length; so of `validation_samples`."""
    validation_samples: int | None
    inputs: Sequence[str]
    """One a tensor: `image: float32 [batch, 1, 8, 8]`; so of `outputs`."""
    outputs: Sequence[str]
    exports: Mapping[str, str]
    """Format to the file that was made of the untrained model; empty where nothing was exported."""
    left_out: Mapping[str, str]
    """Format to why it cannot be made, where the job leaves the choice open."""
    notes: Sequence[str]
    """What is worth knowing before training."""
    facts: Sequence[tuple[str, str]] = field(repr=False)
    """All that the command prints, a line each."""
    gates: Sequence[Sequence[str]] = field(repr=False)
    """A row each: what is measured, min, max, against live, times live."""

    @property
    def title(self) -> str:
        """The model."""
        return self.model

    @property
    def rows(self) -> Iterable[tuple[str, str]]:
        """The facts."""
        return self.facts

    def __str__(self) -> str:
        import io

        from rich.console import Console

        console = Console(file=io.StringIO(), width=120, color_system=None)
        console.print(self)
        assert isinstance(console.file, io.StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Column, Table

        facts = Table(
            Column(style="bold"), Column(overflow="fold"), title=self.model, show_header=False, title_justify="left"
        )
        for name, value in self.facts:
            facts.add_row(name, escape(value))
        gates = Table("measured", "min", "max", "against live", "times live", title="gates", title_justify="left")
        for row in self.gates:
            gates.add_row(*row)
        return Group(facts, gates)


@dataclass(frozen=True, kw_only=True)
class Shipped(Shown):
    """A run whose release no gate refused: it is live, is being rolled out, or waits for another rollout."""

    model: str
    channel: str
    release: str
    """Id of the release."""
    headline: str
    """A sentence: what became of it."""
    run_url: str
    """Its page in Prefect."""
    version_url: str
    """The version in MLflow."""
    release_uri: str
    """`s3://bucket/…` of the release's files."""
    report: Path
    """The report as HTML, on this machine."""

    @property
    def title(self) -> str:
        """The headline."""
        return self.headline

    @property
    def rows(self) -> Iterable[tuple[str, str]]:
        """Where to look."""
        return (
            ("run", self.run_url),
            ("version", self.version_url),
            ("release", self.release_uri),
            ("report", str(self.report)),
        )


@dataclass(frozen=True, kw_only=True)
class Retrained(Shown):
    """What `ship retrain` decided, and what came of it."""

    model: str
    channel: str
    decision: str
    """skipped, promoted, kept, rolling out or staged."""
    why: str
    """The reason, in words."""
    headline: str
    """A sentence on both."""
    candidate: str
    """Id of the release that was made; empty when none was."""
    run_url: str
    """Its page in Prefect."""
    version_url: str
    """The version in MLflow; empty when none was made."""
    report: Path | None
    """The report as HTML, on this machine; None when nothing was trained."""

    @property
    def title(self) -> str:
        """The headline."""
        return self.headline

    @property
    def rows(self) -> Iterable[tuple[str, str]]:
        """Where to look, as far as there is anything, and why."""
        places = {"run": self.run_url, "version": self.version_url, "report": self.report, "why": self.why}
        return [(name, str(value)) for name, value in places.items() if value]


@dataclass(frozen=True, kw_only=True)
class Move(Shown):
    """A move of a channel: the release that went live by it, and the record."""

    model: str
    channel: str
    generation: int
    """1 for the first move of a channel, one more for each."""
    release: str
    """Id of the release that went live."""
    previous: str | None
    """The one that was live before."""
    moved_at: str
    """UTC, ISO 8601, by the mover's clock."""
    by: str
    """Who moved it."""
    why: str
    """The reason that was given."""
    rollback: bool
    """Whether it went back to what had been live."""
    flow_run: str
    """Id of the flow run in Prefect; empty outside a flow."""
    version: str
    """Of the model in MLflow; empty when it has none."""
    verdicts: Mapping[str, str]
    """What was proven before the move, by gate, in words."""
    warnings: Sequence[str] = ()
    """What did not follow: MLflow's aliases, or people who asked to be told."""

    @classmethod
    def of(cls, pointer: Pointer, warnings: Sequence[str] = ()) -> Move:
        """A pointer, or a record of the history, for who reads it."""
        return cls(
            model=pointer.model,
            channel=pointer.channel,
            generation=pointer.generation,
            release=pointer.release,
            previous=pointer.previous,
            moved_at=pointer.moved_at,
            by=pointer.moved_by,
            why=pointer.reason,
            rollback=bool(pointer.kind),
            flow_run=pointer.flow_run,
            version=pointer.mlflow_version,
            verdicts=pointer.verdicts,
            warnings=tuple(warnings),
        )

    @property
    def title(self) -> str:
        """What went live where."""
        return f"{self.model} {self.channel}: release {self.release}, generation {self.generation}"

    @property
    def rows(self) -> Iterable[tuple[str, str]]:
        """The record."""
        found = {
            "since": self.moved_at,
            "by": f"{self.by}{', a rollback' if self.rollback else ''}",
            "why": self.why,
            "before": self.previous or "nothing",
            "version": self.version,
            "flow run": self.flow_run,
            **{on_one_line(name): said for name, said in self.verdicts.items()},
        }
        return [*((name, said) for name, said in found.items() if said), *(("warning", said) for said in self.warnings)]


class History(tuple[Move, ...], Shown):
    """Moves of a channel, the oldest first: a tuple that prints as a table, the newest on top."""

    @property
    def title(self) -> str:
        """Which channel, and how often it was moved."""
        if not self:
            return "never moved"
        return f"{self[-1].model} {self[-1].channel}: {len(self)} {'moves' if len(self) > 1 else 'move'}"

    @property
    def rows(self) -> Iterable[tuple[str, str]]:
        """A line for each move."""
        for move in reversed(self):
            what = "back to" if move.rollback else "to"
            yield str(move.generation), f"{move.moved_at}  {what} {move.release}  {move.by}: {move.why}"

    def __repr__(self) -> str:
        return str(self)
