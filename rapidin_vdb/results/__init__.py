"""What comes out: rankings, pools, comparisons, stored samples, reports."""

from rapidin_vdb.results.comparison import ComparedToken, Comparison
from rapidin_vdb.results.pool import Pool, PooledSample
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
    ReadRecords,
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
    "Pool",
    "PooledSample",
    "RankedSample",
    "RankedToken",
    "Ranking",
    "ReadRecords",
    "Seconds",
    "Span",
    "StoredSample",
    "TokenScore",
    "VerifyReport",
]
