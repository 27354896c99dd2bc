"""What the help of each command ends with: lines that can be typed."""

from __future__ import annotations

JOB = "examples/digits/job.yaml"
RUN = "7d1c6f1e-6f4b-4c3e-9d1f-3f0d3a1f6c11"
EXAMPLES: dict[str, tuple[str, ...]] = {
    "init": (
        "ship init",
        "ship init --model shop.net:Net --data shop.data:build_dataset --set model.args.width=32",
        "ship init --example tabular",
    ),
    "up": ("ship up",),
    "down": ("ship down",),
    "status": ("ship status", "ship status --json"),
    "open": ("ship open mlflow", "ship open report digits"),
    "password": ("ship password",),
    "env": ('eval "$(ship env)"',),
    "check": (f"ship check {JOB}", f"ship check {JOB} --no-export --set train.processes=1"),
    "run": (f"ship run {JOB}", f"ship run {JOB} --set train.epochs=1 --channel staging", f"ship run {JOB} --json"),
    "retrain": (f"ship retrain {JOB} --why 'new scans'",),
    "deploy": (f'ship deploy {JOB} --cron "0 2 * * *" --timezone Europe/Berlin',),
    "worker install": ("ship worker install --python .venv/bin/python",),
    "logs": ("ship logs digits", "ship logs digits --follow"),
    "approve": (f"ship approve {RUN} --comment 'looked at the report'",),
    "snapshot": ("ship snapshot data/scans --to s3://my-bucket/scans",),
    "pull": ("ship pull digits --to /srv/digits --follow",),
    "serve": ("ship serve digits --port 8080",),
    "view": ("ship view triton digits", "ship view mlserver digits --to /srv/digits --follow"),
    "history": ("ship history digits", "ship history digits --decisions --last 7", "ship history digits --rollouts"),
    "live": ("ship live digits", 'ship live digits --at "2026-11-17 14:00"'),
    "diff": ("ship diff digits prod~1 prod", "ship diff digits v3 v7 --json"),
    "rollback": (
        "ship rollback digits --why 'errors since 14:00'",
        "ship rollback digits --to prod~2 --why 'wrong labels'",
    ),
    "promote": ("ship promote digits --from staging --why 'a week without complaints'",),
    "rollout": (
        "ship rollout digits staging --why 'new scans'",
        "ship rollout digits 3f2a9c --steps 1,10,100 --every 30m --key patient_id --why 'new scans'",
        "ship rollout digits",
        "ship rollout digits --next --why 'no complaints'",
        "ship rollout digits --stop --why 'errors since 14:00'",
    ),
    "sign": ("ship sign digits 3f2a9c",),
    "channel set": ("ship channel set digits prod --approval required",),
    "channel show": ("ship channel show digits prod",),
    "doctor": ("ship doctor", "ship doctor digits --dry-run"),
    "gc": ("ship gc", "ship gc digits --keep 10 --apply"),
    "iam": ("ship iam trainer --model digits", "ship iam reader"),
    "schema": ("ship schema > job.schema.json",),
}


def examples_of(command: str) -> str:
    """The end of the command's help. A paragraph each, which is what the help keeps apart.

    Raises KeyError for a command without one.
    """
    return "\n\n".join(["Examples:", *EXAMPLES[command]])
