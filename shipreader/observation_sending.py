"""How files of observations get into the bucket: each by one PUT, which may be repeated; or over a folder.

A server without a right to the bucket leaves its files in a folder (`Folder.put`), and another process brings them away
(`Forwarder`): what waits there outlives both.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shipreader.durable import make_folders, write_durably
from shipreader.observation_files import FILE_BYTES, FILE_NAME, observations_prefix

Put = Callable[[str, bytes], None]
"""Write a file, by its name below the model's prefix. Raises whatever it likes, and is called again later."""
LOOK_SECONDS, LONGEST_PAUSE_SECONDS, CLOSE_SECONDS = 1.0, 60.0, 5.0
"""Between two looks at the folder; at most, while the bucket is away; for what is left at the end."""
OBSERVATIONS = "observations"
"""The folder's name, beside the log of `ship serve`."""
FOLDER_BYTES = 256 * 2**20
"""What may wait in a folder; the oldest file goes first."""

_log = logging.getLogger(__name__)


def put_once(client: Any, bucket: str, key: str, body: bytes, conditional: bool = True) -> bool:
    """Write an object that is named by its content, in one PUT; one that is there already is the same.

    Args:
        client: boto3's.
        bucket: its name.
        key: of the object.
        body: its bytes.
        conditional: whether the store is asked not to write it a second time, which would make it newer.

    Returns:
        Whether the store knows that condition.

    Raises:
        Exception: what the client raises.
    """
    condition = {"IfNoneMatch": "*"} if conditional else {}
    try:
        client.put_object(Bucket=bucket, Key=key, Body=body, **condition)
    except client.exceptions.ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if conditional and status in (400, 501):
            client.put_object(Bucket=bucket, Key=key, Body=body)
            return False
        if status != 412:
            raise
    return conditional


class Folder:
    """Files of observations that wait on this machine, each under its name with `_` for the slash."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def put(self, name: str, body: bytes) -> None:
        """Leave a file. Raises OSError."""
        make_folders(self.path)
        write_durably(self.path / name.replace("/", "_"), body)

    def waiting(self) -> list[tuple[Path, str, int]]:
        """What is there, the oldest first: path, name and size in bytes. What has no such name is left alone."""
        found = []
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for path in self.path.iterdir():
                name = path.name.replace("_", "/", 1)
                with contextlib.suppress(FileNotFoundError):
                    if FILE_NAME.fullmatch(name) and path.is_file() and not path.is_symlink():
                        status = path.stat()
                        found.append((status.st_mtime, path, name, status.st_size))
        return [(path, name, size) for _, path, name, size in sorted(found)]


class Forwarder:
    """Brings away what another process leaves in a folder, in a thread, until it is closed."""

    def __init__(self, model: str, *, bucket: str, client: Any, folder: Path, limit: int = FOLDER_BYTES) -> None:
        """What is brought where.

        Args:
            model: whose observations they are.
            bucket: the bucket's name.
            client: boto3's.
            folder: where they are left.
            limit: bytes that may wait there.

        Raises:
            ReaderError: a name that no model has.
        """
        self._model, self._prefix = model, observations_prefix(model)
        self._bucket, self._client, self._conditional = bucket, client, True
        self._folder, self._limit = Folder(folder), limit
        self.problem = ""
        """Why nothing can be brought away at the moment."""
        self.dropped = 0
        """Files, for want of room."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"observations-{model}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """Bring away what is there, for a few seconds at most; the rest waits for the next start."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        ends = time.monotonic() + CLOSE_SECONDS
        while not self.send(ends) and time.monotonic() + 0.5 < ends:
            time.sleep(0.5)

    def send(self, ends: float | None = None) -> bool:
        """Try to bring all of it away, before this time on the monotonic clock. Returns whether that was done."""
        waiting = self._folder.waiting()
        total = sum(size for _, _, size in waiting)
        for path, name, size in waiting:
            try:
                if size > FILE_BYTES or total > self._limit:
                    self._drop(path, "too many wait for the bucket" if total > self._limit else "it is too long")
                elif not self.problem or ends is not None or path is waiting[0][0]:
                    key = self._prefix + name
                    self._conditional = put_once(self._client, self._bucket, key, path.read_bytes(), self._conditional)
                    path.unlink(missing_ok=True)
                    if self.problem:
                        _log.warning("%s: observations are written again", self._model)
                    self.problem = ""
            except FileNotFoundError:
                # Another process brings away the same.
                continue
            except Exception as error:
                if not self.problem:
                    _log.error(
                        "%s: observations cannot be written, and wait in %s: %s", self._model, path.parent, error
                    )
                self.problem = " ".join(str(error).split())[:500] or repr(error)
            total -= size
            if ends is not None and (self.problem or time.monotonic() > ends):
                return False
        return not self.problem

    def _drop(self, path: Path, why: str) -> None:
        path.unlink(missing_ok=True)
        self.dropped += 1
        if self.dropped == 1:
            _log.warning("%s: observations are dropped: %s", self._model, why)

    def _work(self) -> None:
        pause = LOOK_SECONDS
        while not self._stopping.wait(pause):
            try:
                pause = LOOK_SECONDS if self.send() else min(LONGEST_PAUSE_SECONDS, 2 * pause)
            except Exception:
                # Whatever it is, a thread that ended would leave all files behind without a word.
                _log.exception("%s: observations cannot be brought away", self._model)
