"""Which tokens a focus means, and what is said where it means none."""

import re

import pytest
from conftest import byte_tokenizer, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rapidin_vdb.corpus import load_template
from rapidin_vdb.errors import CorpusError, SpecError
from rapidin_vdb.focus import check_focus, focus_of
from rapidin_vdb.query import encode_queries, query_from, read_queries


def merging_tokenizer(*, merges=(), bos=True):
    """One token a byte, but for some pairs; with a beginning-of-sequence token or without."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<s>", "</s>", *alphabet, *(one + other for one, other in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=list(merges)))
    # As one text, so that a token may go on from a prompt into what follows.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def focus_tokens(query, entries, *, tokenizer=None, template="alpaca", max_tokens=512):
    (encoded,) = encode_queries(
        [query], tokenizer=tokenizer or byte_tokenizer(), template=load_template(template), max_tokens=max_tokens,
        focus=entries,
    )  # fmt: skip
    return encoded.focus


@pytest.mark.parametrize("entry", ["b", (0, 1), "bl"])
def test_a_text_in_a_token_that_begins_in_the_prompt(entry):
    """Alpaca's prompt ends with a line break, which this tokenizer puts into one token with a b."""
    tokenizer = merging_tokenizer(merges=[("Ċ", "b")])
    query = query_from("Say", "blue sky")
    if entry == "bl":
        assert focus_tokens(query, [entry], tokenizer=tokenizer) == (0,), "the l has a token of its own"
        return
    with pytest.raises(SpecError) as error:
        focus_tokens(query, [entry], tokenizer=tokenizer)
    said = "'b'" if entry == "b" else "[0, 1]"
    assert str(error.value) == (
        f"--focus {said} belongs to a token of the generation of query that has no loss of its own: one that begins in "
        "the prompt. The first token with a loss begins at character 1 of: 'blue sky'"
    )
    assert focus_tokens(query_from("Say", "blue b"), ["b"], tokenizer=tokenizer) == (4,), "where it stands again"


def test_the_very_first_token():
    with pytest.raises(SpecError, match="the very first of all, which nothing predicts. The first .* 1 of: 'blue sky'"):
        focus_tokens(query_from(None, "blue sky"), ["b"], tokenizer=merging_tokenizer(bos=False), template="text")
    assert focus_tokens(query_from(None, "blue sky"), ["b"], template="text") == (0,)


def test_a_text_behind_the_cut():
    query, options = query_from(None, "blue sky sky"), {"template": "text", "max_tokens": 7}
    with pytest.raises(
        SpecError, match="'sky' is in the generation of query only behind its first 6 tokens, where it was cut"
    ):
        focus_tokens(query_from(None, "blue a sky"), ["sky"], **options)
    assert focus_tokens(query, ["sky"], **options) == (5,)
    # Cut, and yet not for that reason.
    with pytest.raises(SpecError, match="the very first of all"):
        focus_tokens(query, ["b"], tokenizer=merging_tokenizer(bos=False), **options)


@pytest.mark.parametrize(
    ("entry", "text", "hint"),
    [
        ("caf\u00e9", "a cafe\u0301.", r". It is there in another Unicode form, NFD: 'cafe\u0301' instead of 'caf\xe9'"),
        ("cafe\u0301", "a caf\u00e9.", r". It is there in another Unicode form, NFC: 'caf\xe9' instead of 'cafe\u0301'"),
        ("fine", "a \ufb01ne.", r". It is there in another Unicode form or letter case than 'fine': copy it from there"),
        ("CAF\u00e9", "a cafe\u0301.", r". It is there in another Unicode form or letter case than 'CAF\xe9': copy it from there"),
        ("Blue", "so BLUE", ". It is there with other letter case: 'BLUE'"),
        ("a+", "aa", ""),
    ],
)  # fmt: skip
def test_what_looks_the_same_is_pointed_out(entry, text, hint):
    with pytest.raises(SpecError) as error:
        focus_tokens(query_from("Say", text), [entry])
    assert str(error.value) == f"--focus {entry!r} is not in the generation of query, which is: {text!r}{hint}"


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        ((0, 2), "focus has 0; wanted a text of the generation, or a list of texts or of spans"),
        ([("a", "b")], "focus has .'a', 'b'.; wanted"),
        (["a", True], "focus has True; wanted"),
        (["a", ""], "--focus is empty"),
    ],
)
def test_what_is_no_focus_is_refused(tmp_path, entries, found):
    with pytest.raises(SpecError, match=found):
        check_focus(entries)
    with pytest.raises(CorpusError, match=f"line 1: {found}"):
        focus_of(
            read_queries(
                write_jsonl(tmp_path / "q.jsonl", [{"prompt": "Say", "generation": "b", "focus": list(entries)}])
            )[0],
            (),
        )


@pytest.mark.parametrize("entry", ["green", [3, 99], [9, 9]])
def test_a_focus_of_a_file_is_told_with_its_line(tmp_path, entry):
    one = {"query_id": "a", "prompt": "Say", "generation": "blue"}
    path = write_jsonl(tmp_path / "q.jsonl", [one, one | {"query_id": "b", "focus": [entry]}])
    queries = read_queries(path)
    with pytest.raises(SpecError, match=re.escape(f"the generation of b ({path}, line 2)")):
        encode_queries(queries, tokenizer=byte_tokenizer(), template=load_template("alpaca"), max_tokens=512)
