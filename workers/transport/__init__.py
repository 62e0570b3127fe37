"""How ranks exchange tokens and rows: one interface, mapped memory on one host, torch.distributed across hosts."""

from flexpert.workers.transport.base import StepMissed, Transport

__all__ = ["StepMissed", "Transport"]
