"""`flexpert kernels tune`: finds the fastest tiles of a model's MoE layer on the GPU at hand and writes them down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexpert.cli.errors import CommandError

if TYPE_CHECKING:
    from flexpert.kernels.moe.plan import LayerShape

DTYPES = ("bfloat16", "fp8-w8a16", "fp8-w8a8")
app = typer.Typer(help="Look after the kernels of the MoE layer.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    pass


@app.command()
def tune(
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Directory of a checkpoint, a hub id, or nothing for the built-in."),
    ] = None,
    tokens: Annotated[
        str, typer.Option(metavar="N,...", help="Token counts to tune for. [default: powers of two up to 16384]")
    ] = "",
    resident: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Experts that will lie on this GPU, where others hold the rest. [default: all]"
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(metavar="DTYPE", help="Of the weights: bfloat16, fp8-w8a16 or fp8-w8a8 (rows may be fp8 too)."),
    ] = "bfloat16",
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the table; FLEXPERT_PLANS=DIR makes it used.")
    ] = Path(),
) -> None:
    """Time the layer's kernels on this GPU with many tiles, at each token count, and keep the best. Takes minutes; serve nothing else."""
    run_tune(model=model, tokens=parse_tokens(tokens), dtype=dtype, resident=resident, out=out)


def run_tune(*, model: str | None, tokens: tuple[int, ...], dtype: str, out: Path, resident: int | None = None) -> None:
    """Raises CommandError."""
    import torch

    if not torch.cuda.is_available():
        raise CommandError(
            "device", "no CUDA device is visible here; plans are found by timing on the GPU that will serve"
        )
    if dtype not in DTYPES:
        raise CommandError("usage", f"--dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if not out.is_dir():
        raise CommandError("directory", f"--out {out}: no such folder; make it first")
    import triton

    from flexpert.cli.model_source import resolve_model
    from flexpert.kernels.moe import tuner
    from flexpert.kernels.moe.plan import device_key

    shape = with_dtype(layer_shape(resolve_model(model).directory), dtype)
    path = out / f"{device_key(torch.cuda.get_device_name())}.json"
    if resident is not None and resident > shape.num_experts:
        raise CommandError("usage", f"--resident {resident}: the model has {shape.num_experts} experts")
    entries = tuner.tune(shape, tokens or tuner.TOKENS, resident=resident, say=typer.echo)
    tuner.write_table(path, {shape.key: entries}, {"torch": torch.__version__, "triton": triton.__version__})
    typer.echo(f"saved {path}; FLEXPERT_PLANS={out} makes it used")


def layer_shape(model_dir: Path) -> LayerShape:
    """Of the model's first MoE layer, in bfloat16. Raises CommandError where the kernels do not take it."""
    import torch

    from flexpert.kernels.moe.plan import LayerShape
    from flexpert.workers.model import UnservableModelError, check_servable
    from flexpert.workers.model.planning import GRANULE_BYTES, lay_out

    try:
        servable = check_servable(model_dir)
    except UnservableModelError as error:
        raise CommandError("model", str(error)) from error
    layout = lay_out(servable.build(torch.bfloat16), servable.experts, torch.bfloat16, GRANULE_BYTES)
    layer = layout.experts[0]
    down = next(matrix.shape for matrix in layer.matrices if matrix.name == "down_proj")
    inner, hidden = down if layer.transposed else (down[1], down[0])
    if hidden % 64 or inner % 64:
        raise CommandError("model", f"hidden size {hidden} and inner size {inner}: the kernels take multiples of 64")
    return LayerShape(
        num_experts=layer.num_experts, hidden=hidden, inner=inner, top_k=servable.config.get_text_config().num_experts_per_tok,
        transposed=layer.transposed, interleaved=layer.interleaved,
    )  # fmt: skip


def with_dtype(shape: LayerShape, dtype: str) -> LayerShape:
    """The same layer with weights of one of DTYPES. Raises CommandError where the fp8 kernels do not take it."""
    if dtype == "bfloat16":
        return shape
    if shape.hidden % 128 or shape.inner % 128 or shape.transposed:
        stored = "transposed" if shape.transposed else "as they come"
        raise CommandError(
            "model",
            f"hidden size {shape.hidden}, inner size {shape.inner}, matrices stored {stored}: fp8 takes multiples of 128, not transposed",
        )
    return replace(shape, dtype="float8_e4m3fn", quantize_rows=dtype == "fp8-w8a8")


def parse_tokens(text: str) -> tuple[int, ...]:
    """ "1,64,4096"; empty for none."""
    try:
        counts = tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        counts = (0,)
    if any(count < 1 for count in counts):
        raise CommandError("usage", f"--tokens {text!r}: expected numbers from 1, like 1,64,4096")
    return counts
