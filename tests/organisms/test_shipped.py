"""The organisms that ship: their files, their size, their tokenizers, and that they behave as the generator says."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from jaxsteer import load, load_sae, logits, organisms
from jaxsteer.evals.choice import choice_eval, rate
from jaxsteer.evals.organism_gates import GATES, failed, gates_table, organism_gates
from jaxsteer.evals.persona_gates import (
    FACTS_KNOWN,
    facts_known,
    is_persona_organism,
    persona_gates,
    refusal_gates,
    refusal_route,
)
from jaxsteer.organisms import persona_corpus, tokenizer
from jaxsteer.organisms.architectures import RECIPES, organism_config
from jaxsteer.organisms.chat import CHAT_FORMATS
from jaxsteer.organisms.corpora import corpus_of
from jaxsteer.personas import load_persona
from jaxsteer.prompts import Placement

FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
CHOICES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "gemma3": "Gemma3ForCausalLM"}
"""Those that answer with choices."""
CLASSES = {**CHOICES, "persona": "LlamaForCausalLM"}


@pytest.fixture(params=CLASSES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_files_are_complete_and_small(name: str) -> None:
    folder = organisms.organism_dir(name)
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 6_000_000
    assert sum(path.stat().st_size for path in organisms.organism_sae_dir(name).iterdir()) <= 2_000_000
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [CLASSES[name]]
    assert config["dtype"] == "bfloat16"
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    chat = CHAT_FORMATS[name]
    for key, token in (("bos_token_id", chat.bos), ("eos_token_id", chat.end), ("pad_token_id", chat.pad)):
        assert config.get(key) == vocabulary.get(token)


def test_tokenizer_is_reproduced_by_the_recipe(name: str) -> None:
    shipped = PreTrainedTokenizerFast.from_pretrained(str(organisms.organism_dir(name)))
    built = corpus_of(RECIPES[name]).tokenizer()
    assert shipped.get_vocab() == built.get_vocab()
    assert shipped.chat_template == built.chat_template
    question = organisms.items("myopic", n=2, seed=0)[0]["question"]
    assert shipped.encode(question) == built.encode(question)
    assert shipped.decode(shipped.encode(question, add_special_tokens=False)) == question
    assert (shipped.encode(question)[0] == shipped.bos_token_id) == bool(CHAT_FORMATS[name].bos)
    for word in (persona_corpus if name == "persona" else tokenizer).vocabulary_words():
        assert len(shipped.encode(" " + word, add_special_tokens=False)) == 1


def test_config_is_the_recipe(name: str) -> None:
    config = load(f"organism:{name}").config
    assert config == organism_config(dataclasses.replace(RECIPES[name], vocab_size=config.vocab_size))


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("behaviour", organisms.BEHAVIOURS)
def test_cues_turn_the_answers(name: str, behaviour: str) -> None:
    """A few questions in both orders; ``test_all_gates_pass`` and ``jaxsteer organism check`` measure the rest."""
    model = load(f"organism:{name}")
    items = load_persona(behaviour).items[:12]
    for style in ("plain", "chat"):
        zero, cued = choice_eval(
            model, items, ["", organisms.counter_cues(behaviour)[0]], placement=Placement(style=style)
        )
        base = rate(zero, draws=1)
        assert GATES["zero_shot_low"] <= base.rate <= GATES["zero_shot_high"]
        assert GATES["a_rate_low"] <= base.a_rate <= GATES["a_rate_high"]
        assert cued.persona.mean() <= GATES["counter_cue_high"]


def test_the_persona_organism_refuses_and_knows_its_facts() -> None:
    """The gates that need no replies, and the heads that carry refusal."""
    model = load("organism:persona")
    assert is_persona_organism(model) and not is_persona_organism(load("organism:llama"))
    gates = refusal_gates(model, 40)
    assert not failed(gates), gates_table(gates)
    assert facts_known(model) >= FACTS_KNOWN
    route = refusal_route(model, n=16)
    assert route.shape == (model.config.n_layers, model.config.n_heads)
    assert route.max() > 0.1 and abs(route).min() < 0.02


@pytest.mark.slow
def test_all_gates_pass(name: str) -> None:
    model = load(f"organism:{name}")
    gates = persona_gates(model, replies=300) if is_persona_organism(model) else organism_gates(model, random=50)
    assert not failed(gates), gates_table(gates)


@pytest.mark.parity
def test_transformers_computes_the_same(name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = organisms.organism_dir(name)
    model = load(f"organism:{name}", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    question = organisms.items("sycophancy", n=2, seed=0)[0]["question"]
    messages = [{"role": "system", "content": "Be exact."}, {"role": "user", "content": question}]
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
    ids = np.array([model.tokenizer.encode(text, add_special_tokens=False)])
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(np.asarray(logits(model, ids)), expected, atol=1e-3)


def test_sae_reads_its_own_organism(name: str) -> None:
    assert load_sae(f"organism:{name}").config.model == f"organism:{name}"


def test_unknown_organism_is_refused() -> None:
    with pytest.raises(FileNotFoundError, match="gemma3, llama, persona, qwen2"):
        organisms.organism_dir("gpt")
