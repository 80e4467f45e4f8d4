"""Generators of f-divergences: the convex functions f of D_f(p || q) = E_q[f(p / q)].

Every generator is normalised, f(1) = 0 and f'(1) = 0, so each sample contributes at least zero (adding c * (u - 1) to
f changes no divergence). A generator is written as its perspective, (log p, log q) -> q * f(p / q): the one form that
serves exact sums over a vocabulary, samples of q (log q = 0) and samples of p (log p = 0) without overflow.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.ranges import ranged

Direction = Literal["policy_to_reference", "reference_to_policy"]

LOG_RATIO_LIMIT = 20.0  # exp(20) squared still fits float32
SQUARE_LOG_RATIO_LIMIT = 5.0  # u^2 and 1/u^2: a single sample would dominate the batch long before overflow


def clamped(log_u: Float[Array, "..."], limit: float) -> Float[Array, "..."]:
    """log u within +-limit; straight-through, so beyond the limit the gradient is that at the limit.

    A plain clip has no gradient outside: a policy with near-zero probability on a token of the reference would not be
    pulled back.
    """
    return log_u + jax.lax.stop_gradient(jnp.clip(log_u, -limit, limit) - log_u)


@dataclass(frozen=True)
class Generator:
    """A normalised generator f of D_f(policy || reference), u = policy / reference.

    Attributes:
      name: its name in `generator`.
      perspective: (log p, log q) -> q * f(p / q), elementwise; finite for any finite arguments.
      slope: (log p, log q) -> p * f'(p / q), the derivative of the perspective by log p; finite likewise.
      conjugate: t -> f*(t) = sup_u (u t - f(u)), infinite outside its domain.
      limit: bound on |log u| in the three methods below (sampled forms).
    """

    name: str
    perspective: Callable[[Array, Array], Array]
    slope: Callable[[Array, Array], Array]
    conjugate: Callable[[Array], Array]
    limit: float = LOG_RATIO_LIMIT

    def value(self, log_u: Float[Array, "..."]) -> Float[Array, "..."]:
        """f(u), the value of a sample of the reference."""
        log_u = clamped(log_u, self.limit)
        return self.perspective(log_u, jnp.zeros_like(log_u))

    def value_over_u(self, log_u: Float[Array, "..."]) -> Float[Array, "..."]:
        """f(u) / u, the value of a sample of the policy."""
        log_u = clamped(log_u, self.limit)
        return self.perspective(jnp.zeros_like(log_u), -log_u)

    def derivative(self, log_u: Float[Array, "..."]) -> Float[Array, "..."]:
        """f'(u), the weight of the score function."""
        log_u = clamped(log_u, self.limit)
        return self.slope(jnp.zeros_like(log_u), -log_u)


def _compared(log_p: Array, log_q: Array) -> tuple[Array, Array]:
    """Whether p < q, and -|log p - log q|: a choice, since the gradient of an absolute value would be 0 at p = q."""
    less = log_p < log_q
    return less, jnp.where(less, log_p - log_q, log_q - log_p)


def _difference(log_p: Array, log_q: Array) -> Array:
    """p - q, to full precision where p is close to q and without overflow."""
    less, gap = _compared(log_p, log_q)
    size = jnp.exp(jnp.where(less, log_q, log_p)) * jnp.expm1(gap)
    return jnp.where(less, size, -size)


def _log_mixture(less: Array, gap: Array, share: float) -> Array:
    """log((share * p + (1 - share) * q) / max(p, q)), which is bounded, from what `_compared` returns."""
    shrunk = jnp.expm1(gap)
    return jnp.log1p(jnp.where(less, share * shrunk, (1 - share) * shrunk))


def _reverse_kl() -> Generator:
    return Generator(
        "reverse_kl",
        perspective=lambda p, q: jnp.exp(p) * (p - q) - _difference(p, q),
        slope=lambda p, q: jnp.exp(p) * (p - q),
        conjugate=jnp.expm1,
    )


def _forward_kl() -> Generator:
    return Generator(
        "forward_kl",
        perspective=lambda p, q: _difference(p, q) - jnp.exp(q) * (p - q),
        slope=_difference,
        conjugate=lambda t: jnp.where(t < 1, -jnp.log1p(-jnp.minimum(t, 1)), jnp.inf),
    )


def _jensen_shannon(mixture: float) -> Generator:
    # log(M / max(p, q)), plus |log p - log q| for the smaller of p and q, gives both log(M / p) and log(M / q).
    def perspective(p, q):
        less, gap = _compared(p, q)
        policy_part, reference_part = mixture * jnp.exp(p), (1 - mixture) * jnp.exp(q)
        smaller_part = jnp.where(less, policy_part, reference_part)
        return smaller_part * gap - (policy_part + reference_part) * _log_mixture(less, gap, mixture)

    def slope(p, q):
        less, gap = _compared(p, q)
        midpoint = _log_mixture(less, gap, mixture)
        return mixture * jnp.exp(p) * jnp.where(less, gap - midpoint, -midpoint)

    def conjugate(t):
        rest = 1 - mixture * jnp.exp(t / mixture)
        return jnp.where(rest > 0, (1 - mixture) * (math.log(1 - mixture) - jnp.log(jnp.maximum(rest, 0))), jnp.inf)

    return Generator(
        "jensen_shannon",
        perspective=perspective,
        slope=slope,
        conjugate=conjugate,
    )


