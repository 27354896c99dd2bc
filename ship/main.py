"""The `ship` command."""

from __future__ import annotations

import os
import sys
from gc import freeze, set_threshold
from pathlib import Path
from typing import Annotated

import typer

from train_and_ship.ship.command import Command
from train_and_ship.ship.examples import examples_of
from train_and_ship.ship.rollout_command import rollout

# Only light imports here: `ship --help` must be instant. Each command imports what it needs.
app = typer.Typer(
    name="ship",
    help="Train a PyTorch model, prove its exports equal to it, and ship it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
START, STACK, TRAINING = "A new project", "The local stack", "Training"
RELEASES, SERVING, CARE = "Releases", "Serving", "Keeping order"
"""Under which commands are listed."""


def _version(asked: bool) -> None:
    if asked:
        from train_and_ship.ship.version import versions

        typer.echo(versions())
        raise typer.Exit()


@app.callback()
def ship(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version, and of what it uses."),
    ] = False,
) -> None:
    """Train a PyTorch model, prove its exports equal to it, and ship it."""


@app.command(rich_help_panel=START)
def init(
    folder: Annotated[Path, typer.Argument(help="Of the project; the current one when left out.")] = Path(),
    model: Annotated[str, typer.Option(metavar="MODULE:NAME", help="A torch.nn.Module, or what makes one.")] = "",
    data: Annotated[str, typer.Option(metavar="MODULE:NAME", help="What makes a dataset, given split.")] = "",
    name: Annotated[str, typer.Option(help="Of the model; the project's when left out.")] = "",
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Further keys, as model.args.width=32; can be repeated."),
    ] = None,
    example: Annotated[str, typer.Option(help="A running example instead: digits, tabular or text.")] = "",
) -> None:
    """Write the job file of a project, made of what its sources have; asks what they leave open, in a terminal."""
    from train_and_ship.infra.errors import RequestError
    from train_and_ship.ship.init import Wanted, ask_here, init, init_example

    if example:
        if model or data or name or changes:
            raise RequestError("--example: expected it alone, got --model, --data, --name or --set too")
        init_example(folder, example)
    else:
        init(folder, Wanted(model=model, data=data, name=name, changes=changes or ()), ask_here())


@app.command(rich_help_panel=STACK)
def up(
    only: Annotated[
        str, typer.Option(help="Which of s3, mlflow, prefect, with commas; where the others are the environment says.")
    ] = "",
) -> None:
    """Start the local stack (S3, MLflow, Prefect with a worker) and deploy the flows; safe to repeat."""
    from train_and_ship.ship.up import up

    up(only)


@app.command(rich_help_panel=STACK)
def down() -> None:
    """Stop the local stack and everything it started; data stays."""
    from train_and_ship.infra import stack
    from train_and_ship.infra.settings import Settings

    stack.down(Settings.load(), typer.echo)


