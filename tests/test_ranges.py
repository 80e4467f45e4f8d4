"""Ranges of numbers: declared where a number is written, and refused outside of them wherever it is given."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import get_args, get_type_hints

import jax.numpy as jnp
import pytest

from jaxrl_llm import advantages, losses, rewards, schedules, selection
from jaxrl_llm.config import Config, ConfigError, EngineConfig, NetworkConfig, parse_config
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.models.transformer_config import TransformerConfig
from jaxrl_llm.ranges import NonNegative, Range, Share, range_of, ranged, require_range
from jaxrl_llm.rollout import plans
from jaxrl_llm.run.recipes import credit_terms, loss_terms, reward_terms

ROOMS = (rewards, advantages, losses, schedules, selection, plans)
VOCABULARY = CharacterTokenizer().vocabulary_size
# What a section cannot do without.
NEEDED = {
    "latent": {"rank": 2, "rope_width": 2, "plain_width": 2, "value_width": 2},
    "init_from": {"path": "runs/demo"},
    "engine": {"url": "u", "model": "m", "reload_every_steps": 0},
    "lora": {"rank": 2, "alpha": 2.0},
    "stop_when": {"metric": "reward"},
    "delta": {"key_heads": 2, "value_heads": 2, "key_width": 4, "value_width": 4},
    "per_layer": {"width": 4, "vocabulary_size": 40},
    "global_heads": {"head_width": 4, "kv_heads": 1},
}


def numbers_of_functions():
    for room in ROOMS:
        for name in sorted(room.__all__):
            function = getattr(room, name)
            known = inspect.signature(function, eval_str=True).parameters if inspect.isfunction(function) else {}
            for p in known.values():
                if p.kind is p.KEYWORD_ONLY and range_of(p.annotation) is not None:
                    yield pytest.param(function, p, id=f"{name}.{p.name}")


def outside(found: Range) -> list[float]:
    """Numbers that a range does not take: its ends where it is open, else beyond them, and what is not finite."""
    ends = [found.least if "(" in found.open else found.least - 1, found.most if ")" in found.open else found.most + 1]
    return [end for end in ends if math.isfinite(end)] or [math.inf, math.nan]


@pytest.mark.parametrize(("function", "parameter"), [*numbers_of_functions()])
def test_every_hyper_parameter_is_refused_outside_of_its_range(function, parameter):
    if parameter.default not in (parameter.empty, None):
        require_range(parameter.annotation, parameter.default, parameter.name)
    several = "tuple" in str(parameter.annotation) or "Sequence" in str(parameter.annotation)
    for number in outside(range_of(parameter.annotation)):
        with pytest.raises(ValueError, match=rf"^{parameter.name} is .*must"):
            function(**{parameter.name: (number,) if several else number})


def sections(kind, path=()):
    """(dotted key, annotation) of every number of a config."""
    for name, annotation in get_type_hints(kind, include_extras=True).items():
        parts = (annotation, *get_args(annotation))
        inner = [part for part in parts if isinstance(part, type) and dataclasses.is_dataclass(part)]
        if (*path, name) == ("model",):
            inner = [TransformerConfig]
        if (*path, name) == ("networks",):
            inner, name = [NetworkConfig], "networks.value"
        if inner:
            yield from sections(inner[0], (*path, name))
        elif range_of(annotation) is not None:
            yield ".".join((*path, name)), annotation


@pytest.mark.parametrize(("key", "annotation"), [pytest.param(*one, id=one[0]) for one in sections(Config)])
def test_every_number_of_a_config_is_refused_outside_of_its_range(key, annotation, micro_config):
    section = f".{key}".split(".")[-2]
    needed = [f"{key.rpartition('.')[0]}.{name}={value}" for name, value in NEEDED.get(section, {}).items()]
    needed += ["model.rope_scaling.kind=yarn", "model.rope_scaling.factor=2"] * (section == "rope_scaling")
    needed += ["model.experts.count=2", "model.experts.per_token=1"] * (section == "experts")
    if ".sources." in key:
        task = ["data.sources.one.task.name=addition", "data.sources.one.task.levels=[2]"]
        needed += task if ".task." in key else ["data.sources.one.path=rows.jsonl"]
    for number in outside(range_of(annotation)):
        written = {math.inf: ".inf", math.nan: ".nan"}.get(number, str(number))
        written = f"[{written}]" if "tuple" in str(annotation) else written
        override = f"{key}={written}".replace("data.sources.", "data.sources.one.")
        with pytest.raises(ConfigError, match=rf"{key.split('.')[-1]}.* is .*(must|finite)"):
            parse_config(micro_config, [*needed, override], vocabulary_size=VOCABULARY)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_gradient_norm=0", r"training.max_gradient_norm is 0.0; it must be above 0"),
        ("training.max_gradient_norm=-1", r"training.max_gradient_norm is -1.0; it must be above 0"),
        ("networks.value.max_gradient_norm=0", r"networks.\*.max_gradient_norm is 0.0; it must be above 0"),
        ("training.learning_rate=.nan", r"training.learning_rate is nan; it must be finite and at least 0"),
        ("warm_start.learning_rate=-1", r"warm_start.learning_rate is -1.0; it must be at least 0"),
        ("networks.value.learning_rate=.nan", r"networks.\*.learning_rate is nan"),
        ("training.weight_decay=-1", r"training.weight_decay is -1.0; it must be at least 0"),
        ("training.adam_b1=1", r"training.adam_b1 is 1.0; it must lie in \[0, 1\)"),
        ("training.adam_b2=1", r"training.adam_b2 is 1.0; it must lie in \[0, 1\)"),
        ("warm_start.stop_at_accuracy=42", r"warm_start.stop_at_accuracy is 42.0; it must lie in \[0, 1\]"),
        ("networks.reference.copy_at=[-5]", r"networks.\*.copy_at is \[-5\]; its numbers must be at least 1"),
        ("evaluation.temperature=-1", r"evaluation.temperature is -1.0; it must be at least 0"),
    ],
)
def test_numbers_that_were_once_accepted_are_refused(micro_config, override, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(micro_config, [override], vocabulary_size=VOCABULARY)


@pytest.mark.parametrize(
    ("terms", "entry", "message"),
    [
        (reward_terms, {"exact_answer": {"weight": math.nan}}, "rewards.exact_answer.weight is nan; it must be finite"),
        (reward_terms, {"number_match": {"deadline_s": 0}}, "rewards.number_match.deadline_s is 0.0.*above 0"),
        (reward_terms, {"number_match": {"value_on_failure": math.inf}}, "value_on_failure is inf; it must be finite"),
        (loss_terms, {"entropy_bonus": {"coefficient": math.nan}}, "losses.entropy_bonus.coefficient is nan"),
        (
            credit_terms,
            {"advantages": {"group_normalized": {"eps": -1}}},
            r"credit.advantages.group_normalized.eps is -1.0; it must be at least 0",
        ),
        (
            loss_terms,
            {"kl_estimate": {"coefficient": {"adaptive_kl": {"target": 0, "sequences_per_step": 1}}}},
            r"coefficient\.adaptive_kl\.target is 0.0; it must be above 0",
        ),
    ],
)
def test_numbers_of_a_recipe_are_refused_with_their_place(terms, entry, message):
    with pytest.raises(ValueError, match=message):
        terms([entry])


def test_a_function_checks_numbers_and_lets_arrays_pass():
    @ranged
    def scaled(x, *, share: Share = 0.5, limit: NonNegative | None = None, by: tuple[float, ...] = ()):
        return x * share

    assert scaled(2.0, share=1) == 2.0
    assert scaled(2.0, share=jnp.float32(3.0)) == 6.0
    assert scaled(2.0, limit=None) == 1.0
    for given, message in (
        ({"share": 1.5}, r"share is 1.5; it must lie in \[0, 1\]"),
        ({"limit": -1}, "limit is -1; it must be at least 0"),
        ({"limit": math.inf}, "limit is inf; it must be finite and at least 0"),
        ({"by": (1.0, math.nan)}, r"by is \[1.0, nan\]; its numbers must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            scaled(1.0, **given)


def test_an_engine_is_checked_in_python_too():
    with pytest.raises(ValueError, match=r"rollout.engine.timeout_s is 0; it must be above 0"):
        EngineConfig(url="u", model="m", timeout_s=0, reload_every_steps=0)
