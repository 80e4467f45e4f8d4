"""From sections of a config to the objects that a step is composed of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxrl_llm.data import CharacterTokenizer, Task, Tokenizer
from jaxrl_llm.rollout.tasks import task_environment
from jaxrl_llm.run.recipes import user_function
from jaxrl_llm.training.conversations import AnyEnvironment


def configured_environment(
    options: Mapping[str, Any], task: Task | None, tokenizer: Tokenizer
) -> AnyEnvironment | None:
    """The environment that a config describes; None where one completion is all.

    Args:
      options: section environment: options of the task's environment, or `python: "module:function"` and the keyword
        arguments of that function, which is called with the tokenizer and returns an environment.
      task: the task of the run, or None.
      tokenizer: of the policy.

    Raises:
      ValueError: for an environment that cannot be, or options without one.
    """
    if "python" in options:
        path = str(options["python"])
        if ":" not in path:
            raise ValueError(f"environment.python is {path!r}; write it as module:function")
        function, given = user_function(path, "environment"), {k: v for k, v in options.items() if k != "python"}
        try:
            made = function(tokenizer, **given)
        except TypeError as error:
            raise ValueError(
                f"environment.python: {path!r} could not be called with the tokenizer and "
                f"{', '.join(given) or 'nothing'} else: {error}; make it take them, and return an environment"
            ) from error
        if not isinstance(made, AnyEnvironment):
            raise ValueError(
                f"environment.python: {path!r} returned a {type(made).__name__}; it must return an Environment or a "
                "HostEnvironment of jaxrl_llm.rollout"
            )
        return made
    if task is None or task.environment is None:
        if options:
            raise ValueError(
                f"environment.{next(iter(options))} is set, but nothing here takes turns; choose the task grid, "
                "calculator or self_correction, or name an environment of your own in environment.python"
            )
        return None
    if not isinstance(tokenizer, CharacterTokenizer):
        raise ValueError(
            f"the environment of task {task.name!r} reads and writes ids of the built-in tokenizer, but the model at "
            "model.path has a tokenizer of its own; describe a model by its shape, or name an environment that reads "
            "text in environment.python"
        )
    return task_environment(task, **options)
