"""Whoever may publish puts code into a release: native code, a program, a pickle in an archive. Nobody runs it."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shipreader.records import FileEntry
from tests.support.releases import CHANNEL, MODEL, NOWHERE, move
from tests.support.runnable_releases import ARTIFACT, CLASSES, FEATURES, classifier, write_release
from tests.support.signing_keys import key_pair
from torchworker.contract import (
    FORMAT_FILES,
    GOLDEN,
    INT8_FILES,
    RESULT,
    WITHOUT_CODE,
    RehearsedRelease,
    RehearseRequest,
    RehearseResult,
    Reply,
    TensorSpec,
)
from torchworker.process.failure import UserError
from torchworker.stages import rehearse
from train_and_ship.infra.errors import GateError, JobError, ReleaseError, WorkerError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.processes import memory_of
from train_and_ship.infra.rundir import StageFolder
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.bucket.releases import publish
from train_and_ship.registry.bucket.signing import publish_signature
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.channels.targets import Target, Verified, ask_promotion
from train_and_ship.registry.release import archives
from train_and_ship.registry.release.archives import _TENSORS, ARCHIVES, find_fault
from train_and_ship.registry.release.manifest import JOB, Manifest, build_manifest, release_id
from train_and_ship.registry.release.pickles import Effort, find_pickle
from train_and_ship.tasks import existing, worker
from train_and_ship.tasks.copies import download_anew, live_copy
from train_and_ship.tasks.existing import _choose, _hashes_of_runs, try_out

SCRIPT, LIBRARY = "model.torchscript", "operators.so"


@pytest.fixture
def settings(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Settings:
    monkeypatch.setenv("SHIP_HOME", str(tmp_path / "home"))
    return Settings.load()


def published(store: ObjectStore, folder: Path, **formats: str) -> Manifest:
    signature = {
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", FEATURES]}],
        "outputs": [{"name": "output", "dtype": "float32", "shape": ["batch", CLASSES]}],
        "dims": [{"name": "batch", "min": 1, "max": None}],
    }
    manifest = build_manifest(folder, model=MODEL, formats=formats, signature=signature, metrics={"accuracy": 0.9})
    publish(store, folder, manifest)
    return manifest


def asked(store: ObjectStore, manifest: Manifest, public_key: Path | None = None) -> Verified:
    return ask_promotion(Channel(store, MODEL, CHANNEL, NOWHERE), manifest.release, public_key)


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_native_code_and_programs_that_nobody_signed_are_not_loaded_and_the_record_says_so(
    settings: Settings, object_store: ObjectStore, tmp_path: Path
) -> None:
    folder, was_here = tmp_path / "release", tmp_path / "was-here"
    write_release(folder, 1, MODEL)
    torch.jit.script(classifier(1)).save(str(folder / SCRIPT))  # type: ignore[no-untyped-call]
    source = f'#include <stdio.h>\n__attribute__((constructor)) void f(void) {{ fclose(fopen("{was_here}", "w")); }}\n'
    compiler = ["cc", "-shared", "-fPIC", "-x", "c", "-o", str(folder / LIBRARY), "-"]
    subprocess.run(compiler, input=source, text=True, check=True)
    manifest = published(object_store, folder, onnx=ARTIFACT, torchscript=SCRIPT)
    tried = asyncio.run(try_out(settings, asked(object_store, manifest)))
    assert tried.verdicts["rehearsal"] == "3 checks passed: onnx"
    assert tried.verdicts["not loaded"] == ("torchscript: not signed; only their hashes and archives were looked at")
    assert not was_here.exists()
    # Whoever has the key vouches for it.
    key = key_pair(tmp_path)
    publish_signature(object_store, manifest, key)
    tried = asyncio.run(try_out(settings, asked(object_store, manifest, key.with_suffix(".pub"))))
    assert tried.verdicts["rehearsal"] == "6 checks passed: onnx, torchscript"
    assert "not loaded" not in tried.verdicts and was_here.exists()


def test_a_release_of_nothing_but_code_is_refused_before_anything_is_fetched_with_the_ways_out(
    settings: Settings, object_store: ObjectStore, tmp_path: Path
) -> None:
    folder = tmp_path / "release"
    write_release(folder, 1, MODEL)
    (folder / ARTIFACT).rename(folder / SCRIPT)
    manifest = published(object_store, folder, torchscript=SCRIPT)
    with pytest.raises(GateError) as refused:
        asyncio.run(try_out(settings, asked(object_store, manifest)))
    for way_out in ("SHIP_PUBLIC_KEY", f"ship sign {MODEL} {manifest.release}", "machine that made it", "export onnx"):
        assert way_out in str(refused.value)
    assert "--load-unsigned" in str(refused.value)
    assert not settings.home.exists()


class NeverEnds:
    """Stands for a fork server whose process computes for ever; it is told when nobody waits for it any more."""

    def __init__(self) -> None:
        self.killed = False
        self.asked: Any = None

    async def run(self, stage: str, request: Path, **_: Any) -> int:
        self.asked = json.loads(request.read_bytes())
        try:
            await asyncio.sleep(600)
        finally:
            self.killed = True
        return 0


def test_a_rehearsal_that_never_ends_is_ended_and_has_no_more_threads_than_there_are_cores(
    settings: Settings, object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "release"
    write_release(folder, 1, MODEL)
    job = json.loads((folder / JOB).read_text())
    (folder / JOB).write_text(json.dumps({**job, "train": {"epochs": 1, "threads": 100_000}}))
    manifest = published(object_store, folder, onnx=ARTIFACT)
    never = NeverEnds()
    monkeypatch.setattr(existing, "fork_server", lambda _: never)
    soon = settings.model_copy(update={"rehearsal_seconds": 1})
    with pytest.raises(WorkerError, match=r"a result within 1 s \(SHIP_REHEARSAL_SECONDS\), got none") as ended:
        asyncio.run(try_out(soon, asked(object_store, manifest)))
    assert never.killed and not ended.value.retryable
    assert never.asked["threads"] == len(os.sched_getaffinity(0))


class TakesMemory:
    """Stands for a fork server whose process holds as much as this one does."""

    async def run(self, stage: str, request: Path, watch: Callable[[int], None], **_: Any) -> int:
        watch(os.getpid())
        return 0


def test_a_rehearsal_that_takes_more_memory_than_it_may_is_ended(
    settings: Settings, object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 500 bytes of ONNX can ask for any number of gigabytes.
    folder = tmp_path / "release"
    write_release(folder, 1, MODEL)
    manifest = published(object_store, folder, onnx=ARTIFACT)
    monkeypatch.setattr(existing, "fork_server", lambda _: TakesMemory())
    little = settings.model_copy(update={"rehearsal_memory": "1MB"})
    said = r"rehearse: .* was killed: expected at most 1\.0 MB of memory \(SHIP_REHEARSAL_MEMORY\), got [1-9]"
    with pytest.raises(WorkerError, match=said) as ended:
        asyncio.run(try_out(little, asked(object_store, manifest)))
    assert not ended.value.retryable


class TakesMemoryWithWhatIsLive:
    """Stands for a fork server whose process holds too much while the live release is in it."""

    async def run(self, stage: str, request: Path, watch: Callable[[int], None], **_: Any) -> int:
        asked: RehearseRequest = RehearseRequest.read(request)
        if asked.live is not None:
            watch(os.getpid())
        result = RehearseResult(verdicts=[], candidate={}, live={}, live_problem="", samples=7)
        Reply(result=dataclasses.asdict(result)).write(request.with_name(RESULT))
        return 0


def test_a_live_release_that_takes_more_memory_than_it_may_keeps_no_successor_from_being_tried(tmp_path: Path) -> None:
    release = RehearsedRelease(folder="", files={}, formats={}, libraries=(), inputs=(), outputs=())
    request = RehearseRequest(
        candidate=release, live=release, validation=None, moved=None, metrics=(), forbidden_modules=(),
        forbidden_folder="", threads=1,
    )  # fmt: skip
    server: Any = TakesMemoryWithWhatIsLive()
    limits = worker.Limits(seconds=60, memory=10**6)
    asked, result = asyncio.run(worker.rehearse(server, request, tmp_path / "work", limits))
    assert asked.live is None and result.samples == 7
    assert result.live_problem.startswith("rehearse: the worker process was killed: expected at most 1.0 MB of memory")
    assert "\n" not in result.live_problem
    # With nothing live it is the candidate that takes it.
    server.run = TakesMemory().run
    with pytest.raises(WorkerError, match="SHIP_REHEARSAL_MEMORY"):
        asyncio.run(worker.rehearse(server, request, tmp_path / "work", limits))


def test_the_process_of_a_rehearsal_is_watched_and_killed(
    object_store: ObjectStore, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This one is over before anybody would look.
    monkeypatch.setattr("train_and_ship.infra.fork_server.POLL_SECONDS", 0.001)
    folder = tmp_path / "release"
    write_release(folder, 1, MODEL)
    manifest = published(object_store, folder, onnx=ARTIFACT)
    little = settings.model_copy(update={"rehearsal_memory": "1MB"})
    with pytest.raises(WorkerError, match="SHIP_REHEARSAL_MEMORY"):
        asyncio.run(try_out(little, asked(object_store, manifest)))


def test_memory_is_of_a_process_and_all_that_it_started_without_what_files_stand_behind() -> None:
    holds = "import subprocess, sys; held = bytearray(b'x' * (20 << 20)); "
    waits = "print(flush=True); sys.stdin.read()"
    starts = "subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdin=0).wait()"
    with subprocess.Popen(
        [sys.executable, "-c", holds + starts, holds + waits], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        assert 40 << 20 <= memory_of(process.pid) < 120 << 20
        process.stdin.close()
    assert memory_of(process.pid) == 0


def test_how_much_memory_a_rehearsal_may_hold_is_a_size_or_a_share(settings: Settings) -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < settings.rehearsal_memory_limit() <= whole // 2
    assert settings.model_copy(update={"rehearsal_memory": "16GB"}).rehearsal_memory_limit() == 16 * 10**9


@pytest.mark.parametrize(
    "golden",
    [
        pytest.param(lambda _: {"x": torch.zeros(1)}, id="no dots"),
        pytest.param(lambda found: {key: one for key, one in found.items() if "eager" not in key}, id="no answers"),
        pytest.param(lambda found: {key.replace("input.x", "input.y"): one for key, one in found.items()}, id="inputs"),
        pytest.param(lambda found: {key.replace("output", "o\x1b["): one for key, one in found.items()}, id="outputs"),
        pytest.param(lambda found: {key.replace("h_1.", "h_²."): one for key, one in found.items()}, id="superscript"),
        pytest.param(lambda _: {}, id="nothing"),
        pytest.param(lambda _: b"x" * 100, id="no safetensors"),
    ],
)
def test_golden_outputs_of_another_shape_are_refused_by_the_name_of_their_file(
    tmp_path: Path, golden: Callable[[dict[str, torch.Tensor]], Any]
) -> None:
    write_release(tmp_path / "release", 1, MODEL)
    written = golden(load_file(tmp_path / "release" / GOLDEN))
    if isinstance(written, bytes):
        (tmp_path / "release" / GOLDEN).write_bytes(written)
    else:
        save_file(written, tmp_path / "release" / GOLDEN)
    candidate = RehearsedRelease(
        folder=str(tmp_path / "release"), files={}, formats={"onnx": ARTIFACT}, libraries=(),
        inputs=[TensorSpec(name="x", dtype="float32", shape=["batch", FEATURES])],
        outputs=[TensorSpec(name="output", dtype="float32", shape=["batch", CLASSES])],
    )  # fmt: skip
    request = RehearseRequest(
        candidate=candidate, live=None, validation=None, moved=None, metrics=(), forbidden_modules=(),
        forbidden_folder="", threads=1,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"^golden\.safetensors of the release: expected tensors .*; got \w"):
        rehearse._golden(request, ["output"])


def test_what_a_rehearsal_says_of_golden_outputs_is_a_refusal(
    settings: Settings, object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_release(tmp_path / "release", 1, MODEL)
    manifest = published(object_store, tmp_path / "release", onnx=ARTIFACT)

    async def complains(*_: Any, **__: Any) -> None:
        raise JobError(f"{GOLDEN} of the release: expected tensors")

    monkeypatch.setattr(existing, "rehearse", complains)
    monkeypatch.setattr(existing, "fork_server", lambda _: None)
    with pytest.raises(GateError, match=f"release {manifest.release} cannot be tried .*: {GOLDEN} of the release"):
        asyncio.run(try_out(settings, asked(object_store, manifest)))


def verified_of(*formats: str, libraries: tuple[str, ...] = (), **verdicts: str) -> Verified:
    """A release of these formats; each file has its name as its hash."""
    files = {**{kind: f"{kind}-hash" for kind in formats}, **{name: f"{name}-hash" for name in libraries}}
    manifest = Manifest(
        model=MODEL, release="0" * 20, files={name: FileEntry(sha256=sha, bytes=1) for name, sha in files.items()},
        formats={kind: kind for kind in formats}, signature={}, metrics={}, serve={"latency": formats[-1]},
    )  # fmt: skip
    target: Any = Target(
        channel=Channel(Any, MODEL, CHANNEL), release="0" * 20, mlflow_version="", live=None, expects_live=False
    )  # type: ignore[arg-type]
    return Verified(target=target, manifest=manifest, verdicts=verdicts)


def test_every_format_but_onnx_carries_code() -> None:
    known = {*FORMAT_FILES, *INT8_FILES}
    assert set(WITHOUT_CODE) == {kind for kind in known if kind.startswith("onnx")}


@pytest.mark.parametrize(
    ("made_here", "verdicts", "word", "loaded", "libraries", "said"),
    [
        ((), {}, False, ["onnx"], False, {"not loaded": "aoti, pt2: not signed; only their hashes and archives were "
                                          "looked at; what it recommends is among them: pt2"}),
        (("pt2-hash", "ops.so-hash"), {}, False, ["onnx", "pt2"], True,
         {"unsigned": "pt2: made by a run on this machine",
          "not loaded": "aoti: not signed; only their hashes and archives were looked at"}),
        # A library is loaded for all formats: one that came from elsewhere keeps all that may need it out.
        (("pt2-hash", "aoti-hash"), {}, False, ["onnx"], False, None),
        (("pt2-hash", "ops.so-hash"), {}, True, ["aoti", "onnx", "pt2"], True,
         {"unsigned": "pt2: made by a run on this machine", "loaded unsigned": "aoti: by --load-unsigned"}),
        ((), {"signature": "by key 0123"}, False, ["aoti", "onnx", "pt2"], True, {}),
    ],
    ids=["nobody vouches", "made here in part", "library from elsewhere", "by a word", "signed"],
)  # fmt: skip
def test_what_is_loaded_is_what_somebody_vouches_for(
    made_here: tuple[str, ...], verdicts: dict[str, str], word: bool, loaded: list[str], libraries: bool,
    said: dict[str, str] | None,
) -> None:  # fmt: skip
    verified = verified_of("aoti", "onnx", "pt2", libraries=("ops.so",), **verdicts)
    chosen = _choose(verified, made_here, load_unsigned=word)
    assert (chosen.loaded, chosen.libraries) == (loaded, libraries)
    assert said is None or chosen.said == said


def test_only_complete_exports_of_runs_here_vouch_for_their_bytes(tmp_path: Path) -> None:
    for name, complete in (("a", True), ("b", False)):
        stage = StageFolder(tmp_path / name, "export", inputs="")
        (stage.begin() / "model.pt2").write_bytes(name.encode())
        if complete:
            stage.finish()
    assert _hashes_of_runs(tmp_path) == {FileEntry.of(tmp_path / "a" / "export" / "model.pt2").sha256}


# ---- archives


def archive(*records: tuple[str, bytes], how: Callable[[zipfile.ZipInfo], None] = lambda info: None) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as packed, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Duplicate name")
        for name, content in records:
            info = zipfile.ZipInfo(name)
            how(info)
            packed.writestr(info, content)
    return held.getvalue()


def compressed(info: zipfile.ZipInfo) -> None:
    info.compress_type = zipfile.ZIP_DEFLATED


class Harmless:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("loaded",)


SAMPLES = "model/data/sample_inputs/model.pt"
TENSORS = pickle.dumps({"a": 1.5}, 2)
CALLS = pickle.dumps(Harmless(), 2)
NEWER = pickle.dumps(Harmless(), 4)
GOOD = [("model/data.pkl", TENSORS), ("model/version", b"3\n")]


@pytest.mark.parametrize(
    ("kind", "content", "fault"),
    [
        ("torchscript", b"no archive", "a file that does not end as one"),
        ("torchscript", archive(*GOOD) + b"more", "a file that does not end as one"),
        ("torchscript", b"before" + archive(*GOOD), "does not lie behind the record before it"),
        ("torchscript", archive(("m/../../x", b"1")), "a record with the name 'm/../../x'"),
        ("torchscript", archive(("/etc/x", b"1")), "a record with the name '/etc/x'"),
        ("torchscript", archive(*GOOD, GOOD[0]), "two records with the name 'model/data.pkl'"),
        ("torchscript", archive(*GOOD, how=compressed), "which is not stored as it is"),
        ("torchscript", archive(("m/data.pkl", CALLS)), "m/data.pkl, which names __builtin__ print"),
        ("torchscript", archive(("m/data.pkl", NEWER)), "m/data.pkl, which names something by STACK_GLOBAL"),
        ("torchscript", archive(("m/code/a.debug_pkl", b"\x80\x02nothing")), "names nothing that can be read"),
        ("torchscript", archive(("m/extra/x", archive(*GOOD))), "m/extra/x, an archive in the archive"),
        ("pt2", archive((SAMPLES, TENSORS)), "which is no archive of tensors"),
        ("pt2", archive((SAMPLES, archive(("a/data.pkl", CALLS)))), "with a/data.pkl, which names __builtin__ print"),
        ("pt2", archive((SAMPLES, archive(("a/data.pkl", TENSORS), ("a/data/0", archive(*GOOD))))), "an archive in"),
        ("pt2", archive(("m/data/weights/model_weights_config.json", b'{"w": {"use_pickle": true}}')), "as pickles"),
        ("pt2", archive(("m/data/weights/weight_0", archive(*GOOD))), "weight_0, an archive in the archive"),
        ("aoti", archive(("m/data/x.pkl", CALLS)), "m/data/x.pkl, which names __builtin__ print"),
    ],
)  # fmt: skip
def test_an_archive_that_torch_did_not_write_so_is_not_loaded(
    tmp_path: Path, kind: str, content: bytes, fault: str
) -> None:
    (tmp_path / "model").write_bytes(content)
    assert fault in (find_fault(tmp_path / "model", kind) or "no fault")


def test_records_that_say_other_sizes_than_they_have_are_found(tmp_path: Path) -> None:
    content = bytearray(archive(*GOOD))
    entry = content.index(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = (2**31).to_bytes(4, "little")
    (tmp_path / "model").write_bytes(content)
    assert "two sizes" in (find_fault(tmp_path / "model", "torchscript") or "")
    content[entry + 20 : entry + 24] = (2**31).to_bytes(4, "little")
    (tmp_path / "model").write_bytes(content)
    assert find_fault(tmp_path / "model", "torchscript") is not None


def test_records_that_share_their_bytes_are_found(tmp_path: Path) -> None:
    """A small file that unpacks to a large one."""
    content = bytearray(archive(("a", b"x" * 1000), ("b", b"y" * 1000)))
    second = content.rindex(b"PK\x01\x02")
    content[second + 42 : second + 46] = (0).to_bytes(4, "little")
    (tmp_path / "model").write_bytes(content)
    assert "does not lie behind" in (find_fault(tmp_path / "model", "torchscript") or "")


def changed(content: bytes, *places: tuple[int, bytes]) -> bytes:
    """With other bytes at some places; a place below 0 is counted from the directory on."""
    found = bytearray(content)
    for place, to in places:
        place = place if place >= 0 else content.index(b"PK\x01\x02") - place
        found[place : place + len(to)] = to
    return bytes(found)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"x" * 100 + archive(*GOOD)[-22:], id="no directory"),
        pytest.param(changed(archive(("a", b"x")), (8, b"\x63"), (-10, b"\x63")), id="an unknown method"),
        pytest.param(changed(archive(("a", b"x")), (8, b"\x0e"), (-10, b"\x0e")), id="another method"),
        pytest.param(changed(archive(("a", b"x" * 99), how=compressed), (31, b"\xff" * 3)), id="broken deflate"),
        pytest.param(changed(archive(("a", b"x")), (6, b"\x01"), (-8, b"\x01")), id="encrypted"),
        pytest.param(changed(archive(("a", b"\x80\x02x")), (33, b"y")), id="a wrong CRC"),
        pytest.param(changed(archive(("a", b"x")), (0, b"\xff")), id="no header"),
    ],
)
def test_a_file_that_ends_as_an_archive_and_is_none_is_refused_by_its_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "notes.bin").write_bytes(content)
    with pytest.raises(ReleaseError, match=r"notes\.bin: expected (an archive that can be|records that are)"):
        find_pickle(tmp_path / "notes.bin", None)
    for kind in ARCHIVES:
        assert find_fault(tmp_path / "notes.bin", kind) is not None
    with pytest.raises(ReleaseError, match=r"notes\.bin"):
        build_manifest(tmp_path, model=MODEL, formats={}, signature={}, metrics={})


def test_what_looking_through_a_release_costs_has_a_limit_for_all_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = b"\x80\x02" + b"N0" * 40
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).write_bytes(archive(("x", nothing), ("y", b"")))
    for effort, said in ((Effort(directories=150), "directories of at most"), (Effort(pickled=100), "a: x|b.bin: x")):
        assert find_pickle(tmp_path / "a.bin", None, effort) is None
        with pytest.raises(ReleaseError, match=said):
            find_pickle(tmp_path / "b.bin", None, effort)
    (tmp_path / "a.bin").write_bytes(archive(("m/data.pkl", nothing + b"N.")))
    assert find_fault(tmp_path / "a.bin", "torchscript", Effort(pickled=100)) is None
    assert "in pickle's encoding" in (find_fault(tmp_path / "a.bin", "torchscript", Effort(pickled=80)) or "")
    monkeypatch.setattr(archives, "LARGEST_JSON", 20)
    (tmp_path / "a.bin").write_bytes(archive(("m/a.json", b" " * 21)))
    assert "more than 20 bytes" in (find_fault(tmp_path / "a.bin", "pt2") or "")


def test_a_record_is_unpacked_no_further_than_it_looks_like_a_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many small records that unpack to large ones a beginning is read."""
    (tmp_path / "a.bin").write_bytes(archive(*((f"{number}", bytes(2**20)) for number in range(20)), how=compressed))
    read: list[int] = []
    real = zipfile.ZipExtFile.read

    def noted(entry: zipfile.ZipExtFile, size: int | None = -1) -> bytes:
        data = real(entry, size)
        read.append(len(data))
        return data

    monkeypatch.setattr(zipfile.ZipExtFile, "read", noted)
    assert find_pickle(tmp_path / "a.bin", None) is None
    assert read == [2] * 20


