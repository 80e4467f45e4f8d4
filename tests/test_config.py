"""Configs: every shipped one loads and composes, and invalid ones are refused with one sentence."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
import yaml

from jaxrl_llm.config import (
    ConfigError,
    NetworkConfig,
    as_tree,
    differences,
    load_config,
    numeric_tree,
    parse_config,
    placement_tree,
    read_tree,
)
from jaxrl_llm.config.parsing import ROW_KINDS, _assign
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.data.judged_rows import READERS
from jaxrl_llm.experience import Loss
from jaxrl_llm.models import TransformerConfig, save_model, transformer
from jaxrl_llm.run.checkpoints import CheckpointError, config_hash, require_own_config
from jaxrl_llm.run.setup import parts
from jaxrl_llm.run.staged import last_stage, staged
from jaxrl_llm.shipped import recipe_path

ROOT = Path(__file__).parents[1]
# qwen3_gsm8k needs a checkpoint and a data file: tests/test_pretrained.py runs it with both.
# Configs of plans are for other machines; the tests of `jaxrl plan` read them.
SHIPPED = sorted(
    path for path in (ROOT / "configs").rglob("*.yaml") if path.stem != "qwen3_gsm8k" and path.parent.name != "plans"
)
VOCABULARY = CharacterTokenizer().vocabulary_size


@pytest.fixture
def parsed(micro_config):
    """The micro config with overrides."""
    return lambda *overrides, **changes: parse_config(micro_config | changes, overrides, vocabulary_size=VOCABULARY)


@pytest.fixture(scope="module")
def files(tmp_path_factory, data_directory):
    """Files of judged answers and networks in the working directory, to which shipped configs refer."""
    folder = tmp_path_factory.mktemp("files")
    judged = {
        "pairs": {"prompt": "A:1+2", "chosen": "3", "rejected": "4", "margin": 1, "reference": "3"},
        "verdicts": {"prompt": "A:1+2", "first": "3", "second": "4", "better": "first"},
        "ratings": {"prompt": "A:1+2", "completion": "3", "rating": 3.0, "helpfulness": 3, "verbosity": 1},
        "rankings": {"prompt": "A:1+2", "completions": ["3", "4"]},
        "steps": {"prompt": "A:1+2", "steps": ["1;", "3"], "labels": [1, 0]},
    }
    written = {"prompt": "A:1+2", "completion": "3", "top_tokens": [[4], [2]], "top_logprobs": [[-0.1], [-0.2]]}
    for name, line in (judged | {"distributions": written}).items():
        (folder / f"{name}.jsonl").write_text(64 * f"{json.dumps(line)}\n")
    labels = [{"prompt": "A:1+2", "completion": answer, "label": answer == "3"} for answer in ("3", "4")]
    (folder / "labels.jsonl").write_text(32 * "".join(f"{json.dumps(line)}\n" for line in labels))
    teacher = TransformerConfig(vocabulary_size=VOCABULARY, width=8, layers=1, heads=1, kv_heads=1)
    for name in ("teacher", "elder", "base"):
        save_model(folder / name, transformer(teacher).init(jax.random.key(0)), teacher)
    return folder


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_config_loads_and_composes(path, files, data_directory, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setenv("XDG_CACHE_HOME", data_directory)
    told = ["data.path=pairs.jsonl"] if path.stem == "reward_model" else []
    if "train_items" in read_tree(path).get("task", {}):
        told += ["task.train_items=512", "task.validation_items=64", "task.test_items=64"]
    config = load_config(path, told, vocabulary_size=VOCABULARY)
    for stage in staged(config):
        c, own = stage["parts"].step.composition, stage["parts"].config
        assert (len(c.rewards), len(c.losses)) == (len(own.rewards), len(own.losses))
        assert stage["parts"].task is None or stage["parts"].task.name == own.task.name


@pytest.mark.parametrize(
    "options", [{"written_by": []}, {"written_by": {"a": 1}}, {"mixed_with": [1]}, {"guided_by": 1}]
)
def test_a_view_is_written_by_networks_that_are_named(options):
    key, value = next(iter(options.items()))
    options = {"written_by": "reference"} | options
    tree = read_tree(recipe_path("xpo")) | {"views": {"opponent": {"same_prompt": options}}}
    with pytest.raises(ValueError, match=f"views.opponent.{key} is {re.escape(repr(value))}.*name of a network"):
        staged(parse_config(tree, vocabulary_size=VOCABULARY))


def test_configs_are_shipped():
    assert ROOT / "configs" / "demo.yaml" in SHIPPED


def test_a_config_survives_being_written_and_read(parsed, tmp_path):
    config = parsed("rewards=[{answer_format: {weight: 0.5}}, exact_answer]")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(as_tree(config)))
    assert load_config(tmp_path / "config.yaml") == config


def test_overrides_are_yaml_values_of_dotted_keys(parsed):
    config = parsed(
        "training.learning_rate=3e-4",
        "evaluation.k=[1, 4]",
        "name=another",
        "warm_start.stop_at_accuracy=0.5",
        "task.options.scratchpad=true",
        "training.sequences_per_microbatch=null",
        "run_dir=runs/x=1",
    )
    assert config.training.learning_rate == 3e-4
    assert config.evaluation.k == (1, 4)
    assert config.name == "another"
    assert config.task.options == {"scratchpad": True}
    assert config.training.sequences_per_microbatch is None
    assert config.run_dir == "runs/x=1"
    assert config.training.prompts_per_step == 4


@pytest.mark.parametrize(
    ("override", "section", "entry"),
    [
        ("losses.clipped_surrogate.clip_low=0.3", "losses", {"clipped_surrogate": {"clip_low": 0.3}}),
        ("losses.0.clipped_surrogate.clip_low=0.3", "losses", {"clipped_surrogate": {"clip_low": 0.3}}),
        ("rewards.shown.weight=0", "rewards", {"exact_answer": {"name": "shown", "weight": 0}}),
        (
            "credit.advantages.group_normalized.scale=none",
            "credit",
            {"advantages": {"group_normalized": {"scale": "none"}}},
        ),
        ("stages.rl.training.steps=7", "stages", {"name": "rl", "training": {"steps": 7}}),
    ],
)
def test_an_override_may_go_into_an_entry_of_a_list(override, section, entry):
    tree = {
        "losses": ["clipped_surrogate"],
        "rewards": [{"exact_answer": {"name": "shown"}}],
        "credit": [{"advantages": "group_normalized"}],
        "stages": [{"name": "sft"}, {"name": "rl"}],
    }
    _assign(tree, override)
    assert tree[section][-1] == entry


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("losses.kl.coefficient=1", "names 'kl', which is not in that list; its entries are clipped_surrogate"),
        ("losses.4.coefficient=1", "names '4', which is not in that list"),
        ("losses.0=kl", "sets one entry of the list losses; give a key of the entry, or the whole list"),
    ],
)
def test_an_override_of_an_entry_that_is_not_there_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        _assign({"losses": ["clipped_surrogate"]}, override)


def test_an_override_does_not_change_the_tree_it_is_applied_to(micro_config, parsed):
    parsed("training.steps=1000", "rewards=[exact_answer]")
    assert micro_config["training"]["steps"] != 1000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.step=3", r"config key training\.step \(value 3\) does not exist; did you mean training\.steps\?"),
        ("trainings.steps=3", r"did you mean training\?"),
        ("zzz=3", "config key zzz .* known keys: name, model, losses, rewards"),
        ("rollout.qqqqq=1", "known keys: samples_per_prompt, max_prompt_tokens"),
        ("training.steps=ten", r"config key training\.steps is 'ten': .*valid integer"),
        ("training.steps=2.5", r"config key training\.steps is 2\.5: .*integer"),
        ("training.learning_rate=[1]", r"training\.learning_rate is \[1\]: .*valid number"),
        ("task.levels=3", r"task\.levels is 3; it must be a list, such as \[3\]"),
        ("task.levels=[]", "task.levels is empty"),
        ("training=3", "config section training is 3; it must be a mapping"),
        ("model.layers=0", "model.layers is 0; it must lie in"),
        ("model.kv_heads=3", "model.heads is 2, which model.kv_heads 3 does not divide"),
        ("training.prompts_per_step=0", r"training\.prompts_per_step is 0; it must be at least 1"),
        ("training.learning_rate=-1", r"training\.learning_rate is -1.*; it must be at least 0"),
        ("evaluation.k=[1, 9]", r"evaluation\.k is \[1, 9\], but evaluation\.samples_per_problem is 4"),
        ("evaluation.k=[0]", r"evaluation\.k is \[0\]; its numbers must be at least 1"),
        ("checkpoints.keep=0", r"checkpoints\.keep is 0"),
        ("about.certainty=certain", "about.certainty is 'certain'"),
        (
            "data.prompt_format='Q: {body}'",
            "data.prompt_format is 'Q: {body}', but a model described by its shape uses the bodies",
        ),
        ("training.steps", "override 'training.steps' is not an assignment; write section.key=value"),
        ("=3", "override '=3' is not an assignment"),
        ("rewards=[{python:mine:graded}]", "without a space after a colon, .* write 'python: mine:graded'"),
        ("data.fields={answer:solution}", "without a space after a colon, .* single quotes: 'data.fields="),
        ("rewards={exact_answer: {}}", r"config key rewards is .*; it must be a list, such as \[\{'exact_answer"),
        ("name.first=3", "goes through 'name', which is not a section"),
        ("rewards.0=exact_answer", "sets one entry of the list rewards; give a key of the entry"),
        ("name=[", "the value of override .* is not valid YAML"),
    ],
)
def test_what_is_wrong_is_named_with_a_remedy(parsed, override, message):
    with pytest.raises(ConfigError, match=message):
        parsed(override)


def test_stopping_at_an_accuracy_needs_probes(parsed):
    with pytest.raises(ConfigError, match=r"stop_at_accuracy is 0\.5, but warm_start\.probe_every_steps is 0"):
        parsed("warm_start.stop_at_accuracy=0.5", "warm_start.probe_every_steps=0")


def test_every_problem_is_named_at_once(parsed):
    with pytest.raises(ConfigError, match=r"(?s)training\.steps is 'ten'.*evaluation\.problems is 'all'"):
        parsed("training.steps=ten", "evaluation.problems=all")


@pytest.mark.parametrize("missing", ["name", "model"])
def test_a_missing_key_is_named(micro_config, missing):
    tree = {key: value for key, value in micro_config.items() if key != missing}
    with pytest.raises(ConfigError, match=f"config key {missing} is missing; add it"):
        parse_config(tree, vocabulary_size=VOCABULARY)


def write(folder, **trees):
    for name, tree in trees.items():
        (folder / f"{name}.yaml").write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))


def test_extends_merges_sections_and_replaces_lists(tmp_path):
    (tmp_path / "methods").mkdir()
    write(tmp_path, base={"name": "base", "model": {"width": 8, "layers": 1}, "rewards": ["a", "b"]})
    write(tmp_path, middle={"extends": "base.yaml", "model": {"layers": 2, "heads": 2}, "task": {"name": "chain"}})
    write(tmp_path / "methods", leaf={"extends": "../middle.yaml", "name": "leaf", "rewards": ["c"], "task": None})
    assert read_tree(tmp_path / "methods" / "leaf.yaml") == {
        "name": "leaf",
        "model": {"width": 8, "layers": 2, "heads": 2},
        "rewards": ["c"],
        "task": None,
    }


def test_a_shipped_recipe_is_extended_by_its_name_unless_a_file_is_called_so(tmp_path):
    write(tmp_path, mine={"extends": "demo", "name": "mine"})
    assert read_tree(tmp_path / "mine.yaml") == read_tree(recipe_path("demo")) | {"name": "mine"}
    (tmp_path / "demo").write_text("model: {width: 8}")
    assert read_tree(tmp_path / "mine.yaml") == {"name": "mine", "model": {"width": 8}}


def test_a_circle_of_files_is_refused(tmp_path):
    write(tmp_path, one={"extends": "two.yaml"}, two={"extends": "three.yaml"}, three={"extends": "one.yaml"})
    with pytest.raises(
        ConfigError, match=r"one\.yaml extends itself through one.yaml -> two.yaml -> three.yaml; break"
    ):
        read_tree(tmp_path / "one.yaml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dmeo.yaml", r"dmeo\.yaml does not exist; did you mean .*/demo\.yaml\?"),
        ("qqqqqqqq.yml", "does not exist; give the path of a YAML file"),
        ("broken.yaml", "broken.yaml is not valid YAML"),
        ("listed.yaml", "listed.yaml holds list, not a mapping"),
        ("empty.yaml", "empty.yaml holds NoneType, not a mapping"),
        ("orphan.yaml", "nowhere.yaml does not exist"),
        ("misspelt.yaml", r"misspelt.yaml extends 'dmeo': there is no recipe 'dmeo'; did you mean 'demo'\?"),
        ("", "cannot be read: Is a directory; give the path of a YAML file"),
    ],
)
def test_files_that_are_no_configs_are_refused(tmp_path, name, message):
    write(tmp_path, demo="{}", broken="a: [", listed="- a", empty="", orphan={"extends": "nowhere.yaml"})
    write(tmp_path, misspelt={"extends": "dmeo"})
    with pytest.raises(ConfigError, match=message):
        read_tree(tmp_path / name)


@pytest.mark.parametrize(
    "override",
    [
        "run_dir=elsewhere",
        "name=another",
        "data.directory=elsewhere",
        "reporting.samples_every_steps=1",
        "checkpoints.keep=9",
        "about.paper=Somebody",
        "training.steps=1000",
        "mesh={fsdp: 1}",
        "training.remat=full",
        "training.offload=[optimizer]",
        "training.sequences_per_microbatch=8",
        "rollout.slots=4",
        "evaluation.sequences_per_batch=50",
    ],
)
def test_what_decides_no_number_is_not_hashed(parsed, override):
    assert config_hash(numeric_tree(parsed(override))) == config_hash(numeric_tree(parsed()))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            ["rewards=[{python: 'm:f', width: 1}, count]"],
            ["rewards=[{python: 'm:f', width: 1, deadline_s: 5, executor: thread}, {count: {value_on_failure: 0}}]"],
        ),
        (
            ["rewards=[{rating: {judge: {url: 'http://a', model: m}}}]"],
            ["rewards=[{rating: {deadline_s: 9, judge: {url: 'http://b', model: m, timeout_s: 9, retries: 5}}}]"],
        ),
        (
            ["credit=[{advantages: {python: 'm:f'}}]"],
            ["credit=[{advantages: {python: 'm:f', value_on_failure: 0.0, memory_gib: 2}}]"],
        ),
        (["views={again: {python: 'm:f'}}"], ["views={again: {python: 'm:f', deadline_s: 3}}"]),
        (
            ["environment={python: 'm:f', turns: 3}"],
            ["environment={python: 'm:f', turns: 3, executor: thread, on_failure: observation, deadline_seconds: 9}"],
        ),
        (
            ["stages=[{name: a, rewards: [{python: 'm:f', deadline_s: 1}]}]"],
            ["stages=[{name: a, rewards: [{python: 'm:f', deadline_s: 2}]}]"],
        ),
        (["faults={}"], ["faults={most_failed_share: 1.0, stalled_after_medians: 0}"]),
    ],
    ids=["rewards", "judge", "credit", "views", "environment", "stages", "faults"],
)
def test_how_functions_are_called_may_change_on_resume(parsed, before, after):
    assert differences(numeric_tree(parsed(*before)), numeric_tree(parsed(*after))) == []


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("rewards=[{python: 'm:f', deadline_s: 1}]", "rewards=[{python: 'm:f', weight: 2}]", "rewards.0.weight"),
        ("rewards=[{python: 'm:f'}]", "rewards=[{python: 'm:g', deadline_s: 1}]", "rewards.0.python"),
        (
            "rewards=[{rating: {judge: {url: u, model: m}}}]",
            "rewards=[{rating: {judge: {url: u, model: n}}}]",
            "rewards.0.rating.judge.model",
        ),
        ("environment={python: 'm:f', turns: 3}", "environment={python: 'm:f', turns: 4}", "environment.turns"),
    ],
)
def test_what_functions_compute_may_not(parsed, before, after, said):
    (found,) = differences(numeric_tree(parsed(before)), numeric_tree(parsed(after)))
    assert found.startswith(f"{said} (")


def test_a_refused_number_of_steps_comes_with_its_reason(parsed):
    def refusal(*overrides):
        old = parsed(*overrides)
        meta = {"config_hash": config_hash(numeric_tree(old)), "config": numeric_tree(old), "placement": {}}
        with pytest.raises(CheckpointError) as caught:
            require_own_config(parsed(*overrides, *changed), meta)
        return str(caught.value)

    changed = ["training.steps=200"]
    assert "training.steps may only change under a constant schedule, since training.schedule cosine" in refusal(
        "training.schedule=cosine"
    )
    changed = ["stages.a.training.steps=3"]
    assert "the number of steps of an entry of stages may not change" in refusal(
        "stages=[{name: a, training: {steps: 2}}]"
    )
    changed = ["seed=1"]
    assert "steps" not in refusal("training.schedule=cosine").partition("was started with")[2]


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "task.seed=1",
        "task.options.scratchpad=true",
        "data.overlong_prompts=drop",
        "training.learning_rate=0.1",
        "networks.reference.copy_every=0",
        "networks.value.learning_rate=0.5",
        "rollout.plan=refill",
        "source=[sampler, {replay: {share: 0.5}}]",
        "views={again: {python: 'm:f'}}",
        "data.selection=bandit",
        "stages=[{name: a}]",
        "model.width=32",
        "rewards=[exact_answer]",
        "rollout.temperature=0.5",
        "warm_start.steps=11",
    ],
)
def test_what_decides_a_number_is_hashed(parsed, override):
    assert config_hash(numeric_tree(parsed(override))) != config_hash(numeric_tree(parsed()))


def test_the_number_of_steps_decides_where_the_schedule_depends_on_it(parsed):
    few, many = (parsed("training.schedule=cosine", f"training.steps={steps}") for steps in (8, 9))
    assert config_hash(numeric_tree(few)) != config_hash(numeric_tree(many))


def fields_that_decide(value, prefix=""):
    """(dotted fields that are not marked FREE, those that are) of a config, section by section."""
    decide, free = set(), set()
    for one in dataclasses.fields(value):
        held, name = getattr(value, one.name), f"{prefix}{one.name}"
        if not one.metadata.get("decides_numbers", True):
            free.add(name)
        elif dataclasses.is_dataclass(held):
            inner = fields_that_decide(held, f"{name}.")
            decide, free = decide | inner[0], free | inner[1]
        elif one.name == "networks":
            for network, section in held.items():
                inner = fields_that_decide(section, f"{name}.{network}.")
                decide, free = decide | inner[0], free | inner[1]
        else:
            decide.add(name)
    return decide, free


def dotted(tree, whole, prefix=""):
    """Dotted names of a tree, down to the names that `whole` has."""
    found = set()
    for name, value in tree.items():
        path = f"{prefix}{name}"
        found |= {path} if path in whole or not isinstance(value, dict) else dotted(value, whole, f"{path}.")
    return found


def test_the_hash_covers_exactly_the_fields_that_are_not_free(parsed):
    engine = "rollout.engine={url: http://a, model: m, weights_directory: w, reload_path: p}"
    config = parsed("training.schedule=cosine", engine, "lora={rank: 2, alpha: 2}", "networks={value: {}}")
    decide, free = fields_that_decide(config)
    assert dotted(numeric_tree(config), decide) == decide
    assert {"name", "run_dir", "about", "reporting", "checkpoints", "data.path", "data.directory"} <= free
    assert {"rollout.engine.url", "rollout.engine.concurrency"} <= free
    assert {"rollout.engine.reload_every_steps", "networks.value.learning_rate", "lora.rank", "seed"} <= decide
    # The number of steps may increase if no schedule depends on it.
    assert "steps" not in numeric_tree(parsed())["training"]


def test_placement_is_kept_apart(parsed):
    moved = parsed("mesh={fsdp: 2, rules: {mlp: [fsdp]}}", "training.remat=full", "training.learning_rate=0.1")
    assert differences(placement_tree(parsed()), placement_tree(moved)) == [
        "training.remat ('none', now 'full')",
        "mesh.fsdp (None, now 2)",
        "mesh.rules.mlp (None, now ['fsdp'])",
    ]


def test_what_two_configs_differ_in_is_named(parsed):
    old = parsed("stages=[{name: a, training: {steps: 1}}]")
    changes = ("seed=1", "rewards=[exact_answer]", "lora={rank: 1, alpha: 1}")
    found = differences(numeric_tree(old), numeric_tree(parsed("stages=[{name: a, training: {steps: 2}}]", *changes)))
    assert "stages.0.training.steps (1, now 2)" in found
    assert "seed (0, now 1)" in found
    assert [each.partition(" ")[0] for each in found] == ["rewards", "seed", "lora", "stages.0.training.steps"]


@pytest.mark.parametrize(
    ("written", "path", "step"),
    [
        ("runs/demo", "runs/demo", None),
        ("runs/demo@120", "runs/demo", 120),
        ("{path: runs/demo@120}", "runs/demo@120", None),
        ("me@home/demo", "me@home/demo", None),
        ("{path: runs/demo, step: 3, optimizer: true}", "runs/demo", 3),
    ],
)
def test_a_run_branches_off_another(parsed, written, path, step):
    branch = parsed(f"init_from={written}").init_from
    assert (branch.path, branch.step, branch.optimizer) == (path, step, "optimizer" in written)


# ---- spellings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ("refill", ("refill",)),
        ("{refill: {max_rounds: 3}}", ({"refill": {"max_rounds": 3}},)),
        (
            "{demonstration_in_group: {}, refill: {max_rounds: 3}}",
            ({"demonstration_in_group": {}}, {"refill": {"max_rounds": 3}}),
        ),
        ("{demonstration_in_group: null, refill: null}", ({"demonstration_in_group": None}, {"refill": None})),
        (
            "[demonstration_in_group, {refill: {max_rounds: 3}}]",
            ("demonstration_in_group", {"refill": {"max_rounds": 3}}),
        ),
        ("{python: 'm:f', rounds: 2}", ({"python": "m:f", "rounds": 2},)),
        ("null", ()),
        ("[]", ()),
    ],
)
def test_a_plan_is_a_name_a_mapping_or_a_list(parsed, plan, expected):
    assert parsed(f"rollout.plan={plan}").rollout.plan == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("sampler", ("sampler",)),
        ("{pairs: {file: a.jsonl, groups_per_step: 2}}", ({"pairs": {"file": "a.jsonl", "groups_per_step": 2}},)),
        ("[sampler, {replay: {share: 0.5}}]", ("sampler", {"replay": {"share": 0.5}})),
        ("{python: 'm:f', size: 2}", ({"python": "m:f", "size": 2},)),
    ],
)
def test_a_source_is_one_entry_or_a_list(parsed, source, expected):
    assert parsed(f"source={source}").source == expected


def test_a_network_says_where_it_is_from(parsed):
    networks = parsed("networks={proxy: {from: policy, decay: 0.5}, twin_target: {from: twin}, value: null}").networks
    assert (networks["proxy"].origin, networks["proxy"].decay) == ("policy", 0.5)
    assert networks["twin_target"].origin == "twin"
    assert networks["value"] == NetworkConfig()


def test_the_new_sections_survive_being_written_and_read(parsed, tmp_path):
    config = parsed(
        "networks={proxy: {from: policy, copy_at: [3]}}",
        "rollout.plan={demonstration_in_group: {}, refill: {max_rounds: 3}}",
        "source={pairs: {file: a.jsonl, groups_per_step: 2}}",
        "views={again: {python: 'm:f'}}",
        "stages={name: one, networks: {proxy: {from: reference}}}",
        "data.selection={bandit: {arms: level}}",
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(as_tree(config)))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("networks=3", r"config key networks is 3: "),
        ("networks=[value]", r"config key networks is \['value'\]: "),
        ("networks={value: 3}", "config section networks.value is 3; it must be a mapping"),
        ("networks={value: {bakcbone: own}}", r"networks.value.bakcbone .* did you mean networks.value.backbone\?"),
        ("networks={value: {backbone: mine}}", r"networks.value.backbone is 'mine': .*'own' or 'shared'"),
        ("networks={value: {decay: 1.5}}", r"decay is 1.5; .*\[0, 1\]"),
        ("networks={value: {temperature: 0}}", "temperature is 0.0; it must be above 0"),
        ("networks={value: {copy_every: -1}}", "copy_every is -1; it must be at least 0"),
        ("networks={value: {head: vector}}", "networks.value.head"),
        ("rollout.plan=3", r"rollout.plan|neither a name"),
        ("views=[a]", r"config key views is \['a'\]: "),
        ("stages=[a]", r"config key stages.0 is 'a': "),
        ("stages=[{name: a, model: {width: 8}}]", "stage 'a' sets model, which all stages of a run share"),
        ("stages=[{name: a, stages: []}]", "stage 'a' sets stages"),
        ("critic={}", "config key critic .* does not exist"),
        ("replay={share: 0.5}", "config key replay .* does not exist"),
        ("rehearsal={}", "config key rehearsal .* does not exist"),
        ("supervised={}", "config key supervised .* does not exist"),
        ("rollout.refill={}", "config key rollout.refill .* does not exist"),
        ("training.refresh_reference_every=1", "config key training.refresh_reference_every .* does not exist"),
    ],
)
def test_a_new_section_that_is_wrong_is_named(parsed, override, message):
    with pytest.raises(ValueError, match=message):
        parts(parsed(override))


# ---- stages ---------------------------------------------------------------------------------------------------------


STAGES = [
    {"name": "sft", "source": {"demonstrations": {"sequences_per_step": 8}}, "losses": ["negative_log_likelihood"]}
    | {"rewards": [], "credit": [], "training": {"steps": 2}},
    {"name": "rl", "training": {"steps": 3}},
]


def test_each_stage_is_a_whole_config(parsed):
    config = parsed(stages=STAGES)
    warm, sft, rl = (stage | {"config": stage["parts"].config} for stage in staged(config))
    assert [stage["name"] for stage in (warm, sft, rl)] == ["warm start", "sft", "rl"]
    assert (sft["steps"], rl["steps"], sft["config"].training.learning_rate) == (2, 3, 0.003)
    assert sft["parts"].step.composition.rollout is None
    assert rl["parts"].step.composition.rollout is not None
    assert rl["config"].losses == config.losses
    assert sft["config"].stages == ()
    assert sft["parts"].model is rl["parts"].model
    assert last_stage(config) == rl["config"]
    assert last_stage(parsed()) == parsed()


def test_a_config_without_stages_is_one(parsed):
    assert [stage["name"] for stage in staged(parsed("warm_start.steps=0"))] == ["reinforcement"]
    unnamed = [{key: value for key, value in stage.items() if key != "name"} for stage in STAGES]
    assert [stage["name"] for stage in staged(parsed(stages=unnamed))] == ["warm start", "stage 1", "stage 2"]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([*STAGES, STAGES[0]], "stages are named warm start, sft, rl, sft; give each a name of its own"),
        ([STAGES[1] | {"name": "warm start"}], "stages are named warm start, warm start"),
        ([STAGES[0], {"name": "rl", "trainin": {}}], "stage 'rl': config key trainin .* did you mean training"),
        ([STAGES[0], {"name": "rl", "training": {"steps": "x"}}], "stage 'rl': config key training.steps is 'x'"),
    ],
)
def test_stages_that_cannot_be_are_refused(parsed, stages, message):
    with pytest.raises(ValueError, match=message):
        staged(parsed(stages=stages))


def test_a_network_that_no_stage_has_trained_cannot_be_read(parsed):
    networks = {"judge": {"head": "scalar"}}
    rl = STAGES[1] | {"rewards": ["exact_answer", {"python": "tests_judge:score"}], "networks": networks}
    judge = SimpleNamespace(
        score=lambda judge_scores: judge_scores,
        squared=lambda judge_scores, weight: Loss((weight * judge_scores**2).sum(), weight.sum()),
    )
    sft = STAGES[0] | {"losses": [{"python": "tests_judge:squared"}], "networks": networks}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tests_judge", judge)
        with pytest.raises(ValueError, match=r"stage 'rl' reads network 'judge', which no stage before it trains"):
            staged(parsed(stages=[rl]))
        trained = staged(parsed(stages=[sft, rl]))
        assert [stage["parts"].step.composition.learning for stage in trained[1:]] == [{"judge"}, {"policy"}]


def test_adapters_of_an_earlier_stage_are_where_the_reference_of_a_later_one_begins(parsed):
    losses = ["clipped_surrogate", {"kl_estimate": {"coefficient": 0.1}}]
    rl = STAGES[1] | {"losses": losses}
    found = staged(parsed("lora={rank: 1, alpha: 1}", "warm_start.steps=0", stages=[rl, rl | {"name": "more"}]))
    first, later = (stage["parts"].step.composition.networks["reference"].snapshot for stage in found)
    assert (first, later) == (False, True)


def test_mesh_auto_is_a_mesh_without_sizes(parsed):
    assert parsed("mesh=auto") == parsed()
    assert parsed("mesh.fsdp=2", "mesh.slices=1").mesh.sizes == {"slice": 1, "fsdp": 2}
    assert as_tree(parsed("mesh.rules={mlp: [tensor, fsdp]}"))["mesh"]["rules"] == {"mlp": ["tensor", "fsdp"]}


def test_a_run_lies_where_it_says_or_under_its_name(parsed):
    assert parsed("run_dir=elsewhere").directory == Path("elsewhere")
    assert parsed().directory == Path("runs/micro")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.name=adition", "there is no task 'adition'; did you mean 'addition'"),
        ("task.options={scratchpd: true}", "task 'addition' has no option 'scratchpd'; did you mean 'scratchpad'"),
        ("model.vocabulary_size=10", r"model\.vocabulary_size is 10, but the tokenizer has 100 tokens"),
        ("training.minibatches_per_epoch=3", "minibatches_per_epoch is 3, which does not divide"),
        ("training.sequences_per_microbatch=3", "sequences_per_microbatch is 3, which does not divide the 8 sequences"),
        ("rollout.temperature=0", "rollout.temperature is 0.0; it must be above 0"),
        ("mesh.devices=99", "mesh.devices is 99, but this process sees"),
        ("mesh.tensor=3", r"mesh.tensor 3 is 3, but there (is|are) \d+ devices?; choose sizes whose product is"),
        ("mesh.rules={mpl: []}", "mesh.rules names 'mpl', which is not an axis of an array; did you mean mlp"),
        ("training.bfloat16_update=master", "model.parameter_dtype is 'float32'; set it to bfloat16, or leave"),
        ("rewards=[]", "names 'rewards', which nothing in this step provides; a function in rewards provides it"),
        ("losses=[clipped_surogate]", "did you mean 'clipped_surrogate'"),
        ("credit=[]", "names 'advantages', which nothing in this step provides"),
    ],
)
def test_a_config_that_cannot_be_composed_is_refused(parsed, override, message):
    with pytest.raises(ValueError, match=message):
        parts(parsed(override))


def test_data_path_is_the_file_of_judged_rows_without_one():
    tree = {"name": "rows", "model": {}, "source": {"pairs": {"groups_per_step": 2}}, "data": {"path": "a.jsonl"}}
    found = parse_config(tree, vocabulary_size=VOCABULARY)
    assert (found.source, found.data.path) == (({"pairs": {"groups_per_step": 2, "file": "a.jsonl"}},), None)
    assert not found.has_problems
    tree["source"]["pairs"]["file"] = "b.jsonl"
    found = parse_config(tree, vocabulary_size=VOCABULARY)  # then it holds the problems
    assert (found.source[0]["pairs"]["file"], found.data.path) == ("b.jsonl", "a.jsonl")
    assert tuple(READERS) == ROW_KINDS
