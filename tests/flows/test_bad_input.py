"""Each mistake: one message, no traceback, a non-zero exit, no half-made release, no orphan process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.ceph_rgw import ACCESS_KEY, SECRET_KEY
from tests.support.fault_proxy import Answer, FaultProxy, Rule, StripHeaders
from tests.support.fixture_types import Ship
from tests.support.flow_runs import refused
from tests.support.ports import free_ports
from tests.support.projects import write_project
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import LOOPBACK, Settings


@pytest.fixture
def job(tmp_path: Path) -> str:
    train = {"epochs": 1, "processes": 1, "batch_size": 32}
    return str(write_project(tmp_path, name="mistaken", train=train, export={"formats": ["torchscript"]}))


def nowhere() -> str:
    return f"http://{LOOPBACK}:{free_ports(1)[0]}"


def test_a_missing_job_file(ship: Ship, store: ObjectStore) -> None:
    refused(ship("run", "nowhere.yaml"), store, "nowhere.yaml: no such file")


@pytest.mark.parametrize("verb", ["check", "run"])
def test_a_job_with_mistakes_is_refused_by_check_and_by_run(
    ship: Ship, store: ObjectStore, tmp_path: Path, verb: str
) -> None:
    job = write_project(tmp_path, name="mistaken", nmae="x", train={"epochs": "many"})
    refused(ship(verb, str(job)), store, "nmae: unknown key; did you mean name?", "expected a valid integer")


MISTAKES = {
    "import": ({"model": {"factory": "nested:build"}}, "No module named 'nothere' (nested.py:1"),
    "module": ({"model": {"factory": "absent:build"}}, "expected a module 'absent'"),
    "attribute": ({"model": {"factory": "plain:bild_model"}}, "has no 'bild_model'; it has:"),
    "callable": ({"model": {"factory": "plain:CONSTANT"}}, "expected something callable, got int"),
    "result": ({"model": {"factory": "plain:not_a_model"}}, "must return a torch.nn.Module, got list"),
    "argument": ({"model": {"factory": "plain:build_model", "args": {"depth": 3}}}, "unexpected keyword argument"),
    "empty": ({"data": {"factory": "plain:empty"}}, "returned an empty dataset"),
    "labels": ({"data": {"factory": "plain:labels"}}, "labels must be in 0..2"),
    "item": ({"data": {"factory": "plain:raises"}}, "reading an item failed: OSError: disk gone (plain.py:"),
    "forward": ({"model": {"factory": "plain:narrow"}}, "forward failed on input float32 [32, 4]"),
    "unused": ({"model": {"factory": "plain:unused"}}, "the loss does not depend on extra.weight"),
    "detached": ({"train": {"epochs": 1, "loss": {"factory": "plain:detached"}}}, "its gradient cannot be computed"),
    "loss": ({"train": {"epochs": 1, "loss": {"factory": "plain:nan_loss"}}}, "expected a finite number"),
}

EXTRA = """
    CONSTANT = 3

    def not_a_model():
        return []

    def narrow():
        return nn.Linear(3, 3)

    def empty(split):
        return TensorDataset(torch.zeros(0, 4), torch.zeros(0).long())

    def labels(split):
        return TensorDataset(torch.zeros(9, 4), torch.arange(9))

    class Raises(TensorDataset):
        def __getitem__(self, index):
            raise OSError("disk gone")

    def raises(split):
        return Raises(torch.zeros(9, 4), torch.zeros(9).long())

    class Unused(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.extra = nn.Linear(2, 2)

    def unused():
        return Unused()

    def detached(outputs, target):
        return nn.functional.cross_entropy(outputs, target).detach()

    def nan_loss(outputs, target):
        return outputs.sum() * float("nan")
"""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_check_names_what_is_wrong_in_user_code(ship: Ship, store: ObjectStore, tmp_path: Path, mistake: str) -> None:
    keys, message = MISTAKES[mistake]
    (tmp_path / "nested.py").write_text("import nothere\n")
    job = write_project(tmp_path, extra=EXTRA, name="mistaken", **keys)
    refused(ship("check", str(job)), store, message)


def test_run_stops_at_a_loss_that_becomes_nan(ship: Ship, store: ObjectStore, tmp_path: Path) -> None:
    train = {"epochs": 1, "processes": 2, "batch_size": 32, "learning_rate": 1e38, "optimizer": "sgd"}
    job = write_project(tmp_path, name="mistaken", train=train)
    refused(ship("run", str(job)), store, "the loss became", "learning_rate 1e+38")


def test_an_unreachable_prefect(ship: Ship, store: ObjectStore, job: str) -> None:
    url = nowhere()
    refused(ship("run", job, PREFECT_API_URL=f"{url}/api"), store, "Prefect", url, "ship up")


def test_a_prefect_that_asks_for_an_account_is_named_by_its_variable(
    ship: Ship, stack: Settings, store: ObjectStore, job: str
) -> None:
    with FaultProxy(f"http://{LOOPBACK}:{stack.prefect_port}") as proxy:
        proxy.add(Rule(Answer(401, "Unauthorized")))
        url = f"{proxy.url}/api"
        refused(ship("run", job, PREFECT_API_URL=url), store, "PREFECT_API_AUTH_STRING")
        shown = ship("status", PREFECT_API_URL=url)
    assert "is not known" in shown.errors and "PREFECT_API_AUTH_STRING" in shown.errors, shown.text


def test_an_mlflow_whose_name_nobody_knows(ship: Ship, store: ObjectStore, job: str) -> None:
    url = "http://nowhere.invalid:5000"
    refused(ship("run", job, MLFLOW_TRACKING_URI=url), store, "MLflow", url)


def mine(url: str, bucket: str = "models") -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": url,
        "SHIP_BUCKET": bucket,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def test_an_unreachable_s3(ship: Ship, store: ObjectStore, job: str) -> None:
    url = nowhere()
    refused(ship("run", job, **mine(url)), store, url)


def test_a_bucket_that_does_not_exist(ship: Ship, store: ObjectStore, stack: Settings, job: str) -> None:
    assert stack.s3_endpoint
    refused(ship("run", job, **mine(stack.s3_endpoint, "no-such-bucket")), store, "no-such-bucket")


def test_a_store_that_ignores_conditional_writes(ship: Ship, store: ObjectStore, stack: Settings, job: str) -> None:
    assert stack.s3_endpoint
    with FaultProxy(stack.s3_endpoint) as proxy:
        proxy.add(Rule(StripHeaders(("if-match", "if-none-match")), method="PUT"))
        refused(ship("run", job, **mine(proxy.url)), store, "If-None-Match")
