"""Measures a trained checkpoint against its dense baseline and writes training.json, the heat map and the model card.

    python3 report.py --data .tiny --out DIR --device cpu

Called by train.py at its end; by itself it repeats the measurements on the checkpoints in DIR and keeps what
training.json says of the training. Everything is computed in float32 by transformers from the files that ship.
"""

import argparse
import json
import lzma
import math
import shutil
from pathlib import Path
from typing import Any

import card
import export
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

EVALUATION_ROWS = 16
PROMPT_TOKENS, CONTINUATION_TOKENS, PROMPTS_A_DOMAIN = 96, 96, 16


def held_out_windows(data: Path, domain: str, context: int, limit: int | None) -> Tensor:
    """[n, context + 1] int64: the held-out tokens of a domain, each predicted once; the rest of the last window is
    -100."""
    tokens = np.frombuffer(lzma.decompress((data / f"held-{domain}.xz").read_bytes()), "<u2").astype(np.int64)[:limit]
    windows = math.ceil((len(tokens) - 1) / context)
    padded = np.full(windows * context + 1, -100, np.int64)
    padded[: len(tokens)] = tokens
    return torch.from_numpy(padded).unfold(0, context + 1, context)


@torch.no_grad()
def measure(model: PreTrainedModel, windows: Tensor) -> tuple[float, int, np.ndarray]:
    """Summed loss in nats, predicted tokens, and how often each expert was chosen [layers, experts] (0 columns if
    dense)."""
    config = model.config
    experts = getattr(config, "num_experts", 0)
    nats, count, used = 0.0, 0, torch.zeros(config.num_hidden_layers, experts, dtype=torch.float64)
    for rows in windows.split(EVALUATION_ROWS):
        rows = rows.to(model.device)
        out = model(rows[:, :-1].clamp(min=0), **({"output_router_logits": True} if experts else {}))
        targets = rows[:, 1:].flatten()
        nats += F.cross_entropy(out.logits.float().flatten(0, 1), targets, reduction="sum", ignore_index=-100).item()
        count += int((targets >= 0).sum())
        if experts:
            for layer, logits in enumerate(out.router_logits):
                chosen = logits.view(-1, experts).topk(config.num_experts_per_tok).indices[targets >= 0]
                used[layer] += torch.bincount(chosen.flatten(), minlength=experts).cpu()
    return nats, count, used.numpy()


def mutual_information_bits(shares: np.ndarray) -> float:
    """Between the domain of a token (all equally likely) and the expert it is sent to; shares [domains, experts],
    rows sum to 1."""
    mixed = np.broadcast_to(shares.mean(0), shares.shape)
    used = shares > 0
    return float((shares[used] * np.log2(shares[used] / mixed[used])).sum() / len(shares))


class DomainGuess:
    """Tells a text's domain from its tokens alone, by their frequencies in the held-out text of each domain."""

    def __init__(self, windows: dict[str, Tensor], vocab: int) -> None:
        self.domains = list(windows)
        counts = torch.stack([torch.bincount(w[:, 1:][w[:, 1:] >= 0], minlength=vocab) for w in windows.values()])
        self.log_shares = ((counts + 0.5) / (counts + 0.5).sum(1, keepdim=True)).log()

    def __call__(self, tokens: Tensor) -> str:
        return self.domains[int(self.log_shares[:, tokens].sum(1).argmax())]


@torch.no_grad()
def continuations(model: PreTrainedModel, prompts: Tensor) -> Tensor:
    """Sampled continuations [n, CONTINUATION_TOKENS] of equally long prompts."""
    torch.manual_seed(7)
    out = model.generate(
        prompts.to(model.device),
        attention_mask=torch.ones_like(prompts).to(model.device),
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        max_new_tokens=CONTINUATION_TOKENS,
    )
    return out[:, prompts.shape[1] :].cpu()


