"""Not a test: the other process of `conftest.Child`. Runs each line of its input as code and answers with `result`."""

from __future__ import annotations

import json
import sys
from typing import Any

import flexpert.hbm

names: dict[str, Any] = {name: getattr(flexpert.hbm, name) for name in flexpert.hbm.__all__}
for line in sys.stdin:
    names["result"] = None
    try:
        exec(json.loads(line), names)
        answer = {"result": names["result"]}
    except Exception as error:
        answer = {"error": type(error).__name__, "text": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
