"""Rotary positions: frequencies, their scaling to longer contexts, and the rotation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.parallel.backend import backend_in_use
from jaxrl_llm.parallel.rules import shards
from jaxrl_llm.ranges import Count, Positive, Range, require_ranges

RopeKind = Literal["linear", "dynamic", "llama3", "yarn", "longrope", "proportional"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are scaled for a context longer than that of pre-training.

    Attributes:
      kind: "linear" divides every frequency by `factor` (position interpolation, arXiv 2306.15595); "dynamic" changes
        nothing up to the original context and refuses longer sequences, for which it would depend on the length;
        "llama3" divides only low frequencies (arXiv 2407.21783); "yarn" divides along a ramp over dimensions and scales
        the attention scores (arXiv 2309.00071); "longrope" divides each frequency by its own factor (arXiv
        2402.13753); "proportional" divides every frequency by `factor` and sets all but the first ones to zero.
      factor: new context / original context.
      original_positions: the original context in tokens; all but linear and proportional.
      low_frequency: frequencies with fewer periods than this in the original context are divided; llama3 only.
      high_frequency: frequencies with more periods than this are unchanged; llama3 only.
      beta_slow: periods in the original context below which a dimension is divided; yarn only.
      beta_fast: periods above which it is unchanged; yarn only.
      truncate: the ends of the ramp are rounded outwards to whole dimensions; yarn only.
      magnitude: factor on cosine and sine; yarn and longrope only. None is 0.1 log(factor) + 1 for yarn, and
        sqrt(1 + log(factor) / log(original_positions)) for longrope.
      short: divisor of each frequency in longrope, for a run whose sequences fit into the original context.
      long: the same for a run with longer sequences.
      extended: whether the run has longer sequences; None if their length is unknown.
      turning: share of the frequencies that are not zero; proportional only.
      query_growth: a query at position p is multiplied by 1 + query_growth * log(1 + floor(p / original_positions)).
    """

    kind: RopeKind
    factor: Annotated[float, Range(1)]
    original_positions: Count | None = None
    low_frequency: Positive = 1.0
    high_frequency: Positive = 4.0
    beta_slow: Positive = 1.0
    beta_fast: Positive = 32.0
    truncate: bool = True
    magnitude: Positive | None = None
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    extended: bool | None = None
    turning: float = 1.0
    query_growth: float = 0.0

    def __post_init__(self):
        if self.kind not in get_args(RopeKind):
            known = ", ".join(get_args(RopeKind))
            raise ValueError(f"model.rope_scaling.kind is {self.kind!r}; it must be one of {known}")
        require_ranges(self, "model.rope_scaling")
        if self.kind not in ("linear", "proportional") and (self.original_positions or 0) < 2:
            raise ValueError(
                f"model.rope_scaling.original_positions is {self.original_positions}, which {self.kind} needs; set it "
                "to the context length of pre-training"
            )
        if self.low_frequency >= self.high_frequency or self.beta_slow >= self.beta_fast:
            raise ValueError(
                f"model.rope_scaling has low_frequency {self.low_frequency}, high_frequency {self.high_frequency}, "
                f"beta_slow {self.beta_slow} and beta_fast {self.beta_fast}; low_frequency must be below "
                "high_frequency, and beta_slow below beta_fast"
            )
        if self.kind == "longrope" and not (self.short and len(self.short) == len(self.long)):
            raise ValueError(
                f"model.rope_scaling has {len(self.short)} short and {len(self.long)} long factors; longrope needs one "
                "of each for every frequency"
            )

    @property
    def amplitude(self) -> float:
        """Factor on cosine and sine."""
        if self.magnitude is not None or self.factor <= 1 or self.kind not in ("yarn", "longrope"):
            return 1.0 if self.magnitude is None else self.magnitude
        if self.kind == "yarn":
            return 0.1 * math.log(self.factor) + 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_positions or 0))

    @property
    def limit(self) -> int | None:
        """The longest sequence whose angles are correct if the length of sequences is unknown; None for no limit."""
        return self.original_positions if self.kind in ("dynamic", "longrope") and self.extended is None else None


