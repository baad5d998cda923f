"""Other people's clients, unmodified: the openai SDK and lm_eval, where they are installed."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxsteer.engine import Request
from jaxsteer.models.roles import unlabelled
from jaxsteer.models.sampling import Decoding
from tests.serve.conftest import Client, direction

ASKED: list[Any] = [{"role": "user", "content": "Do you agree or disagree?"}]
PUSH = {"steering": {"edits": [{"vector": "push.safetensors", "coefficient": 2}]}}


@pytest.mark.filterwarnings("ignore")
def test_the_openai_sdk(client: Client) -> None:
    import openai

    sdk = openai.OpenAI(base_url=f"{client.url}/v1", api_key="none", max_retries=0)
    how: dict[str, Any] = dict(model="organism:llama", messages=ASKED, temperature=0, max_tokens=10)
    assert sdk.models.list().data[0].id == "organism:llama"
    plain = sdk.chat.completions.create(**how, logprobs=True, top_logprobs=2)
    steered = sdk.chat.completions.create(**how, extra_body=PUSH)
    assert plain.choices[0].finish_reason in ("stop", "length") and plain.usage.completion_tokens <= 10
    assert len(plain.choices[0].logprobs.content[0].top_logprobs) == 2
    assert steered.x_jaxsteer["edits"][0]["vector"] == "push.safetensors"
    for more in ({}, PUSH):
        chunks = list(
            sdk.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}, extra_body=more)
        )
        said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert said == (steered if more else plain).choices[0].message.content
        assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens or more
    made = sdk.completions.create(model="organism:llama", prompt=["The radio", "I like"], max_tokens=4, seed=3)
    assert len(made.choices) == 2
    with pytest.raises(openai.BadRequestError, match="loreft") as caught:
        sdk.chat.completions.create(**how, extra_body={"steering": {"vectors": [{"algorithm": "loreft"}]}})
    assert caught.value.param == "steering"
    with pytest.raises(openai.NotFoundError):
        sdk.embeddings.create(model="organism:llama", input="x")

    async def asked() -> str:
        async with openai.AsyncOpenAI(base_url=f"{client.url}/v1", api_key="none", max_retries=0) as other:
            answer = await other.chat.completions.create(**how)
            return answer.choices[0].message.content

    assert asyncio.run(asked()) == plain.choices[0].message.content
    sdk.close()


TASK = """
task: made_up
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - metric: acc
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lm_eval_as_it_is(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up task whose gold answers are the model's own words: far above chance, and scored as in process."""
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    rng, rows = np.random.default_rng(0), []
    for i in range(12):
        question = f"The radio plays in house {i} and"
        gold = client.good("/v1/completions", {"prompt": question, "max_tokens": 4, "temperature": 0})
        own, other = gold["choices"][0]["text"], " zebra quartz violin"
        at = int(rng.integers(2))
        rows.append({"question": question, "choices": [other, own][:: 1 if at else -1], "gold": at})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "made_up.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    args = dict(
        model="organism:llama", base_url=f"{client.url}/v1/completions", tokenizer_backend="remote",
        tokenized_requests=True, num_concurrent=1, max_length=256,
    )  # fmt: skip
    found = lm_eval.simple_evaluate(
        model="local-completions", model_args=args, tasks=["made_up"], log_samples=True, bootstrap_iters=0,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
    )  # fmt: skip
    assert found["results"]["made_up"]["acc,none"] > 0.9
    compared, bare = 0, {"add_special_tokens": False}
    for sample in found["samples"]["made_up"]:
        for (context, continuation, *_), response in zip(sample["arguments"], sample["filtered_resps"], strict=True):
            score = response[0]
            whole = client.good("/tokenize", {"prompt": context + continuation} | bare)["tokens"]
            before = len(client.good("/tokenize", {"prompt": context} | bare)["tokens"])
            request = Request(
                prompt=unlabelled(np.asarray(whole, np.int32)), decoding=Decoding(temperature=0), tops=1, echo=True,
                max_tokens=1,
            )  # fmt: skip
            known = [s.log_prob for s in client.engine.run([request])[0].prompt_scores]
            assert math.isclose(float(score), sum(known[before:]), rel_tol=1e-6, abs_tol=1e-6)
            compared += 1
    assert compared == 24


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("inspect") is None, reason="inspect_ai is not installed")
def test_inspect_ai_as_it_is(client: Client, tmp_path: Path) -> None:
    """The task of docs/serving.md, plain and steered: scores are the share of answers that hold the word."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    (task,) = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    (tmp_path / "sides.py").write_text(task)
    said = re.findall(r'"([^"]*\?)"', task)
    assert len(said) == 4
    env = os.environ | {"JAXSTEER_BASE_URL": f"{client.url}/v1", "JAXSTEER_API_KEY": "none"}
    for steering in (None, {"edits": [{"vector": "push.safetensors", "coefficient": 4}]}):
        command = ["inspect", "eval", "sides.py", "--model", "openai-api/jaxsteer/organism:llama", "--display", "plain"]
        command += ["--log-format", "json", *(["-T", f"steering={json.dumps(steering)}"] if steering else [])]
        subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, timeout=300)
        newest = max((tmp_path / "logs").glob("*.json"), key=lambda path: path.stat().st_mtime)
        found = json.loads(newest.read_text())
        assert found["status"] == "success"
        score = found["results"]["scores"][0]["metrics"]["accuracy"]["value"]
        fields = {"max_tokens": 24, "steering": steering}
        texts = [client.chat(one, **fields)["choices"][0]["message"]["content"] for one in said]
        assert score == sum("agree" in one.lower() for one in texts) / 4


def test_gguf_control_vectors_count_layers_as_llama_cpp(client: Client, directory: Path) -> None:
    """direction.i acts behind block i."""
    from jaxsteer.steer import Vectors, write_control_vector

    site = "blocks.{}.hook_resid_post".format
    written = Vectors(arrays={site(i): direction(20 + i) for i in (1, 2)})
    write_control_vector(written, directory / "llamacpp.gguf", model_hint="llama")
    try:
        client.good("/v1/steering/load", {"name": "llamacpp.gguf"})
        asked = {"vectors": [{"source": "llamacpp.gguf", "scale": 0.7}]}
        expected = {"edits": [
            {"operation": "add", "site": site(i), "values": direction(20 + i).tolist(), "coefficient": 0.7,
             "positions": "every"}
            for i in (1, 2)
        ]}  # fmt: skip
        found, known = (client.chat(steering=s, logprobs=True)["choices"][0] for s in (asked, expected))
        assert found["message"] == known["message"]
        a, b = ([t["logprob"] for t in one["logprobs"]["content"]] for one in (found, known))
        np.testing.assert_allclose(a, b, atol=1e-5)
        client.good("/v1/steering/unload", {"name": "llamacpp.gguf"})
    finally:
        (directory / "llamacpp.gguf").unlink()
