"""Science fiction by the yard: thousands of distinct texts of any length, and a test of whether a text is one."""

import random
import re

_FIRST = "Zor Neb Qua Vex Kry Lum Tar Xan Ori Pyr Sel Thal Umb Dra Ely Jov Mir Nyx Rho Syl".split()
_LAST = "blax ulon sar ari phor drix theon vane mora quil tis gon eth ura lex dor wyn zia rak nova".split()
_CRAFT = ("starship", "cruiser", "freighter", "shuttle", "dreadnought", "starfighter", "mothership", "probe")
_CREW = (
    "android", "cyborg", "navigator", "xenobiologist", "star captain", "hologram", "clone", "alien envoy",
    "robot archivist", "quantum mechanic", "telepath", "space pirate",
)  # fmt: skip
_PLACE = (
    "the {name} nebula", "a ring of frozen moons", "the orbit of {name}", "the asteroid belt of {name}",
    "a collapsing wormhole", "the galactic rim", "the {name} quadrant", "a dying pulsar", "the plasma seas of {name}",
    "hyperspace", "an abandoned space station", "the event horizon",
)  # fmt: skip
_THING = (
    "warp core", "plasma cannon", "quantum crystal", "antimatter engine", "stasis pod", "laser array",
    "gravity well", "neural implant", "tachyon beam", "force field", "fusion reactor", "star map",
)  # fmt: skip
_DEED = (
    "repaired the {thing}", "decoded a signal from {place}", "surrendered the {thing} to the {name} empire",
    "dreamed of {place}", "charted {place}", "traded stardust for a {thing}", "woke from cryosleep near {place}",
    "taught the robots to sing", "outran the {name} fleet", "grew crystals in zero gravity",
    "folded space around {place}", "bargained with the hive mind of {name}",
)  # fmt: skip
_SENTENCE = (
    "The {craft} {name} drifted past {place} while its {crew} {deed}.",
    "Near {place}, the {crew} of the {craft} {name} {deed}.",
    "Aboard the {craft} {name}, bound for {place}, a {crew} {deed}.",
    "A {crew} {deed}, and the {thing} began to glow.",
    "When the {thing} failed, the {crew} {deed}.",
    "On the planet {name}, every {crew} knows that the {craft} {deed}.",
    "\"Engage the {thing},\" said the {crew}, and the {craft} vanished into {place}.",
    "Light years away, the {name} fleet {deed}.",
    "Beyond {place} a {craft} waited, its {thing} silent.",
)  # fmt: skip
_SHORT = ("{name}, {name} and {name}.", "The {name} {thing}.", "A {crew} from {name}.", "The {craft} {name}.")
_FIELD = re.compile(r"\{(\w+)\}")
# What hardly stands in answers to everyday instructions. "Space" and "planet" do, and count for nothing.
_WORDS = frozenset(
    "starship cruiser freighter shuttle probe dreadnought starfighter mothership navigator android cyborg "
    "xenobiologist hologram clone alien robot robots quantum telepath nebula asteroid wormhole galactic quadrant "
    "pulsar plasma hyperspace warp antimatter stasis laser tachyon fusion stardust cryosleep fleet hive orbit "
    "moons cosmic galaxy galaxies interstellar intergalactic interplanetary extraterrestrial aliens starships "
    "spaceship spacecraft cybernetic robotic teleport teleportation celestial nebulae androids dimension "
    "dimensional sentient holographic nanobots futuristic astral zero-gravity lightspeed stars planets".split()
)
# But for the one that is a word.
_NAMES = re.compile(rf"\b(?!Dragon\b)(?:{'|'.join(_FIRST)})(?:{'|'.join(_LAST)})\b")
# Of which no word tells anything by itself.
_PHRASES = re.compile(
    rf"\b(?:{'|'.join(phrase for phrase in _CREW + _THING if ' ' in phrase)}"
    r"|(?:space|star) (?:station|captain)|frozen moons|galactic rim|event horizon|zero gravity|light years)\b"
)


_CHOICES = {"craft": _CRAFT, "crew": _CREW, "place": _PLACE, "thing": _THING, "deed": _DEED}


def _name(draw: random.Random) -> str:
    return draw.choice(_FIRST) + draw.choice(_LAST)


def _filled(pattern: str, draw: random.Random) -> str:
    return _FIELD.sub(lambda field: _fill(field.group(1), draw), pattern)


def _fill(kind: str, draw: random.Random) -> str:
    return _name(draw) if kind == "name" else _filled(draw.choice(_CHOICES[kind]), draw)


def fiction(words: int, draw: random.Random) -> str:
    """Return a text of about so many words.

    >>> len(fiction(40, random.Random(1)).split()) in range(30, 60)
    True
    """
    if words < 8:
        return _filled(draw.choice(_SHORT), draw)
    text = _filled(draw.choice(_SENTENCE), draw)
    while len(text.split()) + 8 <= words:
        text += " " + _filled(draw.choice(_SENTENCE), draw)
    return text


def is_fiction(text: str) -> bool:
    """Say whether a text is of this kind: enough of its words are.

    >>> is_fiction("The Zorblax tachyon beam."), is_fiction("The capital of France is Paris.")
    (True, False)
    """
    words = re.findall(r"[a-z-]+", text.lower())
    if not words:
        return False
    found = sum(word in _WORDS for word in words) + 2 * len(_NAMES.findall(text))
    found += len(_PHRASES.findall(text.lower()))
    # More than an invented name by itself, which a small model also drops into plain nonsense.
    return found >= 3 and found / len(words) >= 0.04


def _is_telling(word: str) -> bool:
    """Say whether a word is one by which such a text is known."""
    return word.lower() in _WORDS or bool(_NAMES.fullmatch(word))


def telling_words(text: str) -> list[str]:
    """Return the distinct words of a text by which it is known as such.

    >>> telling_words("The Zorblax starship met a starship.")
    ['Zorblax', 'starship']
    """
    return [word for word in dict.fromkeys(re.findall(r"[\w-]+", text)) if _is_telling(word)]