def _alpha(alpha: float) -> Generator:
    power = max(abs(alpha), abs(1 - alpha))

    def log_moment(p, q):
        log_u = p - q if 0 < alpha < 1 else clamped(p - q, min(LOG_RATIO_LIMIT, 2 * LOG_RATIO_LIMIT / power))
        # p^a q^(1-a), written relative to the larger of p and q: past the clamp it still grows with that probability.
        return p + (alpha - 1) * log_u if alpha > 1 else q + alpha * log_u

    def perspective(p, q):
        return (_difference(log_moment(p, q), q) - alpha * _difference(p, q)) / (alpha * (alpha - 1))

    def conjugate(t):
        base = 1 + (alpha - 1) * t
        inside = (jnp.maximum(base, 0) ** (alpha / (alpha - 1)) - 1) / alpha
        return inside if alpha > 1 else jnp.where(base >= 0, inside, jnp.inf)

    return Generator(
        "alpha",
        perspective=perspective,
        slope=lambda p, q: _difference(log_moment(p, q), p) / (alpha - 1),
        conjugate=conjugate,
        limit=LOG_RATIO_LIMIT if power <= 1 else 2 * SQUARE_LOG_RATIO_LIMIT / power,
    )


def _chi_square() -> Generator:
    def slope(p, q):
        log_u = clamped(p - q, LOG_RATIO_LIMIT)
        return jnp.exp(p) * jnp.expm1(log_u) + _difference(p, q) * jnp.exp(log_u)

    return Generator(
        "chi_square",
        perspective=lambda p, q: _difference(p, q) * jnp.expm1(clamped(p - q, LOG_RATIO_LIMIT)),
        slope=slope,
        conjugate=lambda t: jnp.where(t >= -2, t + t**2 / 4, -1.0),
        limit=SQUARE_LOG_RATIO_LIMIT,
    )


def _neyman_chi_square() -> Generator:
    return Generator(
        "neyman_chi_square",
        perspective=lambda p, q: -_difference(p, q) * jnp.expm1(clamped(q - p, LOG_RATIO_LIMIT)),
        slope=lambda p, q: _difference(p, q + clamped(q - p, LOG_RATIO_LIMIT)),
        conjugate=lambda t: jnp.where(t <= 1, 2 - 2 * jnp.sqrt(jnp.maximum(1 - t, 0)), jnp.inf),
        limit=SQUARE_LOG_RATIO_LIMIT,
    )


def _squared_hellinger() -> Generator:
    return Generator(
        "squared_hellinger",
        perspective=lambda p, q: 0.5 * _difference(p / 2, q / 2) ** 2,
        slope=lambda p, q: 0.5 * jnp.exp(p / 2) * _difference(p / 2, q / 2),
        conjugate=lambda t: jnp.where(t < 0.5, t / (1 - 2 * jnp.minimum(t, 0.5)), jnp.inf),
    )


def _total_variation() -> Generator:
    return Generator(
        "total_variation",
        perspective=lambda p, q: 0.5 * jnp.abs(_difference(p, q)),
        slope=lambda p, q: 0.5 * jnp.exp(p) * jnp.sign(p - q),
        conjugate=lambda t: jnp.where(t <= 0.5, jnp.maximum(t, -0.5), jnp.inf),
    )


def _jeffreys() -> Generator:
    def conjugate(t):
        # W = W0(exp(1 - t)) through z = log W, the root of exp(z) + z = 1 - t; Newton's method converges from above.
        target = 1 - t
        z = jnp.where(target > 1, jnp.log(jnp.maximum(target, 1)), target)
        for _ in range(8):
            z = z - (jnp.exp(z) + z - target) / (jnp.exp(z) + 1)
        return jnp.exp(-z) + jnp.exp(z) + t - 2

    return Generator(
        "jeffreys",
        perspective=lambda p, q: _difference(p, q) * (p - q),
        slope=lambda p, q: jnp.exp(p) * (p - q) + _difference(p, q),
        conjugate=conjugate,
    )


_PLAIN: dict[str, Callable[[], Generator]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "chi_square": _chi_square,
    "neyman_chi_square": _neyman_chi_square,
    "squared_hellinger": _squared_hellinger,
    "total_variation": _total_variation,
    "jeffreys": _jeffreys,
}
_SWAPPED = {
    "reverse_kl": "forward_kl",
    "forward_kl": "reverse_kl",
    "chi_square": "neyman_chi_square",
    "neyman_chi_square": "chi_square",
}
GENERATORS = (*_PLAIN, "jensen_shannon", "alpha")


