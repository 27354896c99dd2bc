"""`shipreader MODEL --bucket BUCKET --to FOLDER`: bring what is live to this machine, once or again and again."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading

from shipreader.bucket import s3_client
from shipreader.errors import ReaderError
from shipreader.local import CURRENT
from shipreader.reader import Reader
from shipreader.records import Release


def main() -> int:
    """Exits with 1 when nothing new could be had; what was there before stays."""
    parser = argparse.ArgumentParser(prog="shipreader", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--bucket", default=os.environ.get("SHIP_BUCKET"), required="SHIP_BUCKET" not in os.environ)
    parser.add_argument("--channel", default="prod")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="FOLDER/current leads to what is live")
    parser.add_argument("--endpoint-url", help="an S3-compatible store that is not AWS (or AWS_ENDPOINT_URL)")
    parser.add_argument("--public-key", action="append", default=[], metavar="PEM", help="require a signature by it")
    parser.add_argument("--max-bytes", type=int, help="refuse larger releases")
    parser.add_argument("--follow", action="store_true", help="go on until interrupted")
    parser.add_argument("--interval", type=float, default=10.0, help="seconds between looks at the channel")
    options = parser.parse_args()
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
        with reader:
            stopping.wait()
        return 0
    except (ReaderError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
