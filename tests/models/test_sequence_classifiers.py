"""Reward models of `transformers` in and out: the same scores, on either side of the padding."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tokenizers
import yaml
from safetensors.numpy import load_file, save_file

from jaxrl_llm import shipped
from jaxrl_llm.cli import main
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.models import (
    HeadConfig,
    TransformerConfig,
    from_policy,
    load_config,
    load_model,
    load_reward_model,
    save_reward_model,
    sequence_reward,
    transformer,
)
from jaxrl_llm.models.families import REWARD_MODELS, as_reward_model
from jaxrl_llm.run.configured import require_tokens_of_policy
from jaxrl_llm.run.restored import restored_network

torch = pytest.importorskip("torch")
VOCABULARY, WIDTH, PAD = 37, 11, 0
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "intermediate_size": 21,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "pad_token_id": PAD,
    "num_labels": 1,
}
CASES = [*(pytest.param(n, marks=pytest.mark.slow) for n in ("Llama", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Mistral"))]
CASES.append("Gemma3Text")


def made(family: str, directory, **sizes):
    """A random reward model of `transformers`, saved."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(len(family))
    config = getattr(transformers, f"{family}Config")(**SIZES | sizes)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape) + (1.0 if weight.ndim == 1 else 0.0))
    model.save_pretrained(directory)
    return model


def batch(side: str):
    """(tokens, mask, positions) of four rows, padded on a side."""
    lengths = np.array([11, 8, 3, 1])
    places = np.arange(WIDTH)
    mask = places < lengths[:, None] if side == "right" else places >= WIDTH - lengths[:, None]
    tokens = np.where(mask, np.random.default_rng(0).integers(3, VOCABULARY, mask.shape), PAD)
    return tokens, mask, np.where(mask, mask.cumsum(1) - 1, -1)


def their_scores(model, tokens, mask, positions):
    with torch.no_grad():
        given = dict(attention_mask=torch.tensor(mask.astype(int)), position_ids=torch.tensor(np.maximum(positions, 0)))
        return model(torch.tensor(tokens), **given).logits[:, 0].numpy()


def our_scores(model, params, tokens, positions):
    return jax.jit(lambda p, t, i: sequence_reward(model, p["backbone"], p["head"], t, i))(params, tokens, positions)


@pytest.mark.parametrize("family", CASES)
def test_scores_equal_those_of_transformers_in_and_out(family, tmp_path):
    import transformers

    theirs = made(family, tmp_path / "theirs")
    model, params = load_reward_model(tmp_path / "theirs")
    head = params["head"]["weight"]
    changed = params | {"head": {"weight": head + 0.1}}
    save_reward_model(tmp_path / "ours", changed, model.config, source=tmp_path / "theirs")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(theirs)
    for side in ("right", "left"):
        tokens, mask, positions = batch(side)
        for by, weights in ((theirs, params), (again, changed)):
            expected = their_scores(by, tokens, mask, positions)
            found = our_scores(model, weights, tokens, positions)
            np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


def test_a_policy_of_ours_becomes_a_reward_model_of_theirs(tmp_path):
    """Its scores of the vocabulary are left out, and its config.json is that of the other class."""
    import transformers

    shape = TransformerConfig(vocabulary_size=VOCABULARY, width=32, layers=1, heads=4, kv_heads=2, tie_embeddings=False)
    model = transformer(shape)
    params = from_policy(model, model.init(jax.random.key(0)), jax.random.key(1), HeadConfig())
    files = save_reward_model(tmp_path / "out", params, shape, pad_id=PAD)
    assert {"config.json", "model.safetensors"} == {file.name for file in files}
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokens, mask, positions = batch("right")
    expected = their_scores(theirs, tokens, mask, positions)
    np.testing.assert_allclose(our_scores(model, params, tokens, positions), expected, atol=1e-5)
    two = {**params, "head": {**params["head"], "hidden": np.ones((32, 32))}}
    with pytest.raises(ValueError, match="one layer with one output"):
        save_reward_model(tmp_path / "two", two, shape)


def test_what_is_no_reward_model_is_refused(tmp_path):
    directory = tmp_path / "model"
    made("Llama", directory)
    with pytest.raises(ValueError, match=r"a reward model \(LlamaForSequenceClassification\).* networks\.reward\.path"):
        load_model(directory)
    tensors, config = load_file(directory / "model.safetensors"), json.loads((directory / "config.json").read_text())
    several = tensors | {"score.weight": np.ones((3, 36), np.float32)}
    save_file(several, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"score\.weight with 3 labels and input width 36; .* one label"):
        load_reward_model(directory)
    without = {name: value for name, value in tensors.items() if name != "score.weight"}
    save_file(without, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"but has no score\.weight; .*networks\.reward\.head=scalar"):
        load_reward_model(directory)
    (directory / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ValueError, match="is not a reward model"):
        load_config(directory, scores=True)
    with pytest.raises(ValueError, match=r"no reward model .* of GraniteForCausalLM"):
        as_reward_model({"architectures": ["GraniteForCausalLM"]}, None)


