"""`ship up --only`: what is not started here, the environment has to name."""

from __future__ import annotations

from pathlib import Path

import pytest

from train_and_ship.infra.components import components, require_only
from train_and_ship.infra.errors import SettingsError
from train_and_ship.infra.settings import Settings

PREFECT = {"PREFECT_API_URL": "https://prefect.example/api"}


def settings(home: Path, **variables: str) -> Settings:
    return Settings.model_validate({"SHIP_HOME": home, **variables})


def test_with_the_companys_prefect_the_other_two_are_started(tmp_path: Path) -> None:
    here = settings(tmp_path, **PREFECT)
    require_only(here, "s3, mlflow")
    assert [component.name for component in components(here)] == ["s3", "mlflow"]


@pytest.mark.parametrize(
    ("only", "variables", "said"),
    [
        (
            "s3,mlflow",
            {},
            "prefect is not started here, and nothing says where it is: set PREFECT_API_URL",
        ),
        ("s3", PREFECT, "mlflow is not started here, and nothing says where it is: set MLFLOW_TRACKING_URI"),
        ("mlflow,prefect", {}, "s3 is not started here, and nothing says where it is: set SHIP_BUCKET to the bucket"),
        (
            "s3,mlflow,prefect",
            PREFECT,
            "prefect is asked for, and the environment names somebody else",
        ),
        ("s3,worker", PREFECT, "expected some of s3, mlflow, prefect, with commas, got 'worker'"),
    ],
)
def test_what_does_not_fit_the_environment_is_refused(
    tmp_path: Path, only: str, variables: dict[str, str], said: str
) -> None:
    with pytest.raises(SettingsError) as refused:
        require_only(settings(tmp_path, **variables), only)
    assert said in str(refused.value)
