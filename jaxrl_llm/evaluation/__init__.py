"""Evaluation: what a policy's samples say about it, from a live policy or a checkpoint."""

from __future__ import annotations

from jaxrl_llm.evaluation.evaluate import make_evaluate
from jaxrl_llm.evaluation.pass_at_k import mean_pass_at_k, pass_at_k
from jaxrl_llm.evaluation.voting import agreement, consensus, majority_at_k, mean_majority_at_k

__all__ = [
    "agreement",
    "consensus",
    "majority_at_k",
    "make_evaluate",
    "mean_majority_at_k",
    "mean_pass_at_k",
    "pass_at_k",
]
