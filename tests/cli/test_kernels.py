"""`flexpert kernels tune`: what it finds out of a model, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexpert.cli.errors import CommandError
from flexpert.cli.kernels import layer_shape, parse_tokens, run_tune
from flexpert.cli.model_source import built_in_directory


def test_the_shape_is_that_of_the_model() -> None:
    shape = layer_shape(built_in_directory())
    assert (shape.num_experts, shape.top_k, shape.dtype) == (16, 2, "bfloat16")
    assert not shape.hidden % 64
    assert not shape.inner % 64


@pytest.mark.parametrize("text", ["0", "1,x", "-4"])
def test_token_counts_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(CommandError, match="expected numbers from 1, like 1,64,4096"):
        parse_tokens(text)


def test_without_a_gpu_nothing_is_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CommandError, match="no CUDA device is visible"):
        run_tune(model=None, tokens=(1,), out=tmp_path)


def test_a_folder_that_is_not_there_is_told_before_the_timing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(CommandError, match="no such folder"):
        run_tune(model=None, tokens=(1,), out=tmp_path / "none")
