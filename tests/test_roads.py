"""Which way an ingest takes, and what it reckons with."""

from rapidin_vdb import roads
from rapidin_vdb.gradient.memory import is_out_of_memory
from rapidin_vdb.sketch import Sketch, map_bytes


def test_batches_of_workers_leave_room_for_weights_and_maps_to_come(database, monkeypatch):
    """By hand: a bucket and a bit for each coordinate; a map that would take half of what is left goes elsewhere."""
    assert (map_bytes(1000, 1 << 16), map_bytes(1000, 1 << 17)) == (2125, 4125)
    fingerprint, seen, released = database.fingerprint, [], []
    monkeypatch.setattr(roads, "default_batch_tokens", lambda config, **given: seen.append(given["weights"]) or 8)
    monkeypatch.setattr(roads, "weight_bytes", lambda config, **given: 1000)
    monkeypatch.setattr(roads, "release_memory", lambda: released.append(True))
    size = 2 * 416 + 416 // 8
    sketch = Sketch(fingerprint.sketch, [400, 16], device="cpu", keep="device")
    assert sketch._kept is not None and sum(tensor.nbytes for kept in sketch._kept for tensor in kept) == size

    def weights(workers: int, *, free: int, dry_run: bool = False) -> int:
        monkeypatch.setattr(roads, "free_bytes", lambda device: free)
        roads.choose_road(
            fingerprint, place=str(database.path), loaded=lambda device: database._loaded(), device="cpu",
            workers_per_device=workers, batch_tokens=None, dry_run=dry_run,
        )  # fmt: skip
        return seen[-1]

    enough = 3 * (1000 + 2 * size + 1)
    assert weights(1, free=enough) == 0 and not released, "it is loaded already"
    assert weights(3, free=enough) == 1000 + size and released == [True]
    assert weights(3, free=enough - 3) == 1000
    assert weights(3, free=enough, dry_run=True) == (1000 + size) * 2 // 3 and released == [True] * 2


def test_a_handle_that_finds_no_memory_is_short_of_memory():
    said = "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
    assert is_out_of_memory(RuntimeError(said)) and not is_out_of_memory(RuntimeError("CUBLAS_STATUS_NOT_INITIALIZED"))
