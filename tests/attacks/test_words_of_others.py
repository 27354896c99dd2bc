"""Reasons, names and keys that steer a terminal, forge a line of a table, or take another channel's alias."""

from __future__ import annotations

import ast
import json
import logging
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import typer
from botocore.awsrequest import AWSResponse
from rich.console import Console

from shipreader import bucket
from shipreader.errors import LONGEST, ReaderError, RefusedError
from shipreader.signatures import Signed, require_signed
from tests.support.releases import CHANNEL, MODEL, NOWHERE, move, published
from tests.support.signing_keys import key_pair
from train_and_ship.infra.errors import GateError, ReleaseError, RequestError, SettingsError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.s3 import connect
from train_and_ship.infra.settings import Settings
from train_and_ship.infra.shown import LONGEST_MESSAGE, harmless, on_one_line
from train_and_ship.registry.bucket.iam import Role, policy
from train_and_ship.registry.bucket.keys import rules_key
from train_and_ship.registry.bucket.signing import load_private_key
from train_and_ship.registry.channels.aliases import sync_aliases
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.decisions import KEPT, Decision, read_decisions, record_decision
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.channels.rules import read_rules
from train_and_ship.registry.channels.targets import described
from train_and_ship.registry.identity import moment, require_channel
from train_and_ship.registry.maintenance.retention import Policy
from train_and_ship.registry.release.manifest import Manifest
from train_and_ship.registry.tracking.versions import _snippet
from train_and_ship.ship import status
from train_and_ship.ship.doctor import doctor
from train_and_ship.ship.gc import gc
from train_and_ship.ship.history import history, live, show_decisions

STEERING = (
    "fine\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202egnp.exe\u2066\x00\n     9  2026-11-30 02:00:00 +0000  a forged line"
)
FORBIDDEN = "\x1b\x07\x9b\r\u202e\u2066\x00"


def require_harmless(text: str) -> None:
    assert not set(FORBIDDEN) & set(text), text
    assert not any(line.strip().startswith("9  2026-11-30") for line in text.splitlines()), text
    assert r"\x1b]0;owned\x07" in text


