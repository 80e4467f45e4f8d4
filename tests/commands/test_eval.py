"""`jaxrl eval` and `jaxrl compare`: own data and grader, goes on where it stopped, suites, requirements, bad input."""

from __future__ import annotations

import contextlib
import io
import json

import pytest
import yaml

from jaxrl_llm import cli
from jaxrl_llm.run.recipes import ModuleMissing
from jaxrl_llm.run.restored import restored_network, restored_run

GRADER = """
calls = []

def grade(completion, answer, weight=1):
    calls.append(completion)
    return {"right": completion.startswith("<a>" + answer[0]), "answer": completion[:4], "confidence": 0.5}

def of_level(completion, level):
    return level > 0

def breaks_at_fourth(completion, answer, weight=1):
    calls.append(completion)
    if len(calls) > 9:
        raise KeyError("no such thing")
    return {"right": completion.startswith("<a>" + answer[0]), "answer": completion[:4], "confidence": 0.5}

def breaks(completion, item):
    if item["item_id"] == 2:
        raise KeyError("no such thing")
    return True
"""
LINES = [
    {"prompt": f"A:{a}+{b}", "answer": str(a + b), "kind": "odd" if a % 2 else "even"}
    for a in (1, 2)
    for b in (3, 4, 5)
]


def said(*arguments):
    """(exit status, standard output, standard error) of `jaxrl`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main([str(each) for each in arguments])
    return status, out.getvalue(), err.getvalue()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with problems and a grader, where the command is given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_grader.py").write_text(GRADER)
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return tmp_path


OWN = ("--data", "problems.jsonl", "--grader", "own_grader:grade", "--k", "1,2", "--batch", "6")


def test_own_problems_and_grader_leave_one_line_a_problem(place, finished_run):
    status, out, err = said("eval", finished_run.directory, *OWN, "--by", "kind", "--out", "out", "--json")
    assert status == 0, err
    found = json.loads(out)
    lines = [json.loads(line) for line in (place / "out" / "problems.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [line["prompt"] for line in LINES]
    assert all(len(line["samples"]) == 2 for line in lines)
    right = [[s["completion"].startswith("<a>" + line["answer"][0]) for s in line["samples"]] for line in lines]
    assert right == [[s["correct"] for s in line["samples"]] for line in lines]
    assert found["pass@1"] == pytest.approx(sum(map(sum, right)) / 12)
    assert found["calibration"]["stated"]["brier"] == pytest.approx(0.25)
    assert {name: part["problems"] for name, part in found["by"]["kind"].items()} == {"even": 3, "odd": 3}
    assert json.loads((place / "out" / "summary.json").read_text()).items() <= found.items()


def test_one_that_was_interrupted_goes_on_and_gives_the_same(place, finished_run):
    said("eval", finished_run.directory, *OWN, "--out", "whole")
    whole = {name: (place / "whole" / name).read_bytes() for name in ("problems.jsonl", "summary.json")}
    lines = whole["problems.jsonl"].splitlines(keepends=True)
    for kept in (2, 3):  # two problems a batch
        cut = place / f"cut{kept}"
        cut.mkdir()
        (cut / "settings.json").write_bytes((place / "whole" / "settings.json").read_bytes())
        (cut / "problems.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
        assert said("eval", finished_run.directory, *OWN, "--out", cut)[0] == 0
        assert {name: (cut / name).read_bytes() for name in whole} == whole
    status, _, err = said("eval", finished_run.directory, *OWN, "--out", "whole", "--temperature", "0.5")
    assert status == 2
    assert "holds an evaluation with temperature 1.0, and this one has 0.5; give another directory" in err


def test_a_finished_one_is_not_sampled_again(place, finished_run):
    import own_grader

    said("eval", finished_run.directory, *OWN, "--out", "out")
    before = len(own_grader.calls)
    status, out, _ = said(
        "eval", finished_run.directory, *OWN[:-4], "--k", "2", "--samples", "2", "--batch", "6", "--out", "out"
    )
    assert status == 0
    assert len(own_grader.calls) == before
    assert "pass@2" in out
    again = ("eval", finished_run.directory, *OWN[:-4], "--batch", "6", "--out", "out")
    status, out, err = said(*again, "--k", "1", "--by", "kind", "--json")
    assert status == 0, err  # the stored samples, by a column that was not named before
    found = json.loads(out)
    assert (found["samples_per_problem"], "pass@2" in found, found["by"]["kind"]["odd"]["problems"]) == (2, False, 3)
    status, _, err = said(*again)
    assert (status, "with samples 2, too few for k [1, 8]; give --k with numbers up to 2" in err) == (2, True), err
    table = said(*again, "--k", "1")[1]
    assert table.replace("\n", "").count(finished_run.directory.name) == 1
    assert len(own_grader.calls) == before


def test_a_grader_that_fails_names_the_problem_and_what_was_done_stays(place, finished_run):
    arguments = ("--data", "problems.jsonl", "--k", "1", "--batch", "4", "--out", "out")
    status, _, err = said("eval", finished_run.directory, *arguments, "--grader", "own_grader:breaks")
    assert status == 1
    assert "grader 'own_grader:breaks' failed at line 3 of problems.jsonl ('A:1+5') with KeyError" in err
    assert "Traceback" not in err
    assert len((place / "out" / "problems.jsonl").read_text().splitlines()) == 2


def test_what_was_graded_before_a_failure_in_a_batch_is_kept_and_not_graded_again(place, finished_run, monkeypatch):
    import own_grader

    own = ("eval", finished_run.directory, *OWN[:-1], "18")  # all problems in one batch
    assert said(*own, "--out", "whole")[0] == 0
    whole = {name: (place / "whole" / name).read_bytes() for name in ("problems.jsonl", "summary.json")}
    own_grader.calls.clear()
    with monkeypatch.context() as broken:
        broken.setattr(own_grader.grade, "__code__", own_grader.breaks_at_fourth.__code__)
        status, _, err = said(*own, "--out", "out")
    assert (status, "failed at line 4 of problems.jsonl" in err) == (1, True), err
    assert (place / "out" / "problems.jsonl").read_bytes() == b"".join(whole["problems.jsonl"].splitlines(True)[:3])
    before = len(own_grader.calls)
    assert said(*own, "--out", "out")[0] == 0
    assert len(own_grader.calls) - before == 9
    assert {name: (place / "out" / name).read_bytes() for name in whole} == whole


def test_every_checkpoint_of_a_run_and_two_of_them_compared(place, finished_run):
    status, out, err = said("eval", finished_run.directory, *OWN, "--all", "--out", "all", "--json")
    assert status == 0, err
    found = json.loads(out)["checkpoints"]
    steps = sorted(int(each.name) for each in (finished_run.directory / "checkpoints").iterdir() if each.name.isdigit())
    assert list(found) == [str(step) for step in steps]
    assert json.loads((place / "all" / "summary.json").read_text())["checkpoints"] == found
    first, last = place / "all" / str(steps[0]), place / "all" / str(steps[-1])
    status, out, _ = said("compare", first, last, "--json")
    row = json.loads(out)["metrics"]["pass@1"]
    assert row["first"] == found[str(steps[0])]["pass@1"]
    assert row["second"] - row["first"] == pytest.approx(row["difference"])
    assert "95% interval" in said("compare", first, last)[1]
    assert "best" in said("eval", finished_run.directory, *OWN, "--all", "--out", "all")[1]


@pytest.fixture
def run_elsewhere(place, finished_run):
    """A run whose functions of training are in a module that is not found here."""
    run = place / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(finished_run.directory / "checkpoints")
    tree = yaml.safe_load((finished_run.directory / "config.yaml").read_text())
    tree |= {"credit": [{"advantages": {"python": "methods_elsewhere:centred"}}]}
    tree |= {"losses": [{"python": "methods_elsewhere:loss"}]}
    tree["rewards"].append({"python": "methods_elsewhere:brief"})
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    return run


def test_a_run_is_evaluated_where_its_functions_of_training_are_not_found(run_elsewhere, finished_run):
    status, out, err = said("eval", run_elsewhere, *OWN, "--json")
    assert status == 0, err
    assert err.startswith("note: not measured: rewards names python: 'methods_elsewhere:brief', but importing")
    assert "give the command in the directory of the module, or set PYTHONPATH to it" in err
    found, same = json.loads(out), json.loads(said("eval", finished_run.directory, *OWN, "--json")[1])
    assert {**found, "checkpoint": ""} == {**same, "checkpoint": ""}
    assert restored_run(run_elsewhere)[0].config.credit == ({"advantages": {"python": "methods_elsewhere:centred"}},)
    with pytest.raises(ModuleMissing, match="methods_elsewhere"):
        restored_network(run_elsewhere, "reference")


SUITE = """
k: [1, 2]
evaluations:
  own: {data: problems.jsonl, grader: "own_grader:grade", by: [kind]}
  sums: {task: addition, levels: [1, 2], options: {scratchpad: false}, problems: 4}
