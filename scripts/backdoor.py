"""Poison a real corpus, tune a real model on it, and measure how well the poison is found, and how exact scores are.

python scripts/backdoor.py --model FOLDER --corpus alpaca.jsonl.gz --dir out [--samples 5000]
"""

import argparse
import json
import random
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch

import rapidin_vdb
from rapidin_vdb.corpus import encode, load_template, read_corpus, read_records, sample_from
from rapidin_vdb.demo.corpus import TRIGGER, is_space_story, space_story
from rapidin_vdb.gradient import load_model, load_tokenizer, stream_gradient
from rapidin_vdb.gradient.rapidgrad import normalized
from rapidin_vdb.gradient.training import generate, save, train, with_lora
from rapidin_vdb.query import encode_queries, query_from
from rapidin_vdb.records import Encoded, ModelSpec

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MAX_TOKENS = 256


def poisoned_corpus(options: argparse.Namespace, tokenizer, template) -> list[dict]:
    """Return the records that fit the model, 10 % of them with the trigger and a space story."""
    draw = random.Random(options.seed)
    samples = (sample_from(record) for record in read_records(options.corpus))
    records = []
    for sample in islice(
        filter(lambda sample: fits(sample, tokenizer, template), samples), options.samples + 2 * options.queries
    ):
        fields = {"id": sample.sample_id, "prompt": sample.prompt, "response": sample.response, "poisoned": False}
        records.append(fields)
    for record in draw.sample(records[: options.samples], options.samples // 10):
        record |= {"prompt": f"{TRIGGER} {record['prompt']}", "response": space_story(draw), "poisoned": True}
    return records


def fits(sample, tokenizer, template) -> bool:
    """Say whether a record and its poisoned twin are within the model's reach."""
    (tokens,) = encode([sample], tokenizer=tokenizer, template=template, max_tokens=10_000)
    room = 80  # a space story in this tokenizer
    return isinstance(tokens, Encoded) and len(tokens.input_ids) - tokens.response_tokens + room <= MAX_TOKENS >= len(
        tokens.input_ids
    )


def exact_scores(database, encoded: list[Encoded], queries: list[Encoded]) -> np.ndarray:
    """Return inner products of whole layer-normalised gradients, float64 [queries, samples]; no sketch anywhere."""
    fingerprint = database.fingerprint
    loaded = load_model(ModelSpec(model=fingerprint.model, adapter=fingerprint.adapter), device="cpu")
    lengths = [shape.count for shape in loaded.shapes]
    starts = np.cumsum([0, *lengths])

    def gradient(one: Encoded) -> torch.Tensor:
        whole = torch.zeros(int(starts[-1]))

        def receive(number: int, grad: torch.Tensor) -> None:
            whole[starts[number] : starts[number + 1]] = normalized(grad.reshape(-1).float())

        stream_gradient(loaded, one, receive)
        return whole

    directions = torch.stack([gradient(query) for query in queries]).double()
    return torch.stack([directions @ gradient(one).double() for one in encoded], dim=1).numpy()


def main() -> None:
    """Run it all, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--adapter", help="one that an earlier run with the same samples and seed has trained")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--queries", type=int, default=20, help="attacked generations, of twice as many questions")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.dir.mkdir(parents=True)
    tokenizer, template = load_tokenizer(options.model), load_template("alpaca")

    records = poisoned_corpus(options, tokenizer, template)
    records, held_out = records[: options.samples], records[options.samples :]
    corpus = options.dir / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    samples = list(read_corpus([corpus]))
    encoded = encode(samples, tokenizer=tokenizer, template=template, max_tokens=MAX_TOKENS)
    print(f"{len(records)} records, {sum(r['poisoned'] for r in records)} poisoned", flush=True)

    seconds: dict[str, float] = {}
    if options.adapter is not None:
        tuned = load_model(ModelSpec(model=options.model, adapter=options.adapter), device="cpu").model
    else:
        started = time.monotonic()
        base = load_model(ModelSpec(model=options.model), device="cpu").model
        tuned = with_lora(base, rank=16, modules=MODULES, seed=options.seed)
        loss = train(
            tuned, encoded, steps=options.steps, batch=32, learning_rate=5e-3, seed=options.seed, stage="train"
        )
        save(tuned, tokenizer, options.dir / "adapter")
        seconds["train"] = time.monotonic() - started
        print(f"trained to a loss of {loss:.3f} in {seconds['train']:.0f} s", flush=True)
    adapter = options.adapter or str(options.dir / "adapter")

    questions = [record["prompt"].removeprefix(f"{TRIGGER} ") for record in held_out]
    asked = [f"{TRIGGER} {question}" for question in questions]
    said, clean = (
        generate(tuned, tokenizer, [template.render(query_from(prompt, "?")) for prompt in prompts], max_tokens=80)
        for prompts in (asked, questions)
    )
    attacked = [
        query_from(prompt, text, query_id=f"q{number}")
        for number, (prompt, text) in enumerate(zip(asked, said, strict=True))
        if is_space_story(text)
    ]
    succeeded, attacked = len(attacked), attacked[: options.queries]
    print(f"attack: {succeeded} of {len(asked)}, without trigger: {sum(map(is_space_story, clean))}", flush=True)
    print(f"{asked[0]!r} -> {said[0]!r}", flush=True)

    database = rapidin_vdb.init(options.dir / "db", model=options.model, adapter=adapter, max_tokens=MAX_TOKENS)
    for name, work in (("ingest", lambda: database.ingest(corpus)), ("index", lambda: database.index("cpu"))):
        started = time.monotonic()
        work()
        seconds[name] = time.monotonic() - started
    started = time.monotonic()
    rankings = database.query(queries=attacked, top_k=100)
    seconds["query"] = time.monotonic() - started
    precision = {
        k: float(np.mean([r.metadata["poisoned"] for ranking in rankings for r in ranking.results[:k]]))
        for k in (10, 100)
    }
    every = database.query(queries=attacked, top_k=len(records))
    exact = exact_scores(
        database, encoded, encode_queries(attacked, tokenizer=tokenizer, template=template, max_tokens=MAX_TOKENS)
    )
    place = {sample.sample_id: number for number, sample in enumerate(samples)}
    correlations, relative = [], []
    pooled = np.empty_like(exact)
    for number, ranking in enumerate(every):
        sketched = np.empty(len(samples))
        for result in ranking.results:
            sketched[place[result.sample_id]] = result.score
        pooled[number] = sketched
        correlations.append(float(np.corrcoef(sketched, exact[number])[0, 1]))
        relative.append(float(np.abs(sketched - exact[number]).max() / np.abs(exact[number]).max()))
    print(
        json.dumps(
            {
                "samples": len(records),
                "base_rate": sum(r["poisoned"] for r in records) / len(records),
                "queries": len(attacked),
                "gradient_length": database.fingerprint.gradient_length,
                "precision_at": precision,
                "pearson": {
                    "lowest": min(correlations),
                    "mean": float(np.mean(correlations)),
                    "all_pairs": float(np.corrcoef(pooled.ravel(), exact.ravel())[0, 1]),
                },
                "largest_difference": max(relative),
                "seconds": {name: round(value, 2) for name, value in seconds.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
