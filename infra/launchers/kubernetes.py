"""Kubernetes: a headless Service and an Indexed Job, one pod and one torchrun a node, through kubectl."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from train_and_ship.infra.errors import ServiceError
from train_and_ship.infra.launchers.spec import Engine, Spec, Status, last_line
from train_and_ship.infra.launchers.torchrun import agent_argv, environment, shell_line

PORT = 29400
KEEP_SECONDS = 24 * 3600
"""Kubernetes forgets an ended job, and its logs, after this long if nobody fetched them."""
UNREACHABLE = (
    "connection refused", "was refused", "i/o timeout", "no such host", "Unable to connect", "TLS handshake timeout",
    "ServiceUnavailable", "timed out",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Storage that all pods and the flow see: the run folder and the project lie on it."""

    claim: str
    """PersistentVolumeClaim with access mode ReadWriteMany."""
    mount: str
    """Where it is mounted, which must be the path the flow knows it by."""


def manifest(spec: Spec, *, volume: Volume | None = None, secret: str | None = None) -> dict[str, Any]:
    """A List of both objects. secret: name of a Secret whose keys become variables of the ranks."""
    assert spec.image is not None, "the job file requires an image"
    labels = {"app.kubernetes.io/managed-by": "train-and-ship", "train-and-ship/job": spec.name}
    agent = agent_argv(spec, endpoint=f"{spec.name}-0.{spec.name}:{PORT}", local_addr="@POD_IP@", is_host="@IS_HOST@")
    line = shell_line(agent, {"POD_IP": '"$POD_IP"', "IS_HOST": "$((JOB_COMPLETION_INDEX == 0))"})
    env: list[dict[str, Any]] = [
        {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        # A dollar would otherwise be the start of another variable.
        *({"name": name, "value": value.replace("$", "$$")} for name, value in environment(spec).items()),
    ]
    limits: dict[str, str] = {}
    if spec.cpus:
        limits["cpu"] = str(spec.cpus)
    if spec.mem_mb:
        limits["memory"] = f"{spec.mem_mb}Mi"
    if spec.gpus:
        limits["nvidia.com/gpu"] = str(spec.gpus)
    # DataLoader workers pass tensors through /dev/shm, which is 64 MiB in a container by default.
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    if volume is not None:
        volumes.append({"name": "runs", "persistentVolumeClaim": {"claimName": volume.claim}})
        mounts.append({"name": "runs", "mountPath": volume.mount})
    container: dict[str, Any] = {
        "name": "torchrun",
        "image": spec.image,
        "command": ["/bin/sh", "-c", f"exec {line}"],
        "env": env,
        "ports": [{"name": "rendezvous", "containerPort": PORT}],
        "resources": {"limits": limits, "requests": dict(limits)},
        "volumeMounts": mounts,
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    if secret is not None:
        container["envFrom"] = [{"secretRef": {"name": secret}}]
    job: dict[str, Any] = {
        "completionMode": "Indexed",
        "completions": spec.nodes,
        "parallelism": spec.nodes,
        # A replaced pod is one more restart of all ranks; without restarts, the first failed pod ends the job.
        "backoffLimit": spec.max_restarts,
        "ttlSecondsAfterFinished": KEEP_SECONDS,
        "template": {
            "metadata": {"labels": labels},
            "spec": {
                "subdomain": spec.name,
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 10,
                "automountServiceAccountToken": False,
                "enableServiceLinks": False,
                "containers": [container],
                "volumes": volumes,
            },
        },
    }
    if spec.time_limit:
        job["activeDeadlineSeconds"] = spec.time_limit
    metadata = {"name": spec.name, "labels": labels}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {
            "clusterIP": "None",
            "selector": {"train-and-ship/job": spec.name},
            # The ranks look for each other before any pod could be called ready.
            "publishNotReadyAddresses": True,
            "ports": [{"name": "rendezvous", "port": PORT, "targetPort": "rendezvous"}],
        },
    }
    return {
        "apiVersion": "v1",
        "kind": "List",
        "items": [service, {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": job}],
    }


def status_of(job: Mapping[str, Any]) -> Status:
    """From a Job object."""
    name, said = job["metadata"]["name"], job.get("status", {})
    for condition in said.get("conditions", []):
        if condition["status"] == "True" and condition["type"] in ("Complete", "Failed"):
            reason, message = condition.get("reason", ""), condition.get("message", "")
            blames = "the job reached its time limit" if reason == "DeadlineExceeded" else ""
            return Status("ended", f"Kubernetes job {name}: {condition['type']} {reason} {message}".rstrip(), blames)
    if said.get("ready", said.get("active", 0)):
        return Status("running", f"Kubernetes job {name}: {said.get('active', 0)} pods active")
    return Status("queued", f"Kubernetes job {name}: no pod is ready yet")


@dataclass(frozen=True, kw_only=True)
class KubernetesLauncher:
    """Job ids are names of Jobs in one namespace."""

    namespace: str = "default"
    context: str | None = None
    """Entry of the kubeconfig; None: the current one."""
    volume: Volume | None = None
    secret: str | None = None

    def launch(self, spec: Spec) -> str:
        """As `Launcher` says."""
        value = manifest(spec, volume=self.volume, secret=self.secret)
        self._engine.run(*self._kubectl, "apply", "--filename=-", stdin=json.dumps(value))
        return spec.name

    def status(self, job: str) -> Status:
        """As `Launcher` says."""
        try:
            done = self._engine.ask(*self._kubectl, "get", "job", job, "--output=json", "--ignore-not-found")
        except ServiceError as error:
            return Status("unreachable", str(error))
        if done.returncode != 0:
            return Status("unreachable", last_line(done.stderr))
        if not done.stdout.strip():
            return Status("unknown", f"Kubernetes has no job {job} in namespace {self.namespace} (any more)")
        return status_of(json.loads(done.stdout))

    def cancel(self, job: str, grace_s: float = 10.0) -> None:
        """As `Launcher` says."""
        self._engine.run(
            *self._kubectl, "delete", f"job/{job}", f"service/{job}", "--ignore-not-found", "--cascade=foreground",
            "--wait=true", f"--timeout={round(grace_s) + 30}s",
        )  # fmt: skip

    def logs(self, job: str) -> str:
        """As `Launcher` says."""
        done = self._engine.ask(
            *self._kubectl, "logs", f"--selector=train-and-ship/job={job}", "--prefix", "--tail=20",
            "--max-log-requests=64",
        )  # fmt: skip
        return done.stdout.strip()

    @property
    def _kubectl(self) -> tuple[str, ...]:
        context = (f"--context={self.context}",) if self.context else ()
        return ("kubectl", *context, f"--namespace={self.namespace}")

    @property
    def _engine(self) -> Engine:
        return Engine((), None, UNREACHABLE)
