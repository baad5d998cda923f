"""``load``: a model from the package, a converted checkpoint, a Hugging Face directory, a GGUF file or a hub id."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from checkpoints_convert.gguf import is_gguf
from checkpoints_convert.hf import config_from_hf, quiet_transformers, stop_tokens
from checkpoints_convert.leaves import RECORD, read_record
from jaxsteer.checkpoints.deltas import applied, load_delta
from jaxsteer.checkpoints.remote import side_files
from jaxsteer.checkpoints.restoring import check_finite, restore
from jaxsteer.errors import UserError, first_line
from jaxsteer.files import make_directory, write_text, writing
from jaxsteer.files.lock import hold_lock
from jaxsteer.files.paths import user_path
from jaxsteer.files.stores import is_url
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.model import Model
from jaxsteer.processes import from_first

log = logging.getLogger(__name__)

ORGANISM = "organism:"
HUB_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.jinja", "merges.txt")
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def load(
    source: str | os.PathLike[str],
    *,
    dtype: str | jnp.dtype | None = None,
    mesh: Mesh | None = None,
    layers: int | None = None,
    ignore_fields: Collection[str] = (),
    delta: str | os.PathLike[str] | None = None,
) -> Model:
    """Load a model.

    ``source`` is ``organism:NAME`` (a small model that ships with the package), a converted checkpoint directory, a
    Hugging Face directory or a GGUF file (converted on first use into the cache: ``$JAXSTEER_CACHE``, else
    ``$XDG_CACHE_HOME/jaxsteer`` or ``~/.cache/jaxsteer``), a hub
    id ``owner/name`` or ``owner/name@revision``, or the URL of a converted checkpoint in an object store
    (``gs://bucket/name``, ``s3://bucket/name``).

    ``dtype`` is the dtype of the weights on the device. By default float32 on CPU, where bfloat16 is emulated and
    slow, and the checkpoint's own elsewhere. With a ``mesh`` (axes "prompts" and "model", see
    ``jaxsteer.make_mesh``) the weights are restored straight into their shardings, and a process reads only what its
    devices hold.

    ``layers=k`` reads only the first k layers: a model that ends there, for work at sites below. Its residual streams
    up to layer k are those of the whole model; its logits are what the final norm and the unembedding make of the last
    of them. ``config.n_layers`` is k; the fingerprint stays that of the whole checkpoint.

    ``ignore_fields`` are names of fields of a config.json that change no number although jaxsteer does not know them;
    such a model would be refused otherwise.

    ``delta`` is a file of a change of the weights (``jaxsteer rewrite run``), which is added to them; the fingerprint
    is then that of the changed model.

    Raises ``UserError`` when the source cannot be found, is damaged or is not supported, when weights are NaN or
    infinite, naming the first of them, and for a delta of another model.
    """
    name, change = str(source), None if delta is None else load_delta(delta)
    checkpoint = checkpoint_of(name, ignore_fields)
    record = read_record(checkpoint)
    config = _shallower(ModelConfig.from_json(record["config"]), layers)
    if change is not None:
        change.check(name, config, record["fingerprint"])
    target = _dtype(dtype, record["dtype"])
    params = restore(
        checkpoint / "weights",
        config,
        dtype=target,
        mesh=mesh,
        url=f"{name.rstrip('/')}/weights" if is_url(name) else None,
    )
    # Conversion has looked at every weight since it says so; float16 cannot hold all that the other dtypes can.
    if record.get("finite") is not True or (target == jnp.float16 and record["dtype"] != "float16"):
        check_finite(params, config, name)
    model = Model(
        params=params,
        config=config,
        tokenizer=load_tokenizer(checkpoint),
        name=name if name.startswith(ORGANISM) or not Path(name).exists() else Path(name).resolve().name,
        fingerprint=record["fingerprint"],
        mesh=mesh,
        stop_tokens=stop_tokens(checkpoint),
    )
    return model if change is None else applied(model, change)


def _shallower(config: ModelConfig, layers: int | None) -> ModelConfig:
    """The config of a model that ends at layer ``layers``."""
    if layers is None:
        return config
    if not 1 <= layers <= config.n_layers:
        raise UserError(f"layers={layers} cannot be loaded: the model has {config.n_layers} layers; give 1 to that.")
    return dataclasses.replace(
        config, n_layers=layers, windows=config.windows[:layers], rope_index=config.rope_index[:layers]
    )


def _dtype(asked: str | jnp.dtype | None, stored: str) -> jnp.dtype:
    if asked is None:
        return jnp.dtype("float32" if jax.default_backend() == "cpu" else stored)
    try:
        dtype = jnp.dtype(asked)
    except TypeError:
        dtype = None
    if dtype not in (jnp.dtype("float32"), jnp.dtype("bfloat16"), jnp.dtype("float16")):
        raise UserError(f"dtype {asked!r} is not supported: give 'float32', 'bfloat16' or 'float16'.")
    return dtype


# Finding the checkpoint


def cache_dir() -> Path:
    """Where converted checkpoints are kept: ``$JAXSTEER_CACHE``, ``$XDG_CACHE_HOME/jaxsteer`` or ``~/.cache/jaxsteer``.

    The first of the variables that is set counts; a relative ``XDG_CACHE_HOME`` does not, as its standard says.
    """
    if own := os.environ.get("JAXSTEER_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME") or ""
    try:
        return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "jaxsteer"
    except RuntimeError:
        raise UserError("There is no home directory to keep a cache in. Set JAXSTEER_CACHE to a directory.") from None


def checkpoint_of(source: str, ignore_fields: Collection[str]) -> Path:
    """The converted checkpoint of any source, made if it does not exist yet."""
    directory, name, revision = find_source(source)
    if (directory / RECORD).is_file():
        return directory
    found = _convert_once(directory, name, revision, ignore_fields)
    if not set(read_record(found).get("ignored_config_fields", ())) <= set(ignore_fields):
        config_from_hf(directory, ignore_fields=ignore_fields)  # raises: it was converted with less doubt than now
    return found


def find_source(source: str, patterns: Sequence[str] = HUB_PATTERNS) -> tuple[Path, str, str | None]:
    """(directory, name, revision if from the hub) of any source, converted or in Hugging Face format.

    Of a hub model, the files that ``patterns`` name are downloaded. Raises ``UserError`` for what is no model.
    """
    if source.startswith(ORGANISM):
        return _organism_dir(source.removeprefix(ORGANISM)), source, None
    if is_url(source):
        return side_files(source, cache_dir() / "remote"), source, None
    path = user_path(source)
    if is_gguf(path) and path.is_file():
        return path, path.name, None
    if (path / RECORD).is_file() or (path / "config.json").is_file():
        return path, path.resolve().name, None
    if path.exists():
        held = "a file" if path.is_file() else "a directory with neither jaxsteer.json nor config.json"
        raise UserError(
            f"Model {source!r} is {held}. Expected a Hugging Face model directory (config.json, *.safetensors), a "
            f".gguf file, or a directory that `jaxsteer convert` wrote."
        )
    match = _HUB_ID.fullmatch(source)
    if match:
        return _download(match["repo"], match["revision"], patterns)
    raise UserError(
        f"Model {source!r} was not found. Tried: 'organism:NAME' (it does not start so), a local directory (there is "
        f"none at {path.absolute()}), a Hugging Face hub id (it is not of the form owner/name). Try 'organism:llama', "
        f"or check the path."
    )


def _organism_dir(name: str) -> Path:
    root = Path(__file__).resolve().parent.parent / "organisms"
    shipped = sorted(entry.parent.name for entry in root.glob("*/config.json"))
    if name not in shipped:
        raise UserError(f"There is no organism {name!r}. The package ships: {', '.join(shipped) or 'none'}.")
    return root / name


def _download(repo: str, revision: str | None, patterns: Sequence[str]) -> tuple[Path, str, str]:
    """(directory, hub id, resolved commit) of a hub model, from the hub's own cache if it is there."""
    import huggingface_hub

    try:
        # Sub-directories and "consolidated" files hold the same weights again in another format.
        path = Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*", "consolidated*"]
            )
        )
    except Exception as error:  # many types: offline, unknown repository or revision, gated, proxies
        if isinstance(error, huggingface_hub.errors.GatedRepoError):
            raise UserError(
                f"Model {repo!r} is gated: accept its terms on its page on the Hugging Face hub, then log in (`hf auth "
                f"login`) or set HF_TOKEN to a token of that account."
            ) from error
        reason = first_line(error)
        pinned = f" --revision {revision}" if revision else ""
        raise UserError(
            f"Model {repo!r} is neither a local directory nor obtainable from the Hugging Face hub ({reason}). Without "
            f"network, download it elsewhere (`hf download {repo}{pinned} --local-dir DIR`) and pass that directory."
        ) from error
    return path, repo, path.name


