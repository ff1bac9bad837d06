"""Ingest and query on Ray: two nodes on this machine, workers and a node that are killed; all as on one machine."""

import importlib.util
import os
import signal
import time

import pytest
from children import Running, check, content
from conftest import toy_records, write_jsonl

import rapidin_vdb
from rapidin_vdb.errors import SpecError

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed: pip install 'rapidin-vdb[cluster]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
OPTIONS = {"batch_tokens": 150, "device": "cpu"}


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
    import ray
    from ray.cluster_utils import Cluster

    node = NODE | {"include_dashboard": False}
    found = started(lambda: Cluster(initialize_head=True, head_node_args=node))
    started(lambda: found.add_node(**NODE))
    assert found.address.startswith("127.0.0.1:")
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture
def small_commits(monkeypatch):
    import rapidin_vdb.ingest

    monkeypatch.setattr(rapidin_vdb.ingest, "_COMMIT_BYTES", 1024)


@pytest.fixture
def pair(tmp_path, models, adapters):
    """A corpus, a database of it made in this process, and an empty one."""
    corpus = write_jsonl(tmp_path / "toy.jsonl", toy_records(80))
    here, there = (
        rapidin_vdb.init(tmp_path / name, model=str(models["llama"]), adapter=str(adapters["llama"]), width=64)
        for name in ("here", "there")
    )
    here.ingest(corpus, **OPTIONS)
    return corpus, here, there


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


def once(at: int, act):
    """A progress that acts when so much is done, once."""
    acted = []

    def progress(stage, done, total):
        if stage == "ingest" and done >= at and not acted:
            acted.append(done)
            act()

    progress.acted = acted
    return progress


@needs_ray
@pytest.mark.slow
def test_an_ingest_on_a_cluster_is_that_of_one_machine(cluster, pair, small_commits, caplog):
    """A worker is killed in the middle, and every sample is there once, bit by bit."""
    corpus, here, there = pair

    def kill():
        os.kill(pids_of("GradientWorker", cluster)[0], signal.SIGKILL)

    progress = once(10, kill)
    report = there.ingest(corpus, cluster=cluster.address, progress=progress, **OPTIONS)
    assert report.added == 80 and progress.acted
    assert "go back to the queue, and another is started" in caplog.text
    assert content(there.path) == content(here.path)
    check(there.path)
    assert there.ingest(corpus, cluster=cluster.address, **OPTIONS).unchanged == 80


@needs_ray
@pytest.mark.slow
def test_a_lost_node_and_a_killed_driver_lose_nothing(cluster, pair, small_commits, context):
    corpus, here, there = pair
    driver = Running(
        context, ["ingest", there.path, corpus, "--cluster", cluster.address, "--batch-tokens", 150, "--device", "cpu"]
    )
    deadline = time.monotonic() + 600
    while not there.count() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert driver.end(after=0).code == -signal.SIGKILL
    before = there.count()
    assert 0 < before < 80
    node = started(lambda: cluster.add_node(**NODE))
    progress = once(10, lambda: cluster.remove_node(node, allow_graceful=False))
    report = there.ingest(corpus, cluster=cluster.address, progress=progress, **OPTIONS)
    assert report.added == 80 - before and progress.acted
    assert content(there.path) == content(here.path)


@needs_ray
@pytest.mark.slow
def test_a_query_on_a_cluster_is_that_of_one_machine(cluster, pair, caplog):
    _, here, _ = pair

    def answers(**options):
        found = here.query("Say 3", "黄 21", **options)[0]
        ends = [*found.results, *(found.harmful or ())]
        return (
            [(one.sample_id, one.score) for one in ends],
            found.searched,
            found.groups
            and [(group.value, group.samples, pytest.approx(group.score, rel=1e-5)) for group in found.groups],
        )

    questions = [
        {"top_k": 7},
        {"top_k": 100, "both": True},
        {"where": "stars > 2 AND source = 'odd'", "group_by": "stars"},
    ]
    for question in questions:
        assert answers(**question, cluster=cluster.address) == answers(**question)
    # What comes and goes is seen at once; and a share that is lost is read again.
    here.delete(where="stars = 1")
    assert answers(top_k=100, cluster=cluster.address) == answers(top_k=100)
    pids = pids_of("ShardWorker", cluster)
    # More than nodes, where one is gone and nobody has noticed yet.
    assert len(pids) >= 2
    os.kill(pids[0], signal.SIGKILL)
    assert answers(top_k=100, cluster=cluster.address) == answers(top_k=100)
    assert "a share of the index was lost" in caplog.text
    assert answers(top_k=3, as_of=3, cluster=cluster.address) == answers(top_k=3, as_of=3)
    with pytest.raises(SpecError, match="--index names an index of this machine"):
        answers(index="cpu", cluster=cluster.address)


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


def test_shares_make_up_the_table(database):
    from rapidin_vdb.store import Share

    whole = database._table.snapshot()
    for parts in (1, 2, 3):
        found = [key for part in range(parts) for batch in Share(whole, part, parts).vectors() for key in batch.keys]
        assert sorted(found) == sorted(whole.sample_ids())
