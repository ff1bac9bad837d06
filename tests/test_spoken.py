"""Answers that say more than their content: calls of tools and thoughts, as chat templates write them."""

import json

import pytest
from conftest import save_adapter, save_chat_model, write_jsonl
from test_answers import said_by
from test_chat import ASKING, LOOP, PLAIN, tokenizer_with

import rapidin_vdb
from rapidin_vdb.cli import show
from rapidin_vdb.corpus import Record, encode, load_template, sample_from
from rapidin_vdb.corpus.written import _MARK
from rapidin_vdb.errors import CorpusError
from rapidin_vdb.query import encode_queries, query_from, read_queries

CALLED = "{% for c in m.tool_calls or [] %}{{ '\n' }}<call>{{ c.function | tojson }}</call>{% endfor %}"
START = "<|im_start|>{{ m.role }}"
TEMPLATES = {
    # Calls behind the content, a line each.
    "calls": LOOP + START + "{% if m.content %}{{ '\n' }}{{ m.content }}{% endif %}" + CALLED + "<|im_end|>\n{% endfor %}" + ASKING,
    # Thoughts of what follows the user's last turn only, and an empty one before the last answer.
    "thoughts": "{% set ns = namespace(last=-1) %}" + LOOP + "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    + LOOP + START + "\n{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or m.reasoning_content) %}<think>\n"
    + "{{ (m.reasoning_content or '') | trim }}\n</think>\n\n{% endif %}{{ m.content }}" + CALLED + "<|im_end|>\n{% endfor %}" + ASKING,
    # The model goes on from the beginning of a thought.
    "begun": LOOP + START + "\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    + CALLED + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    # Channels: what an answer begins with depends on what it says; calls end otherwise.
    "channels": LOOP + "{% if m.role != 'assistant' %}" + START + "\n{{ m.content }}<|im_end|>{% else %}"
    + "{% if m.thinking %}<|im_start|>assistant think\n{{ m.thinking }}<|im_end|>{% endif %}"
    + "{% if m.tool_calls %}<|im_start|>assistant call\n{{ m.tool_calls[0].function | tojson }}</s>"
    + "{% else %}<|im_start|>assistant final\n{{ m.content }}<|im_end|>{% endif %}{% endif %}{% endfor %}"
    + "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}",
}  # fmt: skip


def turn(role, content="", **more):
    return {"role": role, "content": content} | more


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


ADD = json.dumps(call("add", a=1)["function"])
"""As the templates write it."""
AGENT = [
    turn("system", "Be kind."),
    turn("user", "1 + 1?"),
    turn("assistant", None, tool_calls=[call("add", a=1)]),
    turn("tool", "2"),
    turn("assistant", "Two."),
    turn("user", "And again?"),
    turn("assistant", "Let me see.", tool_calls=[call("add", a=1), call("add", a=1)]),
    turn("tool", "2"),
    turn("tool", "2"),
    turn("assistant", "Two, twice."),
]


def encoded(messages, name, which="all", **more):
    tokenizer = tokenizer_with(TEMPLATES.get(name, name))
    sample = sample_from(Record(location="here", fields={"messages": messages} | more), turns=which)
    template = load_template("chat", tokenizer=tokenizer)
    (result,) = encode([sample], tokenizer=tokenizer, template=template, max_tokens=9999)
    if isinstance(result, CorpusError):
        raise result
    # Whatever has a loss, the ids are those of fine-tuning.
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.startswith(tokenizer.decode(result.input_ids))
    return result, tokenizer


def shown(found):
    """Return what of the response its tokens stand at, and a bar for each that stands nowhere, as what ends an answer."""
    return "".join(found.response[start:end] or "|" for start, end in dict.fromkeys(found.offsets))


