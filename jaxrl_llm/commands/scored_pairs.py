"""`jaxrl pairs`: how a reward model of a run orders the pairs of a file, whole and by where they come from."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.commands.arguments import require_positive
from jaxrl_llm.commands.tables import show
from jaxrl_llm.compilation_cache import enable_compilation_cache
from jaxrl_llm.data.row_files import row_objects
from jaxrl_llm.data.row_templates import column_value
from jaxrl_llm.data.written import encoded_completion, judged_groups
from jaxrl_llm.evaluation import preference_table
from jaxrl_llm.run.restored import restored_network, restored_run
from jaxrl_llm.training.scores import Plain, of_head


def show_pairs(options: argparse.Namespace) -> None:
    """`jaxrl pairs`."""
    require_positive(options, "batch")
    enable_compilation_cache()
    columns = dict(one.split("=", 1) for one in options.column)
    rows = scored_pairs(
        options.path,
        options.file,
        network=options.network,
        columns=columns,
        by=options.by,
        unusable="drop" if options.drop else "error",
        batch=options.batch,
    )
    show(options, rows, f"{options.network} of {options.path} on {options.file}", spare=("loss", "ties"))


def scored_pairs(
    path: str,
    file: str,
    *,
    network: str = "reward",
    columns: Mapping[str, str] | None = None,
    by: str | None = None,
    unusable: Any = "error",
    batch: int = 16,
) -> list[dict[str, Any]]:
    """`evaluation.preference_table` of the scores that a run's reward model gives the pairs of a file.

    Args:
      path: of a run, or one of its checkpoints.
      file: of pairs, see `data.written.judged_groups`.
      network: which one of the run, with a head of one output.
      columns: as of the source `pairs`.
      by: column of the file that says where a pair comes from; None makes one row.
      unusable: "drop" leaves ties and equal sides out.
      batch: sequences scored together.

    Raises:
      ValueError: for a network that gives no score, or a file that cannot be read.
    """
    model, found, params = restored_network(path, network)
    if found.head is None or found.head.outputs != 1:
        raise ValueError(f"the network {network!r} of {path} has no head of one output, so it gives no score")
    built, policy = restored_run(path)
    groups = judged_groups(file, "pairs", columns, unusable=unusable).groups

    @jax.jit
    def scores(params: Any, sequences: Plain, mask: Any) -> Any:
        return of_head(found, model, params, sequences, mask, {"scores"}, policy=policy.params)["scores"]

    rows = [row for group in groups for row in group]
    encoded = [encoded_completion(row, number, built.tokenizer)[:2] for number, row in enumerate(rows)]
    widths = [max(len(one[side]) for one in encoded) for side in (0, 1)]
    said: list[float] = []
    for start in range(0, len(encoded), batch):
        part = encoded[start : start + batch]
        sequences, mask = _padded([*part, *[part[-1]] * (batch - len(part))], widths, built.tokenizer.pad_id)
        said += [float(x) for x in np.asarray(scores(params, sequences, mask))[: len(part)]]
    lengths = [len(completion) for _, completion in encoded]
    sources = None
    if by is not None:
        at = {where: str(column_value(record, by)) for where, record in row_objects(file, "--file")[0]}
        sources = [at[group[0].where] for group in groups]
    return preference_table(said[::2], said[1::2], sources, list(zip(lengths[::2], lengths[1::2], strict=True)))


def _padded(encoded: Sequence[Any], widths: Sequence[int], pad_id: int) -> tuple[Plain, Any]:
    """Sequences of a batch, and the mask of their completions."""
    prompts, tokens = (np.full((len(encoded), width), pad_id, np.int32) for width in widths)
    for row, (prompt, completion) in enumerate(encoded):
        prompts[row, widths[0] - len(prompt) :] = prompt
        tokens[row, : len(completion)] = completion
    starts, ends = (jnp.array([len(one[side]) for one in encoded], jnp.int32) for side in (0, 1))
    mask = (jnp.arange(widths[1]) < ends[:, None]).astype(jnp.float32)
    return Plain(jnp.asarray(prompts), starts, jnp.asarray(tokens), ends, None, None), mask
