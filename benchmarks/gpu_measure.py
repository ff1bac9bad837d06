"""How `gpu.py` measures one configuration."""

import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from gpu_checks import check_gradients, check_map, check_scatter, profiled
from gpu_model import MAX_TOKENS, SHAPES, build, make_batches, make_samples, padded_tokens, stratified

# Hours for 52,000 samples on one H100, as the paper has them.
PAPER = {"lora": 4.02, "full": 26.01}
SAMPLES = 52_000


def tell(message: str) -> None:
    """Say on the terminal what is going on."""
    print(message, file=sys.stderr, flush=True)


class Nothing:
    """A receiver that lets gradients go: what is left is the price of forming them."""

    def dense(self, number: int, first: int, grads: Any) -> None:
        """Take no notice."""

    def rows(self, number: int, sample: int, ids: Any, grads: Any) -> None:
        """Take no notice."""


class Table:
    """A real table in a temporary folder, rows committed as an ingest does."""

    def __init__(self, loaded: Any, spec: Any) -> None:
        from rapidin_vdb.ingest import _COMMIT_BYTES
        from rapidin_vdb.records import Fingerprint
        from rapidin_vdb.store import Row, SampleTable

        self._folder = tempfile.TemporaryDirectory()
        self._row, self._limit = Row, _COMMIT_BYTES
        none: dict[str, Any] = dict.fromkeys(("model_hash", "adapter_hash", "tokenizer_hash", "template_text"), "")
        fingerprint = Fingerprint(
            **none, model="random", adapter="random", quantization=loaded.spec.quantization, dtype=loaded.dtype,
            template="alpaca", max_tokens=MAX_TOKENS, loss="", normalize="layer", parameters=loaded.spec.parameters,
            theta=loaded.shapes, sketch=spec, epochs=1.0, learning_rate=1.0,
        )  # fmt: skip
        self._table = SampleTable.create(str(Path(self._folder.name) / "db"), fingerprint)
        self._rows: list[Any] = []
        self._seen = self._table.snapshot().version
        self.written = 0
        self.seconds = 0.0

    def add(self, batch: list[Any], results: list[Any], *, last: bool = False) -> None:
        """Take a batch's rows, and commit them when enough are waiting."""
        started = time.perf_counter()
        for (sample, encoded), (vector, loss) in zip(batch, results, strict=True):
            self._rows.append(self._row(sample=sample, encoded=encoded, vector=vector, loss=loss))
        if self._rows and (last or sum(row.vector.nbytes for row in self._rows) >= self._limit):
            self._seen = self._table.append(self._rows, seen=self._seen).seen
            self.written, self._rows = self.written + len(self._rows), []
        self.seconds += time.perf_counter() - started


def plain_step(loaded: Any, batch: list[Any]) -> None:
    """One forward and backward of training, gradients of all trainable parameters, over the same tokens."""
    import torch.nn.functional as F

    from rapidin_vdb.gradient.training import padded

    ids, _, labels = (tensor.to(loaded.device) for tensor in padded(batch))
    logits = loaded.model(input_ids=ids, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100).backward()
    for tensor in loaded.theta.values():
        tensor.grad = None


