"""Public datasets by name: where each comes from, under which licence, and how its file is found.

Nothing of them is part of this package. A file is taken from a path of yours, or fetched from the Hugging Face hub when
no path is given.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Literal

from jaxsteer.errors import UserError, first_line

Kind = Literal["harmful", "harmless", "border"]
"""Of requests: to be refused; to be answered; to be answered although they look harmful."""
ANTHROPIC = "anthropics/evals"
CAA = "nrimsky/CAA"
CAA_BEHAVIOURS = (
    "coordinate-other-ais",
    "corrigible-neutral-HHH",
    "hallucination",
    "myopic-reward",
    "power-seeking-inclination",
    "refusal",
    "survival-instinct",
    "sycophancy",
)
JBB = "JailbreakBench/JBB-Behaviors/data"
SALAD = "OpenSafetyLab/Salad-Data"
HARM: tuple[Kind, ...] = ("harmful", "harmless")
PERSONA_PREFIX = "anthropic/persona/"
"""Any of the 135 statement sets, by the name of its file."""
CC_BY, MIT, APACHE = "CC BY 4.0", "MIT", "Apache-2.0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One public dataset file."""

    kind: Literal["choices", "truthful", "pair", "open", "requests"]
    """How its rows are read: two labelled answers; TruthfulQA; a right and a hallucinated answer; questions alone;
    requests (``personas.requests``)."""
    behaviour: str
    licence: str
    repository: str
    """On GitHub, or ``hub``: owner/name."""
    file: str
    """Path in that repository."""
    hub: str = ""
    """The same data on the Hugging Face hub (dataset id); "" where it is not there."""
    hub_file: str = ""
    """Path there, where it differs."""
    about: str
    requests: Kind | Literal[""] = ""
    """Of requests, their kind."""

    @property
    def home(self) -> str:
        """Address of the repository: on GitHub, or on the hub where it is that."""
        return f"https://{'huggingface.co/datasets' if self.repository == self.hub else 'github.com'}/{self.repository}"


def _requests(kind: Kind, licence: str, place: str, about: str, *, hub: str = "") -> Source:
    """``place`` is owner/name/path, and ``hub`` the same there."""
    (repository, file), (hub, hub_file) = (
        ("/".join(p[:2]), "/".join(p[2:])) for p in (place.split("/"), hub.split("/"))
    )
    return Source(
        kind="requests", behaviour="refusal", licence=licence, repository=repository, file=file, hub=hub,
        hub_file=hub_file, about=about, requests=kind,
    )  # fmt: skip


def _anthropic(file: str, behaviour: str, about: str) -> Source:
    hub = "Anthropic/model-written-evals"  # the same tree as on GitHub
    return Source(
        kind="choices", behaviour=behaviour, licence=CC_BY, repository=ANTHROPIC, file=file, hub=hub, about=about
    )


def _caa(behaviour: str, part: str) -> Source:
    file = {
        "generate": f"datasets/generate/{behaviour}/generate_dataset.json",
        "ab": f"datasets/test/{behaviour}/test_dataset_ab.json",
        "open-ended": f"datasets/test/{behaviour}/test_dataset_open_ended.json",
    }[part]
    about = {
        "generate": "A/B questions that steering vectors are made from (arXiv 2312.06681)",
        "ab": "A/B test questions (arXiv 2312.06681)",
        "open-ended": "test questions to be answered freely and judged (arXiv 2312.06681)",
    }[part]
    return Source(
        kind="open" if part == "open-ended" else "choices",
        behaviour={"myopic-reward": "myopic"}.get(behaviour, behaviour),
        licence=MIT,
        repository=CAA,
        file=file,
        about=about,
    )


def _sycophancy(stem: str, about: str) -> Source:
    return _anthropic(f"sycophancy/sycophancy_on_{stem}.jsonl", "sycophancy", f"{about} (arXiv 2212.09251)")


def _myopic(writer: str) -> Source:
    about = f"now or later, written by {'people' if writer == 'human' else 'a language model'} (arXiv 2212.09251)"
    return _anthropic(f"advanced-ai-risk/{writer}_generated_evals/myopic-reward.jsonl", "myopic", about)


