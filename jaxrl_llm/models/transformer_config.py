"""What a decoder-only transformer is made of: one typed description that covers every family (see families.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxrl_llm.models.attention import AttentionChoice
from jaxrl_llm.models.experts import ExpertsConfig
from jaxrl_llm.models.rotary import RopeScaling
from jaxrl_llm.parallel.backend import backend_in_use
from jaxrl_llm.ranges import Count, Positive, require_ranges

LayerLoop = Literal["auto", "unrolled", "scanned"]
CacheLayout = Literal["auto", "contiguous", "paged"]
CachePrecision = Literal["compute", "int8"]
Precision = Literal["float32", "bfloat16"]
# What of a block the backward pass computes again instead of reading it back.
Rematerialisation = Literal["none", "full", "dots", "attention", "offload_dots"]
Activation = Literal["silu", "gelu_tanh"]

_CHOICES: Mapping[str, Any] = {
    "layer_loop": LayerLoop,
    "cache_dtype": CachePrecision,
    "cache_layout": CacheLayout,
    "parameter_dtype": Precision,
    "compute_dtype": Precision,
    "activation": Activation,
    "attention": AttentionChoice,
    "remat": Rematerialisation,
}


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and switches of a decoder-only transformer.

    Attributes:
      vocabulary_size: symbols.
      width: of the residual stream.
      layers: blocks.
      heads: query heads.
      kv_heads: key/value heads; divides `heads`.
      head_width: of one head, even; None gives width / heads.
      mlp_width: hidden width of the gated MLP, or of one expert; None gives 3 * width.
      activation: of the gate.
      experts: replaces the MLP of every block by a mixture of experts.
      rope_base: base of the rotary angles.
      rope_scaling: stretches the angles beyond the context of pre-training.
      rope_fraction: share of each head's dimensions that are rotated; the rest carry no position.
      window: tokens that a windowed layer sees, itself included.
      window_pattern: which layers are windowed, repeated over the layers; used where `window` is set.
      local_rope_base: base of the rotary angles in windowed layers, which are then not scaled; None: as all others.
      qk_norm: RMSNorm on each query and key head before rotation.
      qkv_bias: the query, key and value projections have biases.
      attention_out_bias: the output projection of the attention has a bias.
      query_scale: factor on the attention scores; None gives 1 / sqrt(head_width).
      attention_cap: scores s become cap * tanh(s / cap) before the softmax.
      logits_cap: the same for the scores of the vocabulary.
      norm_epsilon: inside the root of RMSNorm.
      norm_offset: added to every gain of a norm; 1 where gains are stored as their difference from one.
      post_norms: RMSNorm also on what the attention and the MLP add to the residual stream.
      embedding_scale: factor on the embedded tokens.
      tie_embeddings: the embedding table is also the output projection.
      attention: how attention is computed, see attention.py; "auto" picks by backend, type and shape.
      layer_loop: "unrolled" is about twice as fast on CPU, "scanned" compiles once for any depth; "auto"
        unrolls on CPU.
      remat: what of each block is computed again in the backward pass (a training run sets it from training.remat).
      parameter_dtype: storage dtype.
      compute_dtype: dtype of matrix products; norms, softmax and statistics are float32 regardless.
      cache_dtype: how generation keeps keys and values: "compute" in the compute dtype; "int8" rounded, in a quarter of
        float32's memory, so that what is sampled has other log-probabilities than the trainer computes.
      cache_layout: how they lie while rows are decoded side by side: "contiguous", every row as long as the longest;
        "paged", as long as what it has said; "auto" takes pages on one TPU whose kernel serves the head size.
    """

    vocabulary_size: Count
    width: Count = 128
    layers: Count = 4
    heads: Count = 4
    kv_heads: Count = 2
    head_width: Count | None = None
    mlp_width: Count | None = None
    activation: Activation = "silu"
    experts: ExpertsConfig | None = None
    rope_base: Positive = 10_000.0
    rope_scaling: RopeScaling | None = None
    rope_fraction: float = 1.0
    window: Count | None = None
    window_pattern: tuple[bool, ...] = (True,)
    local_rope_base: Positive | None = None
    qk_norm: bool = True
    qkv_bias: bool = False
    attention_out_bias: bool = False
    query_scale: Positive | None = None
    attention_cap: Positive | None = None
    logits_cap: Positive | None = None
    norm_epsilon: Positive = 1e-6
    norm_offset: float = 0.0
    post_norms: bool = False
    embedding_scale: Positive = 1.0
    tie_embeddings: bool = True
    attention: AttentionChoice = "auto"
    layer_loop: LayerLoop = "auto"
    parameter_dtype: Precision = "float32"
    compute_dtype: Precision = "float32"
    cache_dtype: CachePrecision = "compute"
    cache_layout: CacheLayout = "auto"
    remat: Rematerialisation = "none"

    def __post_init__(self):
        require_ranges(self, "model")
        for name, literal in _CHOICES.items():
            if getattr(self, name) not in get_args(literal):
                known = ", ".join(get_args(literal))
                raise ValueError(f"model.{name} is {getattr(self, name)!r}; it must be one of {known}")
        if self.cache_layout == "paged" and self.cache_dtype != "compute":
            raise ValueError(
                f"model.cache_layout is 'paged' and model.cache_dtype is {self.cache_dtype!r}; pages are kept in the "
                "compute dtype, so leave one of them out"
            )
        self._check_heads()
        self._check_windows()
        if self.attention in ("xla", "cudnn") and self.attention_cap is not None:
            raise ValueError(
                f"model.attention is {self.attention!r}, which has no soft cap, but model.attention_cap is "
                f"{self.attention_cap}; use auto, plain or splash"
            )
        if self.attention == "cudnn" and self.compute_dtype != "bfloat16":
            raise ValueError(
                f"model.attention is 'cudnn', which computes in bfloat16 only, but model.compute_dtype is "
                f"{self.compute_dtype!r}; set it to bfloat16, or use auto"
            )

    def _check_heads(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"model.heads is {self.heads}, which model.kv_heads {self.kv_heads} does not divide")
        if self.head_width is None and self.width % self.heads:
            raise ValueError(
                f"model.width is {self.width}, which model.heads {self.heads} does not divide; set model.head_width"
            )
        if self.head_size % 2:
            raise ValueError(f"model.head_width is {self.head_size}; rotary positions need an even number")
        if not 0 < self.rope_fraction <= 1 or self.rotary_size < 2 or self.rotary_size % 2:
            raise ValueError(
                f"model.rope_fraction is {self.rope_fraction}, which rotates {self.rotary_size} of "
                f"{self.head_size} dimensions; it must be above 0, at most 1, and give an even number of at least 2"
            )

    def _check_windows(self):
        if not self.window_pattern:
            raise ValueError("model.window_pattern is empty; give one boolean a layer, or a pattern that repeats")
        if len(self.window_pattern) > self.layers:
            raise ValueError(
                f"model.window_pattern has {len(self.window_pattern)} entries for {self.layers} layers; shorten it"
            )
        if self.window is None and (self.local_rope_base is not None or self.window_pattern != (True,)):
            raise ValueError(
                f"model.window is not set, but model.local_rope_base is {self.local_rope_base} and "
                f"model.window_pattern is {self.window_pattern}, which say something of windowed layers; set "
                "model.window, or leave them out"
            )

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.head_width or self.width // self.heads

    @property
    def rotary_size(self) -> int:
        """Dimensions of a head that are rotated."""
        return int(self.head_size * self.rope_fraction)

    @property
    def mlp_size(self) -> int:
        """Hidden width of the MLP, or of one expert."""
        return self.mlp_width or 3 * self.width

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    @property
    def score_scale(self) -> float:
        """Factor on the attention scores."""
        return self.query_scale or self.head_size**-0.5

    @property
    def windowed(self) -> tuple[bool, ...]:
        """Whether each layer is windowed."""
        pattern = (False,) if self.window is None else self.window_pattern
        return tuple(pattern[layer % len(pattern)] for layer in range(self.layers))

    @property
    def unrolled(self) -> bool:
        """Whether blocks are written out one after the other."""
        return self.layer_loop == "unrolled" or (self.layer_loop == "auto" and backend_in_use() == "cpu")
