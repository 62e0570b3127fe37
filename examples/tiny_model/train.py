"""Trains the built-in model and its dense baseline on one GPU within a wall-clock budget, and writes checkpoint,
figures and card.

    python3 train.py --data .tiny --out DIR --minutes 8

DIR/model is the checkpoint that ships; DIR/dense the baseline, for the comparison only. Both see the same batches,
as many steps, one schedule. The number of steps follows from step times measured on weights that are then thrown away.
"""

import argparse
import json
import lzma
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import export
import numpy as np
import report
import torch
import torch.nn.functional as F
from model import Shape, TinyModel
from torch import Tensor

START_S = time.monotonic()
PEAK_LR, WARMUP_SHARE, WEIGHT_DECAY, CLIP = 3e-3, 0.03, 0.1, 1.0
BALANCE_WEIGHT = 0.003  # a layer; mild: balanced over a batch of all domains, not within one text
ROWS = 32
WARM_UP_STEPS, MEASURED_STEPS = 6, 20
REPORT_S = 60.0  # kept for export, evaluation and samples


def log(message: str) -> None:
    print(f"[{time.monotonic() - START_S:6.1f} s] {message}", flush=True)


class Batches:
    """All training tokens on the device; each row is a random window of a domain drawn by the square root of its
    size."""

    def __init__(self, data: Path, context: int, rows: int, device: str) -> None:
        self.domains = list(json.loads((data / "meta.json").read_text()))
        with ThreadPoolExecutor() as pool:
            parts = list(
                pool.map(lambda domain: lzma.decompress((data / f"train-{domain}.xz").read_bytes()), self.domains)
            )
        arrays = [np.frombuffer(part, "<u2").astype(np.int16) for part in parts]
        self.tokens = torch.from_numpy(np.concatenate(arrays)).to(device)
        sizes = torch.tensor([len(array) for array in arrays], dtype=torch.float64)
        self.shares = (sizes.sqrt() / sizes.sqrt().sum()).float().to(device)
        self.starts = (sizes.cumsum(0) - sizes).long().to(device)
        self.lengths = sizes.to(device)
        self.window = torch.arange(context + 1, device=device)
        self.rows = rows

    def draw(self, generator: torch.Generator) -> Tensor:
        """[rows, context + 1] token ids."""
        row_domain = torch.multinomial(self.shares, self.rows, replacement=True, generator=generator)
        at = torch.rand(self.rows, generator=generator, device=self.tokens.device, dtype=torch.float64)
        first = self.starts[row_domain] + (at * (self.lengths[row_domain] - len(self.window))).long()
        return self.tokens[first[:, None] + self.window].long()


