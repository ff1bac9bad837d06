"""Turn benchmarks/results/serve.json into docs/serve.md.

.venv/bin/python benchmarks/report_serve.py
"""

import json

from common import RESULTS
from report import DOCS, table


def _company(found: dict) -> str:
    """Return what else ran meanwhile, by the load average; the server and its clients make two of it."""
    if max(one["load_average"] for one in (*found["rounds"], found["many"])) < 3:
        return "Nothing else ran (see the load average of each round; 2 is full)."
    return (
        "**The machine was shared while this ran**: other work kept more processes busy than it has cores (see the load average of each\n"
        "round; 2 is full). So latencies and rates are worse than those of a quiet machine by some unknown factor of several."
    )


def main() -> None:
    """Write the page."""
    found = json.loads((RESULTS / "serve.json").read_text())
    machine, rounds, many = found["machine"], found["rounds"], found["many"]
    rates = table(
        ["asked", "clients", "requests", "a second", "p50", "p99", "longest", "CPU a request", "load average"],
        [
            [
                one["what"],
                f"{one['clients']}",
                f"{one['requests']}",
                f"{one['per_second']:.1f}",
                f"{one['p50_seconds']:.2f} s",
                f"{one['p99_seconds']:.2f} s" if one["requests"] >= 100 else "",
                f"{one['longest_seconds']:.2f} s",
                f"{one['cpu_seconds_a_request']:.3f} s",
                f"{one['load_average']:.0f}",
            ]
            for one in rounds
        ],
    )
    steps = table(["step", "seconds"], [[name, f"{seconds:.2f}"] for name, seconds in many["seconds"].items()])
    (DOCS / "serve.md").write_text(
        f"""# What the server answers

Written by `benchmarks/report_serve.py` from one run of `{found["command"]}` at commit {machine["commit"]} on {machine["date"]}:
{machine["processor"]}, {machine["threads"]} thread{"s" if machine["threads"] != "1" else ""} a process, torch {machine["torch"]}, two cores, no GPU.

{_company(found)} What the server used of the processor for a request, which other work changes least, stands beside.

## The demo's database

{found["samples"]:,} samples of width 4,096, a Llama of 0.7M parameters. Each client asks as soon as it was answered, another query each time, and all of them are
in one process beside the server. `query` is `POST /api/query` with the defaults; with tokens, the ten results get their token scores (Eq. 6).

{rates}

Where fewer than 100 requests fitted into a round, there is no p99 to speak of, only the longest; and the CPU seconds are rough. Searches that wait together are answered by
one search, which is what 32 clients gain; gradients and token scores are computed query by query, so that those who ask for tokens wait in line.

## The page with {many["samples"]:,} samples

The same database with drawn samples beside, in headless Chromium: seconds from a press until what it shows stands there, each step once (load average {many["load_average"]:.0f}).

{steps}

*Ask* is until the influence of each word of ten samples stands there and, where that is cheap, that on each of the generation's words; *ask, without* is
without both; *the first time* includes what happens once in a process: compiling loops, and, at that commit, reading the index, which the server now does before it says that it serves. The cleaned file has all samples but one.
""",
        "utf-8",
    )


if __name__ == "__main__":
    main()
