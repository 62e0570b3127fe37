"""Triton kernels run on a GPU where there is one, else interpreted on the CPU."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton.language and each kernel's module are imported

if importlib.util.find_spec("triton") is None:
    collect_ignore = ["test_decode_attention.py", "test_decoder.py", "test_moe_fp8.py", "test_moe_layer.py"]


@pytest.fixture
def three_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, a persistent kernel has three programs, and a loop's end may be a tensor, of which numpy 2.5 makes no index."""
    if ON_GPU:
        return
    from triton.runtime import interpreter

    from flexpert.kernels import decode_attention
    from flexpert.kernels.moe import layer

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_with_index)
    for module in (decode_attention, layer):
        monkeypatch.setattr(module, "multiprocessors", lambda _: 3)
