"""What is told of a corpus before the first gradient: what has no part in one, and what may come a second time."""

import logging

from rapidin_vdb.corpus import fields_read, is_named_by_content, unwritten_fields
from rapidin_vdb.records import Sample
from rapidin_vdb.store import SampleTable, undisturbed
from rapidin_vdb.store.filters import listed

logger = logging.getLogger(__name__)

# So many samples are looked for in the table by their texts, where these are no longer than this together.
_LOOKED_FOR = 32
_CHARACTERS = 20_000
# Of a text that very many have, not all are compared.
_ROWS = 1000
# In an object store all texts of the table would be fetched for them: not where there are so many more.
_TIMES_AS_MANY = 1000
_Texts = tuple[str | None, str]
"""Prompt and response."""


class Notices:
    """Looks at each sample that is to be written, and tells at the end, once, what should be known of them."""

    def __init__(self, table: SampleTable) -> None:
        stored = table.fingerprint
        self._table = table
        self._chat = stored.template == "chat"
        self._read = fields_read(stored.template, stored.template_text)
        self._unheard = 0
        self._first_unheard = ""
        self._unnamed = 0
        self._texts: list[_Texts] = []
        self._step = 1

    def see(self, sample: Sample, *, new: bool) -> None:
        """Look at a sample that is to be written; `new` says that nothing of its id is known."""
        unheard = [name for name in unwritten_fields(sample) if name not in self._read]
        if unheard:
            self._first_unheard = self._first_unheard or f"{sample.location}: {' and '.join(unheard)}"
            self._unheard += 1
        if new and is_named_by_content(sample):
            if self._unnamed % self._step == 0 and len(sample.prompt or "") + len(sample.response) <= _CHARACTERS:
                self._texts.append((sample.prompt, sample.response))
            self._unnamed += 1
            if len(self._texts) == _LOOKED_FOR:
                # Some from all of the corpus, however long it is.
                self._texts, self._step = self._texts[::2], 2 * self._step

    def tell(self) -> None:
        """Say what was seen, if anything."""
        if self._unheard:
            logger.warning(
                "%s of the samples to write have a field whose content has no part in their text, nor in their "
                "gradients, the first in %s. If the model was trained with it, %s",
                f"{self._unheard:,}",
                self._first_unheard,
                "give all that it read as turns (messages)"
                if self._chat
                else "make the database with --template chat, or with a Jinja file that writes the field",
            )
        found = _known_by_text(self._table, self._texts, self._unnamed) if self._texts else 0
        if found:
            logger.warning(
                "%s of the samples to write have no id and are new, yet %d of %d that were looked for have prompt and "
                "response of a sample in the database. A record without an id is known by all of its fields and "
                "values: with one more field, or another name of one, it is ingested a second time. Leave such "
                "records out, or delete the samples of before; where records have ids, as a field id or one that "
                "--id-field names, this is not so",
                f"{self._unnamed:,}",
                found,
                len(self._texts),
            )


@undisturbed
def _known_by_text(table: SampleTable, texts: list[_Texts], many: int) -> int:
    """Return how many of some texts are of a sample in the table; none where it would cost too much to look."""
    snapshot = table.snapshot()
    rows = snapshot.rows()
    if not rows or (table.place.cached and rows > _TIMES_AS_MANY * many):
        return 0
    asked = ("prompt IS NULL" if prompt is None else f"prompt = {listed([prompt])}" for prompt, _ in texts)
    both = [f"({one} AND response = {listed([response])})" for one, (_, response) in zip(asked, texts, strict=True)]
    there = snapshot.page(" OR ".join(both), offset=0, limit=_ROWS)
    known = {(stored.prompt, stored.response) for stored in there}
    return sum(one in known for one in texts)
