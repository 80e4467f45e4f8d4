"""Prompts -> Experience: sampling, cached decoding, teacher-forced scoring."""

from jaxrl_llm.rollout.controls import Controls
from jaxrl_llm.rollout.engine_http import Engine, EngineError
from jaxrl_llm.rollout.external import engine_generate, probe
from jaxrl_llm.rollout.generate import Prefixes, generate
from jaxrl_llm.rollout.positions import completion_positions, prompt_positions
from jaxrl_llm.rollout.sampling import row_keys, sampled_tokens
from jaxrl_llm.rollout.score import predicting_hidden
from jaxrl_llm.rollout.stop import StopAutomaton, stop_automaton

__all__ = [
    "Controls",
    "Engine",
    "EngineError",
    "Prefixes",
    "StopAutomaton",
    "completion_positions",
    "engine_generate",
    "generate",
    "predicting_hidden",
    "probe",
    "prompt_positions",
    "row_keys",
    "sampled_tokens",
    "stop_automaton",
]
