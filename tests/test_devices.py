"""A device that fails: its worker is replaced, and others go on where that is of no use; here and on Ray."""

import importlib.util
import json
import logging
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import threading
from collections import Counter
from multiprocessing.connection import Connection
from types import SimpleNamespace

import pytest
import torch
from conftest import encoded
from test_cluster import Handle, Stand, crew_of

import rapidin_vdb
from rapidin_vdb.compute import DeviceError, WorkerSpec, device_error, load_of
from rapidin_vdb.engine import Engine
from rapidin_vdb.errors import FingerprintError, GradientError, ModelError
from rapidin_vdb.gradient.device import device_failure

# As torch 2.13 words them on a GPU: what follows the first line is advice.
ILLEGAL = (
    "CUDA error: an illegal memory access was encountered\nSearch for `cudaErrorIllegalAddress' in https://docs.nvidia.com "
    "for more information.\nCUDA kernel errors might be asynchronously reported at some other API call"
)
HAS_RAY = importlib.util.find_spec("ray") is not None


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError(ILLEGAL),
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        torch.AcceleratorError("HIP error: invalid device function"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
        RuntimeError("CUDA driver error: unspecified launch failure"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("No CUDA GPUs are available"),
    ],
    ids=str,
)
def test_which_errors_mean_that_a_device_failed(error):
    first = str(error).splitlines()[0]
    assert device_failure(error) == first
    # What is made of it on the way still means it, and only what came of it.
    ours = ModelError("the model m cannot be loaded")
    ours.__cause__ = error
    assert device_failure(ours) == first and device_failure(ModelError(f"no model at {first}")) is None
    assert str(device_error(ours, "cuda:1")) == f"cuda:1 failed ({first})"
    assert str(pickle.loads(pickle.dumps(device_error(error, "cuda:1")))) == f"cuda:1 failed ({first})"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
        TypeError("CUDA error: that somebody quotes"),
        GradientError("sample s: the gradient is zero"),
    ],
    ids=str,
)
def test_which_do_not(error):
    assert device_failure(error) is None and device_error(error, "cuda:1") is None


def test_a_device_that_is_gone_is_as_one_that_failed(database):
    """It was there when the workers were dealt out to devices."""
    if torch.cuda.is_available():
        pytest.skip("there is such a device")
    spec = WorkerSpec(fingerprint=database.fingerprint, place="", model=None, adapter=None, device="cuda:7", threads=1)
    with pytest.raises(DeviceError, match=r"^cuda:7 is gone \(--device cuda:7: this machine has 0 CUDA devices"):
        load_of(spec)


@pytest.mark.parametrize(
    ("error", "options", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 172 MiB"),
            {"dtype": "bfloat16"},
            "whose weights take 13.5 GB: CUDA out of memory. Tried to allocate 172 MiB. It has to fit one device whole, and "
            "once for each worker there: make room, take a larger --device or fewer --workers-per-device, or make the "
            "database with --quantization nf4",
        ),
        (
            MemoryError("Cannot allocate memory (os error 12)"),
            {"dtype": "float32"},
            "whose weights take 27.0 GB: Cannot allocate memory (os error 12). It has to fit one device whole, and once for "
            "each worker there: make room, take a larger --device or fewer --workers-per-device, or make the database with "
            "--quantization nf4 or --dtype bfloat16",
        ),
        (
            RuntimeError("unable to mmap 13476831232 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
            {"dtype": "bfloat16", "quantization": "nf4"},
            "once for each worker there: make room, take a larger --device or fewer --workers-per-device",
        ),
        (
            torch.AcceleratorError(ILLEGAL),
            {},
            "cpu failed while the model {name} was loaded: CUDA error: an illegal memory access was encountered. See to the "
            "device, or name another",
        ),
    ],
    ids=["of cuda", "of the system", "nf4", "failed"],
)
def test_a_model_that_its_device_cannot_take_is_not_told_to_be_missing(
    tmp_path, models, database, monkeypatch, error, options, said
):
    """A Llama of 7 billion parameters, 6,738,415,616 of them, of which there is no more than the configuration."""
    import transformers

    shutil.copytree(models["llama"], tmp_path / "large")
    config = json.loads((tmp_path / "large" / "config.json").read_text())
    sizes = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128}
    (tmp_path / "large" / "config.json").write_text(json.dumps(config | sizes | heads))

    def raising(*arguments, **more):
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", raising)
    name = str(tmp_path / "large")
    with pytest.raises(ModelError) as raised:
        rapidin_vdb.init(tmp_path / "new", model=name, device="cpu", **options)
    assert str(raised.value).endswith(said.format(name=name)) and "Wanted a folder" not in str(raised.value)
    # Nor that it may have moved.
    with pytest.raises(ModelError) as raised:
        rapidin_vdb.open(database.path).load(device="cpu")
    assert "moved" not in str(raised.value) and "Wanted a folder" not in str(raised.value)


