"""Mesh, rules and placement."""

from jaxrl_llm.parallel.auto import automatic_sizes
from jaxrl_llm.parallel.mesh import described, make_mesh, replicate, row_constraint
from jaxrl_llm.parallel.placement import kept_whole, shardings, state_shardings
from jaxrl_llm.parallel.rules import (
    ANY,
    AXES,
    RULES,
    Rules,
    changed_rules,
    constrain,
    constrain_rows,
    laid_out,
    layout,
    partition_spec,
)

__all__ = [
    "ANY",
    "AXES",
    "RULES",
    "Rules",
    "automatic_sizes",
    "changed_rules",
    "constrain",
    "constrain_rows",
    "described",
    "kept_whole",
    "laid_out",
    "layout",
    "make_mesh",
    "partition_spec",
    "replicate",
    "row_constraint",
    "shardings",
    "state_shardings",
]
