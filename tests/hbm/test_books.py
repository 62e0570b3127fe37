"""The books against a model of what clients could still reach: whatever happens in whatever order, no granule is
reassigned while a process that is not known to have exited may have it mapped, and the books prove themselves right.
"""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flexpert.hbm.books import Books
from flexpert.hbm.errors import BudgetError, BusyError, FencedError, HbmError, LoadError, NotFoundError, ProtocolError
from flexpert.hbm.granules import Extent, ids_of
from flexpert.hbm.records import Arena, Client, Geometry, Lease

GRANULE_BYTES = 100
NUM_GRANULES = 24
GEOMETRIES = [Geometry(2, 4, 4), Geometry(3, 5, 10), Geometry(1, 30, 20)]
AS_IT_IS = Geometry(2, 4, 0)  # with as many granules as the arena has
SIZES = [1, 100, 250, 301, 700, 1100]
NAMES = st.none() | st.lists(st.sampled_from("abcd"), min_size=1, max_size=3)
OUTCOMES = st.sampled_from("rrrfl")


def books_with(*tokens: int) -> Books:
    """Clients 1, 2, ... with these fencing tokens, each in a process of its own."""
    books = Books(num_granules=NUM_GRANULES, granule_bytes=GRANULE_BYTES)
    for number, token in enumerate(tokens, start=1):
        books.add_client(Client(number, pid=1000 + number, name=f"c{number}", fencing_token=token))
    return books


def leased(books: Books, client_id: int, geometry: Geometry = GEOMETRIES[0]) -> Lease:
    lease, _ = books.open_arena(client_id, "kv", geometry, request=1)
    assert lease is not None
    return lease


def loaded(books: Books, segments: dict[str, int]) -> None:
    books.weights.load_ready(books.begin_load("w", segments, b"").load_id)


def test_an_older_token_is_refused_for_ever() -> None:
    books = books_with(5, 4)
    lease = leased(books, 1)
    books.release_arena(lease.lease_id, 1)
    books.drop_arena("kv")
    with pytest.raises(FencedError, match="token 4 is older than 5"):
        books.open_arena(2, "kv", GEOMETRIES[0], request=1)


def test_an_equal_token_does_not_take_over_from_a_holder() -> None:
    books = books_with(5, 5)
    leased(books, 1)
    with pytest.raises(FencedError, match="only a larger token"):
        books.open_arena(2, "kv", GEOMETRIES[0], request=1)


def test_a_newer_token_waits_for_the_holders_exit_and_not_only_for_its_socket() -> None:
    books = books_with(1, 2)
    leased(books, 1)
    assert books.open_arena(2, "kv", GEOMETRIES[0], request=7) == (None, None)
    assert books.client_closed(1)
    assert books.arenas["kv"].lease is not None
    [arena] = books.client_exited(1)
    waiter, lease = books.grant_waiter(arena)
    assert (waiter.request, lease.client_id) == (7, 2)
    assert books.check() == []


def test_the_newest_of_two_that_wait_displaces_the_other() -> None:
    books = books_with(1, 2, 3)
    leased(books, 1)
    books.open_arena(2, "kv", GEOMETRIES[0], request=7)
    lease, displaced = books.open_arena(3, "kv", GEOMETRIES[0], request=8)
    assert lease is None
    assert displaced is not None
    assert displaced.client_id == 2


def test_a_process_cannot_wait_for_itself() -> None:
    books = books_with(1)
    books.add_client(Client(9, pid=1001, name="same process", fencing_token=2))
    leased(books, 1)
    with pytest.raises(BusyError, match="this process"):
        books.open_arena(9, "kv", GEOMETRIES[0], request=1)


def test_records_stay_for_the_next_holder_of_the_same_geometry() -> None:
    books = books_with(1, 2)
    arena = books.arena_of(leased(books, 1).lease_id, 1)
    [first, *_] = ids_of(arena.extents)
    books.claim(arena, 1, "r")
    books.map(arena, 1, 0, [first])
    books.client_exited(1)
    leased(books, 2)
    assert [(slot.request_id, slot.granules) for slot in books.arenas["kv"].table] == [("", []), ("r", [first])]


