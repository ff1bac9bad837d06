"""Ingest and query on Ray: two nodes on this machine, workers and a node that are killed; all as on one machine."""

import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from children import Running, check, content
from conftest import SECRET, toy_records, write_jsonl
from reference import ids_in

import rapidin_vdb
from rapidin_vdb.errors import GradientError, ModelError, PurgedError, SpecError, TableError, UnfitError
from rapidin_vdb.machine import cores

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed: pip install 'rapidin-vdb[cluster]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
OPTIONS = {"batch_tokens": 150, "device": "cpu"}
WORDS = ["--batch-tokens", "150", "--device", "cpu"]
TOKENS = {"token_gradients": True, "token_width": 16}


def started(start):
    """What is started; on a busy machine, Ray gives up after 30 seconds, and is asked again."""
    for attempt in range(4):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error) or attempt == 3:
                raise


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU, on the loopback address."""
    # The last one keeps it there; read when Ray is loaded.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # The nodes' own credentials, for the test with an object store; where that is they are told.
    os.environ |= {"AWS_ACCESS_KEY_ID": "a-key", "AWS_SECRET_ACCESS_KEY": SECRET}
    import ray
    from ray.cluster_utils import Cluster

    node = NODE | {"include_dashboard": False}
    found = started(lambda: Cluster(initialize_head=True, head_node_args=node))
    started(lambda: found.add_node(**NODE))
    assert found.address.startswith("127.0.0.1:")
    yield found
    ray.shutdown()
    found.shutdown()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del os.environ[name]


@pytest.fixture
def small_commits(monkeypatch):
    import rapidin_vdb.ingest

    monkeypatch.setattr(rapidin_vdb.ingest, "_COMMIT_BYTES", 1024)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, models, adapters):
    """A corpus, and a database of it made in this process, with tokens."""
    folder = tmp_path_factory.mktemp("whole")
    corpus = write_jsonl(folder / "toy.jsonl", toy_records(80))
    here = rapidin_vdb.init(folder / "here", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    here.ingest(corpus, **OPTIONS, **TOKENS)
    return corpus, here


@pytest.fixture
def pair(whole, tmp_path, models, adapters):
    """The corpus, a copy of its database, and an empty one."""
    corpus, made = whole
    shutil.copytree(made.path, tmp_path / "here")
    here = rapidin_vdb.open(tmp_path / "here")
    here._engine = made._engine
    there = rapidin_vdb.init(tmp_path / "there", model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    return corpus, here, there


def samples_of(path):
    """What `content` says, without the rows of tokens."""
    return {key: row for key, row in content(path).items() if key[1] is None}


def pids_of(name: str, cluster) -> list[int]:
    """The processes of a kind of actor, which the nodes of this cluster have started."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(f"ray::{name}" in word for word in process.info["cmdline"] or ()):
            parent = process.parent()
            if parent is not None and any(cluster.address in word for word in parent.cmdline()):
                found.append(process.pid)
    return found


@pytest.fixture
def at_work(monkeypatch):
    """A progress that acts once, as soon as every worker is at work on something, and not before."""
    from rapidin_vdb.cluster.crew import Crew

    crews, start = [], Crew.__init__
    monkeypatch.setattr(Crew, "__init__", lambda crew, *more: (crews.append(crew), start(crew, *more))[1])

    def then(act):
        def progress(stage, done, total):
            if stage != "ingest" or not done or progress.acted:
                return
            crew = crews[-1]
            if crew._starting:
                # This process stands still meanwhile, and what it has handed out is soon done: so much else is left.
                crew._ray.wait(list(crew._starting), num_returns=len(crew._starting), timeout=100)
            elif len(crew._given) == crew._layout.workers and all(crew._given.values()):
                progress.acted = True
                act()

        progress.acted = False
        return progress

    return then


@needs_ray
@pytest.mark.slow
def test_an_ingest_on_a_cluster_is_that_of_one_machine(cluster, pair, small_commits, at_work, caplog):
    """A worker is killed in the middle, and every sample is there once, bit by bit."""
    corpus, here, there = pair

    def kill():
        os.kill(pids_of("GradientWorker", cluster)[0], signal.SIGKILL)

    progress = at_work(kill)
    report = there.ingest(corpus, cluster=cluster.address, progress=progress, **OPTIONS, **TOKENS)
    assert report.added == 80 and progress.acted
    assert "go back to the queue, and another is started" in caplog.text
    assert content(there.path) == content(here.path)
    check(there.path)
    assert there.ingest(corpus, cluster=cluster.address, **OPTIONS, **TOKENS).unchanged == 80