def test_what_torch_writes_is_let_through(tmp_path: Path) -> None:
    torch.jit.script(classifier(1)).save(str(tmp_path / SCRIPT))  # type: ignore[no-untyped-call]
    assert find_fault(tmp_path / SCRIPT, "torchscript") is None
    held = io.BytesIO()
    torch.save(((torch.zeros(2, 3), torch.ones(1, dtype=torch.bool)), {"n": torch.zeros((), dtype=torch.int64)}), held)
    (tmp_path / "model.pt2").write_bytes(archive((SAMPLES, held.getvalue()), ("model/models/model.json", b"{}")))
    assert find_fault(tmp_path / "model.pt2", "pt2") is None
    assert set(ARCHIVES) < set(FORMAT_FILES)


def test_a_tensor_may_name_what_torch_reads_without_running_code_and_nothing_else() -> None:
    from torch._weights_only_unpickler import _get_allowed_globals  # type: ignore[attr-defined]

    known = [" ".join(name.rsplit(".", 1)) for name in _get_allowed_globals()]
    assert [name for name in known if not _TENSORS.fullmatch(name)] == []
    for name in ("os system", "builtins eval", "builtins getattr", "torch load", "torch.hub load", "torch._utils x"):
        assert not _TENSORS.fullmatch(name)


