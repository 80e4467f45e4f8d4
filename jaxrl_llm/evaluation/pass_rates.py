"""pass@k: the probability that at least one of k samples is correct, estimated without bias from n >= k samples."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def pass_at_k(correct: Int[np.ndarray, "N"], samples: int | Int[np.ndarray, "N"], k: int) -> Float[np.ndarray, "N"]:
    """Unbiased pass@k of each prompt: the share of its k-subsets of samples that contain a correct one.

        pass@k = 1 - C(n-c, k) / C(n, k) = 1 - prod_{i=n-c+1..n} (1 - k/i)

    The product form needs no large binomials. The plug-in estimate 1 - (1 - c/n)^k is biased and not offered.

    >>> pass_at_k([3, 0, 16], samples=16, k=4).round(6).tolist()
    [0.607143, 0.0, 1.0]

    Args:
      correct: number of correct samples of each prompt, c.
      samples: number of samples of each prompt, n; one number for all, or one per prompt.
      k: number of samples that one attempt may use; n >= 2k keeps the variance small.

    Returns:
      pass@k in [0, 1], float64, one per prompt.

    Raises:
      ValueError: k < 1, k > n, c > n, c < 0, or counts that are not whole numbers.

    Reference: Codex (2107.03374)
    Certainty: verified
    """
    c, n = np.broadcast_arrays(_whole(correct, "correct"), _whole(samples, "samples"))
    if k != int(k) or k < 1:
        raise ValueError(
            f"k={k!r} must be a whole number of at least 1: pass@k is the chance that one of k is correct."
        )
    if n.size and n.min() < k:
        raise ValueError(
            f"k={k} is more than samples={n.min()} of at least one prompt. pass@k cannot be estimated from fewer than "
            f"k samples: draw at least {k} a prompt (better {2 * k}), or ask for k <= {n.min()}."
        )
    if (c > n).any() or (c < 0).any():
        bad = int(np.flatnonzero(((c > n) | (c < 0)).ravel())[0])
        raise ValueError(
            f"correct={c.flat[bad]} of prompt {bad} lies outside [0, samples={n.flat[bad]}]: `correct` counts the "
            "correct samples among `samples`; pass both for the same prompts in the same order."
        )
    # If n - c < k the product contains i = k, whose factor is exactly 0, so no case distinction is needed.
    missed = [np.prod(1.0 - k / np.arange(n_i - c_i + 1, n_i + 1)) for c_i, n_i in zip(c.flat, n.flat, strict=True)]
    return 1.0 - np.asarray(missed, dtype=np.float64).reshape(c.shape)


def mean_pass_at_k(correct: Int[np.ndarray, "N"], samples: int | Int[np.ndarray, "N"], k: int) -> float:
    """Mean over prompts of `pass_at_k`; all prompts have equal weight, independent of their number of samples.

    Args:
      correct, samples, k: as in `pass_at_k`.

    Returns:
      The mean in [0, 1].

    Raises:
      ValueError: as `pass_at_k`, and where there is no prompt.

    Reference: Codex (2107.03374)
    Certainty: verified
    """
    values = pass_at_k(correct, samples, k)
    if values.size == 0:
        raise ValueError("correct=[] holds no prompt, so there is no mean: evaluate on at least one prompt.")
    return float(values.mean())


def _whole(value, name: str) -> np.ndarray:
    array = np.asarray(value)
    whole = array.astype(np.int64)
    if (whole != array).any():
        raise ValueError(f"{name}={array.tolist()} must be whole numbers: they count samples, they are not rates.")
    return whole
