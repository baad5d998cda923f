"""``jaxsteer attribute``: which parts of a model write a token's logit."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from tyro.conf import arg

from jaxsteer.cli.texts import Reading, write_plot
from jaxsteer.errors import UserError
from jaxsteer.ranges import CountFrom0, Seed
from jaxsteer.runs.files import document


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attribute(Reading):
    """Direct logit attribution: what embedding, attentions, MLPs, heads and neurons add to a token's logit."""

    target: Annotated[str | None, arg(aliases=["-t"])] = None
    """The token, as it stands behind the text: " Paris" with its space (default: each row's target, else the
    likeliest). Of several tokens the first counts."""
    minus: str | None = None
    """Another token whose logit is subtracted; "mean": the mean over the vocabulary (default: each row's minus)."""
    reads: Literal["last", "all"] = "last"
    """Attribute what follows the text, or every token of it given those before."""
    sae: str | None = None
    """Also tell the latents of this SAE, which reads and writes the stream after a block."""
    neurons: CountFrom0 = 10
    """Neurons to tell."""
    controls: CountFrom0 = 32
    """Random tokens in the target's place, beside which every part stands."""
    seed: Seed = 0
    """Of the random tokens."""

    def run(self) -> int:
        """Attribute and print."""
        from jaxsteer.lens.attribution import Attributed, attribute_logits
        from jaxsteer.runs.bars import load, progress_bar
        from jaxsteer.sae import load_sae

        records = self.records()
        own = {name: [getattr(record, name) for record in records] for name in ("target", "minus")}
        given: dict[str, str | list[str] | None] = {}
        for name, texts in own.items():
            asked = getattr(self, name)
            if asked is None and any(texts) and not all(texts):
                raise UserError(f"only some rows have a {name}: give each one, or --{name} for all")
            given[name] = texts if asked is None and all(texts) else asked
        model = load(self.model, dtype=self.dtype, delta=self.delta, quiet=self.json)
        options = Attributed(positions=self.reads, neurons=self.neurons, controls=self.controls, seed=self.seed)
        with progress_bar("attribution", unit="text", quiet=self.json) as advance:
            found = attribute_logits(
                model, [record.said for record in records], given["target"], minus=given["minus"],
                sae=None if self.sae is None else load_sae(self.sae), edits=self.edits(model), options=options,
                progress=advance,
            ).result  # fmt: skip
        print(document(found.to_json()) if self.json else found.table())
        if self.plot is not None:
            written = write_plot(found.plot(), self.plot)
            if not self.json:
                print(f"\n{written}")
        return 0
