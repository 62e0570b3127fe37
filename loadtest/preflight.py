"""What is found out before any load is sent: is the server there, which model, what counts as one token, which parameters it takes.

Every way in which an endpoint can be useless ends in an Unusable whose text says what was found and what to do.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flexpert.loadtest.client import Client
from flexpert.loadtest.events import error_text
from flexpert.loadtest.measure import Outcome
from flexpert.loadtest.prompts import CANDIDATES, PromptKind, Prompts, Template

__all__ = ["Ready", "Unusable", "prepare"]

Count = Callable[[str], Awaitable[int]]
CHECKED_WORDS = 64
IDS_WITHOUT_VOCABULARY = (1000, 8000)


class Unusable(Exception):
    """kind: "unreachable", "unauthorised", "not_found" or "usage"."""

    def __init__(self, kind: Literal["unreachable", "unauthorised", "not_found", "usage"], message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class Ready:
    model: str
    template: Template
    notes: list[str] = field(default_factory=list)


async def prepare(
    client: Client,
    *,
    model: str | None,
    chat: bool,
    kind: PromptKind | None,
    tokenizer: Path | None,
    ignore_eos: bool,
    extra: dict[str, Any],
    seed: int,
) -> Ready:
    """kind None: ids where the server takes them, else words. tokenizer: a directory with a tokenizer.json, for servers that give no
    usage. Raises Unusable."""
    asker = _Asker(client, await _model(client, model), chat=chat, extra=extra)
    ignore_eos = await asker.first(ignore_eos)
    prompts = None
    if kind != "words" and not chat and tokenizer is None:
        prompts = await _ids(asker, seed, wanted=kind == "ids")
    if prompts is None:
        prompts = await _words(asker, seed, None if tokenizer is None else _local_count(tokenizer))
    template = Template(prompts, model=asker.model, chat=chat, ignore_eos=ignore_eos, extra=extra)
    return Ready(asker.model, template, asker.notes)


async def _model(client: Client, wanted: str | None) -> str:
    outcome, body = await client.fetch("GET", "/v1/models")
    if outcome.http_status == 404 and wanted is not None:
        return wanted
    _check(client, outcome, body, "GET /v1/models")
    try:
        models = [str(each["id"]) for each in json.loads(body)["data"]]
    except (ValueError, TypeError, KeyError):
        raise Unusable(
            "unreachable", f"{client.target.url} is no OpenAI server: GET /v1/models gave {error_text(body)}"
        ) from None
    if wanted is None:
        if not models:
            raise Unusable("not_found", f"{client.target.url} lists no model; name one with --model")
        return models[0]
    if models and wanted not in models:
        raise Unusable("not_found", f"no model {wanted!r} at {client.target.url}; it has {', '.join(models)}")
    return wanted


def _check(client: Client, outcome: Outcome, body: bytes, what: str) -> None:
    """Raises Unusable unless it answered 200."""
    url, status = client.target.url, outcome.http_status
    if outcome.end == "ok":
        return
    if status in (401, 403):
        kept = "the API key is wrong" if client.target.key else "it wants an API key: give --api-key"
        raise Unusable("unauthorised", f"{url} refused {what} with {status}, {kept}: {error_text(body)}")
    if status == 404:
        raise Unusable(
            "unreachable", f"{url} has no {what.split()[-1]} (404): is it an OpenAI server, and the URL right?"
        )
    raise Unusable("unreachable", f"{url} is not usable, {what}: {outcome.error}{_hint(client, outcome)}")


def _hint(client: Client, outcome: Outcome) -> str:
    """What to do about an answer that is of no use."""
    if outcome.http_status in (429, 503):
        return "; it is busy or still starting: try again when it is not"
    if outcome.http_status is not None and outcome.http_status >= 500:
        return "; its own log should say why"
    if outcome.end == "timeout":
        return "; is it still starting, or stuck? try again when it answers"
    return "; is it https://?" if not client.target.tls and outcome.error.endswith("without an answer") else ""


class _Asker:
    """Asks for one token at a time and reads the usage."""

    def __init__(self, client: Client, model: str, *, chat: bool, extra: dict[str, Any]) -> None:
        self.client, self.model, self.chat, self.notes = client, model, chat, list[str]()
        self._path = "/v1/chat/completions" if chat else "/v1/completions"
        self._fields: dict[str, Any] = {"model": model, "max_tokens": 1, **extra}

    async def ask(self, prompt: str | list[int], **more: Any) -> tuple[Outcome, bytes]:
        asked = {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        return await self.client.fetch("POST", self._path, json.dumps({**self._fields, **more, **asked}).encode())

    async def first(self, ignore_eos: bool) -> bool:
        """Does it answer at all, and with ignore_eos? Raises Unusable."""
        more = {"ignore_eos": True} if ignore_eos else {}
        outcome, body = await self.ask("the", **more)
        if ignore_eos and outcome.http_status in (400, 422) and b"ignore_eos" in body:
            self.notes.append("the server does not take ignore_eos: answers may be shorter than asked for")
            ignore_eos = False
            outcome, body = await self.ask("the")
        if outcome.http_status == 400:
            raise Unusable("usage", f"{self.client.target.url} refused POST {self._path}: {error_text(body)}")
        _check(self.client, outcome, body, f"POST {self._path}")
        return ignore_eos

    async def count(self, prompt: str | list[int]) -> int:
        """Prompt tokens, by the server's own usage. Raises Unusable where it gives none."""
        outcome, body = await self.ask(prompt)
        _check(self.client, outcome, body, f"POST {self._path}")
        try:
            return int(json.loads(body)["usage"]["prompt_tokens"])
        except (ValueError, TypeError, KeyError):
            raise Unusable(
                "usage",
                f"{self.client.target.url} gives no usage to count tokens by; name its tokenizer: --tokenizer DIRECTORY",
            ) from None