def test_another_geometry_makes_the_arena_anew() -> None:
    books = books_with(1, 2)
    arena = books.arena_of(leased(books, 1).lease_id, 1)
    books.claim(arena, 1, "r")
    books.client_exited(1)
    leased(books, 2, GEOMETRIES[1])
    assert all(slot.request_id == "" for slot in books.arenas["kv"].table)
    assert books.ledger.take_released() == [Extent(0, 4)]
    assert books.check() == []


def test_an_arena_that_does_not_fit_says_what_is_needed_and_who_has_the_rest() -> None:
    books = books_with(1)
    books.begin_load("w", {"a": 1950}, b"")
    with pytest.raises(
        BudgetError, match=r"1000 bytes \(10 granules of 100\) are needed, 400 are free.*weights hold 2000"
    ):
        books.open_arena(1, "kv", GEOMETRIES[1], request=1)
    assert books.arenas == {}


def test_a_remade_arena_that_does_not_fit_leaves_the_old_one() -> None:
    books = books_with(1)
    arena = books.arena_of(leased(books, 1).lease_id, 1)
    books.claim(arena, 0, "r")
    books.release_arena(1 if arena.lease is None else arena.lease.lease_id, 1)
    with pytest.raises(BudgetError):
        books.open_arena(1, "kv", Geometry(1, 1, 100), request=1)
    assert books.arenas["kv"].table[0].request_id == "r"


@pytest.mark.parametrize(
    ("slot", "first", "granules"),
    [
        (2, 0, [0]),
        (-1, 0, [0]),
        (0, 1, [0]),
        (0, 0, [0, 1, 2, 3, 0]),
        (0, 0, [5]),
        (0, 0, [-1]),
        (0, 0, [NUM_GRANULES]),
    ],
)
def test_a_wrong_mapping_is_refused_and_changes_nothing(slot: int, first: int, granules: list[int]) -> None:
    books = books_with(1)
    arena = books.arena_of(leased(books, 1).lease_id, 1)
    books.begin_load("w", {"a": 300}, b"")  # owns granules 4 to 6
    with pytest.raises(ProtocolError):
        books.map(arena, slot, first, granules)
    assert all(slot.granules == [] for slot in arena.table)


def test_a_lease_is_of_no_use_to_another_client() -> None:
    books = books_with(1, 2)
    lease = leased(books, 1)
    with pytest.raises(ProtocolError, match="not held by this client"):
        books.arena_of(lease.lease_id, 2)


def test_dropped_weights_keep_their_granules_until_the_last_reader_goes() -> None:
    books = books_with(0, 0)
    loaded(books, {"a": 250, "b": 1})
    books.weights.pin("w", None, 1)
    books.weights.pin("w", ["b"], 2)
    assert books.weights.drop("w") == []
    with pytest.raises(NotFoundError):
        books.weights.pin("w", None, 2)
    books.client_exited(1)
    assert books.ledger.pool.num_free == NUM_GRANULES - 1
    books.client_exited(2)
    assert books.ledger.pool.num_free == NUM_GRANULES


def test_a_reader_that_mapped_twice_has_to_let_go_twice() -> None:
    books = books_with(0)
    loaded(books, {"a": 1})
    pins = [books.weights.pin("w", None, 1)[0] for _ in range(2)]
    books.weights.drop("w")
    books.weights.unpin(pins[0].pin_id, 1)
    assert books.ledger.pool.num_free == NUM_GRANULES - 1
    with pytest.raises(NotFoundError, match="no mapping"):
        books.weights.unpin(pins[0].pin_id, 1)
    books.weights.unpin(pins[1].pin_id, 1)
    assert books.ledger.pool.num_free == NUM_GRANULES
    assert books.check() == []


