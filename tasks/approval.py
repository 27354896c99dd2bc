"""A person says yes or no in Prefect's UI before a channel moves."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import Sequence

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import apause_flow_run
from prefect.input import RunInput, keyset_from_base_key
from prefect.input.actions import aread_flow_run_input
from prefect.runtime import flow_run
from pydantic import Field

from train_and_ship.infra.errors import GateError
from train_and_ship.infra.prefect_events import ASKED
from train_and_ship.infra.provenance import who
from train_and_ship.registry.bucket.tombstones import hold
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.moves import kind_changes
from train_and_ship.registry.channels.rules import Rules, known_rules
from train_and_ship.registry.channels.targets import Verified, described
from train_and_ship.registry.kind import not_allowed
from train_and_ship.registry.report.move import noticed
from train_and_ship.registry.text import Table, escaped
from train_and_ship.tasks.at_work import WAITS
from train_and_ship.tasks.away import is_away, patiently
from train_and_ship.tasks.events import emit
from train_and_ship.tasks.move_report import show_question, what_changes
from train_and_ship.tasks.publish import places, publish_question, waiting
from train_and_ship.tasks.results import Answer, Registered, Rehearsed, Request, Run, consent, flow_run_page
from train_and_ship.tasks.stage import stage_task

WAIT_SECONDS = 7 * 24 * 3600
"""How long a person may take."""
LOOK_SECONDS = 2


class Approval(RunInput):
    """The form that Prefect shows on the page of the paused run."""

    approve: bool = Field(False, description="Put it live.")
    by: str = Field(min_length=1, description="Your name, for the record.")
    comment: str = ""
    account: str = Field("", description="Leave it empty: `ship approve` says here which account it runs under.")


async def ask_person(question: str, *, required: str = "", asked_from: str = "") -> Answer:
    """Pause the flow run, with the question on its page, until somebody has answered there or with `ship approve`.

    Prefect may be away meanwhile, also when the question is put: it is asked again until the person's time is over, and
    an answer that it has taken counts.

    Args:
        question: markdown.
        required: by what a person has to be asked, for the record.
        asked_from: the account of whoever asked for the move, whose yes does not count: another person is asked for.
            Empty where that is not known, or does not matter.

    Raises:
        FlowPauseTimeout: nobody has answered in time.
    """
    asked = question
    while True:
        answer = await _Question(asked).answer()
        if not (answer.approve and asked_from and answer.account == asked_from):
            break
        get_run_logger().warning("%s asked for this move, and another person has to say yes", asked_from)
        asked = f"{question}\n\n**{escaped(asked_from)} asked for it, and another person has to say yes.**"
    said = f"by someone said to be {answer.by}" + (f": {answer.comment}" if answer.comment else "")
    return Answer(approved=answer.approve, said=said, account=answer.account, asked_from=asked_from, required=required)


async def requester() -> str:
    """The account of whoever started this flow run, where that is known and not just said; empty elsewhere.

    Prefect Cloud knows its users. A run that no deployment made was started by the account of this process.
    """
    run_id = uuid.UUID(flow_run.get_id())

    async def read() -> FlowRun:
        async with get_client() as client:
            return await client.read_flow_run(run_id)

    run = await patiently(read, "who asked for this move is asked there")
    if run.created_by is not None and run.created_by.type == "USER":
        return run.created_by.display_value or ""
    return who() if run.deployment_id is None else ""


class _Question:
    """One question to a person. Prefect pauses a run once for each key, and stores question and answer under it."""

    def __init__(self, question: str) -> None:
        self._form = Approval.with_initial_data(description=question)
        self._key = uuid.uuid4().hex
        self._stored = keyset_from_base_key(f"paused-{self._key}")
        self._ends = time.monotonic() + WAIT_SECONDS

    async def answer(self) -> Approval:
        ask, was_away = self._pause, False
        while True:
            try:
                if (found := await ask()) is not None:
                    return found
            except Exception as error:
                if not is_away(error) or self._seconds_left() <= 0:
                    raise
                if not was_away:
                    get_run_logger().warning("Prefect does not answer; the question stays: %s", error)
                # How far the question came is not known.
                ask, was_away = self._look, True
            await asyncio.sleep(LOOK_SECONDS)

    def _seconds_left(self) -> float:
        return self._ends - time.monotonic()

    async def _pause(self) -> Approval | None:
        """As Prefect does it: ends with its first request that is not answered. None where it has paused before."""
        return await apause_flow_run(
            wait_for_input=self._form,
            timeout=max(1, round(self._seconds_left())),
            poll_interval=LOOK_SECONDS,
            key=self._key,
        )

    async def _look(self) -> Approval | None:
        """Take the answer, if there is one; put the question, or what is missing of it, if Prefect has lost it."""
        flow_run_id = uuid.UUID(flow_run.get_id())
        async with get_client() as client:
            state = (await client.read_flow_run(flow_run_id)).state
        # After the state: an answer is stored before the run goes on.
        said = await aread_flow_run_input(self._stored["response"], flow_run_id)
        if said is not None:
            return Approval(**said)
        if self._seconds_left() <= 0:
            raise FlowPauseTimeout("nobody has answered in time")
        if state is not None and state.is_running():
            return await self._pause()
        if await aread_flow_run_input(self._stored["schema"], flow_run_id) is None:
            await self._form.asave(self._stored, flow_run_id)
        return None


async def approval(request: Request, verified: Verified, wanted: bool = False) -> Verified:
    """Ask about a release that is in the bucket already, where that is wanted or the channel's rules require it.

    Nobody is asked about what was live before: going back to it is possible at once.

    Args:
        request: who wants the channel moved, and why; the question says so.
        verified: the release, and what was checked of it.
        wanted: whether a person is asked although the channel does not require it.

    Returns:
        What was approved, with the answer for the record. It replaces what was live when it was asked, nothing else.
        As it was when nobody had to be asked.

    Raises:
        GateError: the answer is no.
    """
    target, channel = verified.target, verified.target.channel
    rules = None if target.was_before else await _rules(channel)
    if not wanted and not (rules is not None and rules.required):
        return verified
    get_run_logger().info(
        "waiting for approval: %s, release %s; now %s", channel, target.release, described(target.live),
    )  # fmt: skip
    asked = f"{channel.model}: shall release {target.release} go live on {channel.name}?"
    changes, problem = await what_changes(verified)
    kinds = not_allowed(await asyncio.to_thread(kind_changes, verified, target.live), dict.fromkeys(request.allow, ""))
    await show_question(request, verified, asked, changes, problem)
    differences = noticed(changes)
    # Until somebody has answered, no collector takes it.
    await asyncio.to_thread(hold, channel.store, channel.model, target.release)
    page = flow_run_page(request.settings, request.mover.flow_run)
    emit(
        ASKED, channel.model, asked,
        f"{request.mover.by}: {request.mover.why}\nAnswer: {page}, or `ship approve {request.mover.flow_run}`",
    )  # fmt: skip
    answer = await ask_person(
        move_question(request, verified, differences, kinds),
        required=str(rules) if rules is not None and rules.required else "asked for with this move",
        asked_from=await requester() if rules is not None and rules.required else "",
    )
    if not answer.approved:
        raise GateError(f"{channel}: release {target.release} was not approved {answer.said}")
    return dataclasses.replace(
        verified,
        target=dataclasses.replace(target, expects_live=True),
        verdicts={**verified.verdicts, **answer.in_words()},
        approved=answer.said,
    )


def move_question(request: Request, verified: Verified, differences: Table, kinds: Sequence[str]) -> str:
    """What a person is asked about a release that is in the bucket already, as markdown.

    Args:
        request: who wants it, and why, in words of theirs.
        verified: the release.
        differences: what callers of the model would notice.
        kinds: what a yes allows besides.
    """
    target, channel = verified.target, verified.target.channel
    return "\n\n".join(
        [
            f"## {channel.model}: release `{target.release}` to `{channel.name}`?",
            f"Now {escaped(described(target.live))}.",
            f"{escaped(request.mover.by)}: {escaped(request.mover.why)}",
            *([differences.markdown()] if differences.rows else []),
            *([consent(kinds)] if kinds else []),
            "Everything that would change is among this run's artifacts, and in "
            f"`ship diff {channel} {target.release[:8]}`.",
        ]
    )


async def candidate_approval(run: Run, registered: Registered, rehearsed: Rehearsed) -> Answer | None:
    """Ask about the candidate of this run, when its job or its channel requires it; None when nobody is asked.

    Nobody is asked about one that the gates refuse anyway. Where it is of another kind than what is live, the question
    says in what, and a yes allows it. A run that is gone on with asks again.

    Args:
        run: whose job says whether a person is asked.
        registered: the candidate.
        rehearsed: the candidate beside what is live, whose numbers are in the question.
    """
    rules = await _rules(run.channel)
    if run.job.release.approval is None and not rules.required:
        return None
    try:
        rehearsed.require_good_enough()
    except GateError:
        return None
    name, channel, release = run.job.name, run.job.release.channel, registered.manifest.release
    compared = [(what, said) for what, said in rehearsed.in_words().items()]
    consents = [rehearsed.asks_consent] if rehearsed.asks_consent else []
    question = "\n\n".join(
        [
            f"## {name}: release `{release}` to `{channel}`?",
            f"It would replace `{rehearsed.live}`." if rehearsed.live else "Nothing is live yet.",
            *([Table(header=("metric", "candidate against live"), rows=compared).markdown()] if compared else []),
            *consents,
            f"[The whole report, with its charts]({registered.version.report_url}); without them it is among the run's "
            f"artifacts. [MLflow version {registered.version.version}]({registered.version.version_url})",
            registered.description,
        ]
    )
    asked = f"{name}: shall release {release} go live on {channel}?"
    why = " ".join(["All gates passed, and a person decides.", *consents])
    waits = waiting(asked, why, rehearsed.live, run.flow_run_id, [run.place])
    await publish_question(run, registered, waits)
    page = f"{run.flow_run_url}, or `ship approve {run.flow_run_id}`"
    get_run_logger().info("waiting for approval of release %s: %s", release, page)
    emit(
        ASKED, name, asked,
        "\n".join([
            *(f"{what}: {said}" for what, said in compared), *consents,
            f"Answer: {page}", *places(run, registered)[1:],
        ]),
    )  # fmt: skip
    await asyncio.to_thread(hold, run.store, name, release)
    required = str(rules) if rules.required else "required by the job"
    # Whoever asks for approval in their own job may give it.
    asked_from = await requester() if rules.required else ""
    with run.timed(WAITS):
        return await ask_person(question, required=required, asked_from=asked_from)


@stage_task("channel-rules", "rules")
async def _rules(channel: Channel) -> Rules:
    """What moves of a channel take. A task, because the bucket may be away for a moment after hours of training."""
    return await asyncio.to_thread(known_rules, channel)
