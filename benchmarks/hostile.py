"""Fuzzing of user inputs: each input is accepted, or refused with one short message of ours, within limits.

    python benchmarks/hostile.py [configs] [models] [templates] [jsonl] [--count N] [--seed N]

Inputs are shipped or well-formed ones with mutated values, types, names, nesting and bytes. A case fails by an error
that is none of the package's own sentences (a traceback), a message of more than 2,000 characters, more than five
seconds of CPU, or more than one gigabyte of memory. Exit status 1 where one fails; `--only N` runs one case alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import linecache
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
LONGEST_MESSAGE = 2000
MOST_SECONDS = 5.0
MOST_BYTES = 2**30


class Case(NamedTuple):
    """One input: its name, and the function that accepts or refuses it."""

    name: str
    run: Callable[[], Any]


class Outcome(NamedTuple):
    name: str
    kind: str  # "taken", "refused", or the failure
    seconds: float
    message: str


# ---- judging --------------------------------------------------------------------------------------------------------


def own(error: BaseException) -> bool:
    """Whether an error is a sentence of the package: raised by a `raise` of its own."""
    frames = traceback.extract_tb(error.__traceback__)
    innermost = frames[-1]
    package = str(ROOT / "jaxrl_llm")
    raised = (linecache.getline(innermost.filename, innermost.lineno or 0)).strip().startswith("raise")
    return isinstance(error, (ValueError, OSError)) and innermost.filename.startswith(package) and raised


def computed() -> float:
    """CPU seconds of this process and of its ended child processes."""
    return sum(os.times()[:4])


def judged(case: Case) -> Outcome:
    """The result of one input."""

    def hangs(*_: Any) -> None:
        raise TimeoutError("hangs")

    before = [(each, signal.signal(each, hangs)) for each in (signal.SIGALRM, signal.SIGPROF)]
    signal.setitimer(signal.ITIMER_PROF, 4 * MOST_SECONDS)
    signal.alarm(600)  # of the clock, for what waits
    start, message = computed(), ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.run()
        kind = "taken"
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        kind = "refused" if own(error) else "traceback"
        if kind == "traceback":
            message += "\n" + "".join(traceback.format_exception(error)[-3:])
        elif len(str(error)) > LONGEST_MESSAGE:
            kind = "long message"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for each, handler in before:
            signal.signal(each, handler)
    seconds = computed() - start
    return Outcome(case.name, "slow" if seconds > MOST_SECONDS else kind, seconds, message)


# ---- mutations ------------------------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 1.5, -0.5, 1e-9, 1e308, float("inf"), float("-inf"), float("nan")),
    *(2**31, 2**63, 2**64, 10**30, -(10**30), 10**9, 10**12),
    *(
        "",
        " ",
        "x",
        "1",
        "1e3",
        "nan",
        "²",
        "٣",
        "none",
        "auto",
        "a b",
        "module:function",
        "os:getcwd",
        "::",
        "../..",
        "/",
    ),
    *("\x00", "\ud800".encode("utf-8", "surrogatepass").decode("utf-8", "replace"), "é" * 50, "{body}", "{}", "{x!z}"),
    *("a" * 5000, "%s%n", "!!python/object:os.system", [], {}, [[]], [{}], [None], {"": None}, {"a": {"b": {"c": []}}}),
    *([1, 2, 3], ["a", "b"], [1e400], {"x": 1}, {"python": 3}, {"python": "os:getcwd"}, {"name": []}, [[1], [2]]),
    *([0] * 300, {str(i): i for i in range(300)}, {"temperature": "high"}, {"grpo": 3}, {"extends": "x"}),
)


def paths(tree: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of values in nested mappings and lists."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        yield (*here, key)
        yield from paths(value, (*here, key))


def strange(random_: random.Random, tree: Any) -> Any:
    """A value that is unlikely to fit, or one from elsewhere in the tree."""
    if random_.random() < 0.25 and (known := list(paths(tree))):
        return copy.deepcopy(at(tree, random_.choice(known)))
    if random_.random() < 0.03:
        return nested(random_.choice((30, 48, 60, 90)))
    return copy.deepcopy(random_.choice(VALUES))


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def mutated(random_: random.Random, tree: Any, names: tuple[str, ...] = ()) -> Any:
    """The tree with one to three changes of values, names or nesting."""
    tree = copy.deepcopy(tree)
    for _ in range(random_.choice((1, 1, 1, 2, 3))):
        known = list(paths(tree))
        if not known:
            return tree
        *above, key = random_.choice(known)
        holder = at(tree, tuple(above))
        change = random_.random()
        number = isinstance(holder[key], int | float) and not isinstance(holder[key], bool)
        if number and change < 0.4:
            holder[key] = random_.choice(
                (holder[key] + 1, holder[key] * 2, holder[key] // 2, holder[key] / 3, -holder[key])
            )
        elif change < 0.6:
            holder[key] = strange(random_, tree)
        elif change < 0.7:
            del holder[key]
        elif change < 0.8:
            holder[key] = random_.choice(
                ([holder[key]], {str(key): holder[key]}, {"name": holder[key]}, [holder[key]] * 2)
            )
        elif isinstance(holder, dict):
            value = holder.pop(key) if change < 0.9 else strange(random_, tree)
            written = (
                random_.choice(
                    (f"{key}x", str(key)[:-1], str(key).upper(), *names[:0], *random_.sample(names, min(3, len(names))))
                )
                or "x"
            )
            holder[written] = value
    return tree


def damaged(random_: random.Random, content: bytes) -> bytes:
    """The bytes with one to four cuts, insertions, swaps or copies."""
    for _ in range(random_.randint(1, 4)):
        place = random_.randrange(len(content) + 1)
        span = random_.choice((1, 1, 3, 20, 200))
        change = random_.randrange(6)
        if change == 0:
            content = content[:place] + content[place + span :]
        elif change == 1:
            content = content[:place] + random_.choice(TOKENS) + content[place:]
        elif change == 2:
            content = content[:place] + bytes([random_.randrange(256)]) + content[place + 1 :]
        elif change == 3:
            content = content[:place] + content[place : place + span] * 2 + content[place + span :]
        elif change == 4:
            content = content[: max(place, 1)]
        else:
            other = random_.randrange(len(content) + 1)
            content = content[:place] + content[other : other + span] + content[place:]
    return content


TOKENS = (
    *(
        b"\x00",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\t",
        b"\r",
        b"\n",
        b"\n\n",
        b"  ",
        b": ",
        b"- ",
        b"? ",
        b"# ",
        b"---\n",
        b"...\n",
    ),
    *(
        b"&a ",
        b"*a ",
        b"<<: *a\n",
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"'",
        b"| \n",
        b"> \n",
        b"%YAML 1.3\n",
        b"!!binary ",
        b"@",
        b"`",
    ),
    *(
        b"!!python/object/apply:os.system [ls]",
        b"!!set ",
        b"!!int ",
        b"!!float ",
        b"!!timestamp ",
        b"!x ",
        b"1:2:3",
        b"2024-13-45",
    ),
    *(
        b"0x",
        b"1_000",
        b".inf",
        b".nan",
        b"9" * 5000,
        b"[" * 3000,
        b"{" * 3000,
        b"- " * 3000,
        b"a: " * 50,
        b"extends: 3\n",
    ),
    *(
        b"extends: [demo.yaml]\n",
        b"extends: ../x.yaml\n",
        b"\xe2\x80\xa8",
        b"\xc2\x85",
        b"\xed\xa0\x80",
        b"&a [*a]\n",
        b"x: &a [*a, *a]\n",
    ),
)


# ---- configs --------------------------------------------------------------------------------------------------------


def configs(random_: random.Random, folder: Path) -> Callable[[int], Case]:
    """Shipped configs, changed as text, as a tree, or by overrides."""
    import yaml

    from jaxrl_llm.commands.arguments import loaded_config
    from jaxrl_llm.config import read_tree
    from jaxrl_llm.run.setup import parts
    from jaxrl_llm.run.staged import last_stage

    shipped = sorted((ROOT / "configs").rglob("*.yaml"))
    trees = [read_tree(path) for path in shipped]
    names = tuple(sorted({key for tree in trees for path in paths(tree) for key in path if isinstance(key, str)}))
    file, dumper = folder / "fuzzed.yaml", getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    shutil.copytree(ROOT / "configs", folder / "configs")

    def case(number: int) -> Case:
        chosen = random_.randrange(len(shipped))
        way, overrides = random_.random(), []
        if way < 0.25:
            content = damaged(random_, shipped[chosen].read_bytes())
            written = folder / "configs" / shipped[chosen].relative_to(ROOT / "configs").parent / "fuzzed.yaml"
        else:
            tree = mutated(random_, trees[chosen], names) if way < 0.8 else trees[chosen]
            content = yaml.dump(tree, Dumper=dumper, allow_unicode=True).encode("utf-8", "replace")
            written = file
            if way >= 0.8:
                path = list(random_.choice(list(paths(tree))))
                if random_.random() < 0.3:
                    path.append(random_.choice(names))
                value = yaml.safe_dump(strange(random_, tree), default_flow_style=True).removesuffix("\n...\n")
                overrides = [f"{'.'.join(map(str, path))}={value}"]

        def run() -> None:
            written.write_bytes(content)
            parts(last_stage(loaded_config([str(written), *overrides])))

        return Case(f"configs {number}: {shipped[chosen].name} {overrides}", run)

    return case


# ---- lines of JSON --------------------------------------------------------------------------------------------------


def lines_of_json(random_: random.Random, folder: Path) -> Callable[[int], Case]:
    """Files of problems and of judged completions: mutated records, damaged bytes, and files that are none."""
    from jaxrl_llm.data import fields_of, problem_sets
    from jaxrl_llm.data.written import judged_groups

    turn = {"role": "user", "content": "What is 2+3?"}
    records = {
        "prompt": {"prompt": "What is 2+3?", "answer": "5", "level": 1, "source": {"name": "x"}},
        "gsm8k": {"question": "What is 2+3?", "answer": "2+3=<<2+3=5>>5\n#### 5"},
        "messages": {"messages": [turn, {"role": "assistant", "content": "It is \\\\boxed{5}."}], "answer": "5"},
        "pairs": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "rankings": {"prompt": "a", "completions": ["b", "c", "d"]},
        "ratings": {"prompt": "a", "completion": "b", "rating": 3.5},
        "labels": {"prompt": "a", "completion": "b", "label": True},
        "steps": {"prompt": "a", "steps": ["b", "c"], "labels": [1, 0]},
    }
    whole: tuple[Callable[[bytes], bytes], ...] = (
        lambda lines: b"[" * 100_000,
        lambda lines: b'{"a":' * 100_000,
        lambda lines: b"{bad}\n" * 1_000_000,
        lambda lines: lines.decode("utf-8", "replace").encode("utf-16"),
        lambda lines: b"\xef\xbb\xbf" + lines,
        lambda lines: b'{"prompt": "' + b"x" * 20_000_000 + b'", "answer": "5"}',
        lambda lines: b'{"prompt": "\\ud800", "answer": "5"}\n' + lines,
        lambda lines: b'{"prompt": "a", "prompt": "b", "answer": "5"}\n' + lines,
        lambda lines: b'{"prompt": "a", "answer": NaN}\n' + lines,
        lambda lines: b'{"prompt": "a", "answer": ' + b"9" * 10_000 + b"}\n" + lines,
        lambda lines: b'{"prompt": "a", "answer": 1e999}\n' + lines,
        lambda lines: b"\x00" * 1_000_000,
        lambda lines: b"\n" * 5_000_000,
        lambda lines: b"[" + b",".join(lines.strip().split(b"\n")) + b"]",
        lambda lines: b"",
    )
    file = folder / "lines.jsonl"

    def case(number: int) -> Case:
        kind = random_.choice(list(records))
        made = [copy.deepcopy(records[kind]) for _ in range(40)]
        for place, record in enumerate(made):
            for key, value in record.items():
                if isinstance(value, str) and key in ("prompt", "question"):
                    record[key] = f"{value} {place}"
                elif kind == "messages" and key == "messages":
                    record[key] = [{"role": "user", "content": f"What is {place}+3?"}, *value[1:]]
        for _ in range(random_.choice((0, 1, 1, 3, 40))):
            place = random_.randrange(len(made))
            made[place] = mutated(random_, made[place], ("prompt", "answer", "messages", "role", "content", "label"))
        content = b"\n".join(json.dumps(record).encode() for record in made) + b"\n"
        way = random_.random()
        if way < 0.3:
            content = damaged(random_, content)
        elif way < 0.5:
            content = random_.choice(whole)(content)
        special = random_.random()

        def run() -> None:
            if file.is_dir():
                file.rmdir()
            file.unlink(missing_ok=True)
            if special < 0.02:
                os.mkfifo(file)
            elif special < 0.03:
                file.mkdir()
            elif special < 0.04:
                file.symlink_to("/dev/zero")
            else:
                file.write_bytes(content)
            if kind in ("prompt", "gsm8k", "messages"):
                problem_sets(file, fields_of(kind))
            else:
                judged_groups(file, kind)  # type: ignore[arg-type]

        return Case(f"jsonl {number}: {kind}", run)

    return case


# ---- chat templates -------------------------------------------------------------------------------------------------

PIECES = (
    *(
        "{{ messages[0].content }}",
        "{{ bos_token }}",
        "{% for message in messages %}{{ message.role }}{% endfor %}",
        "text\n",
    ),
    *(
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{% for i in range(10**9) %}{% endfor %}",
    ),
    "{% set n = namespace(s='aaaaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "{% set n = namespace(s='aaaaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "{% set n = namespace(l=[1]) %}{% for i in range(60) %}{% set n.l = n.l + n.l %}{% endfor %}",
    *(
        "{{ 'a' | indent(1000000000, true) }}",
        "{{ 'a' | center(1000000000) }}",
        "{{ 'a' * 10000000000 }}",
        "{{ [0] * 10000000000 }}",
    ),
    *(
        "{{ messages | tojson(indent=1000000000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ 'a'.ljust(10**10) }}",
    ),
    *(
        "{{ 9 ** (9 ** 9) }}",
        "{{ 2 ** 2 ** 2 ** 2 ** 2 ** 2 ** 2 }}",
        "{{ strftime_now('%1000000000d') }}",
        "{{ lipsum(n=100000) }}",
    ),
    *(
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "[" * 5000 + "]" * 5000 + " }}",
        "{{ " + "-" * 5000 + "1 }}",
        "{{ " + "1+" * 5000 + "1 }}",
    ),
    *(
        "{% if 1 %}" * 500 + "{% endif %}" * 500,
        "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
        "{{ a" + ".b" * 5000 + " }}",
        "{{ a" + "|e" * 5000 + " }}",
    ),
    *(
        "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    ),
    *(
        "{% include 'x' %}",
        "{% extends 'x' %}",
        "{% import 'x' as y %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ self }}",
    ),
    *(
        "{{ messages.append(1) }}",
        "{{ raise_exception('a' * 100000) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ 1 // 0 }}",
        "{{ none.x.y }}",
    ),
    *(
        "{{ 'a' | replace('', 'b' * 100000) | replace('', 'b' * 100000) }}",
        "{{ (range(99999) | list) | tojson }}",
        "{{ range(99999) | join('x' * 99999) }}",
    ),
    *(
        "{{ 'a' | batch(10**9, 'x') | list }}",
        "{{ range(9) | slice(10**9) | list }}",
        "{{ ('a' * 100000) | wordwrap(1) }}",
        "{{ ('<' * 100000) | striptags }}",
    ),
    *(
        "{{ ('http://' * 50000) | urlize }}",
        "{{ messages | map(attribute='role') | list | string }}",
        "{{ '\\ud800' }}",
        "{#",
        "{%",
        "{{",
        "{% raw %}",
        "{% generation %}",
    ),
    *(
        "{{ '" + "a" * 100_000 + "' }}",
        "{{ " + "9" * 10_000 + " }}",
        "{% set x = 'a' %}" * 5000,
        "\x00",
        "{{ strftime_now('\x00') }}",
        "{{ strftime_now(3) }}",
    ),
)


def templates(random_: random.Random, folder: Path) -> Callable[[int], Case]:
    """Chat templates put together of harmless and hostile pieces, and damaged ones of the usual kind."""
    from jaxrl_llm.data.chat import ChatTemplate, rewrites_history

    usual = (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )

    def case(number: int) -> Case:
        if random_.random() < 0.3:
            source = damaged(random_, usual.encode()).decode("utf-8", "replace")
        else:
            source = "".join(random_.choice(PIECES) for _ in range(random_.choice((1, 1, 2, 3))))
        options = mutated(random_, {"enable_thinking": False, "a": [1]}) if random_.random() < 0.3 else {}

        def run() -> None:
            template = ChatTemplate(source, {"eos_token": "</s>", "bos_token": "<s>"}, options)
            template.rendered([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
            rewrites_history(template)

        return Case(f"templates {number}: {source[:60]!r}", run)

    return case


# ---- model directories ----------------------------------------------------------------------------------------------


def models(random_: random.Random, folder: Path) -> Callable[[int], Case]:
    """Tiny models of every family with mutated config.json, index, tokenizer settings, weights and special files."""
    import jax
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    from jaxrl_llm.data import load_tokenizer, with_chat
    from jaxrl_llm.models.families import FAMILIES, config_from_json
    from jaxrl_llm.models.tensor_names import checkpoint_layout
    from jaxrl_llm.models.weights import load_model

    small = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "head_dim": 8}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    small |= {"max_position_embeddings": 64, "torch_dtype": "float32", "layer_types": None, "rope_scaling": None}
    small |= {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
    small |= {"topk_group": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "kv_lora_rank": 8}
    small |= {"q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1}
    small |= {"first_k_dense_replace": 1, "sliding_window": 8, "eos_token_id": 1}
    known = {}
    for architecture in FAMILIES:
        described = small | {"architectures": [architecture]}
        try:
            shapes = checkpoint_layout(config_from_json(described), architecture).tensors()
        except ValueError:  # a family of more kinds of layers than two
            continue
        if sum(map(math.prod, shapes.values())) > 1_000_000:  # its defaults are large
            continue
        known[architecture] = described, {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(11)} | {"<unk>": 11}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    settings = {
        "eos_token": "w1",
        "pad_token": {"content": "w2"},
        "added_tokens_decoder": {"1": {"content": "w1", "special": True, "lstrip": False}},
        "chat_template": "{% for m in messages %}{{ m.content }} w1 {% endfor %}"
        "{% if add_generation_prompt %}w3 {% endif %}",
    }
    here = folder / "model"

    def case(number: int) -> Case:
        architecture = random_.choice(list(known))
        described, tensors = copy.deepcopy(known[architecture])
        files = {
            "config.json": described,
            "tokenizer_config.json": settings,
            "special_tokens_map.json": {"eos_token": "w1"},
            "generation_config.json": {"eos_token_id": [1], "pad_token_id": 2},
            "model.safetensors.index.json": {"metadata": {}, "weight_map": dict.fromkeys(tensors, "a.safetensors")},
            "tokenizer.json": json.loads(words.to_str()),
        }
        indexed = random_.random() < 0.5
        if not indexed:
            del files["model.safetensors.index.json"]
        chosen = "config.json" if random_.random() < 0.5 else random_.choice(list(files))
        way = random_.random()
        if way < 0.75:
            files[chosen] = mutated(random_, files[chosen])
        if chosen == "config.json" and random_.random() < 0.2:
            files[chosen][random_.choice(list(small))] = random_.choice((10**9, 10**6, 0, -1, 1.5, "2", [2], None))
        weights = "a.safetensors" if indexed else "model.safetensors"
        if random_.random() < 0.2:
            name = random_.choice(list(tensors))
            tensors[name] = random_.choice(
                (
                    tensors[name] * np.nan,
                    tensors[name] * np.inf,
                    tensors[name][:0],
                    tensors[name].astype(np.int64),
                    tensors[name][None],
                )
            )
        special, strict = random_.random(), random_.random() < 0.5
        cut = random_.random()

        def run() -> None:
            shutil.rmtree(here, ignore_errors=True)
            here.mkdir()
            for name, value in files.items():
                content = json.dumps(value).encode()
                (here / name).write_bytes(damaged(random_, content) if way >= 0.75 and name == chosen else content)
            save_file(tensors, here / weights)
            if cut < 0.1:
                content = (here / weights).read_bytes()
                (here / weights).write_bytes(damaged(random_, content[:600]) + content[600:])
            if special < 0.08:
                name = random_.choice([*files, weights])
                (here / name).unlink()
                random_.choice((os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path), lambda path: None))(
                    here / name
                )
            elif special < 0.1:
                (here / chosen).write_bytes(b'{"a":' * 100_000)
            model, params = load_model(here, strict=strict)
            jax.block_until_ready(params)
            tokenizer = load_tokenizer(here)
            tokenizer.token_bytes()
            with_chat(tokenizer, rewritten_history="allow").prompt_ids({"body": "w4 w5"})

        return Case(f"models {number}: {architecture} {chosen}", run)

    return case


KINDS: dict[str, tuple[Callable[[random.Random, Path], Callable[[int], Case]], int]] = {
    "configs": (configs, 10_000),
    "models": (models, 300),
    "templates": (templates, 200),
    "jsonl": (lines_of_json, 200),
}


# ---- running --------------------------------------------------------------------------------------------------------


def outcomes(kind: str, count: int, seed: int, only: int | None = None) -> Iterator[Outcome]:
    """What becomes of `count` inputs of a kind, one after the other; each depends on seed and number alone."""
    with tempfile.TemporaryDirectory() as folder:
        random_ = random.Random()
        made = KINDS[kind][0](random_, Path(folder))
        for number in range(count) if only is None else [only]:
            random_.seed(f"{seed} {kind} {number}")
            yield judged(made(number))


def peak_bytes() -> int:
    """Of this process, or of the largest that it started."""
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("kinds", nargs="*", default=[], help=f"of {', '.join(KINDS)}; all by default")
    parser.add_argument(
        "--count",
        type=int,
        help="inputs of each kind (default: " + ", ".join(f"{n} {k}" for k, (_, n) in KINDS.items()) + ")",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one input alone, with its message")
    parser.add_argument("--messages", type=Path, help="a file for all messages, one JSON object a line")
    options = parser.parse_args(arguments)
    os.environ |= {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    status = 0
    for kind in options.kinds or KINDS:
        found, worst, shown = Counter(), Outcome("", "", 0.0, ""), Counter()
        for outcome in outcomes(kind, options.count or KINDS[kind][1], options.seed, options.only):
            found[outcome.kind] += 1
            worst = max(worst, outcome, key=lambda each: each.seconds)
            if options.messages:
                with options.messages.open("a") as out:
                    out.write(json.dumps(outcome._asdict()) + "\n")
            if options.only is not None:
                print(outcome.kind, outcome.message)
            elif outcome.kind not in ("taken", "refused"):
                status = 1
                place = outcome.message.rpartition("File ")[2][:120]
                shown[place] += 1
                if shown[place] == 1:
                    print(f"{outcome.name}\n  {outcome.kind}: {outcome.message[:3000]}", flush=True)
        memory = peak_bytes()
        status |= memory > MOST_BYTES
        print(
            f"{kind}: {dict(found)}; slowest {worst.seconds:.2f} s ({worst.name[:80]}); "
            f"peak memory {memory / 2**20:.0f} MiB"
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
