"""``jaxsteer generate``: continue prompts from the command line or a file."""

from __future__ import annotations

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from jaxsteer.cli.steering import Steering
from jaxsteer.errors import UserError, refuse_unknown
from jaxsteer.files import read_json_lines, read_text
from jaxsteer.models.sampling import Decoding
from jaxsteer.prompts import with_system


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Steering):
    """Let a model answer prompts, or continue texts; steered by a vector file on request."""

    prompts: Positional[tuple[str, ...]] = ()
    """What the user says, one answer each."""
    file: Annotated[tuple[Path, ...], arg(aliases=["-f"]), UseAppendAction] = ()
    """More prompts, from one or more files: *.jsonl, each line a text, a list of messages, or an object with "messages"
    or "prompt"; any other file, one prompt per line."""
    model: str = "organism:llama"
    """organism:NAME (llama, qwen2, gemma3, persona), a checkpoint, a Hugging Face directory, .gguf file or hub id."""
    system: str = ""
    """System message before every prompt that is no list of messages."""
    plain: bool = False
    """Continue the texts as they stand, without chat template."""
    soft: Path | None = None
    """Soft prompt (soft.safetensors of a run): it stands at {prompt} in every prompt, or after it."""
    decoding: Annotated[Decoding, arg(name="")] = Decoding()
    samples: int = 1
    """Answers per prompt."""
    batch: int = 64
    """Rows decoded at a time."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights."""
    compare: bool = False
    """With --steer: the answer without it beside each, from the same random numbers."""
    delta: Path | None = None
    """Change of the weights to load them with (delta.safetensors of `jaxsteer rewrite run`)."""
    json: bool = False
    """Print one JSON object per answer instead of text."""

    def run(self) -> int:
        """Generate and print."""
        if self.plain and self.system:
            raise UserError("plain text has no system message: leave out --plain or --system")
        if self.compare and self.steer is None:
            raise UserError("--compare shows the answer without steering beside each: give --steer FILE with it")
        asked = [*self.prompts, *(prompt for file in self.file for prompt in _read(file))]
        if not asked:
            raise UserError("no prompt was given: write one after the command, or use --file")
        prompts = [self._prompt(prompt) for prompt in asked]
        from jaxsteer.prompts.generate import generate
        from jaxsteer.prompts.soft import load_soft, placed, with_soft
        from jaxsteer.runs.bars import load, progress_bar

        model = load(self.model, dtype=self.dtype, delta=self.delta)
        edits = self.edits(model)
        if self.soft is not None:
            model, text = with_soft(model, load_soft(self.soft), any_weights=self.any_weights)
            prompts = [placed(prompt, text) for prompt in prompts]
        with progress_bar("generating"):
            answer = partial(generate, model, prompts, self.decoding, samples=self.samples, batch=self.batch)
            made, bare = answer(edits=edits), answer() if self.compare else None
        for row, text in enumerate(made.texts):
            prompt = asked[row // self.samples]
            beside = None if bare is None else bare.texts[row]
            if self.json:
                line = {"prompt": prompt, "sample": row % self.samples, "text": text, "finish": made.finish[row]}
                line |= {"tokens": int(made.lengths[row])} | ({} if beside is None else {"unsteered": beside})
                print(json.dumps(line, ensure_ascii=False))
            else:
                self._print(prompt if isinstance(prompt, str) else prompt[-1].get("content", ""), text, beside)
        new = int(made.lengths.sum())
        print(f"{new} tokens in {made.seconds:.1f} s, compilation included", file=sys.stderr)
        return 0

    def _print(self, head: str, text: str, unsteered: str | None) -> None:
        if unsteered is not None:
            print(f"> {head}\n  as it is:  {unsteered.strip()}\n  steered:   {text.strip()}\n")
        else:
            print(f"{head}{text}\n" if self.plain else f"> {head}\n{text.strip()}\n")

    def _prompt(self, prompt: Any) -> Any:
        if self.plain or not isinstance(prompt, str):
            return prompt
        return with_system([{"role": "user", "content": prompt}], self.system)


def _read(path: Path) -> list[Any]:
    """The prompts of a file."""
    if path.suffix != ".jsonl":
        return [line for line in read_text(path).split("\n") if line.strip()]
    prompts = []
    for number, value in read_json_lines(path):
        if isinstance(value, dict):
            refuse_unknown(value, ("messages", "prompt"), "field", f"{path}, line {number}: ")
            if len(value) > 1:
                raise UserError(f"{path}, line {number}: both messages and prompt say what is asked: leave one out")
            value = value.get("messages", value.get("prompt"))
        if not isinstance(value, str) and not (isinstance(value, list) and value and isinstance(value[0], dict)):
            raise UserError(
                f'{path}, line {number}: expected a text, a list of messages, or an object with "messages" or "prompt"'
            )
        prompts.append(value)
    return prompts
