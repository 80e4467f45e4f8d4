"""Mesh and placement."""

from jaxrl_llm.parallel.mesh import DATA_AXIS, constrain_replicated, make_mesh, replicate, row_constraint

__all__ = ["DATA_AXIS", "constrain_replicated", "make_mesh", "replicate", "row_constraint"]
