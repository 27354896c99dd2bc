"""Ceph's S3 gateway (RGW) on loopback, from Debian's packages: a real store that checks signatures and policies.

    python -m tests.support.ceph_rgw [FOLDER]   one that runs until Ctrl-C, and how to reach it

A monitor, one OSD and the gateway, each a plain process that dies with the one that started it. Nothing is installed:
the packages are downloaded with apt-get, which needs no root, and unpacked once into the user's cache folder (66 MB to
fetch, 260 MB on disk).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.passwords import PASSWORD
from tests.support.ports import free_port, free_ports
from train_and_ship.infra.password import USER

PACKAGES = ("radosgw", "ceph-mon", "ceph-osd")
START_SECONDS = 600
"""Guards against hanging: on a machine whose cores are busy `ceph osd new` alone has taken more than two minutes."""
ACCESS_KEY, SECRET_KEY = USER, PASSWORD
"""Of the user that `start` creates, who may do everything; as on the local S3 server."""

_CONFIGURATION = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_v2}/0,v1:127.0.0.1:{mon_v1}/0]
mon initial members = a
public addr = 127.0.0.1
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
# The monitor gathers changes for a second each by default, and a new gateway makes ten of them.
paxos propose interval = 0.05
paxos min wait = 0.01
run dir = {folder}/run
admin socket = {folder}/run/$name.asok
log file = {folder}/log/$name.log
erasure code dir = {library}/ceph/erasure-code
osd class dir = {library}/rados-classes
plugin dir = {library}/ceph
[mon.a]
mon data = {folder}/mon
[osd]
osd data = {folder}/osd
osd objectstore = bluestore
# A file with holes: it takes what is stored.
bluestore block size = 12884901888
osd memory target = 1073741824
[client.rgw]
keyring = {folder}/run/keyring
rgw data = {folder}/rgw
ms mon client mode = crc
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw thread pool size = 64
rgw multipart min part size = 65536
rgw gc obj min wait = 5
rgw gc processor period = 5
rgw gc processor max time = 5
"""


class NotAvailable(Exception):
    """The packages cannot be had on this machine. The message says why."""


