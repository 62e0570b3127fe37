"""From logits to tokens, many rows at once, each row as if it were alone.

A row's logits pass, in this order:
    repetition penalty     prompt and output tokens: divided by it where positive, multiplied where negative (transformers)
    presence, frequency    output tokens: less presence_penalty + count * frequency_penalty (OpenAI's definition)
    logit_bias             added
    min_tokens             stop tokens are impossible while fewer have been drawn
    temperature            below 1e-5 is greedy: the largest, the lowest id of equals
    top_k, top_p, min_p    as in transformers; of equal logits at the edge the lowest ids stay
and one uniform number of `workers.random_bits` picks the token by the inverse of the distribution function: in order of ids
where no filter applies, else from the most probable down.

Nothing here depends on what else is in the batch, bit for bit: logits become integer weights element by element, and integers
are summed, so no order of summation matters. Log-probabilities are those of the model: before penalties and temperature.

Called by the engine; the state of a request (`SamplingState`) holds its tokens' counts, so that no step counts them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexpert.workers.messages import SamplingParams
from flexpert.workers.random_bits import uniforms
from flexpert.workers.vocab_rows import (
    UNIT,
    Largest,
    Scratch,
    draw_by_id,
    highest_ids,
    highest_values,
    largest,
    one_thread,
    target,
    totals,
    weights_of,
)

__all__ = ["Sampled", "Sampler", "SamplingState", "prompt_logprobs"]

Top = tuple[tuple[int, float], ...]

GREEDY_BELOW = 1e-5  # a smaller temperature would leave the range of float32 and choose the largest anyway
_SCORED_ROWS = 64  # prompt_logprobs: rows whose log-softmax is in memory at a time
# How many of the largest logits the filters look at, first of all rows, then where that is not enough; and of how many rows at
# a time on the CPU, so that arrays stay in cache.
_LOOKS = ((64, 256), (512, 64), (1 << 62, 8))


class Sampled(NamedTuple):
    """A drawn token; logprob and top (id, log-probability; best first) where the request asked for them."""

    token_id: int
    logprob: float | None = None
    top: Top = ()


class _Counts:
    """Distinct token ids and how often each was output, as arrays that grow by appending."""

    def __init__(self) -> None:
        self.size = 0
        self._ids = np.empty(64, dtype=np.int64)
        self._outputs = np.empty(64, dtype=np.float64)
        self._places: dict[int, int] = {}

    def add(self, token_id: int, outputs: int) -> None:
        place = self._places.get(token_id)
        if place is None:
            if self.size == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
                self._outputs = np.concatenate([self._outputs, np.empty_like(self._outputs)])
            place = self._places[token_id] = self.size
            self._ids[place], self._outputs[place] = token_id, 0
            self.size += 1
        self._outputs[place] += outputs

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: self.size]

    @property
    def outputs(self) -> NDArray[np.float64]:
        return self._outputs[: self.size]


class SamplingState:
    """What drawing the next token of one choice needs. The engine appends each token that was accepted."""

    def __init__(
        self, params: SamplingParams, choice_index: int, prompt_token_ids: Sequence[int], emitted: Sequence[int] = ()
    ) -> None:
        self.params = params
        self.choice_index = choice_index
        self.prompt_token_ids = prompt_token_ids
        self.num_output_tokens = 0
        self.is_greedy = params.temperature < GREEDY_BELOW
        self.counts: _Counts | None = None
        if params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
            self.counts = _Counts()
            for token_id in prompt_token_ids if params.repetition_penalty != 1.0 else ():
                self.counts.add(token_id, 0)
        for token_id in emitted:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        self.num_output_tokens += 1
        if self.counts is not None:
            self.counts.add(token_id, 1)

    def filters(self, vocab: int) -> bool:
        """Whether any filter could exclude a token."""
        return 0 < self.params.top_k < vocab or self.params.top_p < 1.0 or self.params.min_p > 0.0

    @property
    def masks_stop_tokens(self) -> bool:
        return self.num_output_tokens < self.params.min_tokens and bool(self.params.stop_token_ids)

    @property
    def edits_logits(self) -> bool:
        return self.counts is not None or bool(self.params.logit_bias) or self.masks_stop_tokens


class Sampler:
    """Draws one token a row. Keeps nothing between steps but memory; for one thread."""

    def __init__(self) -> None:
        self._scratch = Scratch()

    def sample(self, logits: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
        """logits: float32 [R, V], row i belongs to states[i]; neither is changed. Raises FloatingPointError on NaN."""
        if logits.shape[0] != len(states):
            raise ValueError(f"{logits.shape[0]} rows of logits for {len(states)} requests: one row each is needed")
        with one_thread(logits.device):
            return self._sample(logits, states)

    def _sample(self, logits: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
        edited = _edit(logits, states)
        random = [row for row, state in enumerate(states) if not state.is_greedy]
        if not random:
            tokens = highest_ids(edited)
        elif len(random) == len(states):
            tokens = _draw(edited, states, self._scratch)
        else:
            tokens = highest_ids(edited)
            drawn = _draw(edited[random], [states[row] for row in random], self._scratch)
            for row, token in zip(random, drawn, strict=True):
                tokens[row] = token
        sampled = [Sampled(token) for token in tokens]
        scored = [row for row, state in enumerate(states) if state.params.logprobs is not None]
        if scored:
            chosen = [tokens[row] for row in scored]
            widths = [states[row].params.logprobs or 0 for row in scored]
            rows = logits if len(scored) == len(states) else logits[scored]
            for row, scores in zip(scored, _scores(rows, chosen, widths), strict=True):
                sampled[row] = Sampled(tokens[row], *scores)
        return sampled


def prompt_logprobs(logits: Tensor, token_ids: Sequence[int], top: int) -> tuple[list[float], list[Top]]:
    """logits [n, V] and the n tokens that follow each: their log-probabilities and the `top` best alternatives."""
    values: list[float] = []
    alternatives: list[Top] = []
    for first in range(0, len(token_ids), _SCORED_ROWS):
        ids = token_ids[first : first + _SCORED_ROWS]
        for value, best in _scores(logits[first : first + len(ids)], ids, [top] * len(ids)):
            values.append(value)
            alternatives.append(best)
    return values, alternatives


# Edits


def _edit(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Penalties, bias and the mask of min_tokens; the same tensor where no row has any."""
    rows = [row for row, state in enumerate(states) if state.edits_logits]
    if not rows:
        return logits
    logits = logits.clone()
    counted = [(row, counts) for row in rows if (counts := states[row].counts) is not None and counts.size]
    if counted:
        _penalise(logits, counted, states)
    biased = [(row, states[row].params.logit_bias) for row in rows if states[row].params.logit_bias]
    if biased:
        where = _places(logits, [(row, list(bias)) for row, bias in biased])
        values = [value for _, bias in biased for value in bias.values()]
        logits[where] += torch.tensor(values, dtype=torch.float32, device=logits.device)
    masked = [(row, list(states[row].params.stop_token_ids)) for row in rows if states[row].masks_stop_tokens]
    if masked:
        logits[_places(logits, masked)] = -torch.inf
    return logits