def micro(micro_config, tmp_path, **changes) -> list[str]:
    """Arguments of a run of one step."""
    tree = micro_config | changes
    tree |= {"training": micro_config["training"] | {"steps": 1}, "warm_start": {"steps": 0}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return ["train", str(tmp_path / "config.yaml"), f"run_dir={tmp_path / 'run'}"]


@pytest.mark.slow
def test_a_directory_rewards_a_run_and_stays_as_it_is(micro_config, tmp_path, capsys):
    shape = TransformerConfig(
        vocabulary_size=CharacterTokenizer().vocabulary_size, width=24, layers=2, heads=3, kv_heads=1
    )
    model = transformer(shape)
    params = from_policy(model, model.init(jax.random.key(0)), jax.random.key(1), HeadConfig())
    save_reward_model(tmp_path / "given", params, shape, pad_id=PAD)
    networks = {"reward": {"path": str(tmp_path / "given")}}
    assert main(micro(micro_config, tmp_path, rewards=["learned_reward"], networks=networks)) == 0
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(line["reward"])
    assert line["reward"] != 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--network", "reward"]) == 2
    assert "does not learn; use that directory" in capsys.readouterr().err


@pytest.mark.slow
def test_what_a_run_trains_is_loaded_by_transformers(micro_config, tmp_path):
    import transformers

    method = {"credit": [{"returns": "gae_returns"}, {"advantages": "gae"}], "networks": {}}
    losses = ["clipped_surrogate", "clipped_value"]
    assert main(micro(micro_config, tmp_path, **method, losses=losses)) == 0
    run = tmp_path / "run"
    assert main(["export", str(run), str(tmp_path / "out"), "--network", "value"]) == 0
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    model, _, params = restored_network(run, "value")
    tokens, mask, positions = batch("right")
    tokens = np.where(mask, 3 + tokens % 9, theirs.config.pad_token_id)
    expected = their_scores(theirs, tokens, mask, positions)
    np.testing.assert_allclose(our_scores(model, params, tokens, positions), expected, atol=1e-5)
    assert "AutoModelForSequenceClassification" in (tmp_path / "out" / "README.md").read_text()


def test_networks_read_the_tokens_of_the_policy(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "<end>": 2}, "a"))
    for name, vocabulary in (("same", {"a": 0, "b": 1, "<end>": 2}), ("other", {"b": 0, "a": 1, "<end>": 2})):
        (tmp_path / name).mkdir()
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "a"))
        made.save(str(tmp_path / name / "tokenizer.json"))
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    policy = SimpleNamespace(backend=words)
    require_tokens_of_policy({"reward": tmp_path / "same", "teacher": tmp_path}, policy)
    with pytest.raises(ValueError, match=r"networks\.reward\.path .* \(other ids of 2 tokens, .*module:function"):
        require_tokens_of_policy({"reward": tmp_path / "other"}, policy)
    with pytest.raises(ValueError, match="whose tokenizer differs from the policy's, but"):
        require_tokens_of_policy({"reward": tmp_path / "same"}, CharacterTokenizer())
    run = tmp_path / "run"  # of a model that is described by its shape, with the built-in tokenizer
    (run / "checkpoints" / "5").mkdir(parents=True)
    shutil.copy(shipped.recipe_path("demo"), run / "config.yaml")
    require_tokens_of_policy({"reward": run}, CharacterTokenizer())
    with pytest.raises(ValueError, match=r"networks\.reward\.path is .*run.* differs from the policy's, but"):
        require_tokens_of_policy({"reward": run}, policy)


def test_every_class_is_one_of_transformers():
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as known

    assert set(REWARD_MODELS) <= set(known.values())
    assert all(hasattr(transformers, name) for name in REWARD_MODELS)


def test_reward_models_are_merged_with_their_heads(tmp_path):
    """Extrapolation from a regression model, as in HelpSteer2-Preference: base + 1.5 (tuned - base)."""
    config = TransformerConfig(VOCABULARY, width=12, layers=1, heads=2, kv_heads=1)
    model, trees = transformer(config), {}
    for number, name in enumerate(("base", "tuned")):
        key = jax.random.key(number)
        trees[name] = from_policy(model, model.init(key), key, HeadConfig())
        save_reward_model(tmp_path / name, trees[name], config, pad_id=PAD)
    given = ["merge", str(tmp_path / "tuned"), "--base", str(tmp_path / "base"), "--method", "task", "--weights", "1.5"]
    assert main([*given, "--out", str(tmp_path / "out")]) == 0
    _, found = load_reward_model(tmp_path / "out")
    wanted = jax.tree.map(lambda base, tuned: base + 1.5 * (tuned - base), trees["base"], trees["tuned"])
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6), found, wanted)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == PAD