@needs_ray
@pytest.mark.slow
def test_a_lost_node_and_a_killed_driver_lose_nothing(cluster, pair, small_commits, context, at_work, caplog):
    corpus, here, there = pair
    driver = Running(context, ["ingest", there.path, corpus, "--cluster", cluster.address, *WORDS])
    deadline = time.monotonic() + 600
    while not there.count() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert driver.end(after=0).code == -signal.SIGKILL
    before = there.count()
    assert 0 < before < 80
    node = started(lambda: cluster.add_node(**NODE))
    progress = at_work(lambda: cluster.remove_node(node, allow_graceful=False))
    report = there.ingest(corpus, cluster=cluster.address, progress=progress, **OPTIONS)
    assert report.added == 80 - before and progress.acted
    # One worker a node: the one that is gone had some.
    assert "go back to the queue, and another is started" in caplog.text
    assert samples_of(there.path) == samples_of(here.path)


def answers_of(database, **options):
    """All that a ranking says, but for what rounding may change."""
    found = database.query("Say 3", "黄 21", **options)[0]
    ends = [*found.results, *(found.harmful or ())]
    return (
        [(one.sample_id, getattr(one, "token_index", None), one.score) for one in ends],
        found.searched,
        found.groups and [(group.value, group.samples, pytest.approx(group.score, rel=1e-5)) for group in found.groups],
        found.groups and [pytest.approx(group.error, rel=1e-4) for group in found.groups],
        (found.score_error, found.note),
    )


@needs_ray
@pytest.mark.slow
def test_a_query_on_a_cluster_is_that_of_one_machine(cluster, pair, caplog, monkeypatch, tmp_path):
    """Also of a folder that is given by where the caller stands, which is not where the nodes do."""
    monkeypatch.chdir(tmp_path)
    here = rapidin_vdb.open("here")

    def assert_alike(**options):
        assert answers_of(here, **options, cluster=cluster.address) == answers_of(here, **options)

    assert_alike(top_k=7)
    assert_alike(top_k=100, both=True)
    assert_alike(where="stars > 2 AND source = 'odd'", group_by="stars")
    assert_alike(top_k=30, level="token")
    # What comes and goes is seen at once; and a share that is lost is read again.
    here.delete(where="stars = 1")
    assert_alike(top_k=100)
    pids = pids_of("ShardWorker", cluster)
    # More than nodes, where one is gone and nobody has noticed yet.
    assert len(pids) >= 2
    os.kill(pids[0], signal.SIGKILL)
    assert_alike(top_k=100)
    assert "a share of the index was lost" in caplog.text
    assert_alike(top_k=3, as_of=3)
    with pytest.raises(SpecError, match="--index names an index of this machine"):
        answers_of(here, index="cpu", cluster=cluster.address)
    with pytest.raises(SpecError, match="can be in one only; wanted local"):
        answers_of(here, cluster="local")


@needs_ray
@pytest.mark.slow
def test_a_node_that_is_lost_takes_no_part_of_an_answer(cluster, pair, caplog):
    """Each node has a share, and one that goes takes its processes with it."""
    import psutil

    _, here, _ = pair
    node, others = started(lambda: cluster.add_node(**NODE)), pids_of("ShardWorker", cluster)
    assert answers_of(here, top_k=100, cluster=cluster.address) == answers_of(here, top_k=100)
    (keeper,) = here._clusters.values()
    assert keeper._parts == 3
    found = [psutil.Process(pid) for pid in pids_of("ShardWorker", cluster) if pid not in others]
    assert len(found) == len({process.parent().pid for process in found}) == 3
    word = f"--raylet_socket_name={node.raylet_socket_name}"
    (theirs,) = [process for process in found if word in process.parent().cmdline()]
    cluster.remove_node(node, allow_graceful=False)
    if theirs.is_running():
        theirs.kill()
    assert answers_of(here, top_k=100, cluster=cluster.address) == answers_of(here, top_k=100)
    assert "a share of the index was lost" in caplog.text


