"""Damaged or hostile user inputs are accepted, or refused with one short paragraph, in bounded time."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import time
import warnings

import numpy as np
import pytest

import jaxrl_llm
from jaxrl_llm.bounds import file_bytes, natural, parsed_json, shown
from jaxrl_llm.config import ConfigError, load_config, parse_config, read_tree
from jaxrl_llm.data import fields_of, load_tokenizer, problem_sets, tasks
from jaxrl_llm.data.chat import ChatTemplate
from jaxrl_llm.data.written import judged_groups
from jaxrl_llm.evaluation.suites import read_suite
from jaxrl_llm.models.families import FAMILIES, config_from_json
from jaxrl_llm.models.weights import load_model
from jaxrl_llm.rewards.verifiers.numbers import extract_number, parsed_number
from jaxrl_llm.run.setup import parts
from jaxrl_llm.shipped import config_path, recipe_path
from jaxrl_llm.signatures import renamed
from jaxrl_llm.terms import Update
from jaxrl_llm.training import Network, Rollout
from tests.test_benchmarks import benchmark

HOSTILE = benchmark("hostile")
FULL = {kind: count for kind, (_, count) in HOSTILE.KINDS.items()}
SHORT = {"configs": 16, "models": 12, "templates": 6, "jsonl": 12}


def bad(kind: str, count: int, seed: int) -> list[str]:
    """Inputs that were neither accepted nor refused."""
    return [f"{each.name}: {each.message}" for each in HOSTILE.outcomes(kind, count, seed) if each.kind not in GOOD]


GOOD = ("taken", "refused")


@pytest.mark.parametrize("kind", SHORT)
def test_damaged_inputs_are_taken_or_refused(kind):
    assert bad(kind, SHORT[kind], seed=1) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", FULL)
def test_many_damaged_inputs_are_taken_or_refused(kind):
    before = HOSTILE.peak_bytes()  # of earlier tests in this process
    assert bad(kind, FULL[kind], seed=2) == []
    assert HOSTILE.peak_bytes() - before < HOSTILE.MOST_BYTES


def test_a_foreign_error_a_long_message_and_a_hang_are_found():
    def fails():
        int("x")

    assert HOSTILE.judged(HOSTILE.Case("", fails)).kind == "traceback"
    assert HOSTILE.judged(HOSTILE.Case("", lambda: parse_config({"name": []}))).kind == "refused"


# ---- configs --------------------------------------------------------------------------------------------------------

BOMB = "\n".join(["a: &l0 [1]", *(f"b{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 12))])
CONFIGS = {
    b"extends: 3": "has extends 3; it must be the path of one YAML file",
    b"extends: [a.yaml]": r"has extends \['a.yaml'\]",
    b"a: &x [*x]": r"\*x occurs inside its own anchor",
    b"a: &x {b: *x}": r"\*x occurs inside its own anchor",
    BOMB.encode(): "more than 50,000 values",
    b"a: " + b"[" * 3000: "more than 50 levels of nesting",
    b"- " * 3000: "more than 50 levels of nesting",
    b"a: !!python/object/apply:os.system [ls]": "the tag 'tag:yaml.org,2002:python/.*os.system' is not supported",
    b"a: !!binary aGk=": "the tag .* is not supported",
    b"a: 1\na: 2": "the key 'a' occurs twice",
    b"a: " + b"9" * 5000: "holds a number that cannot be read",
    b"name: \xff": r"is not UTF-8 text \(byte 6\)",
    b"name: a\x00b": "is not valid YAML",
    b'name: "\\0"': "config key name is .* with invalid characters",
    b"init_from: " + b"x" * 300: "config key init_from is 'x.*, which is too long: 300 bytes",
    b"networks: {a: {path: " + b"/x" * 3000 + b"}}": "config key networks.a.path is '.*, which is too long: 6000 bytes",
    b"seed: 99999999999999999999": "config key seed is 99999999999999999999, which is beyond 64 bits",
    b"? [1]\n: 2": "is not valid YAML",
    b"k" * 300 + b": 1": r"config key 'kkk.*\.\.\.",
    b"- 1": "holds list, not a mapping of sections",
}


@pytest.mark.parametrize(("text", "message"), CONFIGS.items(), ids=range(len(CONFIGS)))
def test_a_config_that_cannot_be_is_refused_shortly(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_bytes(text)
    with pytest.raises(ConfigError, match=message) as refused:
        load_config(file)
    assert len(str(refused.value)) < 1000


def test_a_name_that_is_too_long_for_a_file_is_no_config():
    with pytest.raises(ValueError, match=r"config x+\.\.\. does not exist: its name is too long"):
        config_path("x" * 300)


def test_a_folder_with_the_name_of_a_recipe_is_no_config(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert config_path("demo") == recipe_path("demo")
    (tmp_path / "own.yaml").write_text("extends: demo\n")
    assert read_tree(tmp_path / "own.yaml")["task"] == read_tree(recipe_path("demo"))["task"]


def test_a_config_is_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "pipe", "is a pipe, socket or device; give a regular file"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(path)
    (tmp_path / "suite.yaml").write_text("a: &x [*x]")
    with pytest.raises(ValueError, match="occurs inside its own anchor"):
        read_suite(tmp_path / "suite.yaml")


def test_dates_are_text_and_overrides_are_read_the_same_way(tmp_path, micro_config):
    assert parse_config(micro_config, ["name=2024-01-01"], vocabulary_size=100).name == "2024-01-01"
    for override, message in {
        f"name={'[' * 3000}": "levels",
        "seed=4294967296": r"seed is 4294967296; it must lie in \[0, ",
        "seed=18446744073709551616": "beyond 64 bits",
        "training.learning_rate=.inf": "learning_rate is inf; it must be finite",
        f"name=[{'a' * 5000}]": r"\(5,004 characters\)",
        "rollout.samples_per_prompt=9223372036854775807": "a step has .* tokens",
        "task.train_items=1000000000000": "train_items is 1000000000000; it must lie in",
        "init_from=run@²": None,
    }.items():
        if message is None:
            assert parse_config(micro_config, [override], vocabulary_size=100).init_from.path == "run@²"
            continue
        with pytest.raises(ConfigError, match=message) as refused:
            parse_config(micro_config, [override], vocabulary_size=100)
        assert len(str(refused.value)) < 1000
    itself: dict = {"name": "x"}
    itself["data"] = itself
    with pytest.raises(ConfigError, match="more than 50 levels of nesting"):
        parse_config(itself)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.name=grid", "environment={max_turn_tokens: x}"], "environment.max_turn_tokens is 'x': "),
        (["task.name=grid", "environment={max_turn_tokens: [1]}"], r"environment.max_turn_tokens is \[1\]: "),
        (
            ["task.name=grid", "environment={max_turn_tokens: 0}"],
            "environment.max_turn_tokens is 0; it must be at least",
        ),
        (["task.name=grid", "environment={task: 1}"], "option 'task' of the environment grid_navigation is unknown"),
        (["credit=[{advantages: {group_normalized: {reads: {rewards: 1.0}}}}]"], r"reads is \{'rewards': 1.0\}; write"),
        (["credit=[{advantages: {group_normalized: {reads: {rewards: {a: b}}}}}]"], "field to read"),
        (["training.optimizer={sgd: {momentum: x}}"], "training.optimizer.sgd.momentum is 'x'; it must be a number"),
        (["networks={value: {head: {outputs: x}}}"], "networks.value.head.outputs .*: .*integer"),
        (["networks={value: {head: {layers: 3}}}"], "networks.value.head"),
        (["model.width=1000000000000"], "section model describes .* parameters"),
        (["rewards=[{python: ':'}]"], "write it as module:function"),
        (["rewards=[{python: '.a:b'}]"], "write it as module:function"),
        (["training.schedule={python: 'os:getcwd'}"], "takes no data and returned .*; it must return a function"),
    ],
)
def test_values_of_the_wrong_type_are_refused_when_a_step_is_built(micro_config, overrides, message):
    tree = micro_config | {"task": {"name": "addition", "levels": [1]}}
    with pytest.raises(ValueError, match=message):
        parts(parse_config(tree, overrides, vocabulary_size=100))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        # Options with the name of a parameter of the function that receives them.
        (lambda: fields_of("prompt", **{"format": "x"}), "there is no field 'format' to map"),
        (lambda: renamed(parsed_number, **{"function": "x"}), "reads no 'function'"),
        (lambda: tasks.task("addition", **{"name": "x"}), "task 'addition' has no option 'name'"),
        (lambda: Update(epochs_per_batch=0), "update.epochs_per_batch is 0"),
        (lambda: Update(sequences_per_microbatch=-1), "update.sequences_per_microbatch is -1"),
        (lambda: Update(alignment_learning_rate=float("nan")), "update.alignment_learning_rate is nan"),
        (lambda: Rollout(0, 4, (1,), 0), "rollout.samples_per_prompt is 0"),
        (lambda: Rollout(1, 4, (-1,), 0), r"rollout.eos_ids is \[-1\]"),
        (lambda: Rollout(1, 4, (1,), 0, temperature=float("nan")), "rollout.temperature is nan"),
        (lambda: Rollout(1, 4, (1,), 0, slots=0), "rollout.slots is 0"),
        (lambda: Network(temperature=0.0), "networks.temperature is 0.0"),
        (lambda: Network(copy_at=(0,)), r"networks.copy_at is \[0\]"),
    ],
)
def test_what_is_composed_in_python_has_the_ranges_of_a_config(made, message):
    with pytest.raises(ValueError, match=message):
        made()


# ---- JSON -----------------------------------------------------------------------------------------------------------

GOOD_LINE = b'{"prompt": "a", "answer": "5"}\n'
LINES = {
    b"[" * 100_000: "is not JSON: it has more than 100 levels of nesting",
    b'{"prompt":' * 5000 + b"\n" + GOOD_LINE: "line 1: not JSON: it has more than 100 levels of nesting",
    b"{" * 500 + b"\n": "not JSON",
    b"{bad}\n" * 1_000_000: "is not JSONL: none of its first 20 lines is JSON: Expecting",
    GOOD_LINE.decode().encode("utf-16"): "looks like UTF-16\\); save it",
    b'{"prompt": "\\ud800", "answer": "5"}\n': "half of a surrogate pair",
    b'{"prompt": "a", "prompt": "b"}\n': "the field 'prompt' occurs twice in it",
    b'{"prompt": "a", "answer": NaN}\n': "NaN is not a JSON number",
    b'{"prompt": "a", "answer": 1e999}\n': "'1e999' is too large for a number of 64 bits",
    b'{"prompt": "a\x00", "answer": "5"}\n': "not JSON: Invalid control character",
    b'{"' + b"k" * 100_000 + b'": 1, "answer": 5}': "there is no field 'prompt'; its fields are",
}


@pytest.mark.parametrize(("content", "message"), LINES.items(), ids=range(len(LINES)))
def test_lines_that_cannot_be_read_are_refused_shortly(tmp_path, content, message):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        problem_sets(tmp_path / "a", fields_of("prompt"))
    assert len(str(refused.value)) < 2000


def test_data_are_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        for read in (
            lambda path: problem_sets(path, fields_of("prompt")),
            lambda path: judged_groups(path, "pairs"),
        ):
            with pytest.raises(ValueError, match=r"cannot be read: .*; give the path of a readable file"):
                read(path)


def test_values_are_shown_shortly_and_digits_are_those_that_int_reads():
    assert shown({"a": "b" * 10_000}).endswith("(10,009 characters)")
    assert "too large" in shown(10**5000)
    assert [natural(text) for text in ("07", "²", "٣", "", "9" * 19)] == [7, None, None, None, None]
    assert parsed_json(b"\xef\xbb\xbf" + b"[" * 100 + b"]" * 100)
    with pytest.raises(ValueError, match="more than 100 levels"):
        parsed_json("[" * 101 + "]" * 101)
    with pytest.raises(ValueError, match="at most 3 are allowed"):
        file_bytes(HOSTILE.ROOT / "README.md", 3)


# ---- model directories ----------------------------------------------------------------------------------------------

LLAMA = {"architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
LLAMA |= {"num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers 1000000000; it must be an integer from 1 to 2000"),
        ("num_hidden_layers", "2", "num_hidden_layers '2'; it must be an integer"),
        ("hidden_size", None, "lacks hidden_size"),
        ("hidden_size", -8, "hidden_size -8; it must be an integer of at least 1"),
        ("rms_norm_eps", float("inf"), "rms_norm_eps inf; it must be a number above 0"),
        ("rope_theta", [1], r"rope_theta \[1\]; it must be a number above 0"),
        ("rope_scaling", {"rope_type": "yarn", "factor": "4"}, "rope_scaling.factor '4'; it must be a number"),
        ("rope_scaling", 3, "rope_scaling 3; it must be an object"),
        ("rope_scaling", {"rope_type": "longrope", "short_factor": [1] * 3000}, "a list of at most 2000 numbers"),
        ("architectures", "LlamaForCausalLM", "architectures 'LlamaForCausalLM'; it must be a list"),
        ("architectures", [{}], r"architectures \[{}\]; it must be a list"),
        ("architectures", ["a" * 5000], r"names the architecture 'aaa.*\.\.\."),
        ("tie_word_embeddings", "false", "tie_word_embeddings 'false'; it must be true or false"),
        ("hidden_act", {}, "hidden_act {}; it must be text"),
        ("num_attention_heads", 0, "num_attention_heads 0; it must be"),
    ],
)
def test_types_of_config_json(field, value, message):
    with pytest.raises(ValueError, match=message) as refused:
        config_from_json(LLAMA | {field: value})
    assert len(str(refused.value)) < 1500


@pytest.mark.parametrize("architecture", FAMILIES)
def test_missing_fields_are_the_family_s_or_named(architecture):
    family = FAMILIES[architecture]
    whole = {**LLAMA, "num_hidden_layers": 4, "head_dim": 4, **family.defaults, "architectures": [architecture]}
    for field in family.defaults:
        for source in ({k: v for k, v in whole.items() if k != field}, whole | {field: None}):
            try:
                config_from_json(source)
            except ValueError as error:
                assert len(str(error)) < 1000  # noqa: PT017  # nulls may be refused, by name


@pytest.fixture
def model(tmp_path):
    """A tiny Llama; the function writes it with changes: of config.json, of tensors, of other files."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    from jaxrl_llm.models.tensor_names import checkpoint_layout

    def written(tensors=None, **files):
        shapes = checkpoint_layout(config_from_json(LLAMA), "LlamaForCausalLM").tensors()
        save_file(
            {n: np.ones(s, np.float32) for n, s in shapes.items()} | (tensors or {}), tmp_path / "model.safetensors"
        )
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": 1}))
        Tokenizer(WordLevel({f"w{i}": i for i in range(8)}, unk_token="w0")).save(str(tmp_path / "tokenizer.json"))
        for name, value in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        return tmp_path

    return written


