"""The catalogue lists what recipes can name, with what their docstrings say."""

from __future__ import annotations

import inspect
import json
import re

import pytest

from jaxrl_llm import catalogue, cli, losses, schedules, shipped
from jaxrl_llm.commands.methods import selected
from jaxrl_llm.config import read_tree
from jaxrl_llm.rollout import plans
from jaxrl_llm.run.recipes import RecipeError, credit_terms, loss_terms, number_or_method, reward_terms
from jaxrl_llm.signatures import signature

METHODS = catalogue.methods()
IDS = [f"{entry['room']}-{entry['name']}" for entry in METHODS]


def test_every_room_has_methods_and_no_name_stands_for_two():
    assert {entry["room"] for entry in METHODS} == set(catalogue.ROOMS)
    assert len({entry["name"] for entry in METHODS}) == len(METHODS)
    assert {"exact_answer", "group_normalized", "clipped_surrogate", "divergence"} <= {e["name"] for e in METHODS}


def test_helpers_are_no_methods():
    assert not {"group_mean", "group_sum", "aggregate", "row_weight", "checked_host_reward", "extract_answer"} & {
        entry["name"] for entry in METHODS
    }


@pytest.mark.parametrize("entry", METHODS, ids=IDS)
def test_every_method_says_what_it_is(entry):
    assert entry["summary"].endswith((".", "?")), entry["summary"]
    assert entry["certainty"] in ("verified", "recalled", "reconstructed", "")
    assert entry["where"] in ("program", "host")
    for number in entry["arxiv"]:
        assert re.fullmatch(r"\d{4}\.\d{4,5}", number)
        assert number in entry["reference"]


@pytest.mark.parametrize("entry", [e for e in METHODS if e["arxiv"]], ids=lambda entry: entry["name"])
def test_every_published_method_states_its_certainty(entry):
    assert entry["certainty"]


@pytest.mark.parametrize("entry", METHODS, ids=IDS)
def test_every_method_can_be_named_in_a_recipe(entry):
    build = {
        "reward": lambda name: reward_terms([name])[0].function,
        "loss": lambda name: loss_terms([name])[0].function,
        "schedule": lambda name: number_or_method(name, "coefficient"),
    }.get(entry["room"], lambda name: credit_terms([{"advantages": name}])[0].function)
    found = catalogue.described(entry["name"])
    function = getattr(catalogue.ROOMS[entry["room"]], entry["name"])
    required = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty
    ]
    assert set(required) <= found["hyper_parameters"].keys()
    if required:
        with pytest.raises(RecipeError, match=f"{entry['name']} needs {required[0]}"):
            build(entry["name"])
        return
    assert (
        signature(build(entry["name"])).required[: len(entry["needs"])] == tuple(entry["needs"]) or not entry["needs"]
    )


def test_one_method_is_described_whole():
    entry = catalogue.described("clipped_surrogate")
    assert entry["room"] == "loss"
    assert entry["hyper_parameters"]["clip_high"] == 0.2
    assert entry["hyper_parameters"]["dual_clip"] is None
    assert entry["needs"] == ["logprobs", "old_logprobs", "advantages", "mask"]
    assert "1707.06347" in entry["arxiv"]
    assert "dual_clip: largest ratio" in entry["doc"]
    assert catalogue.described("exact_match")["where"] == "host"
    assert catalogue.described("exact_answer")["where"] == "program"


def test_a_reference_that_goes_over_lines_is_read_whole():
    assert {"1707.06347", "2512.02556"} <= set(catalogue.described("clipped_surrogate")["arxiv"])


def test_an_unknown_method_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"there is no method 'clip_surrogate'; did you mean 'clipped_surrogate'\?"):
        catalogue.described("clip_surrogate")


# ---- recipes --------------------------------------------------------------------------------------------------------

BASE = "extends: ../demo.yaml\nname: base\n"
RECIPE = """\
extends: base.yaml
name: mine
about: {paper: Mine, arxiv: "2503.14476", stage: policy loss, certainty: recalled}
credit:
  - advantages: group_normalized
losses:
  - clipped_surrogate: {clip_high: 0.3}
  - divergence: {samples: vocabulary, coefficient: {adaptive_kl: {sequences_per_step: 8}}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A directory of recipes of our own, at first with nothing in it."""
    methods = tmp_path / "configs" / "methods"
    methods.mkdir(parents=True)
    (methods.parent / "demo.yaml").write_text((shipped.recipe_directory().parent / "demo.yaml").read_text())
    monkeypatch.setattr(shipped, "recipe_directory", lambda: methods)
    return methods


