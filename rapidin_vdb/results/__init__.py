"""What comes out: rankings, comparisons, stored samples, reports."""

from rapidin_vdb.results.comparison import ComparedToken, Comparison
from rapidin_vdb.results.rankings import (
    GroupInfluence,
    Histogram,
    RankedSample,
    RankedToken,
    Ranking,
    Seconds,
    Span,
    TokenScore,
)
from rapidin_vdb.results.reports import (
    CleanReport,
    DatabaseInfo,
    Finding,
    IndexInfo,
    IngestEstimate,
    IngestReport,
    KeptVersion,
    StoredSample,
    VerifyReport,
)

__all__ = [
    "CleanReport",
    "ComparedToken",
    "Comparison",
    "DatabaseInfo",
    "Finding",
    "GroupInfluence",
    "Histogram",
    "IndexInfo",
    "IngestEstimate",
    "IngestReport",
    "KeptVersion",
    "RankedSample",
    "RankedToken",
    "Ranking",
    "Seconds",
    "Span",
    "StoredSample",
    "TokenScore",
    "VerifyReport",
]
