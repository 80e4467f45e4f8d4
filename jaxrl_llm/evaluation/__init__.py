"""Evaluation: what a policy's samples say about it, from a live policy or a checkpoint."""

from __future__ import annotations

from jaxrl_llm.evaluation.evaluate import COUNTED, make_evaluate
from jaxrl_llm.evaluation.grading import Grader, file_grader, number_grader, task_grader, text_grader
from jaxrl_llm.evaluation.pass_at_k import mean_pass_at_k, pass_at_k
from jaxrl_llm.evaluation.teacher_forced import make_score
from jaxrl_llm.evaluation.voting import agreement, consensus, majority_at_k, mean_majority_at_k

__all__ = [
    "COUNTED",
    "Grader",
    "agreement",
    "consensus",
    "file_grader",
    "majority_at_k",
    "make_evaluate",
    "make_score",
    "mean_majority_at_k",
    "mean_pass_at_k",
    "number_grader",
    "pass_at_k",
    "task_grader",
    "text_grader",
]
