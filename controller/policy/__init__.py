"""The operator's policy: how it is written (`spec`, `parse`, `words`, `units`), and what it decides (`types`, `decide` and their helpers).

The file side turns YAML into a `ScalingPolicy` and that into the `PolicyConfig` that the decision core reads. Nothing here knows Ray,
sockets or the time; controller/autoscaler feeds it with what it sees, the simulator with what it models. Import the modules: this one
stays light.
"""

from __future__ import annotations

__all__: list[str] = []
