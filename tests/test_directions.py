"""Recipes move what they say: those whose curves are measured, at the small size of the gallery, with a fixed seed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import pytest

from jaxrl_llm import catalogue, shipped
from jaxrl_llm.config import read_tree

MEASURED = ("grpo", "psr", "nsr", "copo", "pass_at_k", "vocabulary_js", "ppo", "mapo", "epo", "dler")


@pytest.fixture(scope="module")
def curves():
    """benchmarks/curves.py; the folder is no package."""
    path = Path(__file__).parents[1] / "benchmarks" / "curves.py"
    spec = importlib.util.spec_from_file_location("curves", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def optimised():
    """These tests wait for what programs compute, and not for the compiler."""
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)


@pytest.mark.slow
@pytest.mark.methods
@pytest.mark.parametrize("name", MEASURED)
def test_a_recipe_moves_what_it_says(name, curves, optimised):
    """The warm start of its task is made once and kept, as `python benchmarks/curves.py` keeps it."""
    (shows,) = (recipe["shows"] for recipe in catalogue.recipes() if recipe["name"] == name)
    found = curves.measured(name, 1, curves.cache_directory())["metrics"]
    for metric, direction in shows.items():
        assert curves.agrees(found[metric], direction), f"{metric} {direction}: {curves.change(found[metric])}"


def test_directions_are_judged_by_the_ends_of_the_curves(curves):
    rising = [[float(i) for i in range(1, 21)], [None, *map(float, range(1, 20))]]
    first, last = curves.change(rising)
    assert first == pytest.approx((2.5 + 2.0) / 2)
    assert last == pytest.approx((18.5 + 18.0) / 2)
    assert [curves.agrees(rising, word) for word in ("rises", "falls", "holds")] == [True, False, True]
    falling = [[4.0] * 10 + [3.1] * 10]
    assert [curves.agrees(falling, word) for word in ("rises", "falls", "holds")] == [False, True, True]
    assert not curves.agrees([[4.0] * 10 + [2.9] * 10], "holds")


def test_a_curve_is_the_mean_of_parts_of_a_run(curves):
    lines = [{"reward": float(i)} for i in range(40)]
    assert curves.binned(lines, "reward", bins=4) == [4.5, 14.5, 24.5, 34.5]
    assert curves.binned(lines[:20] + [{}] * 20, "reward", bins=2) == [9.5, None]


def test_a_curve_starts_where_what_a_recipe_shows_is_first_measured(curves):
    held = {"loss": 1.0, "completion_tokens": 40.0, "correct_share": 0.5}
    reinforced = [held | {"truncated_share": 0.5 - 0.01 * i} for i in range(40)]
    found = curves.recorded("dler", [[{"loss": 2.0}] * 10 + reinforced], 256)
    assert found["steps"] == 40
    assert found["metrics"]["truncated_share"][0][0] == 0.495


def test_small_problems_have_thoughts_that_their_limits_cut(curves):
    tree = curves.small(read_tree(shipped.recipe_path("dler")))
    assert tree["task"]["levels"] == [2, 3, 4]
    assert tree["rollout"]["max_completion_tokens"] == 54
    assert tree["stages"][1]["rollout"]["max_completion_tokens"] == 32  # two passes over three steps have 41 tokens
