"""A tiny model directory in Hugging Face format, with a tokenizer."""

from pathlib import Path

import pytest

from checkpoints_convert.export import write_hf
from tests.helpers.tiny import tiny_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = tiny_model()
    out = tmp_path_factory.mktemp("cli") / "tiny"
    write_hf(tiny.params, tiny.config, out)
    tiny.tokenizer.save_pretrained(out)
    return out
