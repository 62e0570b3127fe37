"""Which tensors a checkpoint holds and where their bytes lie: reads the headers of safetensors files, never their data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexpert.hbm.loading import ITEM_BYTES
from flexpert.workers.model.errors import CheckpointError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """file_offset counts from the start of the file; dtype by its safetensors name."""

    file: Path
    file_offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


def read_checkpoint(model_dir: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint by name. Raises CheckpointError."""
    index = model_dir / _INDEX
    if not index.exists():
        return _read_header(_single_file(model_dir))
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is not an index of safetensors files ({type(error).__name__}: {error}); fetch it again"
        ) from error
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names the file {name!r}, expected names of files beside it; fetch it again")
        tensors |= _read_header(model_dir / name)
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise CheckpointError(
            f"{index} names {_some(absent)}, found in none of its {len(files)} files; fetch the checkpoint again"
        )
    return tensors


def _single_file(model_dir: Path) -> Path:
    if (model_dir / _SINGLE).exists():
        return model_dir / _SINGLE
    found = sorted(path.name for path in model_dir.glob("*.safetensors"))
    if len(found) == 1:
        return model_dir / found[0]
    others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in model_dir.glob(pattern))
    have = f"found {_some(found or others)}" if found or others else "found no weights"
    advice = "convert the weights to safetensors" if others and not found else "fetch the checkpoint again"
    raise CheckpointError(f"{model_dir}: {have}, expected {_SINGLE}, or {_INDEX} with its files; {advice}")


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """The safetensors format: 8 bytes of header length, the header as JSON, the data."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or length > min(file_bytes - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path} is cut off or no safetensors file: {file_bytes} bytes, its header would have {length}; fetch it again"
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}); fetch the checkpoint again"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} has no readable safetensors header ({error}); fetch it again") from error
    data = 8 + length
    try:
        return {
            name: _stored(path, data, file_bytes, name, entry)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} has a malformed safetensors header ({type(error).__name__}: {error}); fetch it again"
        ) from error


def _stored(path: Path, data: int, file_bytes: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    stored = StoredTensor(path, data + begin, str(entry["dtype"]), tuple(int(size) for size in entry["shape"]))
    if stored.dtype not in ITEM_BYTES:
        raise CheckpointError(f"{path}: {name} has dtype {stored.dtype}, expected one of {', '.join(ITEM_BYTES)}")
    if data + end > file_bytes:
        raise CheckpointError(
            f"{path} is cut off: found {file_bytes} bytes, {name} ends at byte {data + end}; fetch it again"
        )
    if begin < 0 or end - begin != stored.num_elements * ITEM_BYTES[stored.dtype]:
        raise CheckpointError(
            f"{path}: {name} of {stored.dtype} {list(stored.shape)} has {end - begin} bytes; fetch it again"
        )
    return stored


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