def test_shipped_recipes_are_complete():
    found = catalogue.recipes()
    assert found, "there are no recipes"
    known = {entry["name"] for entry in METHODS}
    for entry in found:
        assert entry["certainty"] in ("verified", "recalled", "reconstructed"), entry["name"]
        assert entry["stage"], entry["name"]
        assert set(entry["functions"]) <= known | set(plans.__all__), entry["name"]
        assert set(entry["needs"]) <= set(catalogue.EVERY_NEED), entry["name"]
        assert read_tree(shipped.recipe_path(entry["name"]))["name"] == entry["name"]


def test_needs_follow_from_what_functions_name():
    needs = {entry["name"]: set(entry["needs"]) for entry in catalogue.recipes()}
    assert needs["grpo"] == {"reference"}
    assert needs["dapo"] == {"several rounds"}
    assert "value model" in needs["ppo"]
    assert {"twin values", "memory", "entropy", "reference"} <= needs["safe"]
    assert needs["dph_f"] == {"host", "stored answers"}
    assert {"demonstrations", "entropy"} == needs["rl_plus"]
    assert {"vocabulary", "reference", "host"} == needs["vocabulary_js"]
    assert "hidden states" in needs["verl"]
    assert "token reward model" in needs["oreal"]
    assert "turns" in needs["mapo"]
    assert "replay" in needs["remix"]
    assert "host" in needs["stable_reinforce"]
    assert {"extra samples", "memory", "host"} == needs["aepo"]


def test_what_a_recipe_fills_in_by_itself_is_no_need():
    asks = losses.entropy_history_penalty
    assert catalogue.needs([lambda preferences: preferences]) == ["preferences"]
    assert catalogue.needs([lambda preferences: preferences], ["preferences"]) == []
    assert catalogue.needs([asks], ["entropy_history"]) == ["entropy"]
    assert catalogue.needs([schedules.adaptive_kl]) == ["memory"]


def test_an_empty_directory_has_no_recipes(folder):
    assert catalogue.recipes() == []
    with pytest.raises(ValueError, match="there is no method 'mine'"):
        catalogue.described_recipe("mine")


def test_a_missing_directory_has_no_recipes(monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "recipe_directory", lambda: tmp_path / "absent" / "methods")
    assert catalogue.recipes() == []


def test_a_recipe_is_read_with_its_base_and_described_whole(folder):
    (folder / "base.yaml").write_text(BASE)
    (folder / "mine.yaml").write_text(RECIPE)
    (entry,) = catalogue.recipes()  # a base file has no paper
    assert entry == {
        "name": "mine",
        "paper": "Mine",
        "arxiv": "2503.14476",
        "stage": "policy loss",
        "certainty": "recalled",
        "functions": ["exact_answer", "group_normalized", "clipped_surrogate", "divergence", "adaptive_kl"],
        "needs": ["reference", "vocabulary", "memory"],
        "family": ".",
        "task": "addition",
        "shows": {},
    }
    whole = catalogue.described_recipe("mine")
    assert whole["yaml"] == RECIPE
    assert whole["formulas"]["clipped_surrogate"][0].startswith("x = max(-A * min(r, ratio_cap)")
    assert [e["section"] for e in whole["entries"]] == ["rewards", "credit", "losses", "losses", "coefficient"]
    assert catalogue.recipes_with("clipped_surrogate") == ["mine"]
    assert shipped.recipe_path("mine") == folder / "mine.yaml"
    assert shipped.recipe_path("demo") == folder.parent / "demo.yaml"


def test_a_broken_recipe_is_named(folder):
    (folder / "base.yaml").write_text(BASE)
    (folder / "mine.yaml").write_text(RECIPE.replace("clip_high", "clip_higher"))
    with pytest.raises(ValueError, match=r"recipe .*mine\.yaml: .*clip_higher is not a hyper-parameter"):
        catalogue.recipes()


