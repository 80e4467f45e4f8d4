"""Writes docs/gallery.md and the drawings of docs/curves/, from recipes and measured curves. Run by docs/build.py."""

from __future__ import annotations

import importlib.util
import inspect
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from blocks import escaped, markdown

from jaxrl_llm import catalogue, shipped
from jaxrl_llm.config import read_tree

DOCS = Path(__file__).parent
GALLERY_PAGE, CURVES = DOCS / "gallery.md", DOCS / "curves"
WIDTH, HEIGHT, HEAD = 240, 116, 36  # of one metric in pixels, and of the words above its curves
FAMILIES = {
    "advantages": "Advantages",
    "values": "Value models",
    "losses": "Policy losses",
    "regularisers": "Regularisers",
    "lengths": "Length",
    "rewards": "Rewards without a verifier, and of confidence",
    "sampling": "Sampling, and choice of prompts and rows",
    "turns": "Several turns",
    "preferences": "Preferences",
    "curricula": "Curricula",
    "distillation": "Distillation",
    "hybrids": "Supervision beside reinforcement, self-training",
}
# Of these most recipes have one; the page of methods has their formulas.
GREEK = {"alpha", "beta", "gamma", "lam", "eps", "mask"}
COMMON = {"clipped_surrogate", "policy_gradient", "group_normalized", "kl_estimate", "entropy_bonus", "exact_answer"}

INTRODUCTION = """\
# Gallery of methods

Every recipe, what it computes, what a user should see move, and whether it did: written by `python docs/build.py` from
`configs/methods/` and from the curves that `python benchmarks/curves.py` measures; do not edit it.

A curve is a small run of the recipe: {size}. It starts from a policy that is right about half of the time (a quarter on
countdown), each thin line is a seed, and the thick one their mean. So small a run shows a direction, and is no
comparison of methods. *As it should* means that the last fifth of the runs lies on the right side of the first fifth;
what *holds* keeps three quarters of what it was. Recipes without a curve were not measured.
"""


def curves_module() -> Any:
    """benchmarks/curves.py, which knows what a curve is of, and where it should go."""
    spec = importlib.util.spec_from_file_location("curves", DOCS.parent / "benchmarks" / "curves.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawing(found: dict[str, Any]) -> str:
    """The curves of a recipe side by side, as SVG."""
    parts = [panel(name, seeds, WIDTH * place) for place, (name, seeds) in enumerate(found["metrics"].items())]
    size = f'width="{WIDTH * len(parts)}" height="{HEIGHT}" font-family="sans-serif" font-size="11"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>\n'


def panel(name: str, seeds: list[list[float | None]], left: int) -> str:
    """One metric: its name and range, each seed, and their mean."""
    known = [value for seed in seeds for value in seed if value is not None]
    low, high = min(known), max(known)

    def line(values: list[float | None], style: str) -> str:
        step = (WIDTH - 20) / max(len(values) - 1, 1)
        height = (HEIGHT - HEAD - 8) / ((high - low) or 1.0)
        at = [(left + 8 + i * step, HEIGHT - 8 - (v - low) * height) for i, v in enumerate(values) if v is not None]
        return f'<polyline fill="none" {style} points="{" ".join(f"{x:.0f},{y:.1f}" for x, y in at)}"/>'

    columns = zip(*seeds, strict=True)
    mean = [fmean(found) if (found := [v for v in column if v is not None]) else None for column in columns]
    text = (
        f'<text x="{left + 8}" y="13" fill="#777" font-weight="bold">{name}</text>'
        f'<text x="{left + 8}" y="28" fill="#777">{low:.3g} to {high:.3g}</text>'
        f'<path d="M{left + 8} {HEAD - 4}V{HEIGHT - 4}H{left + WIDTH - 12}" fill="none" stroke="#bbb"/>'
    )
    thin = "".join(line(seed, 'stroke="#9ab" stroke-width="1"') for seed in seeds) if len(seeds) > 1 else ""
    return text + thin + line(mean, 'stroke="#1f6fb4" stroke-width="2"')


def measured(name: str) -> dict[str, Any] | None:
    """What was measured of a recipe; None where nothing was."""
    path = CURVES / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def said(recipe: dict[str, Any], curves: Any) -> str:
    """What should move, and what did."""
    found = measured(recipe["name"])
    if found is None:
        expected = ", ".join(f"`{metric}` {direction}" for metric, direction in recipe["shows"].items())
        return f"Should be seen: {expected}. Not measured."
    told = []
    for metric, direction in recipe["shows"].items():
        first, last = curves.change(found["metrics"][metric])
        verdict = "as it should" if curves.agrees(found["metrics"][metric], direction) else "**not so here**"
        told.append(f"`{metric}` {direction}: {first:.3g} → {last:.3g}, {verdict}")
    seeds = len(next(iter(found["metrics"].values())))
    old = found["digest"] != curves.digest(read_tree(shipped.recipe_path(recipe["name"])))
    stale = "; the recipe has changed since" if old else ""
    return f"{'; '.join(told)} ({seeds} seed{'s' * (seeds > 1)}, {found['steps']} steps{stale})."


def keywords(name: str) -> frozenset[str]:
    """Names of a method's parameters that are set as code in its formulas."""
    function = next(getattr(room, name) for room in catalogue.ROOMS.values() if name in room.__all__)
    return frozenset(inspect.signature(function).parameters) - GREEK


def entry(recipe: dict[str, Any], curves: Any) -> str:
    """One recipe of the page."""
    name = recipe["name"]
    file = shipped.recipe_path(name)
    about = " ".join(line[2:] for line in file.read_text().splitlines() if line.startswith("# "))
    arxiv = f", [arXiv:{recipe['arxiv']}](https://arxiv.org/abs/{recipe['arxiv']})" if recipe["arxiv"] else ""
    path = file.relative_to(shipped.recipe_directory())
    parts = [
        f"### {name}",
        f"{escaped(recipe['paper'])}{arxiv}. [Recipe](../configs/methods/{path}) on `{recipe['task']}`; "
        f"`jaxrl train {name}`.",
        escaped(about),
    ]
    known = {name for room in catalogue.ROOMS.values() for name in room.__all__}
    for function in recipe["functions"]:
        if function in known - COMMON and (blocks := catalogue.formulas(catalogue.described(function)["doc"])):
            parts += [f"[{function}](methods.md#{function}):", markdown(blocks[0], keywords(function))]
    parts.append(said(recipe, curves))
    if measured(name) is not None:
        parts.append(f"![Curves of {name}](curves/{name}.svg)")
    return "\n\n".join(parts)


def gallery_page() -> str:
    """The whole of docs/gallery.md."""
    curves, recipes = curves_module(), catalogue.recipes()
    if unnamed := {recipe["family"] for recipe in recipes} - FAMILIES.keys():
        raise ValueError(f"docs/gallery.py has no title for the recipes in {sorted(unnamed)}; add it to FAMILIES")
    size = (
        f"{curves.STEPS} steps of {curves.SEQUENCES} completions, a model of {curves.MODEL['layers']} layers of width "
        f"{curves.MODEL['width']}, and the shorter problems of `benchmarks/curves.py`"
    )
    parts = [INTRODUCTION.format(size=size).strip()]
    for family, title in FAMILIES.items():
        parts.append(f"## {title}")
        parts += [entry(recipe, curves) for recipe in recipes if recipe["family"] == family]
    return "\n\n".join(parts) + "\n"


def drawings() -> dict[Path, str]:
    """The drawings beside the measured curves."""
    return {path.with_suffix(".svg"): drawing(json.loads(path.read_text())) for path in sorted(CURVES.glob("*.json"))}
