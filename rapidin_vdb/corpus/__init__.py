"""Records of any format become samples, and samples become token ids with their prompt masked."""

from rapidin_vdb.corpus.encode import Tokenizer, encode
from rapidin_vdb.corpus.files import Record, read_records
from rapidin_vdb.corpus.restore import Restorer, plain_record
from rapidin_vdb.corpus.samples import read_corpus, sample_from
from rapidin_vdb.corpus.template import Template, load_template
from rapidin_vdb.corpus.turns import taken_apart

__all__ = [
    "Record",
    "Restorer",
    "Template",
    "Tokenizer",
    "encode",
    "load_template",
    "plain_record",
    "read_corpus",
    "read_records",
    "sample_from",
    "taken_apart",
]