def _penalise(logits: Tensor, counted: list[tuple[int, _Counts]], states: Sequence[SamplingState]) -> None:
    where = _places(logits, [(row, counts.ids) for row, counts in counted])
    sizes = [counts.size for _, counts in counted]
    outputs = np.concatenate([counts.outputs for _, counts in counted])

    def spread(read: Callable[[SamplingParams], float]) -> NDArray[np.float64]:
        return np.repeat([read(states[row].params) for row, _ in counted], sizes)

    less = (outputs > 0) * spread(lambda params: params.presence_penalty)
    less += outputs * spread(lambda params: params.frequency_penalty)
    repetition = _floats(spread(lambda params: params.repetition_penalty), logits)
    values = logits[where]
    values = torch.where(values < 0, values * repetition, values / repetition)
    logits[where] = values - _floats(less, logits)


def _places(logits: Tensor, rows: Sequence[tuple[int, Sequence[int] | NDArray[np.int64]]]) -> tuple[Tensor, Tensor]:
    """Index of (row, id) pairs, for gathering and scattering."""
    row_index = np.repeat([row for row, _ in rows], [len(ids) for _, ids in rows])
    ids = np.concatenate([np.asarray(ids, dtype=np.int64) for _, ids in rows])
    return torch.from_numpy(row_index).to(logits.device), torch.from_numpy(ids).to(logits.device)