def test_a_segment_that_is_dropped_while_it_is_loaded_takes_its_whole_load_along() -> None:
    books = books_with(0)
    loaded(books, {"a": 1})
    load = books.begin_load("w", {"b": 200, "c": 1}, b"")
    assert books.weights.drop("w", ["a", "c"]) == [load.load_id]
    assert "w" not in books.weights.sets
    loaded(books, {"b": 100})  # its name is free
    assert books.ledger.pool.num_free == NUM_GRANULES - 4  # its granules are not, before the helper's exit
    assert books.check() == []
    with pytest.raises(HbmError, match="can only fail"):
        books.weights.load_ready(load.load_id)
    books.weights.load_failed(load.load_id, "dropped")
    assert books.ledger.pool.num_free == NUM_GRANULES - 1
    assert (books.weights.ready_segments("w"), books.weights.failures) == ({"b": 100}, {})
    assert books.check() == []


def test_a_failed_load_keeps_its_reason_only_where_the_key_has_nothing() -> None:
    books = books_with(0)
    books.weights.load_failed(books.begin_load("w", {"a": 1}, b"").load_id, "no file")
    with pytest.raises(NotFoundError, match="loading failed: no file"):
        books.weights.pin("w", None, 1)
    loaded(books, {"a": 1})
    books.weights.load_failed(books.begin_load("w", {"b": 1}, b"").load_id, "no file")
    assert (books.weights.failures, books.weights.ready_segments("w")) == ({}, {"a": 1})


def test_what_is_outstanding_is_what_nobody_has_and_a_load_to_wait_for() -> None:
    books = books_with(0)
    loaded(books, {"a": 1})
    load = books.begin_load("w", {"b": 1}, b"")
    assert books.weights.outstanding("w", {"a": 1, "b": 1, "c": 9}) == ({"c": 9}, load.load_id)
    assert books.weights.outstanding("w", {"a": 1}) == ({}, None)
    assert books.weights.outstanding("v", {"a": 7}) == ({"a": 7}, None)
    for wrong in ({}, {"c": 0}, {"a": 2}):
        with pytest.raises(LoadError):
            books.weights.outstanding("w", wrong)


def test_a_waiter_that_takes_the_arena_as_it_is_gets_what_it_grew_to() -> None:
    books = books_with(1, 2)
    arena = books.arena_of(leased(books, 1).lease_id, 1)
    books.claim(arena, 1, "r")
    assert books.open_arena(2, "kv", AS_IT_IS, request=7) == (None, None)
    books.grow_arena(arena, 3)
    books.shrink_arena(arena, [Extent(0, 1), Extent(2, 2)])
    [freed] = books.client_exited(1)
    books.grant_waiter(freed)
    assert (arena is books.arenas["kv"], arena.geometry, arena.table[1].request_id) == (True, Geometry(2, 4, 4), "r")
    assert arena.extents == (Extent(1, 1), Extent(4, 3))
    assert books.check() == []


def test_the_audit_sees_wrong_pins_loads_and_lost_names() -> None:
    books = books_with(0)
    loaded(books, {"a": 1, "b": 1})
    books.weights.pin("w", ["a"], 1)
    a, b = books.weights.sets["w"].segments.values()
    for change, message in (
        (lambda: setattr(a, "num_pins", 0), "'a': 0 pins are entered, 1 are held"),
        (lambda: setattr(b, "num_pins", 2), "'b': 2 pins are entered, 0 are held"),
        (lambda: setattr(b, "load_id", 99), "load 99 is not known"),
        (lambda: setattr(b, "dropped", True), "dropped=True, under its name=True"),
        (lambda: setattr(b, "nbytes", 101), "are not the granules of 101 bytes"),
        (lambda: books.weights.sets["w"].segments.pop("b"), "granule 1 is entered for owner"),
        (lambda: books.weights.sets["w"].segments.clear(), "weights 'w' have no segment"),
        (lambda: books.clients.clear(), "its reader, client 1, is not known"),
    ):
        change()
        assert any(message in finding for finding in books.check()), message