@needs_ray
@pytest.mark.slow
def test_a_node_that_cannot_hold_a_share_says_why_and_what_was_left_is_entered_again(
    cluster, pair, caplog, monkeypatch
):
    import ray

    from rapidin_vdb.cluster import searching

    class WithoutPackage:
        def __init__(self, *arguments):
            raise ModuleNotFoundError("No module named 'one'")

        def ask(self, *arguments):
            pass

    _, here, _ = pair
    with monkeypatch.context() as patch:
        patch.setattr(searching, "ShardWorker", WithoutPackage)
        with pytest.raises(
            TableError, match="^node [0-9a-f]+ cannot hold .*: ModuleNotFoundError: No module named 'one'; no"
        ):
            answers_of(here, cluster=cluster.address)
    assert answers_of(here, top_k=3, cluster=cluster.address) == answers_of(here, top_k=3)
    ray.shutdown()
    monkeypatch.setattr(searching, "_LOOK_SECONDS", 0.05)
    assert answers_of(here, top_k=100, cluster=cluster.address) == answers_of(here, top_k=100)
    assert caplog.text.count("still waiting for") >= 1
    assert len(here._clusters) == 1


@needs_ray
@pytest.mark.slow
def test_object_store_and_cluster_together(cluster, bucket, models, adapters, tmp_path, monkeypatch):
    """The nodes have credentials, and are told where the store is; the model is given from where the caller stands."""
    from rapidin_vdb.cluster import making

    corpus = write_jsonl(tmp_path / "toy.jsonl", toy_records(24))
    monkeypatch.chdir(models["llama"].parent)
    far = rapidin_vdb.init(bucket, model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
    # Batches are as large as fits; nobody has time to say how large that is, the first time.
    with monkeypatch.context() as patch:
        patch.setattr(making, "_ROOM_SECONDS", 0.0)
        with pytest.raises(SpecError, match="no node of the cluster had room .*or say it: --batch-tokens N"):
            far.ingest(corpus, cluster=cluster.address)
    assert far.ingest(corpus, cluster=cluster.address, model="llama").added == 24
    check(bucket)
    assert answers_of(far, top_k=24, cluster=cluster.address) == answers_of(far, top_k=24)


@needs_ray
@pytest.mark.slow
def test_a_cluster_of_this_machine_alone(pair, tmp_path):
    """Both commands, in one process; it has no dashboard, and listens to nobody else."""
    corpus, here, there = pair
    code = (
        "import json, sys, psutil\nfrom rapidin_vdb.cli import main\n"
        "def run(*words):\n"
        "    sys.argv = ['rapidin-vdb', *words]\n"
        "    try:\n        main()\n    except SystemExit as stop:\n        assert not stop.code, stop.code\n"
        f"run('ingest', {there.path!r}, {str(corpus)!r}, '--cluster', 'local', '--workers-per-device', '2', *{WORDS!r})\n"
        f"run('query', {there.path!r}, '--prompt', 'Say 3', '--generation', '黄 21', '--json', '--cluster', 'local')\n"
        "family = [psutil.Process(), *psutil.Process().children(recursive=True)]\n"
        "heard = {one.laddr.ip for process in family for one in process.net_connections() if one.status == 'LISTEN'}\n"
        "lines = [process.cmdline() for process in family]\n"
        "shown = [line for line in lines if any(word.endswith('dashboard.py') for word in line) and '--disable-frontend' not in line]\n"
        "print(json.dumps([[ip.removeprefix('::ffff:') for ip in sorted(heard)], shown]))\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    answer, (heard, shown) = [json.loads(line) for line in done.stdout.splitlines() if line[:1] in "[{"]
    assert [result["sample_id"] for result in answer["results"]] == [name for name, *_ in answers_of(here, top_k=10)[0]]
    assert set(heard) == {"127.0.0.1"} and shown == []
    assert samples_of(there.path) == samples_of(here.path)


@needs_ray
@pytest.mark.slow
def test_workers_that_ray_ends_for_want_of_memory_are_told_as_such(pair, tmp_path):
    """Its own watch over memory, told to end whatever runs: tried again, and then an error of ours."""
    corpus, here, there = pair
    code = (
        "import sys\nfrom rapidin_vdb.cli import main\n"
        "def run(*words):\n"
        "    sys.argv = ['rapidin-vdb', *words]\n"
        "    try:\n        main()\n    except SystemExit as stop:\n        print('ended', stop.code, flush=True)\n"
        f"ingest = 'ingest', {there.path!r}, {str(corpus)!r}, '--cluster', 'local', '--device', 'cpu'\n"
        "run(*ingest)\nrun(*ingest, '--batch-tokens', '150')\n"
        f"run('query', {here.path!r}, '--prompt', 'Say 3', '--generation', '黄 21', '--cluster', 'local')\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600, cwd=tmp_path
    )
    said = " ".join(done.stderr.split())
    assert done.stdout.split() == 3 * ["ended", "1"] and "Traceback" not in said, said
    for words in (
        r"no node of the cluster could look how much memory a worker has there: \S.* memory.*say it: --batch-tokens N",
        r"5 workers died while they started: |3 workers died on the",
        r"a share of the index was lost 3 times: \S.* memory",
    ):
        assert re.search(words, said), (words, said)


@needs_ray
def test_no_cluster_is_an_error_of_ours(database, monkeypatch):
    """Ray itself takes half a minute to give up; what it says then is told."""
    import ray

    asked = []

    def init(**options):
        asked.append(options["address"])
        raise ConnectionError("Could not find any running Ray instance.\n Please specify the one to connect to")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(SpecError, match="no Ray cluster answers at auto: Could not find any .*or use --cluster local"):
        database.query("Say 3", "黄 21", cluster="auto")
    assert asked == ["auto"]


@needs_ray
@pytest.mark.parametrize(
    "address, there, loopback",
    [
        ("auto", "127.0.0.1:6390", True),
        ("127.0.0.1:6390", None, True),
        ("auto", "10.0.0.1:6390", False),
        ("10.0.0.1:6390", "127.0.0.1:6390", False),
    ],
)
def test_a_cluster_on_the_loopback_address_is_looked_for_there(monkeypatch, address, there, loopback):
    """Also one that the environment names; Ray would wait for it at another address, and not say so."""
    import ray

    from rapidin_vdb.cluster.connection import connect

    switch = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    for name, value in ((switch, None), ("RAY_ADDRESS", there)):
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="there"))
    monkeypatch.setattr("rapidin_vdb.cluster.connection._asked", {})
    connect(address)
    assert (switch in os.environ) == loopback


@needs_ray
@pytest.mark.slow
def test_another_model_on_a_node_is_refused(cluster, pair, models):
    """Every worker checks the fingerprint."""
    from rapidin_vdb.errors import FingerprintError

    corpus, _, there = pair
    with pytest.raises(FingerprintError, match="on the node .*model_hash is"):
        there.ingest(corpus, cluster=cluster.address, model=str(models["qwen2"]), **OPTIONS)
    assert there.count() == 0


def test_layouts_that_cannot_be_are_refused():
    from rapidin_vdb.cluster.making import layout_of

    with pytest.raises(SpecError, match="the cluster has no GPU"):
        layout_of([{"CPU": 2.0}], device="cuda", workers_per_device=1)
    with pytest.raises(SpecError, match="Ray deals out the GPUs"):
        layout_of([{"CPU": 2.0}], device="cuda:1", workers_per_device=1)


OF_MEMORY = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"


class Stand:
    """In Ray's place: actors that do their batches in order, one at a time, and die on some."""

    class exceptions:
        RayActorError = type("RayActorError", (Exception,), {})
        ObjectLostError = type("ObjectLostError", (Exception,), {})
        OutOfMemoryError = type("OutOfMemoryError", (Exception,), {})

    def __init__(self, draw, deadly, *, words="dead"):
        self.draw, self.deadly, self.words = draw, deadly, words
        self.found, self.queues, self.dead, self.made = {}, {}, [], []

    def remote(self, _):
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda _: Handle(self)))

    def task(self, actor, batch):
        ref = object()
        self.queues.setdefault(actor, []).append((ref, batch))
        if actor in self.dead:
            self.kill(actor)
        return ref

    def wait(self, refs, *, num_returns, timeout):
        while not (ready := [ref for ref in refs if ref in self.found]) or self.draw.random() < 0.5:
            busy = [actor for actor, queue in self.queues.items() if queue]
            if not busy:
                break
            actor = self.draw.choice(busy)
            ref, batch = self.queues[actor][0]
            if batch is not None and self.deadly(batch):
                self.kill(actor)
            else:
                self.queues[actor].pop(0)
                self.found[ref] = batch and self.done(actor, batch)
        return [self.draw.choice(ready)], []

    def done(self, actor, batch):
        return [GradientError(batch[0].sample_id)], []

    def get(self, ref):
        if isinstance(self.found[ref], Exception):
            raise self.found[ref]
        return self.found[ref]

    def kill(self, actor):
        self.dead.append(actor)
        kind = self.draw.choice([self.exceptions.RayActorError, self.exceptions.OutOfMemoryError])
        for ref, _ in self.queues.pop(actor, ()):
            self.found[ref] = kind(self.words)


