"""What a first warm process tells of the model, as events for the controller; see workers.shape."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ShapeKnown:
    """shape: what the model is made of."""

    shape: dict[str, int]


@dataclass(frozen=True, slots=True)
class ShapeFailed:
    kind: str
    reason: str
