"""Three steps of GRPO on a tiny checkpoint of every family, with a tokenizer and a template of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxrl_llm.cli import main

ROOT = Path(__file__).parents[2]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL = [
    "model.compute_dtype=float32",
    "rollout.samples_per_prompt=4",
    "data.prompt_format='{body}'",
    "rollout.max_prompt_tokens=48",
    "rollout.max_completion_tokens=8",
    "training.steps=3",
    "training.prompts_per_step=4",
    "training.sequences_per_microbatch=16",
    "training.learning_rate=0.01",
    "training.warmup_steps=0",
    "warm_start={steps: 0}",
    "evaluation={problems: 4, samples_per_problem: 1, k: [1]}",
]


@pytest.fixture
def checkpoint_with_tokenizer(request, make_checkpoint, tmp_path):
    """(directory of a model with tokenizer and template, a file of problems)."""
    lines = [{"question": f"{n % 7} plus {n % 5}?", "answer": f"#### {n % 7 + n % 5}"} for n in range(80)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([line["question"] for line in lines], trainer)
    directory = tmp_path / "model"
    shutil.copytree(make_checkpoint(request.param, vocab_size=296).directory, directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": SPECIAL[2], "pad_token": SPECIAL[0]}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], "pad_token_id": 0}))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory, tmp_path / "train.jsonl"


def test_three_steps_of_grpo_and_an_export(checkpoint_with_tokenizer, tmp_path):
    import transformers

    directory, data = checkpoint_with_tokenizer
    paths = [f"model.path={directory}", f"data.path={data}", f"run_dir={tmp_path / 'run'}"]
    assert main(["train", str(ROOT / "configs" / "qwen3_gsm8k.yaml"), *paths, *SMALL]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    assert len(losses) == 3
    assert all(np.isfinite(line["loss"]) for line in losses)
    # What sampled is what is trained, up to rounding: the log-probability of a sampled token of such a random model
    # differs by up to 2.5e-4, and by 1e-5 in the mean, between transformers in float32 and in float64.
    assert max(line["sampler_gap_max"] for line in losses) < 5e-4
    assert max(line["sampler_gap_mean"] for line in losses) < 2e-5
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "exported")]) == 0
    (named,) = json.loads((tmp_path / "exported" / "config.json").read_text())["architectures"]
    assert getattr(transformers, named).from_pretrained(tmp_path / "exported").num_parameters() > 1000