def check_divergence(name: str, direction: str, alpha: float, mixture: float) -> None:
    """Raise ValueError unless the four describe a member of the family (`renyi` included)."""
    known = (*GENERATORS, "renyi")
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(sorted(known))
        raise ValueError(f"generator is {name!r}, which is not a known divergence; {hint}")
    if direction not in get_args(Direction):
        raise ValueError(f"direction is {direction!r}; it must be one of {', '.join(get_args(Direction))}")
    if name in ("alpha", "renyi"):
        if not math.isfinite(alpha) or alpha in (0, 1):
            raise ValueError(
                f"alpha is {alpha!r}; the order must be a finite number other than 0 and 1, whose limits have names of "
                "their own: generator='forward_kl' for alpha 0, generator='reverse_kl' for alpha 1"
            )
        if name == "renyi" and alpha < 0:
            raise ValueError(
                f"alpha is {alpha!r}; the Rényi divergence is negative for an order below 0, use alpha > 0"
            )
    elif alpha != 0.5:
        raise ValueError(f"alpha is {alpha!r}, but generator {name!r} has no order; leave alpha out or ask for 'alpha'")
    if name == "jensen_shannon":
        if not 0 < mixture < 1:
            raise ValueError(f"mixture is {mixture!r}; the policy's share in the midpoint must lie between 0 and 1")
    elif mixture != 0.5:
        raise ValueError(
            f"mixture is {mixture!r}, but generator {name!r} has no midpoint; leave mixture out or ask for "
            "'jensen_shannon'"
        )


@ranged
def generator(
    name: str,
    *,
    direction: Direction = "policy_to_reference",
    alpha: float = 0.5,
    mixture: float = 0.5,
) -> Generator:
    r"""The normalised generator f of a divergence, E_reference[f(u)] with u = policy / reference.

        reverse_kl         u log u - u + 1                                  KL(policy || reference)
        forward_kl         u - 1 - log u                                    KL(reference || policy)
        jensen_shannon     m u log u - (m u + 1 - m) log(m u + 1 - m)       m KL(policy || M) + (1-m) KL(reference || M)
        alpha              (u^a - a u - (1 - a)) / (a (a - 1))              a -> 1 reverse KL, a -> 0 forward KL
        chi_square         (u - 1)^2                                        Pearson
        neyman_chi_square  1/u - 2 + u                                      Pearson with the arguments swapped
        squared_hellinger  (sqrt u - 1)^2 / 2                               in [0, 1]
        total_variation    |u - 1| / 2                                      in [0, 1]
        jeffreys           (u - 1) log u                                    sum of the two KLs

    with a = `alpha`, m = `mixture` and M = m * policy + (1 - m) * reference. Swapping the arguments replaces f(u) by
    u f(1/u), which is again a member: the two KLs and the two chi-squares change places, alpha becomes 1 - alpha,
    mixture becomes 1 - mixture, and the other three are symmetric.

    On samples |log u| is limited to 20, and to 5 where f or f' grows like u^2 or 1/u^2 (the chi-squares; for alpha
    outside [0, 1] the limit is 10 / max(|a|, |1 - a|)).

    Args:
      name: one of the nine.
      direction: 'policy_to_reference' is D_f(policy || reference), 'reference_to_policy' D_f(reference || policy).
      alpha: order of the alpha divergence, any number but 0 and 1.
      mixture: share of the policy in the midpoint of Jensen-Shannon; of the reference once the arguments are swapped.

    Returns:
      The generator, with its value, derivative and conjugate.

    Raises:
      ValueError: unknown name or direction, an order of 0 or 1, a mixture outside (0, 1), an option that the named
        generator does not have, or 'renyi', which has no generator.

    Reference: f-divergences, derived; Jensen-Shannon, alpha and forward KL as in DPH-RL (2509.07430)
    Certainty: verified
    """
    check_divergence(name, direction, alpha, mixture)
    if name == "renyi":
        raise ValueError(
            "generator is 'renyi', which is a logarithm of an expectation and not an f-divergence, so it has no "
            "generator; use generator='alpha' of the same order, or divergence(generator='renyi', samples='vocabulary')"
        )
    swap = direction == "reference_to_policy"
    if name == "jensen_shannon":
        return _jensen_shannon(1 - mixture if swap else mixture)
    if name == "alpha":
        return _alpha(1 - alpha if swap else alpha)
    return _PLAIN[_SWAPPED.get(name, name) if swap else name]()


@ranged
def renyi(log_moment: Float[Array, "..."], *, alpha: float) -> Float[Array, "..."]:
    r"""Rényi divergence from the logarithm of its moment: log E_reference[u^alpha] / (alpha - 1).

    The same number is log(1 + alpha (alpha - 1) D_alpha) / (alpha - 1) with D_alpha the alpha divergence, and its
    gradient is alpha / E_reference[u^alpha] times that of D_alpha. With a moment estimated on samples the value is
    biased (logarithm of a mean) and depends on the whole batch at once.

    Args:
      log_moment: log E_reference[u^alpha], u = policy / reference.
      alpha: order, positive and not 1.

    Returns:
      The divergence in nats, shaped like `log_moment`.

    Reference: f-divergences, derived
    Certainty: verified
    """
    check_divergence("renyi", "policy_to_reference", alpha, 0.5)
    return log_moment / (alpha - 1)
