"""Prompts of an exact number of tokens, cheap enough to be made while the load runs.

A prompt is a sequence of pieces, each of them one token to the server: token ids where it takes them, else words that
were found to cost one each. Its first pieces spell a key, so prompts of different keys share no prefix, and the same key
begins alike at any length: that is how shared prefixes and the turns of a conversation are made.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from flexpert.loadtest.schedule import Arrival

__all__ = ["CANDIDATES", "PromptKind", "Prompts", "Template", "Turn"]

PromptKind = Literal["ids", "words"]
RING = 1 << 15  # pieces; where a key's sequence begins in it is drawn from the key
KEY_PIECES = 6
# One token each in most vocabularies; which of them are, the server is asked.
_WORDS = """the of and time people way day man thing world life hand part child place work case point number group fact a in on to is
was for it with as be at by not are from that this have or had but what all were when we there can an your which their if"""
CANDIDATES = tuple(_WORDS.split())


class Prompts:
    """pieces: what is joined. base_tokens: what a prompt costs besides them (special tokens, a chat template)."""

    def __init__(self, kind: PromptKind, pieces: list[str], *, seed: int, base_tokens: int = 0) -> None:
        if len(pieces) < 2:
            raise ValueError(f"found {len(pieces)} pieces, expected 2 or more")
        self.kind, self.base_tokens, self._seed = kind, base_tokens, seed
        self._pieces = [f"{piece}," if kind == "ids" else f"{piece} " for piece in pieces]
        order = np.random.default_rng(seed).integers(0, len(pieces), RING)
        drawn = [self._pieces[i] for i in order]
        self._ring = "".join(drawn)
        self._starts = [0, *np.cumsum([len(piece) for piece in drawn]).tolist()]

    def sequence(self, key: str, count: int) -> str:
        """The first `count` pieces of this key's, which has no end."""
        digest = zlib.crc32(key.encode(), self._seed & 0xFFFFFFFF) | zlib.adler32(f"{self._seed}/{key}".encode()) << 32
        number, head = digest, []
        for _ in range(min(KEY_PIECES, count)):
            number, digit = divmod(number, len(self._pieces))
            head.append(self._pieces[digit])
        parts, left, at = ["".join(head)], count - len(head), digest % RING
        while left > 0:
            end = min(RING, at + left)
            parts.append(self._ring[self._starts[at] : self._starts[end]])
            left -= end - at
            at = 0
        return "".join(parts)

    def text(self, arrival: Arrival, index: int) -> str:
        """Pieces of the whole prompt, joined but not closed: "17,4," or "the way "."""
        left = max(1, arrival.prompt_tokens - self.base_tokens)
        parts = []
        for block in arrival.prefix:
            size = min(left, arrival.prefix_block_tokens)
            parts.append(self.sequence(f"prefix {block}", size))
            left -= size
            if not left:
                break
        if left:
            parts.append(self.sequence(f"session {arrival.session}" if arrival.session else f"request {index}", left))
        return "".join(parts)


@dataclass(frozen=True)
class Turn:
    """What was said before in a conversation: (role, text), the oldest first."""

    said: tuple[tuple[str, str], ...] = ()

    def then(self, prompt: str, answer: str) -> Turn:
        return Turn((*self.said, ("user", prompt), ("assistant", answer)))


class Template:
    """A request's body, but for what changes from one to the next."""

    def __init__(self, prompts: Prompts, *, model: str, chat: bool, ignore_eos: bool, extra: dict[str, Any]) -> None:
        self.prompts, self.chat = prompts, chat
        self.path = "/v1/chat/completions" if chat else "/v1/completions"
        self._limit = "max_tokens"
        fields = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
        fields |= {"ignore_eos": True} if ignore_eos else {}
        self._rest = json.dumps({**fields, **extra})[1:]

    def body(self, arrival: Arrival, index: int) -> bytes:
        """Of a request that stands alone."""
        text = self.prompts.text(arrival, index)
        if self.prompts.kind == "ids":
            asked = f'"prompt": [{text[:-1]}]'
        elif self.chat:
            asked = f'"messages": [{{"role": "user", "content": "{text[:-1]}"}}]'
        else:
            asked = f'"prompt": "{text[:-1]}"'
        return f'{{{asked}, "{self._limit}": {arrival.output_tokens}, {self._rest}'.encode()

    def body_of_turn(self, before: Turn, prompt: str, output_tokens: int) -> bytes:
        """The conversation so far and what is said now, as text."""
        said = (*before.said, ("user", prompt))
        if self.chat:
            asked = '"messages": ' + json.dumps([{"role": role, "content": text} for role, text in said])
        else:
            asked = '"prompt": ' + json.dumps("".join(text for _, text in said))
        return f'{{{asked}, "{self._limit}": {output_tokens}, {self._rest}'.encode()
