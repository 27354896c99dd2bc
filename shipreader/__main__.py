"""`shipreader MODEL --bucket BUCKET --to FOLDER`: bring what is live to this machine, once or again and again.

With --status: what the processes say that follow in FOLDER.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from shipreader.bucket import hide_client_warnings, s3_client
from shipreader.errors import ReaderError
from shipreader.local import CURRENT
from shipreader.reader import Reader
from shipreader.records import Release
from shipreader.report import answering, judged, read_reports


def main() -> int:
    """Exits with 1 when nothing new could be had, and what was there before stays; with --status when none is ready."""
    hide_client_warnings()
    parser = argparse.ArgumentParser(prog="shipreader", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--bucket", default=os.environ.get("SHIP_BUCKET"))
    parser.add_argument("--channel", default="prod")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="FOLDER/current leads to what is live")
    parser.add_argument("--endpoint-url", help="an S3-compatible store that is not AWS (or AWS_ENDPOINT_URL)")
    parser.add_argument("--public-key", action="append", default=[], metavar="PEM", help="require a signature by it")
    parser.add_argument(
        "--max-bytes", type=int, help="refuse releases that take more on the disk, with 4 KiB for each file and folder"
    )
    parser.add_argument("--follow", action="store_true", help="go on until interrupted")
    parser.add_argument("--interval", type=float, default=10.0, help="seconds between looks at the channel")
    parser.add_argument("--listen", metavar="[HOST:]PORT", help="with --follow: answer /metrics, /ready and /live")
    parser.add_argument("--status", action="store_true", help="what the processes say that follow in FOLDER, as JSON")
    parser.add_argument(
        "--max-stale", type=float, metavar="SECONDS", help="not ready when what is live is unknown longer"
    )
    options = parser.parse_args()
    if options.max_stale is not None and not options.max_stale > 0:
        parser.error(f"--max-stale: expected seconds above 0, got {options.max_stale:g}")
    if options.status:
        return _show_status(options)
    if options.bucket is None:
        parser.error("--bucket, or SHIP_BUCKET, is missing")
    listen = _address(parser, options.listen)
    if listen is not None and not options.follow:
        parser.error("--listen: expected --follow beside it")
    if options.max_stale is not None and listen is None:
        parser.error("--max-stale: expected --status or --listen beside it")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)

    def show(release: Release) -> None:
        name = f"{release.model} {release.channel}"
        print(f"{name}: generation {release.generation}, {release.id} -> {options.to}/{CURRENT}", flush=True)

    try:
        reader = Reader(
            options.model,
            bucket=options.bucket,
            folder=options.to,
            channel=options.channel,
            client=s3_client(options.endpoint_url),
            public_keys=options.public_key,
            max_bytes=options.max_bytes,
            interval=options.interval,
            on_change=show if options.follow else None,
        )
        if not options.follow:
            show(reader.pull())
            return 0
        stopping = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopping.set())
        with contextlib.ExitStack() as stack:
            if listen is not None:
                # Before a release is here: probes are answered meanwhile, and a taken port is told before a download.
                host, port = listen
                pages = answering(host, port, reader.model, reader.channel, reader.status, options.max_stale)
                print(f"listening on {host}:{stack.enter_context(pages)}", flush=True)
            stack.enter_context(reader)
            stopping.wait()
        return 0
    except (ReaderError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


def _show_status(options: argparse.Namespace) -> int:
    mine = (options.model, options.channel)
    found = [one for one in read_reports(Path(options.to)) if (one["model"], one["channel"]) == mine]
    reports = [judged(one, options.max_stale) for one in found]
    for report in reports:
        print(json.dumps(report))
    if not reports:
        print(f"{options.to}: no process follows {' '.join(mine)} here", file=sys.stderr)
    return 0 if reports and all(report["ready"] for report in reports) else 1


def _address(parser: argparse.ArgumentParser, text: str | None) -> tuple[str, int] | None:
    if text is None:
        return None
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        parser.error(f"--listen: expected [HOST:]PORT, such as 9100, got {text!r}")
    return host.strip("[]") or "127.0.0.1", int(port)


if __name__ == "__main__":
    sys.exit(main())
