"""Fuzzed model directories."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from fuzzed.mutations import Case, damaged, mutated


def models(random_: random.Random, folder: Path) -> Callable[[int], Case]:
    """Tiny models of every family with mutated config.json, index, tokenizer settings, weights and special files."""
    import jax
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    from jaxrl_llm.data import load_tokenizer, with_chat
    from jaxrl_llm.models.families import FAMILIES, config_from_json
    from jaxrl_llm.models.tensor_names import checkpoint_layout
    from jaxrl_llm.models.weights import load_model

    small = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "head_dim": 8}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    small |= {"max_position_embeddings": 64, "torch_dtype": "float32", "layer_types": None, "rope_scaling": None}
    small |= {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
    small |= {"topk_group": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "kv_lora_rank": 8}
    small |= {"q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1}
    small |= {"first_k_dense_replace": 1, "sliding_window": 8, "eos_token_id": 1}
    known = {}
    for architecture in FAMILIES:
        described = small | {"architectures": [architecture]}
        try:
            shapes = checkpoint_layout(config_from_json(described), architecture).tensors()
        except ValueError:  # a family with more than two kinds of layers
            continue
        if sum(map(math.prod, shapes.values())) > 1_000_000:  # a family with large default sizes
            continue
        known[architecture] = described, {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(11)} | {"<unk>": 11}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    settings = {
        "eos_token": "w1",
        "pad_token": {"content": "w2"},
        "added_tokens_decoder": {"1": {"content": "w1", "special": True, "lstrip": False}},
        "chat_template": "{% for m in messages %}{{ m.content }} w1 {% endfor %}"
        "{% if add_generation_prompt %}w3 {% endif %}",
    }
    here = folder / "model"

    def case(number: int) -> Case:
        architecture = random_.choice(list(known))
        described, tensors = copy.deepcopy(known[architecture])
        files = {
            "config.json": described,
            "tokenizer_config.json": settings,
            "special_tokens_map.json": {"eos_token": "w1"},
            "generation_config.json": {"eos_token_id": [1], "pad_token_id": 2},
            "model.safetensors.index.json": {"metadata": {}, "weight_map": dict.fromkeys(tensors, "a.safetensors")},
            "tokenizer.json": json.loads(words.to_str()),
        }
        indexed = random_.random() < 0.5
        if not indexed:
            del files["model.safetensors.index.json"]
        chosen = "config.json" if random_.random() < 0.5 else random_.choice(list(files))
        way = random_.random()
        if way < 0.75:
            files[chosen] = mutated(random_, files[chosen])
        if chosen == "config.json" and random_.random() < 0.2:
            files[chosen][random_.choice(list(small))] = random_.choice((10**9, 10**6, 0, -1, 1.5, "2", [2], None))
        weights = "a.safetensors" if indexed else "model.safetensors"
        if random_.random() < 0.2:
            name = random_.choice(list(tensors))
            tensors[name] = random_.choice(
                (
                    tensors[name] * np.nan,
                    tensors[name] * np.inf,
                    tensors[name][:0],
                    tensors[name].astype(np.int64),
                    tensors[name][None],
                )
            )
        special, strict = random_.random(), random_.random() < 0.5
        cut = random_.random()

        def run() -> None:
            shutil.rmtree(here, ignore_errors=True)
            here.mkdir()
            for name, value in files.items():
                content = json.dumps(value).encode()
                (here / name).write_bytes(damaged(random_, content) if way >= 0.75 and name == chosen else content)
            save_file(tensors, here / weights)
            if cut < 0.1:
                content = (here / weights).read_bytes()
                (here / weights).write_bytes(damaged(random_, content[:600]) + content[600:])
            if special < 0.08:
                name = random_.choice([*files, weights])
                (here / name).unlink()
                random_.choice((os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path), lambda path: None))(
                    here / name
                )
            elif special < 0.1:
                (here / chosen).write_bytes(b'{"a":' * 100_000)
            model, params = load_model(here, strict=strict)
            jax.block_until_ready(params)
            tokenizer = load_tokenizer(here)
            tokenizer.token_bytes()
            with_chat(tokenizer, rewritten_history="allow").prompt_ids({"body": "w4 w5"})

        return Case(f"models {number}: {architecture} {chosen}", run)

    return case
