"""RapidGrads made on a cluster: actors that each hold the model once, fed from the driver's one queue of batches."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

from rapidin_vdb.cluster.connection import (
    connect,
    first_words,
    lost_errors,
    model_from_anywhere,
    nodes_of,
)
from rapidin_vdb.cluster.crew import Crew
from rapidin_vdb.cluster.layout import Layout, layout_of
from rapidin_vdb.compute import (
    Batch,
    Compute,
    Result,
    Road,
    WorkerSpec,
    road_without_model,
)
from rapidin_vdb.errors import SpecError
from rapidin_vdb.gradient import default_batch_tokens, weight_bytes

# Nodes that were lost while one looked, so often; and how long a busy cluster is waited for.
_LIVES = 3
_ROOM_SECONDS = 600.0


def road_on_cluster(
    spec: WorkerSpec, *, address: str, workers_per_device: int, batch_tokens: int | None
) -> tuple[Road, int]:
    """Return the road through a cluster's workers, and how many tokens a batch may have there.

    Raises:
        SpecError: there is no such cluster, no such device in it, or no room on it.
        ModelError: the model's tokenizer or configuration cannot be loaded here.
    """
    ray = connect(address)
    layout = layout_of(list(nodes_of(ray).values()), device=spec.device, workers_per_device=workers_per_device)
    # As every node finds them; what the database says of itself stays.
    spec = replace(
        spec,
        model=model_from_anywhere(spec.model, spec.fingerprint.model),
        adapter=model_from_anywhere(spec.adapter, spec.fingerprint.adapter),
        device=layout.device,
        threads=max(1, int(layout.cpus)),
    )
    road = road_without_model(spec, compute_on_cluster(ray, spec, layout))
    if batch_tokens is None:
        batch_tokens = _batch_tokens_there(ray, road, spec, layout, workers_per_device)
    return road, batch_tokens


def _batch_tokens_there(ray: Any, road: Road, spec: WorkerSpec, layout: Layout, workers_per_device: int) -> int:
    """Return how many tokens a batch may have, by the memory that is free where a worker may run.

    Raises:
        SpecError: no node had room to look, or could.
    """
    # A look takes no CPU to speak of, but not none: nodes without are not for workers. Where memory is short, Ray would
    # itself try again for ever.
    options = {"num_cpus": min(0.01, layout.cpus), "num_gpus": layout.gpus, "max_retries": 0}
    look = ray.remote(default_batch_tokens).options(**options)
    dtype, quantization = spec.fingerprint.dtype, spec.fingerprint.quantization
    weights = weight_bytes(road.config, dtype=dtype, quantization=quantization)
    for life in range(_LIVES):
        found = look.remote(road.config, dtype=dtype, device=layout.device, workers=workers_per_device, weights=weights)
        try:
            return int(ray.get(found, timeout=_ROOM_SECONDS))
        except ray.exceptions.GetTimeoutError as error:
            ray.cancel(found, force=True)
            raise SpecError(
                f"no node of the cluster had room within {_ROOM_SECONDS:.0f} s to look how much memory a worker has "
                f"there (which takes {layout.gpus:g} GPUs). Wait until other work is done, or say it: --batch-tokens N"
            ) from error
        except ray.exceptions.RayError as error:
            if isinstance(error, lost_errors(ray)) and life < _LIVES - 1:
                continue
            # Of what was raised there, Ray's own text is a traceback.
            raise SpecError(
                "no node of the cluster could look how much memory a worker has there: "
                f"{first_words(getattr(error, 'cause', None) or error)}. See to it, or say it: --batch-tokens N"
            ) from error
    raise AssertionError("unreachable")


def compute_on_cluster(ray: Any, spec: WorkerSpec, layout: Layout) -> Compute:
    """Return a function that shares batches among actors; a finished batch comes first, whoever did it.

    An actor that dies, or whose node does, or whose GPU fails, is reported; its batch goes back to the queue, and
    another actor is asked for, which need not find room: those that live go on. Where that one's GPU fails before it
    has done a batch, no other is asked for.
    """

    def compute(batches: Iterator[Batch]) -> Iterator[tuple[Batch, list[Result]]]:
        first = next(batches, None)
        if first is None:
            return  # no worker need be started
        crew = Crew(ray, spec, layout)
        try:
            yield from crew.share(chain([first], batches))
        finally:
            crew.end()

    return compute
