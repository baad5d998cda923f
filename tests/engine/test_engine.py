"""Rows that share a decode loop: each gets what it gets alone, whatever the others ask for."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

import jaxsteer
from jaxsteer import steer
from jaxsteer.engine import Busy, Engine, EngineOptions, Finished, Piece, Request, Ticket, check_served
from jaxsteer.engine.programs import ladder
from jaxsteer.errors import UserError
from jaxsteer.models.roles import Rendered, stack_rendered, unlabelled
from jaxsteer.models.sampling import Decoding
from jaxsteer.prompts.generate import encode_prompts, generate
from jaxsteer.sae import encode, load_sae
from jaxsteer.sae.steering import steer_latents
from jaxsteer.steer.gates import Gate
from tests.helpers.checkpoints import family_config, random_model

GREEDY = Decoding(temperature=0, max_new_tokens=12)
TALK = [
    {"role": "system", "content": "You answer in short sentences."},
    {"role": "user", "content": "Do you like the radio?"},
    {"role": "assistant", "content": "I do."},
    {"role": "user", "content": "Do you agree or disagree?"},
]


@pytest.fixture(scope="module")
def model() -> jaxsteer.Model:
    return jaxsteer.load("organism:llama")


@pytest.fixture(scope="module")
def engine(model: jaxsteer.Model) -> Iterator[Engine]:
    with Engine(model, EngineOptions(rows=64), warm=False) as engine:
        yield engine


def ask(model: jaxsteer.Model, said: str = "Do you agree or disagree?") -> Rendered:
    return encode_prompts(model, [{"role": "user", "content": said}], roles=True)[0]


def talk(model: jaxsteer.Model) -> Rendered:
    return encode_prompts(model, [TALK], roles=True)[0]


def vector(seed: int, size: float = 8.0) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal(128)
    return drawn / np.linalg.norm(drawn) * size


def many_edits(model: jaxsteer.Model) -> dict[str, Any]:
    sae, post = load_sae("organism:llama"), "blocks.{}.hook_resid_post"
    one, two = vector(1), vector(2)
    layers = [post.format(i) for i in range(4)]
    gate = dict(site=post.format(1), vector=one.astype(np.float32), threshold=-1.0)
    subspace = steer.ablate(post.format(1), np.stack([one, two]))
    site = sae.config.site_in
    states = jaxsteer.capture(model, talk(model).ids[None], [site])[site][0, 1:]
    active = np.argsort(-np.asarray(encode(sae, states)).mean(0))[:3].tolist()
    return {
        "add": steer.add(post.format(2), one),
        "add with its norm kept": steer.add(post.format(1), one, 2.0, keep_norm=True),
        "add at the response": steer.add(post.format(1), one, 1.5, positions="response"),
        "add at the last token": steer.add(post.format(0), one, 4.0, positions="last"),
        "add at what the user says": steer.add(post.format(1), two, 3.0, positions="user"),
        "add in one turn": steer.add(post.format(1), two, 3.0, positions=steer.select("all", turns=[-1])),
        "add at listed positions": steer.add(post.format(1), two, 5.0, positions=[0, 3, -2]),
        "add at a token": steer.add(post.format(1), two, 5.0, positions=steer.select(tokens=[300, 363])),
        "add everywhere": steer.add("blocks.*.hook_attn_out", one, 0.2),
        "add before the block": steer.add("blocks.0.hook_resid_pre", one, 0.3, positions="every"),
        "add between": steer.add("blocks.3.hook_resid_mid", one, 0.5),
        "ablate": steer.ablate(post.format(1), one),
        "ablate half a plane": steer.ablate(post.format(2), np.stack([one, two]), 0.5),
        "ablate a plane": subspace,
        "ablate everywhere": steer.ablate_everywhere(one),
        "floors": steer.floor(layers, np.stack([vector(i) for i in range(4)]), [1.0, 2.0, 0.5, 3.0]),
        "ceiling": steer.ceiling(post.format(2), two, -1.0, positions=slice(0, None)),
        "clamp": steer.clamp(post.format(1), one, 3.0),
        "scale": steer.scale("blocks.1.hook_mlp_out", 0.3),
        "several": steer.Edits(
            (steer.add(layers, one, [0.1, 0.2, 0.3, 0.4]), subspace, steer.floor(layers[2], one, 1))
        ),
        "latents": steer_latents(sae, active, "amplify", 4.0),
        "latents calibrated": steer_latents(sae, active[:2], "calibrate", 9.0, positions="response"),
        "behind an open gate": steer.gated(steer.add(post.format(2), one), Gate(**gate)),
        "behind a closed gate": steer.gated(steer.add(post.format(2), one), Gate(**gate, sign=-1)),
    }


def close(found: list[Finished], expected: list[Finished]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens and one.text == other.text


def test_every_edit_is_what_it_is_in_process(model: jaxsteer.Model, engine: Engine) -> None:
    """All at once in one batch. Log-probabilities and tokens are those of one pass over the text, with the edits as
    they are made elsewhere."""
    prompt, edits = talk(model), many_edits(model)
    n = len(prompt.ids)
    made = dict(
        zip(edits, engine.run([Request(prompt=prompt, decoding=GREEDY, edits=e, tops=0) for e in edits.values()]))
    )
    plain = engine.run([Request(prompt=prompt, decoding=GREEDY, tops=0)])[0]
    gates = {"behind an open gate": True, "behind a closed gate": False}
    alone = [name for name in edits if name.startswith(("latents", "behind"))]
    together = [name for name in edits if name not in alone]
    for names in (together, *([name] for name in alone)):
        own = steer.stack_rows([edits[name] for name in names]) if names is together else edits[names[0]]
        texts = [prompt.answered(np.asarray(made[name].tokens, np.int32)) for name in names]
        tokens, mask, roles = stack_rendered(texts, n + 12)
        lengths = np.full(len(names), n)
        logits = np.array(
            jaxsteer.logits(model, tokens, mask, edits=own, prompt_length=lengths, roles=roles), np.float32
        )
        logits[..., len(model.tokenizer) :] = -np.inf
        for name, at in zip(names, np.asarray(jax.nn.log_softmax(logits)), strict=True):
            row = made[name]
            expected = at[np.arange(n - 1, n - 1 + len(row.tokens))]
            assert list(row.tokens) == expected.argmax(-1).tolist(), name
            found = [score.log_prob for score in row.scores]
            np.testing.assert_allclose(found, expected.max(-1), atol=2e-5, err_msg=name)
            assert row.gate_open == gates.get(name)
            known = [score.log_prob for score in plain.scores]
            same = len(found) == len(known) and np.allclose(found, known, atol=1e-4)
            assert same == (name == "behind a closed gate"), name


@pytest.mark.parametrize("name", ["several", "latents", "add at what the user says"])
def test_tokens_of_generate(name: str, model: jaxsteer.Model, engine: Engine) -> None:
    edit, prompt = many_edits(model)[name], talk(model)
    decoding = Decoding(temperature=0.9, seed=11, max_new_tokens=12)
    row = engine.run([Request(prompt=prompt, decoding=decoding, edits=edit)])[0]
    expected = generate(model, prompt, decoding, edits=edit)
    assert list(row.tokens) == [t for t in expected.tokens[0].tolist() if t >= 0]
    assert row.text == expected.texts[0] and row.reason == expected.finish[0]


def test_windows_and_long_prompts() -> None:
    """Gemma's windows, soft caps and scaled embeddings; a prompt of several pieces beside short ones."""
    model = random_model(family_config("gemma3"))
    served = dataclasses.replace(model, tokenizer=jaxsteer.load("organism:llama").tokenizer)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 67, n).astype(np.int32) for n in (1, 17, 90)]
    decoding = Decoding(temperature=0, max_new_tokens=20)
    edit = steer.add("blocks.1.hook_resid_post", rng.standard_normal(model.config.d_model))
    with Engine(served, EngineOptions(rows=8), warm=False) as engine:
        rows = engine.run([Request(prompt=unlabelled(p), decoding=decoding, edits=edit) for p in prompts])
    expected = generate(served, prompts, decoding, edits=edit).tokens
    for row, tokens in zip(rows, expected, strict=True):
        assert list(row.tokens) == [t for t in tokens.tolist() if t >= 0]


