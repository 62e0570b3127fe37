"""A worker that ends leaves no question open."""

from __future__ import annotations

from tests.workers.played_membership import PlayedMember


def test_nobody_waits_for_trouble_of_a_worker_that_was_closed(monkeypatch):
    member = PlayedMember(monkeypatch)
    waiting = [member.membership.wait_trouble() for _ in range(3)]
    member.close()
    assert [each.result(0) for each in waiting] == [None] * 3
    assert member.membership.wait_trouble().result(0) is None