class Trainer:
    """One model, its optimizer and its (compiled, if that works) loss."""

    def __init__(self, name: str, shape: Shape, batches: Batches, device: str, compiled: bool) -> None:
        torch.manual_seed(1)
        self.name, self.device, self.batches = name, device, batches
        self.model = TinyModel(shape).to(device)
        self.compiled = compiled
        self.loss = torch.compile(self._loss, dynamic=False) if compiled else self._loss
        self.reset()

    def reset(self) -> None:
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)
        self.generator = torch.Generator(self.device).manual_seed(2)

    def _loss(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device, torch.bfloat16):
            logits, _, balance = self.model(tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()), balance

    def step(self, lr: float) -> tuple[Tensor, Tensor]:
        """One step; cross entropy (nats a token) and balance loss (mean of layers; 1 is even) before it, on the
        device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, balance = self.loss(self.batches.draw(self.generator))
        (loss + BALANCE_WEIGHT * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), balance.detach() / len(self.model.layers)

    def measured_step_s(self) -> float:
        """Seconds a step, at learning rate 0 (the weights stay as they are); falls back to eager if compiling fails."""
        try:
            self.step(0.0)
        except Exception as error:  # the compiler's errors have no common class; eager is slower and needs none of it
            log(f"{self.name}: not compiled ({type(error).__name__}: {str(error)[:300]})")
            self.loss, self.compiled = self._loss, False
        for _ in range(WARM_UP_STEPS):
            self.step(0.0)[0].item()
        begin = time.monotonic()
        for _ in range(MEASURED_STEPS):
            loss, _ = self.step(0.0)
        loss.item()
        self.reset()
        return (time.monotonic() - begin) / MEASURED_STEPS

    def train(self, steps: int, budget_s: float) -> dict[str, object]:
        """`steps` steps: linear warm-up, then cosine to zero. A slow machine is met by moving faster through the
        schedule."""
        begin, curve, done = time.monotonic(), [], 0
        while done < steps:
            progress = max(done / steps, (time.monotonic() - begin) / budget_s)
            if progress >= 1.0:
                break
            cosine = 0.5 * (1 + np.cos(np.pi * max(0.0, progress - WARMUP_SHARE) / (1 - WARMUP_SHARE)))
            loss, balance = self.step(PEAK_LR * min((done + 1) / (WARMUP_SHARE * steps), 1.0) * float(cosine))
            done += 1
            if done % 10 == 0 or done == steps:
                point = [done, round(loss.item(), 4), round(balance.item(), 4)]
                if done % max(10, steps // 20 // 10 * 10) == 0 or done == steps:
                    curve.append(point)
                    log(f"{self.name}: step {done} of {steps}, loss {point[1]}, balance {point[2]}")
        train_s = time.monotonic() - begin
        tokens = done * self.batches.rows * (len(self.batches.window) - 1)
        return {
            "steps": done,
            "tokens": tokens,
            "train_s": round(train_s, 1),
            "tokens_per_s": round(tokens / train_s),
            "compiled": self.compiled,
            "curve": curve,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".tiny"), help="the folder that pack.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="wall-clock budget for everything")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--tiny", action="store_true", help="rehearse: short rows, eager, a small evaluation")
    arguments = parser.parse_args()
    data, out, device, tiny = arguments.data, arguments.out, arguments.device, arguments.tiny
    context, rows = (128, 4) if tiny else (2048, ROWS)
    shape = Shape()
    batches = Batches(data, context, rows, device)
    log(f"{len(batches.tokens) / 1e6:.1f} M training tokens of {len(batches.domains)} domains on {device}")
    moe = Trainer("moe", shape, batches, device, compiled=not (tiny or arguments.eager))
    dense = Trainer("dense", replace(shape, experts=0), batches, device, compiled=not (tiny or arguments.eager))
    step_s = {trainer.name: trainer.measured_step_s() for trainer in (moe, dense)}
    log("; ".join(f"{name} {1e3 * s:.1f} ms a step, {rows * context / s:,.0f} tokens/s" for name, s in step_s.items()))
    left_s = 60 * arguments.minutes - (time.monotonic() - START_S) - (5.0 if tiny else REPORT_S)
    steps = max(20, int(0.97 * left_s / sum(step_s.values())))
    moe_s = left_s * step_s["moe"] / sum(step_s.values())
    deadline_s = time.monotonic() + left_s
    runs: dict[str, dict[str, object]] = {}
    for trainer in (moe, dense):
        budget_s = moe_s if trainer is moe else max(1.0, deadline_s - time.monotonic())
        runs[trainer.name] = trainer.train(runs["moe"]["steps"] if runs else steps, budget_s)
        folder = out / ("model" if trainer is moe else "dense")
        difference = export.save(trainer.model, folder, data / "tokenizer")
        log(f"{trainer.name}: saved; the reloaded checkpoint's logits differ by at most {difference:.1e}")
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        runs[trainer.name] |= {"parameters": parameters, "logit_difference": difference}
    command = f"python3 train.py --data .tiny --out OUT --minutes {arguments.minutes:g}"
    settings = {
        "rows": rows,
        "context": context,
        "peak_lr": PEAK_LR,
        "balance_weight": BALANCE_WEIGHT,
        "command": command,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
    }
    figures = json.dumps({"settings": settings, "runs": runs}) + "\n"
    (out / "model" / "training.json").write_text(figures)  # so that report.py can be repeated alone
    report.write(data=data, out=out, device=device, settings=settings, runs=runs, quick=tiny)
    log("done")


if __name__ == "__main__":
    main()
