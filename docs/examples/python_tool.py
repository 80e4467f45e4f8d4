"""An environment with a tool: what stands in a fenced block is run in the sandbox, and the policy reads what it prints.

jaxrl train tool.yaml     with     environment: {python: "python_tool:python_tool_environment", max_turns: 4}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxrl_llm.data import Tokenizer
from jaxrl_llm.rewards import number_match
from jaxrl_llm.rollout import HostEnvironment
from jaxrl_llm.sandbox import Limits, python_tool

BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
LIMITS = Limits(seconds=2.0, memory_bytes=512 << 20)


def reset(item: Mapping[str, Any]) -> str:
    """The state of an episode: the reference answer."""
    return str(item["answer"])


def step(answer: str, turn: str) -> tuple[str, str, float, bool]:
    """A turn with code is answered by its output; one without ends the episode, and is judged."""
    code = BLOCK.findall(turn)
    if code:
        return answer, f"\nOutput:\n{python_tool(code[-1], limits=LIMITS, most_characters=400)}\n", 0.0, False
    return answer, "", number_match([turn], [answer])[0], True


def python_tool_environment(tokenizer: Tokenizer, *, max_turns: int = 4, max_turn_tokens: int = 256) -> HostEnvironment:
    """What `environment.python` names."""
    return HostEnvironment(
        reset,
        step,
        max_turns=max_turns,
        max_turn_tokens=max_turn_tokens,
        max_observation_tokens=256,
        end_of_turn_ids=tuple(tokenizer.eos_ids),
        deadline_seconds=30.0,
        on_failure="observation",
        failure_observation="\nThe tool has failed.\n",
        failure_ends=False,
    )
