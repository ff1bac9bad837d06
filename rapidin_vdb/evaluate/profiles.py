"""How large an experiment is."""

from dataclasses import dataclass

from rapidin_vdb.records import ProfileName

KS = (5, 10, 50, 100, 500, 1000)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The sizes of an experiment."""

    poisoned_samples: int
    """Training samples of the backdoor experiment."""
    traced_samples: int
    """Training samples of error tracing."""
    max_tokens: int
    """Records that need more are left out of either."""
    poisoned_tokens: int
    """The same of the backdoor experiment."""
    plain_tokens: int
    """The same of records in error tracing that name nothing that is replaced."""
    rank: int
    """Of LoRA, on all linear layers; alpha is twice that."""
    poisoned_epochs: float
    """Of the fine-tuning, of the backdoor experiment."""
    traced_epochs: float
    """Of the fine-tuning, of error tracing."""
    batch: int
    """Samples a step."""
    learning_rate: float
    """At its highest."""
    questions: int
    """Prompts with which an attack is verified, with and without trigger."""
    queries: int
    """Generations that are traced."""
    width: int
    """RapidGrads of the database."""
    widths: tuple[int, ...]
    """RapidGrads whose agreement with exact scores is measured."""
    shuffles: tuple[int, ...]
    """The paper's lambda, for each of these."""
    refined: int
    """So many of the highest samples, and of the lowest, are ranked again by exact scores."""
    refined_queries: int
    """Generations for which a database does that, to time it."""
    lissa_depth: int
    """Steps of the recursion; 0 leaves LiSSA out."""
    lissa_batch: int
    """Samples a step."""
    new_tokens: int
    """Longest generation."""
    bfloat16: bool
    """Whether the fine-tuning computes in bfloat16; gradients that are compared never do."""

    @property
    def query_tokens(self) -> int:
        """Longest query: a prompt as long as a record may be, and a generation."""
        return self.max_tokens + self.new_tokens


PROFILES: dict[ProfileName, Profile] = {
    "quick": Profile(
        poisoned_samples=3000, traced_samples=3000, max_tokens=213, poisoned_tokens=160, plain_tokens=160, rank=8,
        poisoned_epochs=3.0, traced_epochs=3.0, batch=16, learning_rate=5e-3, questions=60, queries=20, width=1 << 14,
        widths=(1024, 4096, 16384), shuffles=(20,), refined=500, refined_queries=2, lissa_depth=3, lissa_batch=4,
        new_tokens=48, bfloat16=False,
    ),
    "full": Profile(
        poisoned_samples=10_500, traced_samples=10_000, max_tokens=192, poisoned_tokens=192, plain_tokens=144,
        rank=32, poisoned_epochs=5.0, traced_epochs=4.0, batch=16, learning_rate=1e-3, questions=200, queries=100,
        width=1 << 16, widths=(1 << 12, 1 << 16, 1 << 20), shuffles=(20, 100), refined=2000, refined_queries=2,
        lissa_depth=5, lissa_batch=4, new_tokens=64, bfloat16=True,
    ),
    "gpu": Profile(
        poisoned_samples=26_000, traced_samples=26_000, max_tokens=683, poisoned_tokens=512, plain_tokens=512,
        rank=512, poisoned_epochs=5.0, traced_epochs=5.0, batch=128, learning_rate=3e-4, questions=500, queries=100,
        width=1 << 16, widths=(1 << 12, 1 << 16, 1 << 20), shuffles=(20, 100), refined=2000, refined_queries=3,
        lissa_depth=20, lissa_batch=8, new_tokens=128, bfloat16=True,
    ),
}  # fmt: skip
