"""JobSets (v1alpha2) for TPUs and GPUs on Kubernetes; node labels are those of GKE.

JAX finds the processes by itself: on TPUs from the variables that GKE sets, on GPUs from the
Kubernetes API, for which the file has a service account.
"""

from typing import Any

import yaml

from tinybert_jax.launch import job as jobs
from tinybert_jax.launch.job import Job
from tinybert_jax.training.preemption import STOPPED

_CONTAINER = "tinybert"
_RESTARTS = 3


def render(
    job: Job, *, queue: str | None = None, namespace: str = "default", grace: int = 120
) -> str:
    """The YAML. `queue`: a LocalQueue of Kueue; `grace`: seconds from SIGTERM to SIGKILL."""
    jobs.check_run_dir(job, "the pods and their disks are not kept")
    jobs.check_no_buckets(job.mounts, "the claim of a volume")
    documents = [_jobset(job, queue, namespace, grace)]
    if _needs_account(job):
        documents = [*_account(job.name, namespace), *documents]
    comments = [*job.header, "The claims of the volumes have to allow ReadWriteMany."]
    if job.machines.num_hosts > 1 and not job.machines.is_tpu:
        comments += [
            "NCCL uses the network of the pods. GPUDirect needs the annotations of your cluster."
        ]
    return "".join(f"# {line}\n" for line in comments) + yaml.safe_dump_all(
        documents, sort_keys=False, allow_unicode=True, width=1000
    )


def _jobset(job: Job, queue: str | None, namespace: str, grace: int) -> dict[str, Any]:
    labels = {"labels": {"kueue.x-k8s.io/queue-name": queue}} if queue else {}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            "namespace": namespace,
            **labels,
            # One node pool, which is one slice of TPUs, for each job of the set.
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": job.restarts(_RESTARTS),
                # All old pods are gone before a new one opens the run folder.
                "restartStrategy": "BlockingRecreate",
                "rules": [
                    {
                        "name": "stopped_or_taken_away",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [
                {
                    "name": "slice",
                    "replicas": job.machines.num_slices,
                    "template": {"spec": _job_spec(job, grace)},
                }
            ],
        },
    }


def _job_spec(job: Job, grace: int) -> dict[str, Any]:
    """One slice, or all hosts of GPUs: a pod for each host.

    A pod that was taken away or that saved and stopped fails its job with the reason
    PodFailurePolicy, which does not count as a restart. Every other end of a pod counts.
    """
    rules = [
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {
            "action": "FailJob",
            "onExitCodes": {
                "containerName": _CONTAINER,
                "operator": "In",
                "values": [STOPPED],
            },
        },
    ]
    return {
        "completionMode": "Indexed",
        "completions": job.machines.hosts_per_slice,
        "parallelism": job.machines.hosts_per_slice,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": rules},
        "template": {"spec": _pod_spec(job, grace)},
    }


def _pod_spec(job: Job, grace: int) -> dict[str, Any]:
    machines = job.machines
    volumes: list[dict[str, Any]] = [
        {"name": f"shared-{place}", "persistentVolumeClaim": {"claimName": mount.source}}
        for place, mount in enumerate(job.mounts)
    ]
    selector = _selector(job)
    if job.is_spot:
        selector["cloud.google.com/gke-spot"] = "true"
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": grace,
        "nodeSelector": selector,
        "tolerations": [{"key": _resource(job), "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [_container(job)],
    }
    if job.is_spot:
        taint = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"}
        spec["tolerations"].append({**taint, "effect": "NoSchedule"})
    if machines.num_slices > 1:  # slices reach each other through the network of the hosts
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if _needs_account(job):
        spec["serviceAccountName"] = job.name
    if not machines.is_tpu:  # NCCL's shared memory
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
    return {**spec, "volumes": volumes}


def _container(job: Job) -> dict[str, Any]:
    mounts = [
        {"name": f"shared-{place}", "mountPath": mount.path}
        for place, mount in enumerate(job.mounts)
    ]
    if not job.machines.is_tpu:
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    chips = {_resource(job): job.machines.chips_per_host}
    return {
        "name": _CONTAINER,
        "image": job.container,
        "command": list(job.words),
        "env": [{"name": name, "value": value} for name, value in job.environment.items()],
        "resources": {"requests": chips, "limits": dict(chips)},
        "volumeMounts": mounts,
    }


def _resource(job: Job) -> str:
    return "google.com/tpu" if job.machines.is_tpu else "nvidia.com/gpu"


def _selector(job: Job) -> dict[str, str]:
    machines = job.machines
    label = machines.accelerator.gke_accelerator
    if machines.topology:
        return {
            "cloud.google.com/gke-tpu-accelerator": label,
            "cloud.google.com/gke-tpu-topology": machines.topology,
        }
    return {
        "cloud.google.com/gke-accelerator": label,
        "node.kubernetes.io/instance-type": machines.machine_type,
    }


def _needs_account(job: Job) -> bool:
    """JAX asks the Kubernetes API for the pods of the job, except on TPUs."""
    return not job.machines.is_tpu


def _account(name: str, namespace: str) -> list[dict[str, Any]]:
    """A service account that may read what JAX reads: its pod, its job and the services."""
    metadata = {"name": name, "namespace": namespace}
    rules = [
        {"apiGroups": [""], "resources": ["pods", "services"], "verbs": ["get", "list"]},
        {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get"]},
    ]
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
    subject = {"kind": "ServiceAccount", **metadata}
    api = "rbac.authorization.k8s.io/v1"
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": dict(metadata)},
        {"apiVersion": api, "kind": "Role", "metadata": dict(metadata), "rules": rules},
        {
            "apiVersion": api,
            "kind": "RoleBinding",
            "metadata": dict(metadata),
            "subjects": [subject],
            "roleRef": role,
        },
    ]
