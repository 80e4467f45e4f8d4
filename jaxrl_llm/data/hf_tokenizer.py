"""Tokenizers of Hugging Face model directories: `tokenizer.json` and the settings in the same directory.

Masks come from lengths and not from token ids, so padding may have the same id as end of sequence.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from jaxrl_llm.bounds import counted, shortened, shown
from jaxrl_llm.data.chat import FIXED_DATE, ChatTemplate, require_kept_history, template_source
from jaxrl_llm.data.extras import imported
from jaxrl_llm.data.json_files import json_object
from jaxrl_llm.data.prompts import PLACE, ChatPrompts, PlainPrompts, PromptFormat, require_turn
from jaxrl_llm.data.token_bytes import token_bytes

_MOST_TOKENS = 2**24
_ID = re.compile(r"[0-9]{1,9}")
_OF_TOKENS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, eq=False)
class HuggingFaceTokenizer:
    """Text <-> tokens of a pretrained model, and how a record becomes a prompt; `load_tokenizer` makes one.

    Attributes:
      path: directory that it was read from.
      backend: the `tokenizers.Tokenizer`.
      eos_ids: every id that ends a completion; the first one ends reference completions.
      pad_id: padding; may be one of `eos_ids`.
      prefix_ids: ids that the tokenizer adds before a text, such as begin of sequence; often empty.
      special_tokens: text by name, such as bos_token, for chat templates.
      chat_template: text of the chat template; None if the model has none.
      prompts: how records become prompts, see `with_chat` and `with_prompt_format`.
    """

    path: str
    backend: Any
    eos_ids: tuple[int, ...]
    pad_id: int
    prefix_ids: tuple[int, ...] = ()
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    prompts: PromptFormat = field(default_factory=PlainPrompts)

    @property
    def eos_id(self) -> int:
        """The id that ends reference completions."""
        return self.eos_ids[0]

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that determines the ids of a text, for checkpoints."""
        parts = [self.backend.to_str(), list(self.eos_ids), self.pad_id, self.chat_template, dict(self.special_tokens)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Special tokens in it are recognised; none are added.

        Raises:
          ValueError: for a text that the tokenizer has no tokens for.
        """
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # its only type of error
            raise ValueError(f"the tokenizer in {self.path} cannot encode {shortened(text)!r}: {error}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, without end of sequence and padding; other special tokens are spelled out.

        Ids beyond the vocabulary have no text; a policy can sample them if its embedding is padded to more rows.
        """
        silent = {*self.eos_ids, self.pad_id}
        return self.backend.decode([int(id) for id in ids if int(id) not in silent], skip_special_tokens=False)

    def token_bytes(self) -> list[bytes | None]:
        """The bytes of each token, by id; None for ends of sequence, padding and ids without a token."""
        return token_bytes(self.backend, self.vocabulary_size, silent={*self.eos_ids, self.pad_id})

    def prompt_ids(self, item: Mapping[str, Any]) -> list[int]:
        """Tokens of a record's prompt."""
        return self.prompts.prompt_ids(self, item)

    def completion_ids(self, item: Mapping[str, Any], text: str) -> list[int]:
        """Tokens of a completion to a record's prompt, end of sequence included."""
        return self.prompts.completion_ids(self, item, text)


def load_tokenizer(path: str | Path) -> HuggingFaceTokenizer:
    """The tokenizer of a local model directory, with plain prompts (the unchanged body).

    It reads tokenizer.json; tokenizer_config.json and special_tokens_map.json for names of special tokens (the former
    has precedence); generation_config.json and config.json for further ids that end a sequence (likewise); and
    chat_template.jinja.

    Raises:
      ValueError: for a missing or damaged directory or file, settings with unknown tokens, or no end of sequence.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; give the directory with the model's tokenizer.json")
    config = json_object(directory / "tokenizer_config.json")
    backend = _backend(directory)
    _add_tokens(backend, config, directory)
    special = _special_tokens(json_object(directory / "special_tokens_map.json")) | _special_tokens(config)
    _recognise(backend, special, directory)
    generation = {} | json_object(directory / "config.json") | json_object(directory / "generation_config.json")
    eos_ids = _eos_ids(backend, special, generation, directory)
    largest = max(backend.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= _MOST_TOKENS:
        raise ValueError(f"the tokenizer in {directory} has the id {largest:,}, beyond {_MOST_TOKENS:,}; copy it again")
    return HuggingFaceTokenizer(
        path=str(directory),
        backend=backend,
        eos_ids=eos_ids,
        pad_id=_pad_id(backend, special, generation, eos_ids),
        prefix_ids=_prefix_ids(backend),
        special_tokens=special,
        chat_template=template_source(directory, config),
    )


def with_prompt_format(tokenizer: HuggingFaceTokenizer, format: str = PLACE) -> HuggingFaceTokenizer:
    """The tokenizer with plain prompts: `format` with the record's body in place of `{body}`, no chat template.

    Raises:
      ValueError: if the format has no place for the body.
    """
    return replace(tokenizer, prompts=PlainPrompts(format))


def with_chat(
    tokenizer: HuggingFaceTokenizer,
    *,
    system_prompt: str | None = None,
    format: str = PLACE,
    options: Mapping[str, Any] | None = None,
    rewritten_history: Literal["error", "allow"] = "error",
    several_turns: bool = False,
    date: datetime.date = FIXED_DATE,
) -> HuggingFaceTokenizer:
    """The tokenizer with prompts rendered by the model's chat template, checked before anything is encoded.

    Args:
      tokenizer: from `load_tokenizer`.
      system_prompt: first message of conversations without a system message; None for none.
      format: text of the last user message, with `{body}` where its content goes.
      options: variables of the template, such as {"enable_thinking": False}.
      rewritten_history: see `ChatPrompts`.
      several_turns: the policy generates several turns of a conversation; refuses a template that rewrites history.
      date: current date in the template.

    Raises:
      ValueError: if there is no template, or it fails a check; see `require_turn` and `require_kept_history`.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the model in {tokenizer.path} has no chat template (no chat_template.jinja, and no chat_template in "
            "tokenizer_config.json), as is usual for base models; set data.prompts to plain, or write the template"
        )
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens, options or {}, date)
    prompts = ChatPrompts(template, system_prompt, format, rewritten_history)
    require_turn(prompts, tokenizer)
    if several_turns:
        require_kept_history(template)
    return replace(tokenizer, prompts=prompts)


