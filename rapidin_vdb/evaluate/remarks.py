"""Sentences of the report that say how its figures came about, from these figures alone."""

from typing import Any

from rapidin_vdb.evaluate.scoring import CONTAINING

Result = dict[str, Any]


def told(*, whose: str = "") -> str:
    """Return what token-wise methods are told."""
    return (
        f" Token-wise methods are told the words that are asked about{whose}; `{CONTAINING}` are in an order drawn at "
        "random (1 plus a number below 1; such a number alone for all others)."
    )


def checkpoint() -> str:
    """Return of which checkpoints gradients are."""
    return " All gradients are of the last checkpoint alone, where TracIn may sum over several."


def settings(result: Result) -> str:
    """Return what the adapter was tuned with."""
    ran = result["settings"]
    return (
        f" LoRA of rank {ran['rank']} on {', '.join(ran['modules'])}, {ran['batch']} samples a step, a learning rate "
        f"of {ran['learning_rate']:g} at its highest, in {'bfloat16' if ran['bfloat16'] else 'float32'}, records "
        f"of up to {ran['max_tokens']} tokens."
    )


def drawn() -> str:
    """Return what the backdoor's intervals are over."""
    return " Intervals are over texts, whose generations are drawn together."


def refined(result: Result) -> str:
    """Return what refined rankings are."""
    count = result["refined"]
    share = min(1, 2 * count / result["samples"])
    return (
        f" Refined rankings have their {count:,} highest and {count:,} lowest samples ranked again by exact scores, as "
        f"`query --both --refine {count} --top-k {count}` does: that takes the gradients of {share:.0%} of the samples "
        "anew for each generation, which pays for few generations, or where the samples are many times as many."
    )


def influence(result: Result) -> str:
    """Return how influence functions were made."""
    names = [name for name in result["methods"] if "influence function" in name]
    if not names:
        return " Influence functions were left out."
    if not any("LiSSA" in name for name in names):
        return ""
    ran = result["lissa"]
    told = f" LiSSA's recursion ran for {ran['steps']} steps of {ran['samples a step']} samples, with a damping of "
    told += str(ran["damping"])
    if ran["steps"] > 10:
        return f"{told}."
    measured = ran.get("correlation with TracIn")
    return (
        f"{told}: too few for the inverse that it is to come to, so that they say little of influence functions as "
        "such."
        + ("" if measured is None else f" Their scores' rank correlation with plain TracIn's is {measured:.3f} here.")
        + " (On a toy of 2,240 parameters, it was 0.985 to 0.996 after 5 such steps and -0.23 to 0.91 after 200.)"
    )


def groups(result: Result) -> str:
    """Return what the intervals are over, and how many different questions and generations there are."""
    return (
        f" Of {sum(result['queries'].values())} generations {result['distinct']} are different texts, answers to "
        f"{result['questions']} questions; intervals are over questions, whose generations are drawn together."
    )


def control(result: Result) -> str:
    """Return how often the most likely answers name the wrong one, of the tuned model and of the base model."""
    told = ", ".join(
        f"{title} {counts['tuned']} and {counts['base']} of {counts['asked']}"
        for title, counts in result["control"].items()
    )
    return f" Most likely answers with the wrong name, of the tuned model and of the base model: {told}."
