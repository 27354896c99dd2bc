"""Copies of releases on this machine, to be tried by a worker process. No Prefect here.

All raise SettingsError or ServiceError for the store's faults.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchworker.contract import (
    FORMAT_FILES,
    INT8_FILES,
    INT8_OF,
    WEIGHTS,
    DynamicDim,
    RehearsedRelease,
    TensorSpec,
    decode,
    read_with,
)
from train_and_ship.infra.errors import ReleaseError
from train_and_ship.infra.home import make_folder
from train_and_ship.infra.in_use import hold, unused
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.rundir import link_or_copy
from train_and_ship.registry.bucket.releases import fetch_release, read_manifest
from train_and_ship.registry.bucket.signing import load_public_key, require_signature
from train_and_ship.registry.channels.pointer import Pointer
from train_and_ship.registry.release.archives import require_sound
from train_and_ship.registry.release.documents import told_serve
from train_and_ship.registry.release.manifest import Manifest
from train_and_ship.registry.release.onnx_header import ENDING, require_one_model

KEEP_SECONDS = 24 * 3600
"""Releases that nobody asked for in this time are dropped from the local copies."""


def download_anew(store: ObjectStore, manifest: Manifest, folder: Path) -> RehearsedRelease:
    """The candidate from the bucket, also when a copy lies here: it is the bucket that is tried.

    Raises ReleaseError when a file is missing or is not what the manifest says, when one holds what is not loaded, and
    when ONNX would be another model in a view than it is here.
    """
    shutil.rmtree(folder, ignore_errors=True)
    fetched = fetch_release(store, manifest.model, manifest.release, folder, manifest_sha256=manifest.sha256())
    require_sound(folder, fetched)
    _require_portable(folder, fetched)
    return _rehearsed(fetched, folder)


def live_copy(
    store: ObjectStore, copies: Path, live: Pointer | None, public_key: Path | None
) -> tuple[RehearsedRelease | None, str]:
    """The live release from the bucket, or the copy of an earlier run, verified; none and why when it is broken.

    Args:
        store: the bucket.
        copies: folder of one copy for each release of the model.
        live: what is live.
        public_key: file (PEM) of the key that has to have signed it; None asks for no signature. What nobody vouches
            for is not loaded beside a private key, also where it is live.
    """
    if live is None:
        return None, ""
    try:
        manifest, folder = _fetch(store, copies, live, public_key)
        require_sound(folder, manifest)
        return _rehearsed(manifest, folder), ""
    except (ReleaseError, KeyError, TypeError) as error:
        return None, f"it is broken: {error}"


def live_weights(
    store: ObjectStore, copies: Path, live: Pointer, folder: Path, public_key: Path | None
) -> tuple[Path, str]:
    """The live release's weights, verified, below a folder of the run, in one that is named by the release; their hash.

    Args:
        store: the bucket.
        copies: as in `live_copy`.
        live: what is live.
        folder: of the run; the weights are a hard link there, or a copy where that cannot be.
        public_key: as in `live_copy`.

    Raises:
        ReleaseError: the release is broken: what training begins with is not guessed.
    """
    try:
        manifest, copy = _fetch(store, copies, live, public_key)
        if WEIGHTS not in manifest.files:
            raise ReleaseError(f"release {live.release} of {live.model} holds no {WEIGHTS}")
    except ReleaseError as error:
        raise ReleaseError(
            f"retrain.start: live: the live release cannot be started from: {error}; use retrain.start: scratch"
        ) from error
    path = folder / live.release / WEIGHTS
    make_folder(path.parent)
    # Two file systems perhaps: run directories may be where other machines see them too.
    link_or_copy(copy / WEIGHTS, path)
    return path, manifest.files[WEIGHTS].sha256


def _fetch(store: ObjectStore, copies: Path, live: Pointer, public_key: Path | None) -> tuple[Manifest, Path]:
    """The copy of a release, verified, downloaded where there is none.

    Raises ReleaseError when it is broken, or not signed by the key that is required.
    """
    if public_key is not None:
        described = read_manifest(store, live.model, live.release, sha256=live.manifest_sha256)
        try:
            require_signature(store, described, load_public_key(public_key))
        except ReleaseError as error:
            raise ReleaseError(
                f"{error}. SHIP_PUBLIC_KEY requires one of whatever is loaded here; when you know that it is yours, "
                f"`ship sign {live.model} {live.release}` makes it comparable"
            ) from None
    folder = copies / live.release
    hold(folder)
    _drop_old(copies, folder)

    def fetch() -> Manifest:
        return fetch_release(store, live.model, live.release, folder, manifest_sha256=live.manifest_sha256)

    try:
        manifest = fetch()
    except ReleaseError:
        if not folder.exists():
            raise
        # The copy was damaged; the bucket decides.
        shutil.rmtree(folder)
        manifest = fetch()
    folder.touch()
    return manifest, folder


def _drop_old(copies: Path, keep: Path) -> None:
    for folder in copies.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            if folder != keep and time.time() - folder.stat().st_mtime > KEEP_SECONDS:
                with unused(folder) as free:
                    if free:
                        shutil.rmtree(folder, ignore_errors=True)


def _require_portable(folder: Path, manifest: Manifest) -> None:
    """Raises ReleaseError for ONNX that is another model in a view: called model.onnx, and without its neighbours."""
    for kind, name in manifest.formats.items():
        if INT8_OF.get(kind, kind) != "onnx":
            continue
        if not name.endswith(ENDING):
            usual = {**FORMAT_FILES, **INT8_FILES}[kind]
            raise ReleaseError(
                f"{name}: expected the artifact of {kind} to have a name that ends in {ENDING}, got one by which it "
                f"may be read as another format; publish it as {usual}"
            )
        require_one_model(*(folder / read for read in read_with(name, manifest.files)))


def _rehearsed(manifest: Manifest, folder: Path) -> RehearsedRelease:
    inputs = _specs(manifest.signature, "inputs")
    return RehearsedRelease(
        folder=str(folder),
        files={name: entry.sha256 for name, entry in manifest.files.items()},
        formats=manifest.formats,
        libraries=manifest.libraries,
        inputs=inputs,
        outputs=_specs(manifest.signature, "outputs"),
        dims=_dims(manifest.signature, inputs),
        rows_together=manifest.rows_together,
        serve=told_serve(manifest.serve),
    )


def _specs(signature: Mapping[str, list[Mapping[str, object]]], side: str) -> list[TensorSpec]:
    # What a later version says besides is not asked here.
    fields = TensorSpec.__dataclass_fields__
    return [decode(TensorSpec, {name: spec[name] for name in fields}) for spec in signature.get(side, [])]


def _dims(signature: Mapping[str, Sequence[Mapping[str, Any]]], inputs: Sequence[TensorSpec]) -> list[DynamicDim]:
    found = []
    for dim in signature.get("dims", ()):
        axes = {spec.name: [at for at, size in enumerate(spec.shape) if size == dim["name"]] for spec in inputs}
        axes = {name: places for name, places in axes.items() if places}
        found.append(DynamicDim(name=dim["name"], min=dim["min"], max=dim["max"], axes=axes))
    return found
