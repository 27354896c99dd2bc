"""`ship sign`: a signature for a release that was published without one, or with another key."""

from __future__ import annotations

import typer

from train_and_ship.infra.errors import SettingsError
from train_and_ship.infra.private import take_password
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.releases import verify_release
from train_and_ship.registry.bucket.signing import publish_signature
from train_and_ship.registry.channels.revisions import named_release
from train_and_ship.ship.named import named_channel


def sign(model: str, release: str) -> None:
    """Check that the release is complete, and sign it. Raises SettingsError without a key."""
    take_password()
    settings = Settings.load()
    if settings.signing_key is None:
        raise SettingsError(
            "ship sign: expected SHIP_SIGNING_KEY to name a private key (PEM), got none; see docs/trust.md"
        )
    channel = named_channel(settings, model)
    store = channel.store
    named = named_release(channel, release)
    # Its files are checked as well as can be without reading them: a reader holds every byte against the manifest.
    # What is named by a record is described as it was then, or not signed.
    manifest = verify_release(store, model, named.release, sha256=named.manifest_sha256 or None)
    key = publish_signature(store, manifest, settings.signing_key)
    typer.echo(f"signed: s3://{store.bucket}/{key}")