def _floats(values: NDArray[np.float64], like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(device=like.device, dtype=torch.float32)


# Draws


def _draw(logits: Tensor, states: Sequence[SamplingState], scratch: Scratch) -> list[int]:
    """Draw by temperature, with filters or without."""
    highest = highest_values(logits)
    if not bool(torch.isfinite(highest).all()):
        raise FloatingPointError(
            "logits without a finite maximum: the model computed NaN or infinity, or every token is masked"
        )
    temperature = torch.tensor([[state.params.temperature] for state in states], dtype=torch.float32)
    chance = torch.from_numpy(
        uniforms(
            [state.params.seed for state in states],
            [state.choice_index for state in states],
            [state.num_output_tokens for state in states],
        )
    )
    rows = _Rows(logits, highest, temperature.to(logits.device), chance.to(logits.device))
    vocab = logits.shape[1]
    filtered = [row for row, state in enumerate(states) if state.filters(vocab)]
    if not filtered:
        return draw_by_id(rows.weights(scratch), rows.chance)
    if len(filtered) == len(states):
        return _draw_filtered(rows, [state.params for state in states], scratch)
    tokens = [0] * len(states)
    plain = [row for row, state in enumerate(states) if not state.filters(vocab)]
    some = rows.select(plain)
    for row, token in zip(plain, draw_by_id(some.weights(scratch), some.chance), strict=True):
        tokens[row] = token
    drawn = _draw_filtered(rows.select(filtered), [states[row].params for row in filtered], scratch)
    for row, token in zip(filtered, drawn, strict=True):
        tokens[row] = token
    return tokens


class _Rows(NamedTuple):
    """Rows to be drawn from: logits [n, V], their highest [n, 1], temperature [n, 1], a number of [0, 1) each [n]."""

    logits: Tensor
    highest: Tensor
    temperature: Tensor
    chance: Tensor

    def select(self, rows: list[int]) -> _Rows:
        return _Rows(*(field[rows] for field in self))

    def weights(self, scratch: Scratch) -> Tensor:
        return weights_of(self.logits, self.highest, self.temperature, scratch)


def _draw_filtered(rows: _Rows, params: Sequence[SamplingParams], scratch: Scratch) -> list[int]:
    """Look at the largest logits first, and at more of a row only where its filters reach further. The result is the same."""
    vocab = rows.logits.shape[1]
    if any(one.top_p < 1.0 and not 0 < one.top_k < vocab for one in params):
        total = totals(rows.weights(scratch))
    else:
        total = torch.full_like(rows.chance, 1 << 62, dtype=torch.int64)  # no top_p is a share of it
    tokens = [0] * len(params)
    left = list(range(len(params)))
    for count, chunk in _LOOKS:
        chunk = chunk if rows.logits.device.type == "cpu" else max(1, len(left))
        undecided: list[int] = []
        for first in range(0, len(left), chunk):
            chosen = left[first : first + chunk]
            everything = len(chosen) == len(params)
            some = rows if everything else rows.select(chosen)
            found = largest(some.logits, count)
            picked = _pick(some, total[chosen], [params[row] for row in chosen], found, scratch)
            for row, token, decided in zip(chosen, *picked, strict=True):
                tokens[row] = token
                if not decided:
                    undecided.append(row)
        left = undecided
    assert not left, "a whole row does not hold its nucleus"
    return tokens


def _pick(
    rows: _Rows, total: Tensor, params: Sequence[SamplingParams], found: Largest, scratch: Scratch
) -> tuple[list[int], list[bool]]:
    """Filter and draw from the largest logits. total [n]: the sum of all weights of each row.

    Returns the tokens, and for each whether the filters end within what is known (else its token means nothing).
    """
    values, known = found.values, found.known
    device, vocab = values.device, rows.logits.shape[1]
    top_k = torch.tensor([min(one.top_k or vocab, vocab) for one in params], device=device)
    top_p = torch.tensor([one.top_p for one in params], dtype=torch.float64, device=device)
    min_p = torch.tensor([one.min_p for one in params], dtype=torch.float64, device=device)
    weights = weights_of(values, rows.highest, rows.temperature, scratch)
    cumulated = weights.cumsum(dim=-1, dtype=torch.int64)
    # top_p is a share of what top_k leaves.
    last_of_k = cumulated.gather(1, (top_k.clamp(max=values.shape[1]) - 1)[:, None])[:, 0]
    mass = torch.where(top_k < vocab, last_of_k, total)
    position = torch.arange(values.shape[1], device=device)
    keep = (position < top_k[:, None]) & (cumulated - weights < (top_p * mass)[:, None])
    keep &= weights >= (min_p * UNIT)[:, None]
    kept = keep.sum(dim=-1)
    is_known = (known == vocab) | (top_k <= known) | ((top_k == vocab) & (kept < known))
    kept = torch.minimum(kept, known)
    left = cumulated.gather(1, (kept - 1)[:, None])[:, 0]
    place = torch.searchsorted(cumulated, target(left, rows.chance)[:, None], right=True)
    value = values.gather(1, place)
    rank = place[:, 0] - (values > value).sum(dim=-1)
    return found.nth_equal(value, rank), [bool(ok) for ok in is_known.tolist()]


# Log-probabilities


def _scores(logits: Tensor, token_ids: Sequence[int], widths: Sequence[int]) -> list[tuple[float, Top]]:
    """For each row the log-probability of its token and the best widths[i] alternatives, equals by the lowest id."""
    scores = logits.float().log_softmax(dim=-1)
    vocab = logits.shape[1]
    index = torch.tensor(token_ids, device=logits.device)[:, None]
    chosen: list[float] = scores.gather(1, index)[:, 0].tolist()
    widest = min(max(widths), vocab)
    if widest == 0:
        return [(value, ()) for value in chosen]
    # One more than wanted shows whether equals stand on both sides of the edge.
    best = logits.topk(min(widest + 1, vocab), dim=-1)
    ids, values = best.indices.tolist(), best.values.tolist()
    result: list[tuple[float, Top]] = []
    for row, (value, width) in enumerate(zip(chosen, widths, strict=True)):
        width = min(width, vocab)
        if 0 < width < vocab and values[row][width - 1] == values[row][width]:
            order = logits[row].sort(descending=True, stable=True).indices[:width].tolist()
        else:
            pairs = sorted((-logit, token) for logit, token in zip(values[row][:width], ids[row][:width], strict=True))
            order = [token for _, token in pairs]
        found = scores[row, order].tolist() if order else []
        result.append((value, tuple(zip(order, found, strict=True))))
    return result
