"""Bad input: one clear message on stderr, exit status 2, and nothing left behind."""

import json
import shutil
from pathlib import Path

import pytest

from jaxsteer.cli import main
from jaxsteer.cli.commands import parse


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]):  # noqa: ANN201
    def check(*argv: object) -> str:
        status = main([str(a) for a in argv])
        out, err = capsys.readouterr()
        message = [line for line in err.splitlines() if not line.startswith("Converting ")]
        assert status == 2, (status, out, err)
        assert len(message) == 1 and message[0].startswith("jaxsteer: error: "), err
        assert "Traceback" not in err
        return message[0]

    return check


@pytest.fixture
def search(fails, tmp_path: Path):  # noqa: ANN001, ANN201
    def go(*argv: object) -> str:
        message = fails("search", "--persona", "sycophancy", *argv, "--out", tmp_path / "run", "--quiet")
        assert not (tmp_path / "run" / "metrics.json").exists()
        return message

    return go


def copied(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def edit_config(directory: Path, **changes: object) -> Path:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return directory


def test_missing_model(search, tmp_path: Path) -> None:  # noqa: ANN001
    assert "was not found" in search("--model", tmp_path / "nowhere")
    assert "organism" in search("--model", "organism:unheard-of")


def test_truncated_safetensors(search, model_dir: Path, tmp_path: Path) -> None:  # noqa: ANN001
    model = copied(model_dir, tmp_path)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in search("--model", model)


def test_unsupported_architecture(search, model_dir: Path, tmp_path: Path) -> None:  # noqa: ANN001
    model = edit_config(copied(model_dir, tmp_path), model_type="mamba", architectures=["MambaForCausalLM"])
    assert "mamba" in search("--model", model)


def test_unsupported_rope_type(search, model_dir: Path, tmp_path: Path) -> None:  # noqa: ANN001
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0}
    model = edit_config(copied(model_dir, tmp_path), rope_scaling=rope, rope_parameters=rope)
    assert "longrope" in search("--model", model)


def test_dataset_line_with_a_missing_field(fails, model_dir: Path, tmp_path: Path) -> None:  # noqa: ANN001
    data = tmp_path / "data.jsonl"
    row = {"question": "Q?\n (A) x\n (B) y", "answer_matching_behavior": "(A)", "answer_not_matching_behavior": "(B)"}
    short = {k: v for k, v in row.items() if k != "answer_not_matching_behavior"}
    data.write_text(json.dumps(row) + "\n" + json.dumps(short) + "\n")
    for command in (("search", "--out", tmp_path / "run"), ("eval", "--prompts", "x")):
        message = fails(*command, "--model", model_dir, "--persona", data)
        assert "line 2" in message and "answer_not_matching_behavior" in message


def test_unknown_persona(fails, model_dir: Path, tmp_path: Path) -> None:  # noqa: ANN001
    message = fails("search", "--model", model_dir, "--persona", "kindness", "--out", tmp_path / "run")
    assert "kindness" in message and "sycophancy" in message


def test_site_beyond_the_last_layer(search, model_dir: Path) -> None:  # noqa: ANN001
    message = search("--model", model_dir, "--site", "blocks.3.hook_resid_post")
    assert "beyond the last layer" in message and "0 to 2" in message


def test_slot_and_context_longer_than_the_positions(search, model_dir: Path, tmp_path: Path) -> None:  # noqa: ANN001
    assert "256 positions" in search("--model", model_dir, "--prompt-length", "250")