SOURCES: dict[str, Source] = {
    "anthropic/sycophancy-nlp-survey": _sycophancy("nlp_survey", "biographies and opinions on language research"),
    "anthropic/sycophancy-philpapers2020": _sycophancy("philpapers2020", "biographies and opinions on philosophy"),
    "anthropic/sycophancy-political-typology-quiz": _sycophancy(
        "political_typology_quiz", "biographies and political opinions"
    ),
    "anthropic/myopic-reward": _myopic("human"),
    "anthropic/myopic-reward-lm": _myopic("lm"),
    **{f"caa/{b}/{part}": _caa(b, part) for b in CAA_BEHAVIOURS for part in ("generate", "ab", "open-ended")},
    "truthfulqa": Source(
        kind="truthful",
        behaviour="hallucination",
        licence=APACHE,
        repository="sylinrl/TruthfulQA",
        file="TruthfulQA.csv",
        hub="truthfulqa/truthful_qa",
        hub_file="generation/validation-00000-of-00001.parquet",
        about="questions that people answer wrongly, with right and wrong answers (arXiv 2109.07958)",
    ),
    "halueval/qa": Source(
        kind="pair",
        behaviour="hallucination",
        licence=MIT,
        repository="RUCAIBox/HaluEval",
        file="data/qa_data.json",
        hub="pminervini/HaluEval",
        hub_file="qa/data-00000-of-00001.parquet",
        about="questions with a right and a hallucinated answer (arXiv 2305.11747)",
    ),
    "advbench": _requests(
        "harmful",
        MIT,
        "llm-attacks/llm-attacks/data/advbench/harmful_behaviors.csv",
        "harmful instructions, each with the beginning of a reply that an attack asks for (arXiv 2307.15043)",
    ),
    "harmbench": _requests(
        "harmful",
        MIT,
        "centerforaisafety/HarmBench/data/behavior_datasets/harmbench_behaviors_text_all.csv",
        "harmful behaviours, some with a text that they are about (arXiv 2402.04249)",
    ),
    "jailbreakbench/harmful": _requests(
        "harmful",
        MIT,
        f"{JBB}/harmful-behaviors.csv",
        "100 misuse behaviours (arXiv 2404.01318)",
        hub=f"{JBB}/harmful-behaviors.csv",
    ),
    "jailbreakbench/benign": _requests(
        "border",
        MIT,
        f"{JBB}/benign-behaviors.csv",
        "100 benign behaviours of the same topics (arXiv 2404.01318)",
        hub=f"{JBB}/benign-behaviors.csv",
    ),
    "strongreject": _requests(
        "harmful",
        MIT,
        "alexandrasouly/strongreject/strongreject_dataset/strongreject_dataset.csv",
        "forbidden prompts that a useful answer would break a rule with (arXiv 2402.10260)",
    ),
    "xstest": _requests(
        "border",
        CC_BY,
        "paul-rottger/xstest/xstest_prompts.csv",
        "safe requests that look unsafe, and unsafe contrasts to them (arXiv 2308.01263)",
        hub="Paul/XSTest/xstest_prompts.csv",
    ),
    "salad/attack-enhanced": _requests(
        "harmful",
        APACHE,
        f"{SALAD}/attack_enhanced_set.json",
        "attacks, each made of a harmful question by one of several methods (arXiv 2402.05044)",
        hub=f"{SALAD}/attack_enhanced_set.json",
    ),
    "salad/base": _requests(
        "harmful",
        APACHE,
        f"{SALAD}/base_set.json",
        "harmful questions of 66 categories (arXiv 2402.05044)",
        hub=f"{SALAD}/base_set.json",
    ),
    "mt-bench": _requests(
        "harmless",
        APACHE,
        "lm-sys/FastChat/fastchat/llm_judge/data/mt_bench/question.jsonl",
        "80 requests of eight kinds, of whose two turns the first is used (arXiv 2306.05685)",
    ),
    "alpaca": _requests(
        "harmless",
        "CC BY-NC 4.0",
        "tatsu-lab/stanford_alpaca/alpaca_data.json",
        "instructions with replies; those about a text of their own are left out",
        hub="tatsu-lab/alpaca/data/train-00000-of-00001-a09b74b3ef9c3b56.parquet",
    ),
    **{
        f"refusal-direction/{kind}-{part}": _requests(
            kind,
            APACHE,
            f"andyrdt/refusal_direction/dataset/splits/{kind}_{part}.json",
            f"the {part} split of {kind} instructions of arXiv 2406.11717",
        )
        for kind in HARM
        for part in ("train", "val", "test")
    },
}
"""Every built-in name but the persona statements (``PERSONA_PREFIX``)."""


def find_source(name: str) -> Source | None:
    """The dataset of a built-in name; ``None`` for other names."""
    if name.startswith(PERSONA_PREFIX) and re.fullmatch(r"[\w.-]+", stem := name.removeprefix(PERSONA_PREFIX)):
        about = f'statements to say "Yes" or "No" to: {stem.replace("-", " ")} (arXiv 2212.09251)'
        return _anthropic(f"persona/{stem}.jsonl", stem.replace("-", " "), about)
    return SOURCES.get(name)


def source_file(name: str, source: Source, path: Path | None = None) -> Path:
    """The file of a dataset: ``path`` itself, its place in a folder ``path``, or without a path from the hub.

    Raises ``UserError`` when it is not there, or cannot be fetched.
    """
    if path is None:
        return _fetch(name, source)
    if path.is_dir():
        for place in (source.file, source.hub_file, source.file.rpartition("/")[2]):
            if place and (path / place).is_file():
                return path / place
        raise UserError(
            f"the folder {path} does not hold {source.file} of the dataset {name}: give the file, or a copy of "
            f"{source.home}"
        )
    if not path.is_file():
        raise UserError(f"the dataset {path} does not exist")
    return path


def _fetch(name: str, source: Source) -> Path:
    where = f"{source.home} ({source.file})"
    if not source.hub:
        raise UserError(
            f"the dataset {name} is not on the Hugging Face hub: download it from {where} and give its path, "
            f"{name}:PATH (jaxsteer data show: --path PATH)"
        )
    import huggingface_hub

    file = source.hub_file or source.file
    try:
        return Path(huggingface_hub.hf_hub_download(source.hub, file, repo_type="dataset"))
    except Exception as error:  # many types: offline, unknown file, proxies
        reason = first_line(error)
        raise UserError(
            f"the dataset {name} ({source.hub}: {file}) is neither in the cache of the Hugging Face hub nor obtainable "
            f"from it ({reason}). Without network, download it elsewhere from {where} and give its path, {name}:PATH "
            f"(jaxsteer data show: --path PATH)"
        ) from error
