"""The model's tokenizer as the gateway needs it: encode, render a chat, know each token's bytes, decode in steps.

Reads tokenizer.json, the chat template and the end-of-sequence ids of a model directory through transformers' generic fast tokenizer,
which imports no torch (AutoTokenizer does). Long texts are encoded on a thread, so that other clients' streams go on.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexpert.controller.gateway.config import GatewayError
from flexpert.controller.gateway.errors import bad_request
from flexpert.controller.gateway.text import ByteDetokenizer, Detokenizer, WindowDetokenizer

# Encoding runs at a few MB/s: below this size a thread costs more than it hides.
_ENCODE_INLINE_CHARS = 8192
_CONTEXT_TOKENS = 6


class ModelTokenizer:
    """Made by `load`. Thread-safe for encoding."""

    def __init__(self, tokenizer: Any, *, stop_token_ids: tuple[int, ...]) -> None:
        self._chat = tokenizer
        self._fast = tokenizer.backend_tokenizer
        self._fast.no_truncation()
        self._fast.no_padding()
        self.stop_token_ids = stop_token_ids
        self._skipped = {number for number, token in self._fast.get_added_tokens_decoder().items() if token.special}
        self._byte_level = _is_byte_level(self._fast)
        self._bytes_cache: dict[int, bytes] = {}

    @classmethod
    def load(cls, model_dir: Path) -> ModelTokenizer:
        """Raises GatewayError where the directory holds no usable tokenizer.json."""
        if not (model_dir / "tokenizer.json").is_file():
            raise GatewayError(
                f"{model_dir} has no tokenizer.json; save the model's fast tokenizer there (save_pretrained writes it)"
            )
        from transformers import PreTrainedTokenizerFast

        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(model_dir), local_files_only=True)
        except Exception as error:
            raise GatewayError(f"the tokenizer in {model_dir} cannot be read: {error}") from error
        return cls(tokenizer, stop_token_ids=_stop_token_ids(model_dir, tokenizer.eos_token_id))

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text. Raises ApiError where a text is not Unicode (JSON can spell half of a surrogate pair)."""
        texts = list(texts)
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            raise bad_request("The prompt is not Unicode text: it has half of a surrogate pair.") from error
        if sum(map(len, texts)) <= _ENCODE_INLINE_CHARS:
            return self._encode(texts, add_special_tokens)
        return await asyncio.to_thread(self._encode, texts, add_special_tokens)

    def _encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        return [encoding.ids for encoding in self._fast.encode_batch(texts, add_special_tokens=add_special_tokens)]

    def render_chat(self, messages: Sequence[Mapping[str, Any]], template_arguments: Mapping[str, Any]) -> str:
        """The prompt text of a chat. What the template itself refuses becomes a 400 with its words."""
        if not self._chat.chat_template:
            raise bad_request(
                "this model has no chat template; use /v1/completions", param="messages", code="no_chat_template"
            )
        from jinja2 import TemplateError

        arguments = {"add_generation_prompt": True, **template_arguments}
        try:
            return str(self._chat.apply_chat_template(list(messages), tokenize=False, **arguments))
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise bad_request(f"the model's chat template refused these messages: {error}", param="messages") from error

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._fast.decode(token_ids, skip_special_tokens=True))

    def detokenizer(self, *, context_ids: Sequence[int] = ()) -> Detokenizer:
        """A new decoder for one choice; context_ids are the tokens before it, where its text continues theirs."""
        if self._byte_level:
            return ByteDetokenizer(self._text_bytes)
        return WindowDetokenizer(self.decode, context_ids=context_ids[-_CONTEXT_TOKENS:], skipped=self._skipped)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token stands for, special tokens included; b"" for an id that the vocabulary does not name."""
        known = self._bytes_cache.get(token_id)
        if known is None:
            known = self._bytes_cache[token_id] = self._find_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """As log-probabilities name it: its text, or, for a token that is only part of a character, bytes:\\xNN..."""
        data = self.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _text_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._skipped else self.token_bytes(token_id)

    def _find_bytes(self, token_id: int) -> bytes:
        token = self._fast.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            # As tokenizers' ByteLevel decoder does: a token with a character outside the alphabet stands for itself.
            values = [_BYTE_OF_CHARACTER.get(character) for character in token]
            return token.encode() if None in values else bytes(value for value in values if value is not None)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return str(token).replace("\u2581", " ").encode()


def _is_byte_level(fast: Any) -> bool:
    if fast.decoder is None:
        return False
    decoder = json.loads(fast.decoder.__getstate__())
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return [part["type"] for part in parts] == ["ByteLevel"]


def _stop_token_ids(model_dir: Path, eos_token_id: int | None) -> tuple[int, ...]:
    """End-of-sequence ids of the generation config, the config and the tokenizer together."""
    found = set() if eos_token_id is None else {eos_token_id}
    for name in ("generation_config.json", "config.json"):
        path = model_dir / name
        if path.is_file():
            value = json.loads(path.read_text()).get("eos_token_id")
            found.update(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(sorted(found))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: visible Latin-1 characters for themselves, the rest from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + number): byte for number, byte in enumerate(hidden)}


_BYTE_OF_CHARACTER = _byte_alphabet()