def test_calls_in_all_answers():
    found, tokenizer = encoded(AGENT, "calls")
    calls = f"<call>{ADD}</call>"
    assert said_by(found, tokenizer) == (
        f"{calls}<|im_end|>Two.<|im_end|>Let me see.\n{calls}\n{calls}<|im_end|>Two, twice.<|im_end|>"
    )
    assert found.response == (
        f"{calls}\n\ntool: 2\n\nassistant: Two.\n\nuser: And again?\n\nassistant: Let me see.\n{calls}\n{calls}"
        "\n\ntool: 2\n\ntool: 2\n\nassistant: Two, twice."
    )
    assert shown(found) == f"{calls}|Two.|Let me see.\n{calls}\n{calls}|Two, twice.|"


@pytest.mark.parametrize("which", ["all", "last"])
def test_a_call_as_the_last_answer(which):
    for end in (3, 7):
        found, tokenizer = encoded(AGENT[:end], "calls", which)
        said = {3: f"<call>{ADD}</call>", 7: f"Let me see.\n<call>{ADD}</call>\n<call>{ADD}</call>"}[end]
        assert said_by(found, tokenizer).endswith(said + "<|im_end|>")
        assert found.response.endswith(said)
        if which == "last" or end == 3:
            assert (found.response, found.places) == (said, None) and shown(found) == said + "|"
            assert found.offsets[-1] == (len(said), len(said)), "what ends it stands behind all of it"


@pytest.mark.parametrize("which", ["all", "last"])
def test_thoughts_are_told_where_the_template_writes_them(which):
    talk = [
        turn("user", "a"),
        turn("assistant", "b", reasoning_content="earlier"),
        turn("user", "c"),
        turn("assistant", "", reasoning_content="Hm.", tool_calls=[call("add", a=1)]),
        turn("tool", "2"),
        turn("assistant", "d", reasoning_content=" So. "),
    ]
    found, tokenizer = encoded(talk, "thoughts", which)
    last = "<think>\nSo.\n</think>\n\nd"
    before = f"b<|im_end|><think>\nHm.\n</think>\n\n\n<call>{ADD}</call><|im_end|>" if which == "all" else ""
    assert said_by(found, tokenizer) == f"{before}{last}<|im_end|>" and found.response.endswith(last)
    # A plain answer behind a call, which gets an empty thought: that is no part of it.
    found, tokenizer = encoded([*talk[:5], turn("assistant", "d")], "thoughts", which)
    assert said_by(found, tokenizer) == f"{before}d<|im_end|>"
    # A plain one before a call: what the model is asked with ends there.
    found, tokenizer = encoded(talk[:4], "thoughts", which)
    wanted = f"<think>\nHm.\n</think>\n\n\n<call>{ADD}</call><|im_end|>"
    assert said_by(found, tokenizer) == ("b<|im_end|>" if which == "all" else "") + wanted


def test_a_thought_that_the_model_goes_on_from_is_a_part_of_the_answer():
    talk = [turn("user", "a"), turn("assistant", "b", reasoning_content="c"), turn("user", "d")]
    talk.append(turn("assistant", "e", reasoning_content="f"))
    found, tokenizer = encoded(talk, "begun")
    assert said_by(found, tokenizer) == "<think>\nc\n</think>\n\nb<|im_end|><think>\nf\n</think>\n\ne<|im_end|>"
    assert found.response == "<think>\nc\n</think>\n\nb\n\nuser: d\n\nassistant: <think>\nf\n</think>\n\ne"


def test_what_an_answer_begins_with_may_depend_on_what_it_says():
    talk = [turn("user", "a"), turn("assistant", "b", thinking="c")]
    found, tokenizer = encoded(talk, "channels")
    assert found.response == " think\nc<|im_end|><|im_start|>assistant final\nb"
    assert said_by(found, tokenizer) == found.response + "<|im_end|>"
    found, tokenizer = encoded([*talk[:1], turn("assistant", tool_calls=[call("add", a=1)])], "channels", "last")
    assert found.response == f" call\n{ADD}" and said_by(found, tokenizer) == found.response + "</s>"
    more = [
        turn("user", "a"),
        turn("assistant", tool_calls=[call("add", a=1)]),
        turn("tool", "2"),
        turn("assistant", "b"),
    ]
    assert said_by(*encoded(more, "channels")) == f" call\n{ADD}</s>b<|im_end|>"
    assert said_by(*encoded(more, "channels", "last")) == "b<|im_end|>"


