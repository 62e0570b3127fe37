"""What one worker of a model on a device can do, as data: `flexpert profile` measures it, the simulator serves by it.

A step of a worker with `running` decoding requests, `tokens` prompt tokens and `context` tokens of KV to read takes

    decode(running) + prefill(tokens) + context * context_s + tokens * (context before them) * prefill_context_s

where decode and prefill run straight between measured points. Workers of one expert-parallel group step together, so a step of the group
takes as long as that of its slowest worker, plus exchange(workers). JSON: the fields below by their names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import msgspec

__all__ = [
    "DEFAULT_PROFILE",
    "PROFILES",
    "Duration",
    "Profile",
    "ProfileError",
    "Served",
    "interpolate",
    "load_profile",
    "read_profile",
]

PROFILES = Path(__file__).parent / "profiles"
DEFAULT_PROFILE = "builtin-cpu"

Points = tuple[tuple[float, float], ...]


class ProfileError(ValueError):
    """A profile that cannot be used; the message names the field."""


class Duration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long something takes: drawn log-normally with this mean and 95th percentile; the same each time where they are equal."""

    mean_s: float
    p95_s: float

    @property
    def spread(self) -> tuple[float, float]:
        """mu and sigma of the logarithm; (0, 0) for a mean of 0."""
        if self.mean_s <= 0:
            return 0.0, 0.0
        # p95/mean = exp(z sigma - sigma^2/2) with z = 1.645; the largest ratio that a log-normal can have is exp(z^2/2).
        ratio = min(max(math.log(self.p95_s / self.mean_s), 0.0), 1.35)
        sigma = 1.645 - math.sqrt(1.645**2 - 2 * ratio)
        return math.log(self.mean_s) - sigma**2 / 2, sigma


