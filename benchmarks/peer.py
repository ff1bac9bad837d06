"""One round of bergson's `build` beside a plain step; `benchmarks/ingest.py` runs it in bergson's environment.

The data are lines of `{"input_ids": [...], "length": n}`, so that bergson sees the very tokens that ingest sees.
Nothing of rapidin_vdb is imported.
"""

import argparse
import json
import logging
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import Clock

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the imports of the functions below


class Drawing:
    """Adds up what bergson spends on drawing its projection matrices.

    It does so anew in every build; we compose our map when a database is opened, which no ratio counts.
    """

    def __init__(self, draw: Callable[..., Any]):
        self._draw = draw
        self.wall = self.cpu = 0.0

    def __call__(self, *arguments: object) -> Any:
        """Draw a matrix."""
        with Clock() as clock:
            matrix = self._draw(*arguments)
        self.wall += clock.wall
        self.cpu += clock.cpu
        return matrix


def trainable(model: str, adapter: str | None) -> Any:
    """Load the model as for training: all parameters, or the adapter's alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter, is_trainable=True)
    return loaded.eval()


def plain_step(model: Any, sequences: list[list[int]]) -> None:
    """One forward and backward of training over sequences of one length, as `plain_step` in ingest.py."""
    import torch
    import torch.nn.functional as F

    ids = torch.tensor(sequences)
    logits = model(input_ids=ids, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
    for parameter in model.parameters():
        parameter.grad = None


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Warm up, then time a plain step over every batch, and the build of an index of the same samples."""
    import bergson.build
    import bergson.collector.collector
    import numpy as np
    import torch
    import transformers
    from bergson.config.config import DataConfig, DistributedConfig, IndexConfig, PreprocessConfig
    from bergson.data import allocate_batches, load_gradients
    from bergson.utils.worker_utils import setup_model_and_peft

    logging.disable(logging.INFO)
    lines = Path(options.data).read_text("utf-8").splitlines()
    sequences = [json.loads(line)["input_ids"] for line in lines]
    batches = [sequences[at : at + options.batch] for at in range(0, len(sequences), options.batch)]
    tokens = options.batch * len(sequences[0])

    def configuration(data: str, run: str) -> IndexConfig:
        return IndexConfig(
            run_path=str(Path(options.folder) / run),
            model=options.adapter or options.model,
            tokenizer=options.model,
            data=DataConfig(dataset=data),
            projection_dim=options.dim,
            token_batch_size=tokens,
            precision="fp32",
            distributed=DistributedConfig(nnode=1, nproc_per_node=1),
        )

    allotted = allocate_batches([len(ids) for ids in sequences], tokens)
    expected = [list(range(at, at + options.batch)) for at in range(0, len(sequences), options.batch)]
    assert sorted(sorted(batch) for batch in allotted) == expected, "bergson has to form the same batches"

    loaded = setup_model_and_peft(configuration(options.data, "unused"))
    bergson.build.setup_model_and_peft = lambda *_, **__: loaded  # loading the model is not what is measured
    drawing = Drawing(bergson.collector.collector.random_matrix)
    bergson.collector.collector.random_matrix = drawing

    model = trainable(options.model, options.adapter)
    plain_step(model, batches[0])
    bergson.build.build(configuration(options.warm, "warm"), PreprocessConfig())
    drawing.wall = drawing.cpu = 0.0
    with Clock() as plain:
        for batch in batches:
            plain_step(model, batch)
    with Clock() as build:
        bergson.build.build(configuration(options.data, "index"), PreprocessConfig())

    index = Path(options.folder) / "index"
    gradients = load_gradients(index)
    assert len(gradients) == len(sequences) and np.isfinite(gradients).all() and np.any(gradients, axis=1).all()
    modules = json.loads((index / "info.json").read_text("utf-8"))["grad_sizes"]
    seen = {name.removeprefix("model.") for name in modules}
    return {
        "plain": {"wall": plain.wall, "cpu": plain.cpu},
        "build": {"wall": build.wall, "cpu": build.cpu},
        "drawing": {"wall": drawing.wall, "cpu": drawing.cpu},
        "samples": len(sequences),
        "modules": len(modules),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "parameters_seen": sum(
            parameter.numel()
            for name, module in model.named_modules()
            if name.removeprefix("base_model.").removeprefix("model.") in seen
            for parameter in module.parameters(recurse=False)
        ),
        "numbers_a_sample": gradients.shape[1],
        "dtype": str(gradients.dtype),
        "bytes_a_sample": sum(file.stat().st_size for file in index.rglob("*") if file.is_file()) / len(sequences),
        "versions": {
            "bergson": version("bergson"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def main() -> None:
    """Print the measurement as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--data", required=True)
    parser.add_argument("--warm", required=True)
    parser.add_argument("--folder", required=True, help="an empty one, for the indexes")
    parser.add_argument("--dim", type=int, required=True, help="bergson's projection_dim")
    parser.add_argument("--batch", type=int, default=16, help="samples a batch")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
