"""Writes docs/fields.md, docs/metrics.md, docs/formats.md, and the tables of docs/engine.md and docs/models.md."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Collection
from pathlib import Path

from blocks import escaped, markdown_table

from jaxrl_llm import rewards
from jaxrl_llm.data import jsonl, written
from jaxrl_llm.evaluation import benchmark_formats
from jaxrl_llm.fields import FIELDS, PROVIDERS, Field
from jaxrl_llm.models.families import FAMILIES, VISION_LANGUAGE
from jaxrl_llm.reporting import file_columns, metric_table
from jaxrl_llm.rollout import plans
from jaxrl_llm.rollout.capabilities import CAPABILITIES, ROWS, SAMPLERS
from jaxrl_llm.rollout.plans import further_rows
from jaxrl_llm.training import checks

DOCS = Path(__file__).parent
FIELDS_PAGE, ENGINE_PAGE, MODELS_PAGE = DOCS / "fields.md", DOCS / "engine.md", DOCS / "models.md"
METRICS_PAGE, FORMATS_PAGE = DOCS / "metrics.md", DOCS / "formats.md"
BEGIN_FAMILIES, END_FAMILIES = "<!-- families: written by docs/build.py -->", "<!-- end of families -->"
# What is refused in a config.json of an architecture that is supported: (architecture, fields, why).
REFUSED_MODELS: list[tuple[str, dict[str, Any], str]] = [
    (
        "LlamaForCausalLM",
        {"quantization_config": {"quant_method": "compressed-tensors"}},
        "weights in fewer bits than fp8, gptq, awq and the MXFP4 of gpt-oss have, which are read",
    ),
    ("LlamaForCausalLM", {"hidden_act": "relu2"}, "activations other than silu and the gelus"),
    ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "axial"}}, "kinds that no supported family has"),
    ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "a token would see what comes after it"),
    ("Gemma2ForCausalLM", {"layer_types": ["chunked_attention"]}, "layers other than full and sliding attention"),
    ("Qwen3MoeForCausalLM", {"mlp_only_layers": [1]}, "blocks without experts between others; first ones may be so"),
    ("Qwen3MoeForCausalLM", {"decoder_sparse_step": 2}, "likewise"),
    ("DeepseekV3ForCausalLM", {"attention_bias": True}, "latent attention has no biases here"),
    ("GptOssForCausalLM", {"swiglu_alpha": 1.0}, "one gain of the clamped SwiGLU"),
]
BEGIN, END = "<!-- capabilities: written by docs/build.py -->", "<!-- end of capabilities -->"

INTRODUCTION = """\
# Fields

Every name that the functions of a step can have as a parameter, written by `python docs/build.py` from
`jaxrl_llm/fields.py`; do not edit it. [engine.md](engine.md) describes how names are used.

Shapes: `scalar` [], `row` [B], `token` [B, T], `either` [B] or [B, T] (the value of a row is broadcast over its
tokens), `vector` [B, ...], `prompt` [B, P], `batch` [B, ...] (a loss on a microbatch gets the entries of all rows of
the batch); B rows, T completion tokens, P prompt tokens. *Fillable*: an entry of `credit` can compute it. *Absent*: its
value in rows for which it is unknown, such as written rows in a batch with samples, if this is not 0.

Outputs of networks are named by rules. `NETWORK` is a key of section `networks` or `policy`, `VIEW` a key of section
`views`. `policy` can be omitted, and so can `value` in names of values.

| name | meaning |
| --- | --- |
| `logprobs`, `entropy` | outputs of the policy in training; only losses can read them |
| `old_logprobs`, `old_entropy` | outputs of the policy at the start of the step |
| `NETWORK_logprobs`, `NETWORK_entropy` | outputs of another network |
| `values`, `NETWORK_values` | outputs of a head for the state before each token |
| `NETWORK_scores` | outputs of a head after the last token, one entry per row |
| `VIEW_logprobs`, `NETWORK_VIEW_logprobs` | outputs for another sequence that is made from the row |
| `VIEW_mask` | 1 on the tokens of that sequence whose outputs are used |
| prefix `old_` | in a loss, outputs of a trained network at the start of the step, as all outputs in `credit` |

An entry of `credit` can also compute a name that is in no table, if a later function reads it.
"""
METRICS_INTRODUCTION = """\
# Metrics

Every number that a run writes into `metrics.jsonl`, written by `python docs/build.py` from
`jaxrl_llm/reporting/metric_table.py`; do not edit it. [The report](report.md) draws one chart for each section and
unit, and also draws your own metrics (`metric/NAME` in `credit`, or metrics of a loss).

Parts in `<...>` depend on the run. *Sampled rows* are all rows of a step before credit, including those that credit
leaves out; *trained tokens* are those whose mask is 1; *tokens of the loss* are those whose mask is 1 in this loss.
Besides these numbers, each line has `step`, counted over all stages, and `stage`.

A number that is not defined in a step, such as the mean of a reward that applies to no row of it, is absent from its
line (*Absent if ...* in the tables), and its curve has no point there. Any other number that is not finite is an error.
"""
FORMATS_INTRODUCTION = """\
# File formats

The files that are read and written, generated by `python docs/build.py` from docstrings; do not edit it. Files are
UTF-8 with one JSON object per line; a `.json` file may be one list of them. Data sets may also be CSV, Parquet and
[others](how_to/data.md#where-rows-come-from). `jaxrl init FILE` inspects a file and writes a config that fits it.
"""
TITLES = {
    "rollout": "Facts of sampling",
    "rewards": "Rewards",
    "credit": "Credit",
    "data": "Data",
    "environment": "Conversations",
    "engine": "Engines",
    "greedy_baseline": "Plans: greedy_baseline",
    "continued_steps": "Plans: continued_steps",
    "mixed_temperature": "Plans: mixed_temperature",
    "paraphrased": "Plans: paraphrased",
    "further": "Plans of several rounds",
    "adaptive": "Plans: adaptive",
    "written": "Written rows",
    "held out": "Written rows of the validation split",
    "network": "Outputs of networks",
    "head": "Outputs of heads",
    "gradients": "Gradients before the update",
    "vocabulary": "Over the vocabulary",
    "learner": "While learning",
    "step": "The step",
    "metrics": "Metrics",
    "text": "Text, on the host",
}
# What `training.checks` and the config refuse beside what samplers and plans lack: (what, beside what, capabilities).
REFUSED = (
    ("`rollout.off_policy_steps`", "`rollout.prompt_buckets`", ("one_width",)),
    ("a second source (written rows, replay)", "`rollout.prompt_buckets`", ("one_width",)),
    (
        "`rollout.replay_router`",
        "a plan whose rows the policy did not draw; a second source",
        ("drawn_by_policy", "recorded_router"),
    ),
    ("`rollout.top_k`", "a plan whose rows the policy did not draw; a second source", ("drawn_by_policy",)),
    ("`rollout.top_k`", "functions over the whole vocabulary", ("whole_vocabulary",)),
    ("a second source", "a plan with groups of different sizes", ("equal_groups",)),
    (
        "minibatches or microbatches, with a loss that names `group`",
        "a plan with groups of different sizes",
        ("equal_groups",),
    ),
    (
        "a reading; `data.selection`",
        "a plan that finishes the rows of the step before",
        ("prompts_of_step",),
    ),
    ("an environment", "`rollout.engine`", ("conversations",)),
    ("`rollout.engine`; an environment in Python", "several processes", ("one_process",)),
)


def fields_page() -> str:
    """The whole of docs/fields.md."""
    parts = [INTRODUCTION.strip()]
    by_provider: dict[str, list[Field]] = {}
    for field in FIELDS.values():
        by_provider.setdefault(field.provider, []).append(field)
    if unnamed := by_provider.keys() - TITLES.keys():
        raise ValueError(f"docs/reference.py has no title for what {sorted(unnamed)} provide; add it to TITLES")
    for provider, title in TITLES.items():
        rows = [
            [
                f"`{field.name}`",
                field.kind,
                escaped(field.meaning),
                "yes" if field.fillable else "",
                "" if field.absent == 0 else f"{field.absent:g}",
            ]
            for field in by_provider.get(provider, ())
        ]
        if rows:
            about = PROVIDERS[provider][0].upper() + PROVIDERS[provider][1:]
            table = markdown_table(["name", "shape", "meaning", "fillable", "absent"], rows)
            parts.append(f"## {title}\n\n{escaped(about)}.\n\n{table}")
    return "\n\n".join(parts) + "\n"


def metrics_page() -> str:
    """The whole of docs/metrics.md."""
    parts = [METRICS_INTRODUCTION.strip()]
    for panel in metric_table.PANELS:
        rows = [[f"`{m.name}`", _metric_text(m), m.unit, m.over] for m in panel.metrics]
        table = markdown_table(["name", "meaning", "unit", "averages over"], rows)
        parts.append(f"## {panel.title}\n\n{escaped(panel.text)}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def _metric_text(metric: metric_table.Metric) -> str:
    """The meaning of a metric, and when it is absent."""
    return _text(f"{metric.meaning} Absent if {metric.absent}." if metric.absent else metric.meaning)


def _text(meaning: str) -> str:
    """A meaning as Markdown; what it writes as code or a link stays so."""
    return meaning if "`" in meaning or "](" in meaning else escaped(meaning)


def _described_attributes(kind: type) -> list[list[str]]:
    """Rows (name, meaning) of the attributes that a docstring describes."""
    text = inspect.getdoc(kind) or ""
    found = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", text.partition("Attributes:")[2], re.M)
    return [[f"`{name}`", escaped(" ".join(meaning.split()))] for name, meaning in found]


def _lines_said(text: str | None) -> list[list[str]]:
    """Rows (name, line of the file) of an indented block of `name   {...}`."""
    found = re.findall(r"^ *(\w+) {2,}(\{.*\})(?: {2,}(\w+))?$", text or "", re.M)
    return [[f"`{name}`", f"`{line}`", f"`{grader}`" if grader else ""] for name, line, grader in found]


def formats_page() -> str:
    """The whole of docs/formats.md."""
    benchmarks = _lines_said(benchmark_formats.__doc__)
    judged = _lines_said(written.judged_groups.__doc__)
    told = [[*row[:2], ", ".join(f"`{name}`" for name in sorted(written.PROVIDES[row[0][1:-1]]))] for row in judged]
    said = [
        [f"`{name}`", ", ".join(f"`{field}: {value}`" for field, value in vars(fields).items() if value is not None)]
        for name, fields in jsonl.FORMATS.items()
    ]
    parts = [
        FORMATS_INTRODUCTION.strip(),
        "## Problems to train on\n\n`data.path` with `data.format`, which is short for these fields; each can be set "
        "in `data.fields`. All other fields of a line are columns for [rewards](how_to/reward.md) and graders.",
        markdown_table(["format", "fields"], said),
        markdown_table(["field", "meaning"], _described_attributes(jsonl.Fields)),
        'A line of `messages` holds a conversation: `{"role": "user", "content": ...}` in their order, rendered with '
        "the model's chat template. Demonstrations (`source: demonstrations`, a supervised stage) are the `response` "
        "of a line, or the last turn of its assistant.",
        "## Problems to evaluate on\n\n`jaxrl eval --data FILE --format NAME`:",
        markdown_table(["format", "a line", "grader"], benchmarks),
        "## Completions that were judged\n\nFiles of the [sources](engine.md#source) of these names. Lines of a file "
        "have equally many completions. A prompt is a text, or messages; so are completions, of which the last message "
        "counts. Without a prompt it is what the completions of a line begin with. Every line may have a `weight`, "
        "pairs a `margin`, rankings in any order `ranks` (0 is best, equal for ties). Columns of TRL "
        "(`chosen`, `completions` of labelled steps), UltraFeedback (`score_chosen`) and HelpSteer "
        "(`response`, `preference_strength`) are recognised; `columns` names others. Ties "
        "and equal sides are errors, or with `unusable: drop` left out and counted.",
        markdown_table(["source", "a line", "fields of its rows"], told),
        "## `metrics.jsonl`\n\n[Metrics](metrics.md).",
    ]
    for name, keys in file_columns.FILES.items():
        parts.append(f"## {name[0].upper() + name[1:] if ' ' in name else f'`{name}`'}")
        parts += [file_columns.NOTES[name]] if name in file_columns.NOTES else []
        parts.append(markdown_table(["key", "meaning"], [[f"`{key}`", meaning] for key, meaning in keys.items()]))
    return "\n\n".join(parts) + "\n"


def every_plan() -> dict[str, tuple[plans.Plan, tuple[str, ...]]]:
    """Each plan at small sizes, around `plain`, and what it needs of the rows of the plan inside of it."""
    plain = plans.plain(samples_per_prompt=4)
    sizes = {"max_completion_tokens": 8, "pad_id": 0}
    made = {
        "plain": plain,
        "refill": plans.refill(plain, samples_per_prompt=4),
        "adaptive": plans.adaptive(plain, samples_per_prompt=4),
        "prioritized": plans.prioritized(plain, samples_per_prompt=4, first_samples=2),
        "budget": plans.budget(plain, samples_per_prompt=4, prompt_ids=1),
        "prefixes": plans.prefixes(plain, texts=("a",), encode=lambda text: [1], **sizes),
        "demonstration_in_group": plans.demonstration_in_group(plain, **sizes),
        "mixed_temperature": plans.mixed_temperature(plain, samples_per_prompt=4, prompt_share=0.5, temperature=1.2),
        "paraphrased": plans.paraphrased(plain),
        "resume": plans.resume(plain, choose=plans.last_share, samples_per_prompt=6, branches=2, encode=None, **sizes),
        "continued_steps": plans.continued_steps(
            plain, choose=rewards.separated_turns, samples_per_prompt=4, max_turns=2
        ),
        "demonstration_prefix": plans.demonstration_prefix(
            plain, samples_per_prompt=6, branches=2, total_steps=1, **sizes
        ),
        "annealed_hint": plans.annealed_hint(plain, total_steps=1, **sizes),
        "helped": plans.helped(plain, samples_per_prompt=6, branches=2, prompts="failed"),
        "under_view": plans.under_view(plain),
        "purified": plans.purified(plain, failed=plans.turns_below, pad_id=0),
        "partial_rollouts": plans.partial_rollouts(
            plain,
            samples_per_prompt=4,
            prompts_per_step=1,
            max_prompt_tokens=2,
            max_completion_tokens=8,
            pad_id=0,
            tokens_per_step=4,
        ),
        "tree_search": plans.tree_search(plain, samples_per_prompt=4, pad_id=0, encode=lambda text: [1], step_end="a"),
        "parallel_threads": plans.parallel_threads(
            plain, samples_per_prompt=12, branches=8, max_completion_tokens=8, pad_id=0, encode=lambda text: [ord(text)]
        ),
        "early_abort": plans.early_abort(plain, lost=plans.mean_entropy_above, after_tokens=4),
        "greedy_baseline": plans.greedy_baseline(plain, temperature=1.0),
    }
    inside = {name: _needs_inside(getattr(plans, name)) for name in made}
    return {name: (plan, inside[name]) for name, plan in made.items()}


def _needs_inside(function) -> tuple[str, ...]:
    source = inspect.getsource(function)
    source = source if "further(" not in source else inspect.getsource(further_rows)
    found = re.search(r"require_inside\((?:\"\w+\"|name), inner,([^)]*)\)", source)
    return tuple(re.findall(r"\w+", found[1])) if found else ()


def settings() -> dict[str, str]:
    """Settings of a rollout with the capability that each needs of the sampler, as `training.checks` lists them."""
    tree = ast.parse(inspect.getsource(checks))
    for loop in ast.walk(tree):
        if isinstance(loop, ast.For) and isinstance(loop.iter, ast.Tuple):
            rows = [row.elts for row in loop.iter.elts if isinstance(row, ast.Tuple)]
            constants = [(row[0], row[-1]) for row in rows if len(row) == 3]
            if constants and all(getattr(last, "value", None) in CAPABILITIES for _, last in constants):
                return {first.value: last.value for first, last in constants}
    raise ValueError("training.checks has no list of settings with the capability that each needs")


def _listed(names: Collection[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def capability_tables() -> str:
    """Tables of samplers, plans and settings that can be combined, with the missing capability of those that cannot."""
    samplers = list(SAMPLERS)
    wants = {f"plan `{name}`": plan.needs for name, (plan, _) in every_plan().items() if name != "plain"}
    wants |= {f"`{name}`": {capability} for name, capability in settings().items() if name.startswith("rollout.")}
    rows = [
        [what, *(_listed(needs - SAMPLERS[sampler]) or "yes" for sampler in samplers)] for what, needs in wants.items()
    ]
    heads = ["", *(f"`{name}`" if "." in name else name for name in samplers)]
    around = [[f"`{name}`", _listed(inside), _listed(plan.lacks)] for name, (plan, inside) in every_plan().items()]
    others = [[what, beside, _listed(capabilities)] for what, beside, capabilities in REFUSED]
    known = [[f"`{name}`", meaning] for name, meaning in CAPABILITIES.items()]
    if stray := {c for _, plan in every_plan().values() for c in plan} - ROWS:
        raise ValueError(f"plans need {sorted(stray)} of each other, which are no capabilities of rows")
    return "\n\n".join(
        [
            "Each sampler with each plan or setting; where they cannot be combined, the missing capability:",
            markdown_table(heads, rows),
            "Plans that wrap other plans:",
            markdown_table(["plan", "needs of the inner plan", "its own rows lack"], around),
            "Other refused combinations:",
            markdown_table(["part", "together with", "missing capability"], others),
            "The capabilities:",
            markdown_table(["capability", "meaning"], known),
        ]
    )


def engine_page() -> str:
    """docs/engine.md with its tables of capabilities as they are now."""
    page = ENGINE_PAGE.read_text()
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{capability_tables()}\n\n{END}{rest.split(END)[1]}"


def family_tables() -> str:
    """Tables of the supported architectures, and of the refused fields of their configs."""
    text = [[f"`{name}`", family.has] for name, family in FAMILIES.items()]
    seen = [
        [f"`{name}`", ", ".join(f"`{text}`" for text in part.text.values())] for name, part in VISION_LANGUAGE.items()
    ]
    refused = [
        [f"`{key}`", f"`{architecture}`", f"`{json.dumps(value)}`", why]
        for architecture, fields, why in REFUSED_MODELS
        for key, value in fields.items()
    ]
    return "\n\n".join(
        [
            markdown_table(["architecture in `config.json`", "family and features"], text),
            "Of vision-language checkpoints only the text part is trained; images are not read. An export contains\n"
            "the other tensors unchanged, so that `transformers` can load the whole model:",
            markdown_table(["architecture in `config.json`", "its text part"], seen),
            "Every other architecture is refused before any weights are downloaded, and so are these fields:",
            markdown_table(["field", "for example of", "value", "reason"], refused),
        ]
    )


def models_page() -> str:
    """docs/models.md with its tables of families as they are now."""
    before, rest = MODELS_PAGE.read_text().split(BEGIN_FAMILIES)
    return f"{before}{BEGIN_FAMILIES}\n\n{family_tables()}\n\n{END_FAMILIES}{rest.split(END_FAMILIES)[1]}"