def test_the_audit_sees_an_arena_whose_granules_do_not_add_up() -> None:
    books = books_with(1)
    arena = books.arena_of(leased(books, 1).lease_id, 1)
    arena.extents = (Extent(0, 2), Extent(2, 2))
    assert any("its extents touch" in finding for finding in books.check())
    arena.extents = (Extent(0, 3),)
    findings = "\n".join(books.check())
    assert "does not have its Geometry" in findings
    assert "granule 3 is entered for owner" in findings


def test_the_audit_sees_a_granule_with_two_owners() -> None:
    books = books_with(1)
    leased(books, 1)
    loaded(books, {"a": 100})
    books.weights.sets["w"].segments["a"].extents = (Extent(0, 1),)
    assert any("another owner" in finding for finding in books.check())


def test_the_audit_sees_a_lease_of_nobody_and_a_foreign_mapping() -> None:
    books = books_with(1)
    arena = books.arena_of(leased(books, 1).lease_id, 1)
    arena.table[0].granules.append(23)
    del books.clients[1]
    findings = "\n".join(books.check())
    assert "holder, client 1, is not known" in findings
    assert "granule 23 belongs to 0" in findings


class AnyHistory(RuleBasedStateMachine):
    """`reach` is the model: what each process that has not exited may still have mapped."""

    def __init__(self) -> None:
        super().__init__()
        self.books = Books(num_granules=NUM_GRANULES, granule_bytes=GRANULE_BYTES)
        self.alive: set[int] = set()
        self.writes: dict[int, tuple[int, frozenset[int], int]] = {}  # lease id -> client, granules, owner id
        self.reads: list[tuple[int, dict[int, int], int]] = []  # client, granule -> owner id, pin id
        self.fills: dict[int, dict[int, int]] = {}  # load id -> granule -> owner id: what its helper can write
        self.next_client = 0

    clients = st.integers(1, 6)
    keys = st.sampled_from(["w"])
    names = st.sampled_from(["kv", "kv", "kv", "kv2"])

    @initialize()
    def two_clients(self) -> None:
        self.connect(0)
        self.connect(1)

    @rule(newer=st.integers(-1, 2))
    def connect(self, newer: int) -> None:
        self.next_client += 1
        token = max(0, self.books.tokens.get("kv", 0) + newer)
        self.books.add_client(Client(self.next_client, pid=self.next_client, name="c", fencing_token=token))
        self.alive.add(self.next_client)

    def pick(self, number: int) -> int | None:
        connected = sorted(c for c in self.alive if c in self.books.clients and self.books.clients[c].connected)
        return connected[number % len(connected)] if connected else None

    @rule(number=clients)
    def take_over(self, number: int) -> None:
        """A new client with a newer token that finds the arena held, and sometimes gives up waiting."""
        self.connect(1)
        with contextlib.suppress(BudgetError):
            lease, _ = self.books.open_arena(self.next_client, "kv", GEOMETRIES[number % 3], request=1)
            if lease is not None:
                self.note(self.books.arenas["kv"], lease)
            elif number == 1:
                self.alive.discard(self.next_client)
                assert self.books.client_exited(self.next_client) == []

    @rule(number=clients)
    def close_socket(self, number: int) -> None:
        client = self.pick(number)
        if client is not None:
            holds = client in {w[0] for w in self.writes.values()} or client in {r[0] for r in self.reads}
            assert self.books.client_closed(client) == holds

    @precondition(lambda self: self.alive)
    @rule(number=clients)
    def exit(self, number: int) -> None:
        client = sorted(self.alive)[number % len(self.alive)]
        self.alive.discard(client)
        self.writes = {k: v for k, v in self.writes.items() if v[0] != client}
        self.reads = [read for read in self.reads if read[0] != client]
        for arena in self.books.client_exited(client):
            self.grant(arena)

    def grant(self, arena: Arena) -> None:
        with contextlib.suppress(BudgetError):
            _, lease = self.books.grant_waiter(arena)
            self.note(self.books.arenas[arena.name], lease)

    def note(self, arena: Arena, lease: Lease) -> None:
        self.writes[lease.lease_id] = (lease.client_id, frozenset(ids_of(arena.extents)), arena.owner_id)

    @rule(key=keys, wanted=st.dictionaries(st.sampled_from("abcd"), st.integers(1, 5), min_size=1), outcome=OUTCOMES)
    def load(self, key: str, wanted: dict[str, int], outcome: str) -> None:
        before = self.books.weights.ready_segments(key)
        sizes = {name: SIZES[number] for name, number in wanted.items()}
        with contextlib.suppress(BudgetError, LoadError):
            missing, _ = self.books.weights.outstanding(key, sizes)
            if missing:
                load = self.books.begin_load(key, missing, b"")
                granules = frozenset(g for segment in load.segments.values() for g in ids_of(segment.extents))
                self.fills[load.load_id] = {g: self.books.ledger.owner_of[g] for g in granules}
                self.load_ends(load.load_id, outcome)
                if outcome == "r":
                    assert self.books.weights.ready_segments(key) == before | missing
                    return
        assert self.books.weights.ready_segments(key) == before

    @precondition(lambda self: self.fills)
    @rule(number=clients, outcome=st.sampled_from("rf"))
    def a_load_ends(self, number: int, outcome: str) -> None:
        self.load_ends(sorted(self.fills)[number % len(self.fills)], outcome)

    def load_ends(self, load_id: int, outcome: str) -> None:
        """r: ready, f: failed, l: not yet. One that was abandoned can only fail."""
        if outcome == "l":
            return
        del self.fills[load_id]
        if outcome == "r" and not self.books.weights.loads[load_id].abandoned:
            self.books.weights.load_ready(load_id)
        else:
            self.books.weights.load_failed(load_id, "why not")

    @rule(key=keys, number=clients, names=NAMES, times=st.integers(1, 2))
    def pin(self, key: str, number: int, names: list[str] | None, times: int) -> None:
        client = self.pick(number)
        for _ in range(times if client is not None else 0):
            with contextlib.suppress(NotFoundError, BusyError, HbmError):
                pin, _ = self.books.weights.pin(key, names, client)
                assert names is None or [segment.name for segment in pin.segments] == names
                owners = {g: segment.owner_id for segment in pin.segments for g in ids_of(segment.extents)}
                self.reads.append((client, owners, pin.pin_id))

    @precondition(lambda self: self.reads)
    @rule(number=clients)
    def unpin(self, number: int) -> None:
        read = self.reads[number % len(self.reads)]
        if self.books.clients[read[0]].connected:
            self.books.weights.unpin(read[2], read[0])
            self.reads.remove(read)

    @rule(key=keys, names=NAMES)
    def drop(self, key: str, names: list[str] | None) -> None:
        before = self.books.weights.ready_segments(key)
        try:
            abandoned = self.books.weights.drop(key, names)
        except HbmError:
            assert self.books.weights.ready_segments(key) == before
            return
        assert set(abandoned) <= set(self.fills)
        left = {name: size for name, size in before.items() if names is not None and name not in names}
        assert self.books.weights.ready_segments(key) == left
        gone = dict.fromkeys("abcd" if names is None else names, 1)
        assert self.books.weights.outstanding(key, gone) == (gone, None)

    @rule(name=names, number=clients, geometry=st.sampled_from([*GEOMETRIES, AS_IT_IS]))
    def open_arena(self, name: str, number: int, geometry: Geometry) -> None:
        client = self.pick(number)
        if client is None:
            return
        seen = self.books.tokens.get(name, 0)
        try:
            lease, _ = self.books.open_arena(client, name, geometry, request=1)
        except (FencedError, BusyError, BudgetError, NotFoundError):
            return
        assert self.books.clients[client].fencing_token >= seen
        if lease is not None:
            self.note(self.books.arenas[name], lease)

    @precondition(lambda self: self.writes)
    @rule(number=clients)
    def release(self, number: int) -> None:
        lease_id = sorted(self.writes)[number % len(self.writes)]
        client = self.writes[lease_id][0]
        if self.books.clients[client].connected:
            del self.writes[lease_id]
            arena = self.books.release_arena(lease_id, client)
            if arena.waiter is not None:
                self.grant(arena)

    @rule(name=names)
    def drop_arena(self, name: str) -> None:
        with contextlib.suppress(NotFoundError, BusyError):
            self.books.drop_arena(name)

    @precondition(lambda self: self.writes)
    @rule(number=clients, count=st.integers(-1, 6))
    def grow(self, number: int, count: int) -> None:
        lease_id = sorted(self.writes)[number % len(self.writes)]
        client, granules, owner_id = self.writes[lease_id]
        with contextlib.suppress(HbmError):
            added = set(ids_of(self.books.grow_arena(self.books.arena_of(lease_id, client), count)))
            assert len(added) == count and added.isdisjoint(granules)
            self.writes[lease_id] = (client, granules | added, owner_id)

    @precondition(lambda self: self.writes)
    @rule(number=clients, index=st.integers(0, 23))
    def shrink_what_is_mapped(self, number: int, index: int) -> None:
        lease_id = sorted(self.writes)[number % len(self.writes)]
        client, granules, _ = self.writes[lease_id]
        arena = self.books.arena_of(lease_id, client)
        granule = sorted(granules)[index % len(granules)]
        self.books.map(arena, 0, 0, [granule])
        with pytest.raises(HbmError):
            self.books.shrink_arena(arena, [Extent(granule, 1)])

    @precondition(lambda self: self.writes)
    @rule(number=clients, ids=st.lists(st.integers(-1, 25), max_size=4), own=st.booleans())
    def shrink(self, number: int, ids: list[int], own: bool) -> None:
        lease_id = sorted(self.writes)[number % len(self.writes)]
        client, granules, owner_id = self.writes[lease_id]
        arena = self.books.arena_of(lease_id, client)
        if own:
            ids = list({sorted(granules)[index % len(granules)] for index in ids})
        mapped = {granule for slot in arena.table for granule in slot.granules}
        with contextlib.suppress(HbmError):
            self.books.shrink_arena(arena, [Extent(granule, 1) for granule in ids])
            assert set(ids) <= granules and mapped.isdisjoint(ids) and len(set(ids)) == len(ids)
            self.writes[lease_id] = (client, granules - set(ids), owner_id)

    @precondition(lambda self: self.writes)
    @rule(
        number=clients,
        slot=st.integers(-1, 3),
        first=st.integers(0, 3),
        granules=st.lists(st.integers(-1, 25), max_size=5),
    )
    def map(self, number: int, slot: int, first: int, granules: list[int]) -> None:
        lease_id = sorted(self.writes)[number % len(self.writes)]
        arena = self.books.arena_of(lease_id, self.writes[lease_id][0])
        with contextlib.suppress(ProtocolError):
            self.books.map(arena, slot, first, granules)
            assert set(granules) <= self.writes[lease_id][1]

    @precondition(lambda self: self.writes)
    @rule(number=clients, slot=st.integers(0, 3), first=st.integers(0, 3))
    def unmap_and_claim(self, number: int, slot: int, first: int) -> None:
        lease_id = sorted(self.writes)[number % len(self.writes)]
        arena = self.books.arena_of(lease_id, self.writes[lease_id][0])
        with contextlib.suppress(HbmError):
            self.books.unmap(arena, slot, first)
            self.books.claim(arena, slot, f"r{number}")

    @invariant()
    def books_prove_themselves(self) -> None:
        assert self.books.check() == []

    @invariant()
    def nothing_within_reach_is_reassigned(self) -> None:
        owner_of = self.books.ledger.owner_of
        for _client, granules, owner_id in self.writes.values():
            assert {owner_of[granule] for granule in granules} == {owner_id}
        for owners in [*(owners for _client, owners, _pin in self.reads), *self.fills.values()]:
            assert {granule: owner_of[granule] for granule in owners} == owners
        writers = [(granules, owner_id) for _client, granules, owner_id in self.writes.values()]
        assert len({owner_id for _, owner_id in writers}) == len(writers), "two writers of one arena"


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=120, stateful_step_count=40)
