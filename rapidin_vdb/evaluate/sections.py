"""Parts of the report on a backdoor: what several generations find together, and the model tuned without that."""

from typing import Any

from rapidin_vdb.evaluate.tables import figure, portion, table

Result = dict[str, Any]


def together(result: Result) -> list[str]:
    """Return how many of the poisoned samples several generations find together."""
    if "together" not in result:
        return []
    found = result["together"]
    texts = found["of"][-1]
    drawn = [count for count in found["of"][:-1] if count < texts]  # of as many texts as there are, nothing is drawn
    heads = [f"{count} generation{'' if count == 1 else 's'}" for count in drawn] + ["all generations"]
    whole = "all generations are of one text" if texts == 1 else f"all generations are of {texts} texts"
    of = "Of one generation" + (f" and of {drawn[-1]}, of different texts" if len(drawn) > 1 else "")
    how = f"{of}, it is the mean over 200 draws, with what 95 % of the draws lie between; {whole}"
    parts = [
        f"### Share of poisoned samples among the {found['k']:,} found first by several generations",
        "As many as are poisoned: those of the largest score for any of the generations (in the second table, either way), without a look at which are poisoned. Scores of methods that do not normalise layers are standardised within each generation first. "
        f"{how if drawn else whole.capitalize()}. Scores of texts and hidden states mean nothing at their lower end.",
    ]
    for end, title in (("highest", "The highest alone"), ("both", "Both ends")):
        names = [name for name in found[end] if end == "highest" or name.startswith(("TracIn", "RapidIn", "infl"))]
        rows = [
            [name, *map(figure, found[end][name][: len(drawn)]), f"{found[end][name][-1][0]:.3f}"] for name in names
        ]
        parts += [f"{title}:", table(["method", *heads], rows)]
    return parts


def removal(result: Result) -> list[str]:
    """Return what came of tuning again without what was found, where that was done."""
    if "removal" not in result:
        return []
    of, attack = result["removal"], result["attack"]
    rows = [["none", "", *_attacked(attack, attack["questions"]), figure(of["loss_before"])]]
    rows += [
        [
            f"{of['count']:,} by {name}", f"{entry['poisoned']:,} of {result['poisoned']:,}",
            *_attacked(entry, attack["questions"]), figure(entry["loss"]),
        ]
        for name, entry in of["methods"].items()
    ]  # fmt: skip
    heads = [
        "samples left out",
        "poisoned among them",
        "attack succeeds",
        "without the trigger",
        "loss of the generations",
    ]
    return [
        "### Tuned again without what was found",
        "Left out are the samples of the largest absolute score for any of the generations, whatever they are; all else is as before, but for fewer steps. "
        "The attack is on the same questions (exact 95 % intervals); the loss, in nats a token, is that of the generations that were traced.",
        table(heads, rows),
    ]


def _attacked(entry: Result, questions: int) -> list[str]:
    return [portion(entry["success"], questions), portion(entry["false"], questions)]
