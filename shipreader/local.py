"""The folder on a serving machine.

    <folder>/releases/<release>/            files and MANIFEST.json, complete and verified since it has this name
    <folder>/releases/<release>.sig.json    the signature that was checked, where one is required
    <folder>/current -> releases/<release>  what to serve; replaced by one rename
    <folder>/state.json                     the pointer that `current` follows, so that a restart goes on from there
    <folder>/candidate.json                 which release a rollout tries beside it: it stays here too

One process at a time changes it, under a lock that the kernel frees when the process dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from shipreader.durable import make_folders, rename_durably, set_aside, sync, write_durably
from shipreader.errors import ReaderError, RefusedError, UnavailableError
from shipreader.records import MANIFEST, FileEntry, Manifest, Pointer, decode_manifest, files_below, room

CURRENT = "current"
LOCK_SECONDS = 600.0
"""To wait for another process that brings a release to the folder; a large one takes minutes."""
PATIENCE_SECONDS, LOCK_LOOK_SECONDS = 2.0, 0.1
"""Until the waiting is worth a word; between two tries."""
_DRAFT = ".draft-"


@dataclass(frozen=True)
class State:
    """What this folder followed last."""

    bucket: str
    pointer: Pointer
    etag: str
    """Of the pointer's object."""
    previous: str | None
    """The release that `current` led to before; kept beside it."""


