"""The examples of the docs: notebooks run and show what they were written with; two environments are twins."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.experience import Prompts
from jaxrl_llm.rollout.environment_checks import require_environment
from jaxrl_llm.rollout.environments import Start

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def outputs(cells):
    """What cells have printed or shown, as text."""
    return [
        "".join(output.get("text") or output["data"]["text/plain"])
        for cell in cells
        for output in cell.get("outputs", ())
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_with_the_outputs_of_one_run(path):
    cells = json.loads(path.read_text())["cells"]
    counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert path.stat().st_size < 40_000
    assert len(outputs(cells)) >= 5
    assert "stderr" not in path.read_text()
    for target in re.findall(r"\]\(([^)#]+)", "".join("".join(c["source"]) for c in cells if c["cell_type"] != "code")):
        assert (path.parent / target).exists(), target
    for cell in cells:
        if cell["cell_type"] == "code":
            ast.parse("".join(cell["source"]))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_its_policy_learns(path, tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    made = nbformat.read(path, 4)
    nbclient.NotebookClient(made, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "\n".join(outputs(made.cells))
    before, after = re.search(r"pass@1 +([\d.]+)% -> +([\d.]+)%", said).groups() if "pass@1" in said else (0.0, 0.0)
    first, *_, last = map(float, re.findall(r"reward ([\d.]+),", said))
    assert float(after) > float(before) + 10 or last > first + 0.5, said
    shown = "\n".join(outputs(json.loads(path.read_text())["cells"]))
    (size,) = [line for line in said.splitlines() if line.endswith("parameters")]  # of curves, the last bits may differ
    assert size in shown.splitlines()


def test_the_environments_in_python_and_in_jax_are_twins(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS / "examples"))
    import own_environment
    import own_environment_in_jax

    tokenizer = CharacterTokenizer()
    inside, outside = own_environment_in_jax.guessing(tokenizer), own_environment.guessing(tokenizer)
    assert inside._replace(reset=None, step=None, metrics=None, solved=None)[2:6] == (
        outside.max_turns,
        outside.max_turn_tokens,
        outside.max_observation_tokens,
        tuple(outside.end_of_turn_ids),
    )
    row = jnp.zeros((1, 3), jnp.int32)
    require_environment(
        inside, Prompts(row, row[:, 0] + 1, row[:, 0], row, row[:, 0] + 1), vocabulary_size=tokenizer.vocabulary_size
    )
    key, advance = jax.random.key(0), jax.jit(inside.step)
    turns = ["3<n>", "3<eos>", "37", "03", "3x", "5", "<eos>", "+<n>", "x", "9<n>", "0<n>"]
    for answer in "359":
        ids = jnp.asarray([*tokenizer.encode(answer), 0, 0])
        state = inside.reset(Start(ids, jnp.int32(1), ids, jnp.int32(1), jnp.int32(0)), key)
        for turn in turns:
            said = tokenizer.encode(turn)
            padded = jnp.asarray([*said, *[tokenizer.encode("7")[0]] * (2 - len(said))])
            got = advance(state, padded, jnp.int32(len(said)), key)
            _, observation, reward, done = own_environment.step(own_environment.reset({"answer": answer}), turn)
            assert (float(got.reward), bool(got.done)) == (reward, done), (answer, turn)
            if not done:
                assert tokenizer.decode(got.observation[: got.observation_length].tolist()) == observation