class Handle:
    def __init__(self, stand):
        stand.made.append(self)
        self.ready = SimpleNamespace(remote=lambda: stand.task(self, None))
        self.make = SimpleNamespace(remote=lambda batch: stand.task(self, batch))


def crew_of(stand, database, *, workers=3, device="cpu"):
    """The crew of a stand for Ray."""
    from rapidin_vdb.cluster.crew import Crew
    from rapidin_vdb.cluster.layout import Layout
    from rapidin_vdb.compute import WorkerSpec

    layout = Layout(workers=workers, device=device, cpus=1.0, gpus=float(device != "cpu"))
    spec = WorkerSpec(fingerprint=database.fingerprint, place="", model=None, adapter=None, device=device, threads=1)
    return Crew(stand, spec, layout)


def singles(count: int):
    """Batches of one sample each."""
    from rapidin_vdb.records import Encoded

    return [[Encoded(sample_id=f"s{number}", input_ids=(1,), offsets=(), truncated=False)] for number in range(count)]


def ids_of(found) -> list[str]:
    return sorted(sample.sample_id for batch, _ in found for sample in batch)


def test_a_node_that_is_gone_is_no_fault_of_its_batch(database, caplog):
    """Nodes that are taken back one after the other: the batch goes to the next each time."""
    lost = [0]

    def deadly(batch):
        lost[0] += batch[0].sample_id == "s7"
        return batch[0].sample_id == "s7" and lost[0] <= 8

    gone = "The actor died because its node has died. Node Id: 1"
    found = list(crew_of(Stand(random.Random(1), deadly, words=gone), database).share(iter(singles(20))))
    assert ids_of(found) == ids_of([(batch, None) for batch in singles(20)])
    assert caplog.text.count("a node of the cluster is gone") >= 8 and "workers died" not in caplog.text
    # Results that lay there are lost with it.
    caplog.clear()
    lost[0] = 0
    words = "All copies of 00ab have been lost due to node failure. Check cluster logs"
    found = list(crew_of(Stand(random.Random(3), deadly, words=words), database).share(iter(singles(20))))
    assert ids_of(found) == ids_of([(batch, None) for batch in singles(20)]) and "workers died" not in caplog.text
    # But a batch may be the end of a node, too.
    with pytest.raises(GradientError, match="3 workers died on the 1 samples s7 "):
        list(
            crew_of(Stand(random.Random(1), lambda b: b[0].sample_id == "s7", words=gone), database).share(
                iter(singles(20))
            )
        )