@app.command(rich_help_panel=STACK)
def status(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show what runs, and for every model what is live, what retraining decided, and when it is asked again.

    Exits with 1 unless everything is up.
    """
    from train_and_ship.ship.status import status

    status(as_json)


@app.command(name="open", rich_help_panel=STACK)
def open_page(
    page: Annotated[str, typer.Argument(help="prefect, mlflow, or report with a model.")] = "prefect",
    model: Annotated[str, typer.Argument(help="Whose newest run.")] = "",
    only_print: Annotated[bool, typer.Option("--print", help="Print the address alone.")] = False,
) -> None:
    """Open a page in the browser: Prefect, MLflow, or the report of a model's newest run on this machine."""
    from train_and_ship.ship.pages import open_page

    open_page(page, model, only_print)


@app.command(rich_help_panel=STACK)
def password(
    env: Annotated[bool, typer.Option("--env", help="Print what a shell exports, for Python, curl and aws.")] = False,
) -> None:
    """Print the password of the local stack: for the pages of Prefect and MLflow, and the secret of the S3 server."""
    from train_and_ship.ship.password import password

    password(env)


@app.command(rich_help_panel=STACK)
def env() -> None:
    """Print what a shell exports, so that Python, curl, aws and readers get into the local stack."""
    from train_and_ship.ship.password import password

    password(True)


channel_app = typer.Typer(help="What moves of a channel take: whether a person has to say yes.", no_args_is_help=True)
app.add_typer(channel_app, name="channel", rich_help_panel=RELEASES)
Named = Annotated[
    list[str], typer.Argument(metavar="[MODEL] CHANNEL", help="The model may be left out when there is only one.")
]


@channel_app.command("set")
def channel_set(
    names: Named,
    approval: Annotated[str, typer.Option(help="required or none: whether a person says yes before it moves.")],
    why: Annotated[str, typer.Option(help="The reason, for the record.")] = "",
    new: Annotated[bool, typer.Option("--new", help="Also of a model that has no release yet.")] = False,
) -> None:
    """Say what moves of a channel take from now on: by runs, promotions, and rollbacks to a release that is named."""
    from train_and_ship.ship.channel import set_channel

    set_channel(names, approval, why, new)


@channel_app.command("show")
def channel_show(names: Named, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show what moves of a channel take, and who said so."""
    from train_and_ship.ship.channel import show_channel

    show_channel(names, as_json)


Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="What the job says otherwise this once, such as train.epochs=1; can be repeated.",
    ),
]


@app.command(rich_help_panel=TRAINING)
def check(
    job: Path,
    no_export: Annotated[bool, typer.Option("--no-export", help="Do not export the untrained model.")] = False,
    changes: Set = None,
    as_json: Json = False,
) -> None:
    """Build everything a job file refers to, try it once, and say what would be trained and shipped."""
    from train_and_ship.ship.check import check

    check(job, not no_export, changes or (), as_json)


Allow = Annotated[
    list[str] | None,
    typer.Option(
        help="In what the release may be of another kind than what is live, this once: signature, labels, formats, "
        "model, live_score or runtime; can be repeated."
    ),
]


@app.command(rich_help_panel=TRAINING)
def run(
    job: Path,
    resume: Annotated[str, typer.Option(help="Go on with this run: the name of its folder, its flow run id.")] = "",
    allow: Allow = None,
    changes: Set = None,
    channel: Annotated[str, typer.Option(help="Put it live on this channel, whatever the job says.")] = "",
    as_json: Json = False,
) -> None:
    """Train, export, validate, register and promote one job, here and now."""
    from train_and_ship.ship.run import run

    run(job, resume, allow, [*(changes or ()), *([f"release.channel={channel}"] if channel else ())], as_json)


@app.command(rich_help_panel=TRAINING)
def retrain(
    job: Path,
    why: Annotated[str, typer.Option(help="What is new, for the record.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Train although nothing has changed.")] = False,
    resume: Annotated[str, typer.Option(help="Go on with this run: the name of its folder, its flow run id.")] = "",
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Train again if code, data, job or environment changed, and put live what is better than what is there."""
    from train_and_ship.ship.run import retrain

    retrain(job, why, force, resume, allow, as_json)


worker_app = typer.Typer(help="What runs the code of a job in an environment of its own.", no_args_is_help=True)
app.add_typer(worker_app, name="worker", rich_help_panel=TRAINING)


@worker_app.command("install")
def worker_install(
    python: Annotated[Path, typer.Option(help="Interpreter of the environment.")] = Path(".venv/bin/python"),
    exports: Annotated[bool, typer.Option(help="Also what ONNX files are made with.")] = True,
) -> None:
    """Install torchworker into the environment of a project, from the wheel that is carried here."""
    from train_and_ship.ship.worker import install

    install(python, exports)


@app.command(rich_help_panel=TRAINING)
def logs(
    model: str,
    run: Annotated[str, typer.Argument(help="Id of the flow run; the newest on this machine when left out.")] = "",
    follow: Annotated[bool, typer.Option(help="Go on until the run has ended.")] = False,
) -> None:
    """Show the log of a model's run, as Prefect has it."""
    from train_and_ship.ship.logs import logs

    logs(model, run, follow)


@app.command(rich_help_panel=TRAINING)
def deploy(
    jobs: Annotated[list[Path], typer.Argument(help="job files, one a model")],
    cron: Annotated[
        str | None, typer.Option(help='when, such as "0 2 * * *"; retrain.cron of each job when absent')
    ] = None,
    timezone: Annotated[str | None, typer.Option(help="such as Europe/Berlin")] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Run the files where they are, on this machine, as they are then.")
    ] = False,
    pool: Annotated[str, typer.Option(help="work pool whose workers run it; the local one when absent")] = "",
    image: Annotated[str, typer.Option(help="of the containers, for pools of type docker or kubernetes")] = "",
    variables: Annotated[
        list[str] | None, typer.Option("--job-variable", help="NAME=VALUE, as the pool's template has it; repeatable")
    ] = None,
) -> None:
    """Retrain the models of these job files on a schedule, each as a deployment of its own; safe to repeat."""
    from train_and_ship.ship.deploy import Where, deploy

    deploy(jobs, cron, timezone, Where(in_place=in_place, pool=pool, image=image, variables=variables or ()))


@app.command(rich_help_panel=TRAINING)
def approve(
    run: Annotated[str, typer.Argument(help="id of the flow run that waits")],
    reject: Annotated[bool, typer.Option("--reject", help="say no")] = False,
    by: Annotated[str, typer.Option(help="your name, for the record; your account when absent")] = "",
    comment: str = "",
) -> None:
    """Answer a run that waits for a person's approval, as its page in Prefect does."""
    from train_and_ship.ship.approve import approve

    approve(run, not reject, by, comment)


@app.command(rich_help_panel=TRAINING)
def snapshot(
    folder: Path, to: Annotated[str, typer.Option(help="Bring it to s3://bucket/prefix as well.")] = ""
) -> None:
    """Name the data in a folder by a manifest that holds the hash of every file; job files refer to it."""
    from train_and_ship.ship.snapshot import snapshot

    snapshot(folder, to)


Channel = Annotated[str, typer.Option(help="The channel: prod, staging, or any name.")]
Why = Annotated[str, typer.Option(help="The reason, for the record.")]


@app.command(rich_help_panel=SERVING)
def pull(
    model: str,
    channel: Channel = "prod",
    to: Annotated[Path | None, typer.Option(help="Its folder; TO/current leads to what is live.")] = None,
    follow: Annotated[bool, typer.Option(help="Go on until interrupted.")] = False,
) -> None:
    """Bring what is live on a channel to this machine, verified; what was there before stays when that fails."""
    from train_and_ship.ship.pull import pull

    pull(model, channel, to, follow)


@app.command(rich_help_panel=SERVING)
def serve(
    model: str,
    channel: Channel = "prod",
    to: Annotated[Path | None, typer.Option(help="Where releases are kept, as with pull.")] = None,
    port: Annotated[int, typer.Option(help="HTTP on 127.0.0.1; the next two: gRPC, metrics.", min=1, max=65533)] = 8080,
    interval: Annotated[float, typer.Option(help="Seconds between looks at the channel.")] = 10.0,
    batch_size: Annotated[
        int,
        typer.Option(
            help="Rows of several requests computed together, at most what promotions prove; 1 turns it off.",
            min=1,
            max=64,
        ),
    ] = 64,
    max_stale: Annotated[
        float | None, typer.Option(help="Not ready when what is live is unknown for more seconds.", min=1)
    ] = None,
    max_requests: Annotated[int, typer.Option(help="Computed or waiting at once; more get 429.", min=1)] = 256,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name that requests may carry as Host besides localhost: a proxy's.")
    ] = None,
) -> None:
    """Serve what is live on a channel over HTTP and gRPC (Open Inference Protocol), and follow the channel."""
    from shipreader.inference_limits import Limits
    from train_and_ship.ship.serve import serve

    limits = Limits(requests=max_requests, hosts=tuple(allow_host or ()))
    serve(model, channel, to, port, interval, batch_size, max_stale, limits)


