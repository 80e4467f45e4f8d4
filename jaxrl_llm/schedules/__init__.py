"""Schedules: coefficients and temperatures as functions of the step or of measured metrics.

A schedule is a function of `step`, or a controller: a `Method` over the metrics of a batch. A recipe writes it in the
place of a number: `coefficient: {adaptive_kl: {...}}`. A method whose value is a field of rows is an entry of credit:
`rewards: {implicit_blend: {...}}`.
"""

from __future__ import annotations

from jaxrl_llm.experience import Method
from jaxrl_llm.schedules.annealing import annealed_share, every_other, two_phase_decay
from jaxrl_llm.schedules.bilevel import implicit_blend, implicit_gradient
from jaxrl_llm.schedules.controllers import adaptive_kl, adaptive_kl_of_rows, entropy_gated_kl
from jaxrl_llm.schedules.learning_rates import linear_decay, stable_then_decay
from jaxrl_llm.schedules.mixing import (
    adaptive_mixing,
    gradient_alignment,
    imitation_by_entropy,
    mixing_weight,
    success_by_entropy,
)
from jaxrl_llm.schedules.objectives import influence_weighted, influence_weights
from jaxrl_llm.schedules.temperatures import steering_temperature, temperature_controller

__all__ = [
    "Method",
    "adaptive_kl",
    "adaptive_kl_of_rows",
    "adaptive_mixing",
    "annealed_share",
    "entropy_gated_kl",
    "every_other",
    "gradient_alignment",
    "imitation_by_entropy",
    "implicit_blend",
    "implicit_gradient",
    "influence_weighted",
    "influence_weights",
    "linear_decay",
    "mixing_weight",
    "stable_then_decay",
    "steering_temperature",
    "success_by_entropy",
    "temperature_controller",
    "two_phase_decay",
]
