"""Every open family against `transformers`: logits, hidden states, gradients, greedy text; cached and scanned alike."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.experience import Prompts
from jaxrl_llm.models import (
    FAMILIES,
    ExpertsConfig,
    LoraConfig,
    LowRank,
    RopeScaling,
    TransformerConfig,
    abstract,
    add_adapters,
    config_from_json,
    config_to_json,
    load_model,
    load_params,
    merged,
    parameter_count,
    transformer,
)
from jaxrl_llm.models.adapters import TARGETS
from jaxrl_llm.models.families import VISION_LANGUAGE
from jaxrl_llm.rollout import generate

torch = pytest.importorskip("torch")
NAMES = ("hidden_states",)
# One key/value head or as many as heads; few layers and many.
OTHER_SIZES = (
    {"hidden_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2},
    {
        "hidden_size": 54,
        "num_attention_heads": 9,
        "num_key_value_heads": 9,
        "num_hidden_layers": 5,
        "intermediate_size": 13,
        "vocab_size": 53,
    },
)


def their_output(checkpoint, batch):
    with torch.no_grad():
        return checkpoint.theirs(
            torch.tensor(batch.tokens),
            attention_mask=torch.tensor(batch.mask.astype(int)),
            position_ids=torch.tensor(np.maximum(batch.positions, 0)),
            output_hidden_states=True,
        )


def relative_error(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(np.asarray(theirs)).max())


def moved_by_last_bits(params, draws=8):
    """Weights perturbed in their last bit; the resulting change of the outputs bounds the allowed difference."""
    for seed in range(draws):
        sign = partial(np.random.default_rng(seed).choice, np.float32([-1, 1]))
        yield jax.tree.map(lambda leaf, sign=sign: leaf * (1 + 2.0**-23 * sign(leaf.shape)), params)


def test_logits_and_every_hidden_state_equal_those_of_transformers(checkpoint, batch):
    model, params = checkpoint.model, checkpoint.params
    theirs = their_output(checkpoint, batch)
    hidden, _, seen = checkpoint.observe(params, batch.tokens, batch.positions, None, names=NAMES)
    states = seen["hidden_states"]
    assert states.shape == (model.config.layers + 1, *hidden.shape)
    # A recurrent state accumulates more rounding than attention.
    bound = 3e-5 if model.config.delta is None else 5e-5
    assert relative_error(model.logits(params, hidden)[batch.mask], theirs.logits.numpy()[batch.mask]) < bound
    # The last state of transformers is after the final norm, like our `hidden`.
    for ours, state in zip([*states[:-1], hidden], theirs.hidden_states, strict=True):
        assert relative_error(ours[batch.mask], state.numpy()[batch.mask]) < bound


def their_greedy_tokens(checkpoint, batch):
    theirs = checkpoint.theirs
    # A random model must not stop early.
    theirs.generation_config.eos_token_id = None
    return theirs.generate(
        torch.tensor(batch.tokens),
        attention_mask=torch.tensor(batch.mask.astype(int)),
        do_sample=False,
        max_new_tokens=32,
        pad_token_id=0,
    )[:, batch.tokens.shape[1] :].numpy()


def test_every_token_of_their_greedy_text_is_our_best_one(thorough, batch):
    """Greedy text through the cache, with scanned layers, token by token."""
    expected = their_greedy_tokens(thorough, batch)
    model, _ = load_model(thorough.directory, **thorough.execution, layer_loop="scanned")

    @jax.jit
    def best(params, tokens, positions, cache):
        hidden, cache = model.apply(params, tokens, positions, cache)
        return hidden, model.logits(params, hidden[:, -1]).argmax(axis=-1), cache

    params, width = thorough.params, batch.tokens.shape[1]
    hidden, said, cache = best(params, batch.tokens, batch.positions, model.init_cache(3, width + 32))
    whole = thorough.observe(params, batch.tokens, batch.positions, None, names=NAMES)[0]
    assert relative_error(hidden[batch.mask], whole[batch.mask]) < thorough.rounding
    ours = [said]
    for step in range(31):
        _, said, cache = best(params, expected[:, step, None], batch.lengths[:, None] + step, cache)
        ours.append(said)
    np.testing.assert_array_equal(np.stack(ours, axis=1), expected)
    assert len(np.unique(expected)) > 5


@pytest.mark.parametrize("case", [pytest.param("gemma3", marks=pytest.mark.slow), "deepseek_v3"])
def test_a_greedy_continuation_of_32_tokens_is_the_same(case, make_checkpoint, batch):
    checkpoint = make_checkpoint(case)
    prompts = Prompts(
        tokens=jnp.asarray(batch.tokens, jnp.int32),
        length=jnp.asarray(batch.lengths, jnp.int32),
        prompt_id=jnp.arange(3, dtype=jnp.int32),
        answer_tokens=jnp.zeros((3, 1), jnp.int32),
        answer_length=jnp.zeros(3, jnp.int32),
    )
    sizes = dict(samples_per_prompt=1, max_completion_tokens=32, eos_ids=(-1,), pad_id=0, temperature=0.0)
    model, _ = load_model(checkpoint.directory, **checkpoint.execution, layer_loop="scanned")
    ours = jax.jit(lambda params: generate(model, params, prompts, jax.random.key(0), 0, **sizes).tokens)
    np.testing.assert_array_equal(ours(checkpoint.params), their_greedy_tokens(checkpoint, batch))


# The test of greedy text decodes every case with a loop over layers.
@pytest.mark.parametrize("layer_loop", ["unrolled", pytest.param("scanned", marks=pytest.mark.slow)])
def test_cached_decoding_equals_the_whole_forward(thorough, batch, layer_loop):
    model, _ = load_model(thorough.directory, **thorough.execution, layer_loop=layer_loop)
    apply, params = jax.jit(model.apply), thorough.params
    whole, none, _ = thorough.observe(params, batch.tokens, batch.positions, None, names=NAMES)
    assert none is None
    hidden, cache = apply(params, batch.tokens[:, :8], batch.positions[:, :8], model.init_cache(3, 14))
    pieces = [hidden]
    for t in range(8, 14):
        hidden, cache = apply(params, batch.tokens[:, t : t + 1], batch.positions[:, t : t + 1], cache)
        pieces.append(hidden)
    cached = np.concatenate(pieces, axis=1)
    assert relative_error(cached[batch.mask], whole[batch.mask]) < thorough.rounding


def test_scanned_blocks_show_what_unrolled_blocks_show(thorough, batch):
    model, _ = load_model(thorough.directory, **thorough.execution, layer_loop="scanned")
    routed = ("router_choices", "router_probabilities") if model.routed else ()
    arguments = (thorough.params, batch.tokens, batch.positions, None)
    unrolled = thorough.observe(*arguments, names=(*NAMES, *routed))[2]
    scanned = jax.jit(partial(model.observe, names=(*NAMES, *routed)))(*arguments)[2]
    # Hidden states before the final norm may be large, so their error is relative to the largest value.
    for ours, other in zip(scanned["hidden_states"], unrolled["hidden_states"], strict=True):
        assert relative_error(ours[batch.mask], other[batch.mask]) < thorough.rounding
    for name in routed:
        assert scanned[name].shape[0] == model.config.layers - model.config.experts.dense_layers
        np.testing.assert_allclose(scanned[name][:, batch.mask], unrolled[name][:, batch.mask], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", OTHER_SIZES, ids=str)
@pytest.mark.parametrize("layer_loop", ["unrolled", "scanned"])
def test_two_more_odd_shapes(plain_case, make_checkpoint, batch, sizes, layer_loop):
    checkpoint = make_checkpoint(plain_case, **sizes)
    model, _ = load_model(checkpoint.directory, **checkpoint.execution, layer_loop=layer_loop)
    hidden, _ = jax.jit(model.apply)(checkpoint.params, batch.tokens, batch.positions, None)
    theirs = their_output(checkpoint, batch).logits.numpy()
    # Wider and deeper random models amplify rounding errors.
    assert relative_error(model.logits(checkpoint.params, hidden)[batch.mask], theirs[batch.mask]) < 1e-4


def test_gradients_equal_those_of_autograd(thorough, batch, tmp_path):
    checkpoint, model = thorough, thorough.model
    direction = np.random.default_rng(1).standard_normal((*batch.tokens.shape, model.vocabulary_size))
    direction = (direction * batch.mask[..., None]).astype(np.float32)

    def loss(params):
        hidden, _ = model.apply(params, batch.tokens, batch.positions, None)
        return (model.logits(params, hidden) * direction).sum()

    differentiated = jax.jit(jax.grad(loss))
    ours = differentiated(checkpoint.params)

    theirs = checkpoint.theirs
    output = theirs(
        torch.tensor(batch.tokens),
        attention_mask=torch.tensor(batch.mask.astype(int)),
        position_ids=torch.tensor(np.maximum(batch.positions, 0)),
    )
    gradients = torch.autograd.grad(
        (output.logits * torch.tensor(direction)).sum(), list(theirs.parameters()), allow_unused=True
    )
    # Gradients have the layout of weights: saved as a checkpoint, they come in by the same map.
    weights = [weight.detach().clone() for weight in theirs.parameters()]
    try:
        for weight, gradient in zip(theirs.parameters(), gradients, strict=True):
            weight.data.copy_(torch.zeros(()) if gradient is None else gradient)  # None: vision part
        theirs.save_pretrained(tmp_path)
    finally:
        for weight, value in zip(theirs.parameters(), weights, strict=True):
            weight.data.copy_(value)
    expected = load_params(tmp_path, model.config)
    bound, errors = 2e-4 if model.config.of_several_kinds else 1e-4, {}
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(expected), strict=True):
        if path[-1].key in ("selection_bias", "layer_scale"):  # not trained, and buffers in transformers
            assert not leaf.any()
            continue
        assert np.abs(other).max() > 1e-3, path
        errors[jax.tree_util.keystr(path)] = relative_error(leaf, other)
    if max(errors.values()) >= bound:  # the model amplifies rounding of its weights
        others = map(differentiated, moved_by_last_bits(checkpoint.params))
        bound = max(max(jax.tree.leaves(jax.tree.map(relative_error, other, ours))) for other in others)
    assert max(errors.values()) < bound, errors


QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "vocab_size": 151_936, "rope_theta": 1e6}
GEMMA = {"vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216, "head_dim": 256}
PUBLISHED = {
    "Qwen3-0.6B": (
        596_049_920,
        QWEN3 | {"tie_word_embeddings": True},
        dict(hidden_size=1024, intermediate_size=3072, layers=28, heads=16, kv_heads=8),
    ),
    "Qwen3-30B-A3B": (
        30_532_122_624,
        QWEN3
        | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        dict(hidden_size=2048, intermediate_size=6144, layers=48, heads=32, kv_heads=4),
    ),
    "Llama-3.1-8B": (
        8_030_261_248,
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 128_256,
            "rope_theta": 500_000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        dict(hidden_size=4096, intermediate_size=14_336, layers=32, heads=32, kv_heads=8),
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        {"architectures": ["Qwen2ForCausalLM"], "vocab_size": 151_936, "tie_word_embeddings": True},
        dict(hidden_size=896, intermediate_size=4864, layers=24, heads=14, kv_heads=2),
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        {"architectures": ["MistralForCausalLM"], "vocab_size": 32_000},
        dict(hidden_size=4096, intermediate_size=14_336, layers=32, heads=32, kv_heads=8),
    ),
    "Mixtral-8x7B-v0.1": (
        46_702_792_704,
        {
            "architectures": ["MixtralForCausalLM"],
            "vocab_size": 32_000,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        dict(hidden_size=4096, intermediate_size=14_336, layers=32, heads=32, kv_heads=8),
    ),
    "gemma-2-2b": (
        2_614_341_888,
        GEMMA | {"architectures": ["Gemma2ForCausalLM"]},
        dict(hidden_size=2304, intermediate_size=9216, layers=26, heads=8, kv_heads=4),
    ),
    "gemma-3-1b-it": (
        999_885_952,
        GEMMA | {"architectures": ["Gemma3ForCausalLM"], "vocab_size": 262_144},
        dict(hidden_size=1152, intermediate_size=6912, layers=26, heads=4, kv_heads=1),
    ),
    "phi-4": (
        14_659_507_200,
        {"architectures": ["Phi3ForCausalLM"], "vocab_size": 100_352, "rope_scaling": None},
        dict(hidden_size=5120, intermediate_size=17_920, layers=40, heads=40, kv_heads=10),
    ),
}


def published(name: str) -> dict:
    _, source, sizes = PUBLISHED[name]
    long = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads"}
    return source | {long.get(key, key): value for key, value in sizes.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_real_shapes_have_the_published_number_of_parameters(name):
    model = transformer(config_from_json(published(name), layer_loop="scanned"))  # traces one block instead of all
    assert parameter_count(model.specs) == PUBLISHED[name][0]
    hidden, _ = jax.eval_shape(
        model.apply,
        jax.eval_shape(model.init, jax.random.key(0)),
        jax.ShapeDtypeStruct((1, 3), jnp.int32),
        jax.ShapeDtypeStruct((1, 3), jnp.int32),
    )
    assert hidden.shape == (1, 3, model.config.width)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_survives_the_way_out_and_back(name):
    config = config_from_json(published(name))
    written = config_to_json(config)
    # Phi-4 rotates all of each head: it is a Llama.
    itself = published(name)["architectures"] if name != "phi-4" else ["LlamaForCausalLM"]
    assert written["architectures"] == itself
    assert config_from_json(written) == config
    original = published(name) | {"something_else": 3}
    assert config_to_json(config, original=original) == original | {"dtype": "float32"}


def test_adapters_start_as_the_model_and_merge_into_it(thorough, batch):
    model, params = thorough.model, thorough.params
    targets = tuple(name for name in TARGETS if any(name in params[stack] for stack in model.config.stacks))
    config = LoraConfig(rank=2, alpha=4.0, targets=targets)
    shapes = jax.eval_shape(partial(add_adapters, config=config), params, key=jax.random.key(0))
    rng = np.random.default_rng(0)  # numpy needs no compilation

    def started(node, leaf):
        if not isinstance(node, LowRank):
            return leaf
        down, up = rng.standard_normal(node.down.shape).astype(np.float32), jnp.zeros(node.up.shape)
        return LowRank(leaf, jnp.asarray(down * 0.1), up, node.scale)

    adapted = jax.tree.map(started, shapes, params, is_leaf=lambda node: isinstance(node, LowRank))
    changed = {stack for stack in model.config.stacks for leaf in adapted[stack].values() if isinstance(leaf, LowRank)}
    assert changed == set(model.config.stacks)
    arguments = (batch.tokens, batch.positions, None)
    hidden = thorough.observe(params, *arguments, names=NAMES)[0]
    np.testing.assert_array_equal(thorough.observe(adapted, *arguments, names=NAMES)[0], hidden)
    learned = jax.tree.map(lambda leaf: leaf if leaf.any() else leaf + 0.05, adapted)
    moved = thorough.observe(learned, *arguments, names=NAMES)[0]
    assert relative_error(moved[batch.mask], hidden[batch.mask]) > 1e-2
    same = thorough.observe(merged(learned), *arguments, names=NAMES)[0]
    # The order of sums differs; the bound is the effect of rounding the weights, if the model amplifies it.
    error, bound = relative_error(same[batch.mask], moved[batch.mask]), 5e-5
    if error >= bound:
        others = [thorough.observe(near, *arguments, names=NAMES)[0] for near in moved_by_last_bits(learned)]
        bound = max(relative_error(other[batch.mask], moved[batch.mask]) for other in others)
    assert error < bound


def sized(architecture, vocabulary, width, hidden, layers, heads, kv_heads=None, **others) -> dict:
    named = {"architectures": [architecture], "vocab_size": vocabulary, "hidden_size": width}
    named |= {"intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return named | ({} if kv_heads is None else {"num_key_value_heads": kv_heads}) | others


GEMMA3_27B = {"head_dim": 128, "query_pre_attn_scalar": 168, "num_attention_heads": 32, "num_key_value_heads": 16}
GEMMA3_27B |= {"hidden_size": 5376, "intermediate_size": 21_504, "num_hidden_layers": 62}
# Each layer also has one scalar that transformers does not count.
GEMMA4_E2B = {"num_kv_shared_layers": 20, "use_double_wide_mlp": True}
GEMMA4_E2B |= {"layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7}
GEMMA4_31B = {"num_global_key_value_heads": 4, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0}
MOONLIGHT = {"n_routed_experts": 64, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "n_shared_experts": 2}
MOONLIGHT |= {"q_lora_rank": None, "moe_intermediate_size": 1408, "first_k_dense_replace": 1}
GLM45 = {"head_dim": 128, "use_qk_norm": True, "attention_bias": True, "n_routed_experts": 160}
GLM45 |= {"moe_intermediate_size": 1536, "first_k_dense_replace": 3}


@pytest.mark.parametrize(
    "count, source",
    [
        (2_506_172_416, sized("GemmaForCausalLM", 256_000, 2048, 16_384, 18, 8, 1)),
        (27_009_346_304, {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": GEMMA3_27B}),
        (3_821_079_552, sized("Phi3ForCausalLM", 32_064, 3072, 8192, 32, 32)),
        (3_075_098_624, sized("SmolLM3ForCausalLM", 128_256, 2048, 11_008, 36, 16)),
        (7_298_617_344, sized("Olmo2ForCausalLM", 100_352, 4096, 11_008, 32, 32)),
        (36_151_104_512, sized("SeedOssForCausalLM", 155_136, 5120, 27_648, 64, 80)),
        (8_170_848_256, sized("GraniteForCausalLM", 49_155, 4096, 12_800, 40, 32, 8, tie_word_embeddings=True)),
        (9_400_279_040, sized("Glm4ForCausalLM", 151_552, 4096, 13_696, 40, 32)),
        (14_315_784_192, sized("Qwen2MoeForCausalLM", 151_936, 2048, 5632, 24, 16)),
        (20_914_757_184, sized("GptOssForCausalLM", 201_088, 2880, 2880, 24, 64, num_local_experts=32)),
        (352_797_829_024, sized("Glm4MoeForCausalLM", 151_552, 5120, 12_288, 92, 96, **GLM45)),
        (671_026_419_200, sized("DeepseekV3ForCausalLM", 129_280, 7168, 18_432, 61, 128)),
        (8_953_803_264, sized("Qwen3_5ForCausalLM", 248_320, 4096, 12_288, 32, 16)),
        (34_660_610_688, sized("Qwen3_5MoeForCausalLM", 248_320, 2048, 512, 40, 16)),
        (4_628_569_344 + 35, sized("Gemma4ForCausalLM", 262_144, 1536, 6144, 35, 8, 1, **GEMMA4_E2B)),
        (30_697_345_280 + 60, sized("Gemma4ForCausalLM", 262_144, 5376, 21_504, 60, 32, 16, **GEMMA4_31B)),
        (79_674_391_296, sized("Qwen3NextForCausalLM", 151_936, 2048, 5120, 48, 16)),
        (15_960_110_208, sized("DeepseekV3ForCausalLM", 163_840, 2048, 11_264, 27, 16, **MOONLIGHT)),
    ],
)
def test_more_real_shapes_have_the_published_number_of_parameters(count, source):
    assert parameter_count(transformer(config_from_json(source)).specs) == count


def test_fields_of_a_real_config_mean_what_they_say():
    llama, gemma = config_from_json(published("Llama-3.1-8B")), config_from_json(published("gemma-3-1b-it"))
    assert llama.rope_scaling == RopeScaling("llama3", 8.0, 8192, low_frequency=1.0, high_frequency=4.0)
    assert (llama.rope_base, llama.window, llama.qk_norm, llama.tie_embeddings) == (500_000.0, None, False, False)
    assert (gemma.rope_base, gemma.local_rope_base, gemma.window) == (1e6, 1e4, 4096)
    assert gemma.window_pattern == (True,) * 5 + (False,)
    assert gemma.windowed[:7] == (True,) * 5 + (False, True)
    assert gemma.embedding_scale == 1152**0.5
    assert config_from_json(published("Qwen3-30B-A3B")).experts == ExpertsConfig(128, 8, normalise=True)
    assert config_from_json(published("gemma-2-2b")).window_pattern == (True, False)
    bfloat16 = config_from_json(published("phi-4") | {"torch_dtype": "bfloat16"}, parameter_dtype="float32")
    assert (bfloat16.parameter_dtype, bfloat16.compute_dtype) == ("float32", "bfloat16")


def test_a_model_of_our_own_is_written_as_the_family_that_it_is():
    demo = TransformerConfig(vocabulary_size=11, width=16, layers=2, heads=2, kv_heads=1)
    assert config_to_json(demo)["architectures"] == ["Qwen3ForCausalLM"]
    with pytest.raises(ValueError, match="no supported family has this combination"):
        config_to_json(TransformerConfig(vocabulary_size=11, width=16, layers=2, heads=2, kv_heads=1, post_norms=True))
    with pytest.raises(ValueError, match=r"differs from the original config\.json in width"):
        config_to_json(demo, original=config_to_json(demo) | {"hidden_size": 18, "head_dim": 8})


def test_how_a_run_computes_does_not_change_what_is_exported():
    demo = TransformerConfig(vocabulary_size=11, width=16, layers=2, heads=2, kv_heads=1)
    written = config_to_json(demo)
    for change in ({"remat": "full"}, {"cache_dtype": "int8"}, {"cache_layout": "paged"}):
        assert config_to_json(replace(demo, **change)) == written
        assert config_to_json(replace(demo, **change), original=written) == written


@pytest.mark.parametrize(
    "change, message",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel', which is not supported; supported are LlamaFor"),
        ({"architectures": None, "model_type": "bert"}, "'bert', which is not supported"),
        ({"hidden_act": "relu"}, "activation 'relu'; supported are silu"),
        (
            {"rope_scaling": {"rope_type": "longrope"}, "max_position_embeddings": 9},
            "0 short and 0 long factors; longrope needs one",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "3d", "factor": 2.0}}, "rope_type '3d'.*supported are default, dynamic, linear"),
        ({"rope_scaling": {"rope_type": "linear"}}, "without factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor is 0.5"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        ({"architectures": ["Gemma2ForCausalLM"], "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"architectures": ["Gemma2ForCausalLM"], "layer_types": ["linear_attention"]}, "'linear_attention'"),
        (
            {
                "architectures": ["Phi3ForCausalLM"],
                "rope_scaling": {"type": "su", "long_factor": [1.0], "short_factor": [1.0]},
            },
            "1 short and long factors for 128 rotated dimensions",
        ),
        (
            {
                "architectures": ["Gemma3ForCausalLM"],
                "rope_parameters": {
                    "full_attention": {},
                    "sliding_attention": {"rope_type": "yarn", "rope_theta": 1.0},
                },
            },
            "sliding_attention.rope_type 'yarn'",
        ),
    ],
)
def test_what_the_decoder_does_not_have_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_json(published("Llama-3.1-8B") | {"rope_scaling": None} | change)


@pytest.mark.parametrize("architecture", [*FAMILIES, *VISION_LANGUAGE])
def test_what_a_file_leaves_out_means_what_it_means_to_transformers(architecture):
    import transformers

    sizes = dict(
        vocab_size=9,
        hidden_size=4096,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=32,
        pad_token_id=0,
    )
    sparse = sizes if architecture in FAMILIES else {"text_config": sizes}
    if architecture.startswith("Mistral3For"):  # transformers ties a head that is not stored; published ones are
        sparse["tie_word_embeddings"] = False
    name = re.sub("For(CausalLM|ConditionalGeneration)$", "", architecture)
    kind = getattr(transformers, {"Gemma3ForCausalLM": "Gemma3TextConfig"}.get(architecture, f"{name}Config"))
    named = {"architectures": [architecture]}
    assert config_from_json(sparse | named) == config_from_json(kind(**copy.deepcopy(sparse)).to_dict() | named)


def test_of_two_places_that_say_the_first_context_the_outer_one_counts():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    source = published("Qwen2.5-0.5B") | {"rope_scaling": scaling, "original_max_position_embeddings": 8}
    read = config_from_json(source).rope_scaling
    assert read is not None
    assert read.original_positions == 8


def test_rotary_angles_that_depend_on_the_length_of_a_run():
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
    longrope = published("phi-4") | {"rope_scaling": scaling, "max_position_embeddings": 32, "vocab_size": 9}
    longrope |= {"original_max_position_embeddings": 8}
    dynamic = longrope | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8}
    for source in (longrope, dynamic):
        config = config_from_json(source)
        apply = partial(jax.eval_shape, transformer(config).apply, abstract(transformer(config).specs))
        assert apply(jnp.zeros((1, 8), int), jnp.zeros((1, 8), int), None)[0].shape == (1, 8, config.width)
        with pytest.raises(ValueError, match=r"9 tokens are longer than 8, .* load it with context_tokens"):
            apply(jnp.zeros((1, 9), int), jnp.zeros((1, 9), int), None)
    extended = [config_from_json(longrope, context_tokens=tokens).rope_scaling for tokens in (8, 9)]
    assert [scaling is not None and scaling.extended for scaling in extended] == [False, True]
    assert config_from_json(dynamic, context_tokens=8) == config_from_json(dynamic).for_context(8)
    with pytest.raises(ValueError, match="sequences of 9 tokens are longer than max_position_embeddings 8"):
        config_from_json(dynamic, context_tokens=9)


def test_only_execution_may_be_chosen_at_import():
    with pytest.raises(ValueError, match=r"width cannot be set for a model that is read from config\.json"):
        config_from_json(published("Qwen3-0.6B"), width=3)


def test_every_family_has_a_case(architectures):
    assert architectures == {*FAMILIES, *VISION_LANGUAGE}
