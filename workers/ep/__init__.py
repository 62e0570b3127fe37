"""Experts spread over the ranks of an epoch: which a rank holds, and how tokens get to the others and back.

experts = EpochExperts(bound, epoch.held_by(rank), memory)      # beside those of the epoch that still runs
exchange = ExpertExchange(transport, epoch, rank, experts)
runner.use(experts, exchange)                                   # between two steps
exchange.begin(step); runner.forward(rows)                      # or runner.serve() without rows
"""

from flexpert.workers.ep.exchange import ExpertExchange
from flexpert.workers.ep.experts import EpochExperts
from flexpert.workers.ep.wire import capacity_bytes

__all__ = ["EpochExperts", "ExpertExchange", "capacity_bytes"]
