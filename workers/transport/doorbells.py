"""Small fixed-size messages between ranks that say "my part of (step, phase) is there": who has come, who is missing, who is gone.

One `Doorbells` has a socket for each peer. A transport rings its peers, then collects all of theirs; it sleeps in poll meanwhile, and
wakes for one peer at a time, since a wake per peer costs more than reading the others late. The first missing peer's bytes wake it,
the others only by hanging up. Doorbells of later phases are kept. Used by `mapped` and `distributed`; single-threaded but for
`wake`, `close` and a thread that speaks up while this rank computes or is within a collective.

Who is a suspect: a rank that has waited for half of the deadline, here or within a collective, or gives up, tells its peers so (a
notice); those that are only waiting themselves, or have closed after they gave up, are not blamed. Idle ranks give up too, where a peer
is gone. Should the end of one that gave up be seen before the end of the one it gave up for, that one is waited for.

Slow is not dead: while a rank computes between two exchanges, it says that it is busy, four times in a deadline, and its peers' deadline
counts from the last time it did. A process that was stopped is silent. Because a thread says so that does not see whether the computation
goes on, it ends after a number of notices; they also have to fit into the socket of a peer that does not read.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flexpert.workers.transport.base import StepMissed

# epoch, step, phase, round, rounds (or which notice it is), offset, length
_DOORBELL = struct.Struct("<qqiiiiqq")
_READ_BYTES = 256 * _DOORBELL.size
_WAITING, _BUSY = 0, -1
MOST_BUSY_NOTICES = 128  # of one computation: 32 deadlines

Key = tuple[int, int, int]  # step, phase, round


class ProtocolError(StepMissed):
    """A peer said what cannot be: another epoch, a phase of the past, a place outside of its buffer. It is the suspect."""


class Doorbell(NamedTuple):
    """rounds: how many the sender needs for this phase. What offset and length mean is the transport's matter."""

    rounds: int
    offset: int
    length: int


class _Peer:
    """What one peer has said so far."""

    def __init__(self, rank: int, sock: socket.socket) -> None:
        self.rank = rank
        self.sock = sock
        self.kept: dict[Key, Doorbell] = {}
        self.last: Key = (-1, -1, -1)
        self.waits_at: Key | None = None  # a notice; it is not the cause while that is where it is
        self.heard_s = -math.inf  # when it said last that it is busy
        self.gone = False
        self.rest = b""

    @property
    def excused(self) -> bool:
        """It waits itself, or gave up because of another."""
        return self.waits_at == self.last