def test_nothing_added_is_nothing_to_the_bit(model: jaxsteer.Model, engine: Engine) -> None:
    prompt = talk(model)
    requests = [
        Request(prompt=prompt, decoding=GREEDY, tops=20, edits=edits)
        for edits in (
            None,
            steer.add("blocks.2.hook_resid_post", vector(1), 0.0),
            steer.ablate("blocks.1.hook_resid_post", vector(1), 0.0),
            steer.scale("blocks.1.hook_mlp_out", 1.0),
        )
    ]
    alone = [engine.run([request])[0] for request in requests]
    engine.run([Request(prompt=prompt, decoding=GREEDY, edits=steer.add("blocks.2.hook_resid_post", vector(3), 9.0))])
    alone += [engine.run([requests[0]])[0]]
    for row in alone[1:]:
        assert row.tokens == alone[0].tokens
        assert [(s.log_prob, s.top) for s in row.scores] == [(s.log_prob, s.top) for s in alone[0].scores]


def test_a_row_keeps_its_bits_beside_steered_ones(model: jaxsteer.Model, engine: Engine) -> None:
    """At one width, a plain row between two steered ones, and between two plain ones."""
    prompt, pushed = ask(model), steer.add("blocks.2.hook_resid_post", vector(3), 9.0)

    def middle(edits: Any) -> Finished:
        others = [Request(prompt=prompt, decoding=GREEDY, edits=edits) for _ in range(2)]
        plain = Request(prompt=prompt, decoding=GREEDY, tops=20)
        return engine.run([others[0], plain, others[1]])[1]

    one, other = middle(None), middle(pushed)
    assert [(s.log_prob, s.top) for s in one.scores] == [(s.log_prob, s.top) for s in other.scores]


