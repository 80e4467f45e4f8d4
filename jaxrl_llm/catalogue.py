"""The catalogue of all shipped recipes and public methods, with papers and needs, from files and docstrings."""

from __future__ import annotations

import inspect
import itertools
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxrl_llm import advantages, losses, rewards, schedules, selection, shipped
from jaxrl_llm.config import read_tree
from jaxrl_llm.data.tokenizer import CharacterTokenizer
from jaxrl_llm.experience import Method
from jaxrl_llm.fields import TEXT, every_need, nearest, need_of
from jaxrl_llm.network_names import compared_with
from jaxrl_llm.run.recipes import RecipeError, credit_terms, loss_terms, number_or_method, reward_terms
from jaxrl_llm.signatures import signature

ROOMS = {"reward": rewards, "advantage": advantages, "selection": selection, "loss": losses, "schedule": schedules}

# Needs of a section, a source or a plan that are not visible from the parameters of functions.
_SECTION_NEEDS = {
    ("environment",): "environment",
    ("training", "alignment_every_steps"): "meta-gradient",
    ("networks", "proxy"): "proxy",
    ("views",): "views",
    ("data", "selection"): "choice of prompts",
}
_SOURCE_NEEDS = {
    "replay": "replay",
    "solved_answers": "stored answers",
    "demonstrations": "demonstrations",
    "hardest": "demonstrations",
}
_PLAN_NEEDS = {
    "demonstration_in_group": "demonstrations",
    "mixed_temperature": "extra samples",
    "prefixes": "prefixes",
    "greedy_baseline": "greedy sample",
    "paraphrased": "paraphrases",
    "demonstration_prefix": "demonstrations",
    "annealed_hint": "demonstrations",
    "helped": "privileged prompts",
    "under_view": "privileged prompts",
    "purified": "environment",
    "tree_search": "value model",
    "scaffolded": "scaffolds",
}
_TWO_ROUNDS = ("resume", "parallel_threads", "demonstration_prefix", "helped")
EVERY_NEED = tuple(
    dict.fromkeys(
        [
            *every_need(),
            "replay",
            "prefixes",
            "environment",
            "memory",
            "several rounds",
            "branches",
            "views",
            "choice of prompts",
            "stages",
        ]
    )
)

# Public helper functions that are not entries of recipes.
_HELPERS = re.compile(
    r"aggregate|answer_span|checked_\w+|cycled_rows|extract_\w+|forking_mask|group_quantile|log_ratio|"
    r"low_probability_confidence|mean_log_ratio|on_mask|outcome_token_rewards|parsed_number|pessimistic_surrogate|"
    r"predicted_entropy_change|row_uniforms|row_weight|soft_minimum|taken_turns|token_share|weighted_sum"
)
# Placeholders for the sizes that a run fills in.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("max_completion_tokens", "samples_per_prompt", "prompts_per_step", "sequences_per_step"), 2),
    **dict.fromkeys(("total_steps", "seed", "prompt_ids"), 2),
    "reward_names": (),
    "encode": lambda text: [ord(symbol) for symbol in text],
    "tokenizer": CharacterTokenizer(),
}
_SECTIONS = {"rewards": reward_terms, "credit": credit_terms, "losses": loss_terms}


# ---- functions ------------------------------------------------------------------------------------------------------


def methods() -> list[dict[str, Any]]:
    """One entry per public function: name, room, summary, reference, arxiv, certainty, needs, where."""
    return [
        _entry(name, room, getattr(module, name))
        for room, module in ROOMS.items()
        for name in sorted(module.__all__)
        if _lives_in(module, getattr(module, name)) and not _HELPERS.fullmatch(name)
    ]


def described(name: str) -> dict[str, Any]:
    """One function with its full docstring and its hyper-parameters.

    Raises:
      ValueError: for an unknown name, with the nearest known one among functions and recipes.
    """
    # A name of two rooms belongs to the room that defines it; if neither does, to the first.
    named = [(room, module) for room, module in ROOMS.items() if name in module.__all__]
    for room, module in sorted(named, key=lambda pair: not _lives_in(pair[1], getattr(pair[1], name))):
        if inspect.isfunction(function := getattr(module, name)):
            parameters = inspect.signature(function).parameters.values()
            hyper = {
                p.name: None if p.default is p.empty else p.default for p in parameters if p.kind is p.KEYWORD_ONLY
            }
            return _entry(name, room, function) | {"doc": inspect.getdoc(function) or "", "hyper_parameters": hyper}
    raise ValueError(f"there is no method {name!r}; {nearest(name, names())}")


def names() -> list[str]:
    """Every name that `jaxrl methods` knows: recipes and functions."""
    return sorted({entry["name"] for entry in (*recipes(), *methods())})