class Lacking(Stand):
    """All actors but the first two are on nodes without the model."""

    having = 2

    def done(self, actor, batch):
        if actor not in self.made[: self.having]:
            return ModelError("on the node 10.0.0.3: no model at /models/7b"), []
        return super().done(actor, batch)


def test_a_worker_without_the_model_is_let_go_where_others_have_it(database, caplog):
    died = []

    def deadly(batch):
        if batch[0].sample_id in ("s6", "s11") and batch[0].sample_id not in died:
            died.append(batch[0].sample_id)
            return len(died) == 1
        return False

    found = list(crew_of(Lacking(random.Random(2), deadly), database, workers=2).share(iter(singles(20))))
    assert ids_of(found) == ids_of([(batch, None) for batch in singles(20)])
    assert "no model at /models/7b; another is asked for" in caplog.text
    # Whoever finds out first, before any batch is done.
    for seed in range(20):
        found = crew_of(Lacking(random.Random(seed), lambda batch: False), database, workers=6).share(iter(singles(9)))
        assert ids_of(found) == ids_of([(batch, None) for batch in singles(9)]), seed
    assert "no model at /models/7b; the others go on without that worker" in caplog.text
    # One that has the model dies, and who takes its place is where it is not, again and again.
    once = []
    late = Lacking(random.Random(2), lambda batch: batch[0].sample_id == "s6" and not once and not once.append(1))
    late.having = 1
    with pytest.raises(ModelError, match="no model at /models/7b"):
        list(crew_of(late, database, workers=1).share(iter(singles(20))))
    assert len(late.made) == 7, "so often"
    nobody = Lacking(random.Random(2), lambda batch: False)
    nobody.having = 0
    with pytest.raises(ModelError, match="no model at /models/7b"):
        list(crew_of(nobody, database).share(iter(singles(2))))


