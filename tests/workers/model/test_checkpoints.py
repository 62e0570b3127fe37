"""Checkpoints in every stored form become the same bytes; wrong ones are refused with what was found, expected and what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.families import FAMILIES, Request, greedy, load_runner, make_model, save_fused

from flexpert.hbm.loading import check_plan
from flexpert.workers.model import CheckpointError, bind, check_servable, load_into, make_buffers, plan_weights
from flexpert.workers.model.layout import WeightLayout, slot_size


def loaded(model_dir: Path, dtype: str = "float32") -> tuple[WeightLayout, dict[str, torch.Tensor]]:
    plan = plan_weights(check_servable(model_dir), dtype)
    check_plan(plan)
    segments = {name: torch.empty(nbytes, dtype=torch.uint8) for name, nbytes in plan.segments.items()}
    load_into(plan, segments)
    return WeightLayout.from_manifest(plan.manifest), segments


@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_fused_and_single_files_become_the_same_bytes(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    model.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    save_fused(model, tmp_path / "fused")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    layout, segments = loaded(tmp_path / "single")
    for other in ("sharded", "fused"):
        other_layout, other_segments = loaded(tmp_path / other)
        assert other_layout == layout
        assert all(torch.equal(other_segments[name], segments[name]) for name in segments)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_lies_whole_in_its_slot(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    model.save_pretrained(tmp_path)
    layout, segments = loaded(tmp_path)
    slots = torch.cat([segments[f"experts:{group}"] for group in range(layout.groups)])
    slots = slots.view(layout.slots, layout.slot_bytes)
    for layer in layout.experts:
        experts = model.get_submodule(layer.module)
        for matrix in layer.matrices:
            nbytes = matrix.shape[0] * matrix.shape[1] * 4
            assert matrix.offset_bytes % 64 == 0
            stored = slots[
                layer.first_slot : layer.first_slot + layer.num_experts,
                matrix.offset_bytes : matrix.offset_bytes + nbytes,
            ]
            expected = getattr(experts, matrix.name).detach()
            assert torch.equal(stored.contiguous().view(torch.float32).view(expected.shape), expected)
    assert (layout.experts[0].transposed, layout.experts[0].interleaved) == (
        (True, True) if family == "gpt_oss" else (False, False)
    )


def test_a_half_precision_load_rounds_each_number_once(tmp_path: Path) -> None:
    model = make_model("deepseek_v3")
    model.save_pretrained(tmp_path)
    servable = check_servable(tmp_path)
    plan = plan_weights(servable, torch.bfloat16)
    segments = {name: torch.empty(nbytes, dtype=torch.uint8) for name, nbytes in plan.segments.items()}
    load_into(plan, segments)
    bound = bind(servable, plan.manifest, segments)
    state = model.state_dict()
    for name, tensor in bound.model.state_dict().items():
        kept = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        assert torch.equal(tensor, state[name].to(kept)), name


def test_bound_weights_are_views_of_the_segments(tmp_path: Path) -> None:
    make_model("gpt_oss", tie_word_embeddings=True).save_pretrained(tmp_path)
    servable = check_servable(tmp_path)
    plan = plan_weights(servable, "float32")
    segments = make_buffers(plan)
    load_into(plan, segments)
    bound = bind(servable, plan.manifest, segments)
    ranges = [(one.data_ptr(), one.data_ptr() + one.numel()) for one in segments.values()]
    rotary = {name for name, _ in bound.model.named_buffers() if "inv_freq" in name}
    for name, tensor in (*bound.model.named_parameters(), *bound.model.named_buffers()):
        assert name in rotary or any(begin <= tensor.data_ptr() < end for begin, end in ranges), name
    for experts in bound.experts:
        for view in (experts.slabs.up, experts.slabs.down):
            assert any(begin <= view.data_ptr() < end for begin, end in ranges)
    assert bound.model.get_output_embeddings().weight is bound.model.get_input_embeddings().weight


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    make_model("olmoe").save_pretrained(tmp_path)
    plan = plan_weights(check_servable(tmp_path), "float32")
    segments = {name: torch.empty(nbytes, dtype=torch.uint8) for name, nbytes in plan.segments.items()}
    seen: list[tuple[int, int]] = []
    load_into(plan, segments, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (plan.total_bytes(), plan.total_bytes())
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize("slab_bytes", [3 * 2048 * 768 * 2, 344064, 40, 65536, 70000])
@pytest.mark.parametrize("granule_bytes", [1 << 16, 1 << 21])
def test_groups_of_slabs_are_whole_granules(slab_bytes: int, granule_bytes: int) -> None:
    slot_bytes, group = slot_size(slab_bytes, granule_bytes)
    assert slot_bytes >= slab_bytes
    assert slot_bytes % 64 == 0
    assert slot_bytes * group % granule_bytes == 0


def test_a_qwen3_30b_group_is_two_experts_in_nine_granules() -> None:
    assert slot_size(3 * 2048 * 768 * 2, 1 << 21) == (9 << 20, 2)


# What can be wrong. Each breaks a good checkpoint in one way.


def drop(name: str) -> Callable[[Path], None]:
    def apply(model_dir: Path) -> None:
        file = model_dir / "model.safetensors"
        save_file({key: value for key, value in load_file(file).items() if not re.fullmatch(name, key)}, file)

    return apply


def change(
    name: str, make: Callable[[torch.Tensor], torch.Tensor], new_name: str | None = None
) -> Callable[[Path], None]:
    def apply(model_dir: Path) -> None:
        file = model_dir / "model.safetensors"
        tensors = load_file(file)
        tensors[new_name or name] = make(tensors[name]).clone().contiguous()
        save_file(tensors, file)

    return apply


def truncate(nbytes: int) -> Callable[[Path], None]:
    def apply(model_dir: Path) -> None:
        file = model_dir / "model.safetensors"
        file.write_bytes(file.read_bytes()[:nbytes])

    return apply


def rewrite(content: bytes) -> Callable[[Path], None]:
    return lambda model_dir: (model_dir / "model.safetensors").write_bytes(content) and None


def pickled(model_dir: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")


EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"
NORM = "model.norm.weight"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no_weights": (lambda model_dir: (model_dir / "model.safetensors").unlink(), r"found no weights.*fetch"),
    "only_pickled_weights": (pickled, r"pytorch_model\.bin.*convert the weights to safetensors"),
    "cut_off": (truncate(60_000), r"cut off.*fetch"),
    "cut_off_in_header": (truncate(100), r"cut off.*fetch"),
    "empty": (truncate(0), r"cut off.*fetch"),
    "no_json": (rewrite(b"\x08" + bytes(7) + b"nonsense"), r"no readable safetensors header"),
    "malformed_header": (rewrite(b"\x0a" + bytes(7) + b'{"a": [1]}'), r"malformed safetensors header"),
    "missing_tensor": (drop(NORM), r"lacks 1 tensors: model\.norm\.weight"),
    "missing_expert": (drop(EXPERT), r"lacks 1 tensors: model\.layers\.1\.mlp\.experts\.gate_up_proj of expert 5"),
    "missing_layer": (drop(r"model\.layers\.1\..*"), r"lacks \d+ tensors: .* and \d+ more"),
    "unexpected_tensor": (change(NORM, lambda t: t, "model.surprise"), r"no place for: model\.surprise"),
    "one_expert_too_many": (
        change(EXPERT, lambda t: t, EXPERT.replace("s.5", "s.8")),
        r"an expert 8 where the configuration has 8",
    ),
    "wrong_shape": (change(NORM, lambda t: t[:-1]), r"model\.norm\.weight has shape \[31\], expected \[32\]"),
    "wrong_expert_shape": (change(EXPERT, lambda t: t.T), r"up_proj\.weight has shape \[32, 24\], expected \[24, 32\]"),
    "quantised_numbers": (change(EXPERT, lambda t: t.to(torch.int8)), r"dtype I8, expected F32.*quantised"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused_with_what_was_found(case: str, tmp_path: Path) -> None:
    make_model("qwen3_moe").save_pretrained(tmp_path)
    breaks, message = BROKEN[case]
    breaks(tmp_path)
    with pytest.raises(CheckpointError, match=f"(?s){message}") as error:
        plan_weights(check_servable(tmp_path), "float32")
    assert str(tmp_path) in str(error.value)


def break_index(change: Callable[[Path, dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(model_dir: Path) -> None:
        path = model_dir / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(model_dir, index)
        path.write_text(json.dumps(index))

    return apply


BROKEN_INDEX = {
    "missing_shard": (
        break_index(lambda d, index: next(iter(sorted(d.glob("*.safetensors")))).unlink()),
        "cannot be read",
    ),
    "named_but_absent": (
        break_index(lambda d, index: index["weight_map"].update({"x.y": index["weight_map"][NORM]})),
        r"x\.y, found in none",
    ),
    "leads_elsewhere": (
        break_index(lambda d, index: index["weight_map"].update({NORM: "../other.safetensors"})),
        "expected names of files beside it",
    ),
    "no_map": (break_index(lambda d, index: index.pop("weight_map")), "not an index"),
}


@pytest.mark.parametrize("case", BROKEN_INDEX)
def test_a_broken_index_is_refused(case: str, tmp_path: Path) -> None:
    make_model("qwen3_moe").save_pretrained(tmp_path, max_shard_size="20KB")
    breaks, message = BROKEN_INDEX[case]
    breaks(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        plan_weights(check_servable(tmp_path), "float32")


def test_a_file_that_shrinks_after_planning_is_reported(tmp_path: Path) -> None:
    make_model("qwen3_moe").save_pretrained(tmp_path)
    plan = plan_weights(check_servable(tmp_path), "float32")
    truncate(50_000)(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read as planned"):
        load_into(plan, {name: torch.empty(nbytes, dtype=torch.uint8) for name, nbytes in plan.segments.items()})


def test_layers_beyond_the_model_may_be_left_over(tmp_path: Path) -> None:
    """DeepSeek-V3 and GLM-4-MoE publish a layer for multi-token prediction that transformers does not use."""
    make_model("deepseek_v3").save_pretrained(tmp_path)
    change(NORM, lambda t: t, "model.layers.61.norm.weight")(tmp_path)
    assert plan_weights(check_servable(tmp_path), "float32").copies


def test_weights_of_another_model_cannot_be_bound(tmp_path: Path) -> None:
    for name, family in (("a", "qwen3_moe"), ("b", "olmoe")):
        make_model(family).save_pretrained(tmp_path / name)
    plan = plan_weights(check_servable(tmp_path / "a"), "float32")
    segments = {name: torch.zeros(nbytes, dtype=torch.uint8) for name, nbytes in plan.segments.items()}
    with pytest.raises(ValueError, match="another model"):
        bind(check_servable(tmp_path / "b"), plan.manifest, segments)
    with pytest.raises(ValueError, match="expected"):
        bind(check_servable(tmp_path / "a"), plan.manifest, {name: one[:-64] for name, one in segments.items()})


def test_a_fused_checkpoint_serves(tmp_path: Path) -> None:
    model = make_model("gpt_oss")
    save_fused(model, tmp_path)
    logits = greedy(load_runner(tmp_path), [Request("r", 0, list(range(30)))], 1)["r"][0]
    with torch.inference_mode():
        torch.testing.assert_close(logits, model(torch.arange(30)[None]).logits[0, -1], rtol=1e-4, atol=1e-4)


BLOCKS = (24, 40)  # no divisors of the tiny model's sizes
NOT_QUANTISED = ("embed", "lm_head", "norm", "mlp.gate.", "router", "bias")


def quantise(
    matrix: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(fp8, factors of the blocks, what they stand for), for the last two dimensions."""
    rows, columns = matrix.shape[-2:]
    lead = matrix.shape[:-2]
    counts = [-(-size // block) for size, block in zip((rows, columns), BLOCKS, strict=True)]
    factors = torch.rand(*lead, *counts, generator=torch.Generator().manual_seed(rows + columns)) * 0.02 + 0.001
    wide = factors.repeat_interleave(BLOCKS[0], -2)[..., :rows, :].repeat_interleave(BLOCKS[1], -1)[..., :columns]
    stored = (matrix / wide).clamp(-448, 448).to(dtype)
    return stored, factors, stored.float() * wide


def save_quantised(model: Any, folder: Path, *, fused: bool = False) -> Path:
    """The model in fp8 in `folder`, and in `folder`-wide what its numbers stand for."""
    plain = folder.parent / f"{folder.name}-wide"
    (save_fused if fused else lambda m, d: m.save_pretrained(d))(model, plain)
    tensors = load_file(plain / "model.safetensors")
    stored, wide = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dim() >= 2 and not any(part in name for part in NOT_QUANTISED):
            stored[name], stored[f"{name}_scale_inv"], wide[name] = quantise(tensor)
    folder.mkdir()
    save_file(stored, folder / "model.safetensors")
    save_file(wide, plain / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    quantised = {"quant_method": "fp8", "weight_block_size": list(BLOCKS), "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    return plain


@pytest.mark.parametrize("fused", [False, True], ids=["one by one", "fused"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_fp8_with_scaled_blocks_becomes_what_its_numbers_stand_for(family: str, fused: bool, tmp_path: Path) -> None:
    plain = save_quantised(make_model(family), tmp_path / "fp8", fused=fused)
    layout, segments = loaded(tmp_path / "fp8")
    plain_layout, expected = loaded(plain)
    assert layout == plain_layout
    for name in expected:
        torch.testing.assert_close(
            segments[name].view(torch.float32), expected[name].view(torch.float32), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop(f"{EXPERT}_scale_inv"), r"has dtype F8_E4M3, expected F32.*the factors of its blocks"),
        (lambda t: t.update({f"{EXPERT}_scale_inv": torch.ones(5, 1)}), r"scale_inv has shape \[5, 1\], expected"),
        (
            lambda t: t.update({"model.layers.0.stray_scale_inv": torch.ones(1)}),
            "no place for: model.layers.0.stray_scale_inv",
        ),
        (
            lambda t: t.update({f"{EXPERT}_scale_inv": t[f"{EXPERT}_scale_inv"].int()}),
            "scale_inv has dtype I32, expected one of",
        ),
    ],
    ids=["none", "shape", "stray", "dtype"],
)
def test_factors_that_do_not_fit_are_refused(edit: Callable[[dict[str, Any]], Any], said: str, tmp_path: Path) -> None:
    save_quantised(make_model("qwen3_moe"), tmp_path / "fp8")
    path = tmp_path / "fp8" / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=said):
        plan_weights(check_servable(tmp_path / "fp8"), "float32")
