"""Records of any format become samples, and samples become token ids with their prompt masked."""

from rapidin_vdb.corpus.encode import Tokenizer, as_written, encode
from rapidin_vdb.corpus.files import Record, paths_of, read_lines, read_records
from rapidin_vdb.corpus.restore import Restorer, plain_record
from rapidin_vdb.corpus.samples import read_corpus, sample_from, sample_id_of
from rapidin_vdb.corpus.shapes import turns_of
from rapidin_vdb.corpus.template import Template, load_template
from rapidin_vdb.corpus.turns import taken_apart

__all__ = [
    "Record",
    "Restorer",
    "Template",
    "Tokenizer",
    "as_written",
    "encode",
    "load_template",
    "paths_of",
    "plain_record",
    "read_corpus",
    "read_lines",
    "read_records",
    "sample_from",
    "sample_id_of",
    "taken_apart",
    "turns_of",
]
