"""Files of the built-in tokenizer in the formats of Hugging Face, for models that leave jaxrl_llm."""

from __future__ import annotations

import json
from pathlib import Path

from jaxrl_llm.data.extras import imported
from jaxrl_llm.data.tokenizer import CharacterTokenizer

# Begin of sequence and newlines as in the prompts that the policy was trained on.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
)


def save_character_tokenizer(directory: str | Path, tokenizer: CharacterTokenizer) -> list[Path]:
    """Write a tokenizer that `transformers` and `load_tokenizer` read, with the same ids for every text.

    Its chat template makes the prompt that the built-in tokenizer makes of a body: begin of sequence, body, newline;
    without the template only begin of sequence is added. A text with another character is refused, as here.

    Args:
      directory: of the model; it must exist.
      tokenizer: whose tokens are written.

    Returns:
      the files written: tokenizer.json, tokenizer_config.json, generation_config.json, chat_template.jinja.

    Raises:
      ValueError: if the package `tokenizers` is not installed.
    """
    tokenizers = imported("tokenizers")
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({text: number for number, text in enumerate(tokenizer.tokens)}, unk_token=None)
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    pad, bos, eos = (tokenizer.tokens[id] for id in (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id))
    special = (pad, bos, eos)
    backend.add_tokens(
        [
            tokenizers.AddedToken(text, special=text in special, normalized=False, single_word=False)
            for text in tokenizer.controls
        ]
    )
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_id)]
    )
    directory = Path(directory)
    backend.save(str(directory / "tokenizer.json"))
    named = {"pad_token": pad, "bos_token": bos, "eos_token": eos}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | named
    ids = {f"{name}_id": tokenizer.id(text) for name, text in named.items()}
    texts = {
        "tokenizer_config.json": json.dumps(settings, indent=2, sort_keys=True) + "\n",
        "generation_config.json": json.dumps(ids, indent=2, sort_keys=True) + "\n",
        "chat_template.jinja": CHAT_TEMPLATE,
    }
    for name, text in texts.items():
        (directory / name).write_text(text)
    return [directory / name for name in ("tokenizer.json", *texts)]
