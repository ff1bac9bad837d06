"""What token-wise influence costs, beside plain training steps over the same samples; all in one run.

scripts/bench tokens [--small] [--repeats N]
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from common import RESULTS, Clock, machine
from ingest import batches_of, make_corpus, make_model, plain_step

TOP = 10


def measure(kind: str, *, tokens: int, shape: str, repeats: int) -> dict:
    """Token scores of ten samples, a column of their matrices, and RapidGrads of their tokens, of one kind of model."""
    import rapidin_vdb

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = make_model(folder, shape=shape, lora=kind != "full", rank=512 if kind == "lora, r = 512" else 16)
        if kind == "nf4":
            arguments["quantization"] = "nf4"
        width = 4096 if shape == "small" else 65536
        database = rapidin_vdb.init(folder / "db", template="text", width=width, **arguments)
        engine = database._loaded()
        corpus = make_corpus(folder / "corpus.jsonl", samples=TOP + 1, tokens=tokens)
        (batch,) = batches_of(database, corpus, 1 << 20)
        query, batch = batch[0], batch[1:]
        influence = engine.influence

        def answer(number: int) -> dict[str, float]:
            with Clock() as plain:
                plain_step(engine.loaded, batch)
            with Clock() as direction_clock:
                direction = influence.direction(query)
            with Clock() as exact_clock:
                exact = influence.exact(direction, batch)
            with Clock() as forward:
                scores = influence.token_scores(direction, batch, exact)
            with Clock() as sample_level:
                engine.make(batch)
            # One sample stands for all: every token is a pass of its own length.
            with Clock() as one_sample:
                engine.make(batch[:1])
            with Clock() as token_level:
                engine.make(batch[:1], token_width=4096)
            errors = [abs(one.sum() - whole) for one, whole in zip(scores, exact.scores, strict=True)]
            found = {
                "plain": plain, "direction": direction_clock, "exact": exact_clock, "forward": forward,
                "sample_level": sample_level, "one_sample": one_sample, "token_level": token_level,
            }  # fmt: skip
            return (
                {name: clock.wall for name, clock in found.items()}
                | {f"{name}_cpu": clock.cpu for name, clock in found.items()}
                | {"largest_error": max(errors), "largest_score": max(abs(exact.scores))}
            )

        answer(0)  # compile, check the first batch, fill the caches
        runs = [answer(number) for number in range(repeats)]
        assert not influence._twice, "in forward mode"

    def middle(value) -> float:
        return statistics.median(value(run) for run in runs)

    response = batch[0].response_tokens
    return {
        "kind": kind,
        "parameters": sum(parameter.numel() for parameter in engine.loaded.model.parameters()),
        "gradient_length": database.fingerprint.gradient_length,
        "samples": TOP,
        "tokens_a_sample": tokens,
        "wall_ratio": middle(lambda run: (run["direction"] + run["exact"] + run["forward"]) / run["plain"]),
        "cpu_ratio": middle(
            lambda run: (run["direction_cpu"] + run["exact_cpu"] + run["forward_cpu"]) / run["plain_cpu"]
        ),
        "direction_ratio": middle(lambda run: run["direction"] / run["plain"]),
        "exact_ratio": middle(lambda run: run["exact"] / run["plain"]),
        "forward_ratio": middle(lambda run: run["forward"] / run["plain"]),
        "token_gradient_in_samples": middle(
            lambda run: (run["token_level"] - run["one_sample"]) / response / (run["sample_level"] / TOP)
        ),
        "token_gradients_per_second": middle(lambda run: response / (run["token_level"] - run["one_sample"])),
        "largest_error": max(run["largest_error"] for run in runs),
        "largest_score": max(run["largest_score"] for run in runs),
        "runs": runs,
    }


def main() -> None:
    """Run it all, write the results, and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a small model, to see that it runs")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    shape, kinds = ("small", ["lora"]) if arguments.small else ("large", ["lora", "lora, r = 512", "nf4", "full"])
    results = {"command": f"scripts/bench tokens --repeats {arguments.repeats}", "machine": machine(), "entries": []}
    for kind in kinds:
        for tokens in (128,) if kind != "lora" else (128, 384):
            entry = measure(kind, tokens=tokens, shape=shape, repeats=arguments.repeats if tokens == 128 else 3)
            print(json.dumps({k: v for k, v in entry.items() if k != "runs"}), flush=True)
            results["entries"].append(entry)
    if not arguments.small:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "tokens.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
