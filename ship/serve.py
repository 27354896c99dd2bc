"""`ship serve`: REST and gRPC for what is live on a channel, following the channel.

The reader pulls and verifies; a server in a process and an environment of its own (shipreader/inference_server.py)
loads what it is told to, the new release before it lets go of the old one. A release that it cannot load does not
become current. A server that ended or hangs is started again with what it served, and the command ends when that is
in vain.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shlex
from pathlib import Path

import typer

from shipreader.errors import ReaderError
from shipreader.inference_limits import LOOPBACK, Limits
from shipreader.observation_sending import OBSERVATIONS, Forwarder
from train_and_ship.infra.errors import SettingsError
from train_and_ship.infra.s3 import s3_client
from train_and_ship.infra.settings import Settings
from train_and_ship.ship.pull import current, folder_for, make_reader, reader_errors, wait_for_signal
from train_and_ship.ship.sample_request import write_sample_request
from train_and_ship.ship.server import Server

_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?|[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*", re.ASCII)


def serve(
    model: str,
    channel: str,
    to: Path | None,
    port: int,
    interval: float,
    batch_size: int,
    max_stale: float | None = None,
    limits: Limits | None = None,
) -> None:
    """Serve until interrupted.

    Raises SettingsError for a taken port and for what is no name of a host, ServiceError when the server does not
    start, or is gone and cannot be brought back.
    """
    for name in limits.hosts if limits is not None else ():
        if not _HOST_NAME.fullmatch(name):
            raise SettingsError(
                "--allow-host: expected the name of a host without port or path, such as models.example.com, "
                f"got {name!r}"
            )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    settings = Settings.load()
    folder = folder_for(settings, model, channel, to)
    server = Server(folder=folder / "server", model=model, port=port, batch_size=batch_size, limits=limits or Limits())
    server.require_ports()
    with (
        reader_errors(settings, model),
        contextlib.closing(_forwarder(settings, server)) as forwarder,
        # The first to end: what it leaves is brought away after it.
        contextlib.closing(server),
    ):
        forwarder.start()
        # Also when it has become current: nobody here accepted what another process brought, or what lay there before.
        reader = make_reader(
            settings, model, channel, folder,
            accept=lambda release: (server.require_servable if release.rollout else server.load)(release),
            on_change=server.load, on_rollout=server.try_candidate, interval=interval,
        )  # fmt: skip
        with contextlib.closing(reader):
            try:
                release = reader.start()
            except ReaderError:
                # Not the release's fault.
                server.require_alive()
                raise
            typer.echo(
                f"{current(release)}\n"
                f"  infer    {server.url}/v2/models/{model}/infer\n"
                f"  gRPC     {LOOPBACK}:{port + 1}, metrics at http://{LOOPBACK}:{port + 2}/metrics\n"
                f"  log      {server.log}\n"
                f"  compute  {server.threads}"
            )
            request = server.folder / "request.json"
            if write_sample_request(release, request):
                typer.echo(f"  try      curl -s {server.url}/v2/models/{model}/infer -d @{shlex.quote(str(request))}")
            server.keep(
                reader.note_fault,
                lambda: reader.status().ready(max_stale),
                reader.note_rollout_fault,
                lambda: reader.candidate is not None,
            )
            wait_for_signal(server.require_alive)


def _forwarder(settings: Settings, server: Server) -> Forwarder:
    """Brings away what the server observes."""
    folder = server.folder / OBSERVATIONS
    return Forwarder(server.model, bucket=settings.bucket, client=s3_client(settings), folder=folder)
