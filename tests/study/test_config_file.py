"""Configuration files: what is printed reads back as the defaults, and texts mean what the options' types say."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxsteer.errors import UserError
from jaxsteer.study import SearchOptions
from jaxsteer.study.config_file import config_text, help_of, read_config
from jaxsteer.study.options import OPTIONS, from_flat


@pytest.mark.parametrize("toml", [False, True])
def test_the_printed_file_has_every_option_and_is_the_defaults(toml: bool, tmp_path: Path) -> None:
    path = tmp_path / ("run.toml" if toml else "run.yaml")
    text = config_text(toml=toml)
    path.write_text(text)
    assert from_flat({"out": "x", **read_config(path)}) == SearchOptions.of(out="x")
    for name in OPTIONS:
        assert f"\n{name}{' =' if toml else ':'}" in text or f"\n# {name}{' =' if toml else ':'}" in text
        assert help_of(name).split()[0] in text


def test_texts_are_read_as_the_options_types(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "prompt_length: 4:12\nban: [no, 'null']\nallow: honest\nlearning_rate: 1e-2\nraw_units: no\ndraft: null\n"
        "vary: {seed: 0:4, fluency: [strict, loose]}\nconversations: mine.json\nsteps: 7\n"
    )
    assert read_config(path) == {
        "prompt_length": "4:12",
        "ban": ("no", "null"),
        "allow": ("honest",),
        "learning_rate": 0.01,
        "raw_units": False,
        "draft": None,
        "vary": ("seed=0:4", "fluency=strict,loose"),
        "conversations": Path("mine.json"),
        "steps": 7,
    }
    (tmp_path / "run.toml").write_text('steps = 7\nban = ["a"]\nmemory_gib = 2\n[vary]\nseed = [1, 2]\n')
    assert read_config(tmp_path / "run.toml") == {"steps": 7, "ban": ("a",), "memory_gib": 2.0, "vary": ("seed=1,2",)}


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "stpes: 3", "there is no option 'stpes': did you mean 'steps'"),
        ("a.yaml", "stpes:", "did you mean 'steps'"),
        ("a.yaml", "fluency: brisk", "fluency is 'brisk', but may be ultra_strict, strict, medium, loose"),
        ("a.yaml", "steps: many", "steps is 'many', but must be a whole number"),
        ("a.yaml", "model: {a: b}", "model is {'a': 'b'}, but must be a text"),
        ("a.yaml", "persona: null", "persona is null, but must be a text: leave it out for its default"),
        ("a.yaml", "fluency:", "fluency is null, but may be ultra_strict, strict, medium, loose: leave it out"),
        ("a.yaml", "quiet: maybe", "must be true or false"),
        ("a.yaml", "steps: 3\nsteps: 4", "steps stands twice"),
        ("a.yaml", "vary:\n - &a [x, x]\n - [*a, *a]", "aliases (*name) are not read"),
        ("a.yaml", "- steps", "must name options and their values"),
        ("a.yaml", "steps: [", "is not YAML"),
        ("a.toml", "steps = 2.5", "steps is 2.5, but must be a whole number"),
        ("a.toml", "steps = true", "steps is True, but must be a whole number"),
        ("a.toml", "seed = inf", "seed is inf, but must be a whole number"),
        ("a.toml", "steps = nan", "steps is nan, but must be a whole number"),
        ("a.toml", "ban = [1]", "ban is [1], but must be a list of texts"),
        ("a.toml", f"steps = '{'x' * 500}'", f"steps is '{'x' * 78}…, but must be a whole number"),
        ("a.toml", "steps", "is not TOML"),
        ("a.toml", f"steps = {'9' * 5000}", "is not TOML"),
        ("a.toml", f"steps = {'[' * 10**5}", "is not TOML"),
        ("a.yaml", f"steps: {'[' * 10**5}", "is not YAML"),
        ("a.txt", "", "expects a .yaml or .toml file"),
    ],
)
def test_what_a_file_cannot_say(name: str, text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as refused:
        read_config(tmp_path / name)
    assert says in str(refused.value) and name in str(refused.value)