@app.command(rich_help_panel=SERVING)
def view(
    layout: Annotated[str, typer.Argument(help="triton, kserve or mlserver.")],
    model: str,
    channel: Channel = "prod",
    backend: Annotated[
        str, typer.Option(help="Triton's: onnxruntime, or python where it has only that.")
    ] = "onnxruntime",
    to: Annotated[Path | None, typer.Option(help="Where releases are kept, as with pull.")] = None,
    follow: Annotated[bool, typer.Option(help="Go on until interrupted.")] = False,
) -> None:
    """Write what is live in the layout that another server reads: Triton and KServe in the bucket, MLServer here."""
    from train_and_ship.ship.view import view

    view(layout, model, channel, backend, to, follow)


@app.command(rich_help_panel=RELEASES)
def sign(model: str, release: str) -> None:
    """Sign a release that is in the bucket already, with the key that SHIP_SIGNING_KEY names."""
    from train_and_ship.ship.sign import sign

    sign(model, release)


@app.command(rich_help_panel=CARE)
def iam(
    role: Annotated[str, typer.Argument(help="trainer, promoter, owner, reader, gc, viewer or server.")],
    model: Annotated[str, typer.Option(help="For this model alone; a role that writes needs one.")] = "*",
    channel: Annotated[str, typer.Option(help="For this channel alone.")] = "*",
    kms_key: Annotated[str, typer.Option(help="ARN of the key of a bucket with SSE-KMS.")] = "",
    write_once: Annotated[
        bool | None,
        typer.Option(
            "--write-once/--no-write-once",
            help="Whether it says that records are made once, which takes a store that knows s3:if-none-match; "
            "where no other store than AWS's is set, it does.",
        ),
    ] = None,
) -> None:
    """Print the least-privilege IAM policy of a role on the bucket."""
    from train_and_ship.ship.iam import iam

    iam(role, model, channel, kms_key, write_once)


