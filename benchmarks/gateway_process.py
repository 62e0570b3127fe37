"""A gateway alone in its own process, in front of a worker that the benchmark holds.

with serving(model_dir, worker_address, token) as url: ...
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from flexpert.controller.gateway import Gateway, GatewayConfig, WorkerAddress


@contextlib.contextmanager
def serving(model_dir: Path, worker_address: str, token: str) -> Iterator[str]:
    """Yields the gateway's URL; `token` is both the cluster's token and the API key."""
    command = [sys.executable, __file__, str(model_dir), worker_address, token]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise RuntimeError(f"the gateway ended with code {process.wait()} before it was ready")
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


async def serve(model_dir: Path, worker_address: str, token: str) -> None:
    gateway = Gateway(
        GatewayConfig(
            model_id="bench",
            model_dir=model_dir,
            cluster_token=token,
            api_keys=(token,),
            port=0,
            worker_addresses=(WorkerAddress("bench", worker_address),),
        )
    )
    await gateway.start()
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    print(gateway.url, flush=True)
    await stopped.wait()
    await gateway.drain_and_stop()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