def test_what_the_template_leaves_out_is_lost():
    quiet = TEMPLATES["calls"].replace("tool_calls", "calls")
    with pytest.raises(CorpusError, match=r"messages\[2\] has tool_calls, which would be"):
        encoded(AGENT, quiet)
    with pytest.raises(CorpusError, match="here: the response has reasoning_content, which would be lost"):
        encoded([turn("user", "a"), turn("assistant", "b", reasoning_content="c")], "calls", "last")
    # One of two: what is there does not speak for the other.
    with pytest.raises(CorpusError, match="the response has thinking, which would be lost"):
        encoded([turn("user", "a"), turn("assistant", "b", thinking="c", tool_calls=[call("add", a=1)])], "calls")
    sample = sample_from(Record(location="here", fields={"messages": AGENT[:3]}))
    (found,) = encode([sample], tokenizer=tokenizer_with(PLAIN), template=load_template("text"), max_tokens=99)
    assert isinstance(found, CorpusError) and "the response has tool_calls, which would be lost" in str(found)


@pytest.mark.parametrize(
    ("field", "meant"),
    [("toolCalls", "tool_calls"), ("tool-calls", "tool_calls"), ("reasoningContent", "reasoning_content")],
)
def test_a_field_of_a_turn_in_another_spelling_is_told(field, meant):
    """No template would see it, and what it says would be lost."""
    turns = [turn("user", "a"), turn("assistant", "b", **{field: "c"})]
    with pytest.raises(CorpusError, match=rf"messages\[1\] has a field {field}; is it meant to be {meant}\?"):
        sample_from(Record(location="here", fields={"messages": turns}))
    # Nothing is lost of an empty one, nor where the other is there too; and other fields are the template's.
    for fine in ({field: None}, {field: "c", meant: "[]"}, {"tool": "c", "thought": "c"}):
        assert sample_from(Record(location="here", fields={"messages": [turns[0], turn("assistant", "b", **fine)]}))


def test_arguments_that_are_missing_are_told():
    template = TEMPLATES["calls"].replace("c.function | tojson", "c.function.arguments | tojson")
    talk = [turn("user", "a"), turn("assistant", tool_calls=[{"type": "function", "function": {"name": "add"}}])]
    with pytest.raises(CorpusError, match="writes a field as JSON that is not there, as the arguments of a call"):
        encoded(talk, template)


def test_a_template_that_writes_the_past_otherwise_is_refused():
    # Of the calls before the last turn only the names.
    short = TEMPLATES["calls"].replace(
        "{{ c.function | tojson }}", "{{ c.function | tojson if loop.last else c.function.name }}"
    )
    two = [*AGENT[:2], turn("assistant", tool_calls=[call("add", a=1), call("add", a=1)]), *AGENT[3:5]]
    assert said_by(*encoded(two, short)).startswith("<call>add</call>")
    # What follows an answer stands in it, too, and it is not the same before others: as many letters as turns.
    growing = PLAIN.replace("{{ m.content }}", "{{ 'x' * (messages | length) }}{{ m.content }}" + CALLED) + ASKING
    follows = "<|im_end|>\n<|im_start|>tool\nxxxxxxx2<|im_end|>\n<|im_start|>assistant\nxxxxxxx"
    for content, refused in (("Let me see.", False), (follows, True)):
        talk = [*AGENT[:2], turn("assistant", content, tool_calls=[call("add", a=1)]), *AGENT[3:6], AGENT[9]]
        if refused:
            with pytest.raises(CorpusError, match=r"writes messages\[2\], an answer before the last one, otherwise"):
                encoded(talk, growing)
        else:
            assert (
                said_by(*encoded(talk, growing))
                == f"Let me see.\n<call>{ADD}</call><|im_end|>Two.<|im_end|>Two, twice.<|im_end|>"
            )


