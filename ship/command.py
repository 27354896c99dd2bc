"""What every command says of words that are too many: which options they may belong to."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand


class Command(TyperCommand):
    """A command that tells what it takes where Typer's own says `unexpected extra argument` and no more."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The words that no parameter took: none, as they are a mistake."""
        ctx.allow_extra_args = True
        rest: list[str] = super().parse_args(ctx, args)
        if rest and not ctx.resilient_parsing:
            ctx.fail(self._too_many(rest))
        return rest

    def _too_many(self, rest: list[str]) -> str:
        takes = [str(item.name).upper() for item in self.params if item.param_type_name == "argument"]
        options = [item for item in self.params if item.param_type_name == "option"]
        # What a value follows; others are switches.
        valued = [item.opts[0] for item in options if not getattr(item, "is_flag", False)]
        expected = f"{' '.join(takes)} alone" if takes else "no argument"
        got = " ".join(map(repr, rest))
        named = f"; what it is says an option before it: {', '.join(valued)}" if valued else ""
        return f"expected {expected}, got {got}{' as well' if takes else ''}{named}"