"""


@pytest.mark.slow
def test_a_suite_evaluates_each_and_requirements_set_the_status(place, finished_run):
    (place / "suite.yaml").write_text(SUITE)
    suite = ("eval", finished_run.directory, "--suite", "suite.yaml", "--out", "suite", "--json")
    status, out, err = said(*suite, "--require", "sums/pass@1>=0", "--require", "own/calibration.stated.ece<=1")
    assert (status, err) == (0, "")
    found = json.loads(out)["evaluations"]
    assert (found["own"]["problems"], found["sums"]["problems"]) == (6, 4)
    status, _, err = said(*suite, "--require", "greedy>=1.5")
    assert status == 1
    assert err.count("not met") == 2
    assert "not met: own/greedy is" in err
    status, out, _ = said("compare", "suite", "suite", "--json")
    assert json.loads(out)["forgetting"] == 0


def test_the_divergence_from_itself_is_zero_and_rewards_are_named(place, finished_run):
    (place / "own_reward.py").write_text("def odd(completions, kind):\n    return [float(k == 'odd') for k in kind]\n")
    extra = ("--reference", finished_run.directory, "--reward", "number_match", "--reward", "own_reward:odd")
    status, out, err = said("eval", finished_run.directory, *OWN, *extra, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["kl_reference"] == pytest.approx(0, abs=1e-3)
    assert 0 <= found["reward/number_match"] <= 1
    assert "best_by_number_match@2" in found
    assert found["reward/odd"] == 0.5  # a column of the file


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "problems.jsonl", "--grader", "own_grader:other"], "has no 'other'"),
        (["--data", "problems.jsonl", "--grader", "absent:grade"], "importing 'absent' failed"),
        (
            ["--data", "problems.jsonl", "--by", "sauce"],
            "line 1 of problems.jsonl has no column 'sauce' that holds a number or a text; there are answer",
        ),
        (["--data", "problems.jsonl", "--by", "level"], "line 1 of problems.jsonl has no column 'level'"),
        (
            ["--data", "problems.jsonl", "--grader", "own_grader:of_level"],
            "names 'level', but line 1 of problems.jsonl has only the columns answer, kind, prompt; name one of these",
        ),
        (["--data", "absent.jsonl"], "data file absent.jsonl cannot be read: No such file"),
        (["--data", "problems.jsonl", "--format", "choice"], "6 lines that cannot be used"),
        (["--data", "problems.jsonl", "--format", "chioce"], "format"),
        (["--data", "problems.jsonl", "--problems", "7"], "--problems is 7, but problems.jsonl has 6 problems"),
        (["--data", "problems.jsonl", "--task", "addition"], "name one of them"),
        (["--temperature", "0"], "temperature is 0.0; samples need one above 0"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--require", "pass@1"], "--require is 'pass@1'; write a metric"),
        (["--require", "pass@4>0.5"], "pass@4 is not measured with k [1, 8]; add it to --k"),
        (["--suite", "absent.yaml"], "--suite absent.yaml cannot be read"),
        (["--suite", "problems.jsonl"], "--suite problems.jsonl cannot be read as YAML: "),
        (["--data", "problems.jsonl", "--out", "problems.jsonl"], "--out problems.jsonl cannot be used"),
        (["--reward", "nubmer_match"], "did you mean 'number_match'?"),
        (["--reward", "learned_reward"], "reads 'reward_scores', which an evaluation does not have"),
        (["--chat"], "leave --chat out"),
    ],
)
def test_what_cannot_be_is_said_in_one_paragraph(place, finished_run, arguments, message):
    status, _, err = said("eval", finished_run.directory, *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        ("evaluations: {a: {dtaa: x}}", "suite.yaml: evaluations.a has no key 'dtaa'; did you mean 'data'?"),
        ("evaluations: {a: {k: [9], samples: 4}}", "evaluations.a: k is [9], but there are 4 samples"),
        ("evaluations: {a/b: {}}", "under a name without a slash"),
        ("evaluations: {}", "names no evaluations"),
    ],
)
def test_a_suite_that_cannot_be_is_refused(place, finished_run, suite, message):
    (place / "suite.yaml").write_text(suite)
    status, _, err = said("eval", finished_run.directory, "--suite", "suite.yaml")
    assert (status, message in err) == (2, True), err


def test_what_cannot_be_compared_says_why(place, finished_run):
    said("eval", finished_run.directory, *OWN, "--out", "a")
    said("eval", finished_run.directory, *OWN, "--problems", "4", "--out", "b")
    assert "6 and 4 problems and cannot be compared" in said("compare", "a", "b")[2]
    assert "line 1 is not a record of an evaluation" in said("compare", "a", place)[2]
    assert "holds no problems.jsonl" in said("compare", "a", finished_run.directory / "checkpoints")[2]


def test_a_run_leaves_its_evaluations_for_comparison(finished_run):
    places = [finished_run.directory / "evaluations" / when for when in ("before", "after")]
    found = json.loads(said("compare", *places, "--json")[1])
    before, after = (finished_run.summary[when] for when in ("before", "after"))
    for name in ("greedy", "pass@2", "maj@4"):
        row = found["metrics"][name]
        assert (row["first"], row["second"]) == pytest.approx((before[name], after[name]))


def test_a_config_names_a_grader_of_its_own(place, micro_config):
    from jaxrl_llm.config import parse_config
    from jaxrl_llm.data import CharacterTokenizer
    from jaxrl_llm.run.batches import grader
    from jaxrl_llm.run.setup import parts

    tree = {**micro_config, "evaluation": {"grader": "own_grader:grade"}, "warm_start": {"steps": 0}}
    built = parts(parse_config(tree, vocabulary_size=CharacterTokenizer().vocabulary_size))
    item = {"item_id": 0, "body": "A:1+2", "answer": "3"}
    grade = grader(built, [item])
    assert grade(item, "<a>33</a>") == (True, "3", None, 0.5)
    assert not grade(item, "<a>4</a>").right


@pytest.mark.slow
def test_a_value_network_of_the_run_guides_its_samples(place, micro_config):
    method = {"credit": [{"returns": "gae_returns"}, {"advantages": "gae"}], "losses": ["clipped_value"]}
    tree = micro_config | method | {"networks": {}, "warm_start": {"steps": 0}}
    tree |= {"training": micro_config["training"] | {"steps": 2}}
    (place / "config.yaml").write_text(yaml.safe_dump(tree))
    assert said("train", "config.yaml", "run_dir=run")[0] == 0
    answers = {}
    for strength in ("0", "400"):
        out = place / strength
        how = ("--guided-by", "value", "--strength", strength, "--out", out)
        status, _, err = said("eval", "run", *OWN, *how)
        assert status == 0, err
        answers[strength] = [json.loads(line)["samples"] for line in (out / "problems.jsonl").read_text().splitlines()]
    assert said("eval", "run", *OWN, "--out", place / "plain")[0] == 0
    plain = [json.loads(line)["samples"] for line in (place / "plain" / "problems.jsonl").read_text().splitlines()]
    texts = {name: [[one["completion"] for one in row] for row in rows] for name, rows in answers.items()}
    assert texts["0"] == [[one["completion"] for one in row] for row in plain]
    assert texts["400"] != texts["0"]
    status, _, err = said("eval", "run", *OWN, "--guided-by", "policy")
    assert status != 0
    assert "--guided-by is 'policy', which has no head with one output" in err
