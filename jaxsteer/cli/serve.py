"""``jaxsteer serve``: an OpenAI-compatible server with steering by request, and its page."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import UseAppendAction, arg

from jaxsteer.engine import EngineOptions
from jaxsteer.errors import UserError
from jaxsteer.files import read_text
from jaxsteer.ranges import Range

if TYPE_CHECKING:
    from jaxsteer.models.model import Model
    from jaxsteer.serve.library import Library

SHORTEST_KEY = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a model over HTTP: the OpenAI API with a field `steering`, projections, and a chat page at /.

    Needs the extra: pip install '.[serve]'.
    """

    model: str = "organism:llama"
    """organism:NAME (llama, qwen2, gemma3, persona), a checkpoint, a Hugging Face directory, .gguf file or hub id."""
    steer: Annotated[tuple[Path, ...], UseAppendAction] = ()
    """Vector files that steer every request, unless it says otherwise; again for several."""
    vectors: Path | None = None
    """Directory of vector files that requests may load and name."""
    axis: Path | None = None
    """Assistant axis (the directory of `axis run`, or a file), to project on."""
    sae: str | None = None
    """SAE whose latents requests may steer by: a folder, file, or hub id with ::PATH."""
    host: str = "127.0.0.1"
    """Address to listen on; one that other machines can reach needs --key-file."""
    port: Annotated[int, Range(0, 65535)] = 8000
    """Port to listen on; 0 for any that is free."""
    key_file: Path | None = None
    """File whose text clients must send as bearer key."""
    engine: Annotated[EngineOptions, arg(name="")] = EngineOptions()
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights."""
    any_weights: bool = False
    """Use vectors although they were made on other weights."""

    def run(self) -> int:
        """Load, compile, serve until interrupted."""
        try:
            from jaxsteer.serve.app import make_app, make_server
            from jaxsteer.serve.connections import listening
            from jaxsteer.serve.guards import is_loopback
        except ImportError as error:
            raise UserError(f"{error.name} is not installed: pip install '.[serve]'") from None
        from jaxsteer.engine import Engine
        from jaxsteer.runs.bars import load

        key = None if self.key_file is None else read_text(self.key_file).strip()
        if key is not None and (len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable()):
            raise UserError(f"{self.key_file} must hold a key of at least {SHORTEST_KEY} ASCII characters")
        if key is None and not is_loopback(self.host):
            raise UserError(f"--host {self.host} can be reached by other machines: give --key-file FILE with a key")
        if self.vectors is not None and not self.vectors.is_dir():
            raise UserError(f"--vectors {self.vectors} is no directory")
        with listening(self.host, self.port) as door:
            model = load(self.model, dtype=self.dtype)
            library = self._library(model)
            with Engine(model, self.engine) as engine:
                app = make_app(engine, library, host=self.host, key=key)
                where = f"http://{self.host}:{door.getsockname()[1]}/"
                print(f"{model.name} at {where} (programs are compiled first; Ctrl-C ends)", flush=True)
                make_server(app, host=self.host, port=self.port).run(sockets=[door])
        return 0

    def _library(self, model: Model) -> Library:
        """What requests may be steered by. Raises ``UserError`` for files that do not fit."""
        from jaxsteer.axis.projection import AXIS
        from jaxsteer.sae import load_sae
        from jaxsteer.serve.library import Library

        sae = None if self.sae is None else load_sae(self.sae)
        library = Library(model=model, directory=self.vectors, sae=sae, any_weights=self.any_weights)
        for path in self.steer:
            if path.name in library.loaded:
                raise UserError(f"two files of --steer are named {path.name}: rename one")
            library.add(path.name, path)
        library.default = tuple(library.loaded)
        if self.axis is not None:
            library.axis = "axis"
            library.add("axis", self.axis / AXIS if self.axis.is_dir() else self.axis)
        return library
