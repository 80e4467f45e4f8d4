"""The config of a decoder-only transformer: one typed description for all families (see families.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from jaxrl_llm.models.attention import AttentionChoice
from jaxrl_llm.models.experts import ExpertsConfig
from jaxrl_llm.models.layer_kinds import (
    DeltaConfig,
    GlobalConfig,
    LatentConfig,
    Layers,
    PerLayerConfig,
    require_layer_kinds,
)
from jaxrl_llm.models.rotary import RopeScaling
from jaxrl_llm.parallel.backend import backend_in_use
from jaxrl_llm.ranges import Count, Positive, require_ranges

# Names of the stacks of blocks in the parameters, see `TransformerConfig.stacks`. "Reading" blocks attend to the keys
# and values of an earlier layer.
STACKS = ("dense_blocks", "delta_blocks", "global_blocks", "reading_blocks", "global_reading_blocks", "blocks")
LayerLoop = Literal["auto", "unrolled", "scanned"]
CacheLayout = Literal["auto", "contiguous", "paged"]
CachePrecision = Literal["compute", "int8"]
Precision = Literal["float32", "bfloat16"]
# Which activations of a block the backward pass recomputes, see rematerialisation.py.
Rematerialisation = Literal["none", "full", "dots", "attention", "offload_dots"]
Activation = Literal["silu", "gelu", "gelu_tanh", "clamped_swiglu"]
# Norm of queries and keys: over each head separately, or over all heads of a token together.
NormSpan = Literal["head", "all_heads"]

_CHOICES: Mapping[str, Any] = {
    "layer_loop": LayerLoop,
    "cache_dtype": CachePrecision,
    "cache_layout": CacheLayout,
    "parameter_dtype": Precision,
    "compute_dtype": Precision,
    "activation": Activation,
    "qk_norm_span": NormSpan,
    "attention": AttentionChoice,
    "remat": Rematerialisation,
}


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and switches of a decoder-only transformer.

    Attributes:
      vocabulary_size: number of tokens.
      width: of the residual stream.
      layers: number of blocks.
      heads: query heads.
      kv_heads: key/value heads; divides `heads`.
      head_width: of one head, even; None gives width / heads.
      mlp_width: hidden width of the gated MLP, or of one expert; None gives 3 * width.
      mlp_bias: the projections of the MLP, or of every expert, have biases.
      activation: of the gate; clamped_swiglu is gate * sigmoid(1.702 gate) * (up + 1), with gate at most
        `activation_limit` and up clipped to +-`activation_limit`.
      activation_limit: of clamped_swiglu.
      latent: keys and values are projections of a latent vector; then `head_width` is the rotated width, and there are
        as many key/value heads as heads.
      delta: some layers are gated delta-nets, which have a recurrent state instead of keys and values.
      global_heads: heads of layers without a window; None for those of the other layers.
      reading_layers: number of last layers that attend to the keys and values of the last earlier layer of their kind.
      reading_mlp_width: hidden width of the MLP of these layers; None is `mlp_width`.
      per_layer: every layer has an additional embedding table.
      layer_scales: the residual stream is multiplied after each layer by a scalar that is not trained.
      value_norm: RMSNorm without gains on values.
      experts: replaces the MLP of every block by a mixture of experts.
      rope_base: base of the rotary angles.
      rope_scaling: scales the angles for a context longer than that of pre-training.
      rope_fraction: share of each head's dimensions that are rotated; the others carry no position.
      rope_pattern: which layers have rotary positions, repeated over the layers.
      rope_interleaved: dimensions are rotated in pairs (2i, 2i + 1) instead of (i, i + half).
      window: tokens that a query of a windowed layer attends to, including its own.
      window_pattern: which layers are windowed, repeated over the layers; needs `window`.
      local_rope_base: base of the rotary angles in windowed layers, which are then not scaled; None is `rope_base`.
      qk_norm: RMSNorm on queries and keys before rotation.
      qk_norm_span: over each head separately, or over all heads of a token together.
      qkv_bias: the query, key and value projections have biases.
      attention_out_bias: the output projection of the attention has a bias.
      query_scale: factor on the attention scores; None gives 1 / sqrt(head_width).
      attention_gate: the output of each head is multiplied by the sigmoid of a projection of the token.
      attention_sinks: each query head has a learned score that takes part in the softmax and has no value.
      attention_cap: scores s become cap * tanh(s / cap) before the softmax.
      logits_cap: the same for the logits.
      norm_epsilon: added to the mean square in RMSNorm.
      norm_offset: added to every gain of a norm; 1 for checkpoints that store gains minus one.
      pre_norms: RMSNorm on the inputs of the attention and the MLP.
      post_norms: RMSNorm on the outputs of the attention and the MLP.
      residual_scale: factor on these outputs before they are added to the residual stream.
      embedding_scale: factor on the embedded tokens.
      logits_divisor: divisor of the logits, applied before their cap.
      tie_embeddings: the embedding table is also the output projection.
      attention: how attention is computed, see attention.py; "auto" chooses by backend, dtype and shape.
      layer_loop: "unrolled" is about twice as fast on CPU, "scanned" compiles one block for any depth; "auto" unrolls
        on CPU.
      remat: which activations the backward pass recomputes (a training run sets it from training.remat).
      parameter_dtype: storage dtype.
      compute_dtype: dtype of matrix products; norms, softmax and statistics are float32 regardless.
      cache_dtype: dtype of keys and values in the cache: "compute" is the compute dtype; "int8" needs a quarter of
        float32's memory, and log-probabilities of sampling then differ from those of the trainer.
      cache_layout: memory of keys and values in decoding: "contiguous" gives every row as many slots as the longest;
        "paged" gives it pages for its own tokens; "auto" is paged on one TPU if its kernel supports the head size.
    """

    vocabulary_size: Count
    width: Count = 128
    layers: Layers = 4
    heads: Count = 4
    kv_heads: Count = 2
    head_width: Count | None = None
    mlp_width: Count | None = None
    mlp_bias: bool = False
    activation: Activation = "silu"
    activation_limit: Positive = 7.0
    latent: LatentConfig | None = None
    delta: DeltaConfig | None = None
    global_heads: GlobalConfig | None = None
    reading_layers: int = 0
    reading_mlp_width: Count | None = None
    per_layer: PerLayerConfig | None = None
    layer_scales: bool = False
    value_norm: bool = False
    experts: ExpertsConfig | None = None
    rope_base: Positive = 10_000.0
    rope_scaling: RopeScaling | None = None
    rope_fraction: float = 1.0
    rope_pattern: tuple[bool, ...] = (True,)
    rope_interleaved: bool = False
    window: Count | None = None
    window_pattern: tuple[bool, ...] = (True,)
    local_rope_base: Positive | None = None
    qk_norm: bool = True
    qk_norm_span: NormSpan = "head"
    qkv_bias: bool = False
    attention_out_bias: bool = False
    query_scale: Positive | None = None
    attention_gate: bool = False
    attention_sinks: bool = False
    attention_cap: Positive | None = None
    logits_cap: Positive | None = None
    norm_epsilon: Positive = 1e-6
    norm_offset: float = 0.0
    pre_norms: bool = True
    post_norms: bool = False
    residual_scale: Positive = 1.0
    embedding_scale: Positive = 1.0
    logits_divisor: Positive = 1.0
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
                f"model.cache_layout is 'paged' and model.cache_dtype is {self.cache_dtype!r}; pages have the compute "
                "dtype, so remove one of the two"
            )
        self._check_heads()
        self._check_patterns()
        if self.experts is not None and self.experts.dense_layers >= self.layers:
            raise ValueError(
                f"model.experts.dense_layers is {self.experts.dense_layers} of {self.layers} layers, so no layer has "
                "experts; lower it, or remove experts"
            )
        self._check_kernels()

    def _check_kernels(self):
        if self.attention in ("xla", "cudnn") and self.attention_cap is not None:
            raise ValueError(
                f"model.attention is {self.attention!r}, which does not support a soft cap, but model.attention_cap is "
                f"{self.attention_cap}; use auto, plain or splash"
            )
        if self.of_several_kinds and self.cache_layout == "paged":
            raise ValueError(
                "model.cache_layout is 'paged', which does not support a model with model.delta or model.global_heads; "
                "use auto or contiguous"
            )
        special = "attention_sinks" if self.attention_sinks else "latent" if self.latent is not None else None
        if special and (self.attention not in ("auto", "plain") or self.cache_layout == "paged"):
            raise ValueError(
                f"model.attention is {self.attention!r} and model.cache_layout {self.cache_layout!r}, which do not "
                f"support model.{special}; use attention auto or plain, and cache_layout auto or contiguous"
            )
        if self.attention == "cudnn" and self.compute_dtype != "bfloat16":
            raise ValueError(
                f"model.attention is 'cudnn', which computes in bfloat16 only, but model.compute_dtype is "
                f"{self.compute_dtype!r}; set it to bfloat16, or use auto"
            )

    def _check_heads(self):
        if (latent := self.latent) is not None:
            for name, needed in (("kv_heads", self.heads), ("head_width", latent.rope_width)):
                if getattr(self, name) != needed:
                    raise ValueError(
                        f"model.{name} is {getattr(self, name)}, but with model.latent it must be {needed}"
                    )
            for name in ("qk_norm", "qkv_bias", "attention_sinks", "attention_gate"):
                if getattr(self, name):
                    raise ValueError(f"model.{name} is true, which latent attention does not support; set it to false")
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
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "longrope" and 2 * len(scaling.short) != self.rotary_size:
            raise ValueError(
                f"model.rope_scaling has {len(scaling.short)} short and long factors for {self.rotary_size} rotated "
                "dimensions; give half as many"
            )

    def _check_patterns(self):
        require_layer_kinds(self)
        patterns = {"window_pattern": self.window_pattern, "rope_pattern": self.rope_pattern}
        if self.delta is not None:
            patterns["delta.pattern"] = self.delta.pattern
            if (self.experts is not None and self.experts.dense_layers) or "blocks" not in self.stacks:
                raise ValueError(
                    f"model.delta.pattern is {self.delta.pattern} for {self.layers} layers: at least one of them must "
                    "have attention, and model.experts.dense_layers must be 0"
                )
        for name, pattern in patterns.items():
            if not pattern:
                raise ValueError(f"model.{name} is empty; give one boolean per layer, or a pattern that repeats")
            if len(pattern) > self.layers:
                raise ValueError(f"model.{name} has {len(pattern)} entries for {self.layers} layers; shorten it")
        if self.window is None and (self.local_rope_base is not None or self.window_pattern != (True,)):
            raise ValueError(
                f"model.window is not set, but model.local_rope_base is {self.local_rope_base} and "
                f"model.window_pattern is {self.window_pattern}, which apply only to windowed layers; set "
                "model.window, or remove them"
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
        width = self.head_size + (0 if self.latent is None else self.latent.plain_width)
        return self.query_scale or width**-0.5

    @property
    def plain_attention(self) -> bool:
        """Whether no attention kernel supports this model."""
        return self.attention_sinks or self.latent is not None

    @property
    def of_several_kinds(self) -> bool:
        """Whether layers differ in the kind or shape of their cache."""
        return self.delta is not None or self.global_heads is not None

    @property
    def cached_sizes(self) -> tuple[int, int, int]:
        """(key/value heads, width of a key, width of a value) in a cache; latent keys contain the values."""
        if self.latent is None:
            return self.kv_heads, self.head_size, self.head_size
        return 1, self.latent.rank + self.latent.rope_width, 0

    @property
    def stack_of_layer(self) -> tuple[str, ...]:
        """The stack of blocks in the parameters that each layer belongs to."""
        if self.delta is not None:
            return tuple("delta_blocks" if recurrent else "blocks" for recurrent in self.recurrent)
        if self.global_heads is not None:
            read = self.layers - self.reading_layers
            kinds = ["" if windowed else "global_" for windowed in self.windowed]
            return tuple(f"{kind}{'reading_' * (i >= read)}blocks" for i, kind in enumerate(kinds))
        dense = 0 if self.experts is None else self.experts.dense_layers
        return ("dense_blocks",) * dense + ("blocks",) * (self.layers - dense)

    @property
    def stacks(self) -> dict[str, tuple[int, ...]]:
        """The layers of each stack, in the order of the stacks' first layers."""
        return _places(self.stack_of_layer)

    @property
    def caches(self) -> dict[str, tuple[int, ...]]:
        """The layers in each group of caches of one kind and shape; reading layers have no cache."""
        alike = ["blocks" if stack == "dense_blocks" else stack for stack in self.stack_of_layer]
        kinds = {windowed for name, windowed in zip(alike, self.windowed, strict=True) if name == "blocks"}
        if len(kinds) > 1:
            alike = [
                "windowed_blocks" if windowed and name == "blocks" else name
                for name, windowed in zip(alike, self.windowed, strict=True)
            ]
        return {name: layers for name, layers in _places(alike).items() if "reading" not in name}

    def of_stack(self, stack: str) -> TransformerConfig:
        """A config with the sizes of one stack of blocks."""
        if self.global_heads is None:
            return self
        changed: dict[str, Any] = {"global_heads": None, "reading_layers": 0, "reading_mlp_width": None}
        if stack.startswith("global_"):
            changed |= {"head_width": self.global_heads.head_width, "kv_heads": self.global_heads.kv_heads}
        if "reading" in stack:
            changed["mlp_width"] = self.reading_mlp_width or self.mlp_width
        return replace(self, **changed)

    def slots_of(self, stack: str) -> int:
        """Vectors of a key/value head in the fused projection: queries, each followed by its gate, key and value."""
        own = self.of_stack(stack)
        queries = (2 if self.attention_gate else 1) * own.queries_per_kv
        shared = self.global_heads is not None and self.global_heads.values_are_keys and stack.startswith("global_")
        return queries + (0 if "reading" in stack else 1 if shared else 2)

    @property
    def windowed(self) -> tuple[bool, ...]:
        """Whether each layer is windowed."""
        return self._in_every_layer((False,) if self.window is None else self.window_pattern)

    @property
    def rotated(self) -> tuple[bool, ...]:
        """Whether the queries and keys of each layer are rotated."""
        return self._in_every_layer(self.rope_pattern)

    @property
    def recurrent(self) -> tuple[bool, ...]:
        """Whether each layer is a gated delta-net."""
        return self._in_every_layer((False,) if self.delta is None else self.delta.pattern)

    def _in_every_layer(self, pattern: tuple[bool, ...]) -> tuple[bool, ...]:
        return tuple(pattern[layer % len(pattern)] for layer in range(self.layers))

    def for_context(self, tokens: int) -> TransformerConfig:
        """The config for sequences of at most `tokens` tokens, which determines the set of longrope's factors.

        Raises:
          ValueError: for more tokens than the rotary angles support.
        """
        scaling = self.rope_scaling
        if scaling is None or scaling.kind not in ("dynamic", "longrope"):
            return self
        extended = tokens > (scaling.original_positions or 0)
        if extended and scaling.kind == "dynamic":
            raise ValueError(
                f"sequences of {tokens} tokens are longer than max_position_embeddings {scaling.original_positions}, "
                "beyond which rope_scaling 'dynamic' depends on the length of each batch, which is not supported; use "
                "shorter sequences"
            )
        return replace(self, rope_scaling=replace(scaling, extended=extended))

    @property
    def unrolled(self) -> bool:
        """Whether the loop over blocks is unrolled."""
        return self.layer_loop == "unrolled" or (self.layer_loop == "auto" and backend_in_use() == "cpu")


def _places(names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The indices of each name."""
    return {name: tuple(i for i, other in enumerate(names) if other == name) for name in dict.fromkeys(names)}
