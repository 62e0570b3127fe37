"""How long prompts and answers are, drawn from a distribution given as text, and which prompts begin alike."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flexpert.loadtest.schedule import Arrival

__all__ = ["Lengths", "LengthsError", "Mix", "parse_lengths"]

FORMS = "128, 64:256 (even), lognormal:MEAN:CV, or 100@0.8,8000@0.2 (choices with their shares)"


MOST_TOKENS = 10**7


class LengthsError(ValueError):
    """The message says what was found and what was expected."""


@dataclass(frozen=True)
class Lengths:
    """kind and numbers as parse_lengths reads them."""

    kind: str
    numbers: tuple[float, ...]
    text: str

    def draw(self, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Each at least 1."""
        match self.kind, self.numbers:
            case "fixed", (value,):
                found = np.full(count, int(value))
            case "even", (low, high):
                found = rng.integers(int(low), int(high) + 1, count)
            case "lognormal", (mean, cv):
                sigma2 = float(np.log1p(cv**2))
                found = np.rint(rng.lognormal(np.log(mean) - sigma2 / 2, np.sqrt(sigma2), count)).astype(np.int64)
            case _, numbers:
                values, shares = np.array(numbers[::2], dtype=np.int64), np.array(numbers[1::2])
                found = rng.choice(values, count, p=shares / shares.sum())
        clipped: npt.NDArray[np.int64] = np.clip(found, 1, MOST_TOKENS)
        return clipped


def parse_lengths(text: str, *, option: str) -> Lengths:
    """Raises LengthsError."""
    text = text.strip()
    number = r"(\d+(?:\.\d+)?)"
    if found := re.fullmatch(r"\d+", text):
        numbers, kind = [float(text)], "fixed"
    elif found := re.fullmatch(r"(\d+):(\d+)", text):
        numbers, kind = [float(found[1]), float(found[2])], "even"
        if numbers[0] > numbers[1]:
            raise LengthsError(f"{option} {text!r}: {found[1]} is above {found[2]}; give the smaller one first")
    elif found := re.fullmatch(f"lognormal:{number}:{number}", text):
        numbers, kind = [float(found[1]), float(found[2])], "lognormal"
    elif re.fullmatch(rf"\d+@{number}(,\d+@{number})*", text):
        numbers, kind = [float(each) for part in text.split(",") for each in part.split("@")], "choice"
        if not sum(numbers[1::2]) > 0:
            raise LengthsError(f"{option} {text!r}: the shares are all 0")
    else:
        raise LengthsError(f"{option} {text!r}: expected {FORMS}")
    if min(numbers[::2] if kind == "choice" else numbers[:1]) < 1:
        raise LengthsError(f"{option} {text!r}: a length is at least 1 token")
    return Lengths(kind, tuple(numbers), text)


@dataclass(frozen=True)
class Mix:
    """What each request of a shape looks like: prompt_tokens of its own, after one of `prefixes` beginnings of prefix_tokens each."""

    prompt: Lengths
    output: Lengths
    prefix_tokens: int = 0
    prefixes: int = 1

    def draw(self, at_s: npt.NDArray[np.float64], rng: np.random.Generator) -> Iterator[Arrival]:
        """One arrival for each time."""
        count = len(at_s)
        prompt, output = self.prompt.draw(count, rng) + self.prefix_tokens, self.output.draw(count, rng)
        if not self.prefix_tokens:
            yield from map(Arrival, at_s.tolist(), prompt.tolist(), output.tolist())
            return
        which = rng.integers(0, self.prefixes, count).tolist()
        for at, prompt_tokens, output_tokens, prefix in zip(
            at_s.tolist(), prompt.tolist(), output.tolist(), which, strict=True
        ):
            yield Arrival(at, prompt_tokens, output_tokens, prefix=(prefix,), prefix_block_tokens=self.prefix_tokens)
