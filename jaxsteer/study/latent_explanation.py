"""What SAE latents have to do with a prompt that was found: their weight, what they promote, where they fire."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxsteer.files.records import Record
from jaxsteer.models.padding import pad_rows
from jaxsteer.models.run import capture
from jaxsteer.personas import Signature
from jaxsteer.prompts.conversation import encode as encode_conversation
from jaxsteer.ranges import Share
from jaxsteer.sae import SAE, encode, promoted_tokens
from jaxsteer.study.setting import Setting

ROWS = 20
"""Latents that a report names."""
TOKENS = 8
"""Tokens that a latent promotes, as a report shows them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentRow(Record):
    """One latent of a signature. Contributions are ``w_i f_i``, means over contexts, in raw units of the objective."""

    latent: int
    weight: float
    promotes: tuple[str, ...]
    """Tokens that its decoder direction makes likelier."""
    at_read: float
    """Contribution at the read position, with the prompt."""
    before: float
    """The same without a prompt."""
    by_token: tuple[float, ...]
    """Contribution at every token of the prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentExplanation(Record):
    """A signature of SAE latents, and what a prompt does to each."""

    latents: int
    """Latents of the signature."""
    dictionary: int
    """Latents of the SAE."""
    site: str
    l0_good: float
    """Mean active latents in texts that do not show the behaviour."""
    l0_bad: float
    fvu: float
    """Share of variance that the SAE leaves unexplained."""
    objective: float
    """Sum of all contributions at the read position."""
    objective_before: float
    tokens: tuple[str, ...]
    """Of the prompt; none without one."""
    rows: tuple[LatentRow, ...]
    """The latents whose contribution the prompt changed most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedLatent(Record):
    """A latent, and what it means."""

    latent: int
    words: tuple[str, ...]
    """By its explanation, the strongest first."""
    held: tuple[str, ...] = ()
    """Those that the prompt holds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentNames(Record):
    """Names of the latents that a run reports."""

    explanations: str
    """Where they come from."""
    vocabulary: int
    """Words that latents could be named by."""
    known: int
    """Of these, how many the prompt holds."""
    rows: tuple[NamedLatent, ...]
    share: Share
    """Of these latents, the share of which the prompt holds a word."""
    chance: Share
    """The same of all latents of the SAE."""

    def of(self, latent: int) -> NamedLatent | None:
        """The names of one latent, if it has any."""
        return next((row for row in self.rows if row.latent == latent), None)


def explain_latents(
    setting: Setting, sae: SAE, signature: Signature, text: str | None, ids: Sequence[int] = ()
) -> LatentExplanation:
    """Each latent's contribution to the objective under the selected prompt, if there is one."""
    codes = _contributions(setting, sae, signature, text or "")
    plain = codes if text is None else _contributions(setting, sae, signature, "")
    change = np.abs(codes["at_read"] - plain["at_read"])
    order = np.argsort(-change, kind="stable")[:ROWS]
    promoted = promoted_tokens(setting.model, sae, signature.indices[order], top=TOKENS)
    rows = [
        LatentRow(
            latent=int(signature.indices[i]),
            weight=float(signature.weights[i]),
            promotes=tuple(promoted[row]),
            at_read=float(codes["at_read"][i]),
            before=float(plain["at_read"][i]),
            by_token=() if text is None else tuple(float(v) for v in codes["by_token"][:, i]),
        )
        for row, i in enumerate(order)
    ]
    return LatentExplanation(
        latents=len(signature.indices),
        dictionary=sae.n_latents,
        site=signature.site,
        l0_good=float(signature.l0_good),
        l0_bad=float(signature.l0_bad),
        fvu=float(signature.fvu),
        objective=float(codes["at_read"].sum()),
        objective_before=float(plain["at_read"].sum()),
        tokens=tuple(setting.model.tokenizer.decode([token]) for token in ids),
        rows=tuple(rows),
    )


def _contributions(setting: Setting, sae: SAE, signature: Signature, text: str) -> dict[str, Float[np.ndarray, ...]]:
    """``at_read`` (k,) and ``by_token`` (S, k), means over contexts; the latter is of use with a prompt only."""
    slots, model = setting.slots, setting.model
    rows = [encode_conversation(model.tokenizer, conversation, text) for conversation in slots.conversations]
    tokens, mask = pad_rows(rows)
    streams = capture(model, tokens, [signature.site], mask)[signature.site]
    codes = np.asarray(encode(sae, streams, signature.indices), np.float64) * signature.weights
    starts = np.asarray([len(before) for before in slots.before])
    if text:
        at = starts + np.asarray(slots.read_index)
        inside = codes[np.arange(len(rows))[:, None], starts[:, None] + np.arange(slots.length)]
    else:
        # The same token of the tail, counted from the end; without a slot its last token is the one before it.
        behind = [slots.length + len(tail) - index for tail, index in zip(slots.after, slots.read_index, strict=True)]
        in_slot = np.asarray(slots.read_index) < slots.length
        at = np.where(in_slot, np.maximum(starts - 1, 0), mask.sum(1) - np.asarray(behind))
        inside = codes[:, :0]
    return {"at_read": codes[np.arange(len(rows)), at].mean(0), "by_token": inside.mean(0)}
