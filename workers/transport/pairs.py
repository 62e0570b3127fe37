"""One connected socket for each pair of ranks of an epoch: rank i connects to the ranks below it and is called by those above.

Both transports between processes begin here. It returns when all pairs of this rank stand, or fails as a whole.
"""

from __future__ import annotations

import os
import select
import socket
import time
from dataclasses import dataclass

from flexpert.workers.epoch import Epoch
from flexpert.workers.transport.handshake import (
    FrameReader,
    HandshakeError,
    Hello,
    Refused,
    Welcome,
    parse_address,
    prepare_stream,
    send_frame,
)
from flexpert.workers.transport.listener import Caller, ExchangeListener, Expectation


class ConnectError(Exception):
    """An epoch's ranks could not be connected. ranks: those that are missing or that refused."""

    def __init__(self, message: str, ranks: list[int]) -> None:
        super().__init__(message)
        self.ranks = ranks


@dataclass
class Pair:
    """A peer's end: its socket (non-blocking), the descriptor and the text that came with the handshake, ours to close."""

    sock: socket.socket
    descriptor: int | None
    data: str

    def close(self) -> None:
        self.sock.close()
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def connect_pairs(
    epoch: Epoch,
    rank: int,
    listener: ExchangeListener,
    *,
    kind: str,
    token: str,
    timeout_s: float,
    descriptor: int | None = None,
    data: str = "",
) -> dict[int, Pair]:
    """By rank. descriptor goes to every peer, data to the ranks above. Raises ConnectError; `listener.cancel` makes it raise at once."""
    attempt = _Attempt(epoch, rank, kind, token, descriptor, data, time.monotonic() + timeout_s)
    try:
        with listener.expect(epoch.number) as expectation:
            attempt.dial()
            attempt.wait(expectation)
    except BaseException:
        attempt.give_up()
        raise
    return attempt.pairs


class _Attempt:
    def __init__(
        self, epoch: Epoch, rank: int, kind: str, token: str, descriptor: int | None, data: str, deadline: float
    ) -> None:
        self.epoch = epoch
        self.rank = rank
        self.kind = kind
        self.token = token
        self.descriptor = descriptor
        self.data = data
        self.deadline = deadline
        self.pairs: dict[int, Pair] = {}
        self._dialled: dict[int, FrameReader] = {}

    def dial(self) -> None:
        """Connect to the ranks below and say Hello; their answer comes when they prepare this epoch too."""
        me = self.epoch.members[self.rank]
        for peer in range(self.rank):
            family, where = parse_address(self.epoch.members[peer].exchange_address)
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            self._dialled[peer] = FrameReader(sock)
            try:
                sock.settimeout(max(0.001, self.deadline - time.monotonic()))
                sock.connect(where)
                prepare_stream(sock)
                hello = Hello(
                    cluster_token=self.token, kind=self.kind, epoch=self.epoch.number, rank=self.rank,
                    worker_id=me.worker_id, incarnation=me.incarnation,
                )  # fmt: skip
                send_frame(sock, hello, self.descriptor)
            except (OSError, HandshakeError) as error:
                raise self._error(f"cannot connect to {self._name(peer)}: {error}", [peer]) from error

    def wait(self, expectation: Expectation) -> None:
        while missing := [peer for peer in range(self.epoch.size) if peer != self.rank and peer not in self.pairs]:
            remaining_s = self.deadline - time.monotonic()
            if expectation.cancelled:
                raise self._error("given up", missing)
            if remaining_s <= 0:
                names = ", ".join(self._name(peer) for peer in missing)
                raise self._error(f"no connection in time with {names}: they did not prepare this epoch", missing)
            poller = select.poll()
            poller.register(expectation, select.POLLIN)
            for reader in self._dialled.values():
                poller.register(reader.sock, select.POLLIN)
            poller.poll(remaining_s * 1000)
            for peer in list(self._dialled):
                self._hear_answer(peer)
            for caller in expectation.take():
                self._answer(caller)

    def _hear_answer(self, peer: int) -> None:
        reader = self._dialled[peer]
        try:
            frame = reader.read()
        except HandshakeError as error:
            raise self._error(f"{self._name(peer)}: {error}", [peer]) from error
        if frame is None:
            return
        if isinstance(frame, Refused):
            raise self._error(f"{self._name(peer)} refused: {frame.reason}", [peer])
        member = self.epoch.members[peer]
        if not isinstance(frame, Welcome) or (frame.rank, frame.incarnation) != (peer, member.incarnation):
            raise self._error(f"{self._name(peer)} answered with {frame}", [peer])
        del self._dialled[peer]
        self.pairs[peer] = Pair(reader.sock, reader.descriptor, frame.data)

    def _answer(self, caller: Caller) -> None:
        hello = caller.hello
        if reason := self._objection(hello):
            caller.refuse(reason)
            return
        me = self.epoch.members[self.rank]
        try:
            welcome = Welcome(rank=self.rank, incarnation=me.incarnation, data=self.data)
            send_frame(caller.sock, welcome, self.descriptor)
        except OSError:  # it gave up; should it try again it calls again
            caller.close()
            return
        if (older := self.pairs.get(hello.rank)) is not None:  # it gave up meanwhile and tries again
            older.close()
        self.pairs[hello.rank] = Pair(caller.sock, caller.descriptor, "")

    def _objection(self, hello: Hello) -> str:
        if hello.kind != self.kind:
            return f"this rank exchanges by {self.kind}, not by {hello.kind}"
        if not self.rank < hello.rank < self.epoch.size:
            return f"rank {hello.rank} does not call rank {self.rank} of {self.epoch.size}"
        member = self.epoch.members[hello.rank]
        if (hello.worker_id, hello.incarnation) != (member.worker_id, member.incarnation):
            return (
                f"rank {hello.rank} of epoch {self.epoch.number} is {member.worker_id} incarnation {member.incarnation}, "
                f"not {hello.worker_id} incarnation {hello.incarnation}"
            )
        return ""

    def give_up(self) -> None:
        for reader in self._dialled.values():
            reader.drop_descriptor()
            reader.sock.close()
        for pair in self.pairs.values():
            pair.close()

    def _name(self, peer: int) -> str:
        member = self.epoch.members[peer]
        return f"rank {peer} ({member.worker_id} incarnation {member.incarnation} at {member.exchange_address})"

    def _error(self, message: str, ranks: list[int]) -> ConnectError:
        return ConnectError(f"epoch {self.epoch.number}, rank {self.rank}: {message}", ranks)
