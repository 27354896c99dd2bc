"""A release that is in the bucket already, tried before it goes live somewhere else.

No Prefect here: `ship promote` uses it too.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import shutil
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torchworker.contract import GOLDEN, PROBES, VALIDATION, WITHOUT_CODE, RehearsedRelease, RehearseResult
from train_and_ship.infra.errors import GateError, JobError
from train_and_ship.infra.fork_server import fork_server
from train_and_ship.infra.home import make_folder
from train_and_ship.infra.in_use import hold
from train_and_ship.infra.interpreter import our_interpreter
from train_and_ship.infra.rundir import MANIFEST as STAGE
from train_and_ship.infra.rundir import TORN, file_sha256
from train_and_ship.infra.settings import Settings
from train_and_ship.infra.shown import on_one_line
from train_and_ship.registry.bucket.signing import SIGNATURE
from train_and_ship.registry.channels.moves import (
    Mover,
    OtherLiveError,
    promote_existing,
    promotion_of,
    release_job,
)
from train_and_ship.registry.channels.pointer import Pointer, read_pointer
from train_and_ship.registry.channels.targets import Scored, Verified
from train_and_ship.registry.diff import read_copied_record
from train_and_ship.registry.environments import Environments
from train_and_ship.registry.gates import live_score, require_rehearsed, worst
from train_and_ship.registry.job.job import Job
from train_and_ship.registry.kind import Kind
from train_and_ship.registry.release.documents import recall
from train_and_ship.registry.release.manifest import LINEAGE, Manifest
from train_and_ship.registry.rollouts.moves import Plan, start
from train_and_ship.registry.rollouts.record import Rollout
from train_and_ship.registry.verdicts import together_in_words
from train_and_ship.tasks.copies import download_anew, live_copy
from train_and_ship.tasks.live_inputs import changed_files
from train_and_ship.tasks.requests import rehearse_request
from train_and_ship.tasks.rooms import bound
from train_and_ship.tasks.worker import Limits, rehearse

_T = TypeVar("_T")


async def try_out(
    settings: Settings, verified: Verified, *, gates: bool = True, load_unsigned: bool = False
) -> Verified:
    """Download it into a clean process, load every format that may be, and run it on its golden inputs.

    A format that carries code is loaded where somebody vouches for it: its release is signed by the key that is
    required, or a run on this machine made these very bytes. The others are verified by hash and looked through, and
    the verdicts say that they were not loaded.

    Where a run that made this very export is still on this machine, its held-out samples score the release and what is
    live; elsewhere nobody has the samples, and `Scored.samples` of the result is 0.

    Args:
        settings: folders of this machine.
        verified: the release, complete by what the bucket says of it.
        gates: whether the release's `vs_live` will be asked.
        load_unsigned: load also what nobody vouches for.

    Raises:
        GateError: a format does not give its golden outputs, or there is nothing to run or nothing that may be.
        ReleaseError: the bytes are not what the manifest says.
    """
    target, manifest, channel = verified.target, verified.manifest, verified.target.channel
    store, model = channel.store, channel.model
    if not manifest.formats or GOLDEN not in manifest.files:
        lacks = f"carries no {GOLDEN}" if manifest.formats else "holds no artifact"
        raise GateError(
            f"{model}: release {target.release} cannot be tried before it goes live: it {lacks}, as releases of "
            "`ship run` do. `ship rollback --to` moves a channel to it without trying it"
        )
    made_here = await asyncio.to_thread(_hashes_of_runs, settings.runs / model)
    chosen = _choose(verified, made_here, load_unsigned=load_unsigned)
    server = fork_server(settings.runs / model / "host.log")
    job = await asyncio.to_thread(_job, verified, gates)
    live = await asyncio.to_thread(read_pointer, channel)
    samples = None
    # Metrics in user code cannot be measured where user code cannot be imported.
    if gates and job is not None and _measurable(job):
        samples = await asyncio.to_thread(_held_out, settings.runs / model, manifest)
    # Not among the copies of live releases: others may be reading those.
    work = settings.home / "rehearsals" / model / f"{target.release}.{uuid.uuid4().hex[:8]}"
    hold(work)
    make_folder(work)
    copy = await asyncio.to_thread(download_anew, store, manifest, work / "candidate")
    chosen = _loads_here(chosen, _made_in(copy), manifest.libraries, f"{model}: release {target.release}")
    candidate = chosen.of(copy)
    current, problem = None, ""
    if samples is not None:
        copies = settings.home / "releases" / model
        current, problem = await asyncio.to_thread(live_copy, store, copies, live, settings.public_key)
    if current is not None and job is not None and job.data.for_live is not None and changed_files(candidate, current):
        problem = "its own files prepare its inputs (data.for_live), by code of the job, which only `ship run` runs"
    request = rehearse_request(job, candidate, None if problem else current, samples, str(work))
    limits = Limits.of(settings)
    release = f"{model}: release {target.release}"
    try:
        _, result = await rehearse(server, request, work, limits)
    except JobError as error:
        # It runs none of a job's code: what it complains of is the release's.
        raise GateError(f"{release} cannot be tried before it goes live: {error}") from error
    require_rehearsed(release, result, f"It was not made live on {channel.name}")
    # What failed can be looked at; what passed is in the bucket.
    shutil.rmtree(work)
    return dataclasses.replace(
        verified,
        verdicts={
            **verified.verdicts,
            "bytes": f"{len(manifest.files)} files, {manifest.total_bytes:,} bytes, downloaded and hashed",
            "rehearsal": f"{len(result.verdicts)} checks passed: {', '.join(chosen.loaded)}",
            **together_in_words(result),
            **chosen.said,
        },
        scored=_scored(job, live, result, problem, current) if gates else None,
    )


async def promote_tried(
    settings: Settings,
    verified: Verified,
    mover: Mover,
    *,
    gates: bool,
    again: bool,
    allow: Sequence[str] = (),
    load_unsigned: bool = False,
    move: Callable[[Callable[[], Pointer]], Awaitable[Pointer]] = asyncio.to_thread,
) -> Pointer:
    """As `promote_existing`; when another release went live meanwhile, the target is held against that one first.

    Args:
        settings: where the services are.
        verified: the target, tried.
        mover: who moves it, and why.
        gates: as in `promote_existing`.
        again: as in `promote_existing`.
        allow: as in `promote_existing`.
        load_unsigned: as in `try_out`.
        move: what does it in a thread.
    """

    def moved(tried: Verified) -> Awaitable[Pointer]:
        return move(functools.partial(promote_existing, tried, mover, gates=gates, again=again, allow=allow))

    return await _beside_what_is_live(settings, verified, moved, gates=gates, load_unsigned=load_unsigned)


async def roll_out_tried(
    settings: Settings,
    verified: Verified,
    mover: Mover,
    plan: Plan,
    *,
    gates: bool = True,
    again: bool = False,
    allow: Sequence[str] = (),
    load_unsigned: bool = False,
) -> Rollout:
    """Begin a rollout of the target: asked is what `promote_tried` asks, once, before the first step.

    Args:
        settings: as of `promote_tried`, as are the others but for the plan.
        verified: the target, tried.
        mover: who starts it, and why.
        plan: its steps.
        gates: as in `promote_existing`.
        again: also a release that a rollback has just left, or whose rollout was given up.
        allow: as in `promote_existing`.
        load_unsigned: as in `try_out`.
    """

    def started(tried: Verified) -> Awaitable[Rollout]:
        asked = promotion_of(tried, mover, gates=gates, again=again, allow=allow)
        return asyncio.to_thread(
            start, tried.target.channel, asked.move, plan,
            accept=asked.accept, replacing=asked.replacing, again=again,
        )  # fmt: skip

    return await _beside_what_is_live(settings, verified, started, gates=gates, load_unsigned=load_unsigned)


# ---- below


async def _beside_what_is_live(
    settings: Settings,
    verified: Verified,
    act: Callable[[Verified], Awaitable[_T]],
    *,
    gates: bool,
    load_unsigned: bool,
) -> _T:
    """What `act` makes of the target as it was tried beside what is live by then."""
    while True:
        try:
            return await act(verified)
        except OtherLiveError:
            verified = await try_out(settings, verified, gates=gates, load_unsigned=load_unsigned)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chosen:
    """Which formats of a release are loaded before it goes live."""

    loaded: Sequence[str]
    libraries: bool
    """Whether its shared libraries are."""
    said: Mapping[str, str]
    """For the record of the move: what was loaded without a signature and why, and what was not loaded."""

    def of(self, candidate: RehearsedRelease) -> RehearsedRelease:
        formats = {kind: file for kind, file in candidate.formats.items() if kind in self.loaded}
        libraries = candidate.libraries if self.libraries else ()
        return dataclasses.replace(candidate, formats=formats, libraries=libraries)


def _choose(verified: Verified, made_here: Collection[str], *, load_unsigned: bool) -> _Chosen:
    """made_here: hashes of the files that runs on this machine have made. Raises GateError when nothing may be loaded.

    Only a signature by the required key is asked about: any other says no more than that somebody signed.
    """
    manifest = verified.manifest
    formats = sorted(manifest.formats)
    code = [kind for kind in formats if kind not in WITHOUT_CODE]
    libraries = manifest.libraries
    if not code or SIGNATURE in verified.verdicts:
        return _Chosen(loaded=formats, libraries=bool(code), said={})

    def is_made_here(name: str) -> bool:
        return manifest.files[name].sha256 in made_here

    # They are loaded for all formats, and before any.
    all_libraries = all(map(is_made_here, libraries))
    own = [kind for kind in code if all_libraries and is_made_here(manifest.formats[kind])]
    rest = [kind for kind in code if kind not in own]
    loaded = formats if load_unsigned else [kind for kind in formats if kind not in rest]
    if not loaded:
        model, release = manifest.model, manifest.release
        raise GateError(
            f"{model}: release {release} cannot be tried before it goes live: {', '.join(rest)} "
            "carry code, which is loaded where it is signed or a run on this machine made it, and neither holds. Set "
            f"SHIP_PUBLIC_KEY and let whoever has the private key `ship sign {model} {release}`; or promote it on the "
            "machine that made it; or have it export onnx too; --load-unsigned runs the code of whoever published it "
            "on this machine, with your rights"
        )
    said = {}
    if own:
        said["unsigned"] = f"{', '.join(own)}: made by a run on this machine"
    if rest and load_unsigned:
        said["loaded unsigned"] = f"{', '.join(rest)}: by --load-unsigned"
    elif rest:
        served = [kind for kind in rest if kind in manifest.serve.values()]
        more = f"; what it recommends is among them: {', '.join(served)}" if served else ""
        said["not loaded"] = f"{', '.join(rest)}: not signed; only their hashes and archives were looked at{more}"
    return _Chosen(loaded=loaded, libraries=bool(own) or load_unsigned, said=said)


def _made_in(copy: RehearsedRelease) -> Environments | None:
    """In what a release says that it was made; None where it does not, or nobody understands it."""
    return recall(Environments, read_copied_record(Path(copy.folder)).lenient_document(LINEAGE).get("environments"))


def _loads_here(chosen: _Chosen, made: Environments | None, libraries: Sequence[str], release: str) -> _Chosen:
    """Without formats that only load in the environment that made them, where that is another one than ours.

    Args:
        chosen: what may be loaded.
        made: in what it was made; None when nobody knows.
        libraries: of operators, in the release.
        release: in words.

    Raises GateError when nothing is left.
    """
    ours = our_interpreter().facts()
    if made is None or not made.where_made or all(made.made.get(name) == ours[name] for name in ("torch", "platform")):
        return chosen
    there = bound(chosen.loaded, libraries)
    if not there:
        return chosen
    left = [kind for kind in chosen.loaded if kind not in there]
    why = f"{', '.join(there)}: only loads where it was made, with {made.made_with}"
    if not left:
        raise GateError(
            f"{release} cannot be tried before it goes live: {why}. `ship run` tries it there; `ship rollback --to` "
            "moves a channel to it without trying it"
        )
    return _Chosen(loaded=left, libraries=False, said={**chosen.said, "not loaded here": why})


def _hashes_of_runs(runs: Path) -> set[str]:
    """Of every file that a complete export stage of a run here has made."""
    return {
        sha256 for said in runs.glob(f"*/export/{STAGE}") for sha256 in json.loads(said.read_text())["files"].values()
    }


def _job(verified: Verified, gates: bool) -> Job | None:
    """The job that made the release; None when it cannot be read and nobody asks its gates."""
    try:
        return release_job(verified.target, verified.manifest)
    except GateError:
        if gates:
            raise
        return None


def _measurable(job: Job) -> bool:
    return all(name in job.metrics for name, gate in job.gates.items() if gate.vs_live is not None)


def _scored(
    job: Job | None, live: Pointer | None, result: RehearseResult, problem: str, copy: RehearsedRelease | None
) -> Scored | None:
    """copy: of what is live, on this disk."""
    if job is None:
        return None
    record = read_copied_record(Path(copy.folder)).kind if copy is not None else Kind()
    return Scored(
        live=live.release if live is not None else "",
        samples=result.samples,
        candidate=worst(job, result.candidate),
        against=worst(job, result.live),
        problem=on_one_line(problem or result.live_problem),
        contradictions=live_score(job, result).contradictions(record, job.direction),
    )


def _held_out(runs: Path, manifest: Manifest) -> Path | None:
    """The complete export stage of the run that made a release, verified, where it is on this machine.

    It is known by the golden outputs, which no two exports share unless model, data and settings are the same.
    """
    golden = manifest.files[GOLDEN].sha256
    for said in sorted(runs.glob(f"*/export/{STAGE}"), key=lambda path: -path.stat().st_mtime):
        try:
            files = json.loads(said.read_bytes())["files"]
        except TORN:
            # A power cut; whoever goes on with that run does the stage again.
            continue
        if files.get(GOLDEN) != golden or not {VALIDATION, PROBES} <= files.keys():
            continue
        if all(file_sha256(said.parent / name) == files[name] for name in (VALIDATION, PROBES)):
            return said.parent
    return None
