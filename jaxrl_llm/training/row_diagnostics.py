"""Relations between the rewards of a batch, and shares of degenerate completions.

These metrics are computed inside the program of every step at little cost, and show reward hacking early.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Experience
from jaxrl_llm.token_codes import SEEDS, ngram_codes, token_codes

NGRAM = 4


def within_groups(
    first: Float[Array, "B M"], second: Float[Array, "B M"], group: Int[Array, "B"], weight: Float[Array, "B"]
) -> tuple[Float[Array, "M"], Float[Array, "M"]]:
    """Agreement of two numbers on the samples of each prompt: (correlation, STARC distance) of each column.

        rho = <C(x), C(y)> / (|C(x)| |C(y)|),   d = | C(x) / |C(x)| - C(y) / |C(y)| | / 2 = sqrt((1 - rho) / 2)

    C subtracts the mean of each group, so that neither the difficulty of prompts nor the scale matters. d is 0 if the
    two differ only by a scale and an offset per prompt, and 1 if they are opposite. Neither is defined (NaN) if one of
    the two is constant in each group.

    Args:
      first, second: numbers of each row; rows where either is NaN are left out of the column.
      group: ids of the groups.
      weight: weight of each row; rows of weight 0 are left out.

    Reference: STARC (2309.15257), for one-step problems.
    Certainty: reconstructed
    """
    chex.assert_equal_shape([first, second])
    there = jnp.where(jnp.isnan(first) | jnp.isnan(second), 0.0, weight[:, None])
    values = [jnp.where(there > 0, x.astype(jnp.float32), 0.0) for x in (first, second)]
    totals = jax.ops.segment_sum(jnp.concatenate([there, *(there * x for x in values)], 1), group, len(group))[group]
    count, *sums = jnp.split(totals, 3, axis=1)

    def unit(x: Array, total: Array) -> tuple[Array, Array]:
        centred = jnp.where(there > 0, x - total / jnp.where(count > 0, count, 1.0), 0.0)
        norm, size = (jnp.sqrt((there * jnp.square(y)).sum(0)) for y in (centred, x))
        differs = norm > 1e-5 * size  # for equal values only rounding errors remain
        return centred / jnp.where(differs, norm, 1.0), differs

    (one, varies), (other, also) = map(unit, values, sums)
    found = (there * one * other).sum(0), jnp.sqrt((there * jnp.square(one - other)).sum(0)) / 2
    correlation, distance = (jnp.where(varies & also, x, jnp.nan) for x in found)
    return correlation, distance


def reward_relations(
    components: Float[Array, "B K"],
    others: dict[str, Float[Array, "B"]],
    group: Int[Array, "B"],
    weight: Float[Array, "B"],
    names: Sequence[str],
    total: Float[Array, "B"] | None = None,
) -> dict[str, Float[Array, ""]]:
    """Relations of rewards within groups: correlations with each other and with other numbers, distances, constant
    groups.

    Args:
      components: one column per reward; NaN where it does not apply.
      others: other numbers of each row to correlate with, such as the length.
      group: ids of the groups.
      weight: of each row.
      names: of the rewards.
      total: the reward that training maximises; the distance of each of several rewards from it is `starc/<reward>`.

    Returns:
      by name; NaN for what is not defined: relations with a number that is constant in each group, and the share of
      constant groups of a reward that applies to no row.
    """
    chex.assert_rank(components, 2)
    columns = dict(zip(names, components.T, strict=True))
    compared = {f"{a}/{b}": (columns[a], columns[b]) for a, b in combinations(names, 2)}
    compared |= {f"{a}/{b}": (columns[a], x.astype(jnp.float32)) for a in names for b, x in others.items()}
    distant = {} if total is None or len(names) < 2 else {name: (columns[name], total) for name in names}
    first, second = (jnp.stack([pair[i] for pair in (*compared.values(), *distant.values())], 1) for i in (0, 1))
    correlation, distance = within_groups(first, second, group, weight)
    found = {f"reward_correlation/{name}": correlation[i] for i, name in enumerate(compared)}
    found |= {f"starc/{name}": distance[len(compared) + i] for i, name in enumerate(distant)}
    # Share of the groups in which a reward is constant, among those that it applies to.
    applies = (weight[:, None] > 0) & ~jnp.isnan(components)
    ends = jnp.where(jnp.concatenate([applies] * 2, 1), jnp.concatenate([components, -components], 1), -jnp.inf)
    highest, lowest = jnp.split(jax.ops.segment_max(ends, group, len(group)), 2, axis=1)
    exists = highest > -jnp.inf
    count = exists.sum(0)
    shares = jnp.where(count > 0, (exists & (highest <= -lowest)).sum(0) / jnp.maximum(count, 1), jnp.nan)
    return found | {f"reward/{name}_constant_groups": shares[i] for i, name in enumerate(names)}


def degenerate_completions(
    rows: Experience, weight: Float[Array, "B"], scripts: Int[np.ndarray, "V"] | None = None
) -> dict[str, Float[Array, ""]]:
    """Shares of completions that are empty, duplicate an earlier one of their prompt, or use a foreign script; and the
    share of repeated n-grams.

    Args:
      rows: a batch.
      weight: of each row as it was sampled.
      scripts: script of each token of the vocabulary (`data.token_scripts`); None if all are Latin.
    """
    rows_there = jnp.maximum(weight.sum(), 1.0)
    mean = lambda x: (x * weight).sum() / rows_there  # noqa: E731
    there = jnp.arange(rows.tokens.shape[1]) < rows.length[:, None]
    # Rows are compared by two 32-bit hashes. After sorting, equal rows are adjacent; all but the first are duplicates.
    place = jnp.arange(rows.tokens.shape[1])
    codes = [jnp.where(there, token_codes(rows.tokens, place, seed=seed), 0).sum(1, dtype=jnp.uint32) for seed in SEEDS]
    keys = (*codes, rows.length, rows.group, weight <= 0)
    order = jnp.lexsort(keys)
    repeats = jnp.stack([key[order][1:] == key[order][:-1] for key in keys]).all(0)
    found = {
        "duplicate_share": mean(jnp.zeros(len(weight), bool).at[order[1:]].set(repeats)),
        "empty_share": mean((rows.length <= 1) & ~rows.truncated.astype(bool)),
        "repeated_ngram_share": mean(repeated_ngrams(rows.tokens, rows.length)),
    }
    if scripts is not None:
        prompt_there = jnp.arange(rows.prompt_tokens.shape[1]) >= (
            rows.prompt_tokens.shape[1] - rows.prompt_length[:, None]
        )
        known, used = (
            _scripts_in(tokens, inside, scripts)
            for tokens, inside in ((rows.prompt_tokens, prompt_there), (rows.tokens, there))
        )
        found["foreign_script_share"] = mean((used & ~known) != 0)
    return found


def repeated_ngrams(tokens: Int[Array, "B T"], length: Int[Array, "B"], *, ngram: int = NGRAM) -> Float[Array, "B"]:
    """Share of the n-grams of a completion that occurred in it before; 0 for fewer than n tokens.

    N-grams are compared by a 32-bit hash: for 10,000 tokens about one completion in a hundred is off by one.
    """
    places = tokens.shape[1] - ngram + 1
    if places < 1:
        return jnp.zeros(tokens.shape[0], jnp.float32)
    code = ngram_codes(tokens, ngram)
    count = jnp.maximum(length - ngram + 1, 0)
    last = jnp.uint32(0xFFFFFFFF)  # missing n-grams are sorted to the end
    code = jnp.sort(jnp.where(jnp.arange(places) < count[:, None], jnp.minimum(code, last - 1), last), axis=1)
    again = ((code[:, 1:] == code[:, :-1]) & (code[:, 1:] != last)).sum(1)
    return again / jnp.maximum(count, 1).astype(jnp.float32)


def _scripts_in(tokens: Int[Array, "B T"], inside: Array, scripts: Int[np.ndarray, "V"]) -> Array:
    """One bit for each script in the tokens of a row."""
    of_token = jnp.asarray(scripts)[tokens]
    bits = jnp.where(inside & (of_token > 0), 1 << of_token, 0)
    return jax.lax.reduce(bits, jnp.int32(0), jax.lax.bitwise_or, (1,))