def formulas(doc: str) -> list[str]:
    """The indented blocks of a docstring, before its sections of arguments.

    >>> formulas("Plain centring.\\n\\n    A = r - mean_group\\n\\nEqual rewards give 0.")
    ['A = r - mean_group']
    """
    return [textwrap.dedent(part) for part in paragraphs(doc) if part.startswith("    ")]


def paragraphs(doc: str) -> list[str]:
    """The paragraphs of a docstring before its sections (Args, Returns, Raises, References, Certainty)."""
    told = re.split(r"^(?:Args|Returns|Raises|References?|Certainty):", doc, maxsplit=1, flags=re.M)[0]
    return [part.strip("\n") for part in re.split(r"\n\s*\n", told) if part.strip()]


def _lives_in(room: ModuleType, member: Any) -> bool:
    return inspect.isfunction(member) and member.__module__.startswith(f"{room.__name__}.")


def _entry(name: str, room: str, function: Any) -> dict[str, Any]:
    doc = inspect.getdoc(function) or ""
    reference = re.search(r"^References?:\s*(.+?)(?:\n\s*\n|\Z|\nCertainty)", doc, re.M | re.S)
    certainty = re.search(r"^Certainty:\s*(\w+)", doc, re.M)
    text = " ".join(reference.group(1).split()) if reference else ""
    read = signature(function)
    return {
        "name": name,
        "room": room,
        "summary": " ".join(doc.split("\n\n")[0].split()),
        "reference": text,
        "arxiv": re.findall(r"\b\d{4}\.\d{4,5}\b", text),
        "certainty": certainty.group(1) if certainty else "",
        "needs": list(read.required),
        "where": "host" if TEXT & {*read.required, *read.optional} else "program",
    }


# ---- recipes --------------------------------------------------------------------------------------------------------


def recipes() -> list[dict[str, Any]]:
    """One entry per recipe of a published method: name, family (its folder), task, shows, paper, arxiv, stage,
    certainty, functions, needs.

    Raises:
      ValueError: for a recipe with an unknown name, with its file.
    """
    trees = {file: read_tree(file) for file in shipped.method_files()}
    return [_recipe(file, tree) for file, tree in trees.items() if tree.get("about", {}).get("paper")]


def recipes_with(function: str) -> list[str]:
    """Names of the recipes that use a function."""
    return [entry["name"] for entry in recipes() if function in entry["functions"]]


def described_recipe(name: str) -> dict[str, Any]:
    """One recipe with the formulas of its functions, its entries and its text.

    Raises:
      ValueError: for an unknown name, with the nearest known one among functions and recipes.
    """
    found = {entry["name"]: entry for entry in recipes()}
    if name not in found:
        raise ValueError(f"there is no method {name!r}; {nearest(name, names())}")
    path = shipped.recipe_path(name)
    blocks = {function: formulas(_docstring(function)) for function in found[name]["functions"]}
    return found[name] | {
        "path": str(path),
        "formulas": {function: found for function, found in blocks.items() if found},
        "entries": entries(read_tree(path)),
        "yaml": path.read_text(),
    }


