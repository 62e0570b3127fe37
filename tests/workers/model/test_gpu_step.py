"""The GPU's way through a step, run on the CPU: packing, the masked fallback, and flash attention replaced by what it is specified to do.

What only a GPU can show (bf16, grouped products, CUDA graphs) is in test_gpu.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.families import FAMILIES, Request, load_runner, make_model

from flexpert.kernels import attention_gpu
from flexpert.workers.model.gpu_compute import GpuCompute
from flexpert.workers.model.gpu_step import StepTensors
from flexpert.workers.model.packing import pack
from flexpert.workers.step import Row


def flash_as_specified(
    query, keys, values, begins_q, begins_k, max_q, max_k, *_, scale, window_size_left, window_size_right, seqused_k
):
    """aten::_flash_attention_forward with gaps between the requests' keys, in double precision."""
    outputs, sums = [], []
    for i in range(len(begins_q) - 1):
        q = query[begins_q[i] : begins_q[i + 1]].double()
        used = int(seqused_k[i])
        assert len(q) <= max_q
        assert used <= max_k
        k, v = (
            one[begins_k[i] : begins_k[i] + used].double().repeat_interleave(q.shape[1] // one.shape[1], 1)
            for one in (keys, values)
        )
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        distance = torch.arange(used - len(q), used)[:, None] - torch.arange(used)
        scores = scores.masked_fill(
            (distance < 0) | (distance > (used if window_size_left is None else window_size_left)), float("-inf")
        )
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outputs).to(query.dtype), torch.cat(sums, dim=1).float(), None, None, None


def steps_of(compute: Callable[[list[Row]], torch.Tensor]) -> torch.Tensor:
    """A prompt in odd chunks beside another that joins late, then both decode."""
    first = Request("a", 6, [n * 5 % 96 for n in range(60)])
    second = Request("b", 1, [n * 11 % 96 for n in range(33)])
    logits = []
    for sizes in ((25, None), (20, 9), (None, None), (1, 1), (1, 1), (1, 1)):
        live = [(first, sizes[0])] if len(logits) == 0 else list(zip((first, second), sizes, strict=True))
        rows = [request.row(size, all_logits=size == 9) for request, size in live]
        result = compute(rows)
        logits.append(result)
        if all(row.sample for row in rows):
            for (request, _), row in zip(live, result, strict=True):
                request.tokens.append(int(row.argmax()))
    return torch.cat(logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("flash", [False, True], ids=["masked", "flash"])
def test_a_gpu_step_computes_what_a_cpu_step_computes(
    family: str, flash: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if flash:
        monkeypatch.setattr(attention_gpu, "flash_fits", lambda **_: True)
        monkeypatch.setattr(attention_gpu, "_flash_operator", lambda: flash_as_specified)
    make_model(family).save_pretrained(tmp_path)
    expected = steps_of(load_runner(tmp_path).forward)
    runner = load_runner(tmp_path)
    compute = GpuCompute(runner.bound, runner.views, runner.kv)
    actual = steps_of(lambda rows: compute.logits(pack(rows, multiple=1, capacity_tokens=512, slots=8)))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_decode_step_is_the_same_from_static_rows(tmp_path: Path) -> None:
    """The tensors that a captured graph reads give what freshly packed ones give, also with a repeated first row."""
    make_model("qwen3_moe").save_pretrained(tmp_path)
    runner = load_runner(tmp_path)
    compute = GpuCompute(runner.bound, runner.views, runner.kv)
    prompts = [Request("a", 0, list(range(20))), Request("b", 3, list(range(9)))]
    compute.logits(pack([one.row() for one in prompts], multiple=1, capacity_tokens=512, slots=8))
    rows = [Row("a", 0, 20, (7,), True), Row("b", 3, 9, (8,), True)]
    packed = compute.logits(pack(rows, multiple=1, capacity_tokens=512, slots=8))
    static = torch.tensor([[7, 8, 7, 7], [0, 3, 0, 0], [20, 9, 20, 20]])
    with torch.inference_mode():
        repeated = compute.run(StepTensors.decode(static, max_keys=64), 0)
    torch.testing.assert_close(repeated[:2], packed)
    torch.testing.assert_close(repeated[2:], packed[[0, 0]])