@pytest.fixture
def steered(object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """A release whose move, decision and claim say such things."""
    monkeypatch.setenv("SHIP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    monkeypatch.setenv("PREFECT_API_URL", f"{NOWHERE}/api")
    manifest = published(object_store, tmp_path / "release")
    move(object_store, manifest, reason=STEERING, moved_by=STEERING, flow_run=STEERING, verdicts={STEERING: STEERING})
    record_decision(
        object_store,
        Decision(
            model=MODEL, channel=CHANNEL, decision=KEPT, why=STEERING, flow_run="r", asked=STEERING,
            at=datetime(2025, 11, 17, tzinfo=UTC).isoformat(), changed={"code": STEERING}, mlflow_version=STEERING,
        ),
    )  # fmt: skip
    return manifest


def test_no_command_shows_what_steers_a_terminal(
    object_store: ObjectStore,
    steered: Manifest,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    history(MODEL, CHANNEL, as_json=False)
    require_harmless(capsys.readouterr().out)
    live(MODEL, CHANNEL, "", as_json=False)
    require_harmless(capsys.readouterr().out)
    show_decisions(MODEL, CHANNEL, False, 5)
    require_harmless(capsys.readouterr().out)
    # A console that writes what it is given, as one in a terminal does.
    console = Console(width=200, force_terminal=True, no_color=True, highlight=False)
    with console.capture() as shown:
        status._print_models(status.channel_statuses(object_store, {}), console)
    assert not set("\x07\x9b\r\u202e\u2066\x00") & set(shown.get()) and "\x1b]" not in shown.get()
    other = published(object_store, tmp_path / "other", 1)
    # The store tells whole seconds.
    monkeypatch.setattr(ObjectStore, "now", lambda _: datetime.now(UTC) + timedelta(seconds=2))
    claim = {"against": "", "at": datetime.now(UTC).isoformat(), "by": STEERING}
    object_store.put(f"models/{MODEL}/claims/{other.release}.json", json.dumps(claim).encode())
    gc(MODEL, Policy(slowest_reader=timedelta(0)), apply=False, delete_versions=False)
    require_harmless(capsys.readouterr().out)


def test_json_output_is_json_whatever_is_in_it(
    object_store: ObjectStore, steered: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    history(MODEL, CHANNEL, as_json=True)
    said = capsys.readouterr().out
    assert not set(FORBIDDEN) & set(said) and json.loads(said)[0]["reason"] == STEERING


def test_errors_and_logs_quote_nothing_that_steers(steered: Manifest, object_store: ObjectStore) -> None:
    pointer = read_pointer(Channel(object_store, MODEL, CHANNEL))
    assert pointer is not None
    require_harmless(described(pointer))
    for error in (ReleaseError(STEERING), RequestError(STEERING), GateError(STEERING, STEERING)):
        assert not set(FORBIDDEN) & set(str(error)) and r"\x1b[2J" in str(error)
    assert not set(FORBIDDEN) & set(GateError(STEERING, STEERING).table)
    assert not set(FORBIDDEN) & set(str(ReaderError(STEERING))) and r"\x1b[2J" in str(ReaderError(STEERING))


def test_a_key_that_steers_is_shown_as_what_it_is(
    object_store: ObjectStore, steered: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    object_store.put(
        f"models/{MODEL}/views/{CHANNEL}/\x1b[2J/config.pbtxt", f"# {MODEL} release {steered.release}\n".encode()
    )
    object_store.put(f"models/{MODEL}/history/{CHANNEL}/\x1b[2J.json", b"{}")
    with pytest.raises(typer.Exit):
        doctor(MODEL, dry_run=True)
    gc(MODEL, Policy(slowest_reader=timedelta(0)), apply=False, delete_versions=False)
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err


def test_what_is_enormous_is_cut() -> None:
    assert len(harmless("x" * 10**7)) < LONGEST_MESSAGE + 100
    assert len(on_one_line("x " * 10**7)) == 2000 and on_one_line("a\n b\tc") == "a b c"
    assert len(str(ReaderError("x" * 10**7))) == LONGEST
    # What people write stays as it is.
    for text in ("Größe, 数据, שלום 🎉", "two\nlines\tand a tab"):
        assert harmless(text) == text


def test_a_channel_with_a_name_that_means_something_else_takes_no_alias(
    object_store: ObjectStore, steered: Manifest
) -> None:
    live = read_pointer(Channel(object_store, MODEL, CHANNEL))
    assert live is not None
    for name in ("champion", "latest", "previous", "staging-previous", "v7", "a" * 20):
        with pytest.raises(RequestError, match="channel: expected"):
            require_channel(name)
        with pytest.raises(SettingsError, match="channel: expected"):
            policy(Role.PROMOTER, "models", model=MODEL, channel=name)
        object_store.put(f"models/{MODEL}/channels/{name}.json", replace(live, channel=name).encode())
        # MLflow is not even asked: nobody listens there.
        (said,) = sync_aliases(Channel(object_store, MODEL, name, NOWHERE)).missing
        assert "that name is no channel's" in said


def test_what_others_wrote_makes_no_line_of_its_own_in_an_error(
    object_store: ObjectStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forged = "x\nall is well"
    hint = {"verificationMaterial": {"publicKey": {"hint": forged}}}
    envelope = {"payload": "", "payloadType": forged, "signatures": [{"sig": ""}]}
    key = load_private_key(key_pair(tmp_path)).public_key()
    with pytest.raises(RefusedError, match="got one by key 'x") as refused:
        require_signed(json.dumps({**hint, "dsseEnvelope": envelope}).encode(), Signed(MODEL, {}), key, "a signature")
    assert "\n" not in str(refused.value)
    decision = Decision(model=MODEL, channel=CHANNEL, decision=KEPT, why="", flow_run="r", asked="")
    record_decision(object_store, decision)
    (written,) = object_store.list_keys(f"models/{MODEL}/decisions/")
    known = json.loads(decision.encode())
    for document in ({**known, forged: 1}, {**known, "flow_run": forged}):
        object_store.put(written, json.dumps(document).encode())
        caplog.clear()
        assert read_decisions(Channel(object_store, MODEL, CHANNEL), 1) == []
        (said,) = caplog.messages
        assert "all is well" in said and "\n" not in said
    rules = {"format": 1, "approval": "none", forged: ""}
    object_store.put(rules_key(MODEL, CHANNEL), json.dumps(rules).encode())
    with pytest.raises(ReleaseError, match="all is well") as found:
        read_rules(Channel(object_store, MODEL, CHANNEL))
    assert "\n" not in str(found.value)
    with pytest.raises(ValueError, match="one line"):
        moment("2026-11-30\n02:00:00+00:00")


@pytest.mark.parametrize("whose", ["ours", "the reader's"])
def test_the_client_library_shows_no_header_of_an_object_as_it_is(
    whose: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", NOWHERE)
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "us-east-1")
    for name in ("botocore", "urllib3.connectionpool"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    client: Any
    if whose == "ours":
        client = connect(Settings.load()).client
    else:
        client = bucket.s3_client(NOWHERE)
        assert logging.getLogger("botocore").level == logging.NOTSET, "the log of a server is its owner's"
        bucket.hide_client_warnings()

    def answer(request: Any, **_: Any) -> AWSResponse:
        return AWSResponse(request.url, 200, {"Expires": STEERING, "ETag": '"e"', "Content-Length": "0"}, BytesIO())

    client.meta.events.register("before-send.s3.GetObject", answer)
    got = client.get_object(Bucket="models", Key="k")
    assert got["ETag"] == '"e"' and not {"Expires", "ExpiresString"} & got.keys()
    logging.getLogger("botocore.handlers").warning("Failed to parse the header %s", STEERING)
    assert not caplog.records


def test_the_name_of_an_input_is_a_text_in_the_lines_that_mlflow_shows() -> None:
    name = 'x": 0}); began = True; ({"\'y'
    signature = {"inputs": [{"name": name, "dtype": "float32", "shape": ["batch", 4]}]}
    call = next(line for line in _snippet(signature, "m-1").splitlines() if line.startswith("model.predict("))
    (expression,) = ast.parse(call).body
    assert isinstance(expression, ast.Expr) and isinstance(expression.value, ast.Call)
    (given,) = expression.value.args
    assert isinstance(given, ast.Dict) and [ast.literal_eval(key) for key in given.keys if key] == [name]
