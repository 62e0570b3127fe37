"""An epoch: who computes what, as one immutable value that the controller makes and every rank reads. Pure.

`Epoch` travels as msgpack from the controller to the workers. Which rank computes an expert for which home rank follows from it alone,
so no two ranks can disagree. Made by `controller.planner`, carried out by `workers.group`.
"""

from __future__ import annotations

from functools import cached_property

import msgspec


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One rank. exchange_address: where its peers connect ("unix:/path" or "tcp:host:port")."""

    worker_id: str
    incarnation: int
    exchange_address: str
    manager_socket: str


class Epoch(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """members: in rank order. holders[layer][expert]: the ranks that hold it, ascending, at least one; layers that have experts only."""

    number: int
    members: tuple[Member, ...]
    holders: tuple[tuple[tuple[int, ...], ...], ...]

    def rank_of(self, worker_id: str) -> int | None:
        return next((rank for rank, member in enumerate(self.members) if member.worker_id == worker_id), None)

    @property
    def size(self) -> int:
        return len(self.members)

    def held_by(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """[layer] -> the experts that `rank` holds, ascending."""
        return tuple(tuple(expert for expert, ranks in enumerate(layer) if rank in ranks) for layer in self.holders)

    def targets(self, home_rank: int) -> tuple[tuple[int, ...], ...]:
        """[layer][expert] -> the rank to which `home_rank` sends that expert's tokens: itself where it holds the expert, otherwise the
        replicas take turns."""
        return self._targets[home_rank]

    @cached_property
    def _targets(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        return tuple(
            tuple(
                tuple(
                    home if home in ranks else ranks[(home + expert) % len(ranks)] for expert, ranks in enumerate(layer)
                )
                for layer in self.holders
            )
            for home in range(self.size)
        )


def encode(epoch: Epoch) -> bytes:
    return msgspec.msgpack.encode(epoch)


def decode(data: bytes) -> Epoch:
    """Raises msgspec.ValidationError for what is no epoch."""
    return msgspec.msgpack.decode(data, type=Epoch)