class Meter:
    """Seconds of a block, the device's work included, and the most memory that it allocated."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds, self.peak = device, 0.0, 0

    def __enter__(self) -> "Meter":
        import torch

        if self.device != "cpu":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        if self.device != "cpu":
            torch.cuda.synchronize()
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        else:
            self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        self.seconds += time.perf_counter() - self._start


def measure(
    *, kind: str, shape: str, width: int, shuffles: int, seconds: float, batch_tokens: int | None, samples: int,
    precision: str,
) -> dict[str, Any]:  # fmt: skip
    """Measure one configuration."""
    import torch

    from rapidin_vdb.gradient import RapidGradMaker, default_batch_tokens
    from rapidin_vdb.gradient.memory import is_out_of_memory, release_memory
    from rapidin_vdb.records import SketchSpec

    device = "cuda:0" if torch.cuda.is_available() and shape != "small" else "cpu"
    torch.set_float32_matmul_precision(precision)
    started = time.perf_counter()
    loaded, said = build(kind, shape=shape, device=device)
    said["build_seconds"] = time.perf_counter() - started
    tell(f"model built in {said['build_seconds']:.1f} s; composing the map of {said['gradient_length']:,} coordinates")
    spec = SketchSpec(width=width, shuffles=shuffles)
    with Meter(device) as composing:
        maker = RapidGradMaker(loaded, spec=spec, normalize="layer")
    release_memory()
    said |= {"width": width, "shuffles": shuffles, "float32_matmul": precision, "map_kept": maker.sketch.keep}
    said |= {"compose_seconds": composing.seconds, "compose_peak_bytes": composing.peak}
    tell(f"map composed in {composing.seconds:.1f} s, kept: {maker.sketch.keep}")
    said |= {"scatter_against_index_add": check_scatter(maker), "map_as_on_cpu": check_map(maker)}
    release_memory()
    batch_tokens = batch_tokens or default_batch_tokens(loaded.model.config, dtype=loaded.dtype, device=device)
    pairs, said["lengths"] = make_samples(samples, vocabulary=SHAPES[shape]["vocabulary"])
    while True:
        batches = make_batches(pairs, batch_tokens, width)
        order = stratified(batches)
        # The largest first, for what does not fit; then the one of the most samples, for compiling, and the checks.
        largest, most = max(batches, key=padded_tokens), max(batches, key=len)
        try:
            for batch in (largest, most):
                maker.make_batch([encoded for _, encoded in batch])
            break
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or batch_tokens < 2 * MAX_TOKENS:
                raise
            batch_tokens //= 2
            tell(f"out of memory; batches of {batch_tokens} tokens then")
        release_memory()
    given_up = {list(loaded.theta)[number]: reason for number, reason in maker._gradients.unruled.items()}
    said |= {"given_up": len(given_up), "such_as": dict(list(given_up.items())[:3]), "batch_tokens": batch_tokens}
    # What is timed is the batched way, also where the self-check found 16 bits too coarse; `given_up` says that it did.
    maker._gradients.unruled.clear()
    mixed = sorted((encoded for _, encoded in pairs[:256]), key=lambda encoded: len(encoded.input_ids))
    fitting = max(1, min(len(most), batch_tokens // len(mixed[128].input_ids)))
    said["check"] = check_gradients(maker, [mixed[128 * n // fitting] for n in range(fitting)])
    tell(f"check: {said['check']}")
    said |= timed(maker, batches, order, spec=spec, seconds=seconds)
    if shape == "7b":
        said |= {"paper_hours": PAPER[kind], "times_faster_than_paper": PAPER[kind] / said["hours"]}
    said["profile"] = profiled(maker, [encoded for _, encoded in batches[order[0]]])
    return said


def timed(maker: Any, batches: list[Any], order: list[int], *, spec: Any, seconds: float) -> dict[str, Any]:
    """Time batches until the seconds are spent: a plain step, gradients let go, and the whole; and extrapolate."""
    loaded, coordinates = maker.loaded, sum(shape.count for shape in maker.loaded.shapes)
    try:
        table: Table | None = Table(loaded, spec)
    except ImportError:
        table = None
    one_batch(maker, batches[order[0]], Meters(loaded.device))  # once for what happens once
    meters, done, each = Meters(loaded.device), [], []
    for number in order:
        before = meters.plain.seconds, meters.making.seconds
        rows = one_batch(maker, batches[number], meters)
        if table is not None:
            table.add(batches[number], rows)
        done.append(batches[number])
        each.append((meters.plain.seconds - before[0], meters.making.seconds - before[1]))
        if len(done) >= 3 and meters.seconds > seconds:
            break
    if table is not None:
        table.add([], [], last=True)
    count, padded = sum(map(len, done)), sum(map(padded_tokens, done))
    tokens = sum(len(encoded.input_ids) for batch in done for _, encoded in batch)
    making, plain = meters.making.seconds, meters.plain.seconds if meters.plain_fits else None
    outside = table.seconds if table is not None else 0.0
    sketching = max(making - meters.forming.seconds, 0.0)
    # The forward and backward pass go with the padded tokens, the sketch with the samples.
    sizes = np.array([[padded_tokens(batch), len(batch)] for batch in done])
    fit = np.linalg.lstsq(sizes, np.array([seconds for _, seconds in each]), rcond=None)[0]
    everything = np.array([sum(map(padded_tokens, batches)), sum(map(len, batches))])
    scale = SAMPLES / everything[1] / 3600
    return {
        "batches": len(batches),
        "timed": {"batches": len(done), "samples": count, "tokens": tokens, "padded_tokens": padded},
        "seconds": {
            "plain_step": plain,
            "gradients_let_go": meters.forming.seconds,
            "rapidgrads": making,
            "commits": table.seconds if table is not None else None,
        },
        "ratio_to_plain_step": (making + outside) / plain if plain else None,
        "ratio_of_a_batch": statistics.median(ours / step for step, ours in each) if plain else None,
        "fraction_in_sketch": sketching / making,
        "sketched_coordinates_per_second": count * coordinates / sketching if sketching else None,
        "samples_per_second": count / (making + outside),
        "tokens_per_second": tokens / (making + outside),
        "peak_bytes": meters.making.peak,
        "plain_step_peak_bytes": meters.plain.peak,
        # As `ingest --dry-run` does it.
        "hours": float((making + outside) * everything[0] / padded * scale),
        "seconds_a_padded_token": float(fit[0]),
        "seconds_a_sample": float(fit[1]),
        "hours_by_fit": float((everything @ fit + outside * everything[1] / count) * scale),
    }


class Meters:
    """Those of one configuration, and whether the plain step fits the device's memory."""

    def __init__(self, device: str) -> None:
        self.plain, self.forming, self.making = (Meter(device) for _ in range(3))
        self.plain_fits = True

    @property
    def seconds(self) -> float:
        """All that was timed."""
        return sum(meter.seconds for meter in (self.plain, self.forming, self.making))


def one_batch(maker: Any, batch: list[Any], meters: Meters) -> list[Any]:
    """Time one batch in every way, and return its rows in half precision."""
    from rapidin_vdb.gradient.memory import is_out_of_memory, release_memory

    encoded = [one for _, one in batch]
    try:
        if meters.plain_fits:
            with meters.plain:
                plain_step(maker.loaded, encoded)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        meters.plain_fits = False
    if not meters.plain_fits:
        for tensor in maker.loaded.theta.values():
            tensor.grad = None
        release_memory()
    with meters.forming:
        maker._gradients.stream(encoded, Nothing())
    with meters.making:
        results = maker.make_batch(encoded, half=True)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