def test_calls_that_hold_the_mark_change_nothing():
    called = call("add", a=f"{_MARK}2{_MARK}")
    for weight in (0, 1):
        talk = [*AGENT[:2], turn("assistant", tool_calls=[called], weight=weight), *AGENT[3:]]
        said = said_by(*encoded(talk, "calls"))
        shown = f"<call>{json.dumps(called['function'], ensure_ascii=False)}</call><|im_end|>"
        assert said.startswith(f"{shown}Two.<|im_end|>Let" if weight else "Two.<|im_end|>Let")
    # Also where nothing but marks tells where answers stand: as many letters before each as there are turns.
    growing = PLAIN.replace("{{ m.content }}", "{{ 'x' * (messages | length) }}{{ m.content }}" + CALLED) + ASKING
    talk = [*AGENT[:2], turn("assistant", tool_calls=[called], weight=0), *AGENT[3:]]
    assert said_by(*encoded(talk, growing)).startswith("Two.<|im_end|>Let me see.")


def test_turns_that_call_and_have_no_loss():
    talk = [*AGENT[:2], turn("assistant", tool_calls=[call("add", a=1)], weight=0), *AGENT[3:]]
    found, tokenizer = encoded(talk, "calls")
    calls = f"<call>{ADD}</call>"
    assert said_by(found, tokenizer) == f"Two.<|im_end|>Let me see.\n{calls}\n{calls}<|im_end|>Two, twice.<|im_end|>"
    # Where only the last turn has a loss, weights do not count.
    found, tokenizer = encoded([*talk[:2], talk[2]], "calls", "last")
    assert said_by(found, tokenizer) == f"{calls}<|im_end|>"


@pytest.mark.parametrize("turns", ["last", "all"])
def test_calls_are_stored_asked_and_found(tmp_path, capsys, turns):
    model, tokenizer = save_chat_model(tmp_path / "model", begin="<s>")
    tokenizer.chat_template = TEMPLATES["calls"]
    tokenizer.save_pretrained(model)
    adapter = save_adapter(tmp_path / "adapter", "llama")
    database = rapidin_vdb.init(
        tmp_path / "db", model=str(model), adapter=str(adapter), width=256, template="chat", turns=turns
    )
    said = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi."},
        {"from": "gpt", "value": "Ho."},
    ]
    records = [
        {"id": "calls", "messages": AGENT[:7]},
        {"id": "tells", "messages": AGENT},
        {"id": "shared", "conversations": said},
        {"id": "apart", "conversations": said[1:], "system": "Be brief."},
    ]
    database.ingest(write_jsonl(tmp_path / "a.jsonl", records))
    stored, calls = database.show("calls"), f"<call>{ADD}</call>"
    assert stored.response.endswith(f"Let me see.\n{calls}\n{calls}") and database.verify().findings == ()
    assert [stored.response[start:end] for start, end in stored.token_offsets][-2:] == [">", ""]
    if turns == "last":
        # What tools were called before stands in the prompt, to be read and looked for.
        assert f"assistant: {json.dumps(AGENT[2]['tool_calls'])}\n\ntool: 2" in stored.prompt
        assert database.count("contains(prompt, '\"arguments\"')") == 2
    for name in ("shared", "apart"):
        sample, shown = database.show_turns(name)
        assert [(turn.role, turn.content) for turn in shown] == [
            ("system", "Be brief."), ("user", "Hi."), ("assistant", "Ho."),
        ] and sample.response == "Ho."  # fmt: skip
    exported = {name: (record, exact) for name, record, exact in database.each_record()}
    assert exported["shared"] == (records[2], True) and exported["apart"] == (records[3], True)
    assert not exported["calls"][1]
    # What the model was trained to say is asked about as it is written, or as the turn that it is.
    queries = write_jsonl(tmp_path / "q.jsonl", [{"id": "q", "messages": AGENT[:7], "focus": "<call>"}])
    (asked,) = database.query(queries=read_queries(queries), tokens=True)
    (whole,) = database.query(queries=read_queries(queries), tokens=True, focus=["ignored"])
    text = f"Let me see.\n{calls}\n{calls}"
    (written,) = database.query(
        queries=[rapidin_vdb.query_from(None, text, messages=AGENT[:6])], tokens=True, focus=["<call>"]
    )
    show.ranked([asked], read_queries(queries), as_json=False)
    out = capsys.readouterr().out
    assert "generation: Let me see." in out and "<call>" in out.split("generation:")[1].split("score")[0]
    assert asked.generation == text
    assert [r.score for r in asked.results] == [r.score for r in whole.results] == [r.score for r in written.results]
    found = {r.sample_id: r for r in asked.results}
    assert found["calls"].response == stored.response
    assert "".join(token.text for token in found["calls"].tokens).count("add") == (3 if turns == "all" else 2)


