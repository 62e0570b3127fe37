"""Which rank holds which expert in the next epoch: a pure function of what is held now, with the fewest bytes moved.

What moves is the slab group (consecutive slots, a slot being layer * experts + expert); a group counts for the layer in which it begins.
A placement is *balanced* when in each layer any two ranks differ by at most one group, and over all layers too (as far as each has the
memory). Of the balanced placements one that fetches the fewest groups is taken: a member keeps what it holds up to its share. Which of its
groups it gives, and who takes them, follows the measured load: each layer is a step of its own that ends when its slowest rank does.

Called by `controller.transition` for each new epoch and by the simulator. Deterministic: equal arguments give equal plans.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush, heapreplace
from typing import NamedTuple

from flexpert.controller.extras import spread_extras

Holders = tuple[tuple[tuple[int, ...], ...], ...]


class DoesNotFit(Exception):
    """The members' memory holds fewer slabs than the model has."""

    def __init__(self, needed_slabs: int, there_slabs: int) -> None:
        super().__init__(f"{needed_slabs} expert slabs do not fit where {there_slabs} have room")
        self.needed_slabs, self.there_slabs = needed_slabs, there_slabs


class Move(NamedTuple):
    """source None: from disk."""

    layer: int
    expert: int
    source: str | None
    target: str


