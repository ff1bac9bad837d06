"""The way to a Ray cluster: one that runs already, or one of this machine alone for as long as a command takes."""

import logging
import os
import re
import warnings
from pathlib import Path
from typing import Any, TypeVar

from rapidin_vdb.errors import SpecError

E = TypeVar("E", bound=Exception)

# Of Ray's memory for objects: batches and RapidGrads on their way, and queries.
_OBJECT_BYTES = 256 << 20
# What Ray says of a worker that is gone, not all of which is of one kind: its own watch over memory ends workers, too.
_LOST = (
    "RayActorError", "ActorUnschedulableError", "ObjectLostError", "OutOfMemoryError", "NodeDiedError",
    "WorkerCrashedError",
)  # fmt: skip
# By the address of a cluster, as what it was asked for: a process can be in one only.
_asked: dict[str, str] = {}


def connect(address: str) -> Any:
    """Return Ray, connected to a cluster.

    `auto` is the one of RAY_ADDRESS or of this machine, `local` is started here and ends with this process.

    Raises:
        SpecError: there is none at that address, this process is in another, or Ray is not installed.
    """
    # Read when Ray is loaded: nothing is sent anywhere, and what it thinks aloud stays off the terminal.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
    # Ray goes where that says, if it is told no address.
    there = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    if there == "local" or there.startswith(("127.", "localhost")):
        # What Ray does on Windows: it stays on the loopback address, and looks for others there.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise SpecError("--cluster needs Ray: pip install 'rapidin-vdb[cluster]'") from error
    if ray.is_initialized():
        _check_same(ray, address)
        return ray
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": "rapidin-vdb"}
    if address == "local":
        # Of no other cluster, whatever the environment says.
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": _OBJECT_BYTES}
    else:
        options["address"] = address
    try:
        with warnings.catch_warnings():
            # Ray forks to start its own programs, which touch nothing of what LanceDB warns about.
            warnings.filterwarnings("ignore", message="lancedb fork support")
            ray.init(**options)
    except Exception as error:  # Ray raises plain ones too
        raise SpecError(
            f"no Ray cluster answers at {address}: {first_words(error)}. Start one with: ray start --head; or use "
            "--cluster local"
        ) from error
    _asked[ray.get_runtime_context().gcs_address] = address
    return ray


def session_of(address: str) -> tuple[str, str]:
    """Return what tells this process's stay in a cluster from any other; it is entered, if it was left.

    Raises:
        SpecError: see `connect`.
    """
    context = connect(address).get_runtime_context()
    return context.gcs_address, context.get_job_id()


def _check_same(ray: Any, address: str) -> None:
    """Refuse another cluster than the one that this process is in."""
    there = ray.get_runtime_context().gcs_address
    # A program may have gone there by itself, before it asked us.
    before = _asked.get(there, address if address in ("auto", "local") else there)
    if address not in (there, before):
        raise SpecError(
            f"this process is in the Ray cluster at {there} (asked for as {before}), and can be in one only; wanted "
            f"{address}: use another process, or call ray.shutdown() before"
        )


def lost_errors(ray: Any) -> tuple[type[Exception], ...]:
    """Return the errors which say that a worker is gone, and not that it could not do something."""
    return tuple(getattr(ray.exceptions, name) for name in _LOST if hasattr(ray.exceptions, name))


def lost_with_node(ray: Any, error: Exception) -> bool:
    """Say whether a worker is gone because its node is, as where nodes are taken back: no batch has a part in that."""
    kind = getattr(ray.exceptions, "NodeDiedError", ())
    words = ("its node has died", "due to node failure")
    return isinstance(error, kind) or getattr(error, "preempted", False) or any(said in str(error) for said in words)


def may_lack_memory(ray: Any, error: Exception, attempt: int) -> bool:
    """Say whether a worker is likely to have ended for want of memory: by Ray's own watch, or on one batch once more.

    Of a process that the system killed Ray knows no more than that it ended, its node living on; so may others.
    """
    words = str(error)
    ended = "its worker process has died" in words and "SYSTEM_ERROR" in words
    return isinstance(error, ray.exceptions.OutOfMemoryError) or (ended and attempt > 1)


def could_not_begin(error: Exception) -> bool:
    """Say whether a worker ended because of what it is, as without a package, which another would do as well."""
    return bool(getattr(error, "actor_init_failed", False))


def first_words(error: Exception) -> str:
    """Return the beginning of what Ray says, on one line; of a worker that could not begin, the end, which says why."""
    lines = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() if line.strip()]
    return " ".join(" ".join(lines[-1:] if could_not_begin(error) else lines).split())[:200]


def nodes_of(ray: Any) -> dict[str, dict[str, float]]:
    """Return what each living node of the cluster has for us, CPUs and GPUs, by the node's id."""
    found = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    return {name: resources for name, resources in found.items() if resources.get("CPU", 0) > 0}


def from_anywhere(name: str) -> str:
    """Return a path as it is understood on other nodes, whose working folder is another; URIs stay.

    >>> from_anywhere("s3://bucket/db")
    's3://bucket/db'
    """
    return name if "://" in name else str(Path(name).absolute())


def model_from_anywhere(given: str | None, stored: str | None) -> str | None:
    """Return the like for the model or adapter that was given, or else is stored; hub names stay as they are."""
    name = given or stored
    return from_anywhere(name) if name is not None and Path(name).is_dir() and from_anywhere(name) != name else given


def told_from_here(error: E) -> E:
    """Return an error that says on which node it arose."""
    from ray.util import get_node_ip_address

    return type(error)(f"on the node {get_node_ip_address()}: {error}")
