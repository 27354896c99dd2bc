"""A candidate beside what `ship serve` serves, asked in this process: who gets it, and no request fails by it."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from shipreader.fallbacks import MOST_FALLBACKS
from shipreader.inference_canary import CanaryDocument
from shipreader.inference_http import application, watching
from shipreader.inference_limits import Limits
from shipreader.inference_model import ModelDocument, Spinning
from shipreader.inference_observed import Observing
from shipreader.inference_served import Served
from tests.support.inference_traffic import request_body
from tests.support.onnx_releases import SIGNATURE, onnx_release
from tests.support.processes import PATIENCE

URL = "/v2/models/digits"
INSIDE, OUTSIDE = "user-3863", "user-7248"
"""The last slot of 5 %, and the first that is not: docs/serving.md."""
NEW = "7-candidate"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A live release that doubles and breaks at 20, and a candidate that trebles and breaks at 5."""
    folder = tmp_path_factory.mktemp("releases")
    onnx_release(folder / "old", 2.0, breaks_at=20)
    onnx_release(folder / "new", 3.0, breaks_at=5)
    return {name: str(folder / name / "model.onnx") for name in ("old", "new")}


class Rig:
    def __init__(self, files: dict[str, str], **limits: Any) -> None:
        self.files, self.served = files, Served("digits", Limits(**limits))
        self.served._spinning = Spinning(False, "")
        self.load(7)

    def load(self, generation: int) -> None:
        self.served.load(ModelDocument("digits", generation, self.files["old"], SIGNATURE, 64))

    async def tries(self, artifact: str = "", signature: Any = SIGNATURE, **changes: Any) -> None:
        model = ModelDocument("digits", 7, artifact or self.files["new"], signature, 64, NEW)
        said: dict[str, Any] = {"share": 500, "key": "user_id", "fallback_ms": 0, "shadow": False, "rollout": "r"}
        self.served.follow(CanaryDocument(**{"model": model, "number": 1, **said, **changes}))
        if self.served._loading is not None:
            await self.served._loading


