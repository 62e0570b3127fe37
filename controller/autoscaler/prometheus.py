"""One number from a Prometheus server, or why there is none: a failure is an answer, and nothing waits beyond its timeout."""

from __future__ import annotations

import json
import math
from typing import Any

from flexpert.controller.policy.types import Reading

MAX_BODY_BYTES = 1 << 20


async def query(url: str, promql: str, *, timeout_s: float, now_s: float) -> Reading:
    """The value of an instant query (https://prometheus.io/docs/prometheus/latest/querying/api/#instant-queries) that gives one number.
    now_s: unix time, by which the age of the sample is told."""
    import aiohttp  # takes long, and most policies ask no Prometheus: not at each start of a controller

    where = f"{url.rstrip('/')}/api/v1/query"
    try:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(where, params={"query": promql}) as answer,
        ):
            body = await answer.content.read(MAX_BODY_BYTES)
            while (more := await answer.content.read(MAX_BODY_BYTES)) and len(body) <= MAX_BODY_BYTES:
                body += more
            status = answer.status
    except TimeoutError:
        return _none(f"{url} did not answer within {timeout_s:g} s")
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return _none(f"{url} cannot be asked: {str(error) or type(error).__name__}")
    if len(body) > MAX_BODY_BYTES:
        return _none(f"{url} answered with more than {MAX_BODY_BYTES} bytes")
    return read_answer(body, status=status, url=url, now_s=now_s)


def read_answer(body: bytes, *, status: int, url: str, now_s: float) -> Reading:
    """The number in an answer of Prometheus."""
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or answer.get("status") not in ("success", "error"):
        return _none(f"{url} answered {status}, and not as Prometheus does; is it the server's address?")
    if answer["status"] == "error" or status != 200:
        return _none(
            f"{url} answered {status}: {str(answer.get('error') or answer.get('errorType') or 'no reason given')[:300]}"
        )
    try:
        return _value(answer["data"], now_s=now_s)
    except (KeyError, TypeError, IndexError, ValueError, OverflowError):
        return _none(f"{url} gave a result that cannot be read: {str(answer.get('data'))[:120]}")


def _value(data: dict[str, Any], *, now_s: float) -> Reading:
    kind, result = data["resultType"], data["result"]
    if kind == "vector":
        if not result:
            return _none("the query has an empty result: no series matches it now")
        if len(result) > 1:
            return _none(f"the query gives {len(result)} series; make it one number, as with sum(...)")
        at_s, text = result[0]["value"]
    elif kind == "scalar":
        at_s, text = result
    else:
        return _none(f"the query gives a {kind}; expected one number: a scalar, or a vector of one series")
    value = float(text)
    if not math.isfinite(value):
        return _none(f"the query gives {text}, which is no number")
    return Reading(value=value, age_s=max(0.0, now_s - float(at_s)))


def _none(reason: str) -> Reading:
    return Reading(error=reason)
