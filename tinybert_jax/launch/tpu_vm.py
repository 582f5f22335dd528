"""TPU VMs of Google Cloud without Kubernetes: a script of `gcloud` commands.

Compute Engine makes slices of v5p and v6e: a managed instance group whose workload policy has the
topology. v4 and v5e exist only in the Cloud TPU API, whose queued resources are legacy: Google
mends it and adds nothing to it (docs.cloud.google.com/tpu/docs/create-tpu-vm). Neither way
has been run yet.
"""

import shlex

from tinybert_jax.launch import job as jobs
from tinybert_jax.launch.job import WRONG_INPUT, Job
from tinybert_jax.performance.accelerators import Tpu
from tinybert_jax.training.preemption import STOPPED

_RESTARTS = 3
_SECONDS_TO_STOP = 120
# Canonical's image with TPU drivers: its family and project.
_IMAGE = ("ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e", "ubuntu-os-accelerator-images")


def render(job: Job, *, project: str, zone: str) -> str:
    """The script that creates the machines; they run the job at every start."""
    jobs.check_launcher(job.machines, "tpu-vm", "TPUs", "sky")
    _check(job)
    assert isinstance(job.machines.accelerator, Tpu)
    runtime = job.machines.accelerator.runtime
    if runtime:
        comment, create, delete = _queued_resource(job, project, zone, runtime)
    else:
        comment, create, delete = _instance_group(job, project, zone)
    comments = [*job.header, *comment, "The machines go on costing money until you run:"]
    lines = [
        "#!/bin/bash",
        *(f"# {line}" for line in comments),
        *(f"#   {_line(words)}" for words in delete),
        _SCRIPT.format(startup=_startup(job)),
        *(_line(words, " \\\n  ") for words in create),
    ]
    return "\n".join([*lines, ""])


_SCRIPT = """set -euo pipefail

startup=$(mktemp)
trap 'rm -f "$startup"' EXIT
cat >"$startup" <<'STARTUP'
{startup}STARTUP
"""
_STARTUP_FILE = "--metadata-from-file=startup-script=$startup"

Commands = list[list[str]]


def _instance_group(job: Job, project: str, zone: str) -> tuple[list[str], Commands, Commands]:
    """(comment, commands that create, commands that delete) on Compute Engine."""
    machines, name = job.machines, job.name
    region = zone.rpartition("-")[0]
    policy = f"projects/{project}/regions/{region}/resourcePolicies/{name}"
    is_slice = machines.hosts_per_slice > 1
    there = [f"--project={project}"]
    spot = ["--provisioning-model=SPOT", "--instance-termination-action=DELETE"]
    family, image_project = _IMAGE
    make_policy = ["gcloud", "compute", "resource-policies", "create", "workload-policy", name]
    make_policy += ["--type=HIGH_THROUGHPUT", f"--accelerator-topology={machines.topology}"]
    make_template = ["gcloud", "compute", "instance-templates", "create", name]
    make_template += [
        f"--machine-type={machines.machine_type}",
        f"--image-family={family}",
        f"--image-project={image_project}",
        "--boot-disk-size=200GB",
        "--maintenance-policy=TERMINATE",
        "--scopes=cloud-platform",
        *(spot if job.is_spot else []),
        _STARTUP_FILE,
    ]
    group = ["gcloud", "compute", "instance-groups", "managed"]
    make_group = [*group, "create", name, f"--size={machines.num_hosts}", f"--template={name}"]
    make_group += [f"--workload-policy={policy}"] if is_slice else []
    make = [[*make_policy, f"--region={region}", *there]] if is_slice else []
    make += [[*make_template, *there], [*make_group, f"--zone={zone}", *there]]
    delete = [[*group, "delete", name, f"--zone={zone}", *there]]
    return ["Compute Engine: a managed instance group."], make, delete