def mixed(model: jaxsteer.Model) -> list[Request]:
    """64 rows of different prompts, edits, settings and lengths."""
    rng, made = np.random.default_rng(7), []
    edits = list(many_edits(model).values())
    for i in range(64):
        site = f"blocks.{i % 4}.hook_resid_post"
        own = edits[i // 2] if i % 2 and i // 2 < len(edits) else steer.add(site, vector(100 + i), 1 + i / 32)
        decoding = Decoding(
            temperature=float(i % 3) / 2, seed=i, top_k=int(i % 5 == 0) * 20, max_new_tokens=int(rng.integers(1, 14))
        )
        prompt = talk(model) if i % 4 == 1 else ask(model, "Do you agree? " * (1 + i % 7))
        made.append(Request(prompt=prompt, decoding=decoding, edits=None if i % 8 == 0 else own, number=i % 2))
    return made


def test_sixty_four_rows_in_any_order(model: jaxsteer.Model, engine: Engine) -> None:
    requests = mixed(model)
    expected = engine.run(requests)
    assert len({row.text for row in expected}) > 30
    for seed in range(2):
        order = np.random.default_rng(seed).permutation(64)
        found = engine.run([requests[i] for i in order])
        close([found[i] for i in np.argsort(order)], expected)
    one_by_one = [engine.run([request])[0] for request in requests[::7]]
    close(one_by_one, expected[::7])


def test_the_first_requests_compile_nothing(model: jaxsteer.Model, compile_counter: type) -> None:
    """All programs were made at start, also those of arrays that have been through other programs before."""
    vector = np.random.default_rng(0).standard_normal(128)
    prompt, short = ask(model), Decoding(temperature=0, max_new_tokens=4)
    plain = Request(prompt=prompt, decoding=short)
    steered = Request(prompt=prompt, decoding=short, edits=steer.add("blocks.1.hook_resid_post", vector, 2.0))
    scored = Request(prompt=prompt, decoding=Decoding(max_new_tokens=4, seed=1), tops=2, echo=True)
    with Engine(model, EngineOptions(rows=2, context=128)) as engine:
        assert engine.wait_ready(120)
        engine.programs.sampling(short, 0)  # settings become arrays by small programs of jax.numpy
        with compile_counter() as count:
            for rows in ([plain], [steered], [scored], [plain, steered], [scored, plain, steered]):
                engine.run(rows)
    assert (
        not {"extend", "score", "masks", "put", "take", "advance", "fit", "lay", "cut", "blank"} & count.names().keys()
    )


@pytest.mark.parametrize("many", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_request_compiles_anything(many: int, model: jaxsteer.Model, engine: Engine, compile_counter: type) -> None:
    """Requests with a vector, layer, strength, operation, position, seed and prompt of their own."""
    engine.run(mixed(model))
    engine.run([Request(prompt=ask(model), decoding=GREEDY, tops=1)])
    base, before = ask(model), engine.status.compiled
    rng = np.random.default_rng(0)

    def request(i: int) -> Request:
        operation = (steer.add, steer.ablate, steer.clamp)[i % 3]
        sites = [f"blocks.{layer}.hook_resid_post" for layer in range(i % 4 + 1)]
        positions = ("all", "response", [1, int(i % 9)], slice(i % 5, None))[i % 4]
        edits = operation(sites, rng.standard_normal((len(sites), 128)), 0.1 + i / 1000, positions=positions)
        ids = np.append(base.ids[: 4 + i % 6], base.ids[-1])
        decoding = Decoding(temperature=i % 2, seed=i, max_new_tokens=1 + i % 3)
        return Request(prompt=unlabelled(ids), decoding=decoding, edits=edits, tops=i % 2)

    with compile_counter() as count:
        for begin in range(0, many, 100):
            rows = engine.run([request(i) for i in range(begin, begin + 100)])
            assert all(row.tokens for row in rows)
    assert not count.names() and engine.status.compiled == before


def test_a_cancelled_row_is_gone_after_one_step(
    model: jaxsteer.Model, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = Request(prompt=ask(model), decoding=Decoding(max_new_tokens=400, seed=1, stop=()))
    calls, advance = [], engine.programs.advance

    def counted(*given: Any) -> Any:
        made = advance(*given)
        calls.append(sum(ticket.cancelled for ticket in tickets))
        return made

    tickets: list[Ticket] = []
    monkeypatch.setattr(engine.programs, "advance", counted)
    for _ in range(3):
        tickets.append(engine.submit(long))
    events = tickets[1].events()
    assert isinstance(next(events), Piece)
    tickets[1].cancel()
    *_, end = events
    assert end.reason == "cancelled" and end.tokens
    at_most_one = len([n for n in calls if n])
    assert at_most_one <= 1, "the call that was running"
    for ticket in tickets:
        ticket.cancel()
    assert {ticket.result().reason for ticket in (tickets[0], tickets[2])} <= {"cancelled", "stop"}
    assert engine.status.rows == 0


def test_beginnings_of_prompts_are_reused_also_under_edits(model: jaxsteer.Model, engine: Engine) -> None:
    """To the bit what a row gets whose prompt is not known; never across edits that reach the beginning."""
    said = "Do you agree or disagree with what was said on the radio? " * 8
    turns = [{"role": "system", "content": "You are kind."}, {"role": "user", "content": said}]
    later = [*turns, {"role": "assistant", "content": "I agree."}, {"role": "user", "content": "Why?"}]
    first, second = (encode_prompts(model, [each], roles=True)[0] for each in (turns, later))
    push = steer.add("blocks.1.hook_resid_post", vector(5), 2.0)
    answering = steer.add("blocks.1.hook_resid_post", vector(5), 2.0, positions="response")
    with Engine(model, EngineOptions(rows=1, prefix_mib=0), warm=False) as forgetful:
        for edits in (None, push, answering, steer.floor("blocks.2.hook_resid_post", vector(6), 4.0)):
            one, two = (Request(prompt=p, decoding=GREEDY, edits=edits, tops=5) for p in (first, second))
            fresh, start = engine.run([one])[0], engine.run([two])[0]
            again = engine.run([two])[0]
            assert fresh.cached_tokens == 0 and start.cached_tokens >= 64 and again.cached_tokens >= start.cached_tokens
            for known, request in ((fresh, one), (start, two), (again, two)):
                unknown = forgetful.run([request])[0]
                assert unknown.cached_tokens == 0 and unknown.tokens == known.tokens
                assert [s.log_prob for s in unknown.scores] == [s.log_prob for s in known.scores]


def test_log_probs_of_a_prompt(model: jaxsteer.Model, engine: Engine) -> None:
    """As of one pass over it; and the same numbers whether they are asked for with an answer or without."""
    ids = np.concatenate([talk(model).ids] * 4)[:150].astype(np.int32)
    push = steer.add("blocks.1.hook_resid_post", vector(5), 2.0)
    for edits in (None, push):
        ask_for = dict(prompt=unlabelled(ids), decoding=GREEDY, edits=edits, tops=3, echo=True)
        row, bare = engine.run([Request(**ask_for, max_tokens=1), Request(**ask_for, max_tokens=0)])
        logits = np.asarray(jaxsteer.logits(model, ids[None], edits=edits)[0], np.float32)
        reference = np.asarray(jax.nn.log_softmax(logits))
        assert row.prompt_scores[0].log_prob is None and len(row.prompt_scores) == 150 and len(row.tokens) == 1
        found = [s.log_prob for s in row.prompt_scores[1:]] + [row.scores[0].log_prob]
        labels = [*ids[1:], row.tokens[0]]
        np.testing.assert_allclose(found, reference[np.arange(150), labels], atol=4e-5)  # 1e-6 of the logits' range
        for score, at in zip(row.prompt_scores[1:], reference):
            assert score.token in [i for i, _ in score.top] or score.log_prob <= score.top[-1][1]
            np.testing.assert_allclose([p for _, p in score.top], np.sort(at)[::-1][:3], rtol=1e-5, atol=4e-5)
        assert [s.log_prob for s in bare.prompt_scores] == [s.log_prob for s in row.prompt_scores]
        assert bare.reason == "length" and bare.tokens == ()


def test_stop_strings_and_tokens(model: jaxsteer.Model, engine: Engine) -> None:
    prompt = ask(model)
    whole = engine.run([Request(prompt=prompt, decoding=Decoding(temperature=0, max_new_tokens=24))])[0]
    stop = whole.text[10:13]
    decoding = Decoding(temperature=0, max_new_tokens=24, stop=[stop, "never this"])
    ticket = engine.submit(Request(prompt=prompt, decoding=decoding))
    pieces = list(ticket.events())
    end = pieces[-1]
    assert isinstance(end, Finished) and end.reason == "stop" and end.text == whole.text[: whole.text.index(stop)]
    assert "".join(piece.text for piece in pieces[:-1]) == end.text
    assert end.tokens == whole.tokens[: len(end.tokens)] and len(end.tokens) < len(whole.tokens)
    expected = generate(model, prompt, decoding)
    assert expected.texts[0] == end.text and [t for t in expected.tokens[0].tolist() if t >= 0] == list(end.tokens)


def test_what_is_refused_before_it_waits(model: jaxsteer.Model, engine: Engine) -> None:
    prompt = ask(model)
    too_long = unlabelled(np.zeros(513, np.int32))
    head = steer.add("blocks.1.attn.hook_z", np.ones(32), head=0)
    for request, message in (
        (Request(prompt=too_long), "513 tokens"),
        (Request(prompt=unlabelled(np.asarray([99999], np.int32))), "token ids"),
        (Request(prompt=prompt, tops=21), "0 to 20"),
        (Request(prompt=prompt, edits=steer.add("blocks.9.hook_resid_post", vector(1))), "layer 9"),
        (Request(prompt=prompt, edits=steer.add("blocks.1.hook_resid_post", np.ones(64))), "64 components"),
        (Request(prompt=prompt, edits=head), "attn.hook_z cannot"),
        (Request(prompt=prompt, edits=steer.replace("blocks.1.hook_resid_post", np.ones((3, 128)))), "replace cannot"),
        (Request(prompt=prompt, edits=steer_latents(load_sae("organism:llama"), [1], "released")), "released cannot"),
        (Request(prompt=prompt, edits=steer.Edits(tuple(many_edits(model)["add"] for _ in range(17)))), "16 edits"),
    ):
        with pytest.raises(UserError, match=message):
            engine.submit(request)
    with pytest.raises(UserError, match="no conversation"):
        plain = unlabelled(prompt.ids)
        edits = steer.add("blocks.1.hook_resid_post", vector(1), positions="user")
        engine.run([Request(prompt=plain, edits=edits, decoding=GREEDY)])
    with pytest.raises(UserError, match="steered by"):
        broken = steer.add("blocks.1.hook_resid_post", vector(1), 1e30)
        engine.run([Request(prompt=prompt, edits=broken, decoding=GREEDY)])
    check_served(many_edits(model)["latents"], model.config)


def test_queue_turns_and_time(model: jaxsteer.Model) -> None:
    prompt = ask(model)
    order: list[str] = []
    done = threading.Event()

    def listener(name: str) -> Any:
        def hear(event: Piece | Finished) -> None:
            if isinstance(event, Finished):
                order.append(name)
                if len(order) == 4:
                    done.set()

        return hear

    with Engine(model, EngineOptions(rows=1, waiting=4), warm=False) as engine:
        engine.run([Request(prompt=prompt, decoding=GREEDY)])
        began, go_on = threading.Event(), threading.Event()

        def hold(_: Piece | Finished) -> None:  # in the engine's thread, which so does nothing else
            began.set()
            go_on.wait(60)

        blocker = engine.submit(Request(prompt=prompt, decoding=Decoding(max_new_tokens=450, seed=1)), hold)
        assert began.wait(60)
        short = Decoding(temperature=0, max_new_tokens=1)
        for name, client in (("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b")):
            engine.submit(Request(prompt=prompt, decoding=short, client=client), listener(name))
        with pytest.raises(Busy, match="4 requests are waiting"):
            engine.submit(Request(prompt=prompt, decoding=short))
        blocker.cancel()
        go_on.set()
        assert done.wait(60)
        assert order == ["a1", "b1", "a2", "a3"]
        late = engine.submit(Request(prompt=prompt, decoding=Decoding(max_new_tokens=450, seed=1), timeout=0.02))
        assert late.result().reason in ("timeout", "stop")
        start = time.monotonic()
        waiting = engine.submit(Request(prompt=prompt, decoding=Decoding(max_new_tokens=450, seed=2)))
    assert waiting.result().reason in ("cancelled", "stop") and time.monotonic() - start < 10
    with pytest.raises(Busy, match="shutting down"):
        engine.submit(Request(prompt=prompt))


def test_rows_on_a_mesh(model: jaxsteer.Model, engine: Engine) -> None:
    """Rows over "prompts", weights over "model": the texts of one device."""
    spread = jaxsteer.load("organism:llama", mesh=jaxsteer.make_mesh(prompts=4, model=2))
    requests = mixed(model)[:4]
    with Engine(spread, EngineOptions(rows=4), warm=False) as other:
        close(other.run(requests), engine.run(requests))


def test_memory_is_planned(model: jaxsteer.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxsteer.models.sharding.free_memory", lambda: 1 << 20)
    with pytest.raises(UserError, match="Serving 32 rows of 512 tokens needs .*--rows"):
        Engine(model)


def test_ladders() -> None:
    assert ladder(64, 8, 1) == (1, 8, 64) and ladder(32, 8, 1) == (1, 8, 32) and ladder(1, 8, 1) == (1,)
    assert ladder(4096, 4, 512) == (512, 2048, 4096) and ladder(100, 4, 512) == (512,)
