"""From token ids to text, one token at a time: no character is ever cut, no stop string ever shown.

A Detokenizer turns ids into text as soon as their bytes are whole characters; a StopScanner holds text back as long as it
could be the beginning of a stop string. Pure; used by `output`, one pair for each choice.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Container, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
# A UTF-8 character has at most four bytes, and a token at least one: text that ends in a replacement character is waited for no longer.
_TOKENS_OF_A_CHARACTER = 4


class Detokenizer(Protocol):
    def step(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is incomplete."""

    def flush(self) -> str:
        """The end: what is left, incomplete characters as U+FFFD."""


class ByteDetokenizer:
    """For byte-level vocabularies: a token is bytes, text is their UTF-8 (the same as decoding all at once)."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def step(self, token_id: int) -> str:
        return self._decoder.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For every other vocabulary: decode a short window with and without the new tokens and take the difference.

    `context_ids` come before the text and are not part of it: with them a sentencepiece vocabulary keeps the space of a first word.
    Ids in `skipped` (special tokens) have no text.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], *, context_ids: Sequence[int] = (), skipped: Container[int] = ()
    ) -> None:
        self._decode = decode
        self._skipped = skipped
        self._ids = [token_id for token_id in context_ids if token_id not in skipped]
        self._read = len(self._ids)
        self._known = decode(self._ids) if self._ids else ""

    def step(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT) and len(self._ids) - self._read < _TOKENS_OF_A_CHARACTER:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        return self._advance(self._decode(self._ids)) if self._read < len(self._ids) else ""

    def _advance(self, text: str) -> str:
        new = text[len(self._known) :]
        if new:
            # The tokens just shown are the context of the next ones.
            self._ids = self._ids[self._read :]
            text = self._decode(self._ids)
        self._read = len(self._ids)
        self._known = text
        return new


class StopScanner:
    """Releases text up to the first stop string; whatever could still become one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped = False

    def feed(self, text: str, *, scan: bool = True) -> str:
        """Text that may be shown now. After `stopped` nothing more is released. scan=False: too early to stop."""
        if self.stopped:
            return ""
        text = self._held + text
        self._held = ""
        if not self._stops or not scan:
            return text
        found = min((at for at in map(text.find, self._stops) if at >= 0), default=-1)
        if found >= 0:
            self.stopped = True
            return text[:found]
        keep = self._partial_match(text)
        if keep:
            self._held = text[-keep:]
            return text[:-keep]
        return text

    def flush(self) -> str:
        """The end of the text: what was held back is not a stop string after all."""
        held, self._held = self._held, ""
        return held

    def _partial_match(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
