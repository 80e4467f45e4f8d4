"""DPO by `jaxrl train` and by TRL on one tiny Hugging Face model: loss, margin and accuracy, step by step.

    python benchmarks/dpo_beside_trl.py --trl ENVIRONMENT/bin/python [--loss ipo] [--steps 20]

Same weights, data, order, learning rate and clipping, float32; each with the interpreter of its own environment. The
curves should differ only by rounding. Exit status 1 if they differ by more than 1e-3 at any step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxrl_llm.config import parse_config
from jaxrl_llm.data import load_tokenizer
from jaxrl_llm.data.written import judged_groups, written_batches
from jaxrl_llm.models import TransformerConfig, save_model, transformer

WORKER = Path(__file__).parent / "workers" / "dpo_with_trl.py"
LETTERS = "0123456789+= "
BETA, RATE = 0.1, 1e-3
# Entry of our `losses`, and TRL's `loss_type`.
LOSSES: dict[str, tuple[dict[str, Any], str]] = {
    "dpo": ({"dpo": {"beta": BETA}}, "sigmoid"),
    "ipo": ({"dpo": {"beta": BETA, "link": "square", "length_normalised": True}}, "ipo"),
    "robust": ({"dpo": {"beta": BETA, "link": "robust", "label_smoothing": 0.1}}, "robust"),
    "apo_zero": ({"anchored_preference": {"beta": BETA}}, "apo_zero"),
}


def pairs(count: int, seed: int) -> list[dict[str, str]]:
    """Sums with a right and a wrong result, of different lengths."""
    draw, made = random.Random(seed), []
    for _ in range(count):
        a, b = draw.randrange(100), draw.randrange(100)
        wrong = draw.randrange(2000)
        made.append({"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(wrong + (wrong == a + b))})
    return made


def write_model(directory: Path) -> None:
    """A Qwen3 of random weights, and a tokenizer of one token a letter."""
    vocabulary = {token: number for number, token in enumerate(["<eos>", "<unk>", *LETTERS])}

    config = TransformerConfig(len(vocabulary), width=32, layers=2, heads=2, kv_heads=1, head_width=16)
    model = transformer(config)
    save_model(directory, model.init(jax.random.key(0)), config, dtype="float32")
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    told = {"eos_token": "<eos>", "pad_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(told))


def ours(folder: Path, file: Path, loss: str, steps: int, batch: int) -> tuple[list[dict[str, float]], list[int]]:
    """(metrics of each step, the order in which pairs were learned from)."""
    (entry,) = LOSSES[loss][0].items()
    tree = {
        "name": "dpo",
        "run_dir": str(folder / "run"),
        "model": {"path": str(folder / "model")},
        "source": {"pairs": {"file": str(file), "groups_per_step": batch}},
        "rollout": {"max_prompt_tokens": 8, "max_completion_tokens": 8},
        "rewards": [],
        "credit": [],
        "losses": [dict([entry])],
        "training": {"steps": steps, "learning_rate": RATE, "adam_b2": 0.999, "max_gradient_norm": 1.0},
    }
    (folder / "dpo.yaml").write_text(yaml.safe_dump(tree))
    subprocess.run(
        [sys.executable, "-m", "jaxrl_llm", "train", str(folder / "dpo.yaml")], check=True, stdout=sys.stderr
    )
    config = parse_config(tree)
    tokenizer = load_tokenizer(folder / "model")
    sizes = {"max_prompt_tokens": 8, "max_completion_tokens": 8, "seed": config.seed, "groups_per_step": batch}
    batches = written_batches(judged_groups(file, "pairs").groups, "pairs", tokenizer, **sizes)
    order = [int(number) for step in range(steps) for number in batches[step].prompt_id[::2]]
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    name = f"{next(iter(LOSSES[loss][0]))}"
    told = [json.loads(line) for line in lines]
    told = [line for line in told if f"loss/{name}" in line]
    return [
        {"loss": line[f"loss/{name}"], "margin": line[f"margin/{name}"], "accuracy": line[f"preferred_share/{name}"]}
        for line in told
    ], order


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", required=True, help="the Python of an environment with TRL")
    parser.add_argument("--loss", choices=LOSSES, default="dpo")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        file, rows = folder / "pairs.jsonl", pairs(asked.steps * asked.batch + asked.batch, 1)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        curve, order = ours(folder, file, asked.loss, asked.steps, asked.batch)
        (folder / "ordered.jsonl").write_text("".join(json.dumps(rows[number]) + "\n" for number in order))
        told = {
            "loss_type": LOSSES[asked.loss][1],
            "beta": BETA,
            "rate": RATE,
            "batch": asked.batch,
            "steps": asked.steps,
        }
        given = [asked.trl, str(WORKER), str(folder), json.dumps(told)]
        offline = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        theirs = json.loads(
            subprocess.run(given, check=True, capture_output=True, text=True, env=offline).stdout.splitlines()[-1]
        )
    print(f"{'step':>4} {'ours':>10} {'TRL':>10} {'difference':>11} {'margin':>10} {'TRL':>10}")
    worst = 0.0
    for step, (one, other) in enumerate(zip(curve, theirs, strict=True)):
        gap = abs(one["loss"] - other["loss"])
        worst = max(worst, gap)
        losses, margins = (f"{one[name]:10.6f} {other[name]:10.6f}" for name in ("loss", "margin"))
        print(f"{step:4d} {losses} {gap:11.2e} {margins}")
    print(f"largest difference of the loss {worst:.2e}")
    return int(worst > 1e-3)


if __name__ == "__main__":
    sys.exit(main())
