"""Environments of the synthetic tasks: JAX functions on token ids of the built-in tokenizer."""

from __future__ import annotations

import inspect
from typing import Any

import pydantic

from jaxrl_llm.bounds import shown
from jaxrl_llm.data.tasks.items import Task
from jaxrl_llm.ranges import require_range
from jaxrl_llm.rollout.environments import Environment
from jaxrl_llm.rollout.tasks.bargaining_environment import bargaining_partner
from jaxrl_llm.rollout.tasks.calculator_environment import calculator_tool
from jaxrl_llm.rollout.tasks.grid_environment import grid_navigation
from jaxrl_llm.rollout.tasks.self_correction_environment import two_attempts

__all__ = ["bargaining_partner", "calculator_tool", "grid_navigation", "task_environment", "two_attempts"]

_ENVIRONMENTS = {
    function.__name__: function for function in (bargaining_partner, calculator_tool, grid_navigation, two_attempts)
}


def task_environment(task: Task, /, **options: Any) -> Environment:
    """The environment of a task.

    Args:
      task: a task from `jaxrl_llm.data.tasks.task`.
      **options: options of the environment, except those that the options of the task determine.

    Raises:
      ValueError: for a task without an environment, or an unknown or invalid option.
    """
    if task.environment is None:
        raise ValueError(
            f"task {task.name!r} is answered in one completion and has no environment; leave the turns out, or choose "
            "grid, calculator, bargaining or self_correction"
        )
    name, settled = task.environment
    known = [p for p in inspect.signature(_ENVIRONMENTS[name]).parameters if p not in settled]
    for option in options:
        if option not in known:
            where = "is an option of the task" if option in settled else "is unknown"
            raise ValueError(f"option {option!r} of the environment {name} {where}; it takes {', '.join(known)}")
        annotation = inspect.signature(_ENVIRONMENTS[name], eval_str=True).parameters[option].annotation
        try:
            options[option] = pydantic.TypeAdapter(annotation).validate_python(options[option])
        except pydantic.ValidationError as error:
            said = error.errors()[0]["msg"].lower()
            raise ValueError(f"environment.{option} is {shown(options[option])}: {said}") from None
        require_range(annotation, options[option], f"environment.{option}")
    return _ENVIRONMENTS[name](**settled, **options)
