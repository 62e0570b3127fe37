"""The OpenAI-compatible endpoint: HTTP on one side, worker streams on the other.

    client ──HTTP──> front (ids, keys, limits) ─> routes ─> Generation ─> WorkerPool ──frames──> workers
    operator ──HTTP──> front (admin keys) ─> admin ──calls──> controller

`Gateway` is what the gateway actor starts; the rest of the package is private. Everything runs on one asyncio loop. A live request is
kept here until its last token is with the client, so that a worker's death costs a pause: its requests go back to the queue
with the tokens that they have, and the next worker continues them. Imports no torch.
"""

from flexpert.controller.gateway.admin import ControllerAway
from flexpert.controller.gateway.config import GatewayConfig, GatewayError, WorkerAddress
from flexpert.controller.gateway.server import Gateway

__all__ = ["ControllerAway", "Gateway", "GatewayConfig", "GatewayError", "WorkerAddress"]