def test_what_workers_log_is_said_once(database, caplog):
    from rapidin_vdb.worker_log import Told

    class Telling(Stand):
        def done(self, actor, batch):
            slow = Told("rapidin_vdb.gradient", 30, "gradients one sample at a time, which is slower")
            return super().done(actor, batch)[0], [slow]

    assert len(list(crew_of(Telling(random.Random(1), lambda batch: False), database).share(iter(singles(5))))) == 5
    assert caplog.text.count("gradients one sample at a time, which is slower") == 1


def test_a_cluster_that_says_nothing_for_long_is_told_of(database, monkeypatch, caplog):
    monkeypatch.setattr("rapidin_vdb.cluster.crew._SAY_SECONDS", -1.0)

    class Slow(Stand):
        """Which says nothing at every other look."""

        looks = 0

        def wait(self, refs, **options):
            self.looks += 1
            return super().wait(refs, **options) if self.looks % 2 else ([], refs)

    assert len(list(crew_of(Slow(random.Random(1), lambda batch: False), database).share(iter(singles(5))))) == 5
    assert "no batch has come back for 0 s: " in caplog.text and "wait for room on the cluster" in caplog.text
    assert "(one on the samples s" in caplog.text


def test_every_batch_is_done_once_whoever_dies(database):
    """With two batches at a time a worker, whose death is blamed on the one that it was at."""
    from rapidin_vdb.cluster.crew import _LIVES

    batches = singles(40)
    for seed in range(100):
        draw = random.Random(seed)
        lives: dict[str, int] = {}

        def deadly(batch, draw=draw, lives=lives):
            name = batch[0].sample_id
            if lives.get(name, 0) < _LIVES - 1 and draw.random() < 0.2:
                lives[name] = lives.get(name, 0) + 1
                return True
            return False

        stand = Stand(draw, deadly)
        done = [(batch[0].sample_id, str(made[0])) for batch, made in crew_of(stand, database).share(iter(batches))]
        assert sorted(done) == sorted(2 * (batch[0].sample_id,) for batch in batches), seed
        assert stand.dead, "nobody died"
        with pytest.raises(GradientError, match=f"{_LIVES} workers died on the 1 samples s7 "):
            list(crew_of(Stand(draw, lambda batch: batch[0].sample_id == "s7"), database).share(iter(batches)))


def test_a_batch_that_takes_more_memory_than_a_node_has_is_tried_in_halves(database, caplog):
    """And so are those that are as large, without a death for each."""
    from rapidin_vdb.records import Encoded

    samples = [Encoded(sample_id=f"s{n:03}", input_ids=(1,), offsets=(), truncated=False) for n in range(160)]
    batches = [samples[first : first + 16] for first in range(0, 160, 16)]
    for seed in range(30):
        stand = Stand(random.Random(seed), lambda batch: len(batch) > 1, words=OF_MEMORY)
        found = [batch for batch, _ in crew_of(stand, database, workers=2).share(iter(batches))]
        assert sorted(sample.sample_id for batch in found for sample in batch) == [s.sample_id for s in samples], seed
        assert max(map(len, found)) == 1
        # Each of ten batches would take 15 actors with it if each had to find out for itself; 6 to 20 in all were seen.
        assert len(set(stand.dead)) < 10 * 15 / 4, seed
    assert "go back to the queue in halves" in caplog.text