class LocalFolder:
    """Raises ReaderError for a folder that something else made, and OSError for what the disk refuses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().absolute()
        self._releases = self.folder / "releases"

    @contextlib.contextmanager
    def locked(
        self, waiting: Callable[[str], None] = lambda words: None, stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[None]:
        """Alone with the folder, which is made when it is missing.

        Args:
            waiting: told once when another process has held the folder for a while.
            stopped: whether to give up waiting.

        Raises:
            UnavailableError: another process has held it for `LOCK_SECONDS`, or `stopped`.
        """
        try:
            make_folders(self._releases)
        except (FileExistsError, NotADirectoryError):
            raise ReaderError(f"expected a folder for releases at {self.folder}, got a file in its place") from None
        # Not emptied before it is ours: it says whose it is.
        with (self.folder / ".lock").open("a+") as lock:
            self._take(lock, waiting, stopped)
            with contextlib.suppress(OSError):
                lock.truncate(0)
                lock.write(str(os.getpid()))
                lock.flush()
            yield

    def _take(self, lock: TextIO, waiting: Callable[[str], None], stopped: Callable[[], bool]) -> None:
        began, noted = time.monotonic(), False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                waited = time.monotonic() - began
                lock.seek(0)
                holder = f"{self.folder}: another process ({lock.read(20).strip() or 'unknown'}) is at work in it"
                if waited > LOCK_SECONDS or stopped():
                    raise UnavailableError(f"{holder}, and has not ended within {waited:.0f} s") from None
                if waited > PATIENCE_SECONDS and not noted:
                    waiting(f"{holder}; waiting for it")
                    noted = True
                time.sleep(LOCK_LOOK_SECONDS)

    def state(self) -> State | None:
        """None for a new folder, and for one whose state is torn, which is set aside: the channel is followed anew."""
        path = self.folder / "state.json"
        try:
            document = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            set_aside(path, f"it cannot be read ({error}), and the channel is followed anew")
            return None
        try:
            return State(**{**document, "pointer": Pointer(**document["pointer"])})
        except (TypeError, KeyError) as error:
            raise ReaderError(
                f"{path}: expected what a reader wrote, got {error}; delete {self.folder} to begin anew"
            ) from None

    def release(self, name: str) -> Path:
        """Where a release is, or would be."""
        return self._releases / name

    def signature(self, name: str) -> Path:
        """Where the signature of a release is, or would be."""
        return self._releases / f"{name}.sig.json"

    def verified(self, pointer: Pointer) -> Manifest:
        """Read every byte of a release that is here. Raises RefusedError for anything but exactly its files."""
        folder = self.release(pointer.release)
        found = dict(files_below(folder))
        if MANIFEST not in found:
            raise RefusedError(f"{folder}: expected {MANIFEST}, got none")
        manifest = decode_manifest(found.pop(MANIFEST).read_bytes(), pointer)
        for name in sorted(found.keys() | manifest.files.keys()):
            if name not in manifest.files or name not in found:
                raise RefusedError(f"{folder / name}: expected {'a' if name in manifest.files else 'no such'} file")
            _require_file(found[name], manifest.files[name])
        return manifest

    def add(self, manifest: Manifest, bring: Callable[[Path, Mapping[str, FileEntry]], None]) -> None:
        """Make a release appear, complete, by one rename. `bring` fills a new folder with its verified files."""
        free = shutil.disk_usage(self.folder).free
        if (needed := room(manifest.files)) > free:
            raise RefusedError(
                f"{manifest.model} {manifest.release}: expected room for {needed:,} bytes "
                f"in {self.folder}, got {free:,}"
            )
        draft = self._releases / f"{_DRAFT}{uuid.uuid4().hex}"
        try:
            draft.mkdir()
            for name in manifest.files:
                (draft / name).parent.mkdir(parents=True, exist_ok=True)
            bring(draft, manifest.files)
            (draft / MANIFEST).write_bytes(manifest.encoded)
            # One that is here is damaged. It is not kept: every byte of it is in the bucket.
            self.remove(manifest.release)
            rename_durably(draft, self.release(manifest.release))
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Take a release away, whole, by one rename, and then its bytes."""
        dead = self._releases / f"{_DRAFT}{uuid.uuid4().hex}"
        try:
            self.release(name).rename(dead)
        except FileNotFoundError:
            return
        shutil.rmtree(dead)

    def switch(self, state: State) -> None:
        """Make `current` lead to a release that is here."""
        # The state first: `current` is made to follow it when this process dies between the two.
        write_durably(self.folder / "state.json", json.dumps(asdict(state), indent=1).encode())
        self.point(state.pointer.release)

    def point(self, name: str) -> None:
        """Make `current` the link to this release."""
        current, target = self.folder / CURRENT, f"releases/{name}"
        if current.is_symlink():
            if str(current.readlink()) == target:
                return
        elif current.exists():
            raise ReaderError(f"{current}: expected a link made by a reader, got something else; choose another folder")
        draft = self.folder / f"{_DRAFT}{uuid.uuid4().hex}"
        draft.symlink_to(target)
        draft.replace(current)
        sync(self.folder)

    def note_candidate(self, release: str, generation: int) -> None:
        """Keep a release that is tried beside what this generation has live.

        It stays, also when its rollout is over, until another one is noted or the channel has moved twice: other
        processes read it until they look.
        """
        if self._candidate() != (release, generation):
            document = {"release": release, "generation": generation}
            write_durably(self.folder / "candidate.json", json.dumps(document).encode())

    def kept_candidate(self, generation: int) -> set[str]:
        """The id of the candidate that stays here while this generation is live, or nothing."""
        release, extended = self._candidate()
        return {release} if release and generation <= extended + 1 else set()

    def _candidate(self) -> tuple[str, int]:
        try:
            document = json.loads((self.folder / "candidate.json").read_bytes())
            return str(document["release"]), int(document["generation"])
        except (OSError, ValueError, TypeError, KeyError):
            # Whichever it was, it can be brought again.
            return "", 0

    def prune(self, keep: set[str]) -> None:
        """Delete every other release, and what dead readers left behind."""
        for path in self._releases.iterdir():
            if path.name.startswith(_DRAFT):
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.removesuffix(".sig.json") not in keep:
                if path.is_dir():
                    self.remove(path.name)
                else:
                    path.unlink()


def _require_file(path: Path, entry: FileEntry) -> None:
    got = FileEntry.of(path)
    if got != entry:
        raise RefusedError(
            f"{path}: expected {entry.bytes:,} bytes with SHA-256 {entry.sha256}, got {got.bytes:,} with {got.sha256}"
        )
