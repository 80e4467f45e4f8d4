"""docs/engine.md and docs/fields.md: what they show runs, and their tables are those of the package.

The sections of configs that README.md and docs/rollout.md show compose runs, too.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import yaml

from jaxrl_llm.config import parse_config
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.fields import FIELDS
from jaxrl_llm.rollout.capabilities import CAPABILITIES
from jaxrl_llm.run.explain import trace
from jaxrl_llm.run.staged import staged

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "engine.md").read_text()
TINY = {
    "name": "tiny",
    "model": {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1},
    "task": {"name": "addition", "levels": [1, 2], "options": {"scratchpad": False}}
    | {"train_items": 32, "validation_items": 8, "test_items": 8},
    "rollout": {"samples_per_prompt": 4, "max_prompt_tokens": 9, "max_completion_tokens": 12},
    "training": {"steps": 2, "prompts_per_step": 4},
}
PAIRS = "\n".join(f'{{"prompt": "{n}+2", "chosen": "{n + 2}", "rejected": "{n}"}}' for n in range(32))


def blocks(kind, page=PAGE):
    return re.findall(rf"```{kind}\n(.*?)```", page, re.S)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with the module and the file that the snippets name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = [block for block in blocks("python") if block.startswith("# mine.py")]
    (tmp_path / "mine.py").write_text("\n".join(own))
    (tmp_path / "pairs.jsonl").write_text(PAIRS)
    yield tmp_path
    sys.modules.pop("mine", None)


@pytest.fixture
def reference(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in ("blocks", "formulas"):
        sys.modules.pop(name, None)


def merged(under, over):
    both = {k: merged(under[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(under.get(k), dict)}
    return under | over | both


def test_the_committed_tables_are_up_to_date(reference):
    assert reference.engine_page() == PAGE, "the tables of docs/engine.md are stale; run python docs/build.py"
    assert reference.fields_page() == (ROOT / "docs" / "fields.md").read_text(), "run python docs/build.py"


def test_every_capability_and_every_field_is_listed(reference):
    listed = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.M))
    assert set(CAPABILITIES) <= listed
    assert set(re.findall(r"^\| `(\w+)` \|", reference.fields_page(), re.M)) >= set(FIELDS)


def test_what_the_checks_refuse_is_in_the_tables(reference):
    """Capabilities that the package asks for are those of plans, of settings, or named by hand in docs/reference.py."""
    package = ROOT / "jaxrl_llm"
    checks = (package / "training" / "checks.py").read_text()
    asked = {name for name in CAPABILITIES if f'"{name}"' in checks}
    configured = "".join((package / file).read_text() for file in ("config/whole.py", "run/setup.py"))
    asked |= {name for name in CAPABILITIES if f"({name})" in configured}
    shown = {name for _, _, names in reference.REFUSED for name in names} | set(reference.settings().values())
    shown |= {name for plan, inside in reference.every_plan().values() for name in (*plan.needs, *inside)}
    assert asked <= shown


SHOWN = {"engine": PAGE, **{page.stem: page.read_text() for page in (ROOT / "README.md", ROOT / "docs" / "rollout.md")}}


@pytest.mark.parametrize(
    "section",
    [
        pytest.param(text, id=f"{page} {number}", marks=[pytest.mark.slow] if number % 4 else [])
        for page, whole in SHOWN.items()
        for number, text in enumerate(blocks("yaml", whole), 1)
        if "my_reward" not in text and "rewards_of_mine" not in text
    ],
)
def test_every_section_of_a_config_composes_a_run(here, section):
    tree = yaml.safe_load(section.replace("my_module", "mine"))
    for network in tree.get("networks", {}).values():
        network.pop("path", None)
    sampled = "sampler" in str(tree.get("source", "sampler")) and "stages" not in tree
    plain = {"losses": ["policy_gradient"], "credit": [{"advantages": "raw_rewards"}], "rewards": ["exact_answer"]}
    config = parse_config(
        merged(TINY | (plain if sampled else {}), tree), vocabulary_size=CharacterTokenizer().vocabulary_size
    )
    for stage in staged(config):
        trace(stage["parts"])


@pytest.mark.slow
def test_the_pages_python_runs_as_it_stands(here, capsys):
    scope: dict = {}
    for block in blocks("python"):
        exec(compile(block, "engine.md", "exec"), scope)
    shown = capsys.readouterr().out
    assert "nan" not in shown
    assert "['policy', 'proxy', 'value']" in shown
    assert float(shown.splitlines()[-1].split()[-1]) < 0.6931
