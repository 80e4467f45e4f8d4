"""Small model directories: tokenizers of two kinds, trained on a few sentences, with the files of a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

CORPUS = [
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
    "How many clips did Natalia sell altogether in April and May? The answer is 72.",
    "user assistant system model What is 2+3? It is 5. And 4+5? Two and three make five.",
]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
MISTRAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]


def byte_level(special, prefix=None):
    """A tokenizer as Qwen and Llama 3 have it: bytes, merged; optionally with begin of sequence in front."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _prefixed(tokenizer, prefix)


def metaspace(special, prefix=None):
    """A tokenizer as Gemma and Mistral have it: words that begin with a mark, unknown characters as bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=tokens, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _prefixed(tokenizer, prefix)


def _prefixed(tokenizer, prefix):
    if prefix:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{prefix} $A", special_tokens=[(prefix, tokenizer.token_to_id(prefix))]
        )
    return tokenizer


def save(directory, tokenizer, config=None, generation=None, template=None):
    """Write a model directory; `config` is tokenizer_config.json."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | (config or {})
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory


class Directories:
    """What tests make model directories with; one for each test."""

    byte_level = staticmethod(byte_level)
    metaspace = staticmethod(metaspace)
    save = staticmethod(save)

    def __init__(self, root: Path):
        self.root = root

    def qwen(self, template=None, **config):
        tokenizer = byte_level(CHATML)
        tokenizer.add_tokens(["<think>", "</think>"])
        config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None} | config
        generation = {"bos_token_id": 0, "eos_token_id": [2, 0], "pad_token_id": 0}
        return save(self.root / "qwen", tokenizer, config, generation, template)

    def llama(self, template=None, **config):
        tokenizer = byte_level(LLAMA, prefix="<|begin_of_text|>")
        config = {"eos_token": "<|eot_id|>", "bos_token": "<|begin_of_text|>"} | config
        return save(self.root / "llama", tokenizer, config, {"eos_token_id": [1, 4]}, template)

    def gemma(self, template=None, **config):
        tokenizer = metaspace(GEMMA, prefix="<bos>")
        config = {"eos_token": "<eos>", "bos_token": "<bos>", "pad_token": "<pad>", "unk_token": "<unk>"} | config
        return save(self.root / "gemma", tokenizer, config, {"eos_token_id": [1, 5], "pad_token_id": 0}, template)

    def mistral(self, template=None, **config):
        tokenizer = metaspace(MISTRAL, prefix="<s>")
        config = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"} | config
        return save(self.root / "mistral", tokenizer, config, None, template)


@pytest.fixture
def directories(tmp_path):
    """Makes model directories under the test's own directory."""
    return Directories(tmp_path)


@pytest.fixture(scope="session")
def reference():
    """Reads a model directory with transformers, whose tokens and texts are the reference."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained
