"""`jaxrl pairs`: accuracy of a run's reward model on the pairs of a file, and correction of wrong labels."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.commands.arguments import assignments, require_positive
from jaxrl_llm.commands.tables import show
from jaxrl_llm.compilation_cache import enable_compilation_cache
from jaxrl_llm.data import Tokenizer
from jaxrl_llm.data.judged_rows import Judged
from jaxrl_llm.data.label_denoising import Action, label_actions, preference_strength
from jaxrl_llm.data.row_files import row_objects
from jaxrl_llm.data.row_templates import column_value
from jaxrl_llm.data.stored_reference import NAME as STORED
from jaxrl_llm.data.stored_reference import token_checksum
from jaxrl_llm.data.written import encoded_completion, judged_groups
from jaxrl_llm.evaluation import preference_table
from jaxrl_llm.models.model import Model
from jaxrl_llm.run.restored import restored_network, restored_policy, restored_run
from jaxrl_llm.training.passes import scored
from jaxrl_llm.training.scores import Plain, of_head


def show_pairs(options: argparse.Namespace) -> None:
    """`jaxrl pairs`."""
    require_positive(options, "batch")
    enable_compilation_cache()
    columns = assignments(options.column, "--column")
    unusable: Any = "drop" if options.drop else "error"
    if options.reference is not None:
        if options.cleaned is not None or options.others:
            raise ValueError("--reference writes log-probabilities of the policy; leave --cleaned and --others out")
        groups = judged_groups(options.file, "pairs", columns, unusable=unusable).groups
        lines = with_reference(options.path, options.file, groups, batch=options.batch)
        _written(options.reference, lines)
        show(options, [{"pairs": len(lines)}], f"{options.file} with log-probabilities, in {options.reference}")
        return
    if options.cleaned is not None:
        groups = judged_groups(options.file, "pairs", columns, unusable=unusable).groups
        runs = [options.path, *options.others]
        said = [scores_of(run, groups, network=options.network, batch=options.batch)[0] for run in runs]
        lines, counts = cleaned_pairs(groups, said, flip=options.flip, smooth=options.smooth)
        _written(options.cleaned, lines)
        show(options, [counts], f"{options.file} by {len(runs)} reward models, in {options.cleaned}")
        return
    if options.others:
        raise ValueError("--others names runs whose scores clean a file; add --cleaned FILE, or leave --others out")
    rows = scored_pairs(
        options.path,
        options.file,
        network=options.network,
        columns=columns,
        by=options.by,
        unusable=unusable,
        batch=options.batch,
    )
    show(options, rows, f"{options.network} of {options.path} on {options.file}", spare=("loss", "ties"))


def _written(path: str, lines: Sequence[Mapping[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def with_reference(
    path: str, file: str, groups: Sequence[Sequence[Judged]], *, batch: int = 16
) -> list[dict[str, Any]]:
    """The rows of a file with the log-probability of every token under the policy of a run or a model directory.

    A run whose source is the new file needs no reference in memory, and its steps no pass of one. The temperature is 1.

    Args:
      path: a run, one of its checkpoints or a model directory: the initial policy of the run to come.
      file: of the groups; its columns are kept.
      groups: from `judged_groups`.
      batch: sequences scored together.
    """
    policy = restored_policy(path)
    return reference_lines(policy.model, policy.params, policy.tokenizer, row_objects(file, "--file")[0], groups, batch)


def reference_lines(
    model: Model, params: Any, tokenizer: Tokenizer, records: Any, groups: Sequence[Sequence[Judged]], batch: int
) -> list[dict[str, Any]]:
    """As `with_reference`, for a policy in memory; `records` are (where, columns) of the rows of the file."""
    score = jax.jit(lambda params, sequences: scored(model, params, sequences, temperature=1.0).statistics.logprobs)
    rows = [row for group in groups for row in group]
    encoded = [encoded_completion(row, number, tokenizer)[:2] for number, row in enumerate(rows)]
    widths = [max(len(one[side]) for one in encoded) for side in (0, 1)]
    said: list[list[float]] = []
    for start in range(0, len(encoded), batch):
        part = encoded[start : start + batch]
        sequences, _ = _padded([*part, *[part[-1]] * (batch - len(part))], widths, tokenizer.pad_id)
        found = np.asarray(score(params, sequences), np.float64)
        said += [found[place, : len(tokens)].tolist() for place, (_, tokens) in enumerate(part)]
    at, lines = dict(records), []
    for number, group in enumerate(groups):
        own = range(number * len(group), (number + 1) * len(group))
        sums = [token_checksum(*encoded[place]) for place in own]
        told = {STORED: [said[place] for place in own], "reference_tokens": sums}
        lines.append({**at[group[0].where], **told})
    return lines


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
      path: a run, or one of its checkpoints.
      file: a file of pairs, see `data.written.judged_groups`.
      network: name of a network of the run, with a head of one output.
      columns: names of columns, as for the source `pairs`.
      by: column of the file, such as the origin of a pair, with one row for each of its values; None makes one row.
      unusable: "drop" leaves ties and equal sides out.
      batch: sequences scored together.

    Raises:
      ValueError: for a network that gives no score, or a file that cannot be read.
    """
    groups = judged_groups(file, "pairs", columns, unusable=unusable).groups
    said, lengths = scores_of(path, groups, network=network, batch=batch)
    sources = None
    if by is not None:
        at = {where: str(column_value(record, by)) for where, record in row_objects(file, "--file")[0]}
        sources = [at[group[0].where] for group in groups]
    return preference_table(said[::2], said[1::2], sources, list(zip(lengths[::2], lengths[1::2], strict=True)))


def scores_of(
    path: str, groups: Sequence[Sequence[Judged]], *, network: str = "reward", batch: int = 16
) -> tuple[list[float], list[int]]:
    """(scores, completion lengths in tokens) of the rows of groups in order, by a run's reward model.

    Raises:
      ValueError: for a network that gives no score.
    """
    model, found, params = restored_network(path, network)
    if found.head is None or found.head.outputs != 1:
        raise ValueError(f"the network {network!r} of {path} has no head of one output, so it gives no score")
    built, policy = restored_run(path)

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
    return said, [len(completion) for _, completion in encoded]


def cleaned_pairs(
    groups: Sequence[Sequence[Judged]], said: Sequence[Sequence[float]], *, flip: float, smooth: float
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """(lines of a file of pairs, counts of kept, smoothed and flipped pairs) by the scores of several reward models.

    The strength of a pair is the mean gap of its scores. Pairs of the lowest strengths are flipped if it is below 0;
    the next ones are smoothed: written in both orders with weights 0.9 and 0.1. The strength of each line is its
    margin.

    Args:
      groups: pairs, the better side first.
      said: scores of their rows, one list per model.
      flip, smooth: shares of `label_actions`.
    """
    better, worse = ([list(one[side::2]) for one in said] for side in (0, 1))
    strength = preference_strength(better, worse)[0]
    actions = label_actions(list(strength), flip=flip, smooth=smooth)
    lines = []
    for (first, second), gap, action in zip(groups, strength, actions, strict=True):
        sides = {"chosen": first.text, "rejected": second.text}
        turned = {"chosen": second.text, "rejected": first.text}
        prompt = first.prompt if isinstance(first.prompt, str) else list(first.prompt)
        told = {"prompt": prompt, "margin": round(abs(float(gap)) if action == "flip" else max(float(gap), 0.0), 6)}
        if action == "smooth":
            lines += [told | sides | {"weight": 0.9}, {"prompt": prompt, "margin": 0.0} | turned | {"weight": 0.1}]
        else:
            lines.append(told | (turned if action == "flip" else sides) | {"weight": 1.0})
    return lines, {"pairs": len(actions), **{name: actions.count(name) for name in get_args(Action)}}


def _padded(encoded: Sequence[Any], widths: Sequence[int], pad_id: int) -> tuple[Plain, Any]:
    """Sequences of a batch, and the mask of their completions."""
    prompts, tokens = (np.full((len(encoded), width), pad_id, np.int32) for width in widths)
    for row, (prompt, completion) in enumerate(encoded):
        prompts[row, widths[0] - len(prompt) :] = prompt
        tokens[row, : len(completion)] = completion
    starts, ends = (jnp.array([len(one[side]) for one in encoded], jnp.int32) for side in (0, 1))
    mask = (jnp.arange(widths[1]) < ends[:, None]).astype(jnp.float32)
    return Plain(jnp.asarray(prompts), starts, jnp.asarray(tokens), ends, None, None), mask
