"""Which bytes a checkpoint becomes on a device, and what an earlier model left there. Called by `workers.process` as a worker comes up."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from flexpert.hbm import HbmClient

log = logging.getLogger(__name__)

LAYOUT_VERSION = 1


def drop_leftovers(client: HbmClient, *, keep_weights: str, keep_arena: str) -> None:
    """Free what an earlier model left on this device: weights nobody maps, KV nobody holds. One device serves one model."""
    info = client.info()
    for weights in info.weights:
        if weights.key != keep_weights and not weights.readers and weights.state in ("ready", "failed"):
            log.info("dropping %d bytes of weights that nobody uses any more", weights.nbytes)
            client.drop_weights(weights.key)
    for arena in info.arenas:
        if arena.name != keep_arena and arena.holder_pid == 0:
            log.info("dropping a KV arena of %d granules that nobody uses any more", arena.granules)
            client.drop_kv_arena(arena.name)


def weights_key(model_dir: Path, dtype: str) -> str:
    """Names the bytes that a checkpoint becomes: its files (name, size, modification time), the dtype, the layout's version."""
    files = sorted(
        [*model_dir.glob("*.safetensors"), *model_dir.glob("*.safetensors.index.json"), model_dir / "config.json"]
    )
    stamp = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    text = repr((str(model_dir.resolve()), stamp, dtype, LAYOUT_VERSION))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
