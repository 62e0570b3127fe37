"""The workers behind this gateway: desired against actual, and every live choice with one of them or in the queue.

`set_desired` says which workers there should be; the pool adds, updates and closes links until that is so. Each change that can
free a place (a worker up, a choice done, a new list) runs `_dispatch`, which asks `routing` for each waiting choice in order of arrival.
A lost worker's choices wait again and go, with the tokens that they have, to the next worker that takes them; those that a worker
gives away (Released) go to the worker it names, which has their KV already, or failing that to any other. Workers may have unequal
memory: what is promised is what the smallest one holds, and a choice goes only where it fits.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterable

import msgspec

from flexpert.controller.gateway.config import WorkerAddress
from flexpert.controller.gateway.errors import ApiError, bad_request, internal_error, shutting_down, too_long_now
from flexpert.controller.gateway.link import WorkerLink
from flexpert.controller.gateway.live import LiveChoice, LiveTable
from flexpert.controller.routing import PrefixIndex, WorkerLoad, choose_worker
from flexpert.workers.messages import (
    Cancel,
    Failed,
    Finished,
    Hello,
    PromptLogprobs,
    Released,
    StepOutput,
    TokenOutput,
    Welcome,
)

log = logging.getLogger("flexpert.gateway")

# A request that kills whoever takes it must end some time. Far beyond any number of deaths that has another cause.
_LOST_WORKERS_MAX = 20
# How long a request waits for a worker that could hold it to come back, where those that are there never can.
_COME_BACK_S = 60.0


class WorkerPool:
    """Must be made and called on one running loop. Implements LinkEvents."""

    def __init__(self, *, cluster_token: str, gateway_id: str, model_id: str) -> None:
        self._hello = Hello(cluster_token=cluster_token, gateway_id=gateway_id)
        self._model_id = model_id
        self._links: dict[str, WorkerLink] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._prefixes = PrefixIndex()
        self._known_capacity = 0
        self._limits: Welcome | None = None
        self._limits_known = asyncio.Event()
        self._closed = False
        self._too_long: dict[str, float] = {}  # request -> when it is given up: it waits, and fits no worker there is
        self._giving_up: asyncio.TimerHandle | None = None
        self.connections: Counter[str] = Counter()  # by worker, also of those that are gone
        self.live = LiveTable()

    # What the rest of the gateway asks

    @property
    def links(self) -> list[WorkerLink]:
        return list(self._links.values())

    @property
    def ready(self) -> bool:
        return any(link.connected for link in self._links.values())

    @property
    def capacity_choices(self) -> int:
        """How many choices run at once. A worker that is away for now still counts: its place is not given away while it restarts."""
        return self._known_capacity

    @property
    def limits_known(self) -> bool:
        """Whether `limits` answers at once."""
        return self._limits_known.is_set()

    async def limits(self) -> Welcome:
        """What the workers can do, as the last one said, with the context of the one that holds least: whoever serves must be able to take
        over what another began. Waits where none was ever there."""
        await self._limits_known.wait()
        if self._limits is None:
            raise shutting_down()
        contexts = [link.welcome.max_context_tokens for link in self.links if link.welcome is not None]
        least_tokens = min(contexts, default=self._limits.max_context_tokens)
        return msgspec.structs.replace(self._limits, max_context_tokens=least_tokens)

    def add(self, choices: Iterable[LiveChoice]) -> None:
        for choice in choices:
            self.live.add(choice)
        self._see_who_fits()
        self._dispatch()

    def cancel(self, request_ids: Iterable[str]) -> None:
        """These are no longer wanted. Ids that are done already are ignored."""
        for request_id in request_ids:
            choice = self.live.remove(request_id)
            if choice is not None and choice.worker_id is not None:
                self._links[choice.worker_id].send(Cancel(request_id=request_id))
        self._dispatch()

    def fail_all(self, error: ApiError) -> None:
        for choice in self.live:
            self.live.remove(choice.request_id)
            if choice.worker_id is not None:
                self._links[choice.worker_id].send(Cancel(request_id=choice.request_id))
            choice.sink.on_failed(error)

    def set_desired(self, workers: Iterable[WorkerAddress]) -> None:
        """Reconcile: links for the new, none for the missing, a fresh one where an address changed."""
        if self._closed:
            return
        desired = {worker.worker_id: worker for worker in workers}
        for worker_id, link in list(self._links.items()):
            wanted = desired.get(worker_id)
            if wanted is None or wanted.address != link.target.address:
                self._drop(worker_id, died=not link.target.draining)
                if wanted is None:
                    self._prefixes.forget(worker_id)
            else:
                link.target = wanted
        for worker_id, worker in desired.items():
            if worker_id not in self._links:
                self._links[worker_id] = WorkerLink(worker, hello=self._hello, model_id=self._model_id, events=self)
        for choice in self.live.waiting:  # the list is newer than what the workers said: who is in it takes requests
            choice.avoided_worker_ids = frozenset()
        self._update_capacity()
        self._see_who_fits()
        self._dispatch()

    async def close(self) -> None:
        self._closed = True
        if self._giving_up is not None:
            self._giving_up.cancel()
        self._limits_known.set()
        self._limits = None
        for worker_id in list(self._links):
            self._drop(worker_id)
        await asyncio.gather(*self._closing)

    # What the links tell

    def on_up(self, link: WorkerLink, welcome: Welcome) -> None:
        self.connections[link.worker_id] += 1
        for choice in self.live.waiting:
            choice.avoided_worker_ids -= {link.worker_id}
        self._limits = welcome
        self._limits_known.set()
        self._update_capacity()
        self._see_who_fits()
        self._dispatch()

    def on_down(self, link: WorkerLink) -> None:
        if self._links.get(link.worker_id) is link:
            self._take_back(link.worker_id)
            self._dispatch()

    def on_step(self, link: WorkerLink, frame: StepOutput) -> None:
        worker_id = link.worker_id
        if self._links.get(worker_id) is not link:
            return
        now_s = time.monotonic()
        outputs: list[PromptLogprobs | TokenOutput | Finished] = [
            *frame.prompt_logprobs,
            *frame.tokens,
            *frame.finished,
        ]
        for output in outputs:
            choice = self.live.find(output.request_id, worker_id=worker_id)
            if choice is None:
                continue
            try:
                self._take(choice, output, now_s)
            except Exception:  # of this choice alone: the others in the frame, and the link, go on
                log.exception("worker %s: an output of %s could not be taken", worker_id, choice.request_id)
                self.cancel([choice.request_id])
                choice.sink.on_failed(internal_error())
        if frame.finished:
            self._dispatch()

    def on_released(self, link: WorkerLink, frame: Released) -> None:
        if self._links.get(link.worker_id) is not link:
            return
        found = [self.live.find(request_id, worker_id=link.worker_id) for request_id in frame.request_ids]
        for choice in found:
            if choice is not None:
                self.live.release(choice, target_worker_id=frame.target_worker_id)
        self._see_who_fits()
        self._dispatch()

    def on_failed(self, link: WorkerLink, frame: Failed) -> None:
        choice = self.live.find(frame.request_id, worker_id=link.worker_id)
        if choice is None or self._links.get(link.worker_id) is not link:
            return
        self.live.remove(choice.request_id)
        if frame.code != "invalid_request":
            log.error("worker %s failed %s: %s", link.worker_id, frame.request_id, frame.message)
        choice.sink.on_failed(
            bad_request(frame.message) if frame.code == "invalid_request" else internal_error(frame.message)
        )
        self._dispatch()

    def _take(self, choice: LiveChoice, output: PromptLogprobs | TokenOutput | Finished, now_s: float) -> None:
        if isinstance(output, TokenOutput):
            if choice.accept(output) and choice.sink.on_token(output, now_s):
                self.cancel([choice.request_id])
        elif isinstance(output, Finished):
            self.live.remove(choice.request_id)
            choice.sink.on_finished(output.reason, output.cached_tokens)
        elif not choice.has_prompt_logprobs:
            choice.has_prompt_logprobs = True
            choice.sink.on_prompt_logprobs(output)

    # How a choice finds its worker

    def _dispatch(self) -> None:
        while (found := self._next()) is not None:
            self._give(*found)

    def _next(self) -> tuple[LiveChoice, str] | None:
        """A waiting choice and its worker. First those whose KV is at a worker, which takes them also where it is full; then in order
        of arrival, past those only that all open workers gave away or cannot hold."""
        if not self.ready:
            return None
        waiting = self.live.waiting
        for choice in waiting:
            if choice.target_worker_id and self._is_open_for(choice, choice.target_worker_id):
                return choice, choice.target_worker_id
        for choice in waiting:
            if (worker_id := self._choose(choice)) is not None:
                return choice, worker_id
            if not choice.avoided_worker_ids and any(self._is_open_for(choice, name) for name in self._links):
                return None
        return None

    def _is_open_for(self, choice: LiveChoice, worker_id: str) -> bool:
        link = self._links.get(worker_id)
        return link is not None and link.connected and not link.target.draining and _holds(link, choice)

    def _give(self, choice: LiveChoice, worker_id: str) -> None:
        self.live.assign(choice, worker_id)
        try:
            self._submit(choice, self._links[worker_id])
        except Exception:  # e.g. it cannot be encoded; no later worker would get it either
            log.exception("%s could not be sent to worker %s", choice.request_id, worker_id)
            self.live.remove(choice.request_id)
            choice.sink.on_failed(internal_error())

    def _choose(self, choice: LiveChoice) -> str | None:
        avoided = choice.avoided_worker_ids
        connected = [
            link
            for link in self._links.values()
            if link.connected and link.worker_id not in avoided and _holds(link, choice)
        ]
        seen = self._prefixes.seen_tokens(choice.prompt_token_ids) if len(connected) > 1 else {}
        loads = [self._load(link, seen.get(link.worker_id, 0)) for link in connected]
        return choose_worker(prompt_tokens=len(choice.prompt_token_ids) + len(choice.emitted_token_ids), workers=loads)

    def _load(self, link: WorkerLink, prefix_tokens: int) -> WorkerLoad:
        assert link.welcome is not None
        stats = link.stats
        mine = self.live.of_worker(link.worker_id)
        return WorkerLoad(
            worker_id=link.worker_id,
            in_flight=self.live.count_of(link.worker_id),
            max_running=link.welcome.max_running,
            unstarted_prompt_tokens=sum(
                len(choice.prompt_token_ids) for choice in mine if not choice.emitted_token_ids
            ),
            kv_free_tokens=None if stats is None else stats.kv_capacity_tokens - stats.kv_used_tokens,
            prefix_tokens=prefix_tokens,
            draining=link.target.draining,
        )

    def _submit(self, choice: LiveChoice, link: WorkerLink) -> None:
        end = choice.known_end()
        if end is not None:
            self.live.remove(choice.request_id)
            choice.sink.on_finished(end, None)
            return
        choice.sink.on_submitted(time.monotonic())
        link.send(choice.submit_frame())
        if len(self._links) > 1:
            self._prefixes.record(link.worker_id, choice.prompt_token_ids)

    def _see_who_fits(self) -> None:
        """Who waits and fits no worker there is waits for one that may come back, and not for ever. A worker that has not greeted yet may
        be the one, and so may one that drains: it is there until the list says otherwise."""
        welcomes = [link.welcome for link in self._links.values()]
        known = [welcome.max_context_tokens for welcome in welcomes if welcome is not None]
        if not known or len(known) < len(welcomes):
            return
        now_s, most_tokens = time.monotonic(), max(known)
        too_long = [choice for choice in self.live.waiting if _tokens(choice) > most_tokens]
        self._too_long = {
            choice.request_id: self._too_long.get(choice.request_id, now_s + _COME_BACK_S) for choice in too_long
        }
        for choice in too_long:
            if self._too_long[choice.request_id] <= now_s:
                log.error("%s is given up: no worker has memory for it", choice.request_id)
                del self._too_long[choice.request_id]
                self.live.remove(choice.request_id)
                choice.sink.on_failed(too_long_now(limit_tokens=most_tokens, wanted_tokens=_tokens(choice)))
        if self._giving_up is not None:
            self._giving_up.cancel()
        if self._too_long:
            first_s = min(self._too_long.values()) - now_s
            self._giving_up = asyncio.get_running_loop().call_later(first_s, self._see_who_fits)

    def _take_back(self, worker_id: str, *, died: bool = True) -> None:
        lost = self.live.take_back(worker_id, died=died)
        if lost:
            log.warning("%d requests of worker %s wait for a worker again", len(lost), worker_id)
        for choice in lost:
            if choice.lost_workers >= _LOST_WORKERS_MAX:
                log.error("%s is given up: it lost %d workers without a token", choice.request_id, choice.lost_workers)
                self.live.remove(choice.request_id)
                choice.sink.on_failed(internal_error(f"{choice.lost_workers} workers in a row died with this request."))

    def _drop(self, worker_id: str, *, died: bool = False) -> None:
        link = self._links.pop(worker_id)
        self._take_back(worker_id, died=died)
        task = asyncio.get_running_loop().create_task(link.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _update_capacity(self) -> None:
        """Workers that are away count as before, newcomers like the last one seen: nothing is refused because they are on their way."""
        usual = 0 if self._limits is None else self._limits.max_running
        capacity = sum(usual if link.welcome is None else link.welcome.max_running for link in self._links.values())
        self._known_capacity = capacity or self._known_capacity


def _tokens(choice: LiveChoice) -> int:
    """What the whole of it may come to."""
    return len(choice.prompt_token_ids) + choice.params.max_tokens


def _holds(link: WorkerLink, choice: LiveChoice) -> bool:
    """Whether the worker has memory for the whole of it, whatever else it serves: it said so in its Welcome, and keeps to that."""
    return link.welcome is not None and _tokens(choice) <= link.welcome.max_context_tokens
