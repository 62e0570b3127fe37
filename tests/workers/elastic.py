"""Workers that join, leave and die, without a controller: epochs are written by hand, a played gateway keeps the requests."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.workers.serving import PROMPTS, in_process

from flexpert.hbm import ManagerConfig, ensure_manager, stop_manager
from flexpert.workers.epoch import Epoch, Member, encode
from flexpert.workers.messages import Failed, Released, SamplingParams, StepOutput, Submit
from flexpert.workers.process import WorkerConfig, WorkerProcess

WAIT_S = 60.0


@dataclass
class Client:
    submit: Submit
    worker: str
    emitted: list[int] = field(default_factory=list)
    reason: str = ""


class Gateway:
    """Keeps every request with its emitted tokens; whatever comes twice, too early or unasked is an error."""

    def __init__(self) -> None:
        self.clients: dict[str, Client] = {}
        self.homeless: list[str] = []
        self.targets: dict[str, str] = {}  # where a released request should go first
        self.errors: list[str] = []
        self.changed = threading.Condition()

    def add(self, submit: Submit, worker: str) -> None:
        with self.changed:
            self.clients[submit.request_id] = Client(submit, worker)

    def take(self, worker: str, frame: object) -> None:
        with self.changed:
            if isinstance(frame, StepOutput):
                for token in frame.tokens:
                    client = self.clients[token.request_id]
                    if client.worker != worker or token.output_index != len(client.emitted) or client.reason:
                        self.errors.append(
                            f"{worker} sent {token}, expected output {len(client.emitted)} of {client.worker}"
                        )
                    client.emitted.append(token.token_id)
                for end in frame.finished:
                    self.clients[end.request_id].reason = end.reason
            elif isinstance(frame, Released):
                self.homeless += frame.request_ids
                self.targets.update(dict.fromkeys(frame.request_ids, frame.target_worker_id))
            elif isinstance(frame, Failed):
                self.errors.append(f"{worker}: {frame}")
            self.changed.notify_all()

    def lose(self, worker: str) -> None:
        """The worker's stream has ended."""
        with self.changed:
            self.homeless += [
                name for name, client in self.clients.items() if client.worker == worker and not client.reason
            ]

    def take_homeless(self, worker: str) -> list[Submit]:
        """To submit to `worker`."""
        with self.changed:
            names, self.homeless = list(dict.fromkeys(self.homeless)), []
            again = []
            for name in names:
                client = self.clients[name]
                client.worker = worker
                submit = client.submit
                again.append(
                    Submit(
                        request_id=name,
                        prompt_token_ids=submit.prompt_token_ids,
                        params=submit.params,
                        choice_index=submit.choice_index,
                        emitted_token_ids=list(client.emitted),
                    )
                )
            return again

    def wait(self, condition, timeout_s: float = WAIT_S) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.errors or condition(self), timeout_s), (
                f"waited in vain: {[(n, len(c.emitted), c.reason, c.worker) for n, c in self.clients.items()]}"
            )
            assert not self.errors, self.errors

    def wait_tokens(self, count: int) -> None:
        self.wait(lambda gateway: sum(len(client.emitted) for client in gateway.clients.values()) >= count)

    def wait_all(self) -> dict[str, list[int]]:
        self.wait(lambda gateway: all(client.reason for client in gateway.clients.values()))
        return {name: client.emitted for name, client in self.clients.items()}


def mixed_requests(max_tokens: int) -> list[Submit]:
    """Each prompt greedily and with a seed."""
    kinds = {
        "greedy": SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0),
        "seeded": SamplingParams(max_tokens=max_tokens, seed=1234567, temperature=0.9, top_p=0.95),
    }
    return [
        Submit(request_id=f"{kind}{i}", prompt_token_ids=prompt, params=params)
        for kind, params in kinds.items()
        for i, prompt in enumerate(PROMPTS)
    ]


def tokens_of_one(model_dir: Path, submits: list[Submit]) -> dict[str, list[int]]:
    """The tokens of one worker that serves alone, by request."""
    worker, gateway = in_process(model_dir, threads=1), Gateway()
    worker.tap("gateway", lambda frame: gateway.take("alone", frame))
    worker.start()
    try:
        for submit in submits:
            gateway.add(submit, "alone")
            worker.engine.submit("gateway", submit)
        return gateway.wait_all()
    finally:
        worker.stop()


