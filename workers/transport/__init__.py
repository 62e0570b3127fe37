"""How ranks exchange tokens and rows: one interface, mapped memory on one host, torch.distributed across hosts, threads for tests."""

from flexpert.workers.transport.base import StepMissed, Transport
from flexpert.workers.transport.distributed import DistributedTransport, connect_distributed
from flexpert.workers.transport.doorbells import ProtocolError
from flexpert.workers.transport.listener import ExchangeListener
from flexpert.workers.transport.local import LocalGroup, LocalTransport
from flexpert.workers.transport.mapped import MappedTransport, connect_mapped
from flexpert.workers.transport.pairs import ConnectError

__all__ = [
    "ConnectError", "DistributedTransport", "ExchangeListener", "LocalGroup", "LocalTransport", "MappedTransport", "ProtocolError",
    "StepMissed", "Transport", "connect_distributed", "connect_mapped",
]  # fmt: skip
