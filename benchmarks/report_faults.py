"""Turn what the slow tests wrote down (RAPIDIN_TALLY=benchmarks/results/faults.jsonl) into docs/faults.md.

.venv/bin/python benchmarks/report_faults.py
"""

import json

from common import RESULTS, machine
from report import DOCS, table


def rows_of(entry: dict) -> int:
    """Return how many rows a measurement was of."""
    return entry["rows"]


def _load() -> str:
    """Return the section on many rows; nothing before scripts/bench load was run."""
    if not (RESULTS / "load.json").exists():
        return ""
    load = json.loads((RESULTS / "load.json").read_text("utf-8"))
    steps = [name for name in load["entries"][0]["steps"] if name != "start"]
    loads = table(
        ["", *[f"{entry['rows']:,} rows" for entry in load["entries"]]],
        [
            [
                name,
                *[
                    f"{e['steps'][name]['seconds']:.1f} s ({e['steps'][name]['cpu_seconds']:.1f}), "
                    f"{e['steps'][name]['own_mebibytes']:,.0f} of {e['steps'][name]['mebibytes']:,.0f} MiB"
                    for e in load["entries"]
                ],
            ]
            for name in ("start", *steps)
        ]
        + [["on disk", *[f"{entry['bytes'] / 2**20:,.0f} MiB" for entry in load["entries"]]]],
    )
    _, middle, most = sorted(load["entries"], key=rows_of)

    def a_row(name: str) -> float:
        """Return by how many bytes a row the process's own memory grew, from the entry in the middle on."""
        grown = most["steps"][name]["own_mebibytes"] - middle["steps"][name]["own_mebibytes"]
        return grown * 2**20 / (most["rows"] - middle["rows"])

    return f"""
## A million rows

Written from `{load["command"]}` at commit {load["machine"]["commit"]} on {load["machine"]["date"]}: {load["machine"]["processor"]},
{load["machine"]["threads"]} threads. RapidGrads of width {load["width"]} drawn at random, everything else the product's own; each command in a
process of its own: seconds, CPU seconds in brackets; then how much memory was its own at most (looked at a hundred times a second), of its peak of
all memory, mapped files and libraries included. "start" only opens the database and loads the model; "again" is the same ingest a second time.
{load["remark"]} CPU seconds tell how work grows with rows.

An ingest keeps what it knows of each id in a temporary file of SQLite's, of which 32 MiB are in memory. From {middle["rows"]:,} rows to {most["rows"]:,}, where these are
full, its own memory grew by {a_row("ingest"):,.0f} bytes a row, the second time by {a_row("again"):,.0f}, that of a delete by {a_row("delete"):,.0f}. `index` and `query` are of the recipe `cpu`, which holds
all rows in memory, {2 * load["width"]:,} bytes each: a query's own memory grew by {a_row("query"):,.0f} bytes a row, with the recipe `streamed` by {a_row("query, streamed"):,.0f}. `verify`
({a_row("verify"):,.0f}) looks up every value of the columns that have a scalar index, ids among them, and holds these.

{loads}
"""


def main() -> None:
    """Write the page."""
    found = [json.loads(line) for line in (RESULTS / "faults.jsonl").read_text("utf-8").splitlines()]
    here = machine()
    rows = [[entry["fault"], entry["how"], f"{entry['tried']:,}", entry["outcome"]] for entry in found]
    cases = sum(entry["tried"] for entry in found if "hypothesis" in entry["how"])
    kills = sum(entry["tried"] for entry in found if entry["fault"].endswith("is killed"))
    assert cases and kills, "a part of the tests was not run"
    (DOCS / "faults.md").write_text(
        f"""# What goes wrong, and what happens then

Written by `benchmarks/report_faults.py` from what the slow tests wrote down (`RAPIDIN_TALLY=benchmarks/results/faults.jsonl
scripts/test --slow`, with `RAPIDIN_KILLS` as a line says; not all lines are of one run, the latest shortly before commit {here["commit"]} on {here["date"]}):
{kills:,} kills, {cases:,} drawn cases.

{table(["fault", "how it was made", "tried", "what happened"], rows)}

## What is not deterministic

The same command on the same machine with as many threads gives the same RapidGrads and scores to the last bit. In other batches
(`--batch-tokens`, more workers, less memory) or with other numbers of threads sums are rounded otherwise. `tests/test_numbers.py` holds, of a model in single precision, RapidGrads of other batches to 2 parts in 1,000 of an
entry plus 2 of the largest, and scores with other numbers of threads to 1 in 10,000. In 16 bits, a sample may differ from itself alone by 0.1 (bfloat16) or 0.02 (float16) of a RapidGrad's
length, or by three times what rounding was measured to do to it, if that is more, and by half at most, before the check of the first batch refuses its rule. On GPUs, where atomic additions come in any order, nothing was measured.
{_load()}""",
        "utf-8",
    )


if __name__ == "__main__":
    main()
