"""The model card (card_template.md filled in) and its picture. Called by report.py, from whose figures both come."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the backend is chosen

SAMPLE_CHARS = 420
PROMPT_CHARS = 160


def draw(shares: np.ndarray, domains: list[str], path: Path) -> None:
    """The heat map; `shares` [layers, domains, experts] is the share of a domain's choices that fell on an expert."""
    layers, _, experts = shares.shape
    rows = (layers + 1) // 2
    size = (11, 1.9 * rows + 0.8)
    figure, axes = plt.subplots(rows, 2, figsize=size, sharex=True, sharey=True, layout="constrained", squeeze=False)
    for layer, axis in enumerate(axes.flat[:layers]):
        image = axis.imshow(100 * shares[layer], vmin=0, vmax=100 * shares.max(), cmap="viridis", aspect="auto")
        axis.set_title(f"layer {layer}", fontsize=10)
        axis.set_xticks(range(experts))
        axis.set_yticks(range(len(domains)), domains)
        axis.tick_params(labelsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("expert", fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("domain", fontsize=9)
    figure.colorbar(image, ax=axes, label=f"% of the domain's choices ({100 / experts:.2f} if even)", shrink=0.8)
    figure.suptitle("Expert use by domain of held-out text", fontsize=12)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def training_table(runs: dict[str, Any]) -> str:
    rows = []
    for name, run in runs.items():
        counts = [f"{run[key]:,}" for key in ("parameters", "steps", "tokens")]
        rows.append([name, *counts, f"{run['train_s']:.0f} s", f"{run['tokens_per_s']:,}"])
    return table(["model", "parameters", "steps", "tokens", "training time", "tokens/s"], rows)


def loss_table(training: dict[str, Any]) -> str:
    rows = []
    for domain, held in training["held_out"].items():
        counts = training["data"][domain]
        figures = [held[f"{name}_{unit}"] for unit in ("nats_per_token", "bits_per_byte") for name in ("moe", "dense")]
        less = 1 - held["moe_nats_per_token"] / held["dense_nats_per_token"]
        sizes = [counts["held_documents"], f"{counts['held_tokens']:,}"]
        rows.append([domain, *sizes, *[f"{figure:.3f}" for figure in figures], f"{100 * less:.1f}%"])
    units = ["MoE nats/token", "dense nats/token", "MoE bits/byte", "dense bits/byte"]
    return table(["domain", "documents", "tokens", *units, "MoE less by"], rows)


def source_table(sources: list[dict[str, Any]]) -> str:
    keys = ("domain", "client", "name", "version", "licence", "documents")
    ordered = sorted(sources, key=lambda source: (source["domain"], -source["bytes"]))
    rows = [[*(source[key] for key in keys), f"{source['bytes']:,}"] for source in ordered]
    return table(["domain", "client", "package", "version", "licence of the text", "documents", "bytes"], rows)


def quoted(text: str) -> str:
    """A sample as an indented block, cut to length."""
    text = text if len(text) <= SAMPLE_CHARS else text[:SAMPLE_CHARS] + " ..."
    return "\n".join("    " + line for line in text.split("\n"))


def sample_text(training: dict[str, Any]) -> str:
    parts = []
    for domain, made in training["samples"]["by_domain"].items():
        parts.append(f"**{domain}**: the end of the prompt, then what the model wrote.\n")
        parts.append(f"{quoted(made['prompt'][-PROMPT_CHARS:])}\n\n->\n\n{quoted(made['continuation'])}\n")
    return "\n".join(parts)


def text(training: dict[str, Any], sources: list[dict[str, Any]], folder: Path) -> str:
    """README.md of the checkpoint in `folder`."""
    use, made = training["expert_use"], training["samples"]
    chats = [chat for domain in made["by_domain"].values() for chat in domain["chats"]]
    template = (Path(__file__).parent / "card_template.md").read_text()
    return template.format(
        **training["settings"],
        parameters=training["runs"]["moe"]["parameters"],
        weight_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        chats=len(chats),
        chats_ended=sum(chat["ended"] for chat in chats),
        training_table=training_table(training["runs"]),
        loss_table=loss_table(training),
        least_used_percent=100 * use["least_used_share"],
        even_percent=100 / len(use["shares"][0][0]),
        information=", ".join(f"{bits:.2f}" for bits in use["domain_information_bits"]),
        most_information=np.log2(len(use["domains"])),
        continuations=made["continuations"],
        recognised_percent=100 * made["domain_recognised"],
        samples=sample_text(training),
        source_table=source_table(sources),
    )
