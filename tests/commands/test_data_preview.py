"""`jaxrl data`: what it counts is what is there, and it fits a screen of 80 columns."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from jaxrl_llm import cli
from jaxrl_llm.config import parse_config
from jaxrl_llm.data import CharacterTokenizer, tasks


@pytest.fixture
def config(tmp_path, micro_config):
    """A file, a tenth of it to test on, beside a built-in task."""
    sums = tasks.task("addition").generate(level=2, count=40)
    of = {split: tasks.task("addition").generate(level=2, count=4, split=split) for split in ("validation", "test")}
    lines = [{"q": one.body, "a": one.answer, "n": place} for place, one in enumerate([*sums, *sums[:3]])]
    files = {"train": lines} | {split: [{"q": one.body, "a": one.answer} for one in part] for split, part in of.items()}
    files["test"].append({"q": lines[0]["q"], "a": lines[0]["a"]})
    for split, objects in files.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in objects))
    task = {"name": "addition", "levels": [1], "train_items": 20, "validation_items": 4, "test_items": 4}
    paths = {f"{split}_path": str(tmp_path / f"{split}.jsonl") for split in of}
    mine = {"path": str(tmp_path / "train.jsonl"), **paths, "fields": {"prompt": "q", "answer": "a"}, "weight": 3}
    tree = {**micro_config, "task": None}
    tree["data"] = {**micro_config["data"], "sources": {"mine": mine, "sums": {"task": task, "weight": 1}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "mine.yaml"


def test_the_preview_counts_what_is_there(config, capsys):
    assert cli.main(["data", str(config), "--count", "3", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert "splits must not overlap" in found["refused"][0]
    assert [one["data_source"] for one in found["prompts"]] == ["mine", "mine", "sums"]
    assert found["prompts"][0]["prompt"].startswith("<bos>A:")
    assert found["prompts"][2]["response"].endswith("</a>")
    equal = {row["where"]: row["equal"] for row in found["equal"]}
    assert (equal["within train"], equal["train and test"], equal["train and validation"]) == (3, 2, 0)
    shares = {row["source"]: (row["problems"], row["share of a step"]) for row in found["sources"]}
    assert shares == {"mine": (43, "75.0%"), "sums": (20, "25.0%")}
    prompts, *_ = (row for row in found["splits"] if row["split"] == "train" and row["tokens of"] == "prompt")
    assert (prompts["problems"], prompts["least"], prompts["most"], prompts["over it"]) == (63, 7, 9, 0)
    assert sum(row["prompts"] for row in found["histogram"]) == 63


def test_it_fits_a_narrow_screen_and_says_what_is_left_out(config, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    changes = [
        "data.overlap=drop",
        "data.sources.mine.where=n is undefined or n < 42",
        "data.sources.mine.duplicates=drop",
        "warm_start.steps=0",  # the file has no demonstrations
    ]
    assert cli.main(["data", str(config), "--split", "test", *changes]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for words in ("mine: not n is undefined or n < 42", "mine: duplicate prompt", "mine: prompt of another split", "█"):
        assert words in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.sources.mine.weight=null", r"data.sources.mine has no weight, but sums has; give all a weight, or none"),
        ("data.sources.mine.weight=0", r"data.sources.mine.weight is 0.*above 0"),
        ("data.sources.sums.path=x", "data.sources.sums has path and task; give one of the two"),
        ("data.sources.mine.pth=x", "data.sources.mine.pth.*did you mean data.sources.mine.path"),
        ("data.path=x.jsonl", "data.path and data.sources are both set"),
        ("data.limit=3", "data.limit is 3, set it in each of data.sources"),
        ("data.selection=uniform", "data.selection chooses prompts, but the weights"),
        ("task={name: addition, levels: [1]}", "task and data.sources are both set"),
        ("data.sources.sums.task.name=grid", "the task 'grid', which is in turns, but a mixture needs single"),
    ],
)
def test_what_a_mixture_cannot_be_is_said(config, capsys, change, message):
    assert cli.main(["data", str(config), change]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_one_condition_needs_no_list(config):
    tree = yaml.safe_load(config.read_text())
    read = parse_config(tree, ["data.sources.mine.where=n > 2"], vocabulary_size=CharacterTokenizer().vocabulary_size)
    assert read.data.sources["mine"].where == "n > 2"


def test_what_a_run_would_refuse_sets_the_status(tmp_path, micro_config, capsys):
    lines = [{"prompt": f"A:{n}+1", "answer": f"{n + 1}", **({"n": n} if n != 7 else {})} for n in range(60)]
    lines[8]["prompt"] += "1" * 20
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "reads_n.py").write_text("def of_n(completions, n):\n    return [float(x) for x in n]\n")
    tree = micro_config | {"task": None, "data": {"path": str(tmp_path / "rows.jsonl")}, "warm_start": {"steps": 0}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree | {"rewards": ["number_match"]}))
    command = ["data", str(tmp_path / "mine.yaml")]
    assert cli.main([*command, "data.overlong_prompts=drop"]) == 0
    capsys.readouterr()
    assert cli.main(command) == 2
    told = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "error: line 9 of" in told
    assert re.search(r"does not fit: its prompt has \d+ tokens, more than max_prompt_tokens=9", told)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(tmp_path)
        assert cli.main([*command, "data.overlong_prompts=drop", "rewards=[{python: 'reads_n:of_n'}]"]) == 2
    assert "'of_n' reads the column 'n', which 1 of" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_of_a_mixture_tells_its_numbers_by_source(config, tmp_path):
    run, steps = tmp_path / "run", ["training.steps=2", "warm_start.steps=2", "evaluation.every_steps=1"]
    drop = ["data.overlap=drop", "data.few_shot={examples: 1, template: '{{ prompt }}{{ response }}'}"]
    sizes = ["rollout.max_prompt_tokens=24", "data.sources.mine.verifier=text"]
    fields = ["data.sources.mine.fields.response=<a>{{ a }}</a>", "data.sources.sums.task.options={scratchpad: false}"]
    assert cli.main(["train", str(config), f"run_dir={run}", *steps, *drop, *sizes, *fields]) == 0
    *_, last = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    assert (last["source/mine/share"], last["source/sums/share"]) == (0.75, 0.25)
    assert {"source/mine/reward", "source/sums/correct_share", "source/sums/completion_tokens"} <= last.keys()
    after = json.loads((run / "summary.json").read_text())["after"]
    assert {"source/mine/pass@1", "source/sums/greedy"} <= after.keys()
    assert after["problems"] == 9
