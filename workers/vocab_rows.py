"""What sampling does to whole rows of the vocabulary, on the CPU (numpy, one thread) and on a GPU (torch): the costly part.

logits -> integer weights, the largest logits in order, the place of a value, the token at a point of the weights' sum. A row's
result never depends on its neighbours: elements are computed one by one, and only integers are summed.

On the CPU full-size temporaries live in a Scratch that is kept between steps (fresh pages cost more than the arithmetic), and one
thread does it all: a barrier between threads costs more than it saves as soon as another process wants a core.
Called by `workers.sampling` only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

# The weight of the most probable token. Tokens less than 2^-30 as probable are never drawn; 2^23 of them sum below 2^53.
UNIT = 1 << 30
_IN_CACHE = 1 << 15  # elements that are taken through all steps of the arithmetic together
_BLOCK = 64  # tokens summed together on the way to the one that is drawn


class Scratch:
    """Arrays that are used again and again; one of a name at a time, its content undefined."""

    def __init__(self) -> None:
        self._arrays: dict[str, NDArray[Any]] = {}

    def array(self, name: str, shape: tuple[int, int], dtype: DTypeLike) -> NDArray[Any]:
        size = shape[0] * shape[1]
        found = self._arrays.get(name)
        if found is None or found.size < size:
            found = self._arrays[name] = np.empty(size, dtype=dtype)
        return found[:size].reshape(shape)


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On the CPU keep torch, too, to the calling thread; switching costs well under a microsecond."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def highest_ids(logits: Tensor) -> list[int]:
    """The id of each row's largest logit, the lowest of equals."""
    if logits.device.type == "cpu":
        return [int(token) for token in logits.numpy().argmax(axis=1)]
    return [int(token) for token in logits.argmax(dim=-1).tolist()]


def highest_values(logits: Tensor) -> Tensor:
    """[n, V] -> [n, 1]."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().max(axis=1, keepdims=True))
    return logits.amax(dim=-1, keepdim=True)


def weights_of(logits: Tensor, highest: Tensor, temperature: Tensor, scratch: Scratch) -> Tensor:
    """int32 weights in proportion to the probabilities, UNIT for the most probable. logits [n, V], the others [n, 1].

    On the CPU the result lies in the scratch until the next call for a shape of its size.
    """
    if logits.device.type != "cpu":
        return (((logits - highest) / temperature).exp() * UNIT).to(torch.int32)
    shape = (logits.shape[0], logits.shape[1])
    floats = scratch.array("floats", shape, np.float32)
    weights = scratch.array("weights", shape, np.int32)
    source, top, heat = logits.numpy(), highest.numpy(), temperature.numpy()
    step = max(1, _IN_CACHE // shape[1])
    with np.errstate(over="ignore", under="ignore"):
        for first in range(0, shape[0], step):
            rows = slice(first, first + step)
            part = floats[rows]
            np.subtract(source[rows], top[rows], out=part)
            np.divide(part, heat[rows], out=part)
            np.exp(part, out=part)
            np.multiply(part, np.float32(UNIT), out=part)
            np.copyto(weights[rows], part, casting="unsafe")
    return torch.from_numpy(weights)


def totals(weights: Tensor) -> Tensor:
    """int32 [n, V] -> int64 [n]."""
    if weights.device.type == "cpu":
        return torch.from_numpy(weights.numpy().sum(axis=1, dtype=np.int64))
    return weights.sum(dim=-1, dtype=torch.int64)


def target(total: Tensor, chance: Tensor) -> Tensor:
    """The integer point of [0, total) that a number of [0, 1) stands for; both [n]."""
    return torch.minimum((total.double() * chance).long(), total - 1)


def draw_by_id(weights: Tensor, chance: Tensor) -> list[int]:
    """The tokens at the given shares of each row's sum of weights, in order of ids: [n, V], [n]."""
    vocab = weights.shape[1]
    whole = vocab // _BLOCK * _BLOCK
    blocks = [weights[:, :whole].unflatten(1, (-1, _BLOCK))] if whole else []
    sums = [
        torch.from_numpy(block.numpy().sum(axis=2, dtype=np.int64))
        if weights.device.type == "cpu"
        else block.sum(dim=-1, dtype=torch.int64)
        for block in [*blocks, *([weights[:, None, whole:]] if whole < vocab else [])]
    ]
    cumulated = torch.cat(sums, dim=1).cumsum(dim=-1)
    point = target(cumulated[:, -1], chance)[:, None]
    block = torch.searchsorted(cumulated, point, right=True)
    before = torch.where(block > 0, cumulated.gather(1, (block - 1).clamp(min=0)), 0)
    ids = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = torch.where(ids < vocab, weights.gather(1, ids.clamp(max=vocab - 1)), 0).cumsum(dim=-1, dtype=torch.int64)
    place = torch.searchsorted(inside, point - before, right=True)
    return [int(token) for token in (block * _BLOCK + place)[:, 0].tolist()]


