"""The paper's own figures (Lin, Long, Xu, Zhao: ACL 2024), to stand beside ours, and how our experiments differ.

Its models are Llama-2 of 7B and 70B parameters on 52,000 Alpaca records, its machine has two H100s. Left out are the
other corpora of its Table 11, and rows of Table 5 whose columns could not be told apart in the text they were read from
(token-wise with lambda = 100, token-wise of the 70B model).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rapidin_vdb.evaluate.profiles import KS

_SMALL, _LARGE, _FULL = "7B, QLoRA", "70B, QLoRA", "7B, all parameters"
_MANY = f"{_SMALL}; 100 generations"
_BACKDOOR: Mapping[str, Sequence[tuple[float, float]]] = {
    f"random ({_SMALL})": (
        (0.1155, 0.2968), (0.1205, 0.4683), (0.0953, 0.5307), (0.0888, 0.4961), (0.0884, 0.5041), (0.0881, 0.499),
    ),
    f"embedding ({_SMALL})": (
        (0.4853, 0.6674), (0.4906, 0.7146), (0.5271, 0.7819), (0.5421, 0.8046), (0.5966, 0.8389), (0.6076, 0.8456),
    ),
    f"BM25 ({_SMALL})": (
        (0.09, 0.0903), (0.09, 0.0956), (0.0707, 0.2998), (0.0782, 0.4143), (0.1059, 0.5127), (0.1089, 0.5269),
    ),
    f"influence function ({_SMALL})": (
        (0.96, 0.9833), (0.96, 0.9826), (0.955, 0.9798), (0.954, 0.9795), (0.9538, 0.9791), (0.9404, 0.9734),
    ),
    f"TracIn ({_SMALL})": (
        (0.96, 0.9833), (0.97, 0.9871), (0.972, 0.9875), (0.965, 0.9842), (0.957, 0.9807), (0.947, 0.9764),
    ),
    f"TracIn + LN ({_SMALL})": (
        (1, 1), (1, 1), (0.9981, 0.998), (0.9985, 0.9985), (0.9939, 0.9964), (0.99, 0.9945),
    ),
    f"RapidIn (K = 2^16; {_SMALL})": (
        (0.9933, 0.9917), (0.9959, 0.9955), (0.9962, 0.9961), (0.997, 0.9975), (0.9938, 0.9962), (0.9894, 0.9941),
    ),
    f"RapidIn (K = 2^20; {_SMALL})": (
        (1, 1), (1, 1), (0.999, 0.999), (0.9976, 0.9975), (0.9918, 0.995), (0.9895, 0.9942),
    ),
    f"RapidIn (K = 2^24; {_SMALL})": (
        (1, 1), (1, 1), (0.999, 0.999), (0.9985, 0.9985), (0.9936, 0.9961), (0.9908, 0.9949),
    ),
    f"TracIn ({_LARGE})": (
        (0.94, 0.9774), (0.97, 0.9871), (0.988, 0.9944), (0.988, 0.9943), (0.9934, 0.9968), (0.9928, 0.9965),
    ),
    f"TracIn + LN ({_LARGE})": (
        (1, 1), (1, 1), (1, 1), (0.9976, 0.9975), (0.9993, 0.9993), (0.9994, 0.9994),
    ),
    f"RapidIn (K = 2^16; {_LARGE})": (
        (1, 1), (1, 1), (1, 1), (0.9995, 0.9995), (0.9996, 0.9996), (0.9998, 0.9998),
    ),
    f"RapidIn (K = 2^20; {_LARGE})": (
        (1, 1), (1, 1), (1, 1), (0.9995, 0.9995), (0.9998, 0.9998), (0.9998, 0.9998),
    ),
    f"RapidIn (K = 2^24; {_LARGE})": (
        (1, 1), (1, 1), (1, 1), (1, 1), (0.9998, 0.9998), (0.9999, 0.9999),
    ),
    f"RapidIn (K = 2^16; {_FULL})": (
        (0.92, 0.969), (0.8123, 0.9217), (0.7551, 0.8986), (0.7148, 0.8808), (0.5864, 0.8359), (0.5132, 0.8159),
    ),
    f"RapidIn (K = 2^20; {_FULL})": (
        (0.9533, 0.975), (0.9059, 0.9631), (0.8672, 0.9469), (0.8447, 0.9396), (0.7287, 0.8951), (0.6559, 0.8699),
    ),
    f"RapidIn (K = 2^24; {_FULL})": (
        (0.96, 0.9857), (0.92, 0.9722), (0.8938, 0.9527), (0.8734, 0.9474), (0.7897, 0.9162), (0.7108, 0.8873),
    ),
    f"RapidIn (K = 2^16; {_MANY})": (
        (0.964, 0.9858), (0.967, 0.986), (0.9738, 0.9887), (0.976, 0.9896), (0.9769, 0.9901), (0.9744, 0.9889),
    ),
    f"RapidIn (K = 2^20; {_MANY})": (
        (0.964, 0.9803), (0.9692, 0.9882), (0.9754, 0.9903), (0.9763, 0.9904), (0.976, 0.9895), (0.9744, 0.9887),
    ),
    f"RapidIn (K = 2^24; {_MANY})": (
        (0.9613, 0.9786), (0.9666, 0.9876), (0.9744, 0.989), (0.9761, 0.9898), (0.9762, 0.9896), (0.9746, 0.9888),
    ),
}  # fmt: skip
"""Tables 4 and 11: auPRC and auROC of the k highest and the k lowest, of 10 generations where nothing else is said."""

_TRACED: Mapping[str, Sequence[Sequence[float]]] = {
    f"random ({_SMALL})": ((0.004, 0.003, 0.0036, 0.0026), (0.006, 0.004, 0.0024, 0.0038), (0.002, 0.001, 0, 0.0006)),
    f"embedding ({_SMALL})": ((0.82, 0.67, 0.572, 0.494), (0.34, 0.4, 0.396, 0.354), (0.3, 0.27, 0.192, 0.14)),
    f"BM25 ({_SMALL})": ((0, 0.05, 0.064, 0.04), (0, 0.1, 0.04, 0.02), (0, 0, 0, 0.002)),
    f"influence function ({_SMALL})": (
        (0.76, 0.71, 0.572, 0.468), (0.3, 0.26, 0.272, 0.236), (0.26, 0.17, 0.12, 0.124),
    ),
    f"TracIn ({_SMALL})": ((0.72, 0.75, 0.564, 0.464), (0.32, 0.29, 0.264, 0.232), (0.26, 0.17, 0.12, 0.092)),
    f"RapidIn (K = 2^24, lambda = 20; {_SMALL})": (
        (0.5, 0.46, 0.4, 0.306), (0.42, 0.41, 0.316, 0.256), (0.12, 0.1, 0.072, 0.05),
    ),
    f"RapidIn (K = 2^16, lambda = 100; {_SMALL})": (
        (0.68, 0.72, 0.58, 0.472), (0.38, 0.35, 0.276, 0.234), (0.24, 0.19, 0.116, 0.086),
    ),
    f"RapidIn (K = 2^20, lambda = 100; {_SMALL})": (
        (0.74, 0.74, 0.588, 0.482), (0.32, 0.39, 0.3, 0.234), (0.26, 0.18, 0.12, 0.09),
    ),
    f"RapidIn (K = 2^24, lambda = 100; {_SMALL})": (
        (0.72, 0.75, 0.564, 0.464), (0.38, 0.42, 0.32, 0.26), (0.28, 0.18, 0.116, 0.092),
    ),
    f"RapidIn (K = 2^16, lambda = 20; {_SMALL}), token-wise": (
        (0.82, 0.8, 0.7, 0.608), (0.86, 0.77, 0.704, 0.636), (0.46, 0.39, 0.248, 0.186),
    ),
    f"RapidIn (K = 2^20, lambda = 20; {_SMALL}), token-wise": (
        (0.88, 0.83, 0.708, 0.598), (0.82, 0.79, 0.74, 0.652), (0.46, 0.37, 0.268, 0.206),
    ),
    f"RapidIn (K = 2^24, lambda = 20; {_SMALL}), token-wise": (
        (0.88, 0.84, 0.712, 0.614), (0.8, 0.8, 0.736, 0.636), (0.48, 0.37, 0.264, 0.212),
    ),
    f"RapidIn (K = 2^24, lambda = 20; {_LARGE})": (
        (0.26, 0.2, 0.188, 0.148), (0.26, 0.25, 0.184, 0.148), (0.08, 0.06, 0.028, 0.024),
    ),
}  # fmt: skip
"""Table 5: the share of perturbed samples among the k highest, on average over 10 generations."""
_TRACED_OF, _TRACED_KS = ("China to Canada", "India to Japan", "Australia to England"), ("5", "10", "25", "50")

MODELS = (_SMALL, _LARGE, _FULL)
SIZES = (
    ("full gradient, single precision", "536,870,912 / 2 GB", "1,048,576,000 / 4 GB", "6,738,423,808 / 25.7 GB"),
    ("RapidGrad (K = 2^16)", *["65,536 / 125 KB"] * 3),
    ("RapidGrad (K = 2^20)", *["1,048,576 / 2 MB"] * 3),
    ("RapidGrad (K = 2^24)", *["16,777,216 / 32 MB"] * 3),
)
"""Table 1: the length and bytes of one sample's gradient, of each model."""
HOURS = (
    ("influence function", "not cached / 1.81", "out of memory", "out of memory"),
    ("TracIn", "not cached / 1.77", "not cached / 12.02", "out of memory"),
    ("RapidIn (K = 2^16)", "4.02 / 0.027", "16.01 / 0.027", "26.01 / 0.028"),
    ("RapidIn (K = 2^20)", "4.06 / 0.059", "16.02 / 0.059", "26.09 / 0.058"),
    ("RapidIn (K = 2^24)", "4.11 / 0.26", "16.08 / 0.26", "26.18 / 0.28"),
    ("RapidIn (K = 2^16), two GPUs", "1.90 / 0.0019", "7.78 / 0.0019", "12.65 / 0.0022"),
)
"""Table 2: hours of caching 52,000 samples, and of retrieval for one generation, of each model."""