@pytest.mark.parametrize(
    ("template", "answer", "lost"),
    [
        (
            "{% if m.tool_calls %}" + CALLED + "{% else %}{{ m.content }}{% endif %}",
            turn("assistant", "b", tool_calls=[call("add", a=1)]),
            "content",
        ),
        (
            CALLED.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]") + "{{ m.content }}",
            turn("assistant", tool_calls=[call("add", a=1), call("add", a=2)]),
            "tool_calls",
        ),
    ],
)
def test_nothing_that_an_answer_says_is_lost(template, answer, lost):
    whole = PLAIN.replace("{{ m.content }}", template) + ASKING
    for which, more in (("last", []), ("all", [turn("tool", "1"), turn("assistant", "c")])):
        with pytest.raises(CorpusError, match=f"has {lost}, which would be lost"):
            encoded([turn("user", "a"), answer, *more], whole, which)
        # A template that does not know the marks' names tells nothing of them: the words are looked for.
        knowing = (
            "{% if m.tool_calls and m.tool_calls[0].function.name != 'add' %}{{ raise_exception('x') }}{% endif %}"
        )
        with pytest.raises(CorpusError, match=f"has {lost}, which would be lost"):
            encoded([turn("user", "a"), answer, *more], whole.replace(LOOP, LOOP + knowing), which)


def test_what_is_no_call_is_refused():
    with pytest.raises(CorpusError, match=r'in messages\[1\] a call of a tool is "add"; wanted an object with a name'):
        encoded([turn("user", "a"), turn("assistant", tool_calls=["add"])], "calls", "last")


def test_one_thought_under_two_names():
    talk = [turn("user", "a"), turn("assistant", "b", reasoning="c", reasoning_content="c")]
    found, tokenizer = encoded(talk, "begun")
    assert said_by(found, tokenizer) == "<think>\nc\n</think>\n\nb<|im_end|>"
    blank = [turn("user", "a"), turn("assistant", "b", reasoning_content="\n")]
    sample = sample_from(Record(location="here", fields={"messages": blank}))
    assert sample == sample_from(Record(location="here", fields={"messages": blank})) and not sample.turns


@pytest.mark.parametrize("which", ["last", "all"])
def test_turns_behind_the_last_answer_count_as_the_template_has_it(which):
    """A thought that is left out where a user's turn follows has no loss; where it is written, it has."""
    talk = [turn("user", "a"), turn("assistant", "b", reasoning_content="c"), turn("user", "d")]
    with pytest.raises(CorpusError, match="the response has reasoning_content, which would be lost"):
        encoded(talk, "thoughts", which)
    found, tokenizer = encoded([*talk[:2], turn("tool", "d")], "thoughts", which)
    assert said_by(found, tokenizer) == "<think>\nc\n</think>\n\nb<|im_end|>"
    plain = [turn("user", "a"), turn("assistant", "b"), turn("user", "d")]
    found, tokenizer = encoded(plain, "thoughts", which)
    assert tokenizer.decode(found.input_ids) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"
    if which == "all":
        ended = [*plain, turn("assistant", "e", weight=0)]
        assert encoded(ended, "thoughts", which)[0].input_ids == found.input_ids


