"""A real server that answers 200 and ignores conditions: s3rver, from npm."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.fixture_types import Connect
from tests.support.ports import free_port
from train_and_ship.infra.errors import StoreRefusedError
from train_and_ship.registry.bucket.releases import publish
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.release.manifest import build_manifest

# A first run installs s3rver.
pytestmark = pytest.mark.timeout(900)

VERSION = "3.7.1"
START_SECONDS = 60
KEYS = "S3RVER"
"""Its only user, and his secret."""


@pytest.fixture(scope="module")
def s3rver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address. Fetched once into the user's cache folder; skipped where npm cannot."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.skip("s3rver comes from npm, and this machine has no npm")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "train-and-ship" / f"s3rver-{VERSION}"
    script = cache / "node_modules/s3rver/bin/s3rver.js"
    if not script.exists():
        install = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(cache), f"s3rver@{VERSION}"]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"npm cannot fetch s3rver: {done.stderr.strip()[-300:]}")
    port, folder = free_port(), tmp_path_factory.mktemp("s3rver")
    argv = [node, str(script), "--directory", str(folder), "--address", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen([*argv, "--configure-bucket", "models"], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert server.poll() is None and time.monotonic() < deadline
            try:
                httpx.get(f"http://127.0.0.1:{port}", timeout=1)
                break
            except httpx.HTTPError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def test_a_real_server_that_ignores_conditions_is_refused_with_the_reason(
    connect: Connect, s3rver: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEYS)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEYS)
    store = connect("models", s3rver)
    store.check()
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"weights")
    manifest = build_manifest(folder, model="digits", formats={}, signature={}, metrics={})

    reason = r"cannot be used for promotion: a PUT with If-None-Match: \* replaced an existing object"
    with pytest.raises(StoreRefusedError, match=reason) as caught:
        publish(store, folder, manifest)
    assert not caught.value.retryable
    assert read_pointer(Channel(store, "digits", "prod")) is None
    assert store.list_keys("") == {}