class Thread:
    """In the place of a process: its end of the pipe is its own, and goes with it."""

    exitcode = 0

    def __init__(self, target, args, daemon):
        theirs, *more = args
        # The caller closes the end that it was given.
        own = Connection(os.dup(theirs.fileno()))

        def run():
            with own:
                target(own, *more)

        self._thread = threading.Thread(target=run, daemon=daemon)
        self.start, self.join, self.is_alive = self._thread.start, self._thread.join, self._thread.is_alive

    def terminate(self):
        """It ends by itself, as soon as it finds the other end closed."""


@pytest.fixture
def share(database, monkeypatch):
    """What shares batches among workers that are threads, whose models do what they are told instead of gradients."""
    from rapidin_vdb.workers import compute_in_workers, process

    monkeypatch.setattr(
        multiprocessing, "get_context", lambda _: SimpleNamespace(Pipe=multiprocessing.Pipe, Process=Thread)
    )
    monkeypatch.setattr(signal, "signal", lambda *event: None)
    monkeypatch.setattr(process._Line, "tell", lambda *_: None)
    monkeypatch.setattr(logging.getLogger(), "handlers", list(logging.getLogger().handlers))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def sharing(devices, act, batches):
        """Yield the ids of each batch that was done; `act` is told device, batch, and how many models were there before."""
        lives = Counter()

        def load(spec):
            life = lives[spec.device]
            lives[spec.device] += 1

            def make(batch, *, token_width):
                act(spec.device, batch, life)
                return [GradientError(sample.sample_id) for sample in batch]

            engine = object.__new__(Engine)
            engine.make = make
            return engine

        monkeypatch.setattr(process, "load_of", load)
        specs = [
            WorkerSpec(fingerprint=database.fingerprint, place="", model=None, adapter=None, device=device, threads=1)
            for device in devices
        ]
        for batch, made in compute_in_workers(specs)(iter(batches)):
            assert [str(one) for one in made] == [sample.sample_id for sample in batch]
            yield from (sample.sample_id for sample in batch)

    return sharing


BATCHES = [[encoded(number), encoded(number + 1)] for number in range(0, 24, 2)]
ALL = [f"s{number:02d}" for number in range(24)]


def test_a_device_that_fails_now_and_then_is_used_again(share, caplog):
    """Its processes are others; the other device waits until the third of them has done a batch."""
    mended, seen = threading.Event(), []

    def act(device, batch, life):
        if device == "cuda:1":
            seen.append((life, batch[0].sample_id))
            # The first batch of the first process, and the second of the second one.
            if len(seen) in (1, 3):
                raise torch.AcceleratorError(ILLEGAL)
            if life == 2:
                mended.set()
        else:
            assert mended.wait(60)

    assert sorted(share(["cuda:0", "cuda:1"], act, BATCHES)) == ALL
    assert seen[:4] == [(0, "s02"), (1, "s04"), (1, "s02"), (2, "s06")], "first what nobody has tried"
    told = (
        "cuda:1 failed (CUDA error: an illegal memory access was encountered): a worker's 2 samples (s02 to s03) go back "
        "to the queue, another takes its place"
    )
    assert caplog.messages == [told, told]


