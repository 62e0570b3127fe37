"""One step of a worker as values: what the scheduler decides, the runner computes and the sampler fills in.

Pure data, no torch. The scheduler (`workers.scheduler`) makes a StepPlan; the engine carries out its memory operations,
gives its rows to the runner and its sampling rows to the sampler, and hands the tokens back to the scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexpert.hbm.ops import Claim, Map, Unmap


@dataclass(frozen=True, slots=True)
class CopyTokens:
    """Copy the KV of tokens [first_token, end_token) of one slot to the same positions of another.

    The part of a shared prefix that does not fill whole granules; on a backend that cannot map a granule twice, all of it.
    Granules do not align with tokens: the first `skip_bytes` bytes of the first token already lie in a shared granule, which
    must not be written.
    """

    source_slot: int
    slot: int
    first_token: int
    end_token: int
    skip_bytes: int = 0


MemoryOp = Claim | Map | Unmap | CopyTokens


@dataclass(frozen=True, slots=True)
class Row:
    """The tokens of one request that this step computes.

    token_ids stand at positions start, start + 1, … of the request; their KV is written to `slot`, where the KV of
    positions [0, start) is already committed. `sample`: the last token's logits choose the request's next token.
    `all_logits`: the logits of every token of the row are wanted (log-probabilities of a prompt).
    """

    request_id: str
    slot: int
    start: int
    token_ids: tuple[int, ...]
    sample: bool
    all_logits: bool = False

    @property
    def end(self) -> int:
        """One past the last position computed: what `committed` becomes after the step."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything one step does, in order: first `memory`, then `rows`."""

    step: int
    memory: tuple[MemoryOp, ...]
    rows: tuple[Row, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)


@dataclass(slots=True)
class StepTimes:
    """Seconds of the last step: scheduling and batch building apart from the model and the sampler."""

    host_s: float = 0.0
    step_s: float = 0.0