def _convert_once(
    directory: Path, source: str, revision: str | None = None, ignore_fields: Collection[str] = ()
) -> Path:
    """The converted form of a Hugging Face directory in the cache; converts on first use.

    Where several processes run one program (``jax.distributed``), the first converts and tells the others the place.
    """
    name = from_first(lambda: _convert_here(directory, source, revision, ignore_fields).name)
    out = cache_dir() / "checkpoints" / name
    if not (out / RECORD).is_file():
        raise UserError(
            f"{source} was converted by the first process, but for this one it is not in {out}. Set JAXSTEER_CACHE to "
            f"a directory that all processes share, or give each the result of `jaxsteer convert`."
        )
    return out


def _convert_here(directory: Path, source: str, revision: str | None, ignore_fields: Collection[str]) -> Path:
    """The converted form of a Hugging Face directory, made by this process if it does not exist yet.

    The key is the hash of the contents, so a changed file is converted anew. The contents are hashed while they are
    converted; until then the place is named by the state of the files, and afterwards the hash is remembered under
    that state. Several processes may do this at once: one converts, the others wait and use its result.
    """
    from checkpoints_convert.sources import file_states
    from checkpoints_convert.streaming import CONVERTER_VERSION, convert
    from checkpoints_convert.work_directory import LOCK, discard

    directory = directory.resolve()
    state = json.dumps([str(directory), file_states(directory), CONVERTER_VERSION])
    key = hashlib.sha256(state.encode()).hexdigest()[:32]
    memo = cache_dir() / "hashes" / key
    checkpoints = cache_dir() / "checkpoints"

    def place_of(digest: str) -> Path:
        return checkpoints / f"{digest[:32]}-v{CONVERTER_VERSION}"

    def known() -> Path | None:
        digest = memo.read_text(encoding="ascii") if memo.is_file() else ""
        return place_of(digest) if digest and (place_of(digest) / RECORD).is_file() else None

    if found := known():
        return found
    try:
        for folder in (cache_dir() / "locks", memo.parent, checkpoints):
            make_directory(folder)
    except OSError as error:
        raise UserError(
            f"The cache directory {cache_dir()} cannot be written ({error.strerror}). Set JAXSTEER_CACHE to a "
            f"directory that can, or convert the model yourself with `jaxsteer convert` and load the result."
        ) from error
    waiting = f"Another process is converting {source}; waiting for it"
    lock = cache_dir() / "locks" / key
    with writing(lock), hold_lock(lock / LOCK, lambda: print(waiting, file=sys.stderr, flush=True)):
        if found := known():
            return found
        fresh = checkpoints / f"new-{key}"
        if not (fresh / RECORD).is_file():
            print(f"Converting {source} for first use (kept in {checkpoints})", file=sys.stderr, flush=True)
            convert(directory, fresh, progress=False, source=source, revision=revision, ignore_fields=ignore_fields)
        digest = read_record(fresh)["source_hash"]
        write_text(memo, digest)
        if (place_of(digest) / RECORD).is_file():  # the same contents at another path
            shutil.rmtree(fresh)
        else:
            fresh.rename(place_of(digest))
        discard(lock)
        return place_of(digest)


# Reading the checkpoint


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer exactly as tokenizer.json says, or None if there is none.

    Not ``AutoTokenizer``: the model-specific classes of transformers 5 rebuild parts of the pipeline.
    """
    if not (directory / "tokenizer.json").is_file():
        return None
    with quiet_transformers():
        from transformers import PreTrainedTokenizerFast
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        tokenizer.decode(tokenizer("a")["input_ids"])  # values of other types in its config show in use alone
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers library raises bare Exception for damaged files, and Rust's panics
        raise UserError(f"The tokenizer in {directory} cannot be read: {error}") from error