@app.command(rich_help_panel=RELEASES)
def history(
    model: str,
    channel: Channel = "prod",
    as_json: Json = False,
    decisions: Annotated[bool, typer.Option("--decisions", help="What retraining decided instead.")] = False,
    rollouts: Annotated[bool, typer.Option("--rollouts", help="Every step of every rollout instead.")] = False,
    last: Annotated[int, typer.Option(help="How many decisions, or versions of rollouts.", min=1)] = 30,
) -> None:
    """Show every move of a channel: when, who, from what to what, why, by which flow run, with which verdicts."""
    from train_and_ship.ship.history import history, show_decisions, show_rollouts

    if rollouts:
        show_rollouts(model, channel, as_json, last)
    elif decisions:
        show_decisions(model, channel, as_json, last)
    else:
        history(model, channel, as_json)


@app.command(rich_help_panel=RELEASES)
def live(
    model: str,
    channel: Channel = "prod",
    at: Annotated[
        str, typer.Option(help='When: "2026-11-17 14:00", local time; or with +01:00, UTC or Europe/Berlin behind it.')
    ] = "",
    as_json: Json = False,
) -> None:
    """Show what is live on a channel, or was at a time; exits with 1 when nothing was."""
    from train_and_ship.ship.history import live

    live(model, channel, at, as_json)


@app.command(rich_help_panel=RELEASES)
def diff(
    releases: Annotated[
        list[str],
        typer.Argument(metavar="[MODEL] BEFORE AFTER", help="Releases: an id or its beginning, prod, prod~1, v7."),
    ],
    as_json: Json = False,
) -> None:
    """Show what changed between two releases: kind, metrics, parity, latency, size, code, data, packages, job."""
    from train_and_ship.ship.diff import diff

    diff(releases, as_json)


