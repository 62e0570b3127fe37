"""A Membership whose engine is real and whose model, weights and KV are played: what it fetches, drops and maps can be seen and held up."""

from __future__ import annotations

import threading
from types import SimpleNamespace

from tests.workers.elastic import Gateway
from tests.workers.group_world import FlakyTransport, PlayedExchange, PlayedWorker

from flexpert.workers import membership
from flexpert.workers.epoch import Epoch, Member
from flexpert.workers.fetch import Fetched
from flexpert.workers.membership import Membership
from flexpert.workers.model.layout import segment_of
from flexpert.workers.transport import ConnectError, LocalGroup

WAIT_S = 20.0
EXPERTS = 4


def epoch_of(number: int, *names: str) -> Epoch:
    """One layer whose experts are dealt out in turn."""
    members = tuple(Member(worker_id=name, incarnation=1, exchange_address="", manager_socket="") for name in names)
    holders = tuple((expert % len(names),) for expert in range(EXPERTS))
    return Epoch(number=number, members=members, holders=(holders,))


class PlayedWeights:
    """fetches: names asked for, in order. A held fetch waits until it is interrupted or `go_on` is set."""

    loaded_from_disk = False

    def __init__(self) -> None:
        self.here: dict[str, int] = {}
        self.fetches: list[tuple[str, ...]] = []
        self.dropped: list[str] = []
        self.interrupted: list[tuple[str, ...]] = []
        self.held_fetches = 0  # how many of those to come wait
        self.fetching, self.go_on = threading.Event(), threading.Event()

    def fetch(self, names, sources=(), on_progress=None) -> Fetched:
        missing = tuple(name for name in names if name not in self.here)
        self.fetches.append(missing)
        if self.held_fetches:
            self.held_fetches -= 1
            self.fetching.set()
            assert self.go_on.wait(WAIT_S)
        on_progress(0, 1)
        self.here |= dict.fromkeys(missing, 1)
        return Fetched(missing, moved_bytes=len(missing))

    def experts(self, names):
        assert set(names) <= self.here.keys(), "mapped before it was fetched"
        return SimpleNamespace(memory=None, close=lambda: None)

    def segments(self) -> dict[str, int]:
        return dict(self.here)

    def interrupt(self, names) -> None:
        if names:
            self.interrupted.append(tuple(names))
            self.go_on.set()

    def drop(self, names) -> int:
        gone = [name for name in names if name in self.here]
        self.dropped += gone
        for name in gone:
            del self.here[name]
        return len(gone)


class PlayedKv:
    kv_bytes = 0

    def make_room(self, held_bytes, scheduler, between, *, keep_tokens) -> int:
        return 0

    def fill(self, held_bytes, scheduler, between) -> int:
        return 0


class PlayedMember:
    """worker-0, or whichever name is given. connecting: set while a prepare waits for its peers; ranks meet in `groups` by epoch."""

    def __init__(self, monkeypatch, name: str = "worker-0", *, waiting: bool = True) -> None:
        monkeypatch.setattr(membership, "expert_segments", lambda layout, held: tuple(map(segment_of, held[0])))
        monkeypatch.setattr(membership, "EpochExperts", PlayedExperts)
        monkeypatch.setattr(membership, "ExpertExchange", lambda t, epoch, rank, _: PlayedExchange(t, rank, epoch.size))
        self.gateway = Gateway()
        self.weights = PlayedWeights()
        self.played = PlayedWorker(name, self.gateway, waiting=waiting)
        self.groups: dict[int, LocalGroup] = {}
        self.connecting = threading.Event()
        self.cancelled: list[int] = []
        self._news = threading.Condition()
        self.membership = Membership(
            worker_id=name,
            weights=self.weights,
            bound=SimpleNamespace(layout=SimpleNamespace(group_bytes=1), device="cpu"),
            kv=PlayedKv(),
            engine=self.played.engine,
            scheduler=self.played.scheduler,
            connect=self._connect,
            cancel_connect=self._cancel,
            context_tokens=1,
            make_sender=lambda: None,
        )

    def meet(self, number: int, size: int, **settings) -> LocalGroup:
        """The peers of this epoch are there."""
        self.groups[number] = LocalGroup(size, **settings)
        return self.groups[number]

    def _connect(self, epoch: Epoch, rank: int, timeout_s: float):
        if epoch.number in self.groups:
            return FlakyTransport(self.groups[epoch.number].transport(rank))
        with self._news:
            before = self.cancelled.count(epoch.number)  # as with a listener: what was cancelled earlier is forgotten
            self.connecting.set()
            if not self._news.wait_for(lambda: self.cancelled.count(epoch.number) > before, WAIT_S):
                raise AssertionError(f"epoch {epoch.number} waits for its peers in vain")
        raise ConnectError("given up", [])

    def _cancel(self, number: int) -> None:
        with self._news:
            self.cancelled.append(number)
            self._news.notify_all()

    def close(self) -> None:
        self.played.stop()
        self.membership.close()


class PlayedExperts:
    nbytes = 0

    def __init__(self, bound, held, memory) -> None:
        self.held = held
