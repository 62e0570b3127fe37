"""The words between the controller and its supervision: events (what happened) and instructions (what to do about it).

Values without behaviour; `controller.supervision` takes the one and gives the other, `controller.controller` carries them out.
"""

from __future__ import annotations

from dataclasses import dataclass

AGENT = "agent"
GATEWAY = "gateway"
SPARE = "standby"


# Events


@dataclass(frozen=True, slots=True)
class Begin:
    """Start everything that was not found running."""


@dataclass(frozen=True, slots=True)
class AgentReady:
    """The node agent runs and its HBM manager answers."""


@dataclass(frozen=True, slots=True)
class ManagerLost:
    """The HBM manager died: the memory of its workers is gone with it."""

    reason: str


@dataclass(frozen=True, slots=True)
class ProcessWarm:
    process: str


@dataclass(frozen=True, slots=True)
class WorkerReady:
    process: str
    address: str


@dataclass(frozen=True, slots=True)
class GatewayReady:
    generation: int


@dataclass(frozen=True, slots=True)
class WorkerFound:
    """A restarted controller found this worker still serving (before Begin)."""

    process: str
    worker_id: str
    incarnation: int
    address: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Something could not start. component: AGENT, GATEWAY or a process name; kind names the class of error, for the exit code."""

    component: str
    kind: str
    reason: str
    permanent: bool


@dataclass(frozen=True, slots=True)
class Died:
    """A process ended that nobody told to end. component as in Failed."""

    component: str
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Some time passed; sent again and again."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A process answered AskProcess."""

    process: str


@dataclass(frozen=True, slots=True)
class PauseOver:
    component: str


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Drain, then end everything."""


@dataclass(frozen=True, slots=True)
class GatewayDrained:
    """No request is left, or the time to drain was up."""


Event = (
    Begin | AgentReady | ManagerLost | ProcessWarm | WorkerReady | GatewayReady | WorkerFound | Failed | Died | PauseOver
    | Tick | Answered | StopRequested | GatewayDrained
)  # fmt: skip


# Instructions


@dataclass(frozen=True, slots=True)
class StartAgent:
    pass


@dataclass(frozen=True, slots=True)
class SpawnProcess:
    """urgent: a worker waits for it; otherwise it is a standby and must not slow those that serve."""

    process: str
    urgent: bool = True


@dataclass(frozen=True, slots=True)
class AssignWorker:
    process: str
    worker_id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class KillProcess:
    """reason: why one that runs is ended, for people; empty where that was told before."""

    process: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class AskProcess:
    """Send Answered(process) when it answers, however late."""

    process: str


@dataclass(frozen=True, slots=True)
class StartGateway:
    generation: int


@dataclass(frozen=True, slots=True, order=True)
class WorkerAddress:
    worker_id: str
    incarnation: int
    address: str


@dataclass(frozen=True, slots=True)
class SetWorkers:
    workers: tuple[WorkerAddress, ...]


@dataclass(frozen=True, slots=True)
class Pause:
    """Send PauseOver(component) after delay_s."""

    component: str
    delay_s: float


@dataclass(frozen=True, slots=True)
class DrainGateway:
    pass


@dataclass(frozen=True, slots=True)
class StopAll:
    """End the worker processes, the node agent and its manager; nothing follows."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The cluster cannot serve; nothing but a stop follows."""

    component: str
    kind: str
    reason: str


Instruction = (
    StartAgent
    | SpawnProcess
    | AssignWorker
    | KillProcess
    | AskProcess
    | StartGateway
    | SetWorkers
    | Pause
    | DrainGateway
    | StopAll
    | GiveUp
)