@app.command(rich_help_panel=RELEASES)
def rollback(
    model: str,
    why: Why,
    channel: Channel = "prod",
    to: Annotated[str, typer.Option(help="A release instead: an id or its beginning, prod~2, staging, v7.")] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="Read nothing back: believe what is said of the files.")
    ] = False,
) -> None:
    """Put back what was live before; going back twice goes back two releases."""
    from train_and_ship.ship.rollback import rollback

    rollback(model, channel, to, why, quick)


@app.command(rich_help_panel=RELEASES)
def promote(
    model: str,
    why: Why,
    source: Annotated[str, typer.Option("--from", help="A channel, or a release: an id or its beginning, v7.")],
    to: Annotated[str, typer.Option(help="The channel that is moved.")] = "prod",
    no_gates: Annotated[bool, typer.Option("--no-gates", help="Do not ask the job's vs_live gates.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Also a release that a rollback has just left.")] = False,
    allow: Allow = None,
    load_unsigned: Annotated[
        bool, typer.Option("--load-unsigned", help="Also run code of the release that nobody signed, to try it.")
    ] = False,
) -> None:
    """Put a release that is in the bucket already live on a channel."""
    from train_and_ship.ship.rollback import promote

    promote(model, source, to, why, not no_gates, again, allow, load_unsigned)


app.command(rich_help_panel=RELEASES)(rollout)


@app.command(rich_help_panel=CARE)
def doctor(
    model: Annotated[str, typer.Argument(help="All models when left out.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be mended.")] = False,
) -> None:
    """Compare pointers, histories, releases and MLflow's aliases, and mend what takes no decision."""
    from train_and_ship.ship.doctor import doctor

    doctor(model, dry_run)


@app.command(rich_help_panel=CARE)
def gc(
    model: Annotated[str, typer.Argument(help="All models when left out.")] = "",
    keep: Annotated[int, typer.Option(help="How many releases of each channel stay.")] = 5,
    slowest_reader: Annotated[
        str, typer.Option(help="How long a release stays after it went off, or in: 12h, 7d.")
    ] = "7d",
    grace: Annotated[str, typer.Option(help="Between mark and deletion; at least 1h.")] = "1d",
    apply: Annotated[bool, typer.Option("--apply", help="Do it; without this, only say what would be done.")] = False,
    delete_versions: Annotated[
        bool, typer.Option("--delete-versions", help="In MLflow too, instead of a tag.")
    ] = False,
) -> None:
    """Mark releases that nobody needs any more, and delete those that were marked long enough ago."""
    from train_and_ship.registry.maintenance.retention import Policy
    from train_and_ship.ship.gc import duration, gc

    reader, wait = duration("--slowest-reader", slowest_reader), duration("--grace", grace)
    gc(model, Policy(keep_last=keep, slowest_reader=reader, grace=wait), apply, delete_versions)


@app.command(rich_help_panel=CARE)
def schema(markdown: bool = False) -> None:
    """Print the JSON schema of job files, for editors; --markdown prints docs/job-file.md instead."""
    from train_and_ship.ship.job_reference import schema

    schema(markdown)


for group, words in ((app, ""), (channel_app, "channel "), (worker_app, "worker ")):
    for command in group.registered_commands:
        assert command.callback is not None, "each is a function"
        command.cls = Command
        command.epilog = examples_of(words + (command.name or command.callback.__name__))


def main() -> None:
    """Entry point: one clear message instead of a traceback. Exits 2 for the user's mistakes, 1 for other failures."""
    # Imports make a great many objects and no garbage: looking for it as often as usual is a tenth of a short command.
    set_threshold(100_000)
    # Ours has none; looking for them reads what every installed package says of itself.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "true")
    from train_and_ship.infra.errors import ShipError, UserError

    try:
        app()
    except ShipError as error:
        from rich.console import Console
        from rich.text import Text

        console = Console(stderr=True, soft_wrap=True)
        console.print(Text(str(error), style="red"))
        for note in getattr(error, "__notes__", ()):
            console.print(Text(note))
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        # Else the interpreter looks through everything that was imported once more before it ends: half a second.
        freeze()


if __name__ == "__main__":
    main()