def require_embedding(tokenizer: HuggingFaceTokenizer, rows: int) -> None:
    """Check that the embedding of a model has a row for each id of a tokenizer; it may have more.

    Raises:
      ValueError: for tokens without a row; names some of them.
    """
    if tokenizer.vocabulary_size > rows:
        vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
        beyond = sorted((id, text) for text, id in vocabulary.items() if id >= rows)
        shown = ", ".join(f"{text!r} ({id})" for id, text in beyond[:3])
        raise ValueError(
            f"the tokenizer in {tokenizer.path} has ids up to {tokenizer.vocabulary_size - 1}, but the model's "
            f"embedding has {rows} rows, too few for {counted(len(beyond), 'token')}: {shown}; use the tokenizer that "
            "belongs to the model, or enlarge the embedding"
        )


def _backend(directory: Path) -> Any:
    file = directory / "tokenizer.json"
    if not file.is_file():
        others = [name for name in ("tokenizer.model", "spiece.model", "vocab.json") if (directory / name).is_file()]
        found = f"only {others[0]}, which is of the older kind" if others else "no tokenizer at all"
        raise ValueError(
            f"{directory} has no tokenizer.json ({found}); write one where transformers is installed, with "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR), or copy the model's files again"
        )
    tokenizers = imported("tokenizers")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except BaseException as error:  # the library raises Exception, and BaseException if its Rust code panics
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ValueError(
            f"{file} is not a file of the `tokenizers` library: {shortened(str(error), 300)}; it may be truncated, or "
            "of a newer version: copy it again, or upgrade tokenizers"
        ) from error
    # Some files enable truncation or padding. Here texts are never truncated, and the pipeline pads.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _add_tokens(backend: Any, config: Mapping[str, Any], directory: Path) -> None:
    """Add tokens that only tokenizer_config.json has, and check that both files agree."""
    written = config.get("added_tokens_decoder") or {}
    if not isinstance(written, dict):
        raise ValueError(
            f"added_tokens_decoder of tokenizer_config.json in {directory} is a {type(written).__name__}, not an "
            "object of tokens by id; copy the file again"
        )
    for id, entry in written.items():
        if not (_ID.fullmatch(id) and _is_token(entry)):
            raise ValueError(
                f"tokenizer_config.json in {directory} has the added token {shown(id)}: {shown(entry)}; it must be an "
                'id and an object with the text "content" and flags; copy the file again'
            )
    entries = {int(id): entry for id, entry in written.items()}
    added_token = imported("tokenizers").AddedToken
    for _, entry in sorted(entries.items()):
        if backend.token_to_id(entry["content"]) is None:
            backend.add_tokens([added_token(**{key: entry[key] for key in _OF_TOKENS if key in entry})])
    for id, entry in sorted(entries.items()):
        found = backend.token_to_id(entry["content"])
        if found != id:
            raise ValueError(
                f"tokenizer_config.json in {directory} gives the added token {shown(entry['content'])} the id {id}, "
                f"but with tokenizer.json it has the id {found}; the files belong to different tokenizers: copy both "
                "again"
            )