async def _ids(asker: _Asker, seed: int, *, wanted: bool) -> Prompts | None:
    """None where the server takes no ids, or not exactly."""
    outcome, body = await asker.ask([2**31 - 1])
    found = re.search(rb"\(0 to (\d+)\)", body) if outcome.http_status == 400 else None
    size = int(found[1]) + 1 if found else 0
    # The ends of a vocabulary hold special tokens; the middle does not.
    low, high = (size // 10, size * 8 // 10) if size else IDS_WITHOUT_VOCABULARY
    ids = list(range(low, min(high, low + 4096)))
    if len(ids) >= 2:
        outcome, body = await asker.ask([ids[0], ids[-1], *ids[:6]])
        if outcome.end == "ok":
            try:
                counted = json.loads(body)["usage"]["prompt_tokens"]
            except (ValueError, TypeError, KeyError):
                counted = 8
            return Prompts("ids", [str(each) for each in ids], seed=seed, base_tokens=counted - 8)
    if wanted:
        raise Unusable(
            "usage", f"{asker.client.target.url} takes no token ids as prompt ({outcome.error}); try --prompts words"
        )
    asker.notes.append("the server takes no token ids as prompt; prompts are words")
    return None


async def _words(asker: _Asker, seed: int, count: Count | None) -> Prompts:
    """Words that cost one token each: eight of the same tell which."""
    count = count or asker.count
    counts = await asyncio.gather(*(count(" ".join([word] * 8)) for word in CANDIDATES))
    base, _ = Counter(found - 8 for found in counts).most_common(1)[0]
    words = [word for word, found in zip(CANDIDATES, counts, strict=True) if found == base + 8]
    if len(words) < 2 or base < 0:
        raise Unusable("usage", "no words were found that are one token each to this server; try --prompts ids")
    prompts = Prompts("words", words, seed=seed, base_tokens=base)
    counted = await count(prompts.sequence("check", CHECKED_WORDS)[:-1])
    if counted != base + CHECKED_WORDS:
        asker.notes.append(
            f"prompts are not exact: {CHECKED_WORDS} words should be {base + CHECKED_WORDS} tokens and are {counted}"
        )
    return prompts


def _local_count(directory: Path) -> Count:
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.is_file():
        raise Unusable("usage", f"--tokenizer {directory}: expected a directory with a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise Unusable("usage", f"--tokenizer {path}: {error}") from error

    async def count(text: str) -> int:
        return len(tokenizer.encode(text).ids)

    return count
