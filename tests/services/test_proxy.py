"""The reverse proxy of docs/team.md, as it stands there, before a Prefect and an MLflow with accounts."""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.support.ports import free_ports
from tests.support.projects import REPOSITORY
from tests.support.team_servers import ACCOUNT, answers, at, process
from train_and_ship.infra.settings import LOOPBACK

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(400),
    pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed"),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed"),
]
PAGE = (REPOSITORY / "docs/team.md").read_text()
NAMES = ("prefect.example.com", "mlflow.example.com")
LARGE = b"0" * 3_000_000
"""More than nginx takes where nobody says otherwise."""


class Proxy:
    """The two names, each on a port of its own."""

    def __init__(self, ports: tuple[int, int], certificate: Path) -> None:
        self.ports = dict(zip(NAMES, ports, strict=True))
        self.trust = ssl.create_default_context(cafile=str(certificate))

    def ask(self, name: str, method: str, path: str, *, host: str = "", **more: object) -> httpx.Response:
        """A request to a name, as a browser that knows the certificate sends it."""
        with httpx.Client(verify=self.trust, timeout=60) as client:
            request = client.build_request(
                method, f"https://{LOOPBACK}:{self.ports[name]}{path}", headers={"Host": host or name},
                extensions={"sni_hostname": name}, **({"content": more["content"]} if "content" in more else {}),
            )  # fmt: skip
            account = ACCOUNT if more.get("account", True) else None
            return client.send(request, auth=httpx.BasicAuth(*account) if account else None)

    def upgrade(self, name: str, path: str) -> str:
        """The first line of the answer to somebody who wants a WebSocket."""
        with (
            socket.create_connection((LOOPBACK, self.ports[name]), timeout=30) as plain,
            self.trust.wrap_socket(plain, server_hostname=name) as secured,
        ):
            lines = [
                f"GET {path} HTTP/1.1", f"Host: {name}", "Upgrade: websocket", "Connection: Upgrade",
                "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
                "Sec-WebSocket-Protocol: prefect", "", "",
            ]  # fmt: skip
            secured.sendall("\r\n".join(lines).encode())
            return secured.recv(4096).decode().split("\r\n")[0]


def configuration(page: str, name: str, listen: int, behind: int, certificate: Path) -> str:
    """The block of the page for one of the two servers, with our ports and files."""
    found = re.search(r"^```nginx\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert found is not None
    text = found[1]
    for there, here in (
        ("listen 443 ssl", f"listen {LOOPBACK}:{listen} ssl"),
        ("/etc/ssl/prefect.pem", str(certificate)),
        ("/etc/ssl/prefect.key", str(certificate.with_suffix(".key"))),
        ("127.0.0.1:4200", f"{LOOPBACK}:{behind}"),
        ("prefect.example.com", name),
    ):
        assert there in text
        text = text.replace(there, here)
    if name.startswith("mlflow"):
        # As the sentence below the block says.
        assert "`client_max_body_size 0`" in page
        text = text.replace("  location /", "  client_max_body_size 0;\n  location /", 1)
    return text


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("proxy")
    certificate = folder / "team.pem"
    names = ",".join(f"DNS:{name}" for name in NAMES)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=team",
         "-addext", f"subjectAltName={names}", "-keyout", certificate.with_suffix(".key"), "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    prefect_port, mlflow_port, *ports = free_ports(4)
    (folder / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/accounts.db\n"
        f"admin_username = {ACCOUNT[0]}\nadmin_password = {ACCOUNT[1]}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    prefect = {"PREFECT_SERVER_API_AUTH_STRING": ":".join(ACCOUNT), "PREFECT_HOME": str(folder / "prefect")}
    mlflow = {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "a secret of this server",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    behind = dict(zip(NAMES, (prefect_port, mlflow_port), strict=True))
    blocks = [
        configuration(PAGE, name, port, behind[name], certificate) for name, port in zip(NAMES, ports, strict=True)
    ]
    places = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    # Its workers write large bodies into our folder.
    user = "user root;\n" if os.geteuid() == 0 else ""
    main = f"{user}daemon off;\npid {folder}/nginx.pid;\nerror_log {folder}/nginx.log;\nevents {{}}\n"
    (folder / "nginx.conf").write_text(f"{main}http {{\naccess_log off;\n{places}{''.join(blocks)}}}\n")
    with ExitStack() as running:
        running.enter_context(process(folder, "prefect", prefect, "prefect", "server", "start", *at(prefect_port)))
        running.enter_context(
            process(
                folder,
                "mlflow",
                mlflow,
                "mlflow",
                "server",
                *at(mlflow_port),
                "--workers",
                "1",
                "--app-name",
                "basic-auth",
                "--allowed-hosts",
                f"{NAMES[1]},{LOOPBACK}:{mlflow_port}",
                "--backend-store-uri",
                f"sqlite:///{folder}/mlflow.db",
                "--serve-artifacts",
                "--artifacts-destination",
                str(folder / "artifacts"),
            )
        )
        answers(f"http://{LOOPBACK}:{prefect_port}/api/health", folder / "prefect.log")
        answers(f"http://{LOOPBACK}:{mlflow_port}/health", folder / "mlflow.log")
        server = running.enter_context(subprocess.Popen(["nginx", "-c", folder / "nginx.conf"]))
        running.callback(server.terminate)
        first, second = ports
        yield Proxy((first, second), certificate)


def test_prefect_behind_the_proxy_asks_for_the_account_and_serves_its_page(proxy: Proxy) -> None:
    name = NAMES[0]
    answers_when_up(proxy, name)
    assert proxy.ask(name, "GET", "/api/admin/version", account=False).status_code == 401
    assert proxy.ask(name, "GET", "/api/admin/version").status_code == 200
    page = proxy.ask(name, "GET", "/", account=False)
    assert page.status_code == 200 and "<html" in page.text.lower()


def test_websockets_pass(proxy: Proxy) -> None:
    answers_when_up(proxy, NAMES[0])
    assert proxy.upgrade(NAMES[0], "/api/events/in") == "HTTP/1.1 101 Switching Protocols"


def test_mlflow_behind_the_proxy_takes_large_files_from_accounts_alone_and_other_names_from_nobody(
    proxy: Proxy,
) -> None:
    name, place = NAMES[1], "/api/2.0/mlflow-artifacts/artifacts/large.bin"
    answers_when_up(proxy, name)
    assert proxy.ask(name, "PUT", place, content=LARGE, account=False).status_code == 401
    assert proxy.ask(name, "PUT", place, content=LARGE).status_code == 200
    assert len(proxy.ask(name, "GET", place).content) == len(LARGE)
    refused = proxy.ask(name, "GET", "/", host="elsewhere.example.com")
    assert refused.status_code == 403


def answers_when_up(proxy: Proxy, name: str) -> None:
    """nginx listens a moment after it was started."""
    for _ in range(100):
        try:
            proxy.ask(name, "GET", "/health", account=False)
        except httpx.ConnectError:
            continue
        return
    pytest.fail("nginx does not listen")