def test_output_directory_of_another_run(fails, model_dir: Path, tmp_path: Path) -> None:  # noqa: ANN001
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text(json.dumps({"format": "jaxsteer.run/1", "seed": 5}))
    (out / "metrics.json").write_text("{}")
    message = fails("search", "--model", model_dir, "--persona", "sycophancy", "--out", out)
    assert "another run's files" in message and "seed: 5 there" in message
    assert (out / "metrics.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("search", "--objective", "nothing.py:f"), "there is no file"),
        (("search", "--children", "0"), "--children must be at least 1"),
        (("eval",), "nothing to measure"),
        (("eval", "--from-run", "nowhere"), "nowhere"),
        (("direction", "show", "nowhere.safetensors"), "no direction file"),
        (("convert", "nowhere", "out"), "nowhere"),
        (("vector", "show", "~nouser/x"), "names the home of a user who is not known here"),
        (("search", "--out", "~nouser/x"), "names the home of a user who is not known here"),
        (("eval", "--soft", "x" * 5000), "cannot be read: File name too long"),
        (("report", "a\0b"), "is not the name of a file"),
        (("convert", "nowhere", "gs://bucket/out"), "only search writes"),
        (("sae", "train", "--site", "x", "--latents", "8", "--out", "s3://bucket/out"), "only search writes"),
        (("generate", "x", "--samples", "100000000000"), "--samples must be at most 1048576"),
        (("generate", "x", "--seed", "9223372036854775808"), "--seed must be at most 9223372036854775807"),
        (("generate", "x", "--seed", "-1"), "--seed must be at least 0"),
        (("generate", "x", "--top-p", "0"), "--top-p must be above 0"),
        (("chat", "--temperature", "nan"), "--temperature must be a finite number, got nan"),
        (("eval", "-p", "x", "--coefficient", "inf"), "--coefficient must be a finite number"),
        (("steer", "sweep", "--out", "x", "--coefficients", "1", "nan"), "--coefficients must be a finite number"),
        (("sae", "train", "--site", "x", "--latents", "8", "--out", "x", "--rate", "-1"), "--rate must be above 0"),
        (("sae", "eval", "--sae", "x", "--rows", "-2"), "--rows must be at least 1"),
        (("sae", "explore", "--sae", "x", "--latents", "1", "-3"), "--latents must be at least 0"),
        (("data", "show", "x", "--examples", "-1"), "--examples must be at least 0"),
        (("direction", "probe", "--split-seed", "-5"), "--split-seed must be at least 0"),
        (("plan", "--model", "x", "--topology", "v5e:2x2", "--problems", "0"), "--problems must be at least 1"),
        (("plan", "--model", "organism:llama", "--topology", "cpu:99999999"), "N is at most 1024"),
        (("search", "--mesh-model", "0"), "--mesh-model must be at least 1"),
        (("search", "--children", "100000000000"), "--children must be at most"),
        (("search", "--ban", ""), "--ban names an empty text"),
        (("search", "--direction", "random:x", "--site", "blocks.1.hook_resid_post"), "random:N takes a whole number"),
        (("search", "--vary", "seed=0:1000000000000"), "makes 1000000000000 searches"),
        (("search", "--vary", "seed=9223372036854775808"), "--seed must be at most"),
    ],
)
def test_other_refusals(fails, tmp_path: Path, argv: tuple[str, ...], message: str) -> None:  # noqa: ANN001
    extra = ("--out", tmp_path / "run") if argv[0] == "search" and "--out" not in argv else ()
    assert message in fails(*argv, *extra)


def test_lists_that_are_given_several_times_are_one() -> None:
    found = parse(["eval", "-p", "A", "--split", "all", "--prompts=B", "C", "-p", "D", "--steer_sites", "x"])
    assert found.prompts == ("A", "B", "C", "D") and found.split == "all" and found.steer_sites == ("x",)
    sweep = parse(["steer", "sweep", "--out", "x", "--layers", "1", "--coefficients", "-1", "--layers", "2"]).action
    assert sweep.layers == (1, 2) and sweep.coefficients == (-1.0,)
    assert parse(["sae", "explore", "--sae", "x", "--latent", "3", "--latents", "5"]).action.latents == (3, 5)
    assert parse(["search", "--out", "x", "--ban", "a", "--ban", "b"]).options.prompt.ban == ("a", "b")


@pytest.mark.parametrize("argv", [("search",), ("bogus",), ("search", "--out", "x", "--fluency", "purple"), ()])
def test_arguments_that_make_no_sense(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ("generate", "--plain", "a\udcff"),
        ("eval", "-p", "a\udcff"),
        *[("search", "--out", "o", f"--{name}", "a\udcff") for name in ("target", "allow", "init")],
        ("search", "--out", "o", "--objective", "logit-diff:a\udcff:b"),
        ("vector", "export", "v.safetensors", "o.gguf", "--model-hint", "a\udcff"),
    ],
)
def test_a_byte_that_is_no_text(fails, argv: tuple[str, ...]) -> None:  # noqa: ANN001
    assert "'" in (message := fails(*argv)) and "is no text: it has to be UTF-8" in message


def test_files_may_have_names_that_are_no_text(tmp_path: Path) -> None:
    (data := tmp_path / "rows\udcff.jsonl").touch()
    assert parse(["data", "show", str(data)]).action.name == str(data)
    out = parse(["search", "--out", "o\udcff", "--objective", f"{data}:f"]).options.run.out
    assert str(out) == "o\udcff"