def test_weights_that_are_no_numbers_are_warned_of_or_refused(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(model(), strict=True)
    for value, dtype in ((np.nan, "float32"), (np.inf, "bfloat16")):
        directory = model({"model.norm.weight": np.full(8, value, np.float32)})
        with pytest.warns(UserWarning, match="weights that are NaN or infinite, in final_norm"):
            load_model(directory, parameter_dtype=dtype)
        with pytest.raises(ValueError, match="NaN or infinite"):
            load_model(directory, strict=True)


def test_files_of_a_model_that_cannot_be_read_are_named(model, tmp_path):
    model()
    (tmp_path / "config.json").write_bytes(b'{"a":' * 100_000)
    with pytest.raises(ValueError, match="more than 100 levels of nesting"):
        load_model(tmp_path)
    model()
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors is a pipe, socket or device"):
        load_model(tmp_path)
    for map_, message in (
        ({"a": 3}, "lists 'a' in 3, which is no name of a file"),
        ({"a": ["x"]}, "which is no name of a file"),
        ({"a": "x" * 300}, "which is no name of a file"),
        ({f"t{i}": f"f{i}" for i in range(5000)}, "and 4990 more"),
    ):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": map_}))
        with pytest.raises((ValueError, FileNotFoundError), match=message) as refused:
            load_model(tmp_path)
        assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder .* is a list"),
        ({"added_tokens_decoder": {"²": {"content": "w1"}}}, "has the added token '²'"),
        ({"added_tokens_decoder": {"1": "w1"}}, "has the added token '1': 'w1'"),
        ({"added_tokens_decoder": {"1": {"content": 3}}}, "has the added token '1'"),
        ({"added_tokens_decoder": {"1": {"content": "w1", "lstrip": "x"}}}, "has the added token '1'"),
        ({"added_tokens_decoder": {"99999": {"content": "a" * 5000}}}, r"gives the added token 'aaa.*\.\.\."),
        ({"chat_template": [{"name": [], "template": 3}]}, "it must be text, or a list of entries"),
        ({"eos_token": "a" * 5000}, r"eos_token is 'aaa.*\.\.\."),
    ],
)
def test_settings_of_a_tokenizer(model, settings, message):
    with pytest.raises(ValueError, match=message) as refused:
        load_tokenizer(model(tokenizer_config=settings))
    assert len(str(refused.value)) < 1000


