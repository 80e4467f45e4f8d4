"""Tiny models of every open family, made and saved by `transformers`, and read by this package."""

from __future__ import annotations

import os
from types import SimpleNamespace

# Set before transformers is imported, so that nothing is downloaded.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import jax
import numpy as np
import pytest

from jaxrl_llm.models import load_model

VOCABULARY = 37
WINDOW = 5
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "intermediate_size": 21,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0}
MINISTRAL = {"original_max_position_embeddings": 5, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.7}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "partial_rotary_factor": 0.67,
    "short_factor": [1.0, 1.3],
    "long_factor": [1.5, 9.0],
    "original_max_position_embeddings": 8,
}
MSCALE = {"mscale": 0.7, "mscale_all_dim": 0.9}
DEEPSEEK = {
    "kv_lora_rank": 9,
    "q_lora_rank": 7,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 5,
    "v_head_dim": 3,
    "n_group": 3,
    "topk_group": 2,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 11,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}
DELTA = {
    "head_dim": 10,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 7,
    "full_attention_interval": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.4},
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 11}
GEMMA = {"head_dim": 10, "sliding_window": WINDOW, "query_pre_attn_scalar": 7}
VISION_GEMMA = {"head_dim": 10, "sliding_window": WINDOW, "query_pre_attn_scalar": 7, "attn_logit_softcapping": 2.0}
SIGHT = {"hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
GEMMA4 = {"head_dim": 10, "global_head_dim": 14, "sliding_window": WINDOW}
SEEN_BY_QWEN = {
    "depth": 1,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_heads": 2,
    "out_hidden_size": 36,
    "patch_size": 4,
}
# The text part of vision-language models: (class, options of the text part, options of the rest).
VISION_LANGUAGE = {
    "gemma3 with vision": (
        "Gemma3",
        VISION_GEMMA | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        {"vision_config": SIGHT | {"image_size": 8}, "mm_tokens_per_image": 4, "image_token_index": 36},
    ),
    "qwen2.5 with vision": (
        "Qwen2_5_VL",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 1]},
        },
        {
            "vision_config": SEEN_BY_QWEN | {"fullatt_block_indexes": [0]},
        },
    ),
    "qwen3 with vision": (
        "Qwen3VL",
        {
            "head_dim": 10,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 2, 1]},
        },
        {
            "vision_config": SEEN_BY_QWEN | {"num_position_embeddings": 4, "deepstack_visual_indexes": [0]},
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_5 with vision": (
        "Qwen3_5",
        DELTA | {"rope_parameters": DELTA["rope_parameters"] | {"mrope_section": [1, 1, 0]}},
        {"vision_config": SEEN_BY_QWEN | {"num_position_embeddings": 4}},
    ),
    "qwen3_5_moe with vision": (
        "Qwen3_5Moe",
        DELTA | EXPERTS | {"shared_expert_intermediate_size": 7},
        {"vision_config": SEEN_BY_QWEN | {"num_position_embeddings": 4}, "tie_word_embeddings": True},
    ),
    "gemma4 with vision": (
        "Gemma4",
        GEMMA4
        | {"hidden_size_per_layer_input": 0}
        | {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
        {
            "vision_config": SIGHT | {"head_dim": 4, "num_key_value_heads": 2},
            "image_token_id": 36,
            "audio_token_id": 35,
        },
    ),
    "mistral3": (
        "Mistral3",
        {"model_type": "mistral", "head_dim": 10, "sliding_window": None},
        {
            "vision_config": SIGHT | {"model_type": "pixtral", "image_size": 8, "head_dim": 4},
            "image_token_index": 36,
            "tie_word_embeddings": False,
        },
    ),
}
IMAGE_TOKENS = {"image_token_id": 36, "video_token_id": 35, "vision_start_token_id": 34, "vision_end_token_id": 33}
# (class of transformers, its options): every family, tied and untied heads, every kind of rotary scaling, grouped and
# multi-query attention, windows in all, some and no layers.
CASES = {
    "llama": ("Llama", {}),
    "llama tied, llama3 rope": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "head_dim": 10,
            "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16},
        },
    ),
    "llama biased, linear rope": (
        "Llama",
        {"attention_bias": True, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10_000.0}},
    ),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2 partly windowed, yarn rope": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "rope_parameters": YARN}
        # Given in two places, which disagree.
        | {"original_max_position_embeddings": 8},
    ),
    "qwen3 tied": ("Qwen3", {"head_dim": 10, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "llama with biases in the MLP, dynamic rope below its limit": (
        "Llama",
        {"mlp_bias": True, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}},
    ),
    "ministral3 beyond its first context": ("Ministral3", {"head_dim": 10, "rope_parameters": YARN | MINISTRAL}),
    "gemma": ("Gemma", {"head_dim": 10}),
    "gemma2": ("Gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": (
        "Gemma3",
        GEMMA
        | {
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            },
        },
    ),
    "gemma4 with shared keys and embeddings": (
        "Gemma4",
        GEMMA4
        | {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 3,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 5,
            "vocab_size_per_layer_input": VOCABULARY,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma4 whose values are keys": (
        "Gemma4",
        GEMMA4
        | {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0}
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "gemma4 with experts": (
        "Gemma4",
        GEMMA4
        | {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 11}
        | {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "phi3 partly rotated": (
        "Phi3",
        {
            "sliding_window": WINDOW,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.67},
        },
    ),
    "phi3 longrope, short": ("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    "phi3 longrope, long": ("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 8}),
    "seed_oss": ("SeedOss", {"head_dim": 10}),
    "smollm3 windowed": (
        "SmolLM3",
        {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": WINDOW, "pad_token_id": 0},
    ),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 1.5,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.3,
            "logits_scaling": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("Olmo2", {}),
    "olmo3": (
        "Olmo3",
        {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "glm4": ("Glm4", {"head_dim": 12}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 11,
            "shared_expert_intermediate_size": 7,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "head_dim": 10,
            "sliding_window": WINDOW,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "swiglu_limit": 1.5,
            "rope_parameters": YARN | {"truncate": False},
        },
    ),
    "glm4_moe": (
        "Glm4Moe",
        {
            "head_dim": 12,
            "use_qk_norm": True,
            "attention_bias": True,
            "moe_intermediate_size": 11,
            "n_routed_experts": 5,
            "num_experts_per_tok": 2,
            "routed_scaling_factor": 1.7,
        },
    ),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK | {"num_key_value_heads": 6, "rope_parameters": YARN | MSCALE}),
    "deepseek_v3 without narrow queries or groups": (
        "DeepseekV3",
        DEEPSEEK
        | {
            "num_key_value_heads": 6,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "n_shared_experts": 1,
            "rope_interleave": False,
            "norm_topk_prob": False,
        },
    ),
    "qwen3_next": ("Qwen3Next", DELTA | EXPERTS | {"shared_expert_intermediate_size": 7, "num_hidden_layers": 5}),
    "qwen3_5": (
        "Qwen3_5",
        DELTA
        | {"layer_types": ["linear_attention", "linear_attention", "full_attention"], "linear_conv_kernel_dim": 3},
    ),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        DELTA
        | EXPERTS
        | {"shared_expert_intermediate_size": 7, "linear_num_key_heads": 6, "tie_word_embeddings": True},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"head_dim": 10, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 11},
    ),
}


# Families whose config includes the vision part.
TEXT_PARTS = ("Gemma3", "Gemma4", "Qwen3_5", "Qwen3_5Moe")
# Sizes that are sharded over devices.
DIVIDED = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
DIVIDED += ("shared_expert_intermediate_size", "num_global_key_value_heads")


def their_config(case: str, *, even: bool = False, **sizes):
    """(the class of a case, its config), with the given sizes, or with sizes that devices divide."""
    import transformers

    if even:
        sizes |= {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
        sizes |= {"vocab_size": 64}
    evened = lambda options: {key: value + value % 2 if key in DIVIDED else value for key, value in options.items()}  # noqa: E731
    if case in VISION_LANGUAGE:
        family, text, rest = VISION_LANGUAGE[case]
        text = evened(text) if even else text
        tokens = IMAGE_TOKENS if "Qwen" in family else {}
        whole = {"text_config": SIZES | text | sizes} | tokens | rest
        return f"{family}ForConditionalGeneration", getattr(transformers, f"{family}Config")(**whole)
    family, options = CASES[case]
    if even:
        options = evened(options)
    if "vocab_size_per_layer_input" in options and "vocab_size" in sizes:
        sizes |= {"vocab_size_per_layer_input": sizes["vocab_size"]}
    if "num_hidden_layers" in sizes:  # with the family's default pattern over layers
        if family == "Gemma4":  # its last layers need both kinds before them
            layers = sizes["num_hidden_layers"]
            sizes |= {"layer_types": [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]}
            sizes |= {"num_kv_shared_layers": min(options.get("num_kv_shared_layers", 0), max(layers - 3, 0))}
        options = {key: value for key, value in options.items() if key not in ("layer_types", "no_rope_layers")}
    if "num_key_value_heads" in sizes and family == "DeepseekV3":
        sizes |= {"num_key_value_heads": sizes["num_attention_heads"]}
    kind = f"{family}TextConfig" if family in TEXT_PARTS else f"{family}Config"
    given = SIZES | options | sizes
    if family == "Qwen3_5Moe":  # all its MLPs are experts
        del given["intermediate_size"]
    rope = given.get("rope_parameters") or {}
    if "short_factor" in rope:  # one factor for each frequency
        size = int(given["hidden_size"] // given["num_attention_heads"] * rope["partial_rotary_factor"])
        factors = {name: np.linspace(*rope[name], size // 2).tolist() for name in ("short_factor", "long_factor")}
        given["rope_parameters"] = rope | factors
    return f"{family}ForCausalLM", getattr(transformers, kind)(**given)


def torch_model(case: str, **sizes):
    """A tiny model of `transformers` with random weights, large enough that every part affects the logits."""
    import torch
    import transformers

    torch.set_num_threads(1)  # with tiny models, several threads only wait for each other
    family, config = their_config(case, **sizes)
    model = getattr(transformers, family)(config).eval()
    model.set_attn_implementation("eager")
    if any(getattr(config.get_text_config(), name, None) for name in ("num_experts_per_tok", "top_k_experts")):
        # Their grouped product does not support odd sizes.
        model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(len(case))
    with torch.no_grad():
        for name, bias in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                bias.copy_(0.3 * torch.randn(bias.shape, generator=generator))
        for name, weight in model.named_parameters():
            # Some store what their gains are above one. Gemma scales its embedding up: a large one would let every
            # token predict itself. And what is recurrent magnifies the last bits of large weights, as do the queries
            # of Ministral, which grow.
            gain, recurrent = "norm" in name, family.startswith(("Qwen3Next", "Qwen3_5"))
            magnified = recurrent or family.startswith(("Ministral3", "Gemma4"))
            from_one = family[:7] in ("GemmaFo", "Gemma2F", "Gemma3F") or (recurrent and "linear_attn" not in name)
            offset = gain and not from_one
            spread = 0.3 if gain else 0.1 if "Gemma" in family and "embed" in name else 0.3 if magnified else 0.5
            weight.copy_(offset + spread * torch.randn(weight.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory):
    """case -> its `transformers` model, its directory, and our model and parameters. Read only."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    made = {}

    def make(case: str, **sizes) -> SimpleNamespace:
        key = case, tuple(sizes.items())
        if key not in made:
            theirs = torch_model(case, **sizes)
            directory = tmp_path_factory.mktemp("checkpoint")
            theirs.save_pretrained(directory)
            # For a model with two sets of rotary factors: which set it uses.
            execution = {"context_tokens": 46}
            model, params = load_model(directory, **execution)
            made[key] = SimpleNamespace(
                case=case,
                theirs=theirs,
                directory=directory,
                execution=execution,
                # How far two orders of summation may be apart, as a share of the largest number: the last bit of each
                # weight moves what the one says by up to 2.3e-5, and what the others say by a third of it at most.
                rounding=5e-5 if case == "gemma4 with shared keys and embeddings" else 1e-5,
                model=model,
                params=params,
                # Compiled once for all tests.
                observe=jax.jit(model.observe, static_argnames="names"),
            )
        return made[key]

    return make


@pytest.fixture(scope="session")
def every_case() -> tuple[str, ...]:
    """The names of all cases."""
    return (*CASES, *VISION_LANGUAGE)


def pytest_generate_tests(metafunc):
    if "checkpoint_with_tokenizer" in metafunc.fixturenames:
        cases = [pytest.param(case, marks=pytest.mark.slow) for case in (*CASES, *VISION_LANGUAGE)]
        metafunc.parametrize("checkpoint_with_tokenizer", cases, indirect=True)


@pytest.fixture(params=CASES)
def plain_case(request) -> str:
    """Each case whose options allow other sizes."""
    return request.param


@pytest.fixture(scope="session")
def architectures() -> set[str]:
    """All cases, by name."""
    return {their_config(case)[0] for case in (*CASES, *VISION_LANGUAGE)}


# Windows, and experts with sinks; test_delta.py has states instead of a cache.
FEW = ("gemma3", "gpt_oss")
# One of each family, and two with a vision part.
ONE_EACH = {*{family: case for case, (family, _) in reversed(CASES.items())}.values(), *list(VISION_LANGUAGE)[:2]}


@pytest.fixture(
    scope="session",
    params=[pytest.param(case, marks=[] if case in FEW else pytest.mark.slow) for case in (*CASES, *VISION_LANGUAGE)],
)
def thorough(request, make_checkpoint) -> SimpleNamespace:
    """The checkpoint of a few cases, and of all of them in the slow suite."""
    return make_checkpoint(request.param)


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(case, marks=[] if case in ONE_EACH else pytest.mark.slow) for case in (*CASES, *VISION_LANGUAGE)
    ],
)
def checkpoint(request, make_checkpoint) -> SimpleNamespace:
    """The checkpoint of one case of each family, and of all of them in the slow suite."""
    return make_checkpoint(request.param)


# One of each kind of weights, and one with a vision part.
EXPORTED = {"llama", "qwen2 tied", "phi3 partly rotated", "gemma3", "glm4_moe", "mixtral", "gpt_oss", "deepseek_v3"}
EXPORTED |= {"qwen3_next", "qwen2.5 with vision"}


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(case, marks=[] if case in EXPORTED else pytest.mark.slow) for case in (*CASES, *VISION_LANGUAGE)
    ],
)
def exported(request, make_checkpoint) -> SimpleNamespace:
    """The checkpoint of a case of each kind of weights, and of all of them in the slow suite."""
    return make_checkpoint(request.param)


@pytest.fixture(scope="session")
def batch() -> SimpleNamespace:
    """Three left-padded rows; the longest is almost three windows long."""
    width, lengths = 14, np.array([14, 11, 6])
    mask = np.arange(width) >= width - lengths[:, None]
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, mask.shape)
    return SimpleNamespace(tokens=tokens, mask=mask, positions=np.where(mask, mask.cumsum(1) - 1, -1), lengths=lengths)
