"""The processes of a run: which one this is, what they agree on, and what happens when one is lost.

A run has one process unless `start` finds more: each function then does at once what it says.
Several processes talk through the key-value store of JAX's coordinator, which process 0 holds, and
every process watches the others. Imports JAX late, because the command line reads this file.
"""

import importlib.util
import os
import socket
import sys
import threading
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from tinybert_jax.parallel.group import (
    LOST,
    Group,
    LostProcessError,
    first_line,
    handle_aborts,
)

# A variable of each launcher that JAX knows, besides those of TPUs.
_SIGNS = {"SLURM_STEP_NODELIST", "KUBERNETES_SERVICE_HOST", "OMPI_MCA_orte_hnp_uri"}
_JOIN_SECONDS = 300  # for which a process waits for the others at the start
_PATIENCE_SECONDS = 10  # after which it says so
_group: Group | None = None  # None: this process is the only one
_T = TypeVar("_T")


def count() -> int:
    """The number of processes of the run."""
    return 1 if _group is None else _group.count


def index() -> int:
    """The number of this process."""
    return 0 if _group is None else _group.index


def is_main() -> bool:
    """Whether this is process 0, which alone writes text files, prints and reports."""
    return index() == 0


def start(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other processes, before JAX touches a device; does nothing for a single process.

    `coordinator`: HOST:PORT of process 0. Without it JAX looks for SLURM, Kubernetes, Cloud TPU or
    Open MPI in the environment. Raises ValueError for arguments that do not fit together, and
    LostProcessError where not all processes come.
    """
    global _group
    given = (coordinator, num_processes, process_id)
    _check(*given)
    try:
        if (num_processes or _detected_count()) == 1:
            return
    except (RuntimeError, KeyError) as error:
        raise ValueError(
            f"expected an environment that names all processes of the job, got {error}; give "
            "--coordinator, --num-processes and --process-id"
        ) from error
    import jax
    from jax._src import distributed

    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    missing = (
        f"expected {num_processes or 'all'} processes at {coordinator or 'the coordinator'} within "
        f"{_JOIN_SECONDS} s, each with its own number, got fewer or one number twice; start all of "
        "them with the same --coordinator and --num-processes, each with its own --process-id"
    )
    handle_aborts(lambda: (LOST, missing))
    told = threading.Timer(_PATIENCE_SECONDS, _tell_waiting, [coordinator, num_processes])
    told.daemon = True
    told.start()
    try:
        jax.distributed.initialize(
            *given,
            initialization_timeout=_JOIN_SECONDS,
            heartbeat_timeout_seconds=300,  # a lost process is noticed, and named, before that
            shutdown_timeout_seconds=30,
        )
    except RuntimeError as error:
        raise LostProcessError(f"{missing} ({first_line(error)})") from error
    finally:
        told.cancel()
    state = distributed.global_state
    _group = Group(state.client, state.process_id, state.num_processes)
    hosts = _group.exchange("hosts", socket.gethostname())
    _group.names = [f"process {number} ({host})" for number, host in enumerate(hosts)]
    _group.handle_aborts(str(state.coordinator_address))
    threading.Thread(target=_group.watch, name="processes", daemon=True).start()


def _tell_waiting(coordinator: str | None, num_processes: int | None) -> None:
    who = f"{num_processes} processes" if num_processes else "all processes"
    where = f" at {coordinator}" if coordinator else ""
    print(f"waits for {who}{where}, at most {_JOIN_SECONDS} s", file=sys.stderr, flush=True)


def _check(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    given = (coordinator, num_processes, process_id)
    if all(value is None for value in given):
        return
    if coordinator is None or num_processes is None or process_id is None:
        raise ValueError(
            "expected --coordinator, --num-processes and --process-id together, got "
            f"{sum(value is not None for value in given)} of them; give all three or none"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(
            f"--coordinator: expected HOST:PORT of process 0, got {coordinator}; give both"
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process-id: expected 0 to --num-processes - 1 = {num_processes - 1}, got "
            f"{process_id}; number the processes from 0"
        )
    if process_id == 0 and num_processes > 1:
        _check_port(int(port))


def _check_port(port: int) -> None:
    """Raises ValueError for a port that is taken: JAX's service would crash."""
    with socket.socket() as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            own.bind(("", port))
        except OSError as error:
            raise ValueError(
                f"--coordinator: expected a free port of this machine, got {port} "
                f"({error.strerror}); choose another one for all processes"
            ) from None


def _detected_count() -> int:
    """The number of processes that the environment names; 1 where it names none.

    By JAX's own detection, whose public form would start its service for a single process too.
    """
    if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" not in os.environ:
        return 1  # a pod of its own; JAX would look for the job that it belongs to
    if _SIGNS.isdisjoint(os.environ) and importlib.util.find_spec("libtpu") is None:
        return 1  # the same answer as below, without a second for importing JAX
    from jax._src.clusters import ClusterEnv

    kinds = (kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method)
    found = next((kind for kind in kinds if kind.is_env_present()), None)
    return 1 if found is None else found.get_process_count()


def together(name: str, work: Callable[[], _T]) -> _T:
    """`work()` in every process; an error of one process is raised in all of them.

    All processes make the calls of one name in the same order, from one thread.
    """
    return work() if _group is None else _group.call(name, work, lambda result: None)[0]


def on_main(name: str, work: Callable[[], _T]) -> _T | None:
    """`work()` in process 0 while the others wait; they raise its error. None in the others."""
    return together(name, work if is_main() else lambda: None)


def from_main(name: str, make: Callable[[], _T]) -> _T:
    """What `make()` gives in process 0, a JSON value, in every process."""
    if _group is None:
        return make()
    work: Callable[[], Any] = make if is_main() else lambda: None
    return _group.call(name, work, lambda result: result)[1][0]


def gather(name: str, text: str) -> list[str]:
    """The texts of all processes, in their order."""
    return [text] if _group is None else _group.exchange(name, text)


def check_same(name: str, value: str) -> None:
    """Raises ValueError where `value`, a hash of `name`, differs between processes."""
    if _group is None:
        return
    _, values = _group.call("same " + name, lambda: value, lambda result: result)
    others = [number for number, other in enumerate(values) if other != values[0]]
    if others:
        raise ValueError(
            f"expected the same {name} in all processes, got others in {_group.names[others[0]]} "
            f"than in {_group.names[0]}; give all of them the same command, files and packages"
        )


def describe(number: int) -> str:
    """The number of a process, and its host."""
    return f"process {number}" if _group is None else _group.names[number]


def request(what: str) -> None:
    """Asks all processes to do something after the same step; see `arrive`."""
    if _group is not None:
        with _group.lock:
            _group.wanted.add(what)


def arrive(wanted: Collection[str] = ()) -> set[str]:
    """Counts a step of all processes; returns what they have agreed to do after this step.

    `wanted`: what this process asks for, as `request` does. A request is obeyed by all processes
    after the same step, some steps later.
    """
    if _group is None:
        return set(wanted)
    with _group.lock:  # held while the processes exchange their numbers of steps
        agreed = set().union(*_group.due.values())
        _group.wanted |= set(wanted) - agreed
        _group.steps += 1
        return _group.due.pop(_group.steps, set())


def on_agreement(act: Callable[[set[str]], None]) -> None:
    """Has `act(what)` called, in a thread, when the processes have agreed to do something."""
    if _group is not None:
        _group.on_agreement = act


def end_alone() -> None:
    """Says that this process ends by itself, however long after the others."""
    if _group is not None:
        _group.ends_alone = True


def explained(error: Exception) -> Exception:
    """The error; where a collective failed, the process ends with the name of the one it lost."""
    return error if _group is None else _group.explained(error)


def leave(status: int, message: str = "") -> int:
    """Tells the others how this process ends; ends it at once, unless it is the only one."""
    if _group is None:
        return status
    _group.leave(status, message)