# ---- chat templates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
            "memory",
        ),
        ("{{ 'a' | indent(1000000000, true) }}", "memory"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
        ("{{ 'a' * 20000000 }}", "its output has 20,000,000 characters; at most 10,000,000 are allowed"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "nested too deeply, or has an infinite recursion"),
        ("{{ raise_exception('a' * 100000) }}", "TemplateError: aaa"),
        pytest.param("{{ 9 ** (9 ** 9) }}", "more than 1 seconds of computing", marks=pytest.mark.slow),
    ],
)
def test_a_template_that_asks_for_too_much_is_refused_and_the_next_one_rendered(source, message):
    messages = [{"role": "user", "content": "Hello"}]
    with pytest.raises(ValueError, match=message) as refused:
        ChatTemplate(source).rendered(messages)
    assert len(str(refused.value)) < 2000
    assert ChatTemplate("{{ messages[0].content }}").rendered(messages) == "Hello"


# ---- patterns -------------------------------------------------------------------------------------------------------

UNITS = (" ", "1", "a", "\\", "{", "(", "-", "/", "^", "<", "=", "11,", "1 ", "\\text{", "\\frac{")
STARTS = ("", "1 ^", "answer", "\\frac", "a")
# Matched at one position only.
MATCHED = {
    "jaxrl_llm.rewards.verifiers.numbers._UNKNOWN",
    "jaxrl_llm.rewards.verifiers.text_similarity._NEXT",
    "jaxrl_llm.commands.evaluate_checkpoint._REQUIREMENT",
    "jaxrl_llm.hub._REPOSITORY",
}


