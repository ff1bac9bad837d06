"""Which way samples become RapidGrads: in this process, in workers of this machine, or on a cluster."""

from collections.abc import Callable

from rapidin_vdb.compute import Road, WorkerSpec, road_here
from rapidin_vdb.engine import Engine
from rapidin_vdb.errors import SpecError
from rapidin_vdb.gradient import (
    check_token_width,
    default_batch_tokens,
    release_memory,
    resolve_devices,
    weight_bytes,
)  # fmt: skip
from rapidin_vdb.machine import free_bytes
from rapidin_vdb.records import Fingerprint
from rapidin_vdb.sketch import map_bytes
from rapidin_vdb.store import SampleTable
from rapidin_vdb.workers import road_of_workers, threads_each


def choose_road(
    fingerprint: Fingerprint,
    *,
    place: str,
    loaded: Callable[[str], Engine],
    device: str,
    workers_per_device: int,
    batch_tokens: int | None,
    dry_run: bool,
    cluster: str | None = None,
    model: str | None = None,
    adapter: str | None = None,
    token_width: int | None = None,
) -> tuple[Road, int, int, list[str]]:
    """Return a road, how many tokens a batch may have on it, how many workers it has, and their devices.

    `loaded` returns the engine of this process, on a device. A dry run times one worker in this process, with as many
    threads as each would have.

    Raises:
        SpecError: there is no such device or cluster, or a cluster has nothing to do with what was asked for.
        ModelError: the model, or its tokenizer, cannot be loaded.
    """
    if cluster is not None:
        if dry_run:
            raise SpecError("--dry-run times this machine; leave --cluster out, and divide by its workers")
        # Here: what needs no cluster does not load Ray.
        from rapidin_vdb.cluster import road_on_cluster

        spec = WorkerSpec(
            fingerprint=fingerprint, place=place, model=model, adapter=adapter, device=device, threads=1,
            token_width=token_width,
        )  # fmt: skip
        road, tokens = road_on_cluster(
            spec, address=cluster, workers_per_device=workers_per_device, batch_tokens=batch_tokens
        )
        return road, tokens, workers_per_device, [device]
    devices = resolve_devices(device)
    workers = len(devices) * workers_per_device
    here = workers == 1 or dry_run
    if here:
        threads = threads_each(workers) if workers > 1 else None
        road = road_here(loaded(devices[0]), token_width=token_width, threads=threads)
    else:
        road = road_of_workers(
            fingerprint, place=place, devices=devices, workers=workers, model=model, adapter=adapter,
            token_width=token_width,
        )  # fmt: skip
    if batch_tokens is None:
        # Of the models on a device, the one of this process is there already.
        to_come = workers_per_device - here
        weights = 0
        if to_come:
            if not here:
                release_memory()  # what torch keeps in this process is not there for others
            each = weight_bytes(road.config, dtype=fingerprint.dtype, quantization=fingerprint.quantization)
            each += _map_bytes(fingerprint, free_bytes(devices[0]) // workers_per_device - each)
            weights = each * to_come // workers_per_device
        batch_tokens = default_batch_tokens(
            road.config, dtype=fingerprint.dtype, device=devices[0], workers=workers_per_device, weights=weights
        )
    return road, batch_tokens, workers, devices


def _map_bytes(fingerprint: Fingerprint, room: int) -> int:
    """Return what a worker's map of the sketch takes of the room that weights leave; 0 where it is kept elsewhere."""
    size = map_bytes(fingerprint.gradient_length, fingerprint.sketch.width)
    return size if 2 * size < room else 0


def token_width_for(table: SampleTable, given: int | None, *, wanted: bool) -> int | None:
    """Return the width of single tokens' RapidGrads: that which they have in the table, or the one asked for.

    None where they are not `wanted`.

    Raises:
        SpecError: the two differ, it cannot be honoured, or there is one for what is not wanted.
    """
    if not wanted:
        if given is not None:
            raise SpecError("--token-width goes with --token-gradients")
        return None
    here, widest = table.tokens.width, table.fingerprint.sketch.width
    if here is not None and given not in (None, here):
        raise SpecError(f"--token-width is {given}, but tokens are stored with {here} here; leave it out")
    width = next(known for known in (here, given, min(4096, widest)) if known is not None)
    check_token_width(width, widest)
    return width
