"""What the server answers a second, and how soon, with 1, 8 and 32 clients; and the page with 100,000 samples.

scripts/bench serve --demo demo [--seconds 15]

`--demo` names a folder that scripts/demo made. Each client asks as soon as it was answered, another query each time.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from common import HERE, RESULTS, machine

CLIENTS = (1, 8, 32)
MANY = 100_000


@contextmanager
def server(database: Path) -> Iterator[tuple[str, int]]:
    """Yield the address of a server in a process of its own, and its process id."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rapidin_vdb", "serve", str(database), "--port", "0"],
        stderr=subprocess.PIPE, text=True, cwd=HERE.parent,
    )  # fmt: skip
    assert process.stderr is not None
    line = process.stderr.readline()
    try:
        yield line.split(" on ")[1].split(" ")[0], process.pid
    finally:
        process.terminate()
        process.wait(30)


def cpu_seconds(pid: int) -> float:
    """Return what a process has used of the processor, in all of its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ask(address: str, path: str, body: dict | None = None) -> dict:
    """Return an answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.loads(answer.read())


def load(address: str, pid: int, queries: list[dict], *, clients: int, seconds: float, options: dict) -> dict:
    """Ask from many clients at once for some seconds; return rate and latencies."""
    latencies: list[float] = []
    end = time.monotonic() + seconds

    def client(number: int) -> None:
        count = number
        while time.monotonic() < end:
            started = time.perf_counter()
            ask(address, "/api/query", queries[count % len(queries)] | options)
            latencies.append(time.perf_counter() - started)
            count += 1

    before = cpu_seconds(pid)
    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.monotonic() - started
    used = cpu_seconds(pid) - before
    # Between what was measured: the default goes beyond the slowest.
    cut = statistics.quantiles(latencies, n=100, method="inclusive")
    return {
        "clients": clients, "requests": len(latencies), "per_second": len(latencies) / wall,
        "p50_seconds": cut[49], "p99_seconds": cut[98], "longest_seconds": max(latencies),
        "cpu_seconds_a_request": used / len(latencies),
        "load_average": os.getloadavg()[0],
    }  # fmt: skip


def make_many(folder: Path, demo: Path) -> Path:
    """Return a copy of the demo's database, with drawn samples beside until there are 100,000."""
    import rapidin_vdb
    from rapidin_vdb.engine import Made
    from rapidin_vdb.ingest import ingest
    from rapidin_vdb.intake import Corpus

    shutil.copytree(demo / "db", folder / "db")
    shutil.rmtree(folder / "db" / "indexes", ignore_errors=True)
    database = rapidin_vdb.open(folder / "db")
    engine, width, draw = database._loaded(), database.fingerprint.sketch.width, np.random.default_rng(0)
    corpus = folder / "drawn.jsonl"
    with corpus.open("w") as file:
        for number in range(MANY - database.info().samples):
            record = {
                "id": f"drawn-{number:06d}", "instruction": f"Say {number}.", "output": f"{number} and {number * 7}.",
                "source": f"s{number % 20}",
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")

    def drawn(batches):
        for batch in batches:
            vectors = draw.standard_normal((len(batch), width), dtype=np.float32).astype(np.float16)
            yield batch, [Made(vector, 1.0) for vector in vectors]

    ingest(
        database._table, Corpus(paths=(corpus,)), drawn, tokenizer=engine.loaded.tokenizer, template=engine.template,
        batch_tokens=8192,
    )  # fmt: skip
    database.index("cpu")
    return folder / "db"


def visit(address: str, query: dict) -> dict:
    """Use the page as a person would; return the seconds from each press to what it shows."""
    from playwright.sync_api import sync_playwright

    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync"
    ).split()
    found = {}
    with sync_playwright() as driver, tempfile.TemporaryDirectory() as folder:
        context = driver.chromium.launch_persistent_context(
            folder,
            executable_path=shutil.which("chromium"),
            headless=True,
            args=flags,
            viewport={"width": 1200, "height": 800},
        )
        page = context.new_page()
        page.set_default_timeout(300_000)

        def timed(name: str, act, shown: str) -> None:
            started = time.perf_counter()
            act()
            page.locator(shown).first.wait_for(state="attached")
            # All of it: the page asks in steps, and what stands first may be used while others are under way.
            page.locator("main:not([aria-busy])").wait_for(state="attached")
            page.locator("#status:not(.busy)").wait_for(state="attached")
            found[name] = time.perf_counter() - started

        timed("open", lambda: page.goto(address), "#filters label")
        page.fill("#prompt", query["prompt"])
        page.fill("#generated", query["generation"])
        timed("ask, the first time", lambda: page.click("#go"), "article")
        page.evaluate("document.getElementById('main').replaceChildren()")
        timed("ask, with the influence of words", lambda: page.click("#go"), "article")
        timed(
            "press a word", lambda: page.locator("#generation .choice").first.click(), "#generation [aria-pressed=true]"
        )
        page.uncheck("#tokens")
        page.evaluate("document.getElementById('main').replaceChildren()")
        timed("ask, without", lambda: page.click("#go"), "article")
        timed("browse", lambda: page.get_by_role("button", name="Browse").click(), "text=1 to 20 of")
        timed("the next 20", lambda: page.get_by_role("button", name="Next").first.click(), "text=21 to 40")
        page.fill("#browse-where", "source = 's7' AND tokens > 3")
        timed("browse with a filter", lambda: page.get_by_role("button", name="Show").click(), "text=1 to 20 of")
        timed("a sample and its nearest", lambda: page.locator("article a").first.click(), "#nearest article")
        page.locator("article button", has_text="Mark").first.click()
        page.get_by_role("button", name="Marked 1").click()
        page.fill("#clean-where", "")
        timed("save the cleaned file of all", lambda: page.click("#save-clean"), "#status:has-text('Saved cleaned')")
        context.close()
    return found


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=15.0)
    options = parser.parse_args()
    queries = [json.loads(line) for line in (options.demo / "queries.jsonl").read_text("utf-8").splitlines()]
    queries = [{"prompt": query["prompt"], "generation": query["generation"]} for query in queries]
    result: dict = {
        "command": f"scripts/bench serve --demo {options.demo.name} --seconds {options.seconds:g}",
        "machine": machine(),
        "rounds": [],
    }
    with server(options.demo / "db") as (address, pid):
        result["samples"] = ask(address, "/api/info")["samples"]
        for name, asked in (("query", {}), ("query with tokens", {"tokens": True})):
            ask(address, "/api/query", queries[0] | asked)  # what is compiled at the first time
            for clients in CLIENTS:
                found = load(address, pid, queries, clients=clients, seconds=options.seconds, options=asked)
                result["rounds"].append({"what": name} | found)
                print(result["rounds"][-1], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        with server(make_many(Path(folder), options.demo)) as (address, _):
            result["many"] = {"samples": ask(address, "/api/info")["samples"], "seconds": visit(address, queries[0])}
            result["many"]["load_average"] = os.getloadavg()[0]
            print(result["many"], flush=True)
    (RESULTS / "serve.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