def with_client(rig: Rig, do: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    async def run() -> None:
        transport = httpx.ASGITransport(app=application(rig.served))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080") as client:
            await do(client)

    asyncio.run(run())


async def factor(client: httpx.AsyncClient, key: Any = None, value: float = 1, path: str = URL) -> tuple[str, float]:
    """(version, what `x` was multiplied with)."""
    body = request_body(value, **({"user_id": key} if key is not None else {}))
    answer = await client.post(f"{path}/infer", json=body)
    assert answer.status_code == 200, answer.text
    document = answer.json()
    (found,) = {item / value for item in document["outputs"][0]["data"]}
    return document["model_version"], found


async def metric(rig: Rig, name: str, version: str = "", arm: str = "") -> float:
    """Of the process: other tests add to it."""
    transport = httpx.ASGITransport(app=watching(rig.served))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080") as client:
        text = (await client.get("/metrics")).text
    labels = f'model="digits",version="{version}"'
    if arm:
        labels = f'arm="{arm}",{labels}'
    found = re.search(rf"^{name}{{{labels}}} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_the_key_of_a_request_decides_and_the_answer_says_who_gave_it(files: dict[str, str]) -> None:
    rig = Rig(files)

    async def ask(client: httpx.AsyncClient) -> None:
        assert await factor(client, INSIDE) == ("7", 2.0)
        await rig.tries()
        assert await factor(client, INSIDE) == (NEW, 3.0)
        for key in (OUTSIDE, None, "", True, 1.5, ["a"]):
            assert await factor(client, key) == ("7", 2.0)
        # Whoever names a version gets that one, or 404.
        for version, times in (("7", 2.0), (NEW, 3.0)):
            for key in (INSIDE, OUTSIDE):
                assert await factor(client, key, path=f"{URL}/versions/{version}") == (version, times)
        assert (await client.get(URL)).json()["versions"] == ["7", NEW]
        index = (await client.post("/v2/repository/index")).json()
        assert [one["version"] for one in index] == ["7", NEW]
        candidate = rig.served.canary
        await rig.tries(share=2500, number=2)
        assert await factor(client, OUTSIDE) == (NEW, 3.0)
        assert rig.served.canary is not None and candidate is not None and rig.served.canary.model is candidate.model
        rig.served.follow(None)
        assert await factor(client, INSIDE) == ("7", 2.0)
        assert (await client.get(URL)).json()["versions"] == ["7"]
        assert (await client.post(f"{URL}/versions/{NEW}/infer", json=request_body(1))).status_code == 404

    with_client(rig, ask)


def test_another_live_release_ends_what_was_tried_beside_the_one_before(files: dict[str, str]) -> None:
    rig = Rig(files)

    async def ask(client: httpx.AsyncClient) -> None:
        await rig.tries()
        rig.load(8)
        assert await factor(client, INSIDE) == ("8", 2.0)
        await rig.tries()
        assert await factor(client, INSIDE) == ("8", 2.0)
        assert "expected one beside the generation that is served, got 7" in rig.served.said_of_canary

    with_client(rig, ask)


def test_what_the_candidate_refuses_is_answered_by_the_live_release_until_it_is_too_much(files: dict[str, str]) -> None:
    rig = Rig(files)

    async def ask(client: httpx.AsyncClient) -> None:
        await rig.tries()
        before = await metric(rig, "model_rollout_fallback_total", NEW)
        for _ in range(MOST_FALLBACKS):
            assert await factor(client, INSIDE, 9) == ("7", 2.0)
        # One that neither takes is nobody's fault.
        for _ in range(3):
            answer = await client.post(f"{URL}/infer", json=request_body(25, user_id=INSIDE))
            assert answer.status_code == 400 and "idx=25" in answer.text
        assert rig.served.said_of_canary == "" and await factor(client, INSIDE, 4) == (NEW, 3.0)
        assert await factor(client, INSIDE, 9) == ("7", 2.0)
        assert "stands back until the rollout's next change" in rig.served.said_of_canary
        assert "indices element out of data bounds" in rig.served.said_of_canary
        assert await factor(client, INSIDE, 4) == ("7", 2.0)
        assert await metric(rig, "model_rollout_fallback_total", NEW) == before + MOST_FALLBACKS + 1
        assert await metric(rig, "model_rollout_request_error_total", NEW, "candidate") >= MOST_FALLBACKS
        assert await metric(rig, "model_rollout_share", NEW) == 0.05
        await rig.tries(number=2)
        assert await factor(client, INSIDE, 4) == (NEW, 3.0) and rig.served.said_of_canary == ""

    with_client(rig, ask)


class Slow:
    """In place of the candidate's session: computes when it may."""

    def __init__(self, session: Any) -> None:
        self.session, self.calls, self.go = session, 0, threading.Event()

    def run(self, names: Any, fed: Any) -> Any:
        self.calls += 1
        assert self.go.wait(PATIENCE)
        return self.session.run(names, fed)


def slowed(rig: Rig) -> Slow:
    assert rig.served.canary is not None
    model = rig.served.canary.model
    model._session = Slow(model._session)
    return model._session


def test_a_candidate_that_is_late_is_passed_over(files: dict[str, str]) -> None:
    rig = Rig(files)

    async def ask(client: httpx.AsyncClient) -> None:
        await rig.tries(fallback_ms=20)
        slow = slowed(rig)
        began = time.monotonic()
        for _ in range(5):
            assert await factor(client, INSIDE) == ("7", 2.0)
        assert time.monotonic() - began < PATIENCE / 2
        # It hangs, and is not asked meanwhile; nothing waits for it.
        assert rig.served.canary is not None and slow.calls == 1 and not rig.served.canary.model._waiting
        slow.go.set()
        working = rig.served.canary.model._working
        assert working is not None
        await working
        assert await factor(client, INSIDE) == (NEW, 3.0)

    with_client(rig, ask)


class Nan:
    def run(self, names: Any, fed: Any) -> Any:
        return [np.full_like(fed["x"], np.nan)]


class Wide:
    def run(self, names: Any, fed: Any) -> Any:
        return [np.zeros((len(fed["x"]), 400), np.float32)]


@pytest.mark.parametrize("session", [Nan(), Wide()])
def test_an_answer_of_the_candidate_that_cannot_be_sent_is_given_by_the_live_release(
    files: dict[str, str], session: Any
) -> None:
    rig = Rig(files)

    async def ask(client: httpx.AsyncClient) -> None:
        await rig.tries()
        assert rig.served.canary is not None
        rig.served.canary.model._session = session
        assert await factor(client, INSIDE) == ("7", 2.0)

    with_client(rig, ask)


def test_a_candidate_with_smaller_limits_leaves_what_is_beyond_them_to_the_live_release(files: dict[str, str]) -> None:
    rig = Rig(files)

    async def ask(client: httpx.AsyncClient) -> None:
        await rig.tries(signature={**SIGNATURE, "dims": [{"name": "batch", "min": 2, "max": 8}]})
        assert await factor(client, INSIDE) == ("7", 2.0)

    with_client(rig, ask)


def test_a_shadow_answers_nobody_is_counted_and_drops_what_it_has_no_time_for(files: dict[str, str]) -> None:
    rig = Rig(files)

    async def ask(client: httpx.AsyncClient) -> None:
        await rig.tries(shadow=True)
        slow = slowed(rig)
        done = await metric(rig, "model_rollout_request_duration_count", NEW, "shadow")
        dropped = await metric(rig, "model_rollout_shadow_dropped_total", NEW)
        for _ in range(20):
            assert await factor(client, INSIDE) == ("7", 2.0)
        assert await factor(client, OUTSIDE) == ("7", 2.0)
        # One is computed, eight wait, and their bytes count.
        assert await metric(rig, "model_rollout_shadow_dropped_total", NEW) - dropped in (11, 12)
        assert rig.served.bytes in (8 * 16, 9 * 16) and rig.served.requests == 0
        slow.go.set()
        ends = time.monotonic() + PATIENCE
        while await metric(rig, "model_rollout_request_duration_count", NEW, "shadow") == done:
            assert time.monotonic() < ends
            await asyncio.sleep(0.005)
        rig.served.follow(None)
        await asyncio.sleep(0.02)
        assert rig.served.bytes == 0

    with_client(rig, ask)


def test_a_candidate_that_cannot_be_loaded_is_said_and_disturbs_nobody(files: dict[str, str], tmp_path: Path) -> None:
    rig = Rig(files)
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"no model at all")

    async def ask(client: httpx.AsyncClient) -> None:
        await rig.tries(str(bad))
        assert await factor(client, INSIDE) == ("7", 2.0)
        assert "the server cannot load the candidate" in rig.served.said_of_canary
        assert "Protobuf parsing failed" in rig.served.said_of_canary and rig.served.ready
        await rig.tries(number=2)
        assert await factor(client, INSIDE) == (NEW, 3.0) and rig.served.said_of_canary == ""

    with_client(rig, ask)


def test_each_arm_is_observed_by_itself_and_both_answers_to_one_request_have_its_id(
    files: dict[str, str], tmp_path: Path
) -> None:
    rig = Rig(files)
    rig.served.observing = Observing("digits", tmp_path)
    rig.served.observing.use({"inputs": ["x"], "outputs": ["y"], "sample": 1.0})

    async def ask(client: httpx.AsyncClient) -> None:
        await factor(client, OUTSIDE)
        await rig.tries()
        await factor(client, INSIDE)
        await factor(client, OUTSIDE)
        # More than the candidate takes.
        await factor(client, INSIDE, value=6)
        await rig.tries(shadow=True, number=2)
        await factor(client, INSIDE)
        assert rig.served.canary is not None and rig.served.canary._working is not None
        await rig.served.canary._working

    with_client(rig, ask)
    rig.served.observing.close()
    (file,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    found = [
        (row["arm"], bool(row["rollout"]), row["error"], row["fell_back"], row["outputs"].get("y", [0])[0])
        for row in rows
    ]
    assert found == [
        ("live", False, "", False, 2.0),
        ("candidate", True, "", False, 3.0),
        ("live", True, "", False, 2.0),
        ("candidate", True, "RequestError", True, 0),
        ("live", True, "", False, 2.0),
        ("shadow", True, "", False, 3.0),
    ]
    ids = [row["request_id"] for row in rows]
    assert ids[4] == ids[5] and len(set(ids)) == 5
    assert [row["key_slot"] for row in rows] == [None, 499, 500, 499, 499, 499]
