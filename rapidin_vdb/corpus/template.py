"""How the turns before a response are written out for the model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jinja2
import jinja2.meta
import jinja2.sandbox

from rapidin_vdb.corpus.samples import by_itself
from rapidin_vdb.corpus.shapes import is_conversation
from rapidin_vdb.corpus.turns import said_beside
from rapidin_vdb.corpus.written import Written, mark_unlike
from rapidin_vdb.errors import CorpusError, SpecError
from rapidin_vdb.records import Message, Sample

# In the fingerprint, behind a chat template that writes the response, too. Databases that were made before it did have
# the template alone; they go on as they were: prompt, response, end-of-sequence token.
_WHOLE = "{#- with the response -#}"
# Some write the day: samples and queries of different days would differ. All are of the day that Llama 3.2 takes where
# it is told none, a Friday. Callables cannot be handed to a chat template, but one can define a macro.
_DAY = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(
        f" | replace('%{letter}', '{value}')"
        for letter, value in (
            ("d", "26"), ("-d", "26"), ("e", "26"), ("b", "Jul"), ("B", "July"), ("m", "07"), ("-m", "7"),
            ("Y", "2024"), ("y", "24"), ("A", "Friday"), ("a", "Fri"), ("F", "2024-07-26"), ("H", "12"), ("M", "00"),
            ("S", "00"),
        )
    )
    + " }}{%- endmacro %}"
)  # fmt: skip
THOUGHT = "<think>"
"""With which some let the model go on, and answers begin."""
_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError, AttributeError)

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{{ prompt }}\n\n### Response:\n"
)


@runtime_checkable
class ChatTokenizer(Protocol):
    """The part of a tokenizer that knows how its model was spoken to."""

    chat_template: str | None

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> str:
        """Write a conversation out."""
        ...


@dataclass(frozen=True, eq=False)
class Template:
    """Renders the prompt of a sample; a sample that is all response has none."""

    name: str
    """`alpaca`, `chat`, `text` or `jinja`."""
    text: str
    """Source of the template, kept in the fingerprint."""
    tokenizer: ChatTokenizer | None = None
    """Needed by `chat` alone."""
    _compiled: Any = field(default=None)

    @cached_property
    def markers(self) -> frozenset[str]:
        """The texts of the tokens that were added to the tokenizer's vocabulary, such as those between turns."""
        tokenizer: Any = self.tokenizer
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        return frozenset(text for text in added if text.strip())  # some have runs of spaces, too

    @property
    def whole(self) -> bool:
        """Whether it is a chat template that writes a response and its end, too."""
        return self.name == "chat" and self.text.endswith(_WHOLE)

    def fitting(self, sample: Sample) -> Sample:
        """Return a sample without the turns from fields beside its conversation, where these cannot be written."""
        alone = by_itself(sample)
        if alone is sample or not self.whole:
            return alone
        # By what a template wrote beside its contents, a sample is known as one with all of its turns.
        if any(said_beside(turn) for turn in sample.turns):
            return sample
        try:
            self.render(sample)
        except CorpusError:
            return alone  # some refuse a turn of the system's
        return sample

    def write(self, sample: Sample, behind: Sequence[Message] = ()) -> Written:
        """Return the text that the model is trained on, as it is written where some turns stand behind the response.

        A chat template writes all of the conversation, as for fine-tuning.

        Raises:
            CorpusError: the template cannot render this sample.
        """
        response = sample.response
        if not self.whole or sample.prompt is None:
            before = self.render(sample)
            return Written(before + response, len(before), response)
        before, stands, after = self._parts(sample, behind)
        end = after[: self.marker(after)[1]]
        return Written(
            before + stands + end, len(before), stands, response.index(stands), special=False, ended=bool(end)
        )

    def marker(self, text: str) -> tuple[int, int]:
        """Return where the first marker of a text begins and ends; both are 0 where there is none."""
        found = [(text.index(marker), -len(marker)) for marker in self.markers if marker in text]
        start, length = min(found, default=(0, 0))
        return start, start - length

    def end(self, sample: Sample) -> str:
        """Return the text with which a response ends, where the template writes one.

        Raises:
            CorpusError: the template cannot render this sample.
        """
        written = self.write(self.fitting(sample))
        return written.text[written.start + len(written.response) :]

    def _parts(self, sample: Sample, behind: Sequence[Message]) -> tuple[str, str, str]:
        """Return what a chat template writes before a response, the response as it stands there, and what follows."""
        response, asked = sample.response, self.render(sample)
        mark = mark_unlike((*sample.messages, *behind))
        try:
            around, text = (self._chat(sample, said, behind) for said in (mark, response))
        except CorpusError:
            return asked, response, ""  # some refuse a conversation that ends with an answer
        parts = around.split(mark)
        before, after = parts if len(parts) == 2 else (asked, "")
        stands = text[len(before) : len(text) - len(after)]
        whole = text.startswith(before) and text.endswith(after)
        # But for space around it.
        if len(parts) == 2 and whole and stands in response and stands.strip() == response.strip():
            return before, stands, after
        # It is rewritten, as the thoughts of an answer may be: it follows what the model goes on from.
        if text.startswith(asked + response):
            after = text[len(asked + response) :]
        start, stop = self.marker(after)
        begun = asked.rstrip()[-len(THOUGHT) :] == THOUGHT and response.lstrip().startswith(THOUGHT)
        return asked[: asked.rindex(THOUGHT)] if begun else asked, response, after[start:stop]

    def render(self, sample: Sample) -> str:
        """Return the text that stands before the response.

        Raises:
            CorpusError: the template cannot render this sample.
        """
        if not self.whole:
            sample = by_itself(sample)
        if self.name == "jinja":
            return self._render_jinja(sample)
        if sample.prompt is None:
            return ""
        if self.name == "chat":
            return self._chat(sample, None)
        if len(sample.messages) > 1:
            raise CorpusError(
                f"{sample.location}: a conversation of {len(sample.messages)} turns before the response does not fit "
                f"the template {self.name}; make the database with --template chat"
            )
        return _ALPACA.replace("{{ prompt }}", sample.prompt) if self.name == "alpaca" else sample.prompt

    def _chat(self, sample: Sample, response: str | None, behind: Sequence[Message] = ()) -> str:
        """Return a conversation with a response, or with what a response is to follow."""
        answer = [] if response is None else [Message(role="assistant", content=response), *behind]
        return self.chat(sample, [*sample.messages, *answer], asking=response is None)

    def chat(self, sample: Sample, turns: Sequence[Message], *, asking: bool = False) -> str:
        """Return what a chat template writes of some turns of a sample, and if `asking`, before an answer to them.

        Raises:
            CorpusError: the template refuses them.
        """
        conversation: list[dict[str, Any]] = [{"role": turn.role, "content": turn.content} for turn in turns]
        options: dict[str, Any] = {}
        if self.whole:
            conversation = [dict(turn.more) | one for turn, one in zip(turns, conversation, strict=True)]
            if "strftime_now" in self.text:
                options["chat_template"] = _DAY + self.text.removesuffix(_WHOLE)
            if is_conversation(sample.fields) and "tools" in self.text:
                options["tools"] = _tools(sample)
        assert self.tokenizer is not None  # load_template saw to it
        try:
            return self.tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=asking, **options
            )
        except _REFUSALS as error:
            raise CorpusError(
                f"{sample.location}: the chat template refuses this conversation: {_reason(error)}"
            ) from error

    def _render_jinja(self, sample: Sample) -> str:
        # A query has a prompt only; a template written for a record's fields finds it under the usual names too.
        fields = {"instruction": sample.prompt or "", "input": ""} | dict(sample.fields)
        turns = [dict(turn.more) | {"role": turn.role, "content": turn.content} for turn in sample.messages]
        fields |= {"prompt": sample.prompt or "", "messages": turns}
        try:
            return str(self._compiled.render(fields))
        except _REFUSALS as error:
            raise CorpusError(f"{sample.location}: the template cannot render this record: {_reason(error)}") from error


