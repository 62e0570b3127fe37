"""The live requests: what the gateway must remember to carry a request over a worker's death.

A LiveChoice is one Submit with the tokens that came back for it. The table finds it by its id, keeps those that no worker has in
order of arrival, and drops tokens that were seen before (a replacement repeats the last step). Sinks (`output`) are told what is new.
Knows no sockets; the pool calls it.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from typing import Protocol

import msgspec

from flexpert.controller.gateway.errors import ApiError
from flexpert.workers.messages import PromptLogprobs, SamplingParams, Submit, TokenOutput


class ChoiceSink(Protocol):
    """Where the outputs of one choice go. Times are of one monotonic clock, in seconds."""

    def on_submitted(self, now_s: float) -> None: ...

    def on_prompt_logprobs(self, prompt: PromptLogprobs) -> None: ...

    def on_token(self, token: TokenOutput, now_s: float) -> bool:
        """True: the choice ends here by the gateway's own decision (a stop string), the worker need not go on."""

    def on_finished(self, reason: str, cached_tokens: int | None) -> None:
        """cached_tokens: prompt tokens that the worker had already; None where no worker said."""

    def on_failed(self, error: ApiError) -> None: ...


class LiveChoice:
    """One choice of one request, from its arrival to its last token. `worker_id` None: it waits for a worker."""

    __slots__ = (
        "avoided_worker_ids", "choice_index", "emitted_token_ids", "has_prompt_logprobs", "lost_workers", "params", "prompt_token_ids",
        "request_id", "sequence", "sink", "target_worker_id", "worker_id",
    )  # fmt: skip

    def __init__(
        self,
        *,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        choice_index: int,
        sink: ChoiceSink,
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.choice_index = choice_index
        self.sink = sink
        self.emitted_token_ids: list[int] = []
        self.has_prompt_logprobs = False
        self.lost_workers = 0  # since the last new token
        self.worker_id: str | None = None
        self.target_worker_id = ""  # who has its KV: it goes there first
        self.avoided_worker_ids: frozenset[str] = frozenset()  # gave it away, and have not been named as serving since
        self.sequence = 0

    def submit_frame(self) -> Submit:
        params = msgspec.structs.replace(self.params, prompt_logprobs=None) if self.has_prompt_logprobs else self.params
        return Submit(
            request_id=self.request_id,
            prompt_token_ids=self.prompt_token_ids,
            params=params,
            choice_index=self.choice_index,
            emitted_token_ids=self.emitted_token_ids,
        )

    def accept(self, token: TokenOutput) -> bool:
        """Whether the token is new; a repeated one is dropped. Raises ValueError where tokens before it are missing."""
        expected = len(self.emitted_token_ids)
        if token.output_index < expected:
            return False
        if token.output_index > expected:
            raise ValueError(f"output {token.output_index} of {self.request_id} came before output {expected}")
        self.emitted_token_ids.append(token.token_id)
        self.lost_workers = 0
        return True

    def known_end(self) -> str | None:
        """Why nothing is left to do, where the worker died after the last token but before it said so."""
        if len(self.emitted_token_ids) >= self.params.max_tokens:
            last = self.emitted_token_ids[-1]
            return "stop" if last in self.params.stop_token_ids else "length"
        if self.emitted_token_ids and self.emitted_token_ids[-1] in self.params.stop_token_ids:
            return "stop"
        return None


class LiveTable:
    """All live choices by id, and the queue of those that wait for a worker, first come first served."""

    def __init__(self) -> None:
        self._by_id: dict[str, LiveChoice] = {}
        self._waiting: list[LiveChoice] = []
        self._of_worker: dict[str, dict[str, LiveChoice]] = {}
        self._next_sequence = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[LiveChoice]:
        return iter(list(self._by_id.values()))

    @property
    def waiting(self) -> list[LiveChoice]:
        return self._waiting

    def of_worker(self, worker_id: str) -> Iterable[LiveChoice]:
        return self._of_worker.get(worker_id, {}).values()

    def count_of(self, worker_id: str) -> int:
        return len(self._of_worker.get(worker_id, ()))

    def find(self, request_id: str, *, worker_id: str) -> LiveChoice | None:
        """The choice, if it is alive and this worker has it; what anyone else says of it is out of date."""
        choice = self._by_id.get(request_id)
        return choice if choice is not None and choice.worker_id == worker_id else None

    def add(self, choice: LiveChoice) -> None:
        if choice.request_id in self._by_id:
            raise ValueError(f"request id {choice.request_id} is live already")
        choice.sequence = self._next_sequence
        self._next_sequence += 1
        self._by_id[choice.request_id] = choice
        self._waiting.append(choice)

    def assign(self, choice: LiveChoice, worker_id: str) -> None:
        self._waiting.remove(choice)
        choice.worker_id, choice.target_worker_id = worker_id, ""
        self._of_worker.setdefault(worker_id, {})[choice.request_id] = choice

    def take_back(self, worker_id: str, *, died: bool = True) -> list[LiveChoice]:
        """The worker is gone: its choices wait again, in the places that their arrival gives them. died: it counts against them."""
        lost = list(self._of_worker.pop(worker_id, {}).values())
        for choice in lost:
            choice.lost_workers += died
            self._wait(choice)
        return lost

    def release(self, choice: LiveChoice, *, target_worker_id: str) -> None:
        """Its worker gives it away: it waits again in the place that its arrival gives it, for the target before all others."""
        worker_id = choice.worker_id
        assert worker_id is not None
        del self._of_worker[worker_id][choice.request_id]
        choice.target_worker_id = target_worker_id
        choice.avoided_worker_ids |= {worker_id}
        self._wait(choice)

    def _wait(self, choice: LiveChoice) -> None:
        choice.worker_id = None
        bisect.insort(self._waiting, choice, key=lambda waiting: waiting.sequence)

    def remove(self, request_id: str) -> LiveChoice | None:
        choice = self._by_id.pop(request_id, None)
        if choice is None:
            return None
        if choice.worker_id is None:
            self._waiting.remove(choice)
        else:
            self._of_worker[choice.worker_id].pop(request_id)
        return choice
