"""How workers are spread over a cluster: so many a GPU, or, where there are none, so many a node."""

from dataclasses import dataclass
from typing import Any

from rapidin_vdb.errors import SpecError

# Ray counts CPUs and GPUs in these parts of one.
_UNITS = 10_000


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How workers are spread over a cluster."""

    workers: int
    """How many."""
    device: str
    """Where each computes, `cpu` or `cuda`."""
    cpus: float
    """What each takes of a node's CPUs."""
    gpus: float
    """What each takes of a node's GPUs."""

    @property
    def options(self) -> dict[str, Any]:
        """The same in Ray's words."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "scheduling_strategy": "SPREAD"}


def layout_of(nodes: list[dict[str, float]], *, device: str, workers_per_device: int) -> Layout:
    """Return how workers are spread: so many a GPU, or, where there are none, so many a node.

    >>> layout_of([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}], device="auto", workers_per_device=2)
    Layout(workers=8, device='cuda', cpus=1.0, gpus=0.5)
    >>> layout_of([{"CPU": 8.0}, {"CPU": 4.0}], device="auto", workers_per_device=2)
    Layout(workers=4, device='cpu', cpus=2.0, gpus=0.0)

    Ray counts in ten thousandths, and rounds: shares are cut, so that all of them fit.

    >>> layout_of([{"CPU": 1.0, "GPU": 1.0}], device="auto", workers_per_device=7).gpus
    0.1428
    >>> layout_of([{"CPU": 1.0}], device="auto", workers_per_device=6).cpus
    0.1666

    Raises:
        SpecError: there is no such device in the cluster.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise SpecError(f"--device is {device}; with --cluster, wanted auto, cpu or cuda: Ray deals out the GPUs")
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if device == "cuda" and not gpus:
        raise SpecError("the cluster has no GPU; leave --device out")
    if gpus and device != "cpu":
        return Layout(workers=gpus * workers_per_device, device="cuda", cpus=1.0, gpus=_cut(1 / workers_per_device))
    if not nodes:
        raise SpecError("the cluster has no node with CPUs")
    share = min(node["CPU"] for node in nodes) / workers_per_device
    cpus = _cut(share) if share < 1 else float(int(share))
    return Layout(workers=len(nodes) * workers_per_device, device="cpu", cpus=cpus, gpus=0.0)


def _cut(share: float) -> float:
    return int(_UNITS * share) / _UNITS
