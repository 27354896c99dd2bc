"""docs/modules.md: a line for each file of the product, from the first line of its docstring.

    python -m tests.support.module_map > docs/modules.md

Folders are in the order in which a newcomer should read them. In a folder, what others build on comes first.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.support.import_graph import floors, graph, inside
from tests.support.projects import REPOSITORY

HEAD = """# Every file, in a line

In the order in which a newcomer should read: the story first, then what it stands on. In a folder, what others build on
comes first. [architecture.md](architecture.md) has the picture, [glossary.md](glossary.md) the words. The sentences are
the first lines of the files' docstrings; `python -m tests.support.module_map > docs/modules.md` writes this page.
"""
FOLDERS = {
    "flows": "The story: one file a flow, read aloud.",
    "tasks": "One file a stage: Prefect policy around one call into the layers below.",
    "registry": "What a release is, and where it lives. These stand beside the rooms.",
    "registry/job": "What a job file says.",
    "registry/release": "What a release is, on disk; nothing here talks to a store.",
    "registry/bucket": "What lies in the bucket, and how it gets there.",
    "registry/channels": "What is live, what was, and how it moves.",
    "registry/observations": "What servers say of the requests that they have answered, read from the bucket.",
    "registry/rollouts": "A release that answers a share of the requests before it is live.",
    "registry/tracking": "MLflow: the only room that imports it.",
    "registry/data": "Checks, drift and snapshots of data.",
    "registry/decision": "What decides a rollout: rows in, a verdict out.",
    "registry/report": "Pages, charts and their sections.",
    "registry/serving": "Copies of a release in the layouts of other servers.",
    "registry/maintenance": "What `ship doctor` and `ship gc` do.",
    "torchworker": "What runs beside the user's model; these are started as processes.",
    "torchworker/stages": "One file for each stage that a process can run.",
    "torchworker/process": "Forks, events and failures of a process.",
    "torchworker/project": "The user's code: imported, called, and told from ours.",
    "torchworker/data": "Datasets: loaded, sharded, fingerprinted.",
    "torchworker/training": "The built-in training loop; it never sees how the model will be judged.",
    "torchworker/custom_loop": "What a training loop of the user's gets and must give back.",
    "torchworker/exporters": "One file a format: from the trained model to an artifact.",
    "torchworker/runtimes": "Artifacts loaded and called, in Python and without it.",
    "torchworker/parity": "Whether an artifact equals its model: questions, references, the rule.",
    "torchworker/gates": "Limits on quality, speed and size, and how sure a difference is.",
    "infra": "Everything that touches machines: settings, processes, the object store, the local stack.",
    "infra/launchers": "Training on several machines: each engine as a value.",
    "infra/doors": "What stands in front of the servers of the local stack: who may ask them.",
    "ship": "The command line and the Prefect plugin.",
    "api": "What is imported in Python beside the command line; nothing of the rest imports it.",
    "shipreader": "What follows a channel on a serving machine; installed alone.",
}
"""Folder to what is in it, in the order of reading."""


def page() -> str:
    """The whole page, as markdown."""
    return "\n".join([HEAD, *_lines()]).rstrip("\n") + "\n"


def _lines() -> Iterator[str]:
    whole = graph()
    unknown = {file.rpartition("/")[0] for file in whole} - FOLDERS.keys()
    assert not unknown, f"folders without a sentence: {sorted(unknown)}"
    for folder, sentence in FOLDERS.items():
        part = inside(whole, folder)
        yield f"## {folder}/\n\n{sentence}\n\n| file | what it is |\n|---|---|"
        # Floor by floor: what others build on comes first.
        for _, file in sorted((floor, file) for file, floor in floors(part).items()):
            path, name = file.rsplit("/", 1)
            if path == folder:
                yield f"| [{name}](../{file}) | {first_line(file)} |"
        yield ""


def first_line(file: str) -> str:
    """Of the docstring of a file of the repository."""
    docstring = ast.get_docstring(ast.parse((REPOSITORY / file).read_text()))
    assert docstring, f"{file} has no docstring"
    return docstring.partition("\n")[0]


if __name__ == "__main__":
    print(page(), end="")
