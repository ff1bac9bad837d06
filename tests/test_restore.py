"""Stored samples become the records they were read from: exactly where their hash proves it, else without what was lost."""

from dataclasses import replace

import pytest

from rapidin_vdb.corpus import Record, Restorer, plain_record, sample_from


def stored(fields: dict, **options):
    """A sample as a database gives it back: without its turns and its fields."""
    return replace(sample_from(Record(location="here", fields=fields), **options), messages=(), fields={}, location="")


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello.\n\nAnd more: so."},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Name a fruit."},
    {"role": "assistant", "content": "A pear."},
]
NAMES = {"user": "human", "assistant": "gpt", "system": "system"}
SHAREGPT = [{"from": NAMES[turn["role"]], "value": turn["content"]} for turn in TALK]
EXACT = [
    {"id": "a", "instruction": "Name a fruit.", "output": "A pear.", "stars": 3, "share": 0.5, "good": True},
    {"id": 17, "instruction": "Name a fruit.", "input": "", "output": "A pear."},
    {"instruction": "Name a fruit.\nOr two.", "input": "red\ngreen", "output": "A pear.", "split": "dev"},
    {"id": "017", "prompt": "Name a fruit.", "response": "A pear.", "source": "forum"},
    {"prompt": "Name a fruit.", "completion": "A pear.", "split": "train", "source": "forum"},
    {"id": "a", "text": "Once upon a time."},
    {"id": "a", "messages": TALK[3:]},
    {"id": "a", "messages": TALK, "tokens": 4, "rank": "x", "prompt": "further"},
    {"messages": TALK[4:]},
    {"id": "a", "conversations": SHAREGPT, "stars": 3},
    {"conversations": SHAREGPT[1:], "system": "Be brief."},
    {"conversations": SHAREGPT[3:]},
]


@pytest.mark.parametrize("fields", EXACT, ids=str)
def test_what_has_the_same_hash_is_the_same(fields):
    assert Restorer().restored(stored(fields)) == fields
    # What was said at the ingest is not taken for the record's; where it took the place of that, this is lost.
    said = fields if not {"split", "source"} & set(fields) else None
    assert Restorer().restored(stored(fields, split="other", source="elsewhere")) == said
    assert Restorer().restored(replace(stored(fields), content_hash="of another")) is None
    together = Restorer()
    for some in (*EXACT, fields, *EXACT):  # whatever fitted those before
        assert together.restored(stored(some)) == some


LOST = [
    {"id": "a", "instruction": "Name a fruit.", "output": "A pear.", "tags": ["fruit"], "tokens": 4},
    {"id": "a", "messages": [*TALK, {"role": "user", "content": "Thank you."}], "note": "x", "prompt": "further"},
    {"id": "a", "messages": [TALK[0] | {"name": "x"}, *TALK[1:]], "output": "not the response", "instruction": "no"},
    {"id": "a", "text": "Once upon a time.", "empty": None},
    {"id": "a", "prompt": "Name a fruit.", "response": "A pear.", "a.b": 1},
]


@pytest.mark.parametrize("fields", LOST, ids=str)
def test_what_was_not_kept_is_not_made_up(fields):
    sample = stored(fields)
    assert Restorer().restored(sample) is None
    again = stored(plain_record(sample))
    for name in ("sample_id", "prompt", "response", "split", "source"):
        assert getattr(again, name) == getattr(sample, name)
    # A further field that would be taken for the conversation is left out.
    kept = {name: value for name, value in sample.metadata.items() if name not in ("output", "instruction")}
    assert again.metadata == kept
    assert "record_tokens" not in plain_record(sample), "it has its own name again"
    turns = [{name: turn[name] for name in ("role", "content")} for turn in fields.get("messages", ())]
    assert plain_record(sample).get("messages", []) == turns[:5], "a conversation stays one"


def test_a_corpus_that_cannot_be_restored_costs_little(monkeypatch):
    tried = []
    monkeypatch.setattr("rapidin_vdb.corpus.restore._SEARCHED_IN_VAIN", 3)
    monkeypatch.setattr("rapidin_vdb.corpus.restore.hash_of", lambda *values: tried.append(values))
    restorer = Restorer()
    for _ in range(3):
        assert restorer.restored(stored(LOST[0])) is None
    searched = len(tried)
    assert searched > 3
    assert restorer.restored(stored(LOST[0])) is None and len(tried) == searched
