"""Built-in configurations: their parameters are counted as the hub counts them."""

from __future__ import annotations

import pytest

from jaxsteer.checkpoints.inspect import parameters
from jaxsteer.checkpoints.published import NAMES, published_config
from jaxsteer.errors import UserError
from jaxsteer.models.config import GLOBAL_WINDOW

# Sum over the tensors of each model's safetensors files, as its page on the hub shows it.
PUBLISHED = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 4_300_079_472,
    "gemma-3-12b": 12_187_325_040,
    "gemma-3-27b": 27_432_406_640,
}


def sight(width: int) -> int:
    """Parameters of Gemma 3's vision tower (27 layers of 1152, MLP 4304, 4096 patches of 14 x 14) and projector."""
    d, mlp = 1152, 4304
    layer = 4 * (d * d + d) + d * mlp + mlp + mlp * d + d + 4 * d
    return 14 * 14 * 3 * d + d + 4096 * d + 27 * layer + 2 * d + d * width + d


def test_every_name_has_a_published_count():
    assert sorted(NAMES) == sorted(PUBLISHED)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_published(name: str):
    config = published_config(name)
    seen = sight(config.d_model) if config.family == "gemma3" else 0
    assert parameters(config)["total"] + seen == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "window", "full"),
    [("gemma-2-9b", 4096, (1, 3)), ("gemma-3-1b", 512, (5, 11)), ("gemma-3-4b", 1024, (5, 11))],
)
def test_windows_follow_the_family(name: str, window: int, full: tuple[int, ...]):
    windows = published_config(name).windows
    assert windows[0] == window
    assert [i for i, w in enumerate(windows) if w == GLOBAL_WINDOW][:2] == list(full)


def test_what_counting_cannot_see():
    assert published_config("llama-3.1-8b").ropes[0].factor == 8
    assert published_config("llama-3.2-1b").ropes[0].factor == 32
    assert published_config("gemma-2-27b").query_scale == 144**-0.5
    assert published_config("gemma-3-27b").query_scale == 168**-0.5
    assert published_config("gemma-3-4b").ropes[1].factor == 8
    assert published_config("qwen2.5-7b").qkv_bias and published_config("qwen3-8b").qk_norm
    assert published_config("LLaMA-3.1-8B") == published_config("llama-3.1-8b")


def test_another_name_is_refused():
    with pytest.raises(UserError, match="llama-3.1-8b"):
        published_config("llama-9-1b")
