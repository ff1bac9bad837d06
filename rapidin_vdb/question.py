"""What may be asked of a database, and what may not be asked together."""

from dataclasses import dataclass

from rapidin_vdb.arguments import one_of, whole
from rapidin_vdb.errors import SpecError
from rapidin_vdb.focus import check_focus
from rapidin_vdb.records import Aggregate, Focus, Level

_WHOLE: tuple[tuple[str, int, int | None, str], ...] = (
    ("top_k", 1, None, "1 or more"),
    ("refine", 0, None, "0 or more"),
    ("most_groups", 0, None, "0 (all) or more"),
    ("most_numbers", 0, None, "0 (no bound) or more"),
    ("histogram", 0, 1000, "a number of bins from 0 (none) to 1000"),
)
_OPTIONS = {"top_k": "--top-k", "refine": "--refine"}


@dataclass(frozen=True, kw_only=True)
class Question:
    """The options of a query, whatever its generations."""

    top_k: int = 10
    """How many results."""
    where: str | None = None
    """SQL filter over the samples."""
    harmful: bool = False
    """Whether the most negative come first."""
    both: bool = False
    """Whether both ends are wanted."""
    level: Level = "sample"
    """What is ranked: samples, or single training tokens."""
    focus: tuple[Focus, ...] = ()
    """Texts, or spans of code points, of the generation whose tokens alone are asked about (Eq. 7)."""
    tokens: bool = False
    """Whether each result's tokens get scores (Eq. 6)."""
    matrix: bool = False
    """Whether each result gets the influence of its tokens on each of the generation's (Eq. 8)."""
    spans: bool = False
    """Whether an explained ranking says where the generation's tokens stand, as it does with a matrix."""
    refine: int = 0
    """How many of the first results are ranked again by their exact scores."""
    group_by: str | None = None
    """Column by whose values the influence of all samples is added up."""
    aggregate: Aggregate = "sum"
    """Or averaged."""
    most_groups: int = 0
    """How many groups at most, by absolute influence; 0 for all."""
    most_numbers: int = 0
    """How many numbers all matrices of a ranking may have at most, before any is computed; 0 for no bound."""
    histogram: int = 0
    """Into how many bins the scores of all samples are counted; 0 for none."""
    index: str | None = None
    """Which built index to use."""
    as_of: int | None = None
    """Version of the table to answer from."""

    def __post_init__(self) -> None:
        """Refuse what cannot be asked.

        Raises:
            SpecError: a value out of range, or options that exclude one another.
        """
        for name, least, most, wanted in _WHOLE:
            number = whole(_OPTIONS.get(name, name), getattr(self, name), least, most, wanted=wanted)
            object.__setattr__(self, name, number)  # numpy's become Python's, which JSON knows
        one_of("level", self.level, Level)
        one_of("aggregate", self.aggregate, Aggregate)
        if self.as_of is not None and type(self.as_of) is not int:
            raise SpecError(f"--as-of is {self.as_of!r}; wanted the number of a version (see `info --versions`)")
        if self.where is not None and not isinstance(self.where, str):
            raise SpecError(f"--where is {self.where!r}; wanted an expression of SQL, as a text")
        if self.aggregate != "sum" and self.group_by is None:
            raise SpecError(f"--aggregate {self.aggregate} goes with --group-by")
        if self.harmful and self.both:
            raise SpecError("give one of --harmful and --both")
        check_focus(self.focus)
        if self.level == "token":
            for name, given in (
                ("--tokens", self.tokens),
                ("--matrix", self.matrix),
                ("--refine", self.refine),
                ("--group-by", self.group_by is not None),
                ("histogram", self.histogram > 0),
                ("--as-of", self.as_of is not None),
            ):
                if given:
                    raise SpecError(f"{name} is about samples; leave it out, or leave out --level token")

    @property
    def exact(self) -> bool:
        """Whether full gradients are needed."""
        return bool(self.tokens or self.matrix or self.refine)
