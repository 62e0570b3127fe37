"""The special tokens, the chat template, and how a passage is laid out as a conversation: used by pack.py and by
the tests."""

import random
import re

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = [PAD, BOS, END, SYSTEM, USER, ASSISTANT]

TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' + message['role'] + '; known are system, user and assistant') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def conversation(text: str, domain: str, rng: random.Random) -> list[tuple[str, str]]:
    """(role, content) turns that together are the start of `text`: the user gives a passage, the assistant goes on
    with it.

    Cuts fall on line ends, sentence ends or spaces. A third of the conversations open with a system turn that
    names the domain.
    """
    turns = [("system", f"Continue the text. Domain: {domain}.")] if rng.random() < 1 / 3 else []
    start = 0
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        middle = _cut(text, start + int(30 * 2 ** rng.uniform(0, 4.5)), r"\n|[ ,;]")
        end = _cut(text, middle + int(100 * 2 ** rng.uniform(0, 3)), r"\n|[.;:!?] ")
        if end >= len(text) or not text[start:middle].strip() or not text[middle:end].strip():
            break
        turns.append(("user", text[start:middle].strip("\n").rstrip()))
        turns.append(("assistant", text[middle:end].strip("\n").rstrip()))
        start = end
    return turns


def _cut(text: str, at: int, ends: str) -> int:
    """The end of the first match of `ends` behind position `at`, or the length of `text`."""
    match = re.compile(ends).search(text, at)
    return match.end() if match else len(text)