@dataclass(frozen=True)
class Plan:
    """holders[layer][expert]: ranks (positions in `members`), ascending. fetches[target][source]: groups to get; source None: from disk."""

    members: tuple[str, ...]
    holders: Holders
    fetches: Mapping[str, Mapping[str | None, list[int]]]
    slabs_per_group: int
    slab_bytes: int

    @cached_property
    def moves(self) -> list[Move]:
        experts, slots = len(self.holders[0]), len(self.holders) * len(self.holders[0])
        size = self.slabs_per_group
        return [
            Move(slot // experts, slot % experts, source, target)
            for target, sources in self.fetches.items()
            for source, groups in sources.items()
            for group in groups
            for slot in range(group * size, min((group + 1) * size, slots))
        ]

    @property
    def moved_groups(self) -> int:
        return sum(len(groups) for sources in self.fetches.values() for groups in sources.values())

    @property
    def moved_bytes(self) -> int:
        """Whole groups: the last one may hold fewer slabs and is moved with its padding."""
        return self.moved_groups * self.slabs_per_group * self.slab_bytes


def groups_held(holders: Holders, members: Sequence[str], *, slabs_per_group: int = 1) -> dict[str, list[int]]:
    """Worker -> the groups it holds under `holders`, ascending: what `plan` takes as `held`."""
    held: list[list[int]] = [[] for _ in members]
    flat = [ranks for layer in holders for ranks in layer]
    for group, ranks in enumerate(flat[::slabs_per_group]):
        for rank in ranks:
            held[rank].append(group)
    return dict(zip(members, held, strict=True))


def plan(
    *,
    layers: int,
    experts: int,
    members: Sequence[tuple[str, int]],
    held: Mapping[str, Iterable[int]],
    load: Sequence[Sequence[float]] | None = None,
    slabs_per_group: int = 1,
    slab_bytes: int = 1,
    replicas: bool = False,
) -> Plan:
    """members: (worker, capacity in slabs) in rank order. held: worker -> groups that lie on its device and can be read, also of those that
    are no members any more. load[layer][expert]: tokens routed there, None where nothing was measured. replicas: hot groups get further
    holders where members have memory left. Raises DoesNotFit."""
    num_groups = -(-layers * experts // slabs_per_group)
    names = tuple(worker for worker, _ in members)
    room = [capacity // slabs_per_group for _, capacity in members]
    if sum(room) < num_groups:
        raise DoesNotFit(layers * experts, sum(room) * slabs_per_group)
    holding = {worker: sorted(groups) for worker, groups in held.items()}
    rows = [
        (-(-layer * experts // slabs_per_group), -(-(layer + 1) * experts // slabs_per_group))
        for layer in range(layers)
    ]
    loads = None if load is None else _group_loads(load, slabs_per_group)
    owner = _owners(num_groups, [holding.get(worker, []) for worker in names])
    shares = _shares(rows, owner, room)
    for (first, last), quota in zip(rows, shares, strict=True):
        _place_row(owner, first, last, quota, loads)
    ranks_of = [(rank,) for rank in range(len(names))]
    chosen: list[tuple[int, ...]] = [ranks_of[rank] for rank in owner]
    if replicas and loads is not None:
        _replicate(chosen, rows, room, loads, [set(holding.get(worker, ())) for worker in names])
    return Plan(
        members=names,
        holders=_holders(chosen, layers, experts, slabs_per_group),
        fetches=_fetches(chosen, names, holding),
        slabs_per_group=slabs_per_group,
        slab_bytes=slab_bytes,
    )


def keep(
    *,
    holders: Holders,
    members: Sequence[str],
    held: Mapping[str, Iterable[int]],
    slabs_per_group: int = 1,
    slab_bytes: int = 1,
) -> Plan:
    """The placement as it is, for the same members: what those must fetch whose groups are not `held` any more."""
    flat = [ranks for layer in holders for ranks in layer]
    return Plan(
        members=tuple(members),
        holders=holders,
        fetches=_fetches(flat[::slabs_per_group], members, {worker: sorted(groups) for worker, groups in held.items()}),
        slabs_per_group=slabs_per_group,
        slab_bytes=slab_bytes,
    )


def _group_loads(load: Sequence[Sequence[float]], size: int) -> list[float]:
    flat = [value for layer in load for value in layer]
    return flat if size == 1 else [sum(flat[first : first + size]) for first in range(0, len(flat), size)]


def _owners(num_groups: int, holding: Sequence[Sequence[int]]) -> list[int]:
    """The one rank that keeps each group for the time being, -1 where no member has it; of several holders the one with the fewest."""
    owner, count = [-1] * num_groups, [0] * len(holding)
    shared: dict[int, list[int]] = {}
    for rank, groups in enumerate(holding):
        for group in groups:
            if owner[group] < 0 and group not in shared:
                owner[group] = rank
            else:
                shared.setdefault(group, [owner[group]]).append(rank)
                owner[group] = -1
    for rank in owner:
        if rank >= 0:
            count[rank] += 1
    for group, ranks in sorted(shared.items()):
        rank = min((rank for rank in ranks if rank >= 0), key=lambda rank: (count[rank], rank))
        owner[group] = rank
        count[rank] += 1
    return owner


def _shares(rows: Sequence[tuple[int, int]], owner: Sequence[int], room: Sequence[int]) -> list[list[int]]:
    """[layer][rank] -> how many of the layer's groups the rank shall hold."""
    size = len(room)
    counts = []
    for first, last in rows:
        count = [0] * (size + 1)
        for rank in owner[first:last]:
            count[rank] += 1
        counts.append(count[:size])
    totals = _totals(sum(last - first for first, last in rows), room)
    return spread_extras([last - first for first, last in rows], totals, counts)


def _totals(groups: int, room: Sequence[int]) -> list[int] | None:
    """How many groups each rank shall hold where memory makes them differ (water filled to one level); None where all are alike."""
    if all(capacity >= -(-groups // len(room)) for capacity in room):
        return None
    totals = [0] * len(room)
    order = sorted(range(len(room)), key=lambda rank: room[rank])
    for position, rank in enumerate(order):
        totals[rank] = min(room[rank], groups // (len(order) - position))
        groups -= totals[rank]
    return totals


def _place_row(owner: list[int], first: int, last: int, quota: Sequence[int], loads: Sequence[float] | None) -> None:
    """Move as few groups of one layer as the quotas ask, so that the ranks' loads come close to each other."""
    mine: list[list[int]] = [[] for _ in quota]
    pool = []
    for group in range(first, last):
        rank = owner[group]
        if rank < 0:
            pool.append(group)
        else:
            mine[rank].append(group)
    total = sum(loads[first:last]) if loads is not None else 0.0
    for rank, groups in enumerate(mine):
        if len(groups) > quota[rank]:
            pool += _give(groups, len(groups) - quota[rank], loads, total * quota[rank] / (last - first))
    if not pool:
        return
    if loads is None:
        takers = [rank for rank, groups in enumerate(mine) for _ in range(quota[rank] - len(groups))]
        for group, rank in zip(pool, takers, strict=True):
            owner[group] = rank
        return
    pool.sort()
    pool.sort(key=loads.__getitem__, reverse=True)
    missing = [share - len(groups) for share, groups in zip(quota, mine, strict=True)]
    heap = [(sum([loads[g] for g in mine[rank]]), rank) for rank, more in enumerate(missing) if more > 0]
    heapify(heap)
    for group in pool:
        carried, rank = heap[0]
        owner[group] = rank
        missing[rank] -= 1
        if missing[rank]:
            heapreplace(heap, (carried + loads[group], rank))
        else:
            heappop(heap)


def _give(groups: list[int], number: int, loads: Sequence[float] | None, target: float) -> list[int]:
    """Take `number` groups out of a rank's, so that what stays carries about `target`."""
    if loads is None:
        given = groups[-number:]
        del groups[-number:]
        return given
    groups.sort(key=loads.__getitem__)
    weights = [loads[group] for group in groups]
    if 2 * number > len(groups):  # fewer stay than go: pick those
        kept = _pick(groups, weights, len(groups) - number, target)
        given, groups[:] = groups[:], kept
        return given
    return _pick(groups, weights, number, sum(weights) - target)


def _pick(groups: list[int], weights: list[float], number: int, target: float) -> list[int]:
    """Take `number` out of `groups` (ascending by weight) that weigh about `target` together."""
    picked = []
    for left in range(number, 0, -1):
        wanted = target / left
        at = bisect_left(weights, wanted)
        if at == len(weights) or (at > 0 and wanted - weights[at - 1] < weights[at] - wanted):
            at -= 1
        target -= weights.pop(at)
        picked.append(groups.pop(at))
    return picked


def _replicate(
    chosen: list[tuple[int, ...]],
    rows: Sequence[tuple[int, int]],
    room: Sequence[int],
    loads: Sequence[float],
    holding: Sequence[set[int]],
) -> None:
    """Give groups that carry more than the mean of their layer further holders, the hottest first, where groups fit; a copy that is there
    already is kept rather than another made."""
    free = list(room)
    carried = [0.0] * len(room)
    for group, ranks in enumerate(chosen):
        free[ranks[0]] -= 1
        carried[ranks[0]] += loads[group]
    heap: list[tuple[float, int, float]] = []
    for first, last in rows:
        mean = sum(loads[first:last]) / max(1, last - first)
        heap += [(-loads[group], group, mean) for group in range(first, last) if loads[group] > mean]
    heapify(heap)
    while heap and any(free):
        _, group, mean = heappop(heap)
        ranks = chosen[group]
        takers = [rank for rank, left in enumerate(free) if left > 0 and rank not in ranks]
        if not takers:
            continue
        taker = min(takers, key=lambda rank: (group not in holding[rank], carried[rank], rank))
        before, after = loads[group] / len(ranks), loads[group] / (len(ranks) + 1)
        for rank in ranks:
            carried[rank] -= before - after
        carried[taker] += after
        free[taker] -= 1
        chosen[group] = tuple(sorted((*ranks, taker)))
        if after > mean:
            heappush(heap, (-after, group, mean))


def _holders(chosen: Sequence[tuple[int, ...]], layers: int, experts: int, size: int) -> Holders:
    slots = chosen if size == 1 else [ranks for ranks in chosen for _ in range(size)]
    return tuple(tuple(slots[layer * experts : (layer + 1) * experts]) for layer in range(layers))


def _fetches(
    chosen: Sequence[tuple[int, ...]], names: Sequence[str], holding: Mapping[str, Sequence[int]]
) -> dict[str, dict[str | None, list[int]]]:
    """What each member lacks, from the holder that has been asked for the least so far."""
    workers = sorted(holding)
    first = [-1] * len(
        chosen
    )  # a holder of the group, as a position in `workers`; further ones, which are few, in `others`
    others: dict[int, list[int]] = {}
    for position, worker in enumerate(workers):
        for group in holding[worker]:
            if first[group] < 0:
                first[group] = position
            else:
                others.setdefault(group, [first[group]]).append(position)
    own = [workers.index(worker) if worker in holding else -2 for worker in names]
    asked = [0] * len(workers)
    wanted: list[dict[int, list[int]]] = [{} for _ in names]
    for group, ranks in enumerate(chosen):
        there = others.get(group)
        for rank in ranks:
            source = first[group]
            if own[rank] == source or (there and own[rank] in there):
                continue
            if there:
                source = min(there, key=asked.__getitem__)
            if source >= 0:
                asked[source] += 1
            if source in wanted[rank]:
                wanted[rank][source].append(group)
            else:
                wanted[rank][source] = [group]
    return {
        worker: {workers[source] if source >= 0 else None: groups for source, groups in lacking.items()}
        for worker, lacking in zip(names, wanted, strict=True)
        if lacking
    }
