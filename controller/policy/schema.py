"""The JSON schema of a policy file, for editors and for those who write policies by program: `python -m flexpert.controller.policy.schema`
prints it; manifests/scalingpolicy.schema.json is a copy that a test holds current.

The schema knows keys, kinds of value and ranges. That settings do not contradict each other only `parse` can tell.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from flexpert.controller.policy.spec import ScalingPolicy

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> dict[str, Any]:
    """Keys as they are written, defaults too."""
    found = ScalingPolicy.model_json_schema(
        by_alias=True, mode="serialization"
    )  # in this mode defaults are shown as they are written
    return {"$schema": DIALECT, **_plain(found)}


def schema_text() -> str:
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


def _plain(value: Any, *, names: bool = False) -> Any:
    """Without titles, which are Python's names and not what is written, and without defaults that say no more than their parts do.

    names: the keys of value are names that an operator writes.
    """
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    left_out = set()
    if not names:
        left_out = (
            {"title", "default"} if value.get("default") is None or isinstance(value["default"], dict) else {"title"}
        )
    kept = {key: item for key, item in value.items() if key not in left_out}
    return {key: _plain(item, names=key in {"properties", "$defs"} and not names) for key, item in kept.items()}


if __name__ == "__main__":
    sys.stdout.write(schema_text())
