"""docs/methods.md is what docs/build.py makes, names everything, and its formulas can be rendered."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from latex2mathml.converter import convert

from jaxrl_llm import catalogue, shipped
from jaxrl_llm.config import parse_config, read_tree
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.data.written import PROVIDES
from jaxrl_llm.run.setup import parts

DOCS = Path(__file__).parents[1] / "docs"


def _module(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def beside_each_other():
    """The modules of docs/ import each other by their bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))
        yield
        for name in ("api", "blocks", "config_reference", "faults", "formulas", "reference"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def build(beside_each_other):
    return _module("build")


@pytest.fixture(scope="module")
def blocks(beside_each_other):
    return _module("blocks")


@pytest.fixture(scope="module")
def page():
    return (DOCS / "methods.md").read_text()


def formulas(text):
    return re.findall(r"^```math\n(.*?)\n```$", text, re.M | re.S) + re.findall(r"\$`(.*?)`\$", text)


def test_the_committed_page_is_up_to_date(build, page):
    assert build.page() == page, "docs/methods.md is stale; run python docs/build.py"


def test_every_method_has_a_section_and_every_recipe_a_row(page):
    headings = re.findall(r"^#### (.+)$", page, re.M)
    assert headings == list(dict.fromkeys(headings)), "a name stands for two sections"
    assert set(headings) == {entry["name"] for entry in catalogue.methods()}
    rows = re.findall(r"^\| \[(\w+)\]\(\.\./configs/methods/\w+/\1\.yaml\)", page, re.M)
    assert sorted(rows) == sorted(entry["name"] for entry in catalogue.recipes())
    for number in {number for entry in catalogue.methods() for number in entry["arxiv"]}:
        assert f"https://arxiv.org/abs/{number}" in page


def test_every_link_within_the_page_leads_somewhere(page):
    headings = set(re.findall(r"^#+ (.+)$", page, re.M))
    assert set(re.findall(r"\]\(#(\w+)\)", page)) <= headings
    for target in set(re.findall(r"\]\((\.\./[^)]+)\)", page)):
        assert (DOCS / target).is_file(), target


def test_every_formula_is_balanced_and_parses(page):
    found = formulas(page)
    assert len(found) > 150
    for formula in found:
        depth = 0
        for sign in re.findall(r"(?<!\\)[{}]", formula):
            depth += 1 if sign == "{" else -1
            assert depth >= 0, formula
        assert depth == 0, formula
        assert formula.count(r"\left") - formula.count(r"\leftarrow") == formula.count(r"\right"), formula
        assert re.findall(r"\\begin\{(\w+)\}", formula) == re.findall(r"\\end\{(\w+)\}", formula)[::-1], formula
        # A command that the parser does not know would stand in the result with its backslash.
        assert not re.search(r">\\[A-Za-z]", convert(formula)), formula


def test_formulas_survive_github(page):
    for formula in formulas(page):
        assert r"\operatorname" not in formula  # refused there
        assert not re.search(r"\\text\{[^}]*_", formula), formula  # an underscore in text is shown as a subscript
    for line in page.splitlines():
        if line.startswith("| "):
            assert all("|" not in formula for formula in formulas(line)), line


# ---- blocks ---------------------------------------------------------------------------------------------------------


def test_one_formula_is_one_fence(blocks):
    assert blocks.markdown("A = r - b") == "```math\nA = r - b\n```"


def test_lines_are_aligned_at_their_relation(blocks):
    made = blocks.markdown("a = f(x = 1)\nlonger <- b")
    assert "a &= f(x = 1)" in made
    assert r"\text{longer} &\leftarrow b" in made
    assert r"\begin{aligned}" in made


def test_a_condition_stands_behind_its_statement(blocks):
    assert (
        blocks.markdown("x = y\nwhere A < 0: x = min(x, 1)").splitlines()[3].endswith(r"\qquad \text{where } A \lt 0")
    )


def test_cases_stand_below_each_other(blocks):
    made = blocks.markdown("x = 1 where a > b, 1/2 where they are equal, else 0")
    assert made == (
        "```math\nx = \\begin{cases} \\displaystyle 1 & \\text{where } a \\gt b \\\\[4pt] "
        "\\displaystyle 1 / 2 & \\text{where they are equal} \\\\[4pt] "
        "\\displaystyle 0 & \\text{else} \\end{cases}\n```"
    )
    rows = blocks.markdown("f(b) + 1    right, and n <= L\n0           wrong")
    assert r"\begin{cases} \displaystyle f(b) + 1 & \text{right},\ \text{and } n \le L" in rows


def test_named_choices_are_a_table_with_words_outside_of_formulas(blocks):
    made = blocks.markdown(
        "soft    w, and 0 where the reward is 0   a\nforced  (that of GRPO) d / 2           b", {"w"}
    ).splitlines()
    assert made[2:] == [
        "| `soft` | $`w`$, and 0 where the reward is 0 | $`a`$ |",
        "| `forced` | (that of GRPO) $`\\dfrac{d}{2}`$ | $`b`$ |",
    ]


def test_a_long_remark_is_a_sentence_below(blocks):
    made = blocks.markdown("h(n) = s / 2    with s the unbiased deviation of the n rewards of the group")
    assert made.splitlines()[-1] == "With $`s`$ the unbiased deviation of the $`n`$ rewards of the group."


def test_continued_lines_are_joined(blocks):
    assert blocks.table("A = (a +\n    b)") == [["A = (a + b)"]]
    assert blocks.table("one   first of\n      two\nkeep  all") == [["one", "first of two"], ["keep", "all"]]


def test_text_shows_what_was_written(blocks):
    assert blocks.escaped("a * b_c <a> `x_y`") == r"a \* b\_c &lt;a> `x_y`"


# ---- the other pages ------------------------------------------------------------------------------------------------

PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


@pytest.mark.parametrize(
    ("module", "page", "name"),
    [
        ("config_reference", "config_page", "config"),
        ("api", "api_page", "api"),
        ("reference", "metrics_page", "metrics"),
        ("reference", "formats_page", "formats"),
        ("faults", "survival_page", "survival"),
    ],
)
def test_generated_references_are_up_to_date(build, module, page, name):
    assert getattr(getattr(build, module), page)() == (DOCS / f"{name}.md").read_text(), "run python docs/build.py"


def test_every_kind_of_judged_completions_has_a_line_in_the_formats():
    page = (DOCS / "formats.md").read_text()
    for kind in PROVIDES:
        assert re.search(rf"^\| `{kind}` \| `\{{.+\}}` \|", page, re.M), kind


@functools.cache
def anchors(path):
    """The anchors of a page, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    path = DOCS / page
    asked: dict[str, set[str]] = {}
    for target in re.findall(r"\]\(([^)#\s]*(?:#[^)\s]*)?)\)", path.read_text()):
        place, _, anchor = target.partition("#")
        asked.setdefault(place, set()).update({anchor} - {""})
    for place, wanted in asked.items():
        if "://" in place:
            continue
        found = (path.parent / place).resolve() if place else path
        assert found.exists(), f"{page}: {place}"
        if found.suffix == ".md":
            assert {anchor.lower() for anchor in wanted} <= anchors(found), f"{page}: {place}"


def test_every_page_is_in_the_navigation():
    named = re.findall(r"[\w/]+\.md", (DOCS.parent / "mkdocs.yml").read_text())
    notebooks = [f"notebooks/{path.stem}.md" for path in (DOCS / "notebooks").glob("*.ipynb")]
    assert sorted(named) == sorted([*PAGES, *notebooks])


@pytest.mark.parametrize("page", ["loss.md", pytest.param("loop.md", marks=pytest.mark.slow), "reward.md"])
def test_the_python_of_the_how_to_pages_runs(page):
    shared: dict = {}
    for block in re.findall(r"^```python\n(.*?)\n```$", (DOCS / "how_to" / page).read_text(), re.M | re.S):
        exec(compile(block, page, "exec"), shared)
    if page == "loop.md":
        assert int(shared["state"].step) == 20
        assert float(shared["metrics"]["reward"]) > 0.4
    if page == "reward.md":
        assert shared["agreement"](["a", "a", "b", "a"], np.array([0, 0, 0, 1])) == [0.5, 0.5, 0.0, 0.0]


def test_the_configs_of_the_page_on_rewards_are_composed(tmp_path, monkeypatch):
    page = (DOCS / "how_to" / "reward.md").read_text()
    written = [
        block for block in re.findall(r"^```python\n(.*?)\n```$", page, re.M | re.S) if block.startswith("# rew")
    ]
    (tmp_path / "rewards_of_mine.py").write_text("\n\n".join(written))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    blocks = re.findall(r"^```yaml\n(.*?)\n```$", page, re.M | re.S)
    assert len(blocks) >= 5
    size = CharacterTokenizer().vocabulary_size
    start = read_tree(shipped.recipe_path("demo")) | {"warm_start": {"steps": 0}, "data": {"directory": str(tmp_path)}}
    for block in blocks:
        tree = start | yaml.safe_load(block)
        built = parts(parse_config(tree, vocabulary_size=size))
        assert len(built.step.composition.rewards) == len(tree["rewards"])
