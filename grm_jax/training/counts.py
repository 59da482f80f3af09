"""Token counts of prompts, kept in the run directory: a resumed run does not count them again.

    RUN/lengths.json    {"of": checksum, "counts": {record: {"judge 0,1": 45}}}

A count belongs to the record's text, a kind of prompt and an order of the responses, and to the
tokenizer and the templates, whose checksum is `of`: a file of others is not read. The file is
there to save time alone, and may be deleted.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from grm_jax import files
from grm_jax.data.preferences import Preference
from grm_jax.parallel.multihost import first

log = logging.getLogger("grm_jax")


class Counts:
    """Counts by kind of prompt, record and order.

    Args:
      file: where they are kept; None: nowhere.
      of: a checksum of all that they depend on besides the records.
    """

    def __init__(self, file: Path | None = None, of: str = ""):
        self._file, self._of = file, of
        self._counts = self._read()
        self._unchecked, self._changed = bool(self._counts), False
        self._digests: dict[str, tuple[Preference, str]] = {}

    def get(
        self,
        kind: str,
        record: Preference,
        order: Sequence[int],
        tokens: Callable[[Sequence[int]], int],
    ) -> int:
        """`tokens(order)`, computed once. The first count from a file is computed nevertheless: if
        it is another one, the file is of another version, and nothing of it is used."""
        counts = self._counts.setdefault(self._digest(record), {})
        name = f"{kind} {','.join(map(str, order))}"
        if name in counts and self._unchecked:
            self._unchecked = False
            if tokens(order) != counts[name]:
                log.warning("%s is of another version; prompts are counted again", self._file)
                self._counts.clear()
                return self.get(kind, record, order, tokens)
        if name not in counts:
            counts[name] = tokens(order)
            self._changed = True
        return counts[name]

    def save(self) -> None:
        """Write the file, if there is anything new and a run directory to write it to."""
        if self._file is None or not self._changed or not self._file.parent.is_dir():
            return
        self._changed = False
        if first():
            text = json.dumps({"of": self._of, "counts": self._counts})
            with files.written_whole(self._file) as partial:
                partial.write_text(text, encoding="utf-8")

    def _read(self) -> dict[str, dict[str, int]]:
        if self._file is None or not self._file.is_file():
            return {}
        try:
            kept = json.loads(self._file.read_text(encoding="utf-8"))
            return dict(kept["counts"]) if kept["of"] == self._of else {}
        except (ValueError, KeyError, TypeError):
            log.warning("%s is damaged; prompts are counted again", self._file)
            return {}

    def _digest(self, record: Preference) -> str:
        """A checksum of the record's text. A shortened copy of a record has its id, so the record
        itself is compared."""
        known, digest = self._digests.get(record.id, (None, ""))
        if known is not record:
            content = [record.turns, record.responses, record.labels, record.reference]
            text = json.dumps([*content, record.principles])
            digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
            self._digests[record.id] = record, digest
        return digest
