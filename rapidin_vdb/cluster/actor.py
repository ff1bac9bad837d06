"""What runs on the nodes of a cluster while RapidGrads are made there."""

import logging

from rapidin_vdb.cluster.connection import told_from_here
from rapidin_vdb.compute import Batch, BatchMaker, DeviceError, Result, WorkerSpec, device_error, load_of, use_threads
from rapidin_vdb.errors import RapidInError
from rapidin_vdb.worker_log import Teller, Told


class GradientWorker:
    """A worker on some node: it loads the model when the first batch comes, and answers batches."""

    def __init__(self, spec: WorkerSpec) -> None:
        use_threads(spec.threads)
        self._told: list[Told] = []
        # Where the node itself keeps what is logged, nobody looks.
        logging.getLogger().addHandler(Teller(self._told.append))
        self._spec = spec
        self._maker: BatchMaker | None = None

    def ready(self) -> bool:
        """Answer, once it runs."""
        return True

    def make(self, batch: Batch) -> tuple[list[Result] | RapidInError | DeviceError, list[Told]]:
        """Return what each sample of a batch is turned into, or why it cannot be here; and what was logged."""
        answer = self._make(batch)
        told = [*self._told]
        del self._told[: len(told)]  # in place: libraries have threads that log
        return answer, told

    def _make(self, batch: Batch) -> list[Result] | RapidInError | DeviceError:
        try:
            if self._maker is None:
                self._maker = BatchMaker(load_of(self._spec), token_width=self._spec.token_width)
            return self._maker.make(batch)
        except Exception as error:
            failure = device_error(error, _device_here(self._spec.device))
            if failure is not None:
                return told_from_here(failure)
            if isinstance(error, RapidInError):
                return told_from_here(error)
            raise


def _device_here(device: str) -> str:
    """Return what a worker's device is called: which of its node's GPUs Ray has given it."""
    import ray

    numbers = ray.get_gpu_ids() if device == "cuda" else []
    return f"GPU {numbers[0]}" if numbers else device