def entries(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a recipe: its selection, plan, views, rewards, credit and losses, then those of its stages.

    Returns:
      For each: function (its name), section, entry (as in the file). A coefficient of a loss that is a function has a
      separate entry with section "coefficient".
    """
    found = []
    selection = (tree.get("data") or {}).get("selection")
    if selection is not None:
        found.append({"function": _named(selection), "section": "data.selection", "entry": selection})
    for plan in _plan_entries(tree):
        found.append({"function": _named(plan), "section": "rollout.plan", "entry": plan})
        for hyper in ("temperature", "choose"):
            inner = _hyper(plan).get(hyper)
            if isinstance(inner, dict) or _is_name(inner):
                found.append({"function": _named(inner), "section": hyper, "entry": inner})
    for name, view in (tree.get("views") or {}).items():
        found.append({"function": _named(view), "section": "views", "entry": {name: view}})
    for section in _SECTIONS:
        for entry in tree.get(section) or ():
            inner = next(iter(entry.values())) if section == "credit" else entry
            found.append({"function": _named(inner), "section": section, "entry": entry})
            hyper = next(iter(inner.values())) if isinstance(inner, dict) and "python" not in inner else inner
            coefficient = hyper.get("coefficient") if isinstance(hyper, dict) else None
            if section == "losses" and (isinstance(coefficient, dict) or _is_name(coefficient)):
                found.append({"function": _named(coefficient), "section": "coefficient", "entry": coefficient})
    return found + [entry for stage in tree.get("stages") or () for entry in entries(stage)]


def built(function: Any) -> Any:
    """The default result of a factory (a function without data parameters); any other function itself."""
    read = signature(function)
    if read.required or read.optional:
        return function
    required = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    return function if required else function()


def needs(functions: Iterable[Any], provided: Iterable[str] = ()) -> list[str]:
    """The needs of functions, by the names of their data: some of `EVERY_NEED`, in that order.

    Args:
      functions: functions or `Method`s with their hyper-parameters bound.
      provided: fields that the recipe itself fills.
    """
    # A recipe that fills `turn` itself still counts as needing turns.
    given, found = {name for name in provided if need_of(name) != "turns"}, set[str]()
    for function in functions:
        asked = frozenset(signature(function).required) - given
        if "stored_logprobs" in asked:  # then `written_mask` marks stored answers, not demonstrations
            asked -= {"written_mask"}
        found |= {need_of(name) for name in asked}
        found |= {other for name in asked if (other := compared_with(name))}  # the second distribution
        returned = None if isinstance(function, Method) else inspect.signature(function).return_annotation
        found |= {"memory"} if isinstance(function, Method) or returned in (Method, "Method") else set()
    return [need for need in EVERY_NEED if need in found]


def _recipe(file: Path, tree: dict[str, Any]) -> dict[str, Any]:
    about = tree["about"]
    functions: list[Any] = []
    filled: set[str] = set()
    parts = [tree, *(tree.get("stages") or ())]
    try:
        for part, (section, terms_of) in itertools.product(parts, _SECTIONS.items()):
            for term in terms_of(part.get(section) or (), _SIZES):
                functions.append(term.function)
                filled |= set(getattr(term, "names", ()))
                coefficient = getattr(term, "coefficient", None)
                functions += [coefficient] if callable(coefficient) or isinstance(coefficient, Method) else []
        for plan in (plan for part in parts for plan in _plan_entries(part)):
            temperature = _hyper(plan).get("temperature", 1.0)
            made = number_or_method(temperature, "rollout.plan.temperature")
            functions += [] if isinstance(made, float) else [made]
    except RecipeError as error:
        raise RecipeError(f"recipe {file}: {error}") from None
    asked = {*needs(functions, filled), *(need for part in parts for need in _config_needs(part))}
    return {
        "name": file.stem,
        "family": file.parent.relative_to(shipped.recipe_directory()).as_posix(),
        "task": (tree.get("task") or {}).get("name", ""),
        "shows": tree.get("shows") or {},
        "paper": str(about["paper"]),
        "arxiv": str(about.get("arxiv") or ""),
        "stage": str(about.get("stage") or ""),
        "certainty": str(about.get("certainty") or ""),
        "functions": list(dict.fromkeys(entry["function"] for entry in entries(tree))),
        "needs": [need for need in EVERY_NEED if need in asked],
    }


def _config_needs(tree: dict[str, Any]) -> set[str]:
    found = set()
    for keys, need in _SECTION_NEEDS.items():
        value: Any = tree
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        found |= {need} if value else set()
    sources = tree.get("source") or []
    for entry in sources if isinstance(sources, list) else [sources]:
        name = _named(entry)
        found |= {_SOURCE_NEEDS[name]} if name in _SOURCE_NEEDS else {"judged rows"} if name != "sampler" else set()
    for plan in _plan_entries(tree):
        name = _named(plan)
        found |= {_PLAN_NEEDS[name]} if name in _PLAN_NEEDS else set()
        found |= (
            {"several rounds"}
            if name in ("refill", "adaptive", "prioritized", "tree_search")
            else {"branches"}
            if name in _TWO_ROUNDS
            else set()
        )
    return found | ({"stages"} if tree.get("stages") else set())


def _plan_entries(tree: dict[str, Any]) -> list[Any]:
    """Entries of section rollout.plan; a single entry may be written without a list."""
    plan = (tree.get("rollout") or {}).get("plan")
    if plan is None:
        return []
    if isinstance(plan, dict) and "python" not in plan:
        return [{name: hyper} for name, hyper in plan.items()]
    return plan if isinstance(plan, list) else [plan]


def _hyper(entry: Any) -> dict[str, Any]:
    """Hyper-parameters of an entry."""
    if not isinstance(entry, dict):
        return {}
    inner = entry if "python" in entry else next(iter(entry.values()))
    return inner if isinstance(inner, dict) else {}


def _named(entry: Any) -> str:
    if isinstance(entry, dict):
        return str(entry["python"]) if "python" in entry else str(next(iter(entry)))
    return str(entry)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and (value.isidentifier() or ":" in value)


def _docstring(name: str) -> str:
    for module in ROOMS.values():
        if name in module.__all__:
            return inspect.getdoc(getattr(module, name)) or ""
    return ""
