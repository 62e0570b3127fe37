"""Times on a GPU by replaying a captured graph, so that the host's launches do not count; and routings to time with."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spread:
    """Of one call, in seconds."""

    median: float
    p10: float
    p90: float


def graph_time(calls: Sequence[Callable[[], object]], *, replays: int) -> Spread:
    """Capture `calls` in one graph, replay it, and divide by their number. Each must be capturable; they run in order."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return _replayed(graph.replay, replays, len(calls))


def eager_time(calls: Sequence[Callable[[], object]], *, replays: int) -> Spread:
    """The same for calls that cannot be captured: launches and synchronisations count."""

    def once() -> None:
        for call in calls:
            call()

    once()
    return _replayed(once, replays, len(calls))


def _replayed(once: Callable[[], object], replays: int, calls: int) -> Spread:
    once()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        once()
        event.record()
    torch.cuda.synchronize()
    seconds = sorted(a.elapsed_time(b) / 1e3 / calls for a, b in itertools.pairwise(events))
    return Spread(statistics.median(seconds), seconds[len(seconds) // 10], seconds[-1 - len(seconds) // 10])


def routing(tokens: int, num_experts: int, top_k: int, *, skew: float, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Ids int64 [tokens, k] without repetition in a token, and normalised weights float32. Expert e has weight 1 / (e + 1)^skew: 0 is
    uniform, 1 is Zipf's law. Drawn without replacement by the Gumbel top-k trick (Kool et al. 2019, section 2.3)."""
    generator = torch.Generator(device).manual_seed(seed)
    popularity = -skew * torch.arange(1, num_experts + 1, device=device).log()
    noise = -torch.empty(tokens, num_experts, device=device).exponential_(generator=generator).log()
    ids = (popularity + noise).topk(top_k, dim=1).indices
    weights = torch.rand(tokens, top_k, generator=generator, device=device) + 0.1
    return ids, weights / weights.sum(1, keepdim=True)
