"""Text from tokens: no character cut, no stop string shown, whole and streamed text equal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from flexpert.controller.gateway.config import GatewayError
from flexpert.controller.gateway.text import StopScanner, WindowDetokenizer
from flexpert.controller.gateway.tokenizer import ModelTokenizer


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> ModelTokenizer:
    return ModelTokenizer.load(model_dir)


def stream(detokenizer: Any, ids: list[int]) -> list[str]:
    return [*(detokenizer.step(token_id) for token_id in ids), detokenizer.flush()]


@given(ids=st.lists(st.integers(0, 399), max_size=40))
def test_any_tokens_stream_to_what_decoding_at_once_gives(tokenizer: ModelTokenizer, ids: list[int]) -> None:
    assert "".join(stream(tokenizer.detokenizer(), ids)) == tokenizer.decode(ids)


@given(text=st.text(max_size=30))
def test_any_text_survives_the_round_trip(tokenizer: ModelTokenizer, vocabulary: Tokenizer, text: str) -> None:
    pieces = stream(tokenizer.detokenizer(), vocabulary.encode(text).ids)
    assert "".join(pieces) == vocabulary.decode(vocabulary.encode(text).ids)
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_character_of_several_tokens_appears_once_it_is_whole(tokenizer: ModelTokenizer, vocabulary: Tokenizer) -> None:
    ids = vocabulary.encode("🦊").ids
    assert len(ids) > 1
    assert stream(tokenizer.detokenizer(), ids) == [""] * (len(ids) - 1) + ["🦊", ""]


def test_character_cut_off_at_the_end_becomes_a_replacement(tokenizer: ModelTokenizer, vocabulary: Tokenizer) -> None:
    ids = vocabulary.encode("a🦊").ids[:-1]
    assert "".join(stream(tokenizer.detokenizer(), ids)) == "a\ufffd"


def test_token_bytes_are_the_bytes_of_the_text(tokenizer: ModelTokenizer, vocabulary: Tokenizer) -> None:
    text = "naïve 世界 🦊"
    ids = vocabulary.encode(text).ids
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.token_bytes(0) == b"<|end|>"
    assert tokenizer.token_bytes(99_999) == b""


def test_part_of_a_character_is_named_by_its_bytes(tokenizer: ModelTokenizer, vocabulary: Tokenizer) -> None:
    first = vocabulary.encode("🦊").ids[0]
    assert tokenizer.token_text(first).startswith("bytes:\\xf0")


@pytest.fixture(scope="module")
def sentencepiece_like() -> Tokenizer:
    """The shape of Mixtral's: a marked space before each word, bytes as tokens where the vocabulary has no piece."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁he", "llo", "▁world", "o", "w", "▁a"]
    tokenizer = Tokenizer(
        models.BPE({piece: n for n, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def ids_of(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    return [tokenizer.token_to_id(piece) for piece in pieces]


def test_window_keeps_the_space_where_the_text_continues_a_prompt(sentencepiece_like: Tokenizer) -> None:
    prompt, output = ids_of(sentencepiece_like, "▁he", "llo"), ids_of(sentencepiece_like, "▁world", "▁a")
    assert stream(WindowDetokenizer(sentencepiece_like.decode, context_ids=prompt), output) == [" world", " a", ""]
    assert stream(WindowDetokenizer(sentencepiece_like.decode), output) == ["world", " a", ""]


def test_window_waits_for_the_bytes_of_a_character(sentencepiece_like: Tokenizer) -> None:
    euro = ids_of(sentencepiece_like, "<0xE2>", "<0x82>", "<0xAC>")
    ids = [*ids_of(sentencepiece_like, "▁he"), *euro, *ids_of(sentencepiece_like, "llo")]
    assert stream(WindowDetokenizer(sentencepiece_like.decode), ids) == ["he", "", "", "€", "llo", ""]


def test_window_does_not_wait_for_ever_for_bytes_that_are_no_character(sentencepiece_like: Tokenizer) -> None:
    ids = ids_of(sentencepiece_like, "▁he", *["<0xFF>"] * 9, "llo")
    pieces = stream(WindowDetokenizer(sentencepiece_like.decode), ids)
    assert "".join(pieces) == "he" + "\ufffd" * 9 + "llo"


def test_window_passes_over_special_tokens(sentencepiece_like: Tokenizer, tmp_path: Path) -> None:
    special = Tokenizer.from_str(sentencepiece_like.to_str())
    special.add_special_tokens(["</s>"])
    special.save(str(tmp_path / "tokenizer.json"))
    tokenizer = ModelTokenizer.load(tmp_path)
    ids = ids_of(special, "▁he", "</s>", "llo", "</s>", "▁world")
    assert stream(tokenizer.detokenizer(), ids) == ["he", "", "llo", "", " world", ""]
    assert stream(tokenizer.detokenizer(context_ids=ids), ids_of(special, "</s>", "▁a")) == ["", " a", ""]
    assert [tokenizer.token_text(token_id) for token_id in ids] == [" he", "</s>", "llo", "</s>", " world"]
    assert tokenizer.token_bytes(special.token_to_id("<0xE2>")) == b"\xe2"


@given(words=st.lists(st.sampled_from(["▁he", "llo", "▁world", "o", "w", "▁a", "▁"]), max_size=30))
def test_window_streams_to_what_decoding_at_once_gives(sentencepiece_like: Tokenizer, words: list[str]) -> None:
    ids = ids_of(sentencepiece_like, *words)
    # Whitespace alone at the very start is all that the decoder's strip makes ambiguous.
    assert (
        "".join(stream(WindowDetokenizer(sentencepiece_like.decode), ids)).lstrip()
        == sentencepiece_like.decode(ids).lstrip()
    )


def scan(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    scanner = StopScanner(stops)
    text = ""
    for piece in pieces:
        text += scanner.feed(piece)
        assert not any(stop in text for stop in stops)
        if scanner.stopped:
            return text, True
    return text + scanner.flush(), False


@given(
    text=st.text(alphabet="abc", max_size=20),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4),
    data=st.data(),
)
def test_stop_string_is_found_across_any_boundaries(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    shown, stopped = scan(stops, pieces)
    assert stopped == any(stop in text for stop in stops)
    assert text.startswith(shown)
    if not stopped:
        assert shown == text


def test_text_is_held_only_while_a_stop_string_is_possible() -> None:
    scanner = StopScanner(["STOP"])
    assert [scanner.feed(piece) for piece in ("x S", "T", "ART")] == ["x ", "", "START"]


def test_gateway_and_tokenizer_import_no_torch(model_dir: Path, repository: Path) -> None:
    program = (
        "import sys; from pathlib import Path; import flexpert.controller.gateway as g\n"
        "from flexpert.controller.gateway.tokenizer import ModelTokenizer\n"
        f"t = ModelTokenizer.load(Path({str(model_dir)!r})); t.render_chat([dict(role='user', content='x')], {{}})\n"
        "assert sorted(g.__all__) == ['ControllerAway', 'Gateway', 'GatewayConfig', 'GatewayError', 'WorkerAddress']\n"
        "sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": str(repository / "src")}, check=False)
    assert result.returncode == 0


def test_directory_without_a_tokenizer_is_refused_clearly(tmp_path: Path) -> None:
    with pytest.raises(GatewayError, match=r"no tokenizer\.json"):
        ModelTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{ not json")
    with pytest.raises(GatewayError, match="cannot be read"):
        ModelTokenizer.load(tmp_path)