def patterns():
    """All compiled patterns of modules of the package, by module and name."""
    for found in pkgutil.walk_packages(jaxrl_llm.__path__, "jaxrl_llm."):
        if not found.name.endswith("__main__"):
            module = importlib.import_module(found.name)
            yield from ((f"{found.name}.{n}", v) for n, v in vars(module).items() if isinstance(v, re.Pattern))


def seconds(function, text: str) -> float:
    start = time.thread_time()
    function(text)
    return time.thread_time() - start


@pytest.mark.slow
def test_no_pattern_is_quadratic():
    """For four times the text a linear pattern takes four times as long, and a quadratic one sixteen times."""
    known, slow = {pattern: place for place, pattern in patterns()}, []
    assert len(known) > 20
    for pattern, place in known.items():
        search = pattern.match if place in MATCHED else lambda text, pattern=pattern: [*pattern.finditer(text)]
        for start in STARTS:
            for unit in UNITS:
                short, long, longest = (start + unit * (size // len(unit)) + "!" for size in (500, 2000, 8000))
                if seconds(search, short) * 8 + 0.001 > seconds(search, long):
                    continue
                # Texts longer than bounded repeats, and the best of three, since a busy machine may stall.
                few, many = (min(seconds(search, text) for _ in range(3)) for text in (long, longest))
                if many > max(few * 8, 0.004):
                    slow.append((place, long[:12]))
    assert slow == []


def test_answers_are_read_in_linear_time():
    for text in ("1 ^" + " " * 25_000, "11," * 3000, "3=" * 3000 + "3", "1 million " * 1000, "\\boxed{" * 5000 + "1"):
        assert seconds(parsed_number, text) < 1, text[:20]
        assert seconds(extract_number, text) < 1, text[:20]
