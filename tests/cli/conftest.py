"""A tiny model, a runtime directory, and a cluster brought up the way a user does it, shared by most tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cli.harness import Cluster, flexpert


@pytest.fixture
def runtime() -> Iterator[Path]:
    """A runtime directory with a short path: sockets lie in it."""
    path = Path(tempfile.mkdtemp(prefix="fx-", dir="/tmp"))
    yield path
    if any(path.glob("*/state.json")):
        flexpert(path, "down")
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE with a byte-level tokenizer: real in every respect but its knowledge."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

    path = tmp_path_factory.mktemp("model") / "tiny-qwen3-moe"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", model_max_length=2048)
    fast.chat_template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(fast), hidden_size=64, intermediate_size=128, moe_intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2, max_position_embeddings=2048,
        initializer_range=0.3, tie_word_embeddings=False, eos_token_id=len(fast) - 1, pad_token_id=None, bos_token_id=None,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).eval().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def cluster(tiny_model: Path) -> Iterator[Cluster]:
    """One cluster for the tests of a module; each leaves it serving."""
    path = Path(tempfile.mkdtemp(prefix="fx-", dir="/tmp"))
    found = Cluster.up(path, tiny_model)
    try:
        yield found.wait_ready()
    except BaseException:
        found.end()
        raise
    # As `timeout` and closed terminals do it.
    assert found.end(whole_group=True) == 0, found.text
    assert not (path / "default" / "state.json").exists()
    shutil.rmtree(path, ignore_errors=True)