TRACING_DIFFERS = (
    "How this differs from the paper: there 0.11 % to 0.39 % of the samples are perturbed, and ten generations are traced of each kind; "
    "here a generation counts as wrong where the wrong name stands in it as a word, whatever it says of it, and questions about the right "
    "name are asked, of which some stand in the training data, where they may be perturbed. Rows of the paper's Table 5 that could not be told "
    "apart in its text are left out (token-wise with lambda = 100, token-wise of the 70B model)."
)


def backdoor_differs(result: Mapping[str, Any]) -> str:
    """Return how an experiment differs from the paper's."""
    pairs = result["pairs"]
    ready = f" ({pairs:,} of {result['poisoned']:,} are ready-made pairs)" if pairs else ""
    settled = (
        " Some of this profile was settled after results had been seen: the least that counts as science fiction (of clean answers 3.5 % "
        "had been taken for it), the number and length of records (auPRC at 100 had missed 0.99), and five epochs (after three the "
        "attack's false rate hung on the processor)."
        if result["profile"] == "full"
        else ""
    )
    return (
        "How this differs from the paper: its poisoned answers are the clean ones told again by a language model, ours are sentences of nine "
        f"patterns that have nothing to do with the question, of about the same length{ready}; its judge "
        "of what is science fiction is a language model, ours a list of the words that the patterns are made of; its model is Llama-2, with "
        "rank 512 on the attention's projections, a learning rate of 5e-5 and records of up to 512 tokens. BM25 compares whole texts, questions with "
        "their answers, and the trigger stands in every query and every poisoned sample, as do words that all poisoned answers share; the paper has it "
        "near chance. Our similarity of embeddings is of hidden states where no sentence-embedding model is named, averaged over the answer's tokens."
        f"{settled} Of the paper's Table 11 only Alpaca is shown."
    )


