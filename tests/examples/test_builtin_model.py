"""The shipped checkpoint is what its card says: small, as good on held-out text as stated, its routing real."""

import json
import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MODEL = Path(__file__).parents[2] / "workers" / "builtin_model"
EXCERPTS = Path(__file__).parent / "data" / "heldout_excerpts.json"
MAX_FILE_BYTES = 16 * 2**20
MAX_TOTAL_BYTES = 24_000_000
PROMPT_TOKENS, NEW_TOKENS = 64, 64

pytestmark = pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="the built-in model is not in this tree")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The model is so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    os.environ["HF_HUB_OFFLINE"] = "1"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, experts_implementation="eager"
    )
    return loaded.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def stated():
    return json.loads((MODEL / "training.json").read_text())


@pytest.fixture(scope="module")
def excerpts():
    """domain -> held-out texts."""
    by_domain: dict[str, list[str]] = {}
    for excerpt in json.loads(EXCERPTS.read_text()):
        by_domain.setdefault(excerpt["domain"], []).append(excerpt["text"])
    return by_domain


@pytest.fixture(scope="module")
def readings(model, tokenizer, excerpts):
    """domain -> (nats a token, counts of chosen experts [layers, experts]) over its excerpts."""
    results = {}
    for domain, texts in excerpts.items():
        nats, tokens = 0.0, 0
        used = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
        for text in texts:
            ids = tokenizer(text, return_tensors="pt").input_ids
            with torch.no_grad():
                out = model(ids, output_router_logits=True)
            loss = torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[0, 1:], reduction="sum")
            nats, tokens = nats + loss.item(), tokens + ids.shape[1] - 1
            for layer, logits in enumerate(out.router_logits):
                chosen = logits.topk(model.config.num_experts_per_tok).indices.flatten()
                used[layer] += torch.bincount(chosen, minlength=model.config.num_experts)
        results[domain] = (nats / tokens, used)
    return results


def test_checkpoint_is_small_enough_to_ship():
    sizes = [file.stat().st_size for file in MODEL.iterdir()]
    assert max(sizes) <= MAX_FILE_BYTES
    assert sum(sizes) <= MAX_TOTAL_BYTES


def test_routing_has_sixteen_experts_and_two_chosen(model):
    assert model.config.num_experts >= 16
    assert model.config.num_experts_per_tok >= 2


def test_weights_are_named_by_expert():
    names = json.loads((MODEL / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.0.mlp.experts.0.gate_proj.weight" in names
    assert "model.layers.5.mlp.experts.15.down_proj.weight" in names


def test_held_out_loss_is_near_what_the_card_states(readings, stated):
    # An excerpt is short and so has little context: it may be worse than the mean of its domain, never wildly.
    for domain, (nats, _) in readings.items():
        expected = stated["held_out"][domain]["moe_nats_per_token"]
        assert 0.4 * expected < nats < 1.8 * expected, (
            f"{domain}: {nats:.3f} nats a token, the card says {expected:.3f}"
        )


def test_expert_use_differs_by_domain(readings):
    shares = torch.stack([used / used.sum(1, keepdim=True) for _, used in readings.values()])
    distance = 0.5 * (shares[:, None] - shares[None, :]).abs().sum(-1)  # total variation [domains, domains, layers]
    between = distance[~torch.eye(len(shares), dtype=torch.bool)]
    assert between.max(-1).values.min() > 0.15, "two domains are routed alike in every layer"


def test_no_expert_is_dead(stated):
    assert stated["expert_use"]["least_used_share"] > 0.005


def test_continuation_stays_in_the_domain_of_its_prompt(model, tokenizer, excerpts):
    own = {
        domain: torch.cat([tokenizer(t, return_tensors="pt").input_ids[0] for t in ts])
        for domain, ts in excerpts.items()
    }
    counts = torch.stack([torch.bincount(ids, minlength=model.config.vocab_size) for ids in own.values()]) + 0.1
    log_shares = (counts / counts.sum(1, keepdim=True)).log()
    prompts = torch.stack(
        [tokenizer(texts[0], return_tensors="pt").input_ids[0, :PROMPT_TOKENS] for texts in excerpts.values()]
    )
    torch.manual_seed(0)
    with torch.no_grad():
        out = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW_TOKENS, do_sample=True, temperature=0.8
        )
    guessed = [int(log_shares[:, row[PROMPT_TOKENS:]].sum(1).argmax()) for row in out]
    right = sum(guess == expected for expected, guess in enumerate(guessed))
    assert right >= len(guessed) - 2, f"domains {list(excerpts)} were taken for {[list(excerpts)[g] for g in guessed]}"


def test_chat_template_opens_an_answer_that_stops(model, tokenizer, excerpts):
    ended = []
    for domain in ("prose", "dictionary", "python"):
        texts = excerpts[domain]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": texts[0][:200]}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        assert prompt["input_ids"][0, 0] == tokenizer.bos_token_id
        assert tokenizer.decode(prompt["input_ids"][0, -1]) == "<|assistant|>"
        torch.manual_seed(0)
        with torch.no_grad():
            out = model.generate(**prompt, max_new_tokens=200, do_sample=True, temperature=0.8)
        ended.append(int(out[0, -1]) == model.generation_config.eos_token_id[0])
    assert any(ended)


def test_card_states_data_loss_and_that_it_is_a_demonstration():
    card = (MODEL / "README.md").read_text()
    for part in ("It is a demonstration", "expert_use.png", "Held-out loss", "Data and licences", "python3 train.py"):
        assert part in card
