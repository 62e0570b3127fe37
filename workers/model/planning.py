"""Plans the load of a checkpoint: which bytes of which files go where, decided from headers alone.

Names go through transformers' own mapping, but its converters that stack experts into 3-D tensors are not run: each expert's matrices are
copied straight into its slab, whether the checkpoint stores them one by one or fused. Matrices in fp8 are multiplied by the factors of
their blocks as they are copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from flexpert.hbm.loading import CONVERTIBLE_FROM, ITEM_BYTES, SCALE_DTYPES, SCALED_FROM, BlockScale, Copy, LoadPlan
from flexpert.kernels.registration import up_name
from flexpert.workers.model import checkpoint_names as names
from flexpert.workers.model.checkpoint_files import StoredTensor, read_checkpoint
from flexpert.workers.model.errors import CheckpointError
from flexpert.workers.model.layout import (
    DENSE,
    VERSION,
    DenseTensor,
    ExpertLayer,
    SlabMatrix,
    WeightLayout,
    aligned,
    segment_of,
    slot_size,
)
from flexpert.workers.model.servable import ServableModel, torch_dtype

GRANULE_BYTES = 65536
SCALE_SUFFIX = "_scale_inv"  # of a matrix's name: its factors
# dtypes by their safetensors names
STORED_NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def plan_weights(servable: ServableModel, dtype: str | torch.dtype, *, granule_bytes: int = GRANULE_BYTES) -> LoadPlan:
    """Raises CheckpointError where the files do not hold exactly the model of the configuration."""
    dtype = torch_dtype(dtype)
    model = servable.build(dtype)
    stored = read_checkpoint(servable.model_dir)
    layout = lay_out(model, servable.experts, dtype, granule_bytes)
    copies = _Copies(servable, model, layout).plan(stored)
    return LoadPlan(segments=layout.segment_bytes(), copies=copies, manifest=layout.to_manifest())


def select(plan: LoadPlan, names: Sequence[str]) -> LoadPlan:
    """The same plan for these segments only, in this order; the manifest still describes all. Raises ValueError for an unknown name."""
    if unknown := [name for name in names if name not in plan.segments]:
        raise ValueError(
            f"the plan has no segment {unknown[0]!r}; it has {len(plan.segments)}, {DENSE!r} and slab groups"
        )
    wanted = {name: plan.segments[name] for name in names}
    return replace(plan, segments=wanted, copies=[copy for copy in plan.copies if copy.segment in wanted])


def lay_out(model: PreTrainedModel, experts: tuple[str, ...], dtype: torch.dtype, granule_bytes: int) -> WeightLayout:
    """Where each tensor of the module tree lies; tied parameters have no bytes of their own."""
    slab_names = {f"{module}.{name}" for module in experts for name in slab_matrices(model.get_submodule(module))}
    tied, dtypes, state = names.tied_names(model), names.state_dtypes(model, dtype), model.state_dict()
    dense, end = {}, 0
    for name, tensor in state.items():
        if name not in slab_names and name not in tied:
            dense[name] = DenseTensor(str(dtypes[name]).removeprefix("torch."), tuple(tensor.shape), end)
            end += aligned(tensor.numel() * dtypes[name].itemsize)
    layers, slots, slab_bytes = [], 0, 0
    for path in experts:
        module = model.get_submodule(path)
        matrices, offset = [], 0
        for name in slab_matrices(module):
            num_experts, *shape = state[f"{path}.{name}"].shape
            matrices.append(SlabMatrix(name, offset, (shape[0], shape[1])))
            offset += aligned(shape[0] * shape[1] * dtype.itemsize)
        layers.append(
            ExpertLayer(path, slots, num_experts, tuple(matrices), module.is_transposed, not module.is_concatenated)
        )
        slots += num_experts
        slab_bytes = max(slab_bytes, offset)
    slot_bytes, slots_per_group = slot_size(slab_bytes, granule_bytes, [layer.num_experts for layer in layers])
    return WeightLayout(
        version=VERSION,
        dtype=str(dtype).removeprefix("torch."),
        dense_bytes=end,
        dense=dense,
        slab_bytes=slab_bytes,
        slot_bytes=slot_bytes,
        slots=slots,
        slots_per_group=slots_per_group,
        experts=tuple(layers),
    )


def slab_matrices(module: nn.Module) -> tuple[str, str]:
    """The parameters of an experts module that make up its slabs; all others (biases) are dense."""
    return (up_name(module), "down_proj")


@dataclass(frozen=True)
class _Place:
    """Where a run of one dtype goes, and how many elements it must have."""

    segment: str
    offset_bytes: int
    num_elements: int
    dtype: torch.dtype


class _Copies:
    """Matches stored tensors with the layout."""

    def __init__(self, servable: ServableModel, model: PreTrainedModel, layout: WeightLayout) -> None:
        self._model_dir = servable.model_dir
        self._blocks = servable.weight_blocks
        self._scales: dict[str, StoredTensor] = {}
        self._model = model
        self._layout = layout
        self._dtype = getattr(torch, layout.dtype)
        self._state = model.state_dict()
        self._tied = names.tied_names(model)
        self._matrices = {
            f"{layer.module}.{matrix.name}": (layer, matrix) for layer in layout.experts for matrix in layer.matrices
        }
        self._filled: dict[str, set[tuple[int | None, int]]] = {}

    def plan(self, stored: dict[str, StoredTensor]) -> list[Copy]:
        copies: list[Copy] = []
        unexpected = []
        if self._blocks is not None:
            self._scales = {key: stored[key + SCALE_SUFFIX] for key in stored if key + SCALE_SUFFIX in stored}
            of_scales = {key + SCALE_SUFFIX for key in self._scales}
            stored = {key: tensor for key, tensor in stored.items() if key not in of_scales}
        for key, target in names.targets(self._model, stored).items():
            if target.name in self._state:
                copies += self._copies_of(key, stored[key], target)
            elif not names.may_be_left_over(self._model, target.name):
                unexpected.append(key)
        if unexpected:
            raise self._wrong("holds tensors that the model has no place for", unexpected)
        self._require_complete()
        return copies

    def _wrong(self, what: str, keys: list[str]) -> CheckpointError:
        shown = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        return CheckpointError(
            f"{self._model_dir}: the checkpoint {what}: {shown}; config.json and weights do not belong together, or a file is incomplete: "
            "fetch the checkpoint again"
        )

    def _copies_of(self, key: str, stored: StoredTensor, target: names.Target) -> list[Copy]:
        if target.operations:
            raise CheckpointError(
                f"{self._model_dir}: {key} would have to be rearranged ({', '.join(target.operations)}), which flexpert does not do; "
                "save the model again with transformers 5 so that its tensors have the names of its modules"
            )
        if target.name in self._tied:
            return []
        matrix = self._matrices.get(target.name)
        if matrix is None:
            dense = self._layout.dense[target.name]
            self._require_shape(key, stored, dense.shape)
            self._fill(key, target.name, None, 0)
            dtype = getattr(torch, dense.dtype)
            return self._copy(key, stored, 0, _Place(DENSE, dense.offset_bytes, stored.num_elements, dtype))
        layer, slab = matrix
        if target.expert is None:
            self._require_shape(key, stored, (layer.num_experts, *slab.shape))
            experts: range = range(layer.num_experts)
        else:
            rows, columns = slab.shape
            self._require_shape(key, stored, (rows // target.parts, columns))
            if target.expert >= layer.num_experts:
                raise self._wrong(
                    f"has an expert {target.expert} where the configuration has {layer.num_experts}", [key]
                )
            experts = range(target.expert, target.expert + 1)
        copies = []
        for i, expert in enumerate(experts):
            self._fill(key, target.name, expert, target.part)
            elements = stored.num_elements // len(experts)
            group, slot = divmod(layer.first_slot + expert, self._layout.slots_per_group)
            offset = slot * self._layout.slot_bytes + slab.offset_bytes + target.part * elements * self._dtype.itemsize
            copies += self._copy(key, stored, i * elements, _Place(segment_of(group), offset, elements, self._dtype))
        return copies

    def _copy(self, key: str, stored: StoredTensor, first_element: int, place: _Place) -> list[Copy]:
        wanted = STORED_NAMES[place.dtype]
        scale = self._scale_of(key, stored, first_element) if stored.dtype in SCALED_FROM else None
        known = scale is not None or stored.dtype in CONVERTIBLE_FROM
        if stored.dtype != wanted and not (known and place.dtype.is_floating_point):
            raise CheckpointError(
                f"{stored.file}: {key} has dtype {stored.dtype}, expected {wanted} or one of {', '.join(sorted(CONVERTIBLE_FROM))}; "
                f"fp8 with the factors of its blocks ({key}{SCALE_SUFFIX}) is taken too, no other quantised checkpoint yet"
            )
        if place.num_elements == 0:
            return []
        item_bytes = ITEM_BYTES[stored.dtype]
        return [
            Copy(
                file=str(stored.file),
                file_offset=stored.file_offset + first_element * item_bytes,
                num_elements=place.num_elements,
                source_dtype=stored.dtype,
                segment=place.segment,
                segment_offset=place.offset_bytes,
                dtype=wanted,
                scale=scale,
            )
        ]

    def _scale_of(self, key: str, stored: StoredTensor, first_element: int) -> BlockScale | None:
        """The factors of the matrix that begins at an element of a tensor, the first or one of several matrices; None where it has none."""
        found = self._scales.get(key)
        if found is None or self._blocks is None or len(stored.shape) < 2:
            return None
        rows, columns = stored.shape[-2:]
        blocks = (-(-rows // self._blocks[0]), -(-columns // self._blocks[1]))
        self._require_shape(f"{key}{SCALE_SUFFIX}", found, (*stored.shape[:-2], *blocks))
        if found.dtype not in SCALE_DTYPES:
            raise CheckpointError(
                f"{found.file}: {key}{SCALE_SUFFIX} has dtype {found.dtype}, expected one of {', '.join(sorted(SCALE_DTYPES))}"
            )
        offset = first_element // (rows * columns) * blocks[0] * blocks[1] * ITEM_BYTES[found.dtype]
        return BlockScale(str(found.file), found.file_offset + offset, found.dtype, columns, *self._blocks)

    def _require_shape(self, key: str, stored: StoredTensor, expected: tuple[int, ...]) -> None:
        if stored.shape != tuple(expected):
            raise CheckpointError(
                f"{stored.file}: {key} has shape {list(stored.shape)}, expected {list(expected)}; config.json and weights do not belong "
                "together: fetch the checkpoint again"
            )

    def _fill(self, key: str, name: str, expert: int | None, part: int) -> None:
        filled = self._filled.setdefault(name, set())
        if (expert, part) in filled:
            raise self._wrong(f"holds {name} twice", [key])
        filled.add((expert, part))

    def _require_complete(self) -> None:
        """Every dense tensor, and of every expert's matrix every part, was found."""
        missing = [n for n in self._layout.dense if n not in self._filled and not names.may_be_absent(self._model, n)]
        for name, (layer, _) in self._matrices.items():
            filled = self._filled.get(name, set())
            parts = 1 + max((part for _, part in filled), default=0)
            missing += [
                f"{name} of expert {expert}"
                for expert in range(layer.num_experts)
                if any((expert, part) not in filled for part in range(parts))
            ]
        if missing:
            raise self._wrong(f"lacks {len(missing)} tensors", missing)
