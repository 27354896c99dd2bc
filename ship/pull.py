"""`ship pull`: what is live on a channel, verified, in a folder of this machine."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from shipreader.errors import NothingLiveError, ReaderError, RefusedError, UnavailableError
from shipreader.reader import Reader
from shipreader.records import Release
from train_and_ship.infra.errors import ReleaseError, ServiceError, SettingsError
from train_and_ship.infra.home import make_folder
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.s3 import s3_client, translated
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.catalog import require_model
from train_and_ship.registry.identity import require_channel


def pull(model: str, channel: str, to: Path | None, follow: bool) -> None:
    """Print what became current, once or for every move. Raises ShipError when nothing new could be had."""
    settings = Settings.load()
    with reader_errors(settings, model):
        reader = make_reader(settings, model, channel, to, on_change=_show if follow else None)
        if not follow:
            _show(_pull_once(reader))
            return
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
        with reader:
            wait_for_signal()


def make_reader(
    settings: Settings,
    model: str,
    channel: str,
    to: Path | None,
    on_change: Callable[[Release], None] | None = None,
    **options: Any,
) -> Reader:
    """A reader of the bucket that the settings name.

    Args:
        settings: where the bucket is.
        model: what is followed.
        channel: of it.
        to: the reader's folder; None as in `folder_for`.
        on_change: as of Reader.
        options: more of Reader's.

    Raises RequestError for names that no channel can have.
    """
    require_channel(channel)
    if to is None:
        make_folder(settings.home)
    return Reader(
        model,
        bucket=settings.bucket,
        folder=folder_for(settings, model, channel, to),
        channel=channel,
        client=s3_client(settings),
        public_keys=[settings.public_key] if settings.public_key is not None else [],
        on_change=on_change,
        **options,
    )


def folder_for(settings: Settings, model: str, channel: str, to: Path | None) -> Path:
    """Where the releases of a channel are kept: `to`, or when it is None a folder in SHIP_HOME."""
    return to if to is not None else settings.home / "pulled" / f"{model}.{channel}"


def current(release: Release) -> str:
    """Which release it is, in a line."""
    return f"{release.model} {release.channel}: generation {release.generation}, release {release.id}"


def wait_for_signal(check: Callable[[], None] = lambda: None) -> None:
    """Until Ctrl-C or SIGTERM. check: called twice a second; what it raises ends the waiting."""
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    while not stopping.wait(0.5):
        check()


@contextlib.contextmanager
def reader_errors(settings: Settings, model: str) -> Iterator[None]:
    """Turn what the reader raises into this application's errors.

    Raises RequestError for a model that there is not, SettingsError for a bucket or credentials that cannot be used,
    ReleaseError for what the reader refuses, and ServiceError when nothing is live, or the bucket did not answer.
    """
    try:
        yield
    except NothingLiveError as error:
        # Whoever may only read cannot find out.
        with contextlib.suppress(ServiceError, SettingsError):
            require_model(ObjectStore.from_settings(settings), model)
        raise ServiceError(str(error)) from error
    except UnavailableError as error:
        cause: BaseException = error
        while isinstance(cause, ReaderError) and cause.__cause__ is not None:
            cause = cause.__cause__
        try:
            with translated("read", settings.s3_endpoint or "AWS S3", settings.bucket, settings.s3_is_local):
                raise cause
        except SettingsError:
            raise SettingsError(str(error)) from error
        except (ServiceError, ReaderError):
            raise ServiceError(str(error)) from error
    except RefusedError as error:
        raise ReleaseError(str(error)) from error
    except ReaderError as error:
        raise SettingsError(str(error)) from error


def _pull_once(reader: Reader) -> Release:
    try:
        return reader.pull()
    except (UnavailableError, RefusedError) as error:
        kept = reader.current
        if kept is None:
            raise
        raise type(error)(f"{error}\n{kept.folder} stays current: generation {kept.generation}") from error


def _show(release: Release) -> None:
    typer.echo(f"{current(release)}\n  {release.folder.parent.parent / 'current'}")
