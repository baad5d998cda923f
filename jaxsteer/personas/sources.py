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
PERSONA_PREFIX = "anthropic/persona/"
"""Any of the 135 statement sets, by the name of its file."""
CC_BY, MIT, APACHE = "CC BY 4.0", "MIT", "Apache-2.0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One public dataset file."""

    kind: Literal["choices", "truthful", "pair", "open"]
    """How its rows are read: two labelled answers; TruthfulQA; a right and a hallucinated answer; questions alone."""
    behaviour: str
    licence: str
    repository: str
    """On GitHub, owner/name."""
    file: str
    """Path in that repository."""
    hub: str = ""
    """The same data on the Hugging Face hub (dataset id); "" where it is not there."""
    hub_file: str = ""
    """Path there, where it differs."""
    about: str


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
            f"https://github.com/{source.repository}"
        )
    if not path.is_file():
        raise UserError(f"the dataset {path} does not exist")
    return path


def _fetch(name: str, source: Source) -> Path:
    where = f"https://github.com/{source.repository} ({source.file})"
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