def chat_answer(model: PreTrainedModel, tokenizer: Any, text: str, max_new_tokens: int) -> dict[str, Any]:
    torch.manual_seed(8)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    out = model.generate(**prompt, do_sample=True, temperature=0.8, top_p=0.95, max_new_tokens=max_new_tokens)
    answer = out[0, prompt["input_ids"].shape[1] :]
    return {
        "user": text,
        "assistant": tokenizer.decode(answer, skip_special_tokens=True),
        "ended": int(answer[-1]) == tokenizer.eos_token_id,
    }


def samples(
    model: PreTrainedModel, tokenizer: Any, windows: dict[str, Tensor], excerpts: list[dict[str, str]], quick: bool
) -> dict[str, Any]:
    """Continuations of held-out text and chat answers; how often the domain of a continuation is the prompt's."""
    guess = DomainGuess(windows, model.config.vocab_size)
    texts, right, total = {}, 0, 0
    for domain, rows in windows.items():
        prompts = rows[: 2 if quick else PROMPTS_A_DOMAIN, :PROMPT_TOKENS].clamp(min=0)
        prompts[:, 0] = tokenizer.bos_token_id
        made = continuations(model, prompts)
        right += sum(guess(row[row > 2]) == domain for row in made)
        total += len(made)
        passages = [excerpt["text"] for excerpt in excerpts if excerpt["domain"] == domain]
        chats = [
            chat_answer(model, tokenizer, passage[:300].rstrip(), 16 if quick else 200) for passage in passages[:2]
        ]
        texts[domain] = {
            "prompt": tokenizer.decode(prompts[0, 1:]),
            "continuation": tokenizer.decode(made[0]),
            "chats": chats,
        }
    return {"by_domain": texts, "domain_recognised": right / total, "continuations": total}


def write(*, data: Path, out: Path, device: str, settings: dict[str, Any], runs: dict[str, Any], quick: bool) -> None:
    """Measures out/model and out/dense and writes out/model/{training.json, sources.json, expert_use.png,
    README.md}."""
    meta = json.loads((data / "meta.json").read_text())
    excerpts = json.loads((data / "excerpts.json").read_text())
    folder = out / "model"
    context, limit = (128, 1000) if quick else (2048, None)
    windows = {domain: held_out_windows(data, domain, context, limit) for domain in meta}
    held_out: dict[str, Any] = {domain: {} for domain in windows}
    shares = []
    for name in ("moe", "dense"):
        model = export.load(folder if name == "moe" else out / "dense", device)
        for domain, rows in windows.items():
            nats, count, used = measure(model, rows)
            whole = count + 1 == meta[domain]["held_tokens"]
            bits = nats / math.log(2) / meta[domain]["held_bytes"] if whole else float("nan")
            held_out[domain] |= {
                f"{name}_nats_per_token": round(nats / count, 4),
                f"{name}_bits_per_byte": round(bits, 4),
            }
            if name == "moe":
                shares.append(used / used.sum(1, keepdims=True))
    by_layer = np.stack(shares, axis=1)  # [layers, domains, experts], shares of the choices
    model, tokenizer = export.load(folder, device), AutoTokenizer.from_pretrained(folder)
    training = {
        "settings": settings,
        "runs": runs,
        "data": meta,
        "held_out": held_out,
        "expert_use": {
            "domains": list(meta),
            "shares": np.round(by_layer, 4).tolist(),
            "least_used_share": round(float(by_layer.mean(1).min()), 4),
            "domain_information_bits": [round(mutual_information_bits(layer), 4) for layer in by_layer],
        },
        "samples": samples(model, tokenizer, windows, excerpts, quick),
    }
    (folder / "training.json").write_text(json.dumps(training, indent=1, ensure_ascii=False) + "\n")
    shutil.copy(data / "sources.json", folder / "sources.json")
    card.draw(by_layer, list(meta), folder / "expert_use.png")
    (folder / "README.md").write_text(card.text(training, json.loads((data / "sources.json").read_text()), folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".tiny"))
    parser.add_argument("--out", type=Path, required=True, help="the folder that train.py wrote")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    before = json.loads((arguments.out / "model" / "training.json").read_text())
    write(
        data=arguments.data,
        out=arguments.out,
        device=arguments.device,
        settings=before["settings"],
        runs=before["runs"],
        quick=False,
    )


if __name__ == "__main__":
    main()
