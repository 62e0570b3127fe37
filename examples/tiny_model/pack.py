"""Trains the tokenizer on a sample of the corpus and packs the corpus as tokens, small enough to carry to a GPU
machine.

    python3 pack.py --work DIR --out .tiny

Reads DIR/corpus/*.jsonl (corpus.py). Writes to --out: tokenizer/ (transformers format, with the chat template),
and for each domain train-<domain>.xz and held-<domain>.xz (uint16 tokens, little-endian, xz), meta.json (counts),
sources.json (copied) and excerpts.json (a few KB of held-out text a domain, from public-domain or permissively
licensed sources only, for the tests). A document is <|bos|> text <|end|>; every fifth is preceded by conversations
cut from it instead of standing as it is.
"""

import argparse
import json
import lzma
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from chat import ASSISTANT, BOS, END, PAD, SPECIAL_TOKENS, SYSTEM, TEMPLATE, USER, conversation
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB = 4096
CONTEXT = 2048
TOKENIZER_SAMPLE_CHARS = 3_000_000
HELD_OUT_BYTES = 600_000
EXCERPT_CHARS = 1500
EXCERPTS_A_DOMAIN = 4
CHAT_SHARE = 0.2
CHAT_PIECE_CHARS = 3000
PERMISSIVE = ("public-domain", "BSD", "MIT", "PSF", "Apache", "PostgreSQL", "Unicode")
WORDS = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?= \S)|\s+"
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1}]


def documents(path: Path) -> Iterator[dict[str, Any]]:
    with open(path) as lines:
        yield from map(json.loads, lines)


def train_tokenizer(paths: list[Path]) -> Tokenizer:
    """Byte-level BPE; each domain gives the same number of characters, spread evenly over its documents."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()

    def sample() -> Iterator[str]:
        for path in paths:
            share = TOKENIZER_SAMPLE_CHARS / path.stat().st_size
            for document in documents(path):
                text = document["text"]
                if not document["held"]:
                    yield text[: max(200, int(len(text) * share))]

    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(sample(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """The files that AutoTokenizer reads."""
    folder.mkdir(parents=True, exist_ok=True)
    compact = json.loads(tokenizer.to_str())
    (folder / "tokenizer.json").write_text(json.dumps(compact, ensure_ascii=False, separators=(",", ":")))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "extra_special_tokens": [SYSTEM, USER, ASSISTANT],
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def chat_pieces(text: str, domain: str, rng: random.Random) -> Iterator[list[tuple[str, str]]]:
    """Conversations cut from consecutive pieces of `text`."""
    start = 0
    while start < len(text):
        piece = text[start : start + CHAT_PIECE_CHARS]
        turns = conversation(piece, domain, rng)
        if len(turns) > 1:
            yield turns
        start += max(600, sum(len(content) for role, content in turns if role != "system"))


def layouts(document: dict[str, Any], domain: str, rng: random.Random) -> Iterator[list[str]]:
    """The document as lists of alternating special tokens and texts (special tokens are recognised when encoded)."""
    if document["held"] or rng.random() >= CHAT_SHARE:
        yield [BOS, document["text"], END]
        return
    for turns in chat_pieces(document["text"], domain, rng):
        yield [BOS, *(part for role, content in turns for part in (f"<|{role}|>", content, END))]


def encode(tokenizer: Tokenizer, batch: list[list[str]]) -> list[np.ndarray]:
    """One uint16 array a layout. Texts are encoded apart from special tokens, as the chat template's parts are."""
    special = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    texts = [part for layout in batch for part in layout if part not in special]
    encoded = iter(tokenizer.encode_batch(texts, add_special_tokens=False))
    return [
        np.array([i for part in layout for i in ([special[part]] if part in special else next(encoded).ids)], np.uint16)
        for layout in batch
    ]


def pack_domain(path: Path, tokenizer: Tokenizer, out: Path) -> tuple[dict[str, int], list[dict[str, str]]]:
    """Writes one domain's tokens; gives its counts and its excerpts."""
    domain = path.stem
    rng = random.Random(f"pack {domain}")
    everything = list(documents(path))
    rng.shuffle(everything)
    train: list[list[str]] = []
    held: list[list[str]] = []
    excerpts: list[dict[str, str]] = []
    held_bytes = 0
    for document in everything:
        if not document["held"]:
            train.extend(layouts(document, domain, rng))
        elif held_bytes < HELD_OUT_BYTES:
            held.extend(layouts(document, domain, rng))
            held_bytes += len(document["text"].encode())
            permissive = " or " not in document["licence"] and any(word in document["licence"] for word in PERMISSIVE)
            fresh = document["source"] not in [excerpt["source"] for excerpt in excerpts] or len(excerpts) < 2
            if permissive and "GPL" not in document["licence"] and fresh and len(excerpts) < EXCERPTS_A_DOMAIN:
                text = document["text"][: document["text"].find("\n", EXCERPT_CHARS) + 1 or EXCERPT_CHARS][
                    : 2 * EXCERPT_CHARS
                ]
                excerpts.append(
                    {"domain": domain, **{key: document[key] for key in ("source", "licence")}, "text": text}
                )
    counts = {"held_documents": len(held), "held_bytes": held_bytes, "train_documents": len(train)}
    for name, layouts_ in (("train", train), ("held", held)):
        arrays = [array for i in range(0, len(layouts_), 500) for array in encode(tokenizer, layouts_[i : i + 500])]
        tokens = np.concatenate(arrays).astype("<u2")
        counts[f"{name}_tokens"] = len(tokens)
        (out / f"{name}-{domain}.xz").write_bytes(lzma.compress(tokens.tobytes(), filters=XZ))
    return counts, excerpts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="the folder that corpus.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the packed data")
    arguments = parser.parse_args()
    out, corpus = arguments.out, arguments.work / "corpus"
    out.mkdir(parents=True, exist_ok=True)
    paths = sorted(corpus.glob("*.jsonl"))
    tokenizer = train_tokenizer(paths)
    save_tokenizer(tokenizer, out / "tokenizer")
    shutil.copy(corpus / "sources.json", out / "sources.json")
    meta, excerpts = {}, []
    with ProcessPoolExecutor(2) as pool:
        packed = pool.map(pack_domain, paths, [tokenizer] * len(paths), [out] * len(paths))
    for path, (counts, more) in zip(paths, packed, strict=True):
        meta[path.stem] = counts
        excerpts += more
        packed_mb = (out / f"train-{path.stem}.xz").stat().st_size / 1e6
        print(f"{path.stem:10} {meta[path.stem]} train packed in {packed_mb:.1f} MB", flush=True)
    (out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    (out / "excerpts.json").write_text(json.dumps(excerpts, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
