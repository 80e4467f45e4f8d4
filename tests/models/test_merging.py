"""Merges of models: the cards' examples, what holds for all of them, and the command on two model directories."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.cli import main
from jaxrl_llm.models import load_params, merging, transformer
from jaxrl_llm.models.export import save_model
from jaxrl_llm.models.transformer_config import TransformerConfig


def tree(*values):
    return {"a": jnp.array(values, jnp.float32)}


def test_worked_examples():
    found = {
        "averaged": merging.averaged([tree(1, 2), tree(3, -2)], [1, 3]),
        "slerp": merging.spherical(tree(1, 0, 0), tree(0, 2, 0), 0.25),
        "task": merging.task_arithmetic(tree(1, 1), [tree(2, 1), tree(1, 0)], [0.5, 1]),
        "extrapolated": merging.task_arithmetic(tree(1, 2, -1), [tree(1.5, 1, -1)], [1.5]),
        # Changes (1, 0, .1, -2), (-3, .2, .1, -1): half of each stays, the signs are those of the sums.
        "ties": merging.elected(tree(0, 0, 0, 0), [tree(1, 0, 0.1, -2), tree(-3, 0.2, 0.1, -1)], density=0.5),
    }
    expected = {
        "averaged": [2.5, -1],
        "slerp": [0.923880, 0.765367, 0],
        "task": [1.5, 0],
        "extrapolated": [1.75, 0.5, -1],
        "ties": [-3, 0, 0, -1.5],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name]["a"], values, atol=1e-6, err_msg=name)


def test_ends_and_what_has_no_direction():
    a, b = tree(0.6, 0.8), tree(-0.8, 0.6)
    for t, end in ((0.0, a), (1.0, b)):
        np.testing.assert_allclose(merging.spherical(a, b, t)["a"], end["a"], atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(merging.spherical(a, b, 0.3)["a"]), 1.0, rtol=1e-6)
    np.testing.assert_allclose(merging.spherical(a, tree(0, 0), 0.5)["a"], [0.3, 0.4], rtol=1e-6)
    np.testing.assert_allclose(merging.spherical(a, a, 0.3)["a"], a["a"], rtol=1e-6)
    for merged in (
        merging.averaged([a, a, a]),
        merging.task_arithmetic(a, [a, a]),
        merging.dropped_and_rescaled(a, a),
        merging.elected(a, [a, a]),
        merging.dropped_and_rescaled(b, a, share=0.0),
        merging.elected(b, [a], density=1.0),
    ):
        np.testing.assert_allclose(merged["a"], a["a"], rtol=1e-6)


def test_what_dare_drops_is_made_up_for_on_average():
    base, tuned = {"a": jnp.zeros(40_000, jnp.bfloat16)}, {"a": jnp.ones(40_000, jnp.bfloat16)}
    merged = merging.dropped_and_rescaled(base, tuned, share=0.75)["a"]
    assert merged.dtype == jnp.bfloat16
    assert set(np.unique(np.asarray(merged, np.float32))) == {0.0, 4.0}
    np.testing.assert_allclose(np.mean(np.asarray(merged, np.float32)), 1.0, atol=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: merging.averaged([tree(1), tree(2)], [1, -1]), "sum to 0"),
        (lambda: merging.averaged([tree(1), tree(2)], [1]), "weights has 1 number for 2 models"),
        (lambda: merging.averaged([tree(1), {"b": jnp.ones(1)}]), "model 1 has different parameters"),
        (lambda: merging.spherical(tree(1), tree(1, 2)), r"\['a'\] has the shapes"),
        (lambda: merging.dropped_and_rescaled(tree(1), tree(1), share=1.0), "share"),
        (lambda: merging.elected(tree(1), [tree(1)], density=0.0), "density"),
    ],
)
def test_what_cannot_be_merged(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture
def two(tmp_path, monkeypatch):
    config = TransformerConfig(vocabulary_size=16, width=8, layers=1, heads=2, kv_heads=1)
    params = [transformer(config).init(jax.random.key(seed)) for seed in (0, 1)]
    for name, one in zip("ab", params, strict=True):
        save_model(tmp_path / name, one, config)
    monkeypatch.setattr("jaxrl_llm.data.load_tokenizer", lambda path: None)
    monkeypatch.setattr("jaxrl_llm.data.require_embedding", lambda *given: None)
    return tmp_path, config, params


@pytest.mark.slow
def test_the_command(two, capsys):
    folder, config, (a, b) = two
    given = [str(folder / "a"), str(folder / "b")]
    assert main(["merge", *given, "--weights", "3,1", "--out", str(folder / "c"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == "3, 1"
    found = load_params(folder / "c", config)
    jax.tree.map(lambda x, y, z: np.testing.assert_allclose(x, 0.75 * y + 0.25 * z, rtol=1e-5, atol=1e-7), found, a, b)
    further = [given[1], "--base", given[0], "--method", "task", "--weights", "1.5", "--out", str(folder / "d")]
    assert main(["merge", *further]) == 0
    jax.tree.map(
        lambda x, y, z: np.testing.assert_allclose(x, 1.5 * z - 0.5 * y, rtol=1e-5, atol=1e-6),
        load_params(folder / "d", config),
        a,
        b,
    )
    chosen = [given[1], "--base", given[0], "--method", "select", "--share", "1", "--out", str(folder / "f")]
    assert main(["merge", *chosen]) == 0
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), load_params(folder / "f", config), b)
    capsys.readouterr()
    for wrong, message in (
        ([given[0]], "needs two models or more"),
        ([*given, "--weights", "1"], "takes 2"),
        ([*given, "--weights", "a,b"], "give numbers with commas"),
        ([*given, "--method", "ties"], "give it with --base"),
        ([*given, "--base", given[0]], "does not use it"),
        ([*given, "--share", "0.1"], "does not use it"),
        ([given[0], str(folder / "nothing")], "nothing"),
    ):
        assert main(["merge", *wrong, "--out", str(folder / "e")]) == 2
        assert message in capsys.readouterr().err