def test_others_go_on_without_a_device_that_keeps_failing(share, caplog):
    """Two of them, which fail before anyone has done a batch: none of theirs is held to be at fault."""
    failures, all_failed = Counter(), threading.Event()

    def act(device, batch, life):
        if device == "cuda:0":
            assert all_failed.wait(60)
            return
        failures[device] += 1
        if sum(failures.values()) == 4:
            all_failed.set()
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")

    assert sorted(share(["cuda:0", "cuda:1", "cuda:2"], act, BATCHES)) == ALL
    assert failures == {"cuda:1": 2, "cuda:2": 2}
    for device in failures:
        first, second = [
            text for text in caplog.messages if text.startswith(f"{device} failed (CUDA error: uncorrectable")
        ]
        assert first.endswith("go back to the queue, another takes its place")
        assert second.endswith("go back to the queue; it failed before, and the other workers go on without it")


def test_what_failed_on_a_device_is_left_to_others_where_nothing_else_is_left(share, monkeypatch):
    """Else a device that fails would have a batch three times, while others are busy: here until two have failed."""
    from rapidin_vdb.workers import sharing

    tried, told, failed = Counter(), [], threading.Event()
    replace = sharing._replace

    def noting(*arguments):
        replace(*arguments)
        told.append(arguments)
        if len(told) == 2:
            failed.set()

    monkeypatch.setattr(sharing, "_replace", noting)

    def act(device, batch, life):
        tried[device] += 1
        if device == "cuda:0":
            assert failed.wait(60)
            return
        raise torch.AcceleratorError(ILLEGAL)

    assert sorted(share(["cuda:0", "cuda:1", "cuda:2"], act, BATCHES[:3])) == ALL[:6]
    assert tried == {"cuda:0": 3, "cuda:1": 1, "cuda:2": 1}


