"""Sizes of layers with another mechanism instead of, or beside, ordinary attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from jaxrl_llm.models.json_types import MOST_LAYERS
from jaxrl_llm.ranges import Count, Range, require_ranges

Layers = Annotated[int, Range(1, MOST_LAYERS)]


@dataclass(frozen=True)
class LatentConfig:
    """Sizes of latent attention, see latent.py.

    Attributes:
      rank: width of the latent vector, of which keys and values are projections.
      rope_width: width of the key that all heads share and that is rotated, and of that part of each query.
      plain_width: width of the part of each query and key that is not rotated.
      value_width: of one head's values.
      query_rank: width that queries are projected from; None projects them from the residual stream.
    """

    rank: Count
    rope_width: Count
    plain_width: Count
    value_width: Count
    query_rank: Count | None = None

    def __post_init__(self):
        require_ranges(self, "model.latent")


@dataclass(frozen=True)
class DeltaConfig:
    """Sizes of gated delta-net layers, see delta.py, and the choice of these layers.

    Attributes:
      key_heads: heads of queries and keys.
      value_heads: heads of values, each with its own state; a multiple of `key_heads`.
      key_width: of one query or key.
      value_width: of one value.
      kernel: tokens that the convolution before them sees, the own one included.
      pattern: which layers are such, repeated over the layers; the others are attention.
    """

    key_heads: Count
    value_heads: Count
    key_width: Count
    value_width: Count
    kernel: Count = 4
    pattern: tuple[bool, ...] = (True, True, True, False)

    def __post_init__(self):
        require_ranges(self, "model.delta")
        if self.value_heads % self.key_heads:
            raise ValueError(
                f"model.delta.value_heads is {self.value_heads}, which key_heads {self.key_heads} does not divide"
            )
        if not self.pattern:
            raise ValueError("model.delta.pattern is empty; give one boolean a layer, or a pattern that repeats")

    @property
    def values_per_key(self) -> int:
        """Value heads that share one head of queries and keys."""
        return self.value_heads // self.key_heads

    @property
    def mixed_width(self) -> int:
        """Entries of one key head that the convolution goes over: a query, a key, and the values that share them."""
        return 2 * self.key_width + self.values_per_key * self.value_width


@dataclass(frozen=True)
class GlobalConfig:
    """Attention of the layers that are not windowed, where its heads are others than those of windowed layers.

    Attributes:
      head_width: of one head.
      kv_heads: key/value heads.
      values_are_keys: one projection makes both, which differ in norm and rotation alone.
    """

    head_width: Count
    kv_heads: Count
    values_are_keys: bool = False

    def __post_init__(self):
        require_ranges(self, "model.global_heads")


@dataclass(frozen=True)
class PerLayerConfig:
    """Embeddings of a token for every layer: of the token itself, and projected from its embedding.

    Attributes:
      width: of each.
      vocabulary_size: symbols that have them.
    """

    width: Count
    vocabulary_size: Count

    def __post_init__(self):
        require_ranges(self, "model.per_layer")


def require_layer_kinds(model: Any) -> None:
    """Raises ValueError where what a `TransformerConfig` says of kinds of layers contradicts itself."""
    if model.global_heads is None and model.reading_layers:
        raise ValueError(f"model.reading_layers is {model.reading_layers}, which needs model.global_heads; set both")
    if model.reading_mlp_width is not None and not model.reading_layers:
        raise ValueError(
            f"model.reading_mlp_width is {model.reading_mlp_width}, which is the width of model.reading_layers, but "
            "there are none; set both, or leave both out"
        )
    if model.global_heads is None:
        return
    if model.delta is not None:
        raise ValueError("model.global_heads and model.delta are set, which both say what layers are; keep one")
    if model.experts is not None and model.experts.dense_layers:
        raise ValueError(
            f"model.experts.dense_layers is {model.experts.dense_layers}, but with model.global_heads every layer "
            "has experts; set it to 0, or leave global_heads out"
        )
    if not {"blocks", "global_blocks"} <= set(model.stacks):
        raise ValueError(
            f"model.global_heads is set, but of {model.layers} layers, the last {model.reading_layers} of which read "
            f"(model.reading_layers), the others are all with a window or all without: model.window is "
            f"{model.window} and model.window_pattern {model.window_pattern}; there must be one of each before those"
        )
    try:
        model.of_stack("global_blocks")
    except ValueError as error:
        told = str(error)
        for name in ("head_width", "kv_heads"):
            told = told.replace(f"model.{name}", f"model.global_heads.{name}")
        raise ValueError(f"in layers without a window, {told}") from None
