"""How ranks exchange tokens and rows: one interface, mapped memory on one host, torch.distributed across hosts, threads for tests."""

from flexpert.workers.transport.base import StepMissed, Transport
from flexpert.workers.transport.local import LocalGroup, LocalTransport

__all__ = ["LocalGroup", "LocalTransport", "StepMissed", "Transport"]
