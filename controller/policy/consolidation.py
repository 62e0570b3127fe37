"""Would fewer workers still do? Asked before every shrink. Pure; called by `controller.policy.shrink`.

The survivors take over all KV and all streams at once, and the load then spreads over fewer: latencies are predicted for that.
"""

from __future__ import annotations

from flexpert.controller.policy.reasons import Reason
from flexpert.controller.policy.signals_math import Scene

Refusal = tuple[Reason, str]


def refusal(scene: Scene, target: int) -> Refusal | None:
    """Why `target` workers would not do; None: they would. Never less willing for more workers, so it can be searched by halving."""
    return _memory(scene, target) or _streams(scene, target) or _latency(scene, target)


def _memory(scene: Scene, target: int) -> Refusal | None:
    view = scene.view
    if view.kv_capacity <= 0:
        return None
    there = target * view.kv_capacity
    needed = view.kv_worst + view.longest
    if needed > there:
        return (
            Reason.SCALE_DOWN_REFUSED_MEMORY,
            f"live requests hold {view.kv_worst:.0f} tokens of KV and the longest of {view.longest} may move: "
            f"{target} workers hold {there:.0f}",
        )
    limit = next((signal.target for signal in scene.config.signals if signal.type == "kv_utilization"), None)
    share = view.kv_worst / there
    if limit is not None and share > limit * scene.config.consolidation_margin:
        return (
            Reason.SCALE_DOWN_REFUSED_CONSOLIDATION,
            f"KV of {target} workers would be {share:.0%} full, target {limit:.0%} x margin {scene.config.consolidation_margin:g}",
        )
    return None


def _streams(scene: Scene, target: int) -> Refusal | None:
    slots = scene.view.slots * target
    if scene.view.slots and scene.view.live > slots:
        return (
            Reason.SCALE_DOWN_REFUSED_STREAMS,
            f"{scene.view.live:.0f} requests are live and {target} workers run {slots:.0f} at once",
        )
    return None


def _latency(scene: Scene, target: int) -> Refusal | None:
    """With as many workers as requests nobody shares, and latencies stay; else as `predicted` says."""
    slo, traffic, margin = scene.config.slo, scene.traffic, scene.config.consolidation_margin
    if slo is None or scene.view.live <= target:
        return None
    times_queue, times_step = growth(scene, target)
    ttft_s = traffic.ttft_s
    if ttft_s is not None:
        queued_s = ttft_s if traffic.queue_s is None else min(traffic.queue_s, ttft_s)
        ttft_s = queued_s * times_queue + (ttft_s - queued_s) * times_step
    tpot_s = None if traffic.tpot_s is None else traffic.tpot_s * times_step
    for name, found, limit in (("ttft", ttft_s, slo.ttft_s), ("tpot", tpot_s, slo.tpot_s)):
        if found is not None and limit is not None and found > limit * margin:
            return (
                Reason.SCALE_DOWN_REFUSED_CONSOLIDATION,
                f"{name} p95 of {target} workers would be {found:.3g} s, target {limit:g} s x margin {margin:g}",
            )
    return None


def growth(scene: Scene, target: int) -> tuple[float, float]:
    """By which factors waiting and steps grow with `target` workers instead of the present ones.

    With a known capacity and so a utilisation u: waiting grows as 1 / (1 - u), as in M/M/1 (Kleinrock 1975, eq. 3.26), the part of a
    step that depends on the batch in proportion to it. Without: steps in proportion, waiting with its square, both more than is likely.
    """
    ratio = scene.now / target
    load = scene.token_load
    if load is None or not scene.capacity.known:
        return ratio * ratio, ratio
    before = min(load * scene.capacity.utilisation / scene.now, 0.99)
    after = min(before * ratio, 0.99)
    return (1.0 - before) / (1.0 - after), 1.0 + before * (ratio - 1.0)


def costs_more(scene: Scene, target: int, *, low_s: float) -> str:
    """In words why the change costs more than it saves; "" where it pays.

    Cost: every live stream stands still once now, and once more when the workers come back. Saved: the devices given back, for as long as
    the load has been low already (who has lasted t is expected to last another t).
    """
    stall, config = scene.observation.stall_s, scene.config
    if stall is None or stall.p95_s <= 0 or scene.view.live <= 0:
        return ""
    stream_cost = config.stall_cost_per_stream_hour
    each = config.cost_per_device_hour if stream_cost is None else stream_cost
    lost = 2.0 * stall.p95_s * scene.view.live * each
    saved = (scene.now - target) * low_s * config.cost_per_device_hour
    if lost <= saved:
        return ""
    return (
        f"a change stalls {scene.view.live:.0f} streams for {stall.p95_s:.3g} s, which costs {lost / 3600:.3g}, "
        f"and {scene.now - target} devices fewer for {low_s:.0f} s save {saved / 3600:.3g}"
    )
