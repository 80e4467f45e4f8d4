"""Prompts -> Experience: sampling, cached decoding, teacher-forced scoring."""

from jaxrl_llm.rollout.controls import Controls
from jaxrl_llm.rollout.generate import Prefixes, generate
from jaxrl_llm.rollout.positions import completion_positions, prompt_positions
from jaxrl_llm.rollout.sampling import row_keys, sampled_tokens
from jaxrl_llm.rollout.score import predicting_hidden
from jaxrl_llm.rollout.stop import StopAutomaton, stop_automaton

__all__ = [
    "Controls",
    "Prefixes",
    "StopAutomaton",
    "completion_positions",
    "generate",
    "predicting_hidden",
    "prompt_positions",
    "row_keys",
    "sampled_tokens",
    "stop_automaton",
]
