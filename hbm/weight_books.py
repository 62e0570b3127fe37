"""The books of weights: segments under keys, the loads that fill them, the pins of those who read them. Pure.

A segment has granules of its own and a life of its own:

    (absent) ──begin_load──> loading ──load_ready──> ready ──drop──> dropped ──last pin goes──> (granules free)
                                │                      └──drop, nobody reads──> (granules free)
                                ├──load_failed──> (granules free)
                                └──drop──> dropped ──the helper has exited: load_failed──> (granules free)

Dropping frees the name at once. The granules follow when nobody can reach them any more: the readers, each of which
holds a pin until it has unmapped or exited, and the loader helper, until it has exited. A load is all or nothing: its
segments become ready together or go together, also where only one of them is dropped. A key exists as long as it has a
segment. Called by `books`, and by the daemon for what concerns weights alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from flexpert.hbm.errors import BusyError, HbmError, LoadError, NotFoundError
from flexpert.hbm.granules import Extent, split
from flexpert.hbm.ledger import Ledger
from flexpert.hbm.records import LoadRecord, Pin, Segment, WeightSet

_NAMES_SHOWN = 5


class WeightBooks:
    """Methods change everything or, raising, nothing."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.sets: dict[str, WeightSet] = {}
        self.loads: dict[int, LoadRecord] = {}
        self.pins: dict[int, Pin] = {}
        self.dropped: dict[int, Segment] = {}  # by owner id; without a name, but within someone's reach
        self.failures: dict[str, str] = {}  # why a key that has no segments has none

    # Loading

    def outstanding(self, key: str, wanted: Mapping[str, int]) -> tuple[dict[str, int], int | None]:
        """(segments that nobody has or loads, a running load that fills another of the wanted ones).

        Raises LoadError for sizes that are none, or another than that of the segment which is there.
        """
        if not wanted or min(wanted.values()) <= 0:
            wrong = [f"{name!r}: {nbytes}" for name, nbytes in wanted.items() if nbytes <= 0]
            raise LoadError(
                f"weights {key!r}: expected at least one segment, each of at least 1 byte, got {_some(wrong) or 'none'}"
            )
        there = self.sets[key].segments if key in self.sets else {}
        missing: dict[str, int] = {}
        load_id = None
        for name, nbytes in wanted.items():
            segment = there.get(name)
            if segment is None:
                missing[name] = nbytes
            elif segment.nbytes != nbytes:
                raise LoadError(
                    f"weights {key!r}: segment {name!r} is there with {segment.nbytes} bytes, the plan has {nbytes}; "
                    "another content needs another key"
                )
            elif segment.load_id:
                load_id = segment.load_id
        return missing, load_id

    def num_granules_for(self, segments: Mapping[str, int]) -> int:
        return sum(map(self._ledger.granules_for, segments.values()))

    def begin_load(self, key: str, segments: Mapping[str, int], manifest: bytes) -> LoadRecord:
        """Granules for segments that are `outstanding`; the caller has seen to it that enough are free."""
        weight_set = self.sets.get(key)
        if weight_set is not None and any(name in weight_set.segments for name in segments):
            raise BusyError(f"weights {key!r}: some of these segments exist already")
        if weight_set is None:
            weight_set = self.sets[key] = WeightSet(key, manifest)
        self.failures.pop(key, None)
        counts = [self._ledger.granules_for(nbytes) for nbytes in segments.values()]
        load = LoadRecord(self._ledger.new_id(), key, {})
        parts = split(self._ledger.take(sum(counts), load.load_id), counts)
        for (name, nbytes), extents in zip(segments.items(), parts, strict=True):
            segment = Segment(self._ledger.new_id(), key, name, nbytes, extents, load.load_id)
            self._ledger.set_owner(extents, segment.owner_id)
            load.segments[name] = weight_set.segments[name] = segment
        self.loads[load.load_id] = load
        return load

    def load_ready(self, load_id: int) -> None:
        """Its helper has finished and exited."""
        load = self.loads[load_id]
        if load.abandoned:
            raise HbmError(f"load {load_id} of weights {load.key!r} was abandoned: it can only fail")
        del self.loads[load_id]
        for segment in load.segments.values():
            segment.load_id = 0

    def load_failed(self, load_id: int, reason: str) -> None:
        """Its helper has exited without having finished: the key is as it was before. Where that was nothing, the
        reason stays until the next try.
        """
        load = self.loads.pop(load_id)
        if load.abandoned:
            for segment in load.segments.values():
                del self.dropped[segment.owner_id]
        else:
            weight_set = self.sets[load.key]
            for name in load.segments:
                del weight_set.segments[name]
            if not weight_set.segments:
                del self.sets[load.key]
                self.failures[load.key] = reason
        self._free(load.segments.values())

    # Reading

    def ready_segments(self, key: str) -> dict[str, int]:
        """Names and bytes; empty for an unknown key."""
        weight_set = self.sets.get(key)
        if weight_set is None:
            return {}
        return {name: segment.nbytes for name, segment in weight_set.segments.items() if not segment.load_id}

    def pin(self, key: str, names: Sequence[str] | None, client_id: int) -> tuple[Pin, bytes]:
        """(these segments in this order, held for the client; the key's manifest). None: all of the key. NotFoundError,
        BusyError while one of them is being loaded.
        """
        weight_set = self.sets.get(key)
        if weight_set is None:
            reason = self.failures.get(key)
            found = _some(map(repr, self.sets)) or "none"
            raise NotFoundError(
                f"no weights {key!r}: {f'loading failed: {reason}' if reason else f'there are {found}'}"
            )
        segments = self._named(weight_set, weight_set.segments if names is None else names)
        loading = [repr(segment.name) for segment in segments if segment.load_id]
        if loading:
            raise BusyError(
                f"weights {key!r} are still being loaded (segments {_some(loading)}); loading them again waits for them"
            )
        for segment in segments:
            segment.num_pins += 1
        pin = Pin(self._ledger.new_id(), client_id, tuple(segments))
        self.pins[pin.pin_id] = pin
        return pin, weight_set.manifest

    def unpin(self, pin_id: int, client_id: int) -> None:
        """The client has unmapped them."""
        pin = self.pins.get(pin_id)
        if pin is None or pin.client_id != client_id:
            raise NotFoundError(f"this client has no mapping of weights number {pin_id}")
        self._unpin(pin)

    def client_exited(self, client_id: int) -> None:
        for pin in [pin for pin in self.pins.values() if pin.client_id == client_id]:
            self._unpin(pin)

    def has_pins(self, client_id: int) -> bool:
        return any(pin.client_id == client_id for pin in self.pins.values())

    # Dropping

    def drop(self, key: str, names: Sequence[str] | None = None) -> list[int]:
        """The names (None: the key with all of them) are free at once. The loads that were filling one of them are
        abandoned, and returned: their helpers have to be ended. NotFoundError for a name that is not there.
        """
        weight_set = self.sets.get(key)
        if weight_set is None:
            if names is None and self.failures.pop(key, None) is not None:
                return []
            raise NotFoundError(f"no weights {key!r} to drop")
        segments = self._named(weight_set, list(weight_set.segments) if names is None else names)
        abandoned = sorted({segment.load_id for segment in segments if segment.load_id})
        for load_id in abandoned:
            self.loads[load_id].abandoned = True
            self._set_aside(weight_set, self.loads[load_id].segments.values())
        ready = [segment for segment in segments if not segment.load_id]
        self._set_aside(weight_set, [segment for segment in ready if segment.num_pins])
        unread = [segment for segment in ready if not segment.num_pins]
        for segment in unread:
            del weight_set.segments[segment.name]
        self._free(unread)
        if not weight_set.segments:
            del self.sets[key]
        return abandoned

    # Private

    def _named(self, weight_set: WeightSet, names: Iterable[str]) -> list[Segment]:
        """Each of the names once, all there, at least one."""
        names = list(names)
        there = weight_set.segments
        unknown = [repr(name) for name in names if name not in there]
        if unknown:
            raise NotFoundError(
                f"weights {weight_set.key!r} have no segments {_some(unknown)}; they have {_some(map(repr, there))}"
            )
        if not names or len(set(names)) != len(names):
            raise HbmError(f"weights {weight_set.key!r}: expected names of segments, each once, got {_some(names)}")
        return [there[name] for name in names]

    def _set_aside(self, weight_set: WeightSet, segments: Iterable[Segment]) -> None:
        for segment in segments:
            segment.dropped = True
            self.dropped[segment.owner_id] = weight_set.segments.pop(segment.name)

    def _unpin(self, pin: Pin) -> None:
        del self.pins[pin.pin_id]
        unread = []
        for segment in pin.segments:
            segment.num_pins -= 1
            if segment.dropped and not segment.num_pins:
                unread.append(self.dropped.pop(segment.owner_id))
        self._free(unread)

    def _free(self, segments: Iterable[Segment]) -> None:
        extents: list[Extent] = []
        for segment in segments:
            extents.extend(segment.extents)
        self._ledger.give(extents)


def _some(names: Iterable[str]) -> str:
    """The first few, for a message."""
    all_names = list(names)
    more = len(all_names) - _NAMES_SHOWN
    return ", ".join(all_names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