def spread(num_layers: int, num_experts: int, ranks: int, *, group: int = 1) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """holders: slab groups dealt out in turn."""
    return tuple(
        tuple(((layer + expert // group) % ranks,) for expert in range(num_experts)) for layer in range(num_layers)
    )


class Cluster:
    """Workers of this process, each with an HBM manager of its own."""

    def __init__(self, model_dir: Path, *, layers: int, experts: int, budget_bytes: int, **config) -> None:
        self.model_dir, self.layers, self.experts = model_dir, layers, experts
        self.folder = Path(tempfile.mkdtemp(prefix="fxe"))
        self.budget_bytes, self.config = budget_bytes, config
        self.managers: dict[str, str] = {}
        self.workers: dict[str, WorkerProcess] = {}
        self.incarnations: dict[str, int] = {}
        self.gateway = Gateway()
        self.epoch: Epoch | None = None
        self.number = 0

    def manager(self, name: str) -> str:
        if name not in self.managers:
            config = ManagerConfig(runtime_dir=self.folder, name=name, budget_bytes=self.budget_bytes)
            self.managers[name] = str(ensure_manager(config).socket_path)
        return self.managers[name]

    def close(self) -> None:
        for worker in self.workers.values():
            worker.stop()
        for name in self.managers:
            stop_manager(self.folder, name)
        shutil.rmtree(self.folder)

    def draft(self, names: list[str]) -> Epoch:
        members = tuple(
            Member(
                worker_id=name,
                incarnation=self.incarnations.get(name, 1),
                exchange_address=self.workers[name].status()["exchange_address"] if name in self.workers else "",
                manager_socket=self.manager(name),
            )
            for name in names
        )
        return Epoch(number=self.number, members=members, holders=spread(self.layers, self.experts, len(names)))

    def start(self, name: str, draft: Epoch | None) -> WorkerProcess:
        self.incarnations[name] = self.incarnations.get(name, 0) + 1
        worker = WorkerProcess(
            WorkerConfig(
                worker_id=name,
                model_dir=self.model_dir,
                model_id="tiny",
                cluster_token="secret",
                address=f"unix:{self.folder}/{name}.{self.incarnations[name]}.sock",
                incarnation=self.incarnations[name],
                manager_socket=Path(self.manager(name)),
                epoch=None if draft is None else encode(draft),
                sources=[self.manager(other) for other in self.workers if other != name],
                **{"max_running": 8, "max_context_tokens": 512, "threads": 1, **self.config},
            )
        )
        worker.tap(f"gateway:{name}", lambda frame: self.gateway.take(name, frame))
        worker.start()
        self.workers[name] = worker
        return worker

    def prepare(self, names: list[str]) -> dict[str, dict]:
        """Start who is missing, prepare the next epoch everywhere; the answers by worker."""
        self.plan(names)
        return self.prepare_at(sorted(self.workers))

    def plan(self, names: list[str]) -> None:
        """The next epoch; who is missing is started."""
        self.number += 1
        draft = self.draft(names)
        for name in names:
            if name not in self.workers:
                self.start(name, draft)
        self.next = self.draft(names)

    def prepare_at(self, names: list[str]) -> dict[str, dict]:
        return self.each(names, lambda worker: worker.prepare(encode(self.next), self.sources(), 30.0))

    def sources(self) -> list[str]:
        return [self.manager(name) for name in self.workers]

    def commit(self) -> dict[str, dict]:
        answers = self.each(sorted(self.workers), lambda worker: worker.commit(self.next.number, 30.0))
        self.epoch = self.next
        return answers

    def retire(self) -> dict[str, dict]:
        return self.each(sorted(self.workers), lambda worker: worker.retire(self.next.number))

    def scale(self, names: list[str], prepared: Callable[[], None] = lambda: None) -> dict[str, dict]:
        """A whole transition; leavers are released and their requests submitted again. The answers of retire. prepared: called when
        all have prepared."""
        self.prepare(names)
        prepared()
        self.commit()
        self.rehome()
        retired = self.retire()
        for name in sorted(self.workers.keys() - set(names)):
            self.workers.pop(name).release()
        return retired

    def each(self, names: list[str], call) -> dict[str, dict]:
        with ThreadPoolExecutor(len(names)) as threads:
            running = {name: threads.submit(call, self.workers[name]) for name in names}
            return {name: future.result(WAIT_S) for name, future in running.items()}

    def submit(self, submit: Submit, name: str) -> None:
        self.gateway.add(submit, name)
        self.workers[name].engine.submit(f"gateway:{name}", submit)

    def rehome(self) -> None:
        """Requests without a worker go to the first one of the epoch."""
        assert self.epoch is not None
        name = self.epoch.members[0].worker_id
        for submit in self.gateway.take_homeless(name):
            self.workers[name].engine.submit(f"gateway:{name}", submit)

    def kill(self, name: str) -> None:
        """As its peers and the gateway see a death; what is in the manager stays."""
        worker = self.workers.pop(name)
        worker.stop()
        self.gateway.lose(name)