class Served(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A cluster of so many workers as its clients see it: what gateway, clients and cores that are shared take is in it.

    decode, prefill: in place of the profile's own and of exchange, by requests and prompt tokens of one worker. overlap: how much of the
    prompts that others compute in the same step adds to it, 0 where each worker has a device of its own, 1 where they share one.
    answer: (requests that run in the cluster, s from a step's end to its token at the client, with the request's way in).
    """

    workers: int
    decode: Points
    prefill: Points
    overlap: float = 0.0
    answer: Points


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One worker.

    decode: (running requests, s of a step), prefill: (prompt tokens, s that they add to a step), exchange: (workers, s that stepping
    together adds). kv_tokens: what the worker's KV holds when it serves alone; each of N workers holds 1/N of the experts and has room for
    (1 - 1/N) * experts_kv_tokens more. answer_s: what the way through the gateway adds to the first token.

    join_warm, join_cold: from the order to serving, with a standby and without; leave: from the order to gone; stall: how long streams
    stand still at a commit. Beside these, expert slabs move at move_bytes_per_s to
    each worker. standby_s: from the commit until a used standby is replaced; meanwhile, and while a transition runs, steps take `starting`
    times as long.

    served: what clusters of some sizes showed as a whole, in rising order. A size takes the largest of them that is not larger.
    """

    name: str
    model: str = ""
    device: str = ""
    source: str = ""  # how and when it was measured
    max_running: int = 64
    max_batch_tokens: int = 512
    max_context_tokens: int = 4096
    kv_tokens: int
    experts_kv_tokens: int = 0
    decode: Points
    prefill: Points
    exchange: Points = ((1.0, 0.0),)
    context_s: float = 0.0
    prefill_context_s: float = 0.0
    answer_s: float = 0.0
    join_warm: Duration = Duration(mean_s=2.6, p95_s=6.4)
    join_cold: Duration = Duration(mean_s=6.9, p95_s=12.0)
    leave: Duration = Duration(mean_s=2.5, p95_s=5.0)
    stall: Duration = Duration(mean_s=0.01, p95_s=0.03)
    standby_s: float = 10.0
    starting: float = 1.0
    served: tuple[Served, ...] = ()
    layers: int = 1
    experts: int = 1
    slab_bytes: int = 0
    move_bytes_per_s: float = 1e9

    def check(self) -> Profile:
        """Itself. Raises ProfileError with the field that cannot be."""
        for name in ("max_running", "max_batch_tokens", "max_context_tokens", "kv_tokens", "layers", "experts"):
            if getattr(self, name) < 1:
                raise ProfileError(f"profile {self.name!r}: {name} {getattr(self, name)}: expected 1 or more")
        for name in (
            "experts_kv_tokens", "context_s", "prefill_context_s", "answer_s", "standby_s", "slab_bytes",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) < math.inf:
                raise ProfileError(f"profile {self.name!r}: {name} {getattr(self, name)}: expected 0 or more")
        if not self.move_bytes_per_s > 0:
            raise ProfileError(f"profile {self.name!r}: move_bytes_per_s: expected more than 0")
        for name in ("decode", "prefill", "exchange"):
            _check_points(f"profile {self.name!r}: {name}", getattr(self, name))
        if interpolate(self.decode, 1) <= 0:
            raise ProfileError(f"profile {self.name!r}: decode: a step with one request takes no time")
        if not 1 <= self.starting < math.inf:
            raise ProfileError(f"profile {self.name!r}: starting {self.starting:g}: expected 1 or more")
        self._check_served()
        for name in ("join_warm", "join_cold", "leave", "stall"):
            duration: Duration = getattr(self, name)
            if not 0 <= duration.mean_s <= duration.p95_s < math.inf:
                raise ProfileError(
                    f"profile {self.name!r}: {name}: mean_s {duration.mean_s:g}, p95_s {duration.p95_s:g}; "
                    "expected 0 <= mean_s <= p95_s"
                )
        return self

    def _check_served(self) -> None:
        for each in self.served:
            where = f"profile {self.name!r}: served by {each.workers}"
            for name in ("decode", "prefill", "answer"):
                _check_points(f"{where}: {name}", getattr(each, name))
            if interpolate(each.decode, 1) <= 0 or not 0 <= each.overlap <= 1:
                raise ProfileError(f"{where}: a step takes no time, or overlap {each.overlap:g} is not within 0 and 1")
        sizes = [each.workers for each in self.served]
        if sizes != sorted(set(sizes)) or sizes[:1] == [0]:
            raise ProfileError(f"profile {self.name!r}: served: sizes {sizes}: expected them to rise from 1 or more")

    def serves(self, workers: int) -> Served | None:
        """What was seen of the largest size that is not larger, else of the smallest; None where none was."""
        return next((each for each in reversed(self.served) if each.workers <= workers), None) or next(
            iter(self.served), None
        )

    def slower(self, times: float) -> Profile:
        """The same on a machine whose steps and answers take `times` as long; changes of size take what they took."""

        def of(points: Points) -> Points:
            return tuple((x, y * times) for x, y in points)

        return msgspec.structs.replace(
            self,
            decode=of(self.decode),
            prefill=of(self.prefill),
            exchange=of(self.exchange),
            context_s=self.context_s * times,
            prefill_context_s=self.prefill_context_s * times,
            answer_s=self.answer_s * times,
            served=tuple(
                msgspec.structs.replace(each, decode=of(each.decode), prefill=of(each.prefill), answer=of(each.answer))
                for each in self.served
            ),
        )

    def kv_capacity(self, workers: int) -> float:
        """Tokens of KV that each of so many workers has room for."""
        return self.kv_tokens + self.experts_kv_tokens * (1 - 1 / max(1, workers))

    def memory_floor(self, live_tokens: float) -> int:
        """The fewest workers whose KV holds so many tokens."""
        each = self.kv_tokens + self.experts_kv_tokens
        return max(1, math.ceil((live_tokens + self.experts_kv_tokens) / each))


def _check_points(what: str, points: Points) -> None:
    if not points:
        raise ProfileError(f"{what}: no points; expected [x, seconds] pairs")
    if any(not (0 <= x < math.inf and 0 <= y < math.inf) for x, y in points):
        raise ProfileError(f"{what}: a number below 0 or not finite")
    if any(a[0] >= b[0] for a, b in pairwise(points)):
        raise ProfileError(f"{what}: the first numbers of the pairs must rise")


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """Straight between the points and on beyond the last two, never below 0; before the first point its value."""
    if len(points) == 1 or x <= points[0][0]:
        return points[0][1]
    right = next((i for i, point in enumerate(points) if x <= point[0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return max(0.0, y0 + (y1 - y0) * (x - x0) / (x1 - x0))


def read_profile(text: bytes | str, *, what: str = "profile") -> Profile:
    """Raises ProfileError with the field's path."""
    try:
        return msgspec.json.decode(text, type=Profile, strict=False).check()
    except msgspec.DecodeError as error:
        raise ProfileError(f"{what}: {error}") from error


def load_profile(name: str) -> Profile:
    """A shipped profile by its name, or a file that `flexpert profile` wrote."""
    shipped = PROFILES / f"{name}.json"
    path = shipped if "/" not in name and shipped.is_file() else Path(name)
    try:
        text = path.read_bytes()
    except OSError as error:
        names = ", ".join(sorted(file.stem for file in PROFILES.glob("*.json")))
        raise ProfileError(f"profile {name!r}: {error.strerror or error}; give a file, or one of {names}") from error
    return read_profile(text, what=f"profile {name!r}")
