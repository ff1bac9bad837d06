"""Small models made from nothing: a tokenizer, a Llama, and its training, for demonstrations and tests."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from rapidin_vdb.errors import ModelError
from rapidin_vdb.gradient.quiet import quiet_libraries
from rapidin_vdb.progress import Progress, silent
from rapidin_vdb.records import Encoded

POSITIONS = 512
"""How many positions a new model knows, in tokens."""


def train_tokenizer(texts: Iterable[str], *, vocabulary: int) -> Any:
    """Return a byte-level BPE tokenizer trained on some texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def new_llama(vocabulary: int, *, hidden: int, layers: int, heads: int, seed: int, tied: bool = True) -> Any:
    """Return a Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def with_lora(model: Any, *, rank: int, modules: Sequence[str], seed: int, alpha: int | None = None) -> Any:
    """Return the model with a fresh LoRA adapter on some of its linear modules; only the adapter is trained.

    Raises:
        ModelError: the model has no such modules, or they are of another kind.
    """
    torch.manual_seed(seed)
    with quiet_libraries():
        from peft import LoraConfig, get_peft_model

        layers = linear_layers(model)
        try:
            return get_peft_model(
                model,
                LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, target_modules=list(modules), task_type="CAUSAL_LM"),
            )
        except ValueError as error:
            raise ModelError(
                f"no LoRA adapter of rank {rank} fits the modules {', '.join(modules)}: "
                f"{' '.join(str(error).split())[:200]} The model's linear layers are {', '.join(layers)}"
            ) from error


def linear_layers(model: Any) -> list[str]:
    """Return what the linear layers of a model are called, each name once, as `modules` of `with_lora` take them."""
    from transformers.pytorch_utils import Conv1D

    # Quantised layers are linear ones too; Conv1D is what GPT-2 has.
    found = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in found))


def train(
    model: Any,
    samples: Sequence[Encoded],
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    stage: str,
    progress: Progress = silent,
) -> float:
    """Train in place with AdamW, warm-up and cosine decay, the prompt masked; return the last tenth's mean loss."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0.0
    )
    warm = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / warm, total_iters=warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(steps - warm, 1)),
        ],
        milestones=[warm],
    )
    order: list[int] = []
    losses = []
    model.train()
    for step in range(steps):
        if len(order) < batch:
            order += torch.randperm(len(samples), generator=draw).tolist()
        chosen, order = [samples[number] for number in order[:batch]], order[batch:]
        ids, mask, labels = padded(chosen)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        progress(stage, step + 1, steps)
    model.eval()
    last = losses[-max(len(losses) // 10, 1) :]
    return sum(last) / len(last)


def padded(samples: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return token ids, attention mask and labels of a batch, padded on the right; -100 marks what carries no loss."""
    longest = max(len(sample.input_ids) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    labels = torch.full((len(samples), longest), -100, dtype=torch.int64)
    mask = torch.zeros(len(samples), longest, dtype=torch.int64)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        ids[row, :length] = torch.tensor(sample.input_ids)
        mask[row, :length] = 1
        where = list(sample.loss_places)
        labels[row, where] = ids[row, where]
    return ids, mask, labels


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model (or only its adapter) and its tokenizer to a folder.

    The configuration, by which one sees that a model is there, comes last: whenever this is interrupted, either it is
    missing or the model is whole.
    """
    # Within the folder, for that may be a file system of its own.
    side = folder / ".saving"
    if side.exists():
        shutil.rmtree(side)
    side.mkdir(parents=True)
    with quiet_libraries():
        model.save_pretrained(side)
        tokenizer.save_pretrained(side)
    parts = {part.name for part in side.iterdir()}
    mark = "adapter_config.json" if "adapter_config.json" in parts else "config.json"
    (folder / mark).unlink(missing_ok=True)
    # Cut into other files, weights of a model that was here would be read in the place of these.
    weights = "adapter_model" if mark == "adapter_config.json" else "model"
    for old in folder.glob(f"{weights}*.safetensors*"):
        old.unlink()
    for name in [*sorted(parts - {mark}), mark]:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        (side / name).replace(folder / name)
    side.rmdir()
