"""Who may import whom, and what a rank process must not have loaded."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.import_graph import FOLDERS, module_name
from tests.support.imports import imports, modules
from tests.support.projects import REPOSITORY
from train_and_ship.ship.init import KINDS

TOPS = {"train_and_ship", "torchworker", "shipreader"}
ALLOWED = {
    "flows": {"flows", "tasks"},
    "tasks": {"tasks", "registry", "infra", "torchworker.contract", "torchworker.situations", "torchworker.durable"},
    # What a signature covers is defined by who checks it; views are made of what a reader has.
    "registry": {
        "registry",
        "infra",
        "torchworker.contract",
        "torchworker.situations",
        "torchworker.durable",
        "shipreader.signatures",
        "shipreader.errors",
        "shipreader.records",
        "shipreader.mlserver",
        "shipreader.observation_files",
    },
    "infra": {"infra", "torchworker.durable", "torchworker.protocol"},
    "torchworker": {"torchworker"},
    # Installed alone on serving machines.
    "shipreader": {"shipreader"},
    # The command line sits above everything.
    "ship": set(FOLDERS) - {"torchworker", "api"} | {"torchworker.contract"},
    "api": {"api", "ship", "registry", "infra", "tasks"},
}
ROOMS = {
    "registry": {
        "identity": set(),
        "text": set(),
        "cost": set(),
        "environments": set(),
        "job": {"identity", "decision"},
        "release": {"identity"},
        "tracking": {"text"},
        "kind": {"release", "text"},
        "live_score": {"kind", "text"},
        "verdicts": {"text"},
        "gates": {"job", "live_score", "text", "verdicts"},
        "agreement": {"job", "text", "verdicts"},
        "bucket": {"release", "identity"},
        "data": {"identity", "job", "text", "release", "bucket"},
        "observations": {"identity"},
        "diff": {"bucket", "kind", "release", "text"},
        "made_of": {"job"},
        # Numbers in, a verdict out.
        "decision": {"text"},
        "lineage": {"diff", "job", "release", "made_of"},
        "run_folder": {"job", "cost", "environments", "kind", "release", "tracking", "data", "made_of"},
        # A rollback reads no job, and has no time to load what reads one: `moves` imports these where it needs them.
        "channels": {"bucket", "release", "identity", "tracking", "job", "gates", "diff", "kind"},
        "rollouts": {"bucket", "release", "identity", "job", "channels"},
        "serving": {"bucket", "release"},
        "report": {
            *("identity", "text", "cost", "job", "kind", "release", "tracking", "gates", "verdicts", "bucket"),
            *("data", "diff", "lineage", "run_folder", "channels", "agreement"),
        },
        "maintenance": {
            *("identity", "text", "cost", "job", "release", "tracking", "gates", "bucket"),
            *("data", "diff", "lineage", "run_folder", "channels", "observations", "rollouts"),
        },
    },
    # `training` never sees `parity` or `exporters`: what trains cannot know how it will be judged.
    "torchworker": {
        "situations": set(),
        "durable": set(),
        "protocol": set(),
        "contract": {"situations", "durable", "protocol"},
        "process": {"contract"},
        "runtimes": {"contract"},
        "project": {"situations", "contract", "process"},
        "data": {"situations", "contract", "process", "project"},
        "gates": {"contract", "process"},
        "parity": {"contract", "process", "runtimes", "project", "gates", "data"},
        "training": {"situations", "durable", "contract", "process", "project", "data"},
        "exporters": {"contract", "process", "runtimes", "project", "parity"},
        "custom_loop": {"durable", "contract", "process", "project", "data", "training"},
        "rank": {"durable", "contract", "protocol", "process", "project", "training", "custom_loop"},
        "stages": {
            *("contract", "process", "runtimes", "project", "data", "gates", "parity", "training", "exporters"),
            *("custom_loop", "rank", "durable"),
        },
        "stage": {"contract", "process", "stages"},
        "forkserver": {"process", "runtimes", "stage"},
        "torchrun_controller": {"process"},
        "lease": {"process"},
    },
}
"""Package to room (a folder, or a file that stands beside the folders) to the rooms that it may import."""
ONLY_IN = {
    # The last two are Prefect's own server and worker.
    "prefect": [
        *("flows/", "tasks/", "ship/prefect_plugin.py"),
        *("infra/doors/prefect_server.py", "infra/doors/worker.py"),
    ],
    "mlflow": ["registry/tracking/", "infra/doors/mlflow_server.py"],
    "boto3": ["infra/s3.py", "shipreader/bucket.py"],
    "botocore": ["infra/s3.py", "shipreader/bucket.py"],
    # For one kind of request, of which there may be thousands.
    "obstore": ["infra/small_files.py"],
    "onnx": [],
    # Of the reader only where it is installed.
    "pyarrow": ["shipreader/observation_files.py", "registry/observations/rows.py"],
    "onnxruntime": [
        "torchworker/runtimes/load.py",
        "torchworker/exporters/quantize.py",
        "shipreader/onnx_model.py",
        "shipreader/inference_model.py",
        "registry/serving/triton_model.py",
    ],
    "mlserver": ["shipreader/onnx_model.py"],
    "tritonclient": ["shipreader/inference_grpc.py"],
}
STARTED_ALONE = {
    "shipreader/onnx_model.py",
    "shipreader/inference_calls.py",
    "shipreader/inference_canary.py",
    "shipreader/inference_connections.py",
    "shipreader/inference_grpc.py",
    "shipreader/inference_http.py",
    "shipreader/inference_model.py",
    "shipreader/inference_served.py",
    "shipreader/inference_server.py",
    "shipreader/inference_tensors.py",
    "shipreader/__main__.py",
    "registry/serving/triton_model.py",
    "torchworker/exporters/executorch.py",
}
"""Files that other programs start with packages of their own, or that need an extra."""
SERVERS = {
    "shipreader/onnx_model.py": {"mlserver", "numpy", "onnxruntime", "inference_tensors"},
    "shipreader/inference_tensors.py": {"numpy", "orjson"},
    "shipreader/inference_model.py": {"shipreader", "numpy", "onnxruntime"},
    "shipreader/inference_calls.py": {"shipreader", "grpc"},
    "shipreader/inference_canary.py": {"shipreader", "prometheus_client"},
    "shipreader/inference_served.py": {"shipreader", "prometheus_client"},
    "shipreader/inference_http.py": {"shipreader", "prometheus_client", "starlette"},
    "shipreader/inference_connections.py": {"shipreader", "uvicorn"},
    "shipreader/inference_grpc.py": {"shipreader", "google", "grpc", "numpy", "tritonclient"},
    "shipreader/inference_server.py": {"shipreader", "uvicorn", "uvloop"},
}
"""Files of shipreader/ to what they may import besides the standard library."""
WORKER_MAY_IMPORT = {
    "torch", "numpy", "safetensors", "onnxruntime", "onnx_ir", "onnxscript", "torchao", "executorch", "torchworker",
    "torchmetrics",
}  # fmt: skip


def is_allowed(name: str, allowed: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)


def ours(name: str) -> str | None:
    """An imported name by its folder, such as `registry.job.job`; None when it is not ours."""
    top, _, rest = name.partition(".")
    return (rest or None) if top == "train_and_ship" else name if top in TOPS else None


def test_what_keeps_files_over_a_power_cut_is_one_text_in_two_packages_that_are_installed_without_each_other() -> None:
    texts = {(REPOSITORY / folder / "durable.py").read_text() for folder in ("torchworker", "shipreader")}
    assert len(texts) == 1


@pytest.mark.parametrize("package", FOLDERS)
def test_packages_import_only_the_layers_below_them(package: str) -> None:
    for file, tree in modules(package):
        for name in imports(tree):
            if (inside := ours(name)) is not None and inside != "torchworker":
                assert is_allowed(inside, ALLOWED[package]), f"{file} imports {name}"


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_only_the_rooms_below_them(package: str) -> None:
    rules = ROOMS[package]
    for file, tree in modules(package):
        if (own := room(file)) is None:
            continue
        for name in imports(tree):
            inside = ours(name) or ""
            if inside.startswith(package + ".") and (other := inside.split(".")[1]) in rules:
                assert other == own or other in rules[own], f"{file} imports {name}"


@pytest.mark.parametrize("package", ROOMS)
def test_every_room_has_its_rule(package: str) -> None:
    assert {found for file, _ in modules(package) if (found := room(file)) is not None} == set(ROOMS[package])


def room(file: str) -> str | None:
    """The room that a file of a package is in, or is; None for the `__init__.py` of the package itself."""
    inside = file.split("/")[1].removesuffix(".py")
    return inside if inside != "__init__" else None


@pytest.mark.parametrize("package", ROOMS)
def test_packages_hold_nothing_in_their_own_file(package: str) -> None:
    for path in (REPOSITORY / package).rglob("__init__.py"):
        assert not path.read_text().strip(), f"{path}: whatever it imports, a rollback and a rank would load too"


def test_nothing_of_ours_is_imported_by_the_name_of_its_folder() -> None:
    renamed = [folder for folder, name in FOLDERS.items() if folder != name]
    for package in (*FOLDERS, "tests", "benchmarks"):
        for file, tree in modules(package):
            for name in imports(tree):
                assert name.partition(".")[0] not in renamed, f"{file} imports {name}; it is train_and_ship.{name}"
            # Also in the code that a test starts as a string.
            said = re.search(rf"from ({'|'.join(renamed)})\b[\w.]* import", (REPOSITORY / file).read_text())
            assert said is None, f"{file} says {said[0]}"


def test_no_module_is_loaded_under_two_names() -> None:
    every = [module_name(file) for package in FOLDERS for file, _ in modules(package) if file not in STARTED_ALONE]
    script = (
        "import collections, importlib, json, os, sys\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        f"for name in {every!r}: importlib.import_module(name)\n"
        "files = collections.defaultdict(list)\n"
        "for name, module in list(sys.modules.items()):\n"
        "    path = getattr(module, '__file__', None)\n"
        # The environment may lie in the repository.
        "    if path and not path.startswith(sys.prefix + '/'):\n"
        f"        if os.path.realpath(path).startswith({str(REPOSITORY)!r} + '/'):\n"
        "            files[os.path.realpath(path)].append(name)\n"
        "print(json.dumps([len(files), [names for names in files.values() if len(names) > 1]]))"
    )
    loaded, twice = json.loads(
        subprocess.check_output([sys.executable, "-P", "-c", script], text=True).splitlines()[-1]
    )
    assert loaded >= len(every) and twice == []


@pytest.mark.parametrize("package", FOLDERS)
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
            if file == "shipreader/observation_files.py":
                allowed |= {"pyarrow"}
            if file in SERVERS:
                # Run by servers, in environments that have only these.
                allowed = sys.stdlib_module_names | SERVERS[file]
            assert top in allowed, f"{file} imports {name}"


def test_the_contract_needs_no_torch() -> None:
    script = "import sys, torchworker.contract; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-P", "-c", script], text=True).strip() == "False"


def test_what_the_fork_server_holds_is_neither_prefect_nor_mlflow_nor_boto3_and_registers_no_operator() -> None:
    script = (
        "import sys, json\n"
        "import torchworker.forkserver, torchworker.stages.train, torchworker.stages.export, torchworker.stages.check\n"
        "import torch, torch._dynamo, torchworker.stages.validate\n"
        "from torchworker.runtimes.load import import_onnx_exporter\n"
        "operators = lambda: {*torch._C._dispatch_get_all_op_names(), *torch._library.custom_ops.OPDEFS}\n"
        "before = operators()\n"
        "import_onnx_exporter()\n"
        "new = sorted(operators() - before)\n"
        "print(json.dumps([sorted({name.partition('.')[0] for name in sys.modules}), new]))"
    )
    loaded, registered = json.loads(subprocess.check_output([sys.executable, "-P", "-c", script], text=True))
    assert {"torch", "onnxscript"} <= set(loaded)
    assert not set(loaded) & {"prefect", "mlflow", "boto3", "botocore", "pydantic", "train_and_ship"}
    # Otherwise an artifact could load in the clean room because of them.
    assert registered == []


def test_the_rank_package_brings_itself_and_safetensors_beside_bare_torch() -> None:
    script = (
        "import json, sys, torch, torch.distributed.launcher.api\n"
        "bare = set(sys.modules)\n"
        "import torchworker.stages.train\n"
        "added = {name for name in set(sys.modules) - bare if name.partition('.')[0] not in sys.stdlib_module_names}\n"
        # Python's own record of how it was built, for sysconfig.
        "print(json.dumps(sorted(name for name in added if not name.startswith('_sysconfigdata'))))"
    )
    added = json.loads(subprocess.check_output([sys.executable, "-P", "-c", script], text=True))
    # Nothing of torch that torch does not load by itself: compilers and exporters take seconds.
    assert {name.partition(".")[0] for name in added} == {"torchworker", "safetensors"}


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    heavy = {"torch", "prefect", "mlflow", "boto3"}
    script = f"import sys, train_and_ship.ship.main; print(sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-P", "-c", script], text=True).strip() == "[]"


def test_a_rollback_has_a_client_of_the_store_and_neither_a_heavy_library_nor_a_part_of_the_python_api() -> None:
    script = (
        "import sys, train_and_ship.ship.rollback\n"
        "from train_and_ship.infra.objectstore import ObjectStore\n"
        "from train_and_ship.infra.settings import Settings\n"
        "ObjectStore.from_settings(Settings.load())\n"
        "assert 'botocore' in sys.modules\n"
        # Settings of other libraries and the manager of large transfers take a fifth of a rollback to load.
        "heavy = {'torch', 'prefect', 'mlflow', 'numpy', 'pydantic_settings', 'boto3', 's3transfer', 'rich'}\n"
        "heavy |= {'train_and_ship.api', 'train_and_ship.ship.results'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-P", "-c", script], text=True).strip() == "[]"


def test_nothing_imports_the_python_api() -> None:
    for package in FOLDERS.keys() - {"api"}:
        for file, tree in modules(package):
            assert not [name for name in imports(tree) if name.startswith("train_and_ship.api")], file


def test_the_python_api_loads_as_fast_as_the_models_of_the_job_file() -> None:
    script = (
        "import sys, train_and_ship.registry.job.load\n"
        "before = {name.partition('.')[0] for name in sys.modules}\n"
        "import train_and_ship.api\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} - before - sys.stdlib_module_names))"
    )
    assert subprocess.check_output([sys.executable, "-P", "-c", script], text=True).strip() == "[]"


def test_each_file_is_in_one_wheel_and_the_tools_carries_the_wheels_of_the_other_two(tmp_path: Path) -> None:
    # A copy: building in place leaves a build folder behind.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "prefect.yaml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for folder in FOLDERS:
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for example in KINDS:
        below = f"examples/{example}"
        shutil.copytree(REPOSITORY / below, source / below, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / "names", source / "names", symlinks=True)
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, stdout=subprocess.DEVNULL)
    wheels = {"train_and_ship": zipfile.ZipFile(next(tmp_path.glob("train_and_ship-*.whl")))}
    for name in wheels["train_and_ship"].namelist():
        if name.endswith(".whl"):
            carried = wheels["train_and_ship"].read(name)
            wheels[Path(name).name.partition("-")[0]] = zipfile.ZipFile(io.BytesIO(carried))
    assert wheels.keys() == TOPS
    below = {folder: name.replace(".", "/") for folder, name in FOLDERS.items()}
    for top, wheel in wheels.items():
        names = wheel.namelist()
        folders = [folder for folder, path in below.items() if path.split("/")[0] == top]
        files = [(folder, file) for folder in folders for file, _ in modules(folder)]
        expected = {f"{below[folder]}/{file.partition('/')[2]}" for folder, file in files}
        written = {name for name in names if name.startswith("train_and_ship/examples/")}
        assert {name for name in names if name.endswith(".py")} - written == expected
        assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {top}
    here = [path for kind in KINDS for path in (REPOSITORY / "examples" / kind).iterdir() if path.is_file()]
    written = {name for name in wheels["train_and_ship"].namelist() if name.startswith("train_and_ship/examples/")}
    assert written == {f"train_and_ship/{path.relative_to(REPOSITORY).as_posix()}" for path in here}
    data = {"registry/report/page.html.jinja", "ship/job-file.md", "ship/serving-requirements.txt"}
    assert {f"train_and_ship/{name}" for name in data} <= set(wheels["train_and_ship"].namelist())
    assert "torchworker/cpp/runner.cpp" in wheels["torchworker"].namelist()
    text = metadata_of(wheels["train_and_ship"], "entry_points.txt")
    assert "ship = train_and_ship.ship.main:main" in text and "[prefect.plugins]" in text


def metadata_of(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = [path for path in wheel.namelist() if path.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


@pytest.mark.parametrize("top", ["torchworker", "shipreader"])
def test_the_tool_asks_for_the_very_versions_that_it_carries(top: str) -> None:
    def project(folder: str) -> Any:
        return tomllib.loads((REPOSITORY / folder / "pyproject.toml").read_text())["project"]

    tool, version = project("."), project(top)["version"]
    every = [*tool["dependencies"], *itertools.chain(*tool["optional-dependencies"].values())]
    asked = [line for line in every if line.startswith(top)]
    assert asked and all(line.endswith(f"=={version}") for line in asked)


def test_no_module_of_ours_hides_a_standard_library_module() -> None:
    assert not TOPS & set(sys.stdlib_module_names)


def test_the_picture_of_the_rooms_shows_what_the_rules_allow() -> None:
    (picture,) = re.findall(
        r"```mermaid\nflowchart TB\n(.*?)```", (REPOSITORY / "docs/architecture.md").read_text(), re.DOTALL
    )
    for package, drawing in re.findall(r"subgraph (\w+)\n(.*?)    end\n", picture, re.DOTALL):
        called = dict(re.findall(r"(\w+)\[(\w+)\]", drawing))
        shown = set()
        for line in re.sub(r"\[\w+\]", "", drawing).splitlines():
            steps = [[called.get(name, name) for name in re.findall(r"\w+", part)] for part in line.split("-->")]
            for above, below in itertools.pairwise(steps):
                for room, other in itertools.product(above, below):
                    shown |= {room, other}
                    assert other in ROOMS[package][room], f"{package}: {room} --> {other} is drawn and not allowed"
        # Standing alone, or below everything, some are left out.
        assert shown >= set(ROOMS[package]) - {"decision", "torchrun_controller", "lease"}
