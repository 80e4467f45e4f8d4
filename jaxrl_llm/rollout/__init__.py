"""Prompts -> Experience: sampling, cached decoding, teacher-forced scoring, environments."""

from jaxrl_llm.endpoints import Endpoint, EndpointError
from jaxrl_llm.rollout.controls import Controls
from jaxrl_llm.rollout.environment_checks import require_environment
from jaxrl_llm.rollout.environments import (
    Environment,
    Episodes,
    Start,
    Step,
    StopReason,
    Turns,
    advanced,
    cut_short,
    episode_metrics,
    recorded_turns,
    replayed,
    solved_episodes,
    started,
)
from jaxrl_llm.rollout.external import engine_generate, probe
from jaxrl_llm.rollout.generation import generate
from jaxrl_llm.rollout.hidden_states import predicting_hidden
from jaxrl_llm.rollout.host_conversations import HostTurns, host_generate_turns, host_turns
from jaxrl_llm.rollout.host_environments import (
    EnvironmentFailure,
    HostEnvironment,
    HostEpisodes,
    host_advanced,
    host_replayed,
    host_started,
    host_step,
    opened,
)
from jaxrl_llm.rollout.positions import completion_positions, prompt_positions
from jaxrl_llm.rollout.prefixes import Prefixes
from jaxrl_llm.rollout.sampling import row_keys, sampled_tokens
from jaxrl_llm.rollout.stop import StopAutomaton, stop_automaton
from jaxrl_llm.rollout.stream import Drawn, make_stream
from jaxrl_llm.rollout.turns import generate_turns

__all__ = [
    "Controls",
    "Drawn",
    "Endpoint",
    "EndpointError",
    "Environment",
    "EnvironmentFailure",
    "Episodes",
    "HostEnvironment",
    "HostEpisodes",
    "HostTurns",
    "Prefixes",
    "Start",
    "Step",
    "StopAutomaton",
    "StopReason",
    "Turns",
    "advanced",
    "completion_positions",
    "cut_short",
    "engine_generate",
    "episode_metrics",
    "generate",
    "generate_turns",
    "host_advanced",
    "host_generate_turns",
    "host_replayed",
    "host_started",
    "host_step",
    "host_turns",
    "make_stream",
    "opened",
    "predicting_hidden",
    "probe",
    "prompt_positions",
    "recorded_turns",
    "replayed",
    "require_environment",
    "row_keys",
    "sampled_tokens",
    "solved_episodes",
    "started",
    "stop_automaton",
]