@pytest.mark.parametrize(
    ("name", "kind", "content", "fault"),
    [
        ("labels.bin", "", CALLS, r"labels\.bin: expected no pickle in a release, got one"),
        (SCRIPT, "torchscript", archive(("m/data.pkl", CALLS)), r"expected an archive as torch writes it, got m/data"),
        ("notes.bin", "", b"x" * 100 + archive(*GOOD)[-22:], r"notes\.bin: expected an archive that can be looked"),
    ],
)
def test_what_comes_from_the_bucket_is_looked_through_before_it_is_loaded(
    object_store: ObjectStore, tmp_path: Path, name: str, kind: str, content: bytes, fault: str
) -> None:
    """Whoever may write to the bucket needs none of our code to publish."""
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / name).write_bytes(content)
    files = {name: FileEntry.of(folder / name)}
    manifest = Manifest(
        model=MODEL, release=release_id(files), files=files, formats={kind: name} if kind else {}, signature={},
        metrics={},
    )  # fmt: skip
    publish(object_store, folder, manifest)
    with pytest.raises(ReleaseError, match=fault):
        download_anew(object_store, manifest, tmp_path / "copy")
    move(object_store, manifest)
    pointer = read_pointer(Channel(object_store, MODEL, CHANNEL))
    release, problem = live_copy(object_store, tmp_path / "copies", pointer, None)
    assert release is None and problem.startswith("it is broken: ")
