"""``jaxsteer vector``: look, import, export, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from jaxsteer.cli import main
from jaxsteer.steer import Vectors, import_vectors, load_vectors, read_control_vector, save_vectors
from tests.helpers.torchzip import write

ROWS = np.arange(12, dtype=np.float32).reshape(4, 3) + 1


@pytest.fixture
def ours(tmp_path):
    arrays = {f"blocks.{i}.hook_resid_post": ROWS[i] for i in range(3)}
    norms = {"blocks.1.hook_resid_post": 20.0}
    return save_vectors(
        Vectors(arrays=arrays, mean_resid_norm=norms, sign="towards x", metadata={"persona": "p"}),
        tmp_path / "v.safetensors",
    )


def test_show_says_what_steers_nothing(tmp_path, capsys):
    arrays = {"blocks.0.hook_resid_post": ROWS[0], "blocks.1.hook_resid_post": ROWS[1] * 0}
    assert main(["vector", "show", str(save_vectors(Vectors(arrays=arrays), tmp_path / "v.safetensors"))]) == 0
    assert "warning: blocks.1.hook_resid_post: all zeros, which is no direction" in capsys.readouterr().out


def test_an_import_of_zeros_only_writes_nothing(tmp_path, capsys):
    arrays = {"blocks.0.hook_resid_post": ROWS[0] * 0, "blocks.1.hook_resid_post": ROWS[1] * 0}
    file, out = save_vectors(Vectors(arrays=arrays), tmp_path / "v.safetensors"), tmp_path / "out.safetensors"
    assert main(["vector", "import", str(file), str(out)]) == 2 and not out.exists()
    assert "holds zeros only, at blocks.0.hook_resid_post, blocks.1" in capsys.readouterr().err
    save_vectors(Vectors(arrays=arrays | {"blocks.1.hook_resid_post": ROWS[1]}), file)
    assert main(["vector", "import", str(file), str(out)]) == 0 and out.is_file()
    assert "warning: blocks.0.hook_resid_post: all zeros" in capsys.readouterr().out


def test_show(ours, capsys):
    assert main(["vector", "show", str(ours)]) == 0
    text = capsys.readouterr().out
    assert "blocks.1.hook_resid_post" in text and "sign: towards x" in text and "persona: p" in text
    assert main(["vector", "show", str(ours), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["operation"] == "add" and found["metadata"] == {"persona": "p"}
    assert found["sites"][1] == {
        "site": "blocks.1.hook_resid_post",
        "shape": [3],
        "norm": pytest.approx(float(np.linalg.norm(ROWS[1]))),
        "mean_resid_norm": 20.0,
        "value": None,
    }


def test_import_and_export(tmp_path, capsys, caplog):
    source = write(tmp_path / "a_response_avg_diff.pt", ROWS)
    out, gguf = tmp_path / "v.safetensors", tmp_path / "v.gguf"
    assert main(["vector", "import", str(source), str(out)]) == 0
    assert "row i was hidden_states[i]" in capsys.readouterr().out
    assert load_vectors(out).sites == ("hook_embed", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    assert main(["vector", "export", str(out), str(gguf), "--model-hint", "qwen2", "--coefficient", "-2"]) == 0
    found = read_control_vector(gguf)
    assert found.sites == ("blocks.1.hook_resid_post",) and "left out" in caplog.text
    np.testing.assert_array_equal(found.arrays[found.sites[0]], -2 * ROWS[2])
    one = tmp_path / "one.gguf"
    assert main(["vector", "export", str(out), str(one), "--model-hint", "qwen2", "--sites", "layer_1"]) == 0
    assert read_control_vector(one).sites == ("blocks.1.hook_resid_post",)


def test_axis_and_caps_go_out_as_files_of_assistant_axis(tmp_path, ours, capsys):
    assert main(["vector", "export", str(ours), str(tmp_path / "assistant_axis.pt")]) == 0
    back = import_vectors(tmp_path / "assistant_axis.pt")
    assert all(np.array_equal(back.arrays[site], array) for site, array in load_vectors(ours).arrays.items())
    assert main(["vector", "export", str(ours), str(tmp_path / "ghost.pt"), "--name", "ghost"]) == 0
    assert import_vectors(tmp_path / "ghost.pt").metadata["role"] == "ghost"
    floor = dataclasses.replace(load_vectors(ours), operation="floor", values={site: 0.5 for site in back.sites})
    caps = save_vectors(floor, tmp_path / "floor.safetensors")
    assert main(["vector", "export", str(caps), str(tmp_path / "capping_config.pt")]) == 0
    assert f"Wrote {tmp_path / 'capping_config.pt'}" in capsys.readouterr().out
    found = import_vectors(tmp_path / "capping_config.pt", name=f"layers_0:{len(back.sites)}")
    assert found.operation == "ceiling" and set(found.values.values()) == {-0.5}


def test_what_a_file_does_not_say_is_said_on_the_command_line(tmp_path, capsys):
    bare = write(tmp_path / "probe.pt", ROWS[0])
    assert main(["vector", "show", str(bare), "--site", "layer_2", "--sign", "towards rudeness"]) == 0
    text = capsys.readouterr().out
    assert "blocks.2.hook_resid_post" in text and "towards rudeness" in text
    grid = write(tmp_path / "mean_diffs.pt", ROWS.reshape(2, 2, 3))
    assert main(["vector", "show", str(grid), "--name=-1", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["sites"]) == 2
    rows = write(tmp_path / "rows.pt", ROWS)
    assert main(["vector", "show", str(rows), "--format", "assistant_axis", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["sites"]) == 4


def test_bad_input_gives_one_message(tmp_path, ours, capsys):
    bare = write(tmp_path / "probe.pt", ROWS[0])
    evil = tmp_path / "evil.pt"
    evil.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    before = sorted(tmp_path.iterdir())
    out, gguf = str(tmp_path / "new.safetensors"), str(tmp_path / "new.gguf")
    for argv, word in (
        (["show", str(bare)], "--site"),
        (["show", str(evil)], "not a file of torch"),
        (["import", str(bare), out], "--site"),
        (["import", str(ours), str(ours)], "exists already"),
        (["import", str(ours), str(tmp_path / "no" / "x")], "does not exist"),
        (["export", str(ours), str(ours), "--model-hint", "llama"], "exists already"),
        (["export", str(ours), gguf, "--model-hint", "llama", "--sites", "layer_0"], "no vector is left"),
        (["export", str(ours), gguf, "--model-hint", "llama", "--sites", "layer_7"], "there is no vector at"),
        (["export", str(ours), gguf], "give --model-hint"),
        (["export", str(ours), out, "--model-hint", "llama"], "end in .gguf or .pt"),
        (["export", str(ours), gguf, "--model-hint", "llama", "--name", "ghost"], "and no --name"),
        (["export", str(ours), str(tmp_path / "x.pt"), "--model-hint", "llama"], "are for .gguf"),
        (["export", str(ours), str(tmp_path / "x.pt"), "--coefficient", "2"], "are for .gguf"),
        (["export", str(ours), str(tmp_path / "x.pt"), "--sites", "layer_1"], "no vector at the output of block 0"),
    ):
        assert main(["vector", *argv]) == 2, argv
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("jaxsteer: error: ")]
        assert len(lines) == 1 and word in error and "Traceback" not in error, error
    assert sorted(tmp_path.iterdir()) == before
