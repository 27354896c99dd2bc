"""A power cut after any operation of a program on a folder: what could then be found there.

A library that the program is started with (power_cut.c) writes the operations down. A file keeps what it held when it
was last synced, a name is on the disk when its folder was synced since; whatever else was done may have happened or
not. So each moment has several states, and from every one the component under test has to come up with the right
result.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from tests.support.projects import REPOSITORY

SOURCE = Path(__file__).with_suffix(".c")
MARK = ".promised-"
"""What a program under test makes a folder of, to say what it has promised to be there from now on."""


class Left(StrEnum):
    """What of that which was not synced is there."""

    NOTHING = "nothing"
    NAMES = "names, of empty files"
    HALF = "names, of half of the content"
    ALL = "everything, as after a kill"


@dataclass(frozen=True)
class State:
    """What a power cut could leave."""

    after: int
    """So many operations."""
    left: Left
    promised: frozenset[str]
    """What the program had promised by then."""
    tree: tuple[tuple[str, bytes | str | None], ...]
    """Path to the content of a file, the target of a link, or None for a folder."""

    def put(self, folder: Path) -> Path:
        """Make it in a new folder."""
        folder.mkdir(parents=True)
        for name, what in self.tree:
            path = folder / name
            if what is None:
                path.mkdir()
            elif isinstance(what, str):
                path.symlink_to(what)
            else:
                path.write_bytes(what)
        return folder

    def __str__(self) -> str:
        return f"after {self.after} operations, of what was not synced: {self.left}"


def promise(folder: Path, what: str) -> None:
    """Said by the program under test: this has to be there from now on, whatever happens."""
    (folder / f"{MARK}{what}").mkdir()


def cut_everywhere(program: str, folder: Path, *words: str) -> list[State]:
    """Run `python -c program folder words…` and give every state that a power cut could have left of the folder.

    Args:
        program: Python; `sys.argv[1:]` are the folder and the words.
        folder: a new one.
        words: more arguments.
    """
    folder.mkdir(parents=True)
    return list(states(recorded([sys.executable, "-c", program, str(folder.resolve()), *words], folder.resolve())))


def recorded(command: Sequence[str], folder: Path) -> list[Operation]:
    """What a command does to a folder. folder: an empty one, without links in its path."""
    with tempfile.TemporaryDirectory() as elsewhere:
        journal = Path(elsewhere) / "journal"
        environment = {
            **os.environ,
            "LD_PRELOAD": str(_library()),
            # Of a family of names that every worker process inherits.
            "PYTHON_POWER_ROOT": str(folder),
            "PYTHON_POWER_JOURNAL": str(journal),
        }
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        operations = _read(journal.read_bytes())
    assert operations, "the library saw nothing"
    return operations


@functools.cache
def _library() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="power-cut-"))
    library = folder / "power_cut.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl", "-lpthread"], check=True)
    return library


@dataclass(frozen=True)
class Operation:
    """One call of the program, as power_cut.c wrote it down."""

    what: str
    inode: int
    name: str
    other: str
    data: bytes


def _read(journal: bytes) -> list[Operation]:
    found, at = [], 0
    while at < len(journal):
        end = journal.index(b"\n", at)
        what, *numbers = journal[at:end].decode().split()
        inode, *sizes = map(int, numbers)
        at, parts = end + 1, []
        for size in sizes:
            parts.append(journal[at : at + size])
            at += size
        found.append(Operation(what, inode, parts[0].decode(), parts[1].decode(), parts[2]))
    return found


@dataclass(eq=False)
class _File:
    inode: int
    synced: bytes = b""
    written: bytes = b""
    dirty: bool = True


@dataclass(eq=False)
class _Folder:
    now: dict[str, _Node] = field(default_factory=dict)
    synced: dict[str, _Node] = field(default_factory=dict)


_Node = _File | _Folder | str


class _Disk:
    """The folder as programs see it, and as it is on the disk."""

    def __init__(self) -> None:
        self.root = _Folder()
        self.promised: frozenset[str] = frozenset()

    def do(self, operation: Operation) -> None:
        name = operation.name
        match operation.what:
            case "mkdir" if MARK in name:
                self.promised |= {name.rpartition(MARK)[2]}
            case "mkdir":
                self._put(name, _Folder())
            case "create":
                self._put(name, _File(operation.inode))
            case "symlink":
                self._put(name, operation.other)
            case "remove":
                parent, last = self._parent(name)
                parent.now.pop(last, None)
            case "rename":
                node = self._file_or_folder(operation)
                parent, last = self._parent(name)
                del parent.now[last]
                self._put(operation.other, node)
            case "link":
                self._put(operation.other, self._file_or_folder(operation))
            case "sync-folder":
                found = self._at(name)
                assert isinstance(found, _Folder)
                found.synced = dict(found.now)
            case _:
                self._write(operation)

    def _write(self, operation: Operation) -> None:
        file = self._file_or_folder(operation)
        assert isinstance(file, _File), operation
        match operation.what:
            case "truncate":
                file.written, file.dirty = b"", True
            case "open":
                file.dirty = True
            case "close":
                file.written, file.dirty = operation.data, file.dirty and operation.data != file.synced
            case "sync":
                file.synced = file.written = operation.data
                file.dirty = False

    def tree(self, left: Left) -> tuple[tuple[str, bytes | str | None], ...]:
        return tuple(self._below(self.root, "", left))

    def _below(self, folder: _Folder, prefix: str, left: Left) -> Iterator[tuple[str, bytes | str | None]]:
        for name, node in sorted((folder.synced if left == Left.NOTHING else folder.now).items()):
            if isinstance(node, _Folder):
                yield prefix + name, None
                yield from self._below(node, f"{prefix}{name}/", left)
            else:
                yield prefix + name, node if isinstance(node, str) else _content(node, left)

    def _put(self, name: str, node: _Node) -> None:
        parent, last = self._parent(name)
        parent.now[last] = node

    def _file_or_folder(self, operation: Operation) -> _Node:
        """What has a name. Some libraries call the kernel by themselves: a file that is not known had another name, or
        is new."""
        parent, last = self._parent(operation.name)
        if last not in parent.now:
            had = [name for name, node in parent.now.items() if getattr(node, "inode", 0) == operation.inode]
            parent.now[last] = parent.now.pop(had[0]) if had else _File(operation.inode)
        return parent.now[last]

    def _parent(self, name: str) -> tuple[_Folder, str]:
        above, _, last = name.rpartition("/")
        found = self._at(above or ".")
        assert isinstance(found, _Folder), name
        return found, last

    def _at(self, name: str) -> _Node:
        found: _Node = self.root
        for part in name.split("/") if name != "." else ():
            assert isinstance(found, _Folder), name
            found = found.now[part]
        return found


def _content(file: _File, left: Left) -> bytes:
    if left == Left.ALL:
        return file.written
    if not file.dirty or left == Left.NOTHING:
        return file.synced
    return b"" if left == Left.NAMES else file.written[: (len(file.written) + 1) // 2]


def states(operations: Sequence[Operation], moments: Collection[int] | None = None) -> Iterator[State]:
    """What a power cut could leave, each once: most operations change nothing of that.

    Args:
        operations: in their order.
        moments: after so many of them; None for all.
    """
    disk, seen = _Disk(), set()
    for after in range(len(operations) + 1):
        if after:
            disk.do(operations[after - 1])
        for left in Left if moments is None or after in moments else ():
            state = State(after, left, disk.promised, disk.tree(left))
            if (what := (state.promised, state.tree)) not in seen:
                seen.add(what)
                yield state
