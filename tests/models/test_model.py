"""A model is told in a line."""

from __future__ import annotations

from jaxsteer.models.model import _size
from tests.helpers.tiny import tiny_model


def test_a_model_is_told_in_a_line() -> None:
    model = tiny_model()
    said = repr(model)
    assert "\n" not in said and len(said) < 160
    assert said.startswith(f"Model({model.name}, ") and f"{model.config.n_layers} layers" in said and "cpu" in said


def test_sizes_have_three_digits() -> None:
    assert [_size(n) for n in (7, 1_401_472, 134_515_008, 8_030_261_248)] == ["7", "1.4M", "135M", "8.03B"]
