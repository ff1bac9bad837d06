"""Records of any format become samples, and samples become token ids with their prompt masked."""

from rapidin_vdb.corpus.beside import unwritten_fields
from rapidin_vdb.corpus.encode import Tokenizer, as_written, encode
from rapidin_vdb.corpus.files import Record, paths_of, read_lines, read_records
from rapidin_vdb.corpus.restore import Restorer, plain_record
from rapidin_vdb.corpus.samples import by_itself, is_named_by_content, read_corpus, sample_from, sample_id_of
from rapidin_vdb.corpus.shapes import turns_of
from rapidin_vdb.corpus.template import Template, fields_read, load_template
from rapidin_vdb.corpus.turns import taken_apart

__all__ = [
    "Record",
    "Restorer",
    "Template",
    "Tokenizer",
    "as_written",
    "by_itself",
    "encode",
    "fields_read",
    "is_named_by_content",
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
    "unwritten_fields",
]