def _is_token(entry: Any) -> bool:
    flags = (
        {key: value for key, value in entry.items() if key in _OF_TOKENS[1:]} if isinstance(entry, dict) else {"": 0}
    )
    return all(isinstance(flag, bool) for flag in flags.values()) and isinstance(entry.get("content"), str)


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Text of every `..._token` entry; an entry is a text, or an object with `content`."""
    texts = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in settings.items()
        if name.endswith("_token")
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _recognise(backend: Any, special: Mapping[str, str], directory: Path) -> None:
    """Make the tokenizer recognise the named special tokens inside texts, where templates write them."""
    for name in ("bos_token", "eos_token", "pad_token"):
        if name in special and backend.token_to_id(special[name]) is None:
            raise ValueError(
                f"{name} is {shown(special[name])} in {directory}, but tokenizer.json has no such token; the files "
                "belong to different tokenizers: copy them again, or set it to an existing token"
            )
    backend.add_special_tokens([text for text in special.values() if backend.token_to_id(text) is not None])


def _eos_ids(
    backend: Any, special: Mapping[str, str], generation: Mapping[str, Any], directory: Path
) -> tuple[int, ...]:
    named = generation.get("eos_token_id")
    listed = named if isinstance(named, list) else [] if named is None else [named]
    for id in listed:
        if (
            isinstance(id, bool)
            or not isinstance(id, int)
            or not 0 <= id < _MOST_TOKENS
            or backend.id_to_token(id) is None
        ):
            raise ValueError(
                f"eos_token_id is {shown(named)} in the generation_config.json or config.json of {directory}, but "
                f"no token has the id {shown(id)}; use ids of tokenizer.json"
            )
    first = [backend.token_to_id(special["eos_token"])] if "eos_token" in special else []
    ids = tuple(dict.fromkeys([*first, *listed]))
    if not ids:
        raise ValueError(
            f"no file in {directory} defines an end of sequence; add eos_token to tokenizer_config.json, or "
            "eos_token_id to generation_config.json"
        )
    return ids


def _pad_id(backend: Any, special: Mapping[str, str], generation: Mapping[str, Any], eos_ids: tuple[int, ...]) -> int:
    if "pad_token" in special:
        return backend.token_to_id(special["pad_token"])
    named = generation.get("pad_token_id")
    # Some models write -1 or null for no padding token.
    if isinstance(named, int) and 0 <= named < _MOST_TOKENS and backend.id_to_token(named) is not None:
        return named
    return eos_ids[0]


def _prefix_ids(backend: Any) -> tuple[int, ...]:
    """The ids that the tokenizer's post-processor adds before a text."""
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    starts = (start for start in range(len(whole) - len(plain) + 1) if whole[start : start + len(plain)] == plain)
    return tuple(whole[: next(starts, 0)])
