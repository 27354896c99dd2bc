"""Turning what went wrong in a worker process into one message a person can act on."""

from __future__ import annotations

import contextlib
import linecache
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

from torchworker.contract import Failure


class UserError(Exception):
    """The user's code, data or configuration is at fault. The message says what, where, expected, got."""


class DescribedError(Exception):
    """A failure in another process (a rank, an exporter) that is already described."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


ENVIRONMENT = tuple({sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")})

LIBRARIES = tuple({sysconfig.get_path(kind) for kind in ("platlib", "purelib")})
OWN = ("torch", "sympy", "torchworker")
"""Lines of these say nothing of a model: torch works out sizes with sympy."""


def is_theirs(path: str, folder: Path) -> bool:
    """Inside the user's folder, and not in the Python environment, which may itself be inside it (a `.venv`)."""
    return Path(path).is_relative_to(folder) and not any(Path(path).is_relative_to(place) for place in ENVIRONMENT)


def _is_inside(frame: traceback.FrameSummary, folder: Path) -> bool:
    return is_theirs(frame.filename, folder)


def user_frames(trace: TracebackType | None, folder: str) -> list[traceback.FrameSummary]:
    """Frames of a traceback from the first one in the user's folder on; empty when none is theirs."""
    if not folder:
        return []
    frames = traceback.extract_tb(trace)
    root = Path(folder)
    for position, frame in enumerate(frames):
        if _is_inside(frame, root):
            return list(frames[position:])
    return []


def user_line(error: BaseException, folder: str) -> str:
    """` (digits.py:31, in forward: self.classify(x))` for the deepest line of theirs, or an empty string.

    Where it came from an installed library that they called, its line too: ` (model.py:12, in forward: self.encode(x);
    in transformers/models/bert/modeling_bert.py:123, in forward: …)`.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({Path(error.filename).name}:{error.lineno})"
    trace = reversed(list(traceback.walk_tb(error.__traceback__)))
    return line_of(((frame.f_code.co_filename, number, frame.f_code.co_name) for frame, number in trace), folder)


def line_of(lines: Iterable[tuple[str, int, str]], folder: str) -> str:
    """As `user_line`, for files with numbers of lines and names of functions, the innermost first."""
    root, library = Path(folder), ""
    for path, number, function in lines:
        if folder and is_theirs(path, root):
            return f" ({_shown(path, root, number, function)}{library})"
        place = "" if library else _library_of(path)
        if place:
            library = f"; in {_shown(path, Path(place), number, function)}"
    return f" ({library.removeprefix('; ')})" if library else ""


def _shown(path: str, root: Path, number: int, function: str) -> str:
    return f"{Path(path).relative_to(root)}:{number}, in {function}: {linecache.getline(path, number).strip()}"


def _library_of(path: str) -> str:
    """The folder of installed libraries that holds a file; empty for another, for torch's own and for ours."""
    for place in LIBRARIES:
        if Path(path).is_relative_to(place):
            return "" if Path(path).relative_to(place).parts[0] in OWN else place
    return ""


def describe(error: BaseException) -> str:
    """`ValueError: text`, on one line unless the text has several."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def user_error(what: str, error: BaseException, folder: str) -> UserError:
    """A UserError that names what failed, the error and the line of theirs it came from."""
    mistake = UserError(f"{what}: {describe(error)}{user_line(error, folder)}")
    mistake.__cause__ = error
    return mistake


@contextlib.contextmanager
def as_user_error(what: str, folder: str, kinds: tuple[type[BaseException], ...] = (Exception,)) -> Iterator[None]:
    """Around a call of the user's code: what it raises becomes a UserError, unless it is one.

    Args:
        what: what failed then, in words.
        folder: where the user's code is.
        kinds: of exceptions that are theirs.

    Raises:
        UserError: with the error and the user's line.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise user_error(what, error, folder) from error


def failure_of(error: BaseException, folder: str, rank: int | None = None) -> Failure:
    """The Failure that a reply carries for this exception."""
    if isinstance(error, UserError):
        cause = error.__cause__
        frames = user_frames(cause.__traceback__, folder) if cause is not None else []
        listing = "".join(traceback.format_list(frames))
        if cause is not None and listing:
            listing += describe(cause)
        return Failure(kind="user", message=str(error), traceback=listing, rank=rank)
    frames = user_frames(error.__traceback__, folder)
    if frames:
        listing = "".join(traceback.format_list(frames)) + describe(error)
        return Failure(
            kind="user", message=f"{describe(error)}{user_line(error, folder)}", traceback=listing, rank=rank
        )
    return Failure(
        kind="worker", message=describe(error), traceback="".join(traceback.format_exception(error)), rank=rank
    )


MISSING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
"""What the system says of a wrong path: it will say so again."""
MACHINE_WORDS = ("out of memory", "can't allocate memory", "DataLoader worker (pid")
"""In a RuntimeError of torch: no memory, on whatever device, or a loading process that was killed for it."""


def may_pass(error: BaseException) -> bool:
    """Whether it is memory, a disk or a connection that failed, in whoever's code: it may not happen again."""
    if isinstance(error, UserError):
        # What was raised in their code, and not what we say of it.
        return error.__cause__ is not None and may_pass(error.__cause__)
    if isinstance(error, OSError):
        return not isinstance(error, MISSING)
    words = str(error) if isinstance(error, RuntimeError) else ""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(part in words for part in MACHINE_WORDS)


def place_of(error: BaseException) -> str:
    """`ValueError at torch.py:12 < results.py:60 < loop.py:140`: the same when the same goes wrong again."""
    frames = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    return f"{type(error).__name__} at {' < '.join(reversed(frames))}"


_LOST = (
    "gloo",
    "connection closed by peer",
    "connection reset by peer",
    # Where a collective that runs in the background was the first to notice.
    "application timeout caused pair closure",
)
"""Gloo's words, some of which do not name it."""


def is_lost_connection(error: BaseException | None) -> bool:
    """Whether another rank went away: what torch raises for that, also when user code was in the middle of a call.

    A connection of the user's own (to a database, say) raises other types, or lacks gloo's words.
    """
    while error is not None:
        words = str(error).lower()
        lost = any(said in words for said in _LOST)
        if isinstance(error, dist.DistError) or (type(error) is RuntimeError and lost):
            return True
        error = error.__cause__
    return False