def test_samples_on_which_every_device_fails_are_named(share, caplog):
    def act(device, batch, life):
        if batch[0].sample_id == "s06":
            raise RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`")

    wanted = (
        r"3 workers died on the 2 samples s06 to s07 \(the last: cuda:\d failed \(CUDA error: CUBLAS_STATUS_EXECUTION_FAILED "
        r"when calling `cublasSgemm\(...\)`\)\); what was done before is kept. Run again with"
    )
    with pytest.raises(GradientError, match=wanted) as raised:
        done = []
        done.extend(share(["cuda:0", "cuda:1"], act, BATCHES))
    assert "go on without" not in caplog.text
    (note,) = raised.value.__cause__.__notes__
    assert note.startswith("in a worker:\nTraceback") and "in make" in note


@pytest.mark.parametrize("workers", [1, 3])
def test_where_all_devices_fail_it_ends(share, workers):
    def act(device, batch, life):
        raise torch.AcceleratorError(ILLEGAL)

    devices = [f"cuda:{number}" for number in range(workers)]
    wanted = (
        r"^cuda:\d failed \(CUDA error: an illegal memory access was encountered\), as before, with no batch done in "
        r"between, and no other worker is left; what was done before is kept. See to the device, or leave it out of --device"
    )
    with pytest.raises(GradientError, match=wanted):
        list(share(devices, act, [[encoded(number)] for number in range(24)]))


@pytest.mark.parametrize("error", [FingerprintError("model_hash is another"), ValueError("a bug")], ids=str)
def test_errors_of_no_device_are_raised_as_they_are(share, error):
    def act(device, batch, life):
        raise error

    with pytest.raises(type(error), match=str(error)):
        list(share(["cuda:0", "cuda:1"], act, BATCHES))


class Cluster(Stand):
    """In Ray's place: actors on GPUs, some of which fail from some number of batches on, and never work again."""

    def __init__(self, draw, gpus, good_for):
        super().__init__(draw, lambda batch: False)
        self.gpus, self.good_for, self.at = gpus, good_for, {}
        self.had, self.actors = Counter(), Counter()

    def remote(self, _):
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda _: self.placed(Handle(self))))

    def placed(self, actor):
        self.at[actor] = self.draw.choice(sorted(set(range(self.gpus)) - set(self.at.values())))
        self.actors[self.at[actor]] += 1
        return actor

    def done(self, actor, batch):
        gpu = self.at[actor]
        self.had[gpu] += 1
        if self.had[gpu] > self.good_for.get(gpu, 1000):
            return DeviceError(f"GPU {gpu} failed (CUDA error: an illegal memory access was encountered)"), []
        return super().done(actor, batch)

    def kill(self, actor):
        self.at.pop(actor, None)
        super().kill(actor)


def test_a_cluster_goes_on_without_gpus_that_keep_failing(database, caplog):
    batches = [[encoded(number)] for number in range(40)]
    for seed in range(60):
        caplog.clear()
        draw = random.Random(seed)
        cluster = Cluster(draw, 3, {0: draw.randrange(5), 2: draw.randrange(5)})
        done = [
            batch[0].sample_id for batch, _ in crew_of(cluster, database, workers=3, device="cuda").share(iter(batches))
        ]
        assert sorted(done) == sorted(batch[0].sample_id for batch in batches), seed
        # Whichever of the two an actor gets that is started in another's place.
        assert cluster.actors[1] == 1 and cluster.actors[0] + cluster.actors[2] <= 4, (seed, cluster.actors)
        if cluster.had[0] > cluster.good_for[0]:
            assert (
                "GPU 0 failed (CUDA error: an illegal memory access was encountered): its 1 samples (s" in caplog.text
            )
    assert "go back to the queue, and another is started" in caplog.text
    assert (
        "as before: its 1 samples" in caplog.text and "go back to the queue, and others go on without it" in caplog.text
    )


def test_a_gpu_of_a_cluster_that_fails_now_and_then_is_used_again(database):
    """By the next actor, and the one after that."""

    class Flaky(Cluster):
        broken = None

        def done(self, actor, batch):
            if self.at[actor] == 0 and self.had[0] in (2, 6):
                self.broken = actor  # which does nothing any more
            self.good_for = {self.at[actor]: 0} if actor is self.broken else {}
            return super().done(actor, batch)

    batches = [[encoded(number)] for number in range(80)]
    for seed in range(30):
        cluster = Flaky(random.Random(seed), 2, {})
        done = [
            batch[0].sample_id for batch, _ in crew_of(cluster, database, workers=2, device="cuda").share(iter(batches))
        ]
        assert sorted(done) == sorted(batch[0].sample_id for batch in batches), seed
        assert cluster.actors == {0: 3, 1: 1} and cluster.had[0] > 7, (seed, cluster.had)


@pytest.mark.parametrize("gpus", [1, 2])
def test_where_all_gpus_of_a_cluster_fail_it_ends(database, gpus):
    batches = [[encoded(number)] for number in range(40)]
    said = [
        "^GPU 0 failed .*, as before, with no batch done in between, and no other worker is left; what was done before"
    ]
    if gpus == 2:
        said += [
            r"^GPU 1 failed .*, as before",
            r"^3 workers died on the 1 samples s.. \(the last: GPU . failed \(CUDA error",
        ]
    for seed in range(30):
        cluster = Cluster(random.Random(seed), gpus, {0: 2, 1: 0})
        with pytest.raises(GradientError, match="|".join(said)):
            list(crew_of(cluster, database, workers=gpus, device="cuda").share(iter(batches)))
        assert sum(cluster.actors.values()) <= 2 * gpus


@pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed: pip install 'rapidin-vdb[cluster]'")
def test_an_actor_tells_errors_of_its_device_and_ours_and_raises_bugs(database, monkeypatch):
    from rapidin_vdb.cluster import actor

    spec = WorkerSpec(fingerprint=database.fingerprint, place="", model=None, adapter=None, device="cpu", threads=1)
    # What it adds to the process that is a worker's own goes with the test.
    monkeypatch.setattr(logging.getLogger(), "handlers", [*logging.getLogger().handlers])
    worker = actor.GradientWorker(spec)
    engine = object.__new__(Engine)
    monkeypatch.setattr(actor, "load_of", lambda _: engine)

    def raising(error):
        def make(batch, *, token_width):
            raise error

        engine.make = make
        return worker.make([encoded(1)])

    told, lines = raising(torch.AcceleratorError(ILLEGAL))
    assert type(told) is DeviceError and str(told).startswith("on the node "), told
    assert str(told).endswith(": cpu failed (CUDA error: an illegal memory access was encountered)") and not lines
    logging.getLogger("rapidin_vdb").warning("one sample does not fit the memory")
    ours, lines = raising(GradientError("sample s01 does not fit the memory"))
    assert [line.message for line in lines] == ["one sample does not fit the memory"]
    assert type(ours) is GradientError and str(ours).startswith("on the node "), ours
    with pytest.raises(ValueError, match="a bug"):
        raising(ValueError("a bug"))
