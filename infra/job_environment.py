"""What a process that runs the code of a job, or loads what a job made, gets of this process's environment.

This is the one list. What is not on it stays here: keys, passwords, tokens of services, addresses of people. A job
names what else its code reads under `env`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping

from train_and_ship.infra.errors import JobError

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SIGNING_PASSWORD = "SHIP_SIGNING_KEY_PASSWORD"
"""Of the private key that signs releases."""
STORE = "AWS_"
"""Begin of the names by which a dataset finds its bucket and may read it."""

_NAMES = frozenset([
    # The machine and its user.
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "HOSTNAME", "LANG", "LANGUAGE", "TZ", "TERM", "COLUMNS",
    "TMPDIR", "TMP", "TEMP", "LD_LIBRARY_PATH", "LD_PRELOAD",
    "CONDA_PREFIX", "CONDA_DEFAULT_ENV", "VIRTUAL_ENV",
    # Compilers, for AOTInductor and the C++ runner.
    "CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CPATH", "LIBRARY_PATH",
    # The way out of the house.
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
    # Where public models and data sets are kept. HF_TOKEN is a password.
    "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ASSETS_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM",
    "SENTENCE_TRANSFORMERS_HOME",
    "NLTK_DATA", "TIKTOKEN_CACHE_DIR", "KAGGLEHUB_CACHE", "NUMBA_CACHE_DIR", "MPLCONFIGDIR", "MPLBACKEND",
    "DO_NOT_TRACK",
    # Ours: how leftovers of a stack are recognised.
    "SHIP_HOME", "SHIP_PROCESS_TOKEN",
])  # fmt: skip
_FAMILIES = (
    *("LC_", "XDG_", "PYTHON"),
    # Threads and kernels.
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "BLIS_", "NUMEXPR_", "ONEDNN_", "DNNL_", "ORT_", "OPENVINO_"),
    *("MALLOC_", "TORCH", "PYTORCH_", "ATEN_", "TRITON_", "XLA_", "NPY_", "PANDAS_", "SCIPY_", "SKLEARN_", "JOBLIB_"),
    # Devices, and the network between them.
    *("CUDA_", "CUDNN_", "CUBLAS_", "NVIDIA_", "HIP_", "HSA_", "ROCM_", "ROCR_", "MIOPEN_"),
    *("NCCL_", "RCCL_", "GLOO_", "UCX_", "FI_", "SLURM_", "PMI_", "PMIX_"),
)
"""Begins of names; of these, what says that it is a secret stays here all the same (SLURM_JWT)."""
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH|JWT|COOKIE")
_LAUNCHER = ("SSH_AUTH_SOCK", "SSH_AGENT_PID", "SSH_ASKPASS", "KRB5CCNAME", "KRB5_CONFIG", "KUBECONFIG", "DISPLAY")
"""What ssh, or a command in its place, needs to reach another machine."""
_LAUNCHER_FAMILIES = ("CLOUDSDK_", STORE)

_INSTALLERS = ("PIP_", "UV_")
"""How pip and uv are told where packages are."""

_OURS = re.compile(
    r"SHIP_(SIGNING_KEY|NOTIFY)\w*"
    r"|(PREFECT|MLFLOW)_\w*(KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH|HEADERS|CONNECTION_URL|BACKEND_STORE)\w*"
)
"""Names by which this application, Prefect and MLflow are given what they may do."""

_NOT_VARIABLES = ("SHIP_", "PREFECT_", "PYTEST_")
"""What else is ours, and no code of a job asks for."""
_HUB = frozenset(["datasets", "transformers", "huggingface_hub", "diffusers", "sentence_transformers", "timm"])
_QUOTED = re.compile(r"""["']([A-Za-z_][A-Za-z0-9_]{2,})["']""")
_IMPORTED = re.compile(r"^\s*(?:import|from)\s+([A-Za-z][A-Za-z0-9_]*)", re.MULTILINE)


def holds_secret(name: str) -> bool:
    """Whether a variable of this name is one of ours that hold a secret: no job is given it, whatever it names."""
    return _OURS.fullmatch(name) is not None


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """What every worker process gets: nothing with which it could do anything elsewhere. environment: name to value."""
    return {
        name: value
        for name, value in environment.items()
        if name in _NAMES or (name.startswith(_FAMILIES) and not _SECRET.search(name))
    }


def given(environment: Mapping[str, str], named: Iterable[str]) -> dict[str, str]:
    """What a process that runs the code of a job gets besides: the bucket's, and what the job names.

    Args:
        environment: name to value.
        named: `env` of the job.
    """
    store = {name: value for name, value in environment.items() if name.startswith(STORE)}
    return store | values_of(environment, named)


def values_of(environment: Mapping[str, str], named: Iterable[str]) -> dict[str, str]:
    """What a job names, with its values, where it is set. Arguments: as of `given`."""
    return {name: environment[name] for name in named if name in environment and not holds_secret(name)}


def for_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """What a process gets that starts ranks on other machines: also how to reach them. environment: name to value."""
    reach = {
        name: value for name, value in environment.items() if name in _LAUNCHER or name.startswith(_LAUNCHER_FAMILIES)
    }
    return inherited(environment) | reach


def for_git(environment: Mapping[str, str]) -> dict[str, str]:
    """What git gets in the folder of a project, whose own configuration may have it run commands."""
    own = {name: value for name, value in environment.items() if name.startswith("GIT_") and not _SECRET.search(name)}
    return inherited(environment) | own


def for_installing(environment: Mapping[str, str]) -> dict[str, str]:
    """What an installer of packages gets: building one of them runs its code. environment: name to value.

    With PIP_* and UV_*, the passwords of a package index among them, without which nothing could be had from it.
    """
    own = {
        name: value
        for name, value in environment.items()
        if name.startswith(_INSTALLERS) and not name.startswith("UV_PUBLISH_")
    }
    return inherited(environment) | own


def without_signing(environment: Mapping[str, str], keep: Iterable[str] = ()) -> dict[str, str]:
    """For what neither signs nor tells people anything: without the key, its password and the addresses.

    Args:
        environment: name to value.
        keep: names that stay all the same.
    """
    dropped = {name for name in environment if name.startswith("SHIP_") and holds_secret(name)} - {*keep}
    return {name: value for name, value in environment.items() if name not in dropped}


def require_set(environment: Mapping[str, str], named: Iterable[str], job: str) -> None:
    """Raises JobError for variables that a job names and that are not set here. job: its name."""
    if missing := [name for name in named if name not in environment]:
        raise JobError(
            f"{job}: env: expected {' and '.join(missing)} to be set in the environment of this process, got nothing; "
            "set it where the run starts, or take it out of env. A worker has the variables with which it was started: "
            "for a schedule, `ship down` and then `ship up` with it, or start your own worker anew"
        )


def withheld(environment: Mapping[str, str], named: Iterable[str]) -> list[str]:
    """Names that are set here and not passed on to the code of a job, though it could name them. Sorted."""
    passed = inherited(environment).keys() | given(environment, named).keys()
    return sorted(
        name
        for name in environment
        if name not in passed and not holds_secret(name) and not name.startswith(_NOT_VARIABLES)
    )


def asked_for(names: Iterable[str], sources: Iterable[str]) -> list[str]:
    """Which of these variables the sources of a project seem to read.

    In quotes, or by a library that they import and whose variables begin with its name (`wandb`: WANDB_API_KEY).

    Args:
        names: of variables.
        sources: texts of Python files.
    """
    quoted: set[str] = set()
    modules: set[str] = set()
    for text in sources:
        quoted.update(_QUOTED.findall(text))
        modules.update(_IMPORTED.findall(text))
    modules -= sys.stdlib_module_names
    begins = {f"{module.partition('_')[0].upper()}_" for module in modules} | ({"HF_"} if modules & _HUB else set())
    return [name for name in names if name in quoted or f"{name.partition('_')[0]}_" in begins]


def mentioned(names: Iterable[str], text: str) -> list[str]:
    """Which of these variables an error names: as a missing key, or by a name of more than one word."""
    words = set(re.findall(r"[A-Za-z_][A-Za-z0-9_]+", text))
    return [name for name in names if (name in words and "_" in name.strip("_")) or f"KeyError: '{name}'" in text]


def how_to_name(names: Iterable[str]) -> str:
    """What to do about variables that are not passed on, in words."""
    listed = ", ".join(names)
    return f"{listed}: set here and not passed on to the code of the job; `env: [{listed}]` in the job file does that"
