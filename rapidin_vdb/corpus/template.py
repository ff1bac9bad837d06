"""How the turns before a response are written out for the model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jinja2
import jinja2.sandbox

from rapidin_vdb.errors import CorpusError, SpecError
from rapidin_vdb.records import Sample

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{{ prompt }}\n\n### Response:\n"
)


@runtime_checkable
class ChatTokenizer(Protocol):
    """The part of a tokenizer that knows how its model was spoken to."""

    chat_template: str | None

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> str:
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

    def render(self, sample: Sample) -> str:
        """Return the text that stands before the response.

        Raises:
            CorpusError: the template cannot render this sample.
        """
        if self.name == "jinja":
            return self._render_jinja(sample)
        if sample.prompt is None:
            return ""
        if self.name == "chat":
            return self._render_chat(sample)
        if len(sample.messages) > 1:
            raise CorpusError(
                f"{sample.location}: a conversation of {len(sample.messages)} turns before the response does not fit "
                f"the template {self.name}; make the database with --template chat"
            )
        return _ALPACA.replace("{{ prompt }}", sample.prompt) if self.name == "alpaca" else sample.prompt

    def _render_chat(self, sample: Sample) -> str:
        turns = [{"role": turn.role, "content": turn.content} for turn in sample.messages]
        assert self.tokenizer is not None  # load_template saw to it
        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise CorpusError(f"{sample.location}: the chat template refuses this conversation: {error}") from error

    def _render_jinja(self, sample: Sample) -> str:
        fields = dict(sample.fields)
        # A query has a prompt only; a template written for a record's fields finds it under the usual names too.
        if "instruction" not in fields:
            fields |= {"instruction": sample.prompt or "", "input": ""}
        fields |= {"prompt": sample.prompt or "", "messages": [vars(turn) for turn in sample.messages]}
        try:
            return str(self._compiled.render(fields))
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise CorpusError(f"{sample.location}: the template cannot render this record: {error}") from error


def load_template(name: str, *, tokenizer: ChatTokenizer | None = None, text: str | None = None) -> Template:
    """Return the template of that name, or the Jinja template in that file; `text` stands for the file's content.

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
            return Template(name, str(tokenizer.chat_template), tokenizer)
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


def known_templates() -> Sequence[str]:
    """Return the names that are not files."""
    return ("alpaca", "chat", "text")