def packages() -> Path:
    """The folder that holds the unpacked packages; fetched on first use. Raises NotAvailable."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "train-and-ship"
    root = cache / "ceph"
    if root.is_dir():
        return root
    for tool in ("apt-get", "dpkg", "setpriv"):
        if shutil.which(tool) is None:
            raise NotAvailable(f"Ceph RGW comes from Debian's packages, and this machine has no {tool}")
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "ceph.lock").open("w") as lock, tempfile.TemporaryDirectory(prefix="ceph-", dir=cache) as name:
        # Tests run side by side: one of them fetches.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if root.is_dir():
            return root
        work = Path(name)
        archives, lists, unpacked = work / "archives", work / "lists", work / "root"
        for folder in (archives / "partial", lists / "partial", unpacked):
            folder.mkdir(parents=True)
        # As any user: no lock of the system's, and nothing of its state is written.
        options = ["-o", "Debug::NoLocking=1", "-o", f"Dir::Cache::archives={archives}", "-o", "APT::Sandbox::User="]
        fetch = ["install", "--yes", "--download-only", "--no-install-recommends", *PACKAGES]
        own_lists = ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache::pkgcache={work}/pkgcache.bin"]
        own_lists += ["-o", f"Dir::Cache::srcpkgcache={work}/srcpkgcache.bin"]
        if _run("apt-get", *options, *fetch).returncode:
            # The machine's lists are missing, as in fresh containers, or older than the archive.
            _run("apt-get", *options, *own_lists, "update")
            done = _run("apt-get", *options, *own_lists, *fetch)
            if done.returncode:
                raise NotAvailable(f"apt-get cannot fetch {', '.join(PACKAGES)}: {done.stderr.strip()[-500:]}")
        for package in sorted(archives.glob("*.deb")):
            done = _run("dpkg", "-x", str(package), str(unpacked))
            if done.returncode:
                raise NotAvailable(f"cannot unpack {package.name}: {done.stderr.strip()}")
        unpacked.rename(root)
    return root


def _run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True)


@dataclass
class RgwServer:
    """A running gateway that keeps its data in a folder; what was acknowledged survives `kill` and `start`."""

    folder: Path
    """Short enough for sockets' names: about 60 characters."""
    port: int
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _may_set_policies: bool = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """About 15 seconds the first time in a folder. Raises NotAvailable without the packages."""
        self._root = packages()
        new = not (self.folder / "ceph.conf").exists()
        if new:
            self._create()
        self._spawn("ceph-mon", "-i", "a", "-f")
        if new:
            osd = str(uuid.uuid4())
            self._call("/usr/bin/python3", self._tool("ceph"), "osd", "new", osd)
            self._call(self._tool("ceph-osd"), "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._spawn("ceph-osd", "-i", "0", "-f")
        self._spawn("radosgw", "-n", "client.rgw", "-f")
        self._wait()
        if new:
            self.create_user("test", ACCESS_KEY, SECRET_KEY)

    def create_user(self, name: str, access_key: str, secret_key: str) -> None:
        """A further user, who owns nothing yet."""
        keys = (f"--access-key={access_key}", f"--secret-key={secret_key}")
        user = ("user", "create", f"--uid={name}", f"--display-name={name}")
        self._call(self._tool("radosgw-admin"), "-n", "client.rgw", *user, *keys)

    def put_user_policy(self, user: str, name: str, document: str) -> None:
        """Attach an IAM policy to a user, as `aws iam put-user-policy` does."""
        import boto3

        if not self._may_set_policies:
            self._call(
                self._tool("radosgw-admin"), "-n", "client.rgw", "caps", "add", "--uid=test", "--caps=user-policy=*"
            )
            self._may_set_policies = True
        client = boto3.client(
            "iam",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
        )
        client.put_user_policy(UserName=user, PolicyName=name, PolicyDocument=document)

    def kill(self) -> None:
        """SIGKILL to all three."""
        for process in reversed(self._processes):
            process.kill()
            process.wait()
        self._processes.clear()

    def _create(self) -> None:
        for name in ("run", "log", "mon", "osd", "rgw"):
            (self.folder / name).mkdir(parents=True)
        mon_v2, mon_v1 = free_ports(2)
        fsid, keyring, monmap = str(uuid.uuid4()), self.folder / "run/keyring", self.folder / "run/monmap"
        text = _CONFIGURATION.format(
            fsid=fsid, folder=self.folder, library=self._library, port=self.port, mon_v1=mon_v1, mon_v2=mon_v2
        )
        (self.folder / "ceph.conf").write_text(text)
        address = f"[v2:127.0.0.1:{mon_v2},v1:127.0.0.1:{mon_v1}]"
        self._call(self._tool("ceph-authtool"), "--create-keyring", str(keyring), "--gen-key", "-n", "client.rgw")
        self._call(self._tool("monmaptool"), "--create", "--addv", "a", address, "--fsid", fsid, str(monmap))
        self._call(self._tool("ceph-mon"), "-i", "a", "--mkfs", "--monmap", str(monmap))

    @property
    def _library(self) -> Path:
        (found,) = (path.parent for path in self._root.glob("usr/lib/*/ceph"))
        return found

    def _tool(self, name: str) -> str:
        return str(self._root / "usr/bin" / name)

    @property
    def _environment(self) -> dict[str, str]:
        libraries = [self._library, self._library / "ceph", self._root / "lib" / self._library.name]
        return {
            **os.environ,
            "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
            "PYTHONPATH": str(self._root / "usr/lib/python3/dist-packages"),
            "CEPH_CONF": str(self.folder / "ceph.conf"),
        }

    def _call(self, *argv: str) -> None:
        done = subprocess.run(argv, env=self._environment, capture_output=True, text=True, timeout=START_SECONDS)
        assert done.returncode == 0, f"{argv}: {done.stderr}"

    def _spawn(self, daemon: str, *arguments: str) -> None:
        with (self.folder / "log" / f"{daemon}.out").open("ab") as output:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", self._tool(daemon), *arguments],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            ended = [process.args for process in self._processes if process.poll() is not None]
            assert not ended and time.monotonic() < deadline, f"{ended or 'no answer'}; logs in {self.folder}/log"
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(self.url, timeout=2).close()
        except urllib.error.HTTPError as error:
            return error.code < 500
        except OSError:
            return False
        return True


def main() -> None:
    folder = Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="rgw-"))
    server = RgwServer(folder, free_port())
    try:
        server.start()
        print(f"export AWS_ENDPOINT_URL={server.url} AWS_REGION=us-east-1")
        print(f"export AWS_ACCESS_KEY_ID={ACCESS_KEY} AWS_SECRET_ACCESS_KEY={SECRET_KEY}")
        print(f"data in {folder}; Ctrl-C ends it", flush=True)
        while True:
            time.sleep(3600)
    except NotAvailable as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        pass
    finally:
        server.kill()


if __name__ == "__main__":
    main()