def load_template(name: str, *, tokenizer: ChatTokenizer | None = None, text: str | None = None) -> Template:
    """Return the template of that name, or the Jinja template in that file.

    `text` is what a fingerprint says of it: the file's content, or how a chat template is used.

    Raises:
        SpecError: no such template, a syntax error, or a tokenizer without a chat template.
    """
    match name:
        case "alpaca":
            return Template(name, _ALPACA)
        case "text":
            return Template(name, "{{ prompt }}")
        case "chat":
            if not isinstance(getattr(tokenizer, "chat_template", None), str):
                raise SpecError(
                    "--template chat: this model's tokenizer has no chat template; give alpaca, text or a file"
                )
            assert tokenizer is not None
            own = str(tokenizer.chat_template)
            return Template(name, own if text == own else own + _WHOLE, tokenizer)
    if text is None:
        path = Path(name)
        if not path.is_file():
            raise SpecError(f"--template {name}: no such file; give alpaca, chat, text or a Jinja file")
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"--template {name}: cannot be read: {error}") from error
    # Sandboxed: a template travels with its database and must not be able to do more than write text.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    try:
        return Template("jinja", text, None, environment.from_string(text))
    except jinja2.TemplateSyntaxError as error:
        raise SpecError(f"--template {name}: line {error.lineno}: {error.message}") from error


def fields_read(name: str, text: str) -> frozenset[str]:
    """Return which fields of a record a template of that name and source reads by themselves: a Jinja file alone does.

    >>> sorted(fields_read("jinja", "{% if system is defined %}{{ system }}{% endif %}{{ prompt }}"))
    ['prompt', 'system']
    """
    if name != "jinja":
        return frozenset()
    return frozenset(jinja2.meta.find_undeclared_variables(jinja2.Environment(autoescape=True).parse(text)))


def _reason(error: Exception) -> str:
    """Return an error of Jinja's as a user can use it: its filter tojson speaks of itself where a field is missing."""
    if isinstance(error, TypeError) and "Undefined is not JSON" in str(error):
        return "it writes a field as JSON that is not there, as the arguments of a call of a tool"
    return str(error)


def _tools(sample: Sample) -> Any:
    """Return the tools that a record speaks of; some data sets hold them as a JSON text."""
    tools = sample.fields.get("tools") or None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{sample.location}: tools is a text that is no JSON: {error}") from error
    return tools or None
