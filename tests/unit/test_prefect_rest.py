"""A Prefect server that is slow to answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from train_and_ship.infra import prefect_rest
from train_and_ship.infra.errors import ServiceError
from train_and_ship.infra.prefect_rest import prefect_api, require_prefect
from train_and_ship.infra.settings import LOOPBACK, Settings


class Slow(ThreadingHTTPServer):
    """Says nothing to its first request until it is closed."""

    def __init__(self) -> None:
        super().__init__((LOOPBACK, 0), _Answer)
        self.asked = 0
        self.closing = threading.Event()


class _Answer(BaseHTTPRequestHandler):
    server: Slow

    def do_GET(self) -> None:
        self.server.asked += 1
        if self.server.asked == 1:
            self.server.closing.wait(30)
            return
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    with Slow() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PREFECT_API_URL", f"http://{LOOPBACK}:{server.server_address[1]}/api")
        monkeypatch.setattr(prefect_rest, "ANSWER_SECONDS", 0.5)
        yield server
        server.closing.set()
        server.shutdown()


def test_a_server_that_lets_a_request_wait_is_asked_again_by_whoever_may_repeat_it(slow: Slow) -> None:
    assert prefect_api(Settings.load(), "GET", "/admin/version", tries=2).json() == {}
    assert slow.asked == 2


def test_what_may_not_be_repeated_is_asked_once(slow: Slow) -> None:
    with pytest.raises(ServiceError, match="ReadTimeout"):
        prefect_api(Settings.load(), "GET", "/admin/version")
    assert slow.asked == 1


def test_a_run_begins_with_a_server_that_does_not_answer_at_once(slow: Slow) -> None:
    require_prefect(Settings.load())
    assert slow.asked == 2
