"""The one description of a decoder-only transformer that every supported family is mapped to."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

MAX_LAYERS = 10_000
"""More than any model has; what a config repeats for every layer stays small."""
GLOBAL_WINDOW = 2**30
"""Window of a layer with full attention: longer than any sequence, so that windows are plain data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """One rotary table: ``inv_freq_j = theta ** (-2 j / d_head)``, rescaled by ``kind``.

    ``kind`` is "default", "linear" (divide by ``factor``) or "llama3" (NTK by parts, as released with
    Llama 3.1; needs ``low_freq_factor``, ``high_freq_factor`` and ``original_max_positions``).
    """

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_positions: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that give no angles."""
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor"):
            _check_positive(f"rope {name}", getattr(self, name))
        if self.kind not in ("default", "linear", "llama3"):
            raise ValueError(f"the rope kind must be default, linear or llama3, got {self.kind!r}")
        if self.kind == "llama3" and (self.original_max_positions < 1 or self.high_freq_factor < self.low_freq_factor):
            raise ValueError(
                f"a llama3 rope needs original_max_positions >= 1 and high_freq_factor >= low_freq_factor, got "
                f"{self.original_max_positions}, {self.high_freq_factor} and {self.low_freq_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that changes the numbers, and nothing else. Frozen and hashable: a static jit argument.

    Letters as everywhere: D ``d_model``, L ``n_layers``, N ``n_heads``, K ``n_kv_heads``, H ``d_head``,
    V ``vocab_size`` (rows of the embedding table, padding rows included).
    """

    family: str
    """Hugging Face ``model_type`` this was mapped from (kept for naming tensors and for messages)."""
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    max_positions: int
    """Longest sequence, in tokens, that the checkpoint declares (``max_position_embeddings``)."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    gated_mlp: bool = True
    """Whether the MLP multiplies ``act(x W_gate)`` by ``x W_up``; GPT-2 has ``act(x W_up)`` alone."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm, or GPT-2's LayerNorm: it takes the mean away first, and has a bias beside its weight."""
    norm_eps: float = 1e-5
    norm_plus_one: bool = False
    """Gemma: the norm multiplies by ``1 + w`` in float32 and casts afterwards."""
    post_norms: bool = False
    """Gemma 2/3: a norm after attention and after the MLP, before the residual addition."""
    qk_norm: bool = False
    """Qwen 3, Gemma 3: RMSNorm over H on queries and keys before the rotary embedding."""
    qkv_bias: bool = False
    """Qwen 2.5, GPT-2: biases on the query, key and value projections."""
    writer_bias: bool = False
    """GPT-2: biases also on attention's output projection and on the matrices of the MLP."""
    query_scale: float
    """Factor on attention scores; ``d_head ** -0.5`` except where the family says otherwise."""
    attn_softcap: float | None = None
    final_softcap: float | None = None
    embed_scale: bool = False
    """Gemma: embeddings are multiplied by sqrt(D), rounded to the dtype of the weights."""
    tied_embeddings: bool = False
    learned_positions: bool = False
    """GPT-2: a table of ``max_positions`` vectors, the token's added to its embedding."""
    windows: tuple[int, ...]
    """(L,) keys each layer may look back on, its own included; ``GLOBAL_WINDOW`` for full attention."""
    ropes: tuple[Rope, ...]
    """Distinct rotary tables; none where queries and keys are not rotated (GPT-2)."""
    rope_index: tuple[int, ...]
    """(L,) which table each layer uses; empty where there is none."""

    def __post_init__(self) -> None:
        """Refuse sizes that no model has or that cannot belong together, with the numbers in the message."""
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_mlp", "max_positions"):
            most = MAX_LAYERS if name == "n_layers" else 2**31 - 1
            if type(size := getattr(self, name)) is not int or not 1 <= size <= most:
                raise ValueError(f"{name} must be a whole number from 1 to {most:,}, got {size!r}")
        for name in ("norm_eps", "query_scale", "attn_softcap", "final_softcap"):
            if (value := getattr(self, name)) is not None or not name.endswith("softcap"):
                _check_positive(name, value)
        if self.activation not in ("silu", "gelu_tanh"):
            raise ValueError(f"the activation must be silu or gelu_tanh, got {self.activation!r}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} query heads cannot share {self.n_kv_heads} key/value heads evenly")
        if self.norm not in ("rms", "layer"):
            raise ValueError(f"the norm must be rms or layer, got {self.norm!r}")
        if self.norm == "layer" and (self.norm_plus_one or self.post_norms or self.qk_norm):
            raise ValueError("LayerNorm goes with neither 1 + w, nor norms after attention and MLP, nor q/k norms")
        if self.gated_mlp and self.writer_bias:
            raise ValueError("biases of writers go with an MLP that has no gate")
        if self.ropes and self.d_head % 2:
            raise ValueError(f"the head width must be even for rotary embeddings, got {self.d_head}")
        for name, entries in (("windows", self.n_layers), ("rope_index", self.n_layers if self.ropes else 0)):
            if len(getattr(self, name)) != entries:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {entries} layers")
        for window in self.windows:
            if type(window) is not int or not 1 <= window <= GLOBAL_WINDOW:
                raise ValueError(f"windows must be whole numbers from 1 to {GLOBAL_WINDOW:,}, got {window!r}")
        for table in self.rope_index:
            if type(table) is not int or not 0 <= table < len(self.ropes):
                raise ValueError(f"rope_index names table {table!r}, but there are {len(self.ropes)}")

    @property
    def windowed(self) -> bool:
        """Whether any layer's attention is limited to a window."""
        return min(self.windows) < GLOBAL_WINDOW

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; ``from_json`` is its inverse.

        Fields that GPT-2 brought are left out at their defaults: fingerprints of other models are hashes of this.
        """
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in _LATER or value != _LATER[name]
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ModelConfig:
        """The config that ``to_json`` wrote. Raises ``TypeError`` or ``ValueError`` for anything else."""
        if missing := {"ropes", "windows", "rope_index"} - fields.keys():
            raise TypeError(f"the config of a model has {', '.join(sorted(missing))}")
        fields = dict(fields)
        fields["ropes"] = tuple(Rope(**rope) for rope in fields["ropes"])
        fields["windows"] = tuple(fields["windows"])
        fields["rope_index"] = tuple(fields["rope_index"])
        return cls(**fields)


_LATER: dict[str, Any] = {"gated_mlp": True, "norm": "rms", "writer_bias": False, "learned_positions": False}


def _check_positive(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def llama_config(
    *,
    vocab_size: int,
    d_model: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int | None = None,
    d_head: int | None = None,
    d_mlp: int,
    max_positions: int,
    norm_eps: float = 1e-5,
    tied_embeddings: bool = False,
    rope: Rope | None = None,
) -> ModelConfig:
    """A Llama-shaped config from its sizes, for models that are made here (organisms, benchmarks, tests).

    Many parameters: each is a size of the model.
    """
    d_head = d_head or d_model // n_heads
    return ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads or n_heads,
        d_head=d_head,
        d_mlp=d_mlp,
        max_positions=max_positions,
        norm_eps=norm_eps,
        query_scale=1.0 / math.sqrt(d_head),
        tied_embeddings=tied_embeddings,
        windows=(GLOBAL_WINDOW,) * n_layers,
        ropes=(rope or Rope(theta=10_000.0),),
        rope_index=(0,) * n_layers,
    )