def test_results_of_tools_in_the_turn_that_called_are_no_part_of_it():
    results = "{% for o in messages[loop.index:] if o.role == 'tool' %}<result>{{ o.content }}</result>{% endfor %}"
    inside = (
        LOOP + "{% if m.role != 'tool' %}" + START + "\n{{ m.content }}" + CALLED + "{% if m.tool_calls %}</s>" + results + "{% endif %}"
        "{% if not m.tool_calls or messages[-1].role != m.role or not loop.last %}<|im_end|>\n{% endif %}{% endif %}{% endfor %}" + ASKING
    )  # fmt: skip
    found, tokenizer = encoded(AGENT[:5], inside)
    assert said_by(found, tokenizer) == f"\n<call>{ADD}</call></s>Two.<|im_end|>"
    assert "<result>2</result>" in tokenizer.decode(found.input_ids) and "result" not in found.response


def test_results_of_tools_that_know_what_was_called():
    """Templates that refuse results which nothing called for, or name them after the call."""
    knowing = (
        "{% set ns = namespace(name='') %}" + LOOP + "{% if m.tool_calls %}{% set ns.name = m.tool_calls[0].function.name %}{% endif %}"
        "{% if m.role == 'tool' and not ns.name %}{{ raise_exception('nothing was called') }}{% endif %}" + START + " {{ ns.name if m.role == 'tool' }}\n"
        "{{ m.content }}" + CALLED + "<|im_end|>\n{% if m.role == 'tool' %}{% set ns.name = '' %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant \n{% endif %}"
    )  # fmt: skip
    found, tokenizer = encoded([*AGENT[:8], turn("assistant", "Two, twice.")], knowing)
    calls = f"\n<call>{ADD}</call>"
    assert (
        said_by(found, tokenizer)
        == f"{calls}<|im_end|>Two.<|im_end|>Let me see.{calls}{calls}<|im_end|>Two, twice.<|im_end|>"
    )


NAMED = (
    "{% set ns = namespace(name='', last=-1) %}" + LOOP + "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}" + LOOP
    + "{% if m.tool_calls %}{% set ns.name = m.tool_calls[0].function.name %}{% endif %}"
    "{% if m.role == 'tool' and not ns.name %}{{ raise_exception('nothing was called') }}{% endif %}" + START + " {{ ns.name if m.role == 'tool' }}\n"
    "{% if m.reasoning_content and loop.index0 > ns.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}" + CALLED
    + "<|im_end|>\n{% if m.role == 'tool' %}{% set ns.name = '' %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant \n{% endif %}"
)  # fmt: skip


@pytest.mark.parametrize("late", [False, True])
def test_thoughts_among_results_that_know_what_was_called(late):
    """Where only what is before an answer tells where it stands: thoughts that are left out are left out there, too."""
    thinking = turn("assistant", tool_calls=[call("add", a=1)], reasoning_content="Hm.")
    talk = [turn("user", "a"), thinking, turn("tool", "2"), turn("assistant", "Two.")]
    found, tokenizer = encoded([*talk, turn("user", "b"), turn("assistant", "c")] if late else talk, NAMED)
    thought, end = ("", "c<|im_end|>") if late else ("<think>Hm.</think>", "")
    assert said_by(found, tokenizer) == f"{thought}\n<call>{ADD}</call><|im_end|>Two.<|im_end|>{end}"


