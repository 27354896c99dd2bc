"""Who may import whom, and what a rank process must not have loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.imports import imports, modules
from tests.support.projects import REPOSITORY

OURS = ("flows", "tasks", "registry", "infra", "torchworker", "ship", "shipreader")
ALLOWED = {
    "flows": {"flows", "tasks"},
    "tasks": {"tasks", "registry", "infra", "torchworker.contract"},
    # What a signature covers is defined by who checks it; views are made of what a reader has.
    "registry": {
        "registry",
        "infra",
        "shipreader.signatures",
        "shipreader.errors",
        "shipreader.records",
        "shipreader.mlserver",
    },
    "infra": {"infra"},
    "torchworker": {"torchworker"},
    # Installed alone on serving machines.
    "shipreader": {"shipreader"},
    # The command line sits above everything.
    "ship": set(OURS) - {"torchworker"} | {"torchworker.contract"},
}
ONLY_IN = {
    "prefect": ["flows/", "tasks/", "ship/prefect_plugin.py"],
    # The connection, runs, versions, and what its REST API answers as well: each is a subject of its own.
    "mlflow": [
        "registry/mlflow_client.py",
        "registry/mlflow_runs.py",
        "registry/mlflow_versions.py",
        "registry/mlflow_rest.py",
    ],
    "boto3": ["infra/s3.py", "shipreader/bucket.py"],
    "botocore": ["infra/s3.py", "shipreader/bucket.py"],
    # For one kind of request, of which there may be thousands.
    "obstore": ["infra/small_files.py"],
    "onnx": [],
    "onnxruntime": [
        "torchworker/runtimes.py",
        "torchworker/capture/int8.py",
        "shipreader/onnx_model.py",
        "registry/triton_model.py",
    ],
    "mlserver": ["shipreader/onnx_model.py"],
}
WORKER_MAY_IMPORT = {"torch", "numpy", "safetensors", "onnxruntime", "onnx_ir", "torchao", "executorch", "torchworker"}


def is_allowed(name: str, allowed: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)


@pytest.mark.parametrize("package", OURS)
def test_packages_import_only_the_layers_below_them(package: str) -> None:
    for file, tree in modules(package):
        for name in imports(tree):
            if name.partition(".")[0] in OURS and name != "torchworker":
                assert is_allowed(name, ALLOWED[package]), f"{file} imports {name}"


@pytest.mark.parametrize("package", OURS)
def test_each_service_is_spoken_to_in_one_place(package: str) -> None:
    for file, tree in modules(package):
        for name in imports(tree):
            places = ONLY_IN.get(name.partition(".")[0])
            if places is not None:
                assert any(file.startswith(place) for place in places), f"{file} imports {name}"


def test_workers_import_the_standard_library_torch_and_themselves() -> None:
    for file, tree in modules("torchworker"):
        for name in imports(tree):
            top = name.partition(".")[0]
            assert top in sys.stdlib_module_names | WORKER_MAY_IMPORT, f"{file} imports {name}"


def test_the_reader_imports_the_standard_library_boto3_and_what_checks_signatures() -> None:
    for file, tree in modules("shipreader"):
        for name in imports(tree):
            top = name.partition(".")[0]
            allowed = sys.stdlib_module_names | {"shipreader", "boto3", "botocore", "urllib3", "cryptography"}
            if file == "shipreader/onnx_model.py":
                # MLServer runs a copy of it, in an environment that has only these.
                allowed = sys.stdlib_module_names | {"mlserver", "numpy", "onnxruntime"}
            assert top in allowed, f"{file} imports {name}"


def test_the_contract_needs_no_torch() -> None:
    script = "import sys, torchworker.contract; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-P", "-c", script], text=True).strip() == "False"


def test_a_rank_process_never_loads_prefect_mlflow_or_boto3() -> None:
    script = (
        "import sys, json\n"
        "import torchworker.host, torchworker.train, torchworker.export, torchworker.check, torchworker.validate\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    loaded = set(json.loads(subprocess.check_output([sys.executable, "-P", "-c", script], text=True)))
    assert "torch" in loaded
    assert not loaded & {"prefect", "mlflow", "boto3", "botocore", "pydantic", "flows", "tasks", "registry", "infra"}


def test_the_rank_package_brings_itself_and_safetensors_beside_bare_torch() -> None:
    script = (
        "import json, sys, torch, torch.distributed.launcher.api\n"
        "bare = set(sys.modules)\n"
        "import torchworker.train\n"
        "added = {name for name in set(sys.modules) - bare if name.partition('.')[0] not in sys.stdlib_module_names}\n"
        # Python's own record of how it was built, for sysconfig.
        "print(json.dumps(sorted(name for name in added if not name.startswith('_sysconfigdata'))))"
    )
    added = json.loads(subprocess.check_output([sys.executable, "-P", "-c", script], text=True))
    # Nothing of torch that torch does not load by itself: compilers and exporters take seconds.
    assert {name.partition(".")[0] for name in added} == {"torchworker", "safetensors"}


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    script = "import sys, ship.main; print(sorted({'torch', 'prefect', 'mlflow', 'boto3'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-P", "-c", script], text=True).strip() == "[]"


def test_a_rollback_has_a_client_of_the_store_and_no_heavy_library() -> None:
    script = (
        "import sys, ship.rollback\n"
        "from infra.objectstore import ObjectStore\n"
        "from infra.settings import Settings\n"
        "ObjectStore.from_settings(Settings.load())\n"
        "assert 'botocore' in sys.modules\n"
        # Settings of other libraries and the manager of large transfers take a fifth of a rollback to load.
        "heavy = {'torch', 'prefect', 'mlflow', 'numpy', 'pydantic_settings', 'boto3', 's3transfer'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-P", "-c", script], text=True).strip() == "[]"


def test_the_wheel_holds_every_package_and_nothing_else(tmp_path: Path) -> None:
    # A copy: building in place leaves a build folder behind.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for package in OURS:
        shutil.copytree(REPOSITORY / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if name.endswith(".py")}
    expected = {file for package in OURS for file, _ in modules(package)}
    assert packed == expected
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == set(OURS)
    assert "registry/page.html.jinja" in names
    (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
    text = zipfile.ZipFile(wheel).read(entry_points).decode()
    assert "ship = ship.main:main" in text and "[prefect.plugins]" in text


def test_no_module_of_ours_hides_a_standard_library_module() -> None:
    assert not set(OURS) & set(sys.stdlib_module_names)
