"""What can go wrong, as one tree.

    ShipError                 retryable: can the same call succeed later?
    ├── UserError             the user's own mistake: one message, no traceback, never retried
    │   ├── JobError          the job file or something it refers to
    │   ├── SettingsError     ports, addresses, credentials, buckets
    │   ├── RequestError      what was asked for is not there, or cannot be done now
    │   └── GateError         a gate refused the candidate
    ├── ServiceError          Prefect, MLflow or the bucket did not answer: retried
    │   ├── StoreFaultError   the object store answered with a fault: its status says whether a retry can help
    │   └── StoreRefusedError the object store cannot keep the promises promotion needs: never retried
    ├── PreconditionFailedError  a conditional write did not happen, or its outcome has to be read
    ├── ReleaseError          a release is incomplete, altered or moved under us: never retried
    └── WorkerError           a child process died without giving a reason: retried, unless that was done already

Every message says what was expected, what was found and what to do.
"""

from __future__ import annotations

from train_and_ship.infra.addresses import without_password
from train_and_ship.infra.shown import harmless


class ShipError(Exception):
    """Base of every error this application raises on purpose.

    `retryable` is the only thing a retry policy may read.
    """

    retryable = False

    def __init__(self, message: str = "") -> None:
        # Errors reach logs, terminals, reports in the bucket and tags, and quote what others wrote.
        super().__init__(harmless(without_password(message)))


class UserError(ShipError):
    """Something the user can mend; shown as one message without a traceback."""

    def _render_traceback_(self) -> list[str]:
        """For IPython and notebooks, which ask for it."""
        return [f"{type(self).__name__}: {self}", *getattr(self, "__notes__", ())]


class JobError(UserError):
    """The job file, or code or data that it refers to, is not usable."""


class SettingsError(UserError):
    """An address, port, bucket or credential is not usable."""


class RequestError(UserError):
    """A command named something that is not there, or asked for what cannot be done as things are."""


class GateError(UserError):
    """A candidate failed a gate. `message` says which; `table` shows the numbers and the thresholds."""

    def __init__(self, message: str, table: str = "") -> None:
        super().__init__(message if not table else f"{message}\n\n{table}")
        self.message, self.table = (harmless(without_password(text)) for text in (message, table))


class ServiceError(ShipError):
    """A service that should be there did not answer or answered with a fault."""

    retryable = True


class AnsweredError(ServiceError):
    """A service that answers refused what was asked: asking it for something else may do."""


class StoreFaultError(ServiceError):
    """The object store answered with a fault. `status` is the HTTP status."""

    def __init__(self, message: str, *, status: int, code: str) -> None:
        super().__init__(message)
        self.status = status
        # Any other 4xx says that the same request will never do; 501 says so too.
        self.retryable = (status >= 500 and status != 501) or status in (408, 425, 429) or code in _DAMAGED_CODES


_DAMAGED_CODES = frozenset(["BadDigest", "InvalidDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"])
"""The body was not what was sent."""


class StoreRefusedError(ServiceError):
    """The object store ignores conditional writes, so promotion could lose an update."""

    retryable = False


class PreconditionFailedError(ShipError):
    """A conditional write did not happen, or its outcome has to be read: 412 or 409.

    After a reply was lost, the client's own repetition gets this answer for a write that did happen.
    """


class ReleaseError(ShipError):
    """A release is missing files, was altered, or is not the one that was asked for."""


class WorkerError(ShipError):
    """A child process ended without a result (killed, out of memory, crashed)."""

    def __init__(self, message: str, *, retryable: bool = True) -> None:
        """retryable: False when its retries are used up."""
        super().__init__(message)
        self.retryable = retryable
