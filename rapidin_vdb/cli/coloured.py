"""Texts whose tokens carry scores, in the colours of a terminal, dark or light, and without."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rapidin_vdb.cli.text import printable, token_label
from rapidin_vdb.focus import occurrences
from rapidin_vdb.pieces import pieces_of
from rapidin_vdb.records import Focus
from rapidin_vdb.results import RankedSample

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Of one luminance, at which letters in them can be read on black and on white, and black letters on them: so what is
# stronger is more saturated on any terminal, and never only brighter.
_GREY, _RED, _BLUE = (117, 117, 117), (236, 0, 0), (30, 111, 238)
_PLAIN, _BLOCK = 0.1, 0.4
_SHOWN = 5


def largest_score(results: Sequence[object]) -> float:
    """Return the largest score of what is coloured, as to its size: what the deepest colours stand for."""
    scored = [result for result in results if isinstance(result, RankedSample) and result.tokens]
    return max((abs(score) for result in scored for _, score, _ in _scored(result)), default=0.0)


def asked_lines(prompt: str | None, generation: str, focus: Sequence[Focus]) -> None:
    """Print what the model was asked, and what it said, each beside its name; what a focus names is underlined."""
    from rich.text import Text

    said, place = Text(), 0
    found = [occurrences(generation, entry) if isinstance(entry, str) else [entry] for entry in focus]
    spans = [span for some in found for span in some]
    for piece in pieces_of(generation, [(at, at + 1) for at in range(len(generation))]):
        end = place + len(piece.text)
        asked = any(start < end and place < last for start, last in spans)
        said.append(_lines_of(piece.text), style="bold underline" if asked else "")
        place = end
    _named_lines([("prompt:", prompt and Text(_lines_of(prompt))), ("generation:", said)])


def _named_lines(entries: Sequence[tuple[str, "Text | str | bool | None"]]) -> None:
    """Print texts, each beside its name; those that are not there are left out."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True, min_width=17)
    grid.add_column(overflow="fold")
    for name, text in entries:
        if text:
            grid.add_row(f"      {name}", text if isinstance(text, Text) else Text(str(text)))
    _console().print(grid)


def legend_line(most: float) -> None:
    """Print what the colours stand for."""
    from rich.padding import Padding
    from rich.text import Text

    console = _console()
    text = Text()
    for score, meaning in ((most, " more likely; "), (-most, " less likely, underlined; ")):
        text.append(f" {score:+.4g} ", style=style_of(score, most, few=_few(console))).append(meaning)
    console.print(Padding(text.append("↵ new line"), (0, 0, 0, 6)))


def sample_lines(result: RankedSample, most: float) -> None:
    """Print what is known of a sample, its prompt, its response in colours, and its strongest tokens in numbers."""
    from rich.text import Text

    assert result.tokens is not None
    known = {"split": result.split, "source": result.source, **result.metadata}
    about = "  ".join(f"{name}: {value}" for name, value in known.items() if value is not None)
    few, response, place = _few(_console()), Text(), 0
    scored = max((token.end for token in result.tokens), default=0)
    for piece, score, tokens in _scored(result):
        if result.truncated and place >= scored:
            response.append(" (cut off:) ", style="italic").append(_lines_of(piece), style="dim")
        else:
            response.append(_lines_of(piece), style=style_of(score, most, few=few) if tokens else "dim")
        place += len(piece)
    strongest = sorted(result.tokens, key=lambda token: (-abs(token.score), token.start))[:_SHOWN]
    named = ", ".join(f"{token_label(token.text, 16)} {token.score:+.3g}" for token in strongest)
    _named_lines(
        [
            ("about:", Text(printable(about))),
            ("prompt:", result.prompt and Text(_lines_of(result.prompt))),
            ("response:", response),
            (
                "cut:",
                result.truncated and f"to --max-tokens: {len(result.tokens):,} tokens have scores, none behind them",
            ),
            ("strongest:", Text(named)),
        ]
    )


def _scored(result: RankedSample) -> Iterator[tuple[str, float, int]]:
    """Yield a response in the pieces that are coloured: each text, its score, and of how many tokens it is."""
    tokens = result.tokens or ()
    for piece in pieces_of(result.response, [(token.start, token.end) for token in tokens]):
        yield piece.text, sum(tokens[number].score for number in piece.tokens), len(piece.tokens)


def _lines_of(text: str) -> str:
    return printable(text, lines=True).replace("\n", "↵\n")


def style_of(score: float, most: float, *, few: bool = False) -> str:
    """Return the style of a score: a shade of red or blue; in steps where a terminal has few colours, and no shades.

    Negative ones are underlined.
    """
    share = min(abs(score) / most, 1.0) if most else 0.0
    line = "underline " if score < 0 else ""
    if few:
        name = "red" if score > 0 else "blue"
        steps = ((0.15, ""), (0.4, f"{line}{name}"), (0.7, f"{line}bold {name}"))
        return next((style for end, style in steps if share < end), f"{line}bold white on {name}")
    if share < _PLAIN:
        return ""
    red, green, blue = mixed(_RED if score > 0 else _BLUE, share**0.5)
    shade = f"rgb({red},{green},{blue})"
    return f"{line}{shade}" if share < _BLOCK else f"{line}black on {shade}"


def mixed(colour: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    """Return a colour mixed with grey of its luminance, as light mixes."""
    red, green, blue = (
        round(255 * ((one / 255) ** 2.2 * share + (grey / 255) ** 2.2 * (1 - share)) ** (1 / 2.2))
        for one, grey in zip(colour, _GREY, strict=True)
    )
    return red, green, blue


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False)


def _few(console: "Console") -> bool:
    return console.color_system not in ("256", "truecolor")
