"""The words between the controller and its supervision: events (what happened) and instructions (what to do about it).

Values without behaviour; `controller.supervision` takes the one and gives the other, `controller.controller` carries them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

AGENT = "agent"
GATEWAY = "gateway"
SPARE = "standby"


# Events


@dataclass(frozen=True, slots=True)
class Begin:
    """Start everything that was not found running."""


@dataclass(frozen=True, slots=True)
class AgentReady:
    """The node agent runs and the HBM managers of its devices in use answer."""

    agent: str = AGENT


@dataclass(frozen=True, slots=True)
class ProcessWarm:
    process: str


@dataclass(frozen=True, slots=True)
class ProcessWanted:
    """A transition waits for a process for this worker."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class ProcessNotWanted:
    """It no longer waits; a process that was given and is not used yet is a standby again."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class WorkerStarting:
    """The process that was given is becoming its worker."""

    process: str


@dataclass(frozen=True, slots=True)
class WorkerServes:
    """The process has become its worker: it must answer from now on."""

    process: str


@dataclass(frozen=True, slots=True)
class ProcessReleased:
    """The process let go of its worker and is a standby again."""

    process: str


@dataclass(frozen=True, slots=True)
class ProcessEnded:
    """A transition wants this process gone."""

    process: str
    reason: str


@dataclass(frozen=True, slots=True)
class Settled:
    """How the transitions stand. serving: an epoch is whole. calm: nothing is to be done besides, so there is time for standbys."""

    serving: bool
    calm: bool


@dataclass(frozen=True, slots=True)
class GatewayReady:
    generation: int


@dataclass(frozen=True, slots=True)
class ProcessFound:
    """A restarted controller found this process (before Begin): worker_id's, or warm where that is ""."""

    process: str
    worker_id: str = ""
    agent: str = AGENT


@dataclass(frozen=True, slots=True)
class Failed:
    """Something could not start. component: an agent, GATEWAY or a process name; kind names the class of error, for the exit code."""

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
    """A process, or another component, answered AskProcess."""

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
    Begin | AgentReady | ProcessWarm | ProcessWanted | ProcessNotWanted | WorkerStarting | WorkerServes | ProcessReleased
    | ProcessEnded | Settled | GatewayReady | ProcessFound | Failed | Died | PauseOver | Tick | Answered | StopRequested | GatewayDrained
)  # fmt: skip


# Instructions


@dataclass(frozen=True, slots=True)
class StartAgent:
    agent: str = AGENT


@dataclass(frozen=True, slots=True)
class SpawnProcess:
    """On the node of `agent`. urgent: a worker waits for it; otherwise it is a standby and must not slow those that serve."""

    process: str
    urgent: bool = True
    agent: str = AGENT


@dataclass(frozen=True, slots=True)
class GiveProcess:
    """Set this warm process aside for the worker that waits."""

    worker_id: str
    process: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A process that was given to a worker is gone; a transition decides what follows."""

    worker_id: str
    process: str
    reason: str


@dataclass(frozen=True, slots=True)
class KillProcess:
    """A process of the pool, or a component that does not answer."""

    process: str
    reason: str


@dataclass(frozen=True, slots=True)
class AskProcess:
    """Send Answered(process) when it answers, however late."""

    process: str


@dataclass(frozen=True, slots=True)
class StartGateway:
    generation: int


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
    """End the worker processes, the node agents and their managers; nothing follows."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The cluster cannot serve; nothing but a stop follows."""

    component: str
    kind: str
    reason: str


Instruction = (
    StartAgent | SpawnProcess | GiveProcess | WorkerLost | KillProcess | AskProcess | StartGateway | Pause | DrainGateway | StopAll
    | GiveUp
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisionConfig:
    """standbys: warm processes kept on each node beside its workers. agents: worker -> agent of its node, AGENT where it is not named.
    A component that served for stable_s has its earlier failures forgiven.

    silence_s: a worker that serves and does not answer for so long is ended; service_silence_s: the same for gateway and agents, which have
    no peers that wait for them, for a worker that starts, which answers beside its loading, and for standbys; start_silence_s: for what is
    only coming up. No more than max_tick_s pass from one tick to the next: where the controller itself stood still, others have their time.
    surplus_s: for so long a process that a leaving worker gave back is kept beyond `standbys`, for those who scale up again soon.
    """

    standbys: int = 0
    agents: Mapping[str, str] = field(default_factory=dict)
    max_start_failures: int = 5
    backoff_base_s: float = 0.5
    backoff_max_s: float = 10.0
    stable_s: float = 60.0
    silence_s: float = 3.0
    service_silence_s: float = 10.0
    start_silence_s: float = 120.0
    max_tick_s: float = 1.0
    surplus_s: float = 60.0
