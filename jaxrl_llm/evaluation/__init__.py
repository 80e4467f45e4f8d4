"""Evaluation of policies by their samples: of a policy in training, a checkpoint or a model directory."""

from __future__ import annotations

from jaxrl_llm.evaluation.benchmark_formats import benchmark_grader, read_problems
from jaxrl_llm.evaluation.best_of_n import best_of_n_accuracy, best_of_n_kl
from jaxrl_llm.evaluation.diversity import answer_entropy, distinct_ngrams, distinct_share
from jaxrl_llm.evaluation.evaluate import COUNTED, make_evaluate, make_records
from jaxrl_llm.evaluation.grading import (
    Grade,
    Grader,
    GraderError,
    file_grader,
    function_grader,
    number_grader,
    task_grader,
    text_grader,
)
from jaxrl_llm.evaluation.intervals import mean_intervals, sign_test
from jaxrl_llm.evaluation.measures import measured
from jaxrl_llm.evaluation.objective_volume import hypervolume, hypervolume_factor
from jaxrl_llm.evaluation.overoptimisation import (
    overoptimisation_fit,
    performance_gap_recovered,
    preference_metrics,
    preference_table,
)
from jaxrl_llm.evaluation.pass_rates import mean_pass_at_k, pass_at_k
from jaxrl_llm.evaluation.reliability import (
    accuracy_at_coverage,
    auroc,
    brier_score,
    expected_calibration_error,
    reliability_curve,
)
from jaxrl_llm.evaluation.teacher_forced import MostLikely, make_most_likely, make_score
from jaxrl_llm.evaluation.voting import agreement, consensus, majority_at_k, mean_majority_at_k, weighted_vote

__all__ = [
    "COUNTED",
    "Grade",
    "Grader",
    "GraderError",
    "MostLikely",
    "accuracy_at_coverage",
    "agreement",
    "answer_entropy",
    "auroc",
    "benchmark_grader",
    "best_of_n_accuracy",
    "best_of_n_kl",
    "brier_score",
    "consensus",
    "distinct_ngrams",
    "distinct_share",
    "expected_calibration_error",
    "file_grader",
    "function_grader",
    "hypervolume",
    "hypervolume_factor",
    "majority_at_k",
    "make_evaluate",
    "make_most_likely",
    "make_records",
    "make_score",
    "mean_intervals",
    "mean_majority_at_k",
    "mean_pass_at_k",
    "measured",
    "number_grader",
    "overoptimisation_fit",
    "pass_at_k",
    "performance_gap_recovered",
    "preference_metrics",
    "preference_table",
    "read_problems",
    "reliability_curve",
    "sign_test",
    "task_grader",
    "text_grader",
    "weighted_vote",
]
