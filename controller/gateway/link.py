"""One worker's stream, kept open: connect, greet, read; when it breaks, tell the pool and connect again with a growing pause.

Owned by the pool, which gives it the callbacks. A link never ends by itself: a refusal (wrong token, other model) is reported and
tried again, for its cause may be put right; after an error in the gateway itself the stream is opened anew too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Protocol

from flexpert.controller.gateway.config import WorkerAddress
from flexpert.workers.framing import FrameError, open_stream, worker_frames
from flexpert.workers.messages import Failed, GatewayFrame, Hello, Refused, Released, Stats, StepOutput, Welcome

log = logging.getLogger("flexpert.gateway")

GREETING_TIMEOUT_S = 10.0
_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 2.0


def pause_s(failures: int) -> float:
    """How long to wait after so many failures in a row: 20 ms, doubling to 2 s."""
    return min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(failures, 10))


class LinkEvents(Protocol):
    def on_up(self, link: WorkerLink, welcome: Welcome) -> None: ...

    def on_step(self, link: WorkerLink, frame: StepOutput) -> None: ...

    def on_failed(self, link: WorkerLink, frame: Failed) -> None: ...

    def on_released(self, link: WorkerLink, frame: Released) -> None: ...

    def on_down(self, link: WorkerLink) -> None:
        """The stream is closed; everything that was sent on it is lost."""


class LinkProblemError(Exception):
    """This worker cannot be used now; the text says why."""


class WorkerLink:
    """`welcome` is what the worker said last, also while it is away; `connected` whether it is there now."""

    def __init__(self, target: WorkerAddress, *, hello: Hello, model_id: str, events: LinkEvents) -> None:
        self.target = target
        self.welcome: Welcome | None = None
        self.stats: Stats | None = None
        self.stats_at_s = 0.0
        self.connected = False
        self.problem = "not connected yet"
        self._useful = False  # in this session the worker said more than Welcome
        self._hello = hello
        self._model_id = model_id
        self._events = events
        self._codec = worker_frames()
        self._writer: asyncio.StreamWriter | None = None
        self._task = asyncio.get_running_loop().create_task(self._keep_open(), name=f"link {target.worker_id}")

    @property
    def worker_id(self) -> str:
        return self.target.worker_id

    def send(self, frame: GatewayFrame) -> None:
        """Queue a frame. On a stream that is breaking it is lost, and the next `on_down` says so. Raises where the frame cannot
        be encoded; nothing of it was sent then."""
        data = self._codec.encode(frame)
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(data)

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _keep_open(self) -> None:
        failures = 0
        while True:
            self._useful = False  # the problem stays that of the last attempt until this one ends
            try:
                await self._session()
            except (OSError, TimeoutError, FrameError, LinkProblemError, ValueError) as error:
                self.problem = str(error) or type(error).__name__
                if failures in (0, 8):
                    log.warning("worker %s at %s: %s", self.worker_id, self.target.address, self.problem)
            except Exception as error:
                # A fault of the gateway's own. Were the task to end here, every request would wait for ever.
                self.problem, self._useful = f"an error in the gateway: {type(error).__name__}", False
                log.exception("worker %s at %s: its stream is opened anew", self.worker_id, self.target.address)
            finally:
                self._hang_up()
            failures = 0 if self._useful else failures + 1
            await asyncio.sleep(pause_s(failures))

    async def _session(self) -> None:
        async with asyncio.timeout(GREETING_TIMEOUT_S):
            reader, self._writer = await open_stream(self.target.address)
            self._writer.write(self._codec.encode(self._hello))
            welcome = self._check(await self._codec.read(reader))
        self.welcome, self.stats, self.connected, self.problem = welcome, None, True, ""
        log.info("worker %s (incarnation %d) is connected", self.worker_id, welcome.incarnation)
        self._events.on_up(self, welcome)
        while (frame := await self._codec.read(reader)) is not None:
            self._handle(frame)
        self.problem = "the worker closed the stream"

    def _check(self, answer: object) -> Welcome:
        if isinstance(answer, Refused):
            raise LinkProblemError(f"the worker refused this gateway: {answer.reason}")
        if not isinstance(answer, Welcome):
            found = "the end of the stream" if answer is None else type(answer).__name__
            raise LinkProblemError(f"expected Welcome from the worker, found {found}")
        if answer.model_id != self._model_id:
            raise LinkProblemError(
                f"the worker serves {answer.model_id!r}, this gateway {self._model_id!r}; start both with one model"
            )
        return answer

    def _handle(self, frame: object) -> None:
        self._useful = True
        if isinstance(frame, StepOutput):
            self._events.on_step(self, frame)
        elif isinstance(frame, Stats):
            self.stats, self.stats_at_s = frame, time.monotonic()
        elif isinstance(frame, Failed):
            self._events.on_failed(self, frame)
        elif isinstance(frame, Released):
            self._events.on_released(self, frame)
        else:
            raise FrameError(f"{type(frame).__name__} after the greeting")

    def _hang_up(self) -> None:
        was_connected, self.connected = self.connected, False
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self.stats = None
        if was_connected:
            log.warning("worker %s is gone: %s", self.worker_id, self.problem)
            try:
                self._events.on_down(self)
            except Exception:
                log.exception("worker %s: what it had could not all be given to others", self.worker_id)