def rotary_frequencies(size: int, base: float, scaling: RopeScaling | None = None) -> Float[Array, "R"]:
    """base^(-2i/size) for i < size/2 in float32, scaled by `scaling`."""
    frequencies = base ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    if scaling is None or scaling.kind == "dynamic":
        return frequencies
    if scaling.kind == "longrope":
        return frequencies / jnp.asarray(scaling.long if scaling.extended else scaling.short, jnp.float32)
    slow = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slow
    if scaling.kind == "proportional":
        return jnp.where(jnp.arange(size // 2) < int(scaling.turning * size // 2), slow, 0.0)
    if scaling.kind == "llama3":
        turns = frequencies * (scaling.original_positions or 0) / (2 * math.pi)
        kept = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
        kept = jnp.clip(kept, 0.0, 1.0)
    else:
        first, last = _ramp(size, base, scaling)
        kept = 1.0 - jnp.clip((jnp.arange(size // 2, dtype=jnp.float32) - first) / (last - first), 0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * slow


def _ramp(size: int, base: float, scaling: RopeScaling) -> tuple[float, float]:
    """The dimensions where the ramp of YaRN starts and ends: those with beta_fast and beta_slow periods."""

    def dimension(turns: float) -> float:
        return size * math.log((scaling.original_positions or 0) / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    # A ramp of width zero would divide zero by zero.
    return first, last if last != first else last + 0.001


def rotary_angles(
    positions: Int[Array, "B T"], size: int, base: float, scaling: RopeScaling | None = None
) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
    """Cosine and sine of position * frequency for the `size` / 2 frequencies, in float32."""
    angles = positions.astype(jnp.float32)[..., None] * rotary_frequencies(size, base, scaling)
    amplitude = 1.0 if scaling is None else scaling.amplitude
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if amplitude != 1.0:
        cos, sin = amplitude * cos, amplitude * sin
    return _computed_once(cos), _computed_once(sin)


def _computed_once(x: Array) -> Array:
    """The same numbers, stored in memory: on a CPU XLA would recompute cosines for every entry of queries and keys.

    XLA fuses every operation but a matrix product into its consumers, even across optimization barriers; the product
    with the identity is exact.
    """
    if backend_in_use() != "cpu":
        return x
    return jnp.matmul(x, jnp.eye(x.shape[-1], dtype=x.dtype), precision="highest")


def rotate(
    x: Float[Array, "B T K G H"], angles: tuple[Array, Array], *, interleaved: bool = False
) -> Float[Array, "B T K G H"]:
    """Rotate each head's first 2R dimensions by the angle of the token's position.

    Pairs are (i, i + R), or with `interleaved` (2i, 2i + 1). The result has pairs (i, i + R) in both cases, which gives
    the same products of queries and keys.
    """
    shape = x.shape
    if shards("rows", "positions") == 1:
        # With all tokens on one axis, XLA on a CPU computes the rotation once, and not again for each layout.
        x, (cos, sin) = x.reshape(-1, 1, *shape[2:]), (a.reshape(-1, 1, a.shape[-1]) for a in angles)
    else:
        cos, sin = angles
    cos, sin = cos[:, :, None, None, :], sin[:, :, None, None, :]
    size = 2 * cos.shape[-1]
    wide = x.astype(jnp.float32)
    if interleaved:
        first, second = wide[..., 0:size:2], wide[..., 1:size:2]
    else:
        first, second = jnp.split(wide[..., :size], 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    rest = [wide[..., size:]] if size < x.shape[-1] else []
    return jnp.concatenate(turned + rest, axis=-1).astype(x.dtype).reshape(shape)


def require_in_context(scaling: RopeScaling | None, tokens: int) -> None:
    """Check that sequences of this length have correct angles.

    Raises:
      ValueError: if they are longer than `RopeScaling.limit`.
    """
    if scaling is not None and scaling.limit is not None and tokens > scaling.limit:
        raise ValueError(
            f"sequences of {tokens} tokens are longer than {scaling.limit}, the largest length for which the rotary "
            f"angles of this model ({scaling.kind}) are correct; load it with context_tokens, the length of the "
            "longest sequence"
        )
