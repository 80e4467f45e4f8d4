"""A user's checkpoint and a user's file, from `jaxrl train` to a directory that transformers loads."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers: nothing is downloaded

import numpy as np
import pytest
import tokenizers
import yaml
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxrl_llm.cli import main
from jaxrl_llm.data import load_tokenizer

ROOT = Path(__file__).parent.parent
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL = [
    "model.compute_dtype=float32",
    "rollout.samples_per_prompt=4",
    "rollout.max_prompt_tokens=96",
    "rollout.max_completion_tokens=24",
    "training.steps=2",
    "training.prompts_per_step=4",
    "training.sequences_per_microbatch=8",
    "training.learning_rate=0.01",
    "training.warmup_steps=0",
    "warm_start={steps: 30, sequences_per_step: 16, learning_rate: 0.01, warmup_steps: 2}",
    "evaluation={problems: 8, samples_per_problem: 2, k: [1, 2]}",
    "checkpoints={every_steps: 1}",
]


def call(*arguments: str, status: int = 0) -> str:
    """What `jaxrl` prints; on failure what it says on the error stream."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        assert main(list(map(str, arguments))) == status, error.getvalue()
    return error.getvalue() if status else out.getvalue()


def problem(number: int) -> dict[str, str]:
    one, other = number % 7, number % 5 + 1
    return {
        "question": f"Tom has {one} clips and gets {other} more ({number}). How many clips has he?",
        "answer": f"{one}+{other}=<<{one}+{other}={one + other}>>\n#### {one + other}",
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> SimpleNamespace:
    """A random Qwen3 checkpoint with tokenizer and template, saved by transformers, and a data file."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("pretrained")
    lines = [problem(number) for number in range(160)]
    (root / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f"{line['question']} {line['answer']}" for line in lines], trainer)
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=416,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=None,
    )
    directory = root / "checkpoint"
    transformers.Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], "pad_token_id": 0}))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return SimpleNamespace(root=root, checkpoint=directory, data=root / "train.jsonl")


def train_arguments(files, run: Path, *more: str) -> list[str]:
    paths = [f"model.path={files.checkpoint}", f"data.path={files.data}", f"run_dir={run}"]
    return ["train", str(ROOT / "configs" / "qwen3_gsm8k.yaml"), *paths, *SMALL, *more]


@pytest.fixture(scope="module")
def run(files) -> Path:
    """The shipped config, with small sizes, on the checkpoint and the file."""
    directory = files.root / "run"
    call(*train_arguments(files, directory))
    return directory


def test_the_shipped_config_trains_a_checkpoint_on_a_file(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["before"]["problems"] == 8
    assert {"train", "validation", "test", "tokenizer", "model"} == summary["data"].keys()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["stage"] == "warm start"]
    assert losses[-1] < 0.6 * losses[0]
    assert all(np.isfinite(line["loss"]) for line in lines)


@pytest.mark.slow
def test_eval_sample_and_resume_read_the_run(run, files):
    found = json.loads(call("eval", run, "--k", "1,2", "--problems", "4", "--json"))
    assert 0 <= found["pass@1"] <= found["pass@2"] <= 1
    (made,) = json.loads(call("sample", run, "--prompt", "How many?", "--greedy", "--json"))
    assert len(made["tokens"]) == len(made["logprobs"]) <= 24
    call("train", "--resume", run, "training.steps=3")
    assert json.loads((run / "summary.json").read_text())["steps"] == 3


def test_an_exported_run_gives_the_same_numbers_in_transformers(run, files):
    import torch
    import transformers

    out = files.root / "exported"
    report = json.loads(call("export", run, out, "--json"))
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= set(report["files"])
    given = files.root / "texts.jsonl"
    given.write_text(
        json.dumps({"prompt": "Tom has 3 clips?", "completion": "3+1\n#### 4"})
        + "\n"
        + json.dumps({"text": "clips and more"})
        + "\n"
        + json.dumps({"tokens": [5, 6, 7], "prompt_tokens": [1, 2]})
        + "\n"
    )
    by_run = [json.loads(line) for line in call("score", run, "--file", given).splitlines()]
    by_directory = [json.loads(line) for line in call("score", out, "--file", given).splitlines()]
    # The run's prompts are chats, the bare directory's are plain; texts and ids are scored as they are.
    assert len(by_run[0]["prompt_tokens"]) > len(by_directory[0]["prompt_tokens"])
    for here, there in zip(by_run[1:], by_directory[1:], strict=True):
        assert here["tokens"] == there["tokens"]
        np.testing.assert_allclose(here["logprobs"], there["logprobs"], atol=1e-6)
    # As in the run, with the template of the directory and the prompt format of the run.
    asked = files.root / "asked.jsonl"
    text = "Tom has 3 clips?\nReason step by step, and write the final answer after ####."
    asked.write_text(json.dumps({"prompt": text, "completion": "3+1\n#### 4"}))
    chatted = json.loads(call("score", out, "--file", asked, "--chat"))
    assert chatted["prompt_tokens"] == by_run[0]["prompt_tokens"]
    np.testing.assert_allclose(chatted["total"], by_run[0]["total"], atol=1e-5)
    assert yaml.safe_load((out / "README.md").read_text().split("---\n")[1])["base_model"] == str(files.checkpoint)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    for scored in [*by_run, *by_directory]:
        whole = torch.tensor([[*scored["prompt_tokens"], *scored["tokens"]]])
        with torch.no_grad():
            log_p = theirs(whole).logits[0, :-1].log_softmax(-1)
        expected = log_p.gather(1, whole[0, 1:, None])[:, 0][len(scored["prompt_tokens"]) - 1 :]
        np.testing.assert_allclose(scored["logprobs"], expected.numpy(), atol=2e-5)
        assert scored["total"] == pytest.approx(sum(scored["logprobs"]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert by_run[0]["prompt_tokens"] == tokenizer.apply_chat_template(
        [
            {
                "role": "user",
                "content": "Tom has 3 clips?\nReason step by step, and write the final answer after ####.",
            }
        ],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )


def test_an_imported_checkpoint_is_the_checkpoint(files):
    out = files.root / "imported"
    report = json.loads(call("import", files.checkpoint, out, "--json"))
    assert report["architecture"] == "Qwen3ForCausalLM"
    assert report["vocabulary"].startswith("416 rows, ")
    given = files.root / "ids.jsonl"
    given.write_text(json.dumps({"tokens": list(range(5, 30))}) + "\n")
    scores = [json.loads(call("score", each, "--file", given)) for each in (files.checkpoint, out)]
    assert scores[0] == scores[1]
    assert "error" in call("import", files.checkpoint, out, status=2)


@pytest.mark.slow
def test_sample_reads_a_model_directory_plain_and_as_a_chat(files):
    arguments = ["sample", files.checkpoint, "--prompt", "clips", "--max-tokens", "5", "-n", "2", "--json"]
    plain, chat = json.loads(call(*arguments)), json.loads(call(*arguments, "--chat"))
    assert len(plain) == len(chat) == 2
    assert all(1 <= len(made["tokens"]) <= 5 for made in plain)
    assert plain != chat
    (stopped,) = json.loads(call(*arguments[:4], "--max-tokens", "40", "--top-p", "0.9", "--stop", "a", "--json"))
    assert "a" not in load_tokenizer(files.checkpoint).decode(stopped["tokens"][:-1])


def test_the_config_of_the_run_says_what_was_run(run, files):
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["model"]["path"] == str(files.checkpoint)
    assert written["data"]["format"] == "gsm8k"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.path=/nowhere/at/all", "'/nowhere/at/all' does not exist"),
        ("model.width=64", "model.width is 64, but model.path is"),
        pytest.param("model.revision=main", "revision is 'main', but", marks=pytest.mark.slow),
        pytest.param("data.path=/nowhere.jsonl", "data file /nowhere.jsonl cannot be read", marks=pytest.mark.slow),
        ("data.path=null", "task, data.path and data.sources are missing"),
        ("task={name: addition, levels: [1]}", "task and data.path are both set"),
        ("rewards=[exact_answer]", "exact_answer uses token ids of the built-in tokenizer .*open_id"),
        pytest.param("data.fields={answer_from: boxed}", "has no answer", marks=pytest.mark.slow),
        pytest.param("data.fields={qwestion: x}", "there is no field 'qwestion' to map", marks=pytest.mark.slow),
        pytest.param(
            "data.fields={answer: question, answer_from: text}",
            "reward 'number_match': the reference answer of row 1 is",
            marks=pytest.mark.slow,
        ),
        ("data.prompts=plain", "data.template_options is .* no chat template; set"),
        ("rollout.max_prompt_tokens=8", "no item is left"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_computed(files, change, message):
    import re

    said = call(*train_arguments(files, files.root / "never", change), status=2)
    assert re.search(message, said), said
    assert not (files.root / "never").exists()


@pytest.mark.slow
def test_a_run_whose_checkpoint_has_changed_is_not_resumed(files, tmp_path):
    import shutil

    own = SimpleNamespace(root=tmp_path, checkpoint=tmp_path / "own", data=files.data)
    shutil.copytree(files.checkpoint, own.checkpoint)
    call(*train_arguments(own, tmp_path / "run", "training.steps=1", "warm_start={}"))
    config = json.loads((own.checkpoint / "config.json").read_text())
    (own.checkpoint / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    said = call("train", "--resume", tmp_path / "run", "training.steps=2", status=2)
    assert "model changed since" in said


@pytest.mark.slow
def test_data_of_the_users_own_trains_a_model_described_by_its_shape(tmp_path):
    lines = [{"prompt": f"{a}+{b}", "answer": str(a + b)} for a in range(9) for b in range(9)]
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "name": "own",
        "model": {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1},
        "data": {"path": str(file)},
        "rewards": ["number_match"],
        "credit": [{"advantages": "group_normalized"}],
        "losses": ["clipped_surrogate"],
        "rollout": {"samples_per_prompt": 4, "max_prompt_tokens": 6, "max_completion_tokens": 4},
        "training": {"steps": 1, "prompts_per_step": 4},
        "evaluation": {"problems": 4, "samples_per_problem": 2, "k": [1]},
        "run_dir": str(tmp_path / "run"),
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    call("train", tmp_path / "own.yaml")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["after"]["problems"] == 4
    out = json.loads(call("export", tmp_path / "run", tmp_path / "out", "--json"))
    assert out["tokenizer"].startswith("none")


@pytest.mark.slow
def test_eval_reads_a_model_directory_with_problems_of_a_file(files, tmp_path):
    arguments = ["eval", files.checkpoint, "--data", files.data, "--format", "gsm8k", "--k", "1,2"]
    arguments += ["--max-tokens", "5", "--problems", "3", "--json"]
    plain, chat = json.loads(call(*arguments)), json.loads(call(*arguments, "--chat", "--out", tmp_path / "out"))
    assert (plain["problems"], plain["samples_per_problem"]) == (3, 2)
    assert plain["checkpoint"] == str(files.checkpoint)
    assert plain["negative_logprob"] != chat["negative_logprob"]
    assert "name a file with --data FILE" in call("eval", files.checkpoint, status=2)
