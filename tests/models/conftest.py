"""Tiny models of every open family, made by `transformers` on this machine, saved, and read back by ours."""

from __future__ import annotations

import os
from types import SimpleNamespace

# Before anything imports transformers: nothing is downloaded.
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
GEMMA = {"head_dim": 10, "sliding_window": WINDOW, "query_pre_attn_scalar": 7}
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
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "rope_parameters": YARN},
    ),
    "qwen3 tied": ("Qwen3", {"head_dim": 10, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
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
    "phi3 partly rotated": (
        "Phi3",
        {
            "sliding_window": WINDOW,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.67},
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"head_dim": 10, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 11},
    ),
}


def torch_model(case: str):
    """A tiny model of `transformers` with random weights, large enough that every part of it shows in the logits."""
    import torch
    import transformers

    torch.set_num_threads(1)  # several wait for each other in a loop, where the models are tiny
    family, options = CASES[case]
    kind = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, kind)(**(SIZES | options))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.set_attn_implementation("eager")
    if hasattr(config, "num_experts_per_tok"):
        # Their grouped product takes no odd sizes.
        model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(len(case))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            gemma, gain = "Gemma" in family, "norm" in name
            # Gemma stores what its gains are above one, and scales its embedding up: a large one would let every
            # token predict itself.
            spread = 0.3 if gain else 0.1 if gemma and "embed" in name else 0.5
            weight.copy_((gain and not gemma) + spread * torch.randn(weight.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory):
    """case -> its `transformers` model, the directory that it is saved in, and our model and parameters. Read only."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    made = {}

    def make(case: str) -> SimpleNamespace:
        if case not in made:
            theirs = torch_model(case)
            directory = tmp_path_factory.mktemp("checkpoint")
            theirs.save_pretrained(directory)
            model, params = load_model(directory)
            made[case] = SimpleNamespace(
                case=case,
                theirs=theirs,
                directory=directory,
                model=model,
                params=params,
                # Compiled once for all tests.
                observe=jax.jit(model.observe, static_argnames="names"),
            )
        return made[case]

    return make


@pytest.fixture(scope="session", params=CASES)
def checkpoint(request, make_checkpoint) -> SimpleNamespace:
    """The checkpoint of every case in turn."""
    return make_checkpoint(request.param)


@pytest.fixture(scope="session")
def batch() -> SimpleNamespace:
    """Three left-padded rows; the longest is almost three windows long."""
    width, lengths = 14, np.array([14, 11, 6])
    mask = np.arange(width) >= width - lengths[:, None]
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, mask.shape)
    return SimpleNamespace(tokens=tokens, mask=mask, positions=np.where(mask, mask.cumsum(1) - 1, -1), lengths=lengths)
