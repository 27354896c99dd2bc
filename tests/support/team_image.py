"""The steps of infra/team/Dockerfile, run in a chroot: `make team-image`, as root on Debian, some minutes and 4 GB.

No image is built: instead of the base image stands a Debian of the same release with its own Python, made by
debootstrap from the mirror that this machine has. Everything that the Dockerfile says is done in it, to the files that
Dockerfile.dockerignore lets through; then the programs of compose.yaml are asked for their version as its user.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.docker_build import is_sent
from tests.support.projects import REPOSITORY

TEAM = REPOSITORY / "infra" / "team"
BASE = "bookworm"
"""Debian 12, whose Python is 3.11."""
PACKAGES = ("python3", "python3-dev", "python3-venv", "python3-pip", "python-is-python3", "ca-certificates")
NETWORK = (
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/pip.conf",
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/apt/sources.list.d",
    "/etc/apt/apt.conf.d",
)
"""How this machine reaches its mirrors; an image's builder has its own way."""
OURS = re.compile(r"(PIP|SSL|REQUESTS|CURL)_\w+|\w+_(PROXY|proxy)")
ASKED = (
    "ship --version",
    "prefect version",
    "mlflow --version",
    "python -c 'import torch, asyncpg, psycopg2; print(torch.__version__)'",
)


@dataclass
class Image:
    """What the Dockerfile has made so far."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = "root"

    def run(self, command: str) -> None:
        """Raises CalledProcessError as the build would fail."""
        print(f"+ {command}", flush=True)
        ids = [f"--userspec={self.user}"] if self.user != "root" else []
        inside = ["chroot", *ids, str(self.root), "/bin/sh", "-c", f"cd {shlex.quote(self.folder)} && {command}"]
        # The mounts end with the process.
        mounts = (
            f"mount -t proc proc {self.root}/proc && mount --bind /dev {self.root}/dev && exec {shlex.join(inside)}"
        )
        kept = {name: value for name, value in os.environ.items() if OURS.fullmatch(name)}
        # The image's Python is no system's, and pip needs no consent there.
        base = {
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "PIP_BREAK_SYSTEM_PACKAGES": "1",
            "LANG": "C.UTF-8",
        }
        subprocess.run(["unshare", "--mount", "sh", "-c", mounts], check=True, env={**base, **kept, **self.environment})

    def copy(self, source: str, target: str) -> None:
        """What Docker would send of the folder that the image is built from."""
        if (source, target) != (".", "."):
            raise ValueError(f"COPY {source} {target}: expected COPY . .")
        into = self.root / self.folder.lstrip("/")
        for path in REPOSITORY.rglob("*"):
            name = path.relative_to(REPOSITORY).as_posix()
            if (path.is_file() or path.is_symlink()) and is_sent(name):
                (into / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, into / name, follow_symlinks=False)

    def follow(self, instruction: str, said: str) -> None:
        """One instruction of the Dockerfile."""
        match instruction:
            case "RUN":
                self.run(said)
            case "COPY":
                self.copy(*said.split())
            case "WORKDIR":
                self.folder = said
                (self.root / said.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "ENV":
                self.environment |= dict(item.split("=", 1) for item in shlex.split(said))
            case "USER":
                self.user = said
            case "ARG" | "FROM" | "VOLUME":
                pass
            case _:
                raise ValueError(f"{instruction}: no way to do it here")


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile, in order."""
    lines = [line for line in (TEAM / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined if line.strip()]


def base(root: Path) -> None:
    """A Debian, from where this machine has its packages."""
    told = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME)"], check=True, capture_output=True, text=True
    ).stdout
    mirror = next(line.split()[0] for line in told.splitlines() if line.endswith(f" {BASE}"))
    wanted = ",".join(PACKAGES)
    subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={wanted}", BASE, str(root), mirror],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for place in NETWORK:
        if Path(place).is_dir():
            shutil.copytree(place, root / place.lstrip("/"), dirs_exist_ok=True)
        elif Path(place).exists():
            shutil.copy(place, root / place.lstrip("/"))


def main() -> int:
    """Exit status: 0 when every step was done and every program answers."""
    root = Path(tempfile.mkdtemp(prefix="team-image-"))
    # Else nobody but root may look into it.
    root.chmod(0o755)
    try:
        base(root)
        image = Image(root, {"PYTHON_IMAGE": f"debian:{BASE}@sha256:{'0' * 64}"})
        for instruction, said in instructions():
            image.follow(instruction, said)
        for command in ASKED:
            image.run(command)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print("every step of infra/team/Dockerfile was done in a chroot; no image was built")
    return 0


if __name__ == "__main__":
    sys.exit(main())
