"""A model with its own sharding rules on the mesh of a run, such as a large teacher of a small policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from types import MappingProxyType
from typing import Any

from jaxrl_llm.models.model import Model
from jaxrl_llm.parallel.rules import ambient_layout, changed_rules, layout

_FUNCTIONS = ("apply", "logits", "observe", "init_cache", "expand_cache", "for_decoding", "take_rows", "replace_row")


def in_own_layout(model: Model, changes: Mapping[str, Sequence[str]]) -> Model:
    """The same model, with its parameters and activations sharded by the run's rules with these changes.

    Args:
      model: any.
      changes: logical axis of an array -> axes of the mesh, as `mesh.rules`.

    Raises:
      ValueError: for a name or a mesh axis that does not exist.
    """
    changed_rules(changes)

    def inside(function: Callable[..., Any] | None) -> Callable[..., Any] | None:
        if function is None:
            return None

        @wraps(function)
        def called(*arguments: Any, **options: Any) -> Any:
            ambient = ambient_layout()
            if ambient is None:
                return function(*arguments, **options)
            with layout(ambient.mesh, changed_rules(changes, ambient.rules)):
                return function(*arguments, **options)

        return called

    own = MappingProxyType({name: tuple(axes) for name, axes in changes.items()})
    return model._replace(rules=own, **{name: inside(getattr(model, name)) for name in _FUNCTIONS})