class Largest(NamedTuple):
    """The largest logits of n rows. Values alone tell which are kept; ids are looked up for the one that is drawn.

    values [n, C] in descending order, of row i the first known[i] (the rest is -inf). elements [n, E]: among them, in order
    of ids, every one that is equal to a known value; ids [n, E] theirs (None: element e has id e).
    """

    values: Tensor
    known: Tensor
    elements: Tensor
    ids: Tensor | None

    def nth_equal(self, value: Tensor, rank: Tensor) -> list[int]:
        """For each row the id of the element equal to value [n, 1] that comes after rank [n] others with lower ids."""
        equal = self.elements == value
        if equal.device.type == "cpu":
            place = torch.from_numpy(equal.numpy().argmax(axis=1))
        else:
            place = equal.to(torch.int8).argmax(dim=-1).cpu()
        for row, skip in enumerate(rank.tolist()):
            if skip:
                place[row] = equal[row].nonzero()[skip, 0]
        found = place if self.ids is None else self.ids.gather(1, place[:, None])[:, 0]
        return [int(token) for token in found.tolist()]


def largest(logits: Tensor, count: int) -> Largest:
    """At least `count` of each row's logits [n, V], or all of them.

    On the CPU a row is cut into 2 * count interleaved blocks; the count-th largest of the block maxima is a value that `count`
    elements reach at least and, as a rule, not many more, so that one comparison leaves few values to sort.
    """
    rows, vocab = logits.shape
    blocks = 2 * count
    if vocab < 2 * blocks:
        known = torch.full((rows,), vocab, device=logits.device)
        if logits.device.type == "cpu":  # numpy sorts values several times as fast as torch sorts values with indices
            return Largest(torch.from_numpy(-np.sort(-logits.numpy(), axis=1)), known, logits, None)
        return Largest(logits.sort(dim=-1, descending=True).values, known, logits, None)
    if logits.device.type != "cpu":
        known = torch.full((rows,), count, device=logits.device)
        return Largest(logits.topk(count, dim=-1).values, known, logits, None)
    array = logits.numpy()
    depth = vocab // blocks
    maxima = array[:, : depth * blocks].reshape(rows, depth, blocks).max(axis=1)
    edge = np.partition(maxima, blocks - count, axis=1)[:, blocks - count]
    found = np.flatnonzero(array >= edge[:, None])
    starts = np.arange(rows) * vocab
    begins = np.searchsorted(found, starts)
    counts = np.diff(begins, append=len(found))
    row = np.repeat(np.arange(rows), counts)
    place = np.arange(len(found)) - begins[row]
    elements = np.full((rows, counts.max()), -np.inf, dtype=np.float32)
    ids = np.zeros(elements.shape, dtype=np.int64)
    elements[row, place] = array.reshape(-1)[found]
    ids[row, place] = found - starts[row]
    descending = -np.sort(-elements, axis=1)
    return Largest(
        torch.from_numpy(descending), torch.from_numpy(counts), torch.from_numpy(elements), torch.from_numpy(ids)
    )
