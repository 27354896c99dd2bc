#!/usr/bin/env bash
# mlflow 3.17.2: search_model_versions returns versions without their aliases, and a version's last_updated_timestamp does
# not move when an alias or a tag of it is set.
# `get_model_version(name, version).aliases` has them, and so has `get_registered_model(name).aliases`; of the same version
# that a search found, `.aliases` is an empty list, not None and no error. Who looks for "the version that is live" in the
# results of a search finds none, and who follows changes by last_updated_timestamp (which a new description does move)
# misses every change of alias. Read aliases from the registered model.
# seen: 2026-11-29: get_model_version: ['prod']; search_model_versions: []; last_updated_timestamp moved by a tag: False, by an alias: False, by a description: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check mlflow-skinny==3.17.2 "sqlalchemy<3" alembic
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import time

from mlflow import MlflowClient

client = MlflowClient("sqlite:///registry.db", "sqlite:///registry.db")
client.create_registered_model("digits")
version = client.create_model_version("digits", "file:///nothing").version


def moved(change):
    """Whether the version's time of change is later after it."""
    before = client.get_model_version("digits", version).last_updated_timestamp
    time.sleep(0.05)
    change()
    return client.get_model_version("digits", version).last_updated_timestamp > before


by_tag = moved(lambda: client.set_model_version_tag("digits", version, "sha256", "0"))
by_alias = moved(lambda: client.set_registered_model_alias("digits", "prod", version))
by_text = moved(lambda: client.update_model_version("digits", version, "the first"))
got = client.get_model_version("digits", version).aliases
(found,) = client.search_model_versions("name = 'digits'")
print(
    f"get_model_version: {got}; search_model_versions: {found.aliases}; last_updated_timestamp moved by a tag: {by_tag}, "
    f"by an alias: {by_alias}, by a description: {by_text}"
)
assert got == ["prod"] and by_text, (got, by_text)
if found.aliases or by_tag or by_alias:
    raise SystemExit("the behaviour has changed")
PYTHON
