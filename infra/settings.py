"""Where the services are. Everything comes from environment variables; see the table in docs/services.md.

A part whose address is given is somebody else's: it is used, never started or stopped.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from train_and_ship.infra.addresses import without_password
from train_and_ship.infra.errors import SettingsError
from train_and_ship.infra.home import find_home
from train_and_ship.infra.password import USER, read_password

LOOPBACK = "127.0.0.1"
LOCAL_BUCKET = "models"
PREFECT_ACCOUNT = "PREFECT_API_AUTH_STRING"
"""Prefect's own variable: user:password of a server that asks for one."""
DISK_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
MLFLOW_ACCOUNT = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
"""MLflow's own variables."""
HEARTBEAT_SECONDS = 30
"""Between two signs of life of a flow run; Prefect takes no less."""


def clone_folder() -> Path | None:
    """The nearest folder with our `prefect.yaml`, the current one or one above it; other people's are not asked."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if _is_ours(folder / "prefect.yaml")), None)


def _is_ours(file: Path) -> bool:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return re.search(r"^name: *train-and-ship *$", file.read_text(), re.MULTILINE) is not None
    return False


def without_proxy() -> dict[str, str]:
    """Variables by which no proxy is asked for this machine, nor told its password."""
    found = {}
    for variable in ("NO_PROXY", "no_proxy"):
        known = [part for part in os.environ.get(variable, "").split(",") if part]
        found[variable] = ",".join([*known, *(name for name in (LOOPBACK, "localhost") if name not in known)])
    return found


class Settings(BaseModel):
    """Addresses, ports and folders; each field's alias is its environment variable."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    home: Path = Field(default_factory=find_home, validation_alias="SHIP_HOME")
    """Folder for all local state: service data, logs, pids and run directories."""
    prefect_port: int = Field(4200, validation_alias="SHIP_PREFECT_PORT", ge=1, le=65535)
    """Port of the local Prefect server."""
    mlflow_port: int = Field(5000, validation_alias="SHIP_MLFLOW_PORT", ge=1, le=65535)
    """Port of the local MLflow server."""
    s3_port: int = Field(4566, validation_alias="SHIP_S3_PORT", ge=1, le=65535)
    """Port of the local S3 server."""

    external_prefect: str | None = Field(None, validation_alias="PREFECT_API_URL")
    external_mlflow: str | None = Field(None, validation_alias="MLFLOW_TRACKING_URI")
    external_s3: str | None = Field(None, validation_alias="AWS_ENDPOINT_URL")
    external_bucket: str | None = Field(None, validation_alias="SHIP_BUCKET")
    kms_key_id: str | None = Field(None, validation_alias="SHIP_KMS_KEY_ID")
    """AWS KMS key that encrypts what is written; None leaves it to the bucket."""

    signing_key: Path | None = Field(None, validation_alias="SHIP_SIGNING_KEY")
    """Private key (PEM) that signs each release that is published."""
    public_key: Path | None = Field(None, validation_alias="SHIP_PUBLIC_KEY")
    """Public key (PEM) of which a release has to carry a signature before it is used on this machine."""

    job_folders: str = Field("", validation_alias="SHIP_JOB_FOLDERS")
    """Folders whose jobs a worker runs, besides those that `ship up` and `ship deploy` have seen; as in PATH."""
    runs_at_once: int = Field(2, validation_alias="SHIP_RUNS_AT_ONCE", ge=1)
    """Flow runs that the local worker has at work; the others wait in Prefect."""
    disk: str = Field("20%", validation_alias="SHIP_DISK")
    """How much runs and copies of releases and of data may take below `home`: a size, or a share of its disk."""
    notify: SecretStr | None = Field(None, validation_alias="SHIP_NOTIFY")
    """Addresses, for Apprise, of who is told when a run fails or a release goes live."""
    silent_seconds: int = Field(120, validation_alias="SHIP_SILENT_SECONDS", ge=HEARTBEAT_SECONDS + 5)
    """A run that gave no sign of life for so long is crashed."""
    rehearsal_seconds: int = Field(7200, validation_alias="SHIP_REHEARSAL_SECONDS", ge=1)
    """How long a process may take that tries a release of the bucket: an artifact of somebody else may never end."""
    rehearsal_memory: str = Field("50%", validation_alias="SHIP_REHEARSAL_MEMORY")
    """How much memory it may hold: a size, or a share of the machine's. A few bytes of an artifact may ask for any."""
    mlflow_wait_seconds: int = Field(3600, validation_alias="SHIP_MLFLOW_WAIT_SECONDS", ge=0)
    """How long a trained and proven release waits for an MLflow that is away, before the run ends."""
    cpu_hour_price: float | None = Field(None, validation_alias="SHIP_CPU_HOUR_PRICE", ge=0, allow_inf_nan=False)
    """What an hour of one CPU core costs, for the reports of runs; None shows no price."""
    gpu_hour_price: float | None = Field(None, validation_alias="SHIP_GPU_HOUR_PRICE", ge=0, allow_inf_nan=False)
    """The same of one GPU."""
    currency: str = Field("", validation_alias="SHIP_CURRENCY", max_length=12)
    """Of both prices, a word such as EUR."""

    @classmethod
    def load(cls) -> Self:
        """Read the environment. Raises SettingsError naming the variable, its value and what was expected."""
        try:
            # An empty variable means "not set", as in the AWS and Prefect clients.
            settings = cls.model_validate({name: value for name, value in os.environ.items() if value})
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            raise SettingsError(
                f"environment variable {name}: expected {first['msg'].lower()}, got {os.environ.get(name)!r}"
            ) from None
        if settings.external_prefect and without_password(settings.external_prefect) != settings.external_prefect:
            # Prefect itself passes it on to every flow run, log and page that names the address.
            raise SettingsError(
                "environment variable PREFECT_API_URL: expected an address without user and password, got one with "
                f"them; set PREFECT_API_URL={without_password(settings.external_prefect)} and "
                f"{PREFECT_ACCOUNT}=user:password"
            )
        for variable, said, whole in (
            ("SHIP_DISK", settings.disk, "disk"),
            ("SHIP_REHEARSAL_MEMORY", settings.rehearsal_memory, "memory"),
        ):
            if not _share_or_bytes(said):
                raise SettingsError(
                    f"environment variable {variable}: expected a size such as 200GB, or a share of the {whole} "
                    f"such as 20%, got {said!r}"
                )
        home = settings.home.expanduser().absolute()
        if not next(path for path in (home, *home.parents) if path.exists()).is_dir():
            raise SettingsError(f"environment variable SHIP_HOME: expected a folder, got {str(home)!r}")
        return settings.model_copy(update={"home": home})

    @property
    def prefect_is_local(self) -> bool:
        """Whether `ship up` starts it."""
        return self.external_prefect is None or self.external_prefect == self._local_prefect

    @property
    def mlflow_is_local(self) -> bool:
        """Whether `ship up` starts it."""
        return self.external_mlflow is None or self.external_mlflow == self._local_mlflow

    @property
    def s3_is_local(self) -> bool:
        """Naming a bucket or an endpoint means the store is yours."""
        if self.external_s3 == self._local_s3:
            return True
        return self.external_s3 is None and self.external_bucket is None

    @property
    def _local_prefect(self) -> str:
        return f"http://{LOOPBACK}:{self.prefect_port}/api"

    @property
    def _local_mlflow(self) -> str:
        return f"http://{LOOPBACK}:{self.mlflow_port}"

    @property
    def _local_s3(self) -> str:
        return f"http://{LOOPBACK}:{self.s3_port}"

    @property
    def prefect_api_url(self) -> str:
        """With `/api` at the end."""
        return self.external_prefect or self._local_prefect

    @property
    def prefect_ui_url(self) -> str:
        """For people."""
        return self.prefect_api_url.removesuffix("/").removesuffix("/api")

    @property
    def mlflow_url(self) -> str:
        """Of API and pages."""
        return self.external_mlflow or self._local_mlflow

    @property
    def s3_endpoint(self) -> str | None:
        """None means AWS itself."""
        return self._local_s3 if self.s3_is_local else self.external_s3

    @property
    def bucket(self) -> str:
        """Where models are."""
        return self.external_bucket or LOCAL_BUCKET

    @property
    def runs(self) -> Path:
        """Folder of run directories, one a flow run."""
        return self.home / "runs"

    @property
    def snapshots(self) -> Path:
        """Folder of data that was downloaded from buckets, by the hash of its manifest."""
        return self.home / "data"

    def disk_limit(self) -> int:
        """Bytes that `disk` is, on the disk of `home` as it is now."""
        share, size = _share_or_bytes(self.disk) or (0.0, 0)
        there = next(path for path in (self.home, *self.home.parents) if path.exists())
        return int(share * shutil.disk_usage(there).total) if share else size

    def rehearsal_memory_limit(self) -> int:
        """Bytes that `rehearsal_memory` is, of this machine's memory, or of what the container may take of it."""
        share, size = _share_or_bytes(self.rehearsal_memory) or (0.0, 0)
        return int(share * _memory()) if share else size

    def prefect_account_at(self, address: str) -> str:
        """user:password of the local Prefect server; empty for any other address, which must never be sent them."""
        password = read_password(self.home) if address.rstrip("/") == self._local_prefect else None
        return f"{USER}:{password}" if password else ""

    @property
    def prefect_account(self) -> str:
        """user:password of the Prefect server; empty where none are known."""
        return self.prefect_account_at(self.prefect_api_url) or os.environ.get(PREFECT_ACCOUNT, "")

    @property
    def prefect_variables(self) -> dict[str, str]:
        """What the client of Prefect has to find in its environment when it is imported."""
        found = {"PREFECT_API_URL": self.prefect_api_url, **(without_proxy() if self.prefect_is_local else {})}
        return {**found, PREFECT_ACCOUNT: account} if (account := self.prefect_account) else found

    def mlflow_account_at(self, address: str) -> tuple[str, str] | None:
        """User and password of the local MLflow server; None for any other address, which must never be sent them."""
        password = read_password(self.home) if address.rstrip("/") == self._local_mlflow else None
        return (USER, password) if password else None

    def mlflow_variables_at(self, address: str) -> dict[str, str]:
        """What a client of the local MLflow server has to find in its environment; nothing for any other address."""
        account = self.mlflow_account_at(address)
        return {**dict(zip(MLFLOW_ACCOUNT, account, strict=True)), **without_proxy()} if account else {}

    def child_environment(self) -> dict[str, str]:
        """For processes we start: the current environment, every service address made explicit, and how to get in."""
        environment = dict(os.environ)
        environment["SHIP_HOME"] = str(self.home)
        environment["SHIP_PREFECT_PORT"] = str(self.prefect_port)
        environment["SHIP_MLFLOW_PORT"] = str(self.mlflow_port)
        environment["SHIP_S3_PORT"] = str(self.s3_port)
        environment["MLFLOW_TRACKING_URI"] = self.mlflow_url
        return {**environment, **self.mlflow_variables_at(self.mlflow_url), **self.prefect_variables}


def _memory() -> int:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # "max" where the container has no limit; no file without a second version of control groups.
    with contextlib.suppress(OSError, ValueError):
        return min(whole, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return whole


def _share_or_bytes(text: str) -> tuple[float, int] | None:
    """`20%` or `200 GB`: a share above 0 and up to 1, or bytes above 0, and 0 for the other; None for neither."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(%|[KMGT]?B?)", text.strip(), re.ASCII | re.IGNORECASE)
    if found is None:
        return None
    number, unit = float(found[1]), found[2].upper()
    if unit == "%":
        return (number / 100, 0) if 0 < number <= 100 else None
    size = int(number * DISK_UNITS[unit if len(unit) != 1 or unit == "B" else unit + "B"])
    return (0.0, size) if size else None