def test_a_thought_whose_beginning_is_given_where_plain_answers_have_an_empty_one():
    begun = TEMPLATES["thoughts"].replace(
        ASKING, "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    assert begun != TEMPLATES["thoughts"]
    talk = [turn("user", "a"), turn("assistant", "b", reasoning_content="c")]
    assert said_by(*encoded(talk, begun)) == "<think>\nc\n</think>\n\nb<|im_end|>"


def test_a_last_answer_that_is_rewritten_has_no_place_behind_calls():
    loud = TEMPLATES["calls"].replace("{{ m.content }}", "{{ m.content | upper }}")
    with pytest.raises(CorpusError, match="here: the chat template writes the response otherwise than an answer to"):
        encoded(AGENT[:5], loud)


def test_plain_answers_among_results_that_know_what_was_called_are_written_as_they_are():
    loud = NAMED.replace("{{ m.content }}", "{{ m.content | upper if loop.index == 4 else m.content }}")
    talk = [*AGENT[1:6], turn("assistant", "c")]
    assert said_by(*encoded(talk, NAMED)) == f"\n<call>{ADD}</call><|im_end|>Two.<|im_end|>c<|im_end|>"
    with pytest.raises(CorpusError, match=r"writes messages\[3\], an answer before the last one, otherwise than it is"):
        encoded(talk, loud)


def test_a_call_behind_a_result_that_is_ended_otherwise_when_the_model_is_asked():
    """Where asking is not the beginning of what is written, the answer is what stands in a plain one's place."""
    ended = TEMPLATES["calls"].replace(
        "<|im_end|>\n{% endfor %}", "<|im_end|>{{ '' if loop.last and m.role == 'tool' else '\n' }}{% endfor %}"
    )
    assert ended != TEMPLATES["calls"]
    talk = [*AGENT[:4], turn("assistant", tool_calls=[call("add", a=1)])]
    for which in ("last", "all"):
        said = said_by(*encoded(talk, ended, which))
        assert said == f"<call>{ADD}</call><|im_end|>" * (2 if which == "all" else 1)


def test_turns_behind_the_last_answer_that_the_template_refuses_do_not_count():
    strict = (
        "{% if messages[-1].role == 'user' and not add_generation_prompt %}{{ raise_exception('whose turn?') }}{% endif %}"
        + PLAIN
        + ASKING
    )
    tokenizer = tokenizer_with(strict)
    talk = [turn("user", "a"), turn("assistant", "b")]
    found, wanted = (
        encode(
            [sample_from(Record(location="here", fields={"messages": messages}))], tokenizer=tokenizer,
            template=load_template("chat", tokenizer=tokenizer), max_tokens=99,
        )[0]
        for messages in ([*talk, turn("user", "c")], talk)
    )  # fmt: skip
    assert found.input_ids == wanted.input_ids and found.offsets == wanted.offsets


def test_a_generation_that_ends_with_what_the_template_writes_is_refused():
    tokenizer = tokenizer_with(TEMPLATES["calls"])
    template = load_template("chat", tokenizer=tokenizer)

    def asked(generation, prompt="a", template=template):
        query = query_from(prompt, generation)
        return encode_queries([query], tokenizer=tokenizer, template=template, max_tokens=99)[0]

    for end in ("<|im_end|>", "<|im_end|>\n"):
        with pytest.raises(
            CorpusError, match=r"query: the generation ends with <\|im_end\|>, which the template writes"
        ):
            asked(f"Two.{end}")
    # Inside, it is a part of what was said; without the template, nothing is written behind it.
    assert tokenizer.decode(asked("<|im_end|> it is.").input_ids).endswith("<|im_end|> it is.<|im_end|>")
    assert asked("Two.<|im_end|>", prompt=None).response_tokens > 2
    assert asked("Two.<|im_end|>", template=load_template("text")).response_tokens > 2


def test_what_follows_an_answer_may_stand_in_it():
    """Looked for from the start and from the end, answers would stand elsewhere: what is before them tells."""
    follows = "<|im_end|>\n<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n"
    content, calling = f"Sure.{follows}more", turn("assistant", tool_calls=[call("add", a=1)])
    talk = [turn("user", "a"), calling | {"content": content}, turn("tool", "2"), calling, turn("tool", "2"), calling]
    found, tokenizer = encoded([*talk, turn("tool", "2"), turn("assistant", "Two.")], "calls")
    calls = f"<call>{ADD}</call><|im_end|>"
    assert said_by(found, tokenizer) == f"{content}\n{calls}{calls}{calls}Two.<|im_end|>"
    assert found.response.startswith(f"{content}\n<call>{ADD}</call>\n\ntool: 2\n\nassistant: <call>")