def _queued_resource(
    job: Job, project: str, zone: str, runtime: str
) -> tuple[list[str], Commands, Commands]:
    """(comment, commands that create, commands that delete) for the Cloud TPU API."""
    base = ["gcloud", "compute", "tpus", "queued-resources"]
    there = [f"--zone={zone}", f"--project={project}"]
    make = [
        *(*base, "create", job.name, f"--node-id={job.name}"),
        f"--accelerator-type={job.machines.accelerator_type}",
        f"--runtime-version={runtime}",
        *(["--spot"] if job.is_spot else []),
        _STARTUP_FILE,
        *there,
    ]
    comment = [
        f"Queued resources are a legacy API; Compute Engine has no {job.machines.name}, GKE has: "
        "see `tinybert launch jobset`."
    ]
    return comment, [make], [[*base, "delete", job.name, "--force", *there]]


def _line(words: list[str], between: str = " ") -> str:
    """The words for a shell, where the variable $startup keeps its meaning.

    The command stands on one line; its options follow `between`.
    """
    quoted = [f'"{word}"' if word == _STARTUP_FILE else shlex.quote(word) for word in words]
    num_words = next(place for place, word in enumerate(words) if word.startswith("--"))
    return between.join([" ".join(quoted[:num_words]), *quoted[num_words:]])


def _startup(job: Job) -> str:
    """The script that every machine runs as root whenever it starts."""
    registry = job.container.split("/")[0]
    lines = ["#!/bin/bash", "set -uo pipefail"]
    if job.machines.name != "v4":  # JAX asks for it on v5e and newer
        lines.append("echo always >/sys/kernel/mm/transparent_hugepage/enabled")
    lines += [
        "export DEBIAN_FRONTEND=noninteractive",
        "apt-get update && apt-get install --yes nfs-common",
        "command -v docker >/dev/null || apt-get install --yes docker.io",
    ]
    for source, path in job.mounts:
        lines.append(f"mkdir -p {shlex.quote(path)}")
        mount = ["mount", "-t", "nfs", "-o", "rw,hard", source, path]
        lines.append(f"mountpoint -q {shlex.quote(path)} || {shlex.join(mount)} || exit 1")
    if registry.endswith(".pkg.dev"):
        lines.append(f"gcloud auth configure-docker --quiet {shlex.quote(registry)}")
    command = [f"--name={job.name}", "--privileged", "--network=host"]
    command += [f"--stop-timeout={_SECONDS_TO_STOP}"]
    command += [f"--volume={mount.path}:{mount.path}" for mount in job.mounts]
    command += [f"--env={name}={value}" for name, value in job.environment.items()]
    loop = _LOOP.format(
        command=" \\\n    ".join(
            [*map(shlex.quote, [*command, job.container]), shlex.join(job.words)]
        ),
        wrong=WRONG_INPUT,
        stopped=STOPPED,
        restarts=job.restarts(_RESTARTS),
    )
    return "\n".join([*lines, loop])


# The other machines of a slice end when one is taken away, and have to wait for its successor.
_LOOP = """failures=0
while :; do
  docker run --rm \\
    {command}
  status=$?
  case "$status" in
  0 | {wrong} | 3 | 5) break ;; # finished; wrong input, a gate, diverged
  {stopped}) ;;         # stopped and saved
  *)
    failures=$((failures + 1))
    [ "$failures" -le {restarts} ] || break
    ;;
  esac
  sleep 10
done
exit "$status"
"""


def _check(job: Job) -> None:
    jobs.check_run_dir(job, "the machines and their disks are not kept")
    if job.machines.num_slices > 1:
        raise ValueError(
            f"--slices: expected 1 for TPU VMs, got {job.machines.num_slices}; use "
            "`tinybert launch jobset`"
        )
    for mount in job.mounts:
        if ":/" not in mount.source or "://" in mount.source:
            raise ValueError(
                f"--mount: expected an NFS export for TPU VMs, got '{mount.source}'; write it as "
                f"SERVER:/EXPORT:{mount.path}"
            )
    if "STARTUP" in "".join((*job.words, *job.environment.values())).splitlines():
        raise ValueError(
            "expected no setting with a line STARTUP, which ends the start-up script, got one; "
            "change it"
        )
