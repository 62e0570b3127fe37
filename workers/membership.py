"""How a worker gets from one epoch to the next: prepare beside the running one, commit in one flip, retire what nobody needs, or abort.

    prepare   make room, fetch what is missing of the share, map it compactly, connect the ranks     (nothing of this stops a step)
    commit    the engine flips together with its peers; a leaver gives its requests back
    retire    close the former epochs, drop slabs that are no longer held, let KV have the memory
    abort     before the flip: close, unmap and drop what prepare made

Each can be repeated: what is done already is answered as it was. Called from any thread but the engine's, which only ever runs the
short functions that are handed to it between two steps. Owned by `workers.process`; knows nothing of Ray.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from flexpert.workers.devices import give_back_unused, is_cuda
from flexpert.workers.engine import Engine
from flexpert.workers.ep import EpochExperts, ExpertExchange
from flexpert.workers.epoch import Epoch
from flexpert.workers.fetch import Source, Weights
from flexpert.workers.group import Group, NextEpoch, Trouble, TroubleBell
from flexpert.workers.heap import give_back_free_memory
from flexpert.workers.kv_move import KvSender
from flexpert.workers.kv_space import KvSpace
from flexpert.workers.model import BoundModel, expert_segments
from flexpert.workers.model.layout import is_experts
from flexpert.workers.orders import Orders
from flexpert.workers.prepared import MembershipError, PreparedEpoch
from flexpert.workers.scheduler import Scheduler
from flexpert.workers.transport import Transport

log = logging.getLogger(__name__)

T = TypeVar("T")
BETWEEN_STEPS_TIMEOUT_S = 60.0
COPY_MARGIN_S = 1.0  # of a prepare's time, kept from copying KV: what is not copied is computed again
LAST_COPY_S = 1.0  # how long requests of a leaver wait for the rest of their KV to be copied


Connect = Callable[[Epoch, int, float], Transport]  # (epoch, rank, timeout_s)


class Membership:
    def __init__(
        self,
        *,
        worker_id: str,
        weights: Weights,
        bound: BoundModel,
        kv: KvSpace,
        engine: Engine,
        scheduler: Scheduler,
        connect: Connect,
        cancel_connect: Callable[[int], None],
        context_tokens: int,
        make_sender: Callable[[], KvSender],
    ) -> None:
        self._worker_id = worker_id
        self._weights, self._bound, self._kv = weights, bound, kv
        self._engine, self._scheduler = engine, scheduler
        self._connect = connect
        self._orders = Orders(worker_id, cancel_connect=cancel_connect, interrupt=weights.interrupt)
        self._context_tokens = context_tokens
        self._make_sender = make_sender
        self._lock = threading.RLock()
        self._current: PreparedEpoch | None = None
        self._prepared: dict[int, PreparedEpoch] = {}
        self._former: list[PreparedEpoch] = []
        self._retired: dict[str, Any] = {}
        self._troubles = TroubleBell()
        engine.on_trouble = self._troubles.ring

    # Alone

    def begin_alone(self, names: Sequence[str], held: Sequence[Sequence[int]]) -> EpochExperts:
        """Hold all experts and serve by oneself, without an epoch. Before the engine runs."""
        alone = PreparedEpoch(epoch=None, rank=0, names=tuple(names))
        alone.held = self._weights.experts(names)
        alone.experts = EpochExperts(self._bound, held, alone.held.memory)
        self._current = alone
        return alone.experts

    # Prepare

    def prepare(self, epoch: Epoch, sources: Sequence[Source] = (), deadline_s: float = 120.0) -> dict[str, Any]:
        """{"moved_bytes", "loaded_bytes", "kv_moved_bytes", "seconds": {phase: s}}. Raises MembershipError, BudgetError, ConnectError,
        LoadError; then nothing is left of it."""
        until_s = time.monotonic() + deadline_s
        self._orders.came(epoch.number)
        with self._orders.turn(self._lock, ends=epoch.number - 1):
            self._settle()
            known = self._known(epoch)
            if known is not None:
                return known.answer
            self._orders.check(epoch.number, until_s)
            made = self._share_of(epoch)
            self._replace_by(made)
            try:
                with self._orders.preparing(epoch.number):
                    self._make(made, sources, until_s)
            except BaseException:
                self._undo(made)
                raise
            self._prepared[epoch.number] = made
            return made.answer

    def _known(self, epoch: Epoch) -> PreparedEpoch | None:
        """What was made of this very epoch. Raises MembershipError for one that is over, or was made of something else."""
        current = self._current
        if current is not None and current.number >= epoch.number:
            if current.epoch == epoch:
                return current
            raise MembershipError(
                f"epoch {epoch.number} is over: worker {self._worker_id} is in epoch {current.number}"
            )
        known = self._prepared.get(epoch.number)
        if known is not None and known.epoch != epoch:
            raise MembershipError(
                f"epoch {epoch.number} was prepared with other members or another placement; abort it first"
            )
        return known

    def _replace_by(self, made: PreparedEpoch) -> None:
        """Epochs that were prepared before will not be, but for one that the engine has entered. What was fetched for them and `made`
        needs as well becomes its own."""
        for number in list(self._prepared):
            self._withdraw(number)
        for number in list(self._prepared):
            other = self._prepared.pop(number)
            kept = self._names_in_use()
            made.taken_over += tuple(name for name in other.names_to_drop if name in made.names and name not in kept)
            self._undo(other, keep=made.names)

    def _withdraw(self, number: int) -> None:
        self._engine.withdraw(number).result(BETWEEN_STEPS_TIMEOUT_S)
        self._settle()  # it may have been too late

    def _share_of(self, epoch: Epoch) -> PreparedEpoch:
        rank = epoch.rank_of(self._worker_id)
        if rank is None:
            return PreparedEpoch(
                epoch=epoch, rank=None, names=(), following=NextEpoch(number=epoch.number, leaves=True)
            )
        return PreparedEpoch(epoch=epoch, rank=rank, names=expert_segments(self._bound.layout, epoch.held_by(rank)))

    def _make(self, made: PreparedEpoch, sources: Sequence[Source], until_s: float) -> None:
        epoch, rank = made.epoch, made.rank
        assert epoch is not None
        seconds: dict[str, float] = {}
        began_s = time.monotonic()

        def mark(phase: str) -> None:
            nonlocal began_s
            now_s = time.monotonic()
            seconds[phase], began_s = round(now_s - began_s, 4), now_s
            self._orders.check(epoch.number, until_s)

        if rank is not None:
            missing = [name for name in made.names if name not in self._weights.segments()]
            if missing:
                self._kv.make_room(
                    self._held_bytes(made.names), self._scheduler, self._between, keep_tokens=self._context_tokens
                )
            mark("room")
            made.fetched.names = tuple(missing)
            with self._orders.fetching(epoch.number, missing, until_s):
                made.fetched = self._weights.fetch(
                    made.names, sources, lambda done, total: self._orders.check(epoch.number, until_s)
                )
            mark("fetch")
            made.held = self._weights.experts(made.names)
            made.experts = EpochExperts(self._bound, epoch.held_by(rank), made.held.memory)
            mark("map")
            made.following = self._following(made, until_s)
            mark("connect")
        else:
            self._begin_to_leave(made, epoch, until_s)
            mark("kv")
        made.answer = {
            "moved_bytes": made.fetched.moved_bytes,
            "loaded_bytes": made.fetched.loaded_bytes,
            "kv_moved_bytes": made.sender.moved_bytes if made.sender else 0,
            "seconds": seconds,
        }

    def _following(self, made: PreparedEpoch, until_s: float) -> NextEpoch:
        epoch, rank = made.epoch, made.rank
        assert epoch is not None
        assert rank is not None
        assert made.experts is not None
        if epoch.size == 1:
            if self._current is None and is_cuda(self._bound.device):
                self._engine.prime(made.experts).result(BETWEEN_STEPS_TIMEOUT_S)
            return NextEpoch(number=epoch.number, experts=made.experts)
        made.transport = self._connect(epoch, rank, max(0.01, until_s - time.monotonic()))
        exchange = ExpertExchange(made.transport, epoch, rank, made.experts)
        group = Group(epoch=epoch, rank=rank, transport=made.transport, exchange=exchange)
        return NextEpoch(number=epoch.number, group=group, experts=made.experts, exchange=exchange)

    def _begin_to_leave(self, made: PreparedEpoch, epoch: Epoch, until_s: float) -> None:
        """Copy the KV of what runs here to those who stay, while it goes on."""
        made.sender = self._make_sender()
        made.following.keeps = True
        made.following.done.add_done_callback(
            lambda _: threading.Thread(target=self._hand_over, args=(made,), name="hand-over", daemon=True).start()
        )
        made.sender.open(epoch)
        made.sender.copy(until_s - COPY_MARGIN_S, lambda: self._orders.check(epoch.number, until_s))

    def _hand_over(self, made: PreparedEpoch) -> None:
        """After the flip: copy what was computed meanwhile, then give the requests back."""
        assert made.sender is not None
        targets: dict[str, str] = {}
        try:
            made.sender.copy(time.monotonic() + LAST_COPY_S)
            targets = made.sender.targets()
        except Exception:
            log.warning("the KV of the requests that leave could not be copied", exc_info=True)
        try:
            made.handed_over.set_result(self._engine.release(targets).result(BETWEEN_STEPS_TIMEOUT_S))
        except Exception as error:
            made.handed_over.set_exception(error)

    def _undo(self, made: PreparedEpoch, *, keep: Sequence[str] = ()) -> int:
        """Forget what was made for an epoch that will not be; how many bytes that freed."""
        made.close()
        kept = self._names_in_use() | set(keep)
        freed_bytes = self._weights.drop([name for name in made.names_to_drop if name not in kept])
        self._kv.fill(self._held_bytes(()), self._scheduler, self._between)
        return freed_bytes

    # Commit, retire, abort

    def commit(self, number: int, deadline_s: float = 10.0) -> dict[str, Any]:
        """{"pause_s", "step", "released", "kv_moved_bytes"}, after the flip. Raises MembershipError; after a deadline the flip may still
        come."""
        with self._lock:
            self._settle()
            if self._current is not None and self._current.number == number:
                return self._flip_answer(self._current, deadline_s)
            made = self._prepared.get(number)
            if made is None:
                current = "none" if self._current is None else self._current.number
                raise MembershipError(f"epoch {number} is not prepared here (current: {current}); prepare it first")
            self._engine.enter(made.following)
        try:
            made.following.done.result(deadline_s)
        except TimeoutError:
            raise MembershipError(
                f"epoch {number}: the ranks did not flip within {deadline_s:g} s; a member was not told to commit, or hangs"
            ) from None
        with self._lock:
            self._settle()
        return self._flip_answer(made, deadline_s)

    @staticmethod
    def _flip_answer(made: PreparedEpoch, deadline_s: float) -> dict[str, Any]:
        flipped = made.following.done.result()
        if made.sender is None:
            return {
                "pause_s": flipped.pause_s,
                "step": flipped.step,
                "released": list(flipped.released),
                "kv_moved_bytes": 0,
            }
        released = made.handed_over.result(deadline_s)
        return {
            "pause_s": flipped.pause_s,
            "step": flipped.step,
            "released": released,
            "kv_moved_bytes": made.sender.moved_bytes,
        }

    def retire(self, number: int) -> dict[str, Any]:
        """{"freed_bytes", "kv_bytes", "pause_s"}: epochs before `number` are over for all. Raises MembershipError before the flip."""
        with self._lock:
            self._settle()
            if self._current is None or self._current.number < number:
                raise MembershipError(f"epoch {number} is not current on worker {self._worker_id}; commit it first")
            if self._retired.get("number") != number:
                self._retired = {"number": number, "freed_bytes": self._let_go()}
                give_back_free_memory()
            return {
                "freed_bytes": self._retired["freed_bytes"],
                "kv_bytes": self._kv.kv_bytes,
                "pause_s": self._engine.pause_s,
            }

    def _let_go(self) -> int:
        for former in self._former:
            former.close()
        if self._former:
            self._between(lambda: give_back_unused(self._bound.device))
        self._former = []
        kept = self._names_in_use()
        freed_bytes = self._weights.drop([name for name in self._expert_segments() if name not in kept])
        if self._current is not None and self._current.rank is not None:
            self._kv.fill(self._held_bytes(()), self._scheduler, self._between)
        return freed_bytes

    def abort(self, number: int) -> dict[str, Any]:
        """{"freed_bytes"}. Ends a prepare that runs, and one that comes yet. Raises MembershipError after the flip."""
        self._orders.abort(number)
        with self._orders.turn(self._lock, ends=number):
            self._settle()
            if number in self._prepared:
                self._withdraw(number)
            if self._current is not None and self._current.number == number:
                raise MembershipError(
                    f"epoch {number} is current on worker {self._worker_id}: it can be left, not aborted"
                )
            made = self._prepared.pop(number, None)
            return {"freed_bytes": 0 if made is None else self._undo(made)}

    def close(self) -> None:
        """The process or the worker in it ends: peers see this rank as gone. After the engine has stopped."""
        self._troubles.close()
        with self._lock:
            self._settle()
            for made in (*self._former, *self._prepared.values(), *([self._current] if self._current else [])):
                made.close()
            self._former, self._prepared, self._current = [], {}, None

    # What there is

    @property
    def epoch(self) -> Epoch | None:
        with self._lock:
            self._settle()
            return None if self._current is None else self._current.epoch

    def wait_trouble(self) -> Future[Trouble | None]:
        """Done as soon as the group breaks, at once while it is broken; None where this worker ends."""
        return self._troubles.wait(lambda: self._engine.trouble)

    def status(self) -> dict[str, Any]:
        """Epoch, rank, experts and KV held. Does not wait for a transition that runs."""
        current = self._current
        if current is not None:
            newest = [made for made in self._prepared.copy().values() if made.following.done.done()]
            current = newest[-1] if newest else current
        epoch = None if current is None else current.epoch
        return {
            "epoch": None if epoch is None else epoch.number,
            "rank": None if current is None else current.rank,
            "members": [] if epoch is None else [member.worker_id for member in epoch.members],
            "experts_held": 0 if current is None or current.experts is None else sum(map(len, current.experts.held)),
            "experts_bytes": 0 if current is None or current.experts is None else current.experts.nbytes,
            "kv_bytes": self._kv.kv_bytes,
            "paused": self._engine.paused,
            "pause_s": self._engine.pause_s,
            "prepared": sorted(self._prepared.copy()),
        }

    # Private

    def _settle(self) -> None:
        """Take note of flips that took place."""
        for number, made in sorted(self._prepared.items()):
            if made.following.done.done():
                del self._prepared[number]
                if self._current is not None:
                    self._former.append(self._current)
                self._current = made

    def _names_in_use(self) -> set[str]:
        made = [*self._former, *self._prepared.values(), *([self._current] if self._current else [])]
        return {name for each in made for name in each.names}

    def _expert_segments(self) -> dict[str, int]:
        return {name: nbytes for name, nbytes in self._weights.segments().items() if is_experts(name)}

    def _held_bytes(self, more: Sequence[str]) -> int:
        """Bytes of the expert segments that are here, and of those that are to come."""
        return self._bound.layout.group_bytes * len(self._expert_segments().keys() | set(more))

    def _between(self, function: Callable[[], T]) -> T:
        return self._engine.call(function).result(BETWEEN_STEPS_TIMEOUT_S)
