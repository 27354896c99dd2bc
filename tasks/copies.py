"""Copies of releases on this machine, to be tried by a worker process. No Prefect here.

All raise SettingsError or ServiceError for the store's faults.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from infra.errors import ReleaseError
from infra.objectstore import ObjectStore
from registry.pointer import Pointer
from registry.release import Manifest
from registry.releases import fetch_release
from torchworker.contract import RehearsedRelease, TensorSpec, decode

KEEP_SECONDS = 24 * 3600
"""Releases that nobody asked for in this time are dropped from the local copies."""


def download_anew(store: ObjectStore, manifest: Manifest, folder: Path) -> RehearsedRelease:
    """The candidate from the bucket, also when a copy lies here: it is the bucket that is tried.

    Raises ReleaseError when a file is missing or is not what the manifest says.
    """
    shutil.rmtree(folder, ignore_errors=True)
    fetched = fetch_release(store, manifest.model, manifest.release, folder, manifest_sha256=manifest.sha256())
    return _rehearsed(fetched, folder)


def live_copy(store: ObjectStore, copies: Path, live: Pointer | None) -> tuple[RehearsedRelease | None, str]:
    """The live release from the bucket, or the copy of an earlier run, verified; none and why when it is broken.

    copies: folder of one copy for each release of the model.
    """
    if live is None:
        return None, ""
    folder = copies / live.release
    _drop_old(copies, folder)

    def fetch() -> Manifest:
        return fetch_release(store, live.model, live.release, folder, manifest_sha256=live.manifest_sha256)

    try:
        try:
            manifest = fetch()
        except ReleaseError:
            if not folder.exists():
                raise
            # The copy was damaged; the bucket decides.
            shutil.rmtree(folder)
            manifest = fetch()
        folder.touch()
        return _rehearsed(manifest, folder), ""
    except (ReleaseError, KeyError, TypeError) as error:
        return None, f"it is broken: {error}"


def _drop_old(copies: Path, keep: Path) -> None:
    for folder in copies.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            if folder != keep and time.time() - folder.stat().st_mtime > KEEP_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _rehearsed(manifest: Manifest, folder: Path) -> RehearsedRelease:
    return RehearsedRelease(
        folder=str(folder),
        files={name: entry.sha256 for name, entry in manifest.files.items()},
        formats=manifest.formats,
        inputs=_specs(manifest.signature, "inputs"),
        outputs=_specs(manifest.signature, "outputs"),
        serve=manifest.serve,
    )


def _specs(signature: Mapping[str, list[Mapping[str, object]]], side: str) -> list[TensorSpec]:
    return [decode(TensorSpec, spec) for spec in signature.get(side, [])]
