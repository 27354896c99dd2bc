"""`ship view`: what is live, in the layout that another server reads by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import typer
import yaml

from shipreader.mlserver import write_model
from shipreader.records import Release
from train_and_ship.infra.errors import SettingsError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.serving.layouts import inference_service, write_kserve, write_triton
from train_and_ship.ship.pull import current, folder_for, make_reader, reader_errors, wait_for_signal


def view(layout: str, model: str, channel: str, backend: str, to: Path | None, follow: bool) -> None:
    """Pull what is live, verified, and write the view; for every move when `follow`.

    Raises SettingsError for a layout that there is not, ReleaseError for a release that the layout cannot hold.
    """
    settings = Settings.load()
    store = ObjectStore.from_settings(settings)
    folder = folder_for(settings, model, channel, to)
    writers: dict[str, Callable[[Release], None]] = {
        "triton": partial(_triton, store, backend),
        "kserve": partial(_kserve, store, backend),
        "mlserver": partial(_mlserver, folder / "mlserver"),
    }
    if layout not in writers:
        raise SettingsError(f"layout: expected one of {', '.join(writers)}; got {layout!r}")
    write = writers[layout]
    with reader_errors(settings, model):
        if not follow:
            # Also when nothing moved: a view can be deleted by hand.
            write(make_reader(settings, model, channel, folder).pull())
            return
        written: list[Release] = []

        def write_once(release: Release) -> None:
            if release not in written[-1:]:
                write(release)
                written.append(release)

        # A release that a view cannot hold is refused, and the last good one stays.
        with closing(make_reader(settings, model, channel, folder, accept=write_once)) as reader:
            write_once(reader.start())
            wait_for_signal()


def _triton(store: ObjectStore, backend: str, release: Release) -> None:
    written = write_triton(store, release, backend)
    if written.generation == release.generation:
        named = f"release {release.id}"
    else:
        # Which release that is nobody says but whoever wrote it.
        named = f"left as it was: it is later than version {release.generation}, which is release {release.id}"
    typer.echo(
        f"{release.model} {release.channel}: version {written.generation}, {named}\n"
        f"  tritonserver --model-repository={_repository(store, written.prefix)} "
        "--model-control-mode=poll"
    )


def _kserve(store: ObjectStore, backend: str, release: Release) -> None:
    written = write_kserve(store, release, backend)
    document = inference_service(release, f"s3://{store.bucket}/{written.prefix}")
    typer.echo(yaml.safe_dump(document, sort_keys=False), nl=False)


def _mlserver(repository: Path, release: Release) -> None:
    path = write_model(repository / "models", release)
    typer.echo(
        f"{current(release)}\n"
        f"  {path}\n"
        f"  MLSERVER_MODEL_REPOSITORY_ROOT={json.dumps(str(repository / 'models'))} mlserver start"
    )


def _repository(store: ObjectStore, prefix: str) -> str:
    """As Triton wants it: the endpoint, where there is one, is part of the address."""
    endpoint = f"{store.address}/" if store.address.startswith("http") else ""
    return f"s3://{endpoint}{store.bucket}/{prefix.rstrip('/')}"