class Doorbells:
    """busy: held by the transport while it uses the sockets, so that `close` from another thread waits until it let go of them."""

    def __init__(self, epoch_number: int, socks: dict[int, socket.socket], *, step_timeout_s: float) -> None:
        self.epoch_number = epoch_number
        self.step_timeout_s = step_timeout_s
        self.busy = threading.Lock()
        self._peers = {rank: _Peer(rank, sock) for rank, sock in sorted(socks.items())}
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake_lock = threading.Lock()
        self._closed = False
        self._last: Key = (-1, -1, -1)  # what this rank rang last
        self._busy_notices_left = 0  # before its first exchange, and after it gave up, a rank says nothing
        self._collective: tuple[Key, float] | None = None  # this rank is within it, since when
        self._collective_lock = threading.Lock()
        self._ended = threading.Event()
        self._speaker = threading.Thread(target=self._speak_up, name="doorbells", daemon=True)
        self._speaker.start()

    def ring(self, rank: int, key: Key, *, rounds: int = 1, offset: int = 0, length: int = 0) -> None:
        """A peer that is gone is noticed when its own doorbell is missing."""
        self._last = key
        self._send(self._peers[rank], _DOORBELL.pack(self.epoch_number, *key, rounds, 0, offset, length))

    def collect(self, key: Key) -> dict[int, Doorbell]:
        """Every peer's doorbell of `key`, by rank. Raises StepMissed."""
        begun_s = time.monotonic()
        noticed = False
        missing = self._read(list(self._peers.values()), key)
        while missing:
            self._check(missing, key)
            now_s = time.monotonic()
            if overdue := self._overdue(missing, begun_s=begun_s, now_s=now_s):
                raise self._missed(missing, key, overdue)
            if not noticed and now_s - begun_s >= self.step_timeout_s / 2:
                noticed = True
                self._tell_waiting(key)
            self._sleep(missing, self.step_timeout_s / 8)
            missing = self._read(missing, key)
        self.check_open(key)
        self._busy_notices_left = MOST_BUSY_NOTICES
        return {rank: peer.kept.pop(key) for rank, peer in self._peers.items()}

    def started(self, step: int) -> bool:
        """Whether a peer's doorbell of (step, 0) is here. Raises StepMissed where a peer is gone."""
        key = (step, 0, 0)
        self.check_open(key)
        self._read(list(self._peers.values()), key)
        if any(peer.gone for peer in self._peers.values()):
            self._tell_waiting(self._last)  # should this rank now close, it is not blamed for that
            raise self._gone(list(self._peers.values()), key, f"before {_name(key)}")
        return any(key in peer.kept for peer in self._peers.values())

    def wait(self, step: int, timeout_s: float | None) -> bool:
        """Until `started(step)`, `wake` or the time is up."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        for peer in self._peers.values():
            poller.register(peer.sock, select.POLLIN | select.POLLRDHUP)
        while not self.started(step):
            remaining_ms = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            events = poller.poll(remaining_ms)
            self.check_open((step, 0, 0))
            if not events:
                return self.started(step)
            if any(descriptor == self._wake for descriptor, _ in events):
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
                return self.started(step)
        return True

    def wake(self) -> None:
        """End a `wait` that runs, or the next one at once. From any thread."""
        with self._wake_lock:
            if not self._closed:
                os.eventfd_write(self._wake, 1)

    @contextlib.contextmanager
    def collective(self, key: Key) -> Iterator[None]:
        """Around what all ranks began with `key` and this thread waits in: should that last, its peers are told that this rank waits."""
        with self._collective_lock:
            self._collective = key, time.monotonic()
        try:
            yield
        finally:
            with self._collective_lock:
                self._collective = None
            self._busy_notices_left = MOST_BUSY_NOTICES

    def suspects(self, key: Key) -> list[int]:
        """Who seems to have broken what all ranks began with `key`: those that are gone, or else that neither say that it broke for them
        too nor went on from there, within half of a deadline.
        """
        self._tell_waiting(key)
        began_s = time.monotonic()
        deadline = began_s + self.step_timeout_s / 2
        while True:
            for peer in self._peers.values():
                self._read_one(peer)
            silent = [
                peer
                for peer in self._peers.values()
                if peer.last <= key and peer.waits_at != key and peer.heard_s < began_s
            ]
            remaining_s = deadline - time.monotonic()
            if dead := [peer.rank for peer in silent if peer.gone]:
                return dead
            if not silent or remaining_s <= 0 or self._closed:
                return [peer.rank for peer in silent] or list(self._peers)
            self._sleep(silent, remaining_s)

    def filenos(self) -> list[int]:
        """The sockets' descriptors, for a thread that waits for their end; it has to be done before `close`."""
        return [peer.sock.fileno() for peer in self._peers.values()]

    def hang_up(self) -> None:
        """From any thread. Peers see the end at once, a `collect` or `wait` that runs raises StepMissed."""
        with self._wake_lock:
            if self._closed:
                return
            self._closed = True
            self._ended.set()
            os.eventfd_write(self._wake, 1)
            for peer in self._peers.values():
                with contextlib.suppress(OSError):
                    peer.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """`hang_up`, and let go of the sockets when nobody uses them any more. From any thread; idempotent."""
        self.hang_up()
        self._speaker.join()
        with self.busy:
            if self._wake >= 0:
                for peer in self._peers.values():
                    peer.sock.close()
                os.close(self._wake)
                self._wake = -1

    def _read(self, peers: Sequence[_Peer], key: Key) -> list[_Peer]:
        """Read what is here of those of `peers` whose `key` is missing; returns those that are missing still."""
        missing = []
        for peer in peers:
            if key not in peer.kept:
                self._read_one(peer)
                if key not in peer.kept:
                    missing.append(peer)
        return missing

    def _read_one(self, peer: _Peer) -> None:
        if peer.gone or self._closed:
            return
        try:
            data = peer.sock.recv(_READ_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            peer.gone = True
            return
        data = peer.rest + data
        whole = len(data) - len(data) % _DOORBELL.size
        peer.rest = data[whole:]
        for epoch, step, phase, round_, rounds, _, offset, length in _DOORBELL.iter_unpack(data[:whole]):
            self._keep(peer, epoch, (step, phase, round_), Doorbell(rounds, offset, length))

    def _keep(self, peer: _Peer, epoch: int, key: Key, doorbell: Doorbell) -> None:
        if epoch != self.epoch_number:
            raise ProtocolError(
                f"rank {peer.rank} exchanges in epoch {epoch}, this is {self.epoch_number}", [peer.rank]
            )
        if doorbell.rounds == _WAITING:
            peer.waits_at = key
            return
        if doorbell.rounds == _BUSY:
            peer.waits_at, peer.heard_s = None, time.monotonic()
            return
        if key <= peer.last:
            raise ProtocolError(f"rank {peer.rank} is at {_name(key)} after {_name(peer.last)}", [peer.rank])
        peer.last = key
        peer.kept[key] = doorbell

    def _check(self, missing: Sequence[_Peer], key: Key) -> None:
        """Raise where one of `missing` will never send `key`."""
        self.check_open(key)
        if any(peer.gone for peer in missing):
            self._tell_waiting(key)  # should this rank now close, it is not blamed for that
            raise self._gone(missing, key, _name(key))
        for peer in missing:
            if peer.last > key and key not in peer.kept:
                raise ProtocolError(f"rank {peer.rank} is at {_name(peer.last)} and left out {_name(key)}", [peer.rank])

    def check_open(self, key: Key) -> None:
        """Raises StepMissed, with nobody to blame, after `close`."""
        if self._closed:
            raise StepMissed(f"epoch {self.epoch_number}, {_name(key)}: the transport is closed", ())

    def _sleep(self, missing: Sequence[_Peer], timeout_s: float) -> None:
        poller = select.poll()
        poller.register(missing[0].sock, select.POLLIN | select.POLLRDHUP)
        for peer in missing[1:]:
            poller.register(peer.sock, select.POLLRDHUP)
        poller.poll(timeout_s * 1000 + 1)

    def _overdue(self, missing: Sequence[_Peer], *, begun_s: float, now_s: float) -> list[int]:
        """The ranks among `missing` to blame for its being late: silent for a deadline, and not waiting themselves; all that were silent
        where nobody else is left. What they say is read up to an eighth of a deadline late."""
        unexcused = [peer for peer in missing if not peer.excused] or missing
        since_s = {peer.rank: max(begun_s, peer.heard_s - self.step_timeout_s / 8) for peer in unexcused}
        return [rank for rank, silent_s in since_s.items() if now_s - silent_s >= self.step_timeout_s]

    def _missed(self, missing: Sequence[_Peer], key: Key, suspects: Sequence[int]) -> StepMissed:
        ranks = [peer.rank for peer in missing]
        text = f"epoch {self.epoch_number}, {_name(key)}: ranks {ranks} took no part within {self.step_timeout_s:g} s"
        return StepMissed(text, suspects)

    def _gone(self, peers: Sequence[_Peer], key: Key, when: str) -> StepMissed:
        """The error where some of `peers`, who are waited for, are gone."""
        suspects = self._culprits(peers, key)
        self.check_open(key)
        ranks = [peer.rank for peer in peers if peer.gone]
        return StepMissed(f"epoch {self.epoch_number}, {when}: ranks {ranks} are gone", suspects)

    def _culprits(self, peers: Sequence[_Peer], key: Key) -> list[int]:
        """Those of `peers` that went without a notice. Where there is none yet, because those that gave up were faster, they are
        waited for, at most half of a deadline; then those are blamed that neither gave up nor sent `key` nor said that they are busy.
        """
        began_s = time.monotonic()
        deadline = began_s + self.step_timeout_s / 2
        while True:
            unexcused = [peer for peer in peers if not peer.excused]
            if dead := [peer.rank for peer in unexcused if peer.gone]:
                return dead
            remaining_s = deadline - time.monotonic()
            if not unexcused or remaining_s <= 0 or self._closed:
                silent = [peer.rank for peer in unexcused if key not in peer.kept and peer.heard_s < began_s]
                return silent or [peer.rank for peer in peers if peer.gone]
            self._sleep(unexcused, remaining_s)
            for peer in unexcused:
                self._read_one(peer)

    def _tell_waiting(self, key: Key) -> None:
        self._busy_notices_left = 0  # of a rank that gives up they would take its excuse back
        for peer in self._peers.values():
            self._send(peer, _DOORBELL.pack(self.epoch_number, *key, _WAITING, 0, 0, 0))

    def _speak_up(self) -> None:
        """Until the end: where this rank is in no exchange and waits for nothing, say that it is busy; within a long collective that it
        waits."""
        while not self._ended.wait(self.step_timeout_s / 4):
            self._speak_of_collective()
            if self.busy.acquire(blocking=False):
                try:
                    if self._busy_notices_left > 0:
                        self._busy_notices_left -= 1
                        self._tell_busy()
                finally:
                    self.busy.release()

    def _speak_of_collective(self) -> None:
        with self._collective_lock:  # the rank's own thread uses no socket until it has this
            if self._collective is not None:
                key, began_s = self._collective
                if time.monotonic() - began_s >= self.step_timeout_s / 2:
                    with contextlib.suppress(ProtocolError):  # this rank's own exchange will notice
                        self._tell_waiting(key)

    def _tell_busy(self) -> None:
        for peer in self._peers.values():
            with contextlib.suppress(ProtocolError):  # this rank's own exchange will notice
                self._send(peer, _DOORBELL.pack(self.epoch_number, *self._last, _BUSY, 0, 0, 0))

    def _send(self, peer: _Peer, data: bytes) -> None:
        if peer.gone or self._closed:
            return
        try:
            sent = peer.sock.send(data, socket.MSG_DONTWAIT)
        except (
            BlockingIOError
        ):  # in lockstep a peer owes us at most a phase: only one that never reads fills the socket
            sent = 0
        except OSError:  # what it had sent before is read still
            return
        if sent != len(data):
            raise ProtocolError(f"rank {peer.rank} has stopped reading its doorbells", [peer.rank])


def _name(key: Key) -> str:
    step, phase, round_ = key
    return f"step {step} phase {phase}" + (f" round {round_}" if round_ else "")
