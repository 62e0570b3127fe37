"""Where the model comes from: a directory, the Hugging Face hub, or the package itself. Looks at names and files, loads nothing."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

from flexpert.cli.errors import CommandError

BUILT_IN_ID = "flexpert-builtin"
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CHOICES = "give a directory with a Hugging Face checkpoint (config.json, *.safetensors, tokenizer.json) or a hub id like org/name"


@dataclass(frozen=True)
class ModelSource:
    """model_id: what clients call it."""

    directory: Path
    model_id: str
    built_in: bool = False

    @property
    def has_chat_template(self) -> bool:
        """Whether /v1/chat/completions works, so that the printed example does."""
        if (self.directory / "chat_template.jinja").exists():
            return True
        try:
            return bool(json.loads((self.directory / "tokenizer_config.json").read_text()).get("chat_template"))
        except (OSError, ValueError, AttributeError):
            return False


def built_in_directory() -> Path:
    """The demonstration model inside the package."""
    found = importlib.util.find_spec("flexpert.workers")
    assert found is not None and found.origin is not None  # noqa: PT018
    return Path(found.origin).parent / "builtin_model"


def resolve_model(wanted: str | None) -> ModelSource:
    """The checkpoint directory for what was asked for, downloaded if need be. Raises CommandError."""
    if wanted is None or wanted == "built-in":
        return _checked(ModelSource(built_in_directory(), BUILT_IN_ID, built_in=True))
    path = Path(wanted).expanduser()
    if path.is_dir():
        return _checked(ModelSource(path.resolve(), path.resolve().name))
    if path.exists():
        raise CommandError("model", f"model {wanted}: found a file, expected a directory; {_CHOICES}")
    if _HUB_ID.fullmatch(wanted):
        return _checked(ModelSource(_download(wanted), wanted))
    raise CommandError("model", f"model {wanted}: found no such directory; {_CHOICES}")


def _checked(source: ModelSource) -> ModelSource:
    """What needs no torch to be seen; whether the model can be served is the worker's to say."""
    config = source.directory / "config.json"
    if not config.is_file():
        raise CommandError("model", f"model {source.directory}: found no config.json; {_CHOICES}")
    try:
        parsed = json.loads(config.read_text())
    except (OSError, ValueError) as error:
        raise CommandError("model", f"model {source.directory}: config.json cannot be read: {error}") from error
    if not isinstance(parsed, dict):
        raise CommandError("model", f"model {source.directory}: config.json holds no JSON object")
    _check_weights(source.directory)
    return source


def _check_weights(directory: Path) -> None:
    """Every weight file is there and as long as its header says: a broken download is told at once, not after the cluster's start."""
    from safetensors import SafetensorError, safe_open

    files = {path.name for path in directory.glob("*.safetensors")}
    if not files:
        raise CommandError(
            "checkpoint",
            f"model {directory}: found no *.safetensors file; convert the checkpoint to safetensors, or get its weights",
        )
    for index in directory.glob("*.safetensors.index.json"):
        try:
            wanted = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, LookupError, AttributeError) as error:
            raise CommandError(
                "checkpoint", f"model {directory}: {index.name} cannot be read: {error!r}; get it again"
            ) from error
        if missing := sorted(wanted - files):
            raise CommandError(
                "checkpoint", f"model {directory}: {', '.join(missing)} named in {index.name} is missing; get it again"
            )
    for name in sorted(files):
        try:
            with safe_open(str(directory / name), framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise CommandError(
                "checkpoint", f"model {directory}: {name} is truncated or damaged ({error}); get it again"
            ) from error


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except GatedRepoError as error:
        raise CommandError(
            "model", f"model {hub_id}: its owner asks for consent; accept it on the hub and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise CommandError(
            "model",
            f"model {hub_id}: the hub has no such model, or it is private (set HF_TOKEN); there is no directory of that name either",
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise CommandError(
            "model",
            f"model {hub_id}: not in the local cache, and the hub cannot be reached from here; copy the checkpoint to a directory and "
            f"name that, or serve the built-in model (no --model). There is no directory {hub_id} either. ({type(error).__name__})",
        ) from error