def test_settings_of_a_store_are_told_and_secrets_are_not(monkeypatch):
    from rapidin_vdb.store.settings import store_settings

    for name in [name for name in os.environ if name.startswith(("AWS_", "AZURE_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    there = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9000", "AWS_REGION": "us-east-1"}
    secret = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": SECRET}
    hidden = {"AWS_ENDPOINT_URL_S3": f"http://user:{SECRET}@host"}
    for name, value in (there | secret | hidden).items():
        monkeypatch.setenv(name, value)
    assert store_settings() == there


@pytest.fixture
def worker(database):
    """A shard in this process, whose threads it leaves as they were."""
    import torch

    from rapidin_vdb.cluster.searching import ShardWorker

    before = torch.get_num_threads()
    yield ShardWorker(database.path, 0, 1, {})
    torch.set_num_threads(before)


@needs_ray
def test_a_share_of_a_version_that_was_purged_says_so(database, worker):
    """So that the question is asked again, of the newest."""
    import torch

    from rapidin_vdb.table_index import held_by

    assert torch.get_num_threads() == cores()
    held = held_by(database._table.snapshot())
    assert worker.ask(held, "count", (), None) == 24
    database.delete(where="stars = 1", purge=True)
    error = worker.ask(held, "count", (), None)
    assert isinstance(error, PurgedError) and str(error).startswith("on the node "), error
    assert worker.ask(held_by(database._table.snapshot()), "count", (), None) == 19
    other = worker.ask(replace(held, version=held.version + 100), "count", (), None)
    assert type(other) is UnfitError and "has no version" in str(other)


def test_shares_make_up_the_table(database):
    from rapidin_vdb.store import Share

    whole = database._table.snapshot()
    for parts in (1, 2, 3, 7):
        found = [key for part in range(parts) for batch in Share(whole, part, parts).vectors() for key in batch.keys]
        assert sorted(found) == sorted(ids_in(whole))


@pytest.mark.parametrize("parts", [1, 3, 6])
def test_a_streamed_share_stays_right_when_rows_are_replaced(database, tmp_path, monkeypatch, parts):
    """They lie behind others then, and keep their ids: whether a share is scanned or taken, its order is one."""
    from rapidin_vdb.recipe import read_recipe
    from rapidin_vdb.store import Share
    from rapidin_vdb.table_index import _streamed

    monkeypatch.setattr("rapidin_vdb.store.share._RUN", 2)
    other = [record | {"output": "another"} for record in toy_records(24) if int(record["id"][-3:]) % 5 == 1]
    assert database.ingest(write_jsonl(tmp_path / "other.jsonl", other), on_duplicate="replace").replaced == 5
    whole = database._table.snapshot()
    rows = {key: row for batch in whole.vectors() for key, row in zip(batch.keys, batch.vectors, strict=True)}
    query = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
    found = {}
    for part in range(parts):
        share = Share(whole, part, parts)
        keys = [key for batch in share.vectors() for key in batch.keys]
        assert keys == share.keys_in_order()[0]
        found |= dict(_streamed(share, read_recipe("cpu")).search(query, 24)[0])
    assert found == {key: pytest.approx(float(row.astype(float) @ query[0]), abs=1e-9) for key, row in rows.items()}


@pytest.fixture
def shards(database):
    """What asks three shares of the database, all in this process, and notes how many queries with what method."""
    import torch

    from rapidin_vdb.cluster.searching import ShardWorker

    before = torch.get_num_threads()
    workers = [ShardWorker(database.path, part, 3, {}) for part in range(3)]
    torch.set_num_threads(before)  # which each of them, in a process of its own, sets

    def ask(held, method, queries, more, among):
        ask.noted.append((method, None if queries is None else len(queries)))
        answers = [
            worker.ask(held, method, (*(() if queries is None else (queries,)), *more), among) for worker in workers
        ]
        assert not [answer for answer in answers if isinstance(answer, Exception)]
        return answers

    ask.noted = []
    return ask


@pytest.mark.parametrize("restricted", [False, True])
def test_what_shares_say_together_is_what_brute_force_says(database, shards, restricted):
    from reference import top_k

    from rapidin_vdb.cluster import ClusterIndex
    from rapidin_vdb.table_index import held_by

    snapshot = database._table.snapshot()
    index = ClusterIndex(shards, held_by(snapshot), snapshot.rows())
    rows, row_ids = {}, {}
    for batch in snapshot.vectors():
        rows |= dict(zip(batch.keys, batch.vectors, strict=True))
        row_ids |= dict(zip(batch.keys, batch.row_ids.tolist(), strict=True))
    assert len(rows) == index.samples == 24
    if restricted:
        rows = {name: row for name, row in rows.items() if int(name[-3:]) % 3}
    names = sorted(rows)
    among = np.array(sorted(row_ids[name] for name in names), np.int64) if restricted else None
    queries = np.random.default_rng(5).standard_normal((3, 64)).astype(np.float32)

    def assert_alike(found, wanted):
        assert [name for name, _ in found] == [name for name, _ in wanted]
        np.testing.assert_allclose([score for _, score in found], [score for _, score in wanted], rtol=1e-9)

    for count in (1, 7, 99):
        found = index.search(queries, count, among=among)
        best, worst = index.search_both(queries, count, among=among)
        for number, query in enumerate(queries):
            lowest = [(name, -score) for name, score in top_k(rows, -query, count)]
            assert_alike(found[number], top_k(rows, query, count))
            assert_alike(best[number], top_k(rows, query, count))
            assert_alike(worst[number], lowest)
    scores = np.stack([rows[name] for name in names]).astype(np.float64) @ queries.T.astype(np.float64)
    all_scores = index.scores(queries, among=among)
    np.testing.assert_allclose(np.sort(all_scores, 1), np.sort(scores.T, 1), rtol=1e-4, atol=1e-4)
    groups = np.array([int(name[-3:]) % 4 for name in names])
    sums = index.group_sums(queries, np.array([row_ids[name] for name in names]), groups, 4)
    wanted = np.stack([scores[groups == group].sum(0) for group in range(4)], 1)
    np.testing.assert_allclose(sums, wanted, rtol=1e-4, atol=1e-4)


def test_the_lengths_of_groups_are_asked_for_once_on_a_cluster_too(database, shards, tmp_path, monkeypatch):
    """They go by the index, which is the same one as long as it holds the same version of the same table."""
    from rapidin_vdb.cluster import ClusterKeeper, searching
    from rapidin_vdb.uncertainty import PROBES

    monkeypatch.setattr(searching, "connect", lambda address: None)
    monkeypatch.setattr(searching, "nodes_of", lambda ray: {"a": 1, "b": 1, "c": 1})
    monkeypatch.setattr(ClusterKeeper, "_start", lambda keeper, part: None)
    keeper = ClusterKeeper(database._table.place, "here")
    monkeypatch.setattr(keeper, "_ask", shards)
    monkeypatch.setattr("rapidin_vdb.database.session_of", lambda address: ("here", "1"))
    database._clusters = {("here", "1"): keeper}
    database.ingest(tmp_path / "toy.jsonl", **TOKENS)

    def probed(**options) -> int:
        before = shards.noted.count(("group_sums", PROBES))
        (there,), (here,) = (database.query("Say 5", "blue 35", cluster=where, **options) for where in ("here", None))
        assert [group.value for group in there.groups or ()] == [group.value for group in here.groups or ()]
        for one, other in zip(there.groups or (), here.groups or (), strict=True):
            assert (one.score, one.error) == pytest.approx((other.score, other.error), rel=1e-5)
        return shards.noted.count(("group_sums", PROBES)) - before

    assert [probed(group_by="source"), probed(group_by="source"), probed(level="token"), probed(group_by="source")] == [
        1,
        0,
        0,
        0,
    ]
    database.ingest(write_jsonl(tmp_path / "more.jsonl", toy_records(3, first=40)))
    assert probed(group_by="source") == 1, "of another version"
    assert [len(keeper._indexes), keeper._indexes["samples"].samples] == [2, 27]
