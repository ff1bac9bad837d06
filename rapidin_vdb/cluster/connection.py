"""The way to a Ray cluster: one that runs already, or one of this machine alone for as long as a command takes."""

import logging
import os
from typing import Any

from rapidin_vdb.errors import SpecError

# Of Ray's memory for objects: batches and RapidGrads on their way, and queries.
_OBJECT_BYTES = 256 << 20


def connect(address: str) -> Any:
    """Return Ray, connected to a cluster.

    `auto` is the one of RAY_ADDRESS or of this machine, `local` is started here and ends with this process.

    Raises:
        SpecError: there is none at that address, or Ray is not installed.
    """
    # Read when Ray is loaded: nothing is sent anywhere, and what it thinks aloud stays off the terminal.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
    if address == "local" or address.startswith(("127.", "localhost")):
        # What Ray does on Windows: it stays on the loopback address, and looks for others there.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise SpecError("--cluster needs Ray: pip install 'rapidin-vdb[cluster]'") from error
    if ray.is_initialized():
        return ray
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": "rapidin-vdb"}
    if address == "local":
        # Of no other cluster, whatever the environment says.
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": _OBJECT_BYTES}
    else:
        options["address"] = address
    try:
        ray.init(**options)
    except Exception as error:  # Ray raises plain ones too
        text = " ".join(str(error).split())[:200]
        raise SpecError(
            f"no Ray cluster answers at {address}: {text}. Start one with: ray start --head; or use --cluster local"
        ) from error
    return ray


def nodes_of(ray: Any) -> list[dict[str, float]]:
    """Return what each living node of the cluster has for us: CPUs and GPUs."""
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [resources for resources in found if resources.get("CPU", 0) > 0]
