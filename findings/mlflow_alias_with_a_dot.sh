#!/usr/bin/env bash
# mlflow 3.17.2: a registered model may be called `eu.west`, an alias may not.
# `set_registered_model_alias(name, "eu.west", version)` raises INVALID_PARAMETER_VALUE, with SQLite behind it and no server
# too, while the same text is accepted as the name of a model and as the value of a tag. Who mirrors deployment channels
# (`eu.west`, `2026.11`) as aliases learns it at the first promotion, after the release is out; a dash works.
# seen: 2026-11-29: model name with a dot: accepted; alias with a dot: INVALID_PARAMETER_VALUE: Invalid alias name: 'eu.west'. Names may only contain alphanumerics, underscores (_), and dashes (-).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check mlflow-skinny==3.17.2 "sqlalchemy<3" alembic
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

client = MlflowClient("sqlite:///registry.db", "sqlite:///registry.db")
client.create_registered_model("eu.west")
version = client.create_model_version("eu.west", "file:///nothing", tags={"channel": "eu.west"}).version
client.set_registered_model_alias("eu.west", "eu-west", version)
try:
    client.set_registered_model_alias("eu.west", "eu.west", version)
except MlflowException as error:
    print(f"model name with a dot: accepted; alias with a dot: {error.error_code}: {error}")
    assert error.error_code == "INVALID_PARAMETER_VALUE", error
else:
    raise SystemExit("an alias with a dot is accepted: the behaviour has changed")
PYTHON
