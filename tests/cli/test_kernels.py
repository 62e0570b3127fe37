"""`flexpert kernels tune`: what it finds out of a model, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexpert.cli.errors import CommandError
from flexpert.cli.kernels import layer_shape, parse_tokens, run_tune, with_dtype
from flexpert.cli.model_source import built_in_directory
from flexpert.kernels.moe import LayerShape


def test_the_shape_is_that_of_the_model() -> None:
    shape = layer_shape(built_in_directory())
    assert (shape.num_experts, shape.top_k, shape.dtype) == (16, 2, "bfloat16")
    assert not shape.hidden % 64
    assert not shape.inner % 64


def test_fp8_is_a_shape_of_its_own() -> None:
    shape = LayerShape(num_experts=8, hidden=256, inner=128, top_k=2)
    assert with_dtype(shape, "bfloat16") == shape
    keys = [with_dtype(shape, dtype).key for dtype in ("fp8-w8a16", "fp8-w8a8")]
    assert keys == ["e8-h256-i128-k2-float8_e4m3fn", "e8-h256-i128-k2-float8_e4m3fn-quantize_rows"]
    with pytest.raises(CommandError, match=r"inner size 192, .*fp8 takes multiples of 128"):
        with_dtype(replace(shape, inner=192), "fp8-w8a16")


def test_a_dtype_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(CommandError, match="--dtype 'int4': expected one of bfloat16, fp8-w8a16, fp8-w8a8"):
        run_tune(model=None, tokens=(1,), dtype="int4", out=tmp_path)


@pytest.mark.parametrize("text", ["0", "1,x", "-4"])
def test_token_counts_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(CommandError, match="expected numbers from 1, like 1,64,4096"):
        parse_tokens(text)


def test_without_a_gpu_nothing_is_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CommandError, match="no CUDA device is visible"):
        run_tune(model=None, tokens=(1,), dtype="bfloat16", out=tmp_path)


def test_a_folder_that_is_not_there_is_told_before_the_timing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(CommandError, match="no such folder"):
        run_tune(model=None, tokens=(1,), dtype="bfloat16", out=tmp_path / "none")