def test_a_wheel_brings_the_recipes_inside_the_package(tmp_path, monkeypatch):
    # As hatch lays them out: configs/ within the package. A stranger's configs/ beside it is not looked at.
    package = tmp_path / "site-packages" / "jaxrl_llm"
    for place in (package, package.parent):
        (place / "configs" / "methods").mkdir(parents=True)
    monkeypatch.setattr(shipped, "__file__", str(package / "shipped.py"))
    assert shipped.recipe_directory() == package / "configs" / "methods"


def test_an_unknown_recipe_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"there is no recipe 'dappo'; did you mean 'dapo'\?"):
        shipped.recipe_path("dappo")
    with pytest.raises(ValueError, match=r"there is no method 'grpo_lamda'; did you mean 'grpo_lambda'\?"):
        catalogue.described("grpo_lamda")


def test_recipes_are_selected():
    found = catalogue.recipes()

    def chosen(**words):
        return {entry["name"] for entry in selected(found, catalogue.EVERY_NEED, **words)}

    assert chosen() == {entry["name"] for entry in found}
    assert "ppo" in chosen(need="value")
    assert "grpo" not in chosen(need="value")
    assert chosen(arxiv="2503.14476") == {"dapo"}
    assert "dph_f" in chosen(paper="dph-rl")
    assert {"dapo", "gspo"} <= chosen(stage="policy")
    assert "dispo" in chosen(certainty="recalled", stage="policy loss")
    assert chosen(paper="no such paper") == set()
    with pytest.raises(ValueError, match="no recipe has the need 'refrence'; did you mean 'reference'"):
        chosen(need="refrence")
    with pytest.raises(ValueError, match="no recipe has the stage"):
        chosen(stage="kitchen")


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def said(capsys, monkeypatch):
    """What `jaxrl methods ...` prints on a screen so many characters wide."""

    def run(*arguments, columns=120, status=0):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert cli.main(["methods", *arguments]) == status
        printed = capsys.readouterr()
        return printed.err if status else printed.out

    return run


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_of_recipes_fits_and_breaks_no_word(said, columns):
    text = said(columns=columns)
    assert max(map(len, text.splitlines())) <= columns
    words = set(text.split())
    for entry in catalogue.recipes():
        assert entry["arxiv"] in words or not entry["arxiv"]
        assert set(entry["paper"].split()) <= words
        assert set(entry["stage"].split()) <= words
        assert entry["name"] in words or (columns == 80 and len(entry["name"]) > 19)
    assert ("reconstructed" if columns == 120 else "reconstr.") in words


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_of_functions_fits_and_breaks_no_word(said, columns):
    text = said("--functions", columns=columns)
    assert max(map(len, text.splitlines())) <= columns
    names = set(re.findall(r"[a-z]\w+", text))
    for entry in METHODS:
        assert all(need in names or (columns == 80 and len(need) > 22) for need in entry["needs"])
        assert entry["name"] in names or (columns == 80 and len(entry["name"]) > 18)


def test_lists_in_json(said):
    assert json.loads(said("--json")) == catalogue.recipes()
    assert {e["room"] for e in json.loads(said("--room", "loss", "--json"))} == {"loss"}
    assert len(json.loads(said("--functions", "--json"))) == len(METHODS)
    valued = json.loads(said("--needs", "value model", "--stage", "baseline", "--json"))
    assert {"hl_gauss", "ppo"} <= {entry["name"] for entry in valued}


def test_one_recipe_is_shown_whole(said):
    text = said("dapo")
    assert "dapo (recipe)" in text
    assert "https://arxiv.org/abs/2503.14476" in text
    assert "    x = max(-A * min(r, ratio_cap)" in text
    assert shipped.recipe_path("dapo").read_text().rstrip() in text
    assert json.loads(said("dapo", "--json"))["yaml"].startswith("#")


def test_a_name_that_recipe_and_function_share(said):
    assert "cispo (recipe)" in said("cispo")
    assert "jaxrl methods --functions cispo" in said("cispo")
    text = said("cispo", "--functions")
    assert "cispo (loss)" in text
    assert "Used by:  cispo, dispo, topr" in text


def test_words_that_do_not_go_together(said):
    assert "did you mean 'dapo'?" in said("dappo", status=2)
    assert "leave out the filters" in said("dapo", "--stage", "policy", status=2)
    assert "--stage chooses among recipes; leave out --functions" in said("--functions", "--stage", "loss", status=2)
    assert "--paper chooses among recipes; leave out --room" in said("--room", "loss", "--paper", "a", status=2)
