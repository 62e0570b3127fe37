"""The longest common prefix of a new request over the token sequences that slots hold, exact to the token.

A radix tree: each node's edge is a run of tokens, and every slot whose sequence passes through an edge is listed at its
node. A sequence always ends where a node ends, so a walk that leaves an edge half-way has matched what every slot of
that node holds. Matching costs the length of the prompt, not the number of slots; a running request's sequence grows in
place.

Pure: no memory, no clock. Called by `workers.kv_books`, which says which tokens are committed; this module knows of
none else.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence


class _Node:
    """The edge into this node: `tokens` at positions [depth, end); `slots` in the order in which they came."""

    __slots__ = ("children", "depth", "ends", "parent", "slots", "tokens")

    def __init__(self, tokens: list[int], depth: int, parent: _Node | None) -> None:
        self.tokens = tokens
        self.depth = depth
        self.parent = parent
        self.children: dict[int, _Node] = {}
        self.slots: dict[int, None] = {}
        self.ends = 0  # how many slots' sequences end here

    @property
    def end(self) -> int:
        return self.depth + len(self.tokens)


class PrefixIndex:
    """Token sequences by slot. A slot that was never extended, or was removed, has the empty sequence."""

    def __init__(self) -> None:
        self._root = _Node([], 0, None)
        self._last: dict[int, _Node] = {}  # slot -> the node at which its sequence ends

    def length(self, slot: int) -> int:
        node = self._last.get(slot)
        return node.end if node is not None else 0

    def match(self, tokens: Sequence[int], limit: int) -> tuple[int, Collection[int]]:
        """(length, slots): every one of `slots` begins with tokens[:length], and none with more of tokens[:limit]."""
        node, depth = self._root, 0
        while depth < limit:
            child = node.children.get(tokens[depth])
            if child is None:
                break
            common = _common(child.tokens, tokens, depth, limit)
            node, depth = child, depth + common
            if common < len(child.tokens):
                break
        return depth, node.slots.keys()

    def extend(self, slot: int, tokens: Sequence[int]) -> None:
        """Append `tokens` to the slot's sequence."""
        if not tokens:
            return
        start = self._last.get(slot)
        if start is not None and len(start.slots) == 1:  # a leaf of its own: the usual case of a running request
            start.tokens.extend(tokens)
            return
        node = start or self._root
        done = 0
        while done < len(tokens):
            child = node.children.get(tokens[done])
            if child is None:
                child = _Node(list(tokens[done:]), node.end, node)
                node.children[tokens[done]] = child
                common = len(tokens) - done
            else:
                common = _common(child.tokens, tokens, done, len(tokens))
                if common < len(child.tokens):
                    child = self._split(child, common)
            child.slots[slot] = None
            node, done = child, done + common
        self._last[slot] = node
        node.ends += 1
        if start is not None:
            start.ends -= 1
            self._merge(start)

    def truncate(self, slot: int, length: int) -> None:
        """Forget the slot's tokens from position `length` on."""
        node = self._last.get(slot)
        if node is None or node.end <= length:
            return
        node.ends -= 1
        left: list[_Node] = []
        while node.parent is not None and node.depth >= length:
            parent = node.parent
            del node.slots[slot]
            if node.slots:
                left.append(node)
            else:
                del parent.children[node.tokens[0]]
            node = parent
        if length < node.end:
            if len(node.slots) == 1:
                del node.tokens[length - node.depth :]
            else:
                upper = self._split(node, length - node.depth)
                del node.slots[slot]
                left.append(node)
                node = upper
        if length == 0:
            del self._last[slot]
        else:
            self._last[slot] = node
            node.ends += 1
        for former in left:
            self._merge(former)
        self._merge(node)

    def remove(self, slot: int) -> None:
        self.truncate(slot, 0)

    def move(self, slot: int, to: int) -> None:
        """The slot's sequence becomes that of `to`, which has the empty one."""
        node = last = self._last.pop(slot, None)
        while node is not None and node.parent is not None:
            del node.slots[slot]
            node.slots[to] = None
            node = node.parent
        if last is not None:
            self._last[to] = last

    def _split(self, node: _Node, at: int) -> _Node:
        """Cut the node's edge after `at` tokens; the new upper node is returned, the lower one keeps its identity."""
        assert node.parent is not None
        upper = _Node(node.tokens[:at], node.depth, node.parent)
        upper.slots = dict(node.slots)
        upper.children[node.tokens[at]] = node
        node.parent.children[node.tokens[0]] = upper
        node.tokens = node.tokens[at:]
        node.depth += at
        node.parent = upper
        return upper

    def _merge(self, node: _Node) -> None:
        """Join a node at which nothing ends or branches any more with its only child."""
        if node.parent is None or node.ends or len(node.children) != 1:
            return
        (child,) = node.children.values()
        child.tokens = node.tokens + child.tokens
        child.depth = node.depth
        child.parent = node.parent
        node.parent.children[node.tokens[0]] = child

    def check_integrity(self) -> None:
        """Raise AssertionError where the tree contradicts itself."""
        ends: dict[int, _Node] = {}
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            assert node.parent is not None
            assert node.tokens, "an edge without tokens was left in the tree"
            assert node.slots, "a node that no slot passes was left in the tree"
            assert node.depth == node.parent.end, "an edge does not begin where its parent ends"
            assert node.parent.children[node.tokens[0]] is node, "an edge is filed under another token"
            below = {slot for child in node.children.values() for slot in child.slots}
            assert sum(len(child.slots) for child in node.children.values()) == len(below), (
                "a slot runs through two edges"
            )
            assert below <= node.slots.keys(), "a slot is below a node but not at it"
            here = node.slots.keys() - below
            assert len(here) == node.ends, "the number of sequences that end at a node is wrong"
            assert node.ends or len(node.children) > 1, "a node with nothing to say was not merged"
            ends.update((slot, node) for slot in here)
            stack.extend(node.children.values())
        assert ends == self._last, "a slot's last node is not where its sequence ends"


def _common(edge: list[int], tokens: Sequence[int], start: int, limit: int) -> int:
    """How many tokens edge and tokens[start:limit] have in common."""
    size = min(len(edge), limit - start)
    if edge[:size] == tokens[start : start + size]:
        return size
    for position in range(size):
        if edge[position] != tokens[start + position]:
            return position
    return size  # equal items in sequences of different types
