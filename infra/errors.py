"""What can go wrong, as one tree.

    ShipError                 retryable: can the same call succeed later?
    ├── UserError             the user's own mistake: one message, no traceback, never retried
    │   ├── JobError          the job file or something it refers to
    │   ├── SettingsError     ports, addresses, credentials, buckets
    │   └── GateError         a gate refused the candidate
    ├── ServiceError          Prefect, MLflow or the bucket did not answer: retried
    │   └── StoreRefused      the object store cannot keep the promises promotion needs: never retried
    ├── ReleaseError          a release is incomplete, altered or moved under us: never retried
    └── WorkerError           a child process died without giving a reason: retried

Every message says what was expected, what was found and what to do.
"""

from __future__ import annotations


class ShipError(Exception):
    """Base of every error this application raises on purpose.

    `retryable` is the only thing a retry policy may read.
    """

    retryable = False


class UserError(ShipError):
    """Something the user can mend; shown as one message without a traceback."""


class JobError(UserError):
    """The job file, or code or data that it refers to, is not usable."""


class SettingsError(UserError):
    """An address, port, bucket or credential is not usable."""


class GateError(UserError):
    """A candidate failed a gate. `table` shows the numbers and the thresholds."""

    def __init__(self, message: str, table: str = "") -> None:
        super().__init__(message if not table else f"{message}\n\n{table}")
        self.table = table


class ServiceError(ShipError):
    """A service that should be there did not answer or answered with a fault."""

    retryable = True


class StoreRefused(ServiceError):
    """The object store ignores conditional writes, so promotion could lose an update."""

    retryable = False


class ReleaseError(ShipError):
    """A release is missing files, was altered, or is not the one that was asked for."""


class WorkerError(ShipError):
    """A child process ended without a result (killed, out of memory, crashed)."""

    retryable = True
