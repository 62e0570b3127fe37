"""The gateway's answer to the controller: traffic of the last seconds, and each worker's last numbers with their age.

One cheap call: no frame is sent to any worker for it. An idle worker tells nothing and needs not: the gateway knows what it gave out.
"""

from __future__ import annotations

from typing import Any

from flexpert.controller.gateway.link import WorkerLink
from flexpert.controller.gateway.output import ChoiceOutput
from flexpert.controller.gateway.pool import WorkerPool
from flexpert.controller.gateway.window import LoadWindow

_TPOT_FROM_TOKENS = 8  # a stream that goes on tells of its speed from there on


def gateway_load(
    pool: WorkerPool,
    window: LoadWindow,
    *,
    now_s: float,
    window_s: float,
    slo: tuple[float | None, float | None] | None,
    long_s: float | None = None,
) -> dict[str, Any]:
    """{"traffic": rates, percentiles and counts (see LoadWindow.look) with `live` and `waiting` (those of them without a token), "workers":
    [...]}. slo: (ttft_s, tpot_s) that choices are judged by from now on. long_s: `long` is the traffic of so many seconds."""
    window.slo = slo
    outputs = [choice.sink for choice in pool.live if isinstance(choice.sink, ChoiceOutput)]
    waiting_s = [now_s - output.arrived_s for output in outputs if output.first_token_s is None]
    queued_s = [
        now_s - choice.sink.arrived_s for choice in pool.live.waiting if isinstance(choice.sink, ChoiceOutput) and not choice.sink.submitted
    ]  # fmt: skip
    running = [output.tpot_s for output in outputs if output.completion_tokens >= _TPOT_FROM_TOKENS]
    traffic = window.look(
        now_s,
        window_s=window_s,
        waiting_s=waiting_s,
        queued_s=queued_s,
        running_tpot_s=[seconds for seconds in running if seconds],
    )
    return {
        "traffic": {**traffic, "live": len(pool.live), "waiting": len(waiting_s)},
        "workers": [_worker(pool, link, now_s=now_s) for link in pool.links],
        "long": None if long_s is None else window.look(now_s, window_s=long_s),
    }


def _worker(pool: WorkerPool, link: WorkerLink, *, now_s: float) -> dict[str, Any]:
    """age_s None: it never said anything. The token counts are those of the process, and begin again with its next incarnation."""
    stats = link.stats
    mine = list(pool.live.of_worker(link.worker_id))
    idle = link.connected and not mine
    found: dict[str, Any] = {
        "worker_id": link.worker_id,
        "connected": link.connected,
        "draining": link.target.draining,
        "incarnation": None if link.welcome is None else link.welcome.incarnation,
        "in_flight": len(mine),
        "max_running": 0 if link.welcome is None else link.welcome.max_running,
        "waiting_tokens": sum(len(choice.prompt_token_ids) for choice in mine if not choice.emitted_token_ids),
        "age_s": None if stats is None else round(now_s - link.stats_at_s, 4),
        "longest_context_tokens": max(
            (len(choice.prompt_token_ids) + len(choice.emitted_token_ids) for choice in mine), default=0
        ),
    }
    if stats is not None:
        found |= {
            "running": stats.running, "waiting": stats.waiting, "kv_used_tokens": stats.kv_used_tokens,
            "kv_capacity_tokens": stats.kv_capacity_tokens, "prefill_tokens": stats.prefill_tokens, "decode_tokens": stats.decode_tokens,
        }  # fmt: skip
    if idle:
        found |= {"age_s": 0.0, "running": 0, "waiting": 0}
    return found
