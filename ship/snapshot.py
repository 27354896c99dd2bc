"""`ship snapshot`: name data by a manifest, here or in a bucket."""

from __future__ import annotations

from pathlib import Path

import typer

from train_and_ship.infra.errors import RequestError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.data.snapshots import SNAPSHOT, publish_snapshot, split_address, take
from train_and_ship.registry.text import file_size


def snapshot(folder: Path, to: str) -> None:
    """Write the manifest of a folder, and bring it to a bucket. Prints the hash that a job file can pin."""
    if not folder.is_dir():
        raise RequestError(
            f"expected a folder, got {folder}, which {'is a file' if folder.exists() else 'is not there'}"
        )
    bucket, prefix = split_address(to)
    if to and not (bucket and prefix):
        raise RequestError(f"--to: expected s3://bucket/prefix, got {to!r}")
    contents = take(folder)
    typer.echo(f"{folder / SNAPSHOT}: {len(contents.files)} files, {file_size(contents.total_bytes)}")
    if to:
        sent = publish_snapshot(folder, contents, ObjectStore.from_settings(Settings.load(), bucket), prefix)
        typer.echo(f"s3://{bucket}/{prefix}: {file_size(sent)} sent")
    typer.echo(f"sha256: {contents.sha256}")