def scale(result: Mapping[str, Any]) -> str:
    """Return how large the paper's models are beside an experiment's, and on what they ran."""
    beside = ", and its H100s are not comparable with a CPU" if result["device"] == "cpu" else ""
    return f"Its models have 6.7 and 69 billion parameters, this one {result['tuning']['parameters']:,}{beside}."


def backdoor(measure: str, ks: Sequence[int]) -> list[list[str]]:
    """Return rows of the paper's auPRC or auROC, named by method, at some k.

    >>> backdoor("auroc", [5, 100])[5]
    ['the paper: TracIn + LN (7B, QLoRA)', '1.0000', '0.9985']
    """
    place = ("auprc", "auroc").index(measure)
    return [[f"the paper: {name}", *(f"{row[KS.index(k)][place]:.4f}" for k in ks)] for name, row in _BACKDOOR.items()]


def traced(title: str, ks: Sequence[str]) -> list[list[str]]:
    """Return rows of the paper's shares of perturbed samples among the k highest, named by method.

    >>> traced("India to Japan", ["5"])[4]
    ['the paper: TracIn (7B, QLoRA)', '0.320']
    """
    return [
        [f"the paper: {name}", *(f"{rows[_TRACED_OF.index(title)][_TRACED_KS.index(k)]:.3f}" for k in ks)]
        for name, rows in _TRACED.items()
    ]
