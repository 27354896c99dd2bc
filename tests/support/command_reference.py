"""docs/commands.md, from the commands as they are parsed.

python -m tests.support.command_reference > docs/commands.md
"""

from __future__ import annotations

from typing import Any

import typer

from train_and_ship.ship.examples import EXAMPLES
from train_and_ship.ship.main import CARE, RELEASES, SERVING, STACK, START, TRAINING, app

TITLE = """# Commands

What `ship COMMAND --help` says, made of the same definitions. All exit with 0 when it is done, 2 for something that you
can mend, 1 for anything else ([more](when-it-goes-wrong.md)).
"""


def page() -> str:
    """The page as markdown."""
    group = typer.main.get_command(app)
    panels = (START, STACK, TRAINING, SERVING, RELEASES, CARE)
    sections = [_section(panel, group) for panel in panels]
    return "\n".join([TITLE, *sections])


def _section(panel: str, group: Any) -> str:
    commands = [
        (name, command) for name, command in group.commands.items() if getattr(command, "rich_help_panel", "") == panel
    ]
    return "\n".join([f"## {panel}", "", *(_command(name, command) for name, command in commands)])


def _command(name: str, command: Any) -> str:
    if hasattr(command, "commands"):
        return "\n".join(_command(f"{name} {below}", part) for below, part in command.commands.items())
    context = command.context_class(command, info_name=f"ship {name}")
    usage = " ".join([f"ship {name}", *command.collect_usage_pieces(context)])
    lines = [f"### ship {name}", "", (command.help or "").replace("\f", "").strip(), "", "```text", usage, "```", ""]
    rows = [_row(parameter) for parameter in command.params if parameter.name != "help"]
    if rows:
        lines += ["| option or argument | meaning | default |", "|---|---|---|", *rows, ""]
    if examples := EXAMPLES.get(name):
        lines += ["```text", *examples, "```", ""]
    return "\n".join(lines)


def _row(parameter: Any) -> str:
    names = [*parameter.opts, *parameter.secondary_opts] if parameter.param_type_name == "option" else []
    shown = ", ".join(f"`{name}`" for name in names) or f"`{parameter.metavar or parameter.name.upper()}`"
    default = parameter.default
    said = "**required**" if parameter.required else "–" if default in (None, "", False) else f"`{default}`"
    meaning = " ".join((getattr(parameter, "help", None) or "–").split())
    return f"| {shown} | {meaning} | {said} |".replace("\\|", "|")


if __name__ == "__main__":
    print(page(), end="")
