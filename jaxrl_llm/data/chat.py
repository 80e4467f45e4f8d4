"""Chat templates: messages -> text, rendered in a sandbox, and whether a template keeps earlier turns unchanged.

A template is a program from the files of a model. It runs in jinja2's immutable sandbox, with the settings and
the helper functions that `transformers` gives it, in a process of bounded time and memory
(`jaxrl_llm.sandbox.template_rendering`).
"""

from __future__ import annotations

import atexit
import datetime
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxrl_llm.bounds import file_bytes, shown
from jaxrl_llm.data.extras import imported
from jaxrl_llm.data.json_files import json_object
from jaxrl_llm.sandbox import Workers
from jaxrl_llm.sandbox.template_rendering import MOST_BYTES, SECONDS

Message = Mapping[str, Any]

_WORKERS = Workers({"rendered": "jaxrl_llm.sandbox.template_rendering:rendered"}, memory_bytes=MOST_BYTES)
atexit.register(_WORKERS.close)
# Limit of wall time, in seconds; only a stalled machine needs so long.
_PATIENCE = 60.0
_MOST_BYTES = 2**20  # of a template

# A prompt with the current date would change when a run is resumed on another day.
FIXED_DATE = datetime.date(2024, 7, 26)

_QUESTION: Message = {"role": "user", "content": "What is 2+3?"}
_PROBES: tuple[Sequence[Message], ...] = tuple(
    (_QUESTION, {"role": "assistant", "content": said}, {"role": "user", "content": "And 4+5?"})
    for said in ("It is 5.", "<think>\nTwo and three make five.\n</think>\n\nIt is 5.")
)


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A template with fixed options; only the messages vary.

    Attributes:
      source: text of the template.
      special_tokens: special tokens by name, such as bos_token, that the template may use.
      options: further variables of the template, such as enable_thinking.
      date: what `strftime_now` formats in the template; fixed, so that a run has the same prompts on every day.
    """

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    date: datetime.date = FIXED_DATE

    def __post_init__(self) -> None:
        taken = sorted({"messages", "add_generation_prompt", "strftime_now"} & self.options.keys())
        if taken:
            raise ValueError(f"chat template option {taken[0]!r} is set by the renderer itself; remove it")

    def rendered(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as text.

        Args:
          messages: mappings with `role` and `content`; keys whose value is None are omitted.
          add_generation_prompt: end with the header of the assistant's turn.

        Raises:
          ValueError: if the template is not valid, refuses the messages, attempts a forbidden operation, or exceeds the
            limit of time or memory.
        """
        variables = {"tools": None, "documents": None} | dict(self.special_tokens) | dict(self.options)
        said = [{key: value for key, value in message.items() if value is not None} for message in messages]
        given = variables | {"messages": said, "add_generation_prompt": add_generation_prompt}
        if importlib.util.find_spec("jinja2") is None:
            imported("jinja2")
        (told,) = _WORKERS("rendered", [(self.source, given, self.date)], _PATIENCE)
        answer = told.value or {}
        if "text" in answer:
            return answer["text"]
        if "line" in answer:
            raise ValueError(
                f"the chat template is not valid jinja2: {answer['error']} in line {answer['line']}; "
                "repair the template, or copy the model's files again"
            )
        much = f"it takes more than {SECONDS:g} seconds of computing, or {MOST_BYTES:,} bytes of memory"
        roles = shown([message.get("role") for message in said])
        raise ValueError(
            f"the chat template failed on a conversation with the roles {roles}: "
            f"{answer.get('error') or (much if told.ended else told.error)}; change the conversation "
            "(some templates do not accept a system role, or require that user and assistant alternate), or use "
            "another template"
        )


def template_source(directory: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The template of a model directory: chat_template.jinja, else the entry of tokenizer_config.json, else that of
    chat_template.json (which vision-language models have), else None.

    Raises:
      ValueError: if the entry is a list of named templates without a default one, or is not text.
    """
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return file_bytes(file, _MOST_BYTES).decode("utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read as text: {error}; copy the model's files again") from None
    entry = tokenizer_config.get("chat_template") or json_object(directory / "chat_template.json").get("chat_template")
    if isinstance(entry, list) and all(
        isinstance(each, dict) and all(isinstance(each.get(key), str) for key in ("name", "template")) for each in entry
    ):
        named = {each["name"]: each["template"] for each in entry}
        if "default" not in named:
            raise ValueError(
                f"tokenizer_config.json in {directory} has the chat templates {shown(sorted(named))}, but none is "
                "named 'default'; save the one to use as chat_template.jinja in this directory"
            )
        entry = named["default"]
    if entry is not None and not isinstance(entry, str):
        raise ValueError(
            f"chat_template of tokenizer_config.json in {directory} is a {type(entry).__name__}; it must be text, or a "
            "list of entries with name and template"
        )
    return entry


def rewritten_turn(template: ChatTemplate, messages: Sequence[Message]) -> int | None:
    """The first assistant turn whose text in the whole conversation differs from its text when it was sampled; None if
    none.

    A turn is sampled after the generation prompt of the messages before it. If that text is not a prefix of the whole
    conversation, the policy is conditioned on text that it did not generate. White space around a turn does not count.

    Returns:
      Index into the messages.
    """
    said = [turn for turn, message in enumerate(messages) if message.get("role") == "assistant"]
    whole = template.rendered(messages, add_generation_prompt=True) if said else ""
    for turn in said:
        before = template.rendered(messages[:turn], add_generation_prompt=True)
        text = str(messages[turn].get("content") or "").strip()
        if not whole.startswith(before) or not whole[len(before) :].lstrip().startswith(text):
            return turn
    return None


def rewrites_history(template: ChatTemplate) -> bool:
    """Whether the template changes earlier assistant turns, for example by dropping their reasoning.

    The test renders two conversations of two turns, one with a reasoning part in its first answer.
    """
    return any(rewritten_turn(template, probe) is not None for probe in _PROBES)


def require_kept_history(template: ChatTemplate) -> None:
    """Check that a template can be used for several turns.

    Raises:
      ValueError: if it changes earlier turns.
    """
    if rewrites_history(template):
        raise ValueError(
            "the chat template rewrites history: it renders an earlier assistant turn differently from how it was "
            "sampled (for example without its reasoning), so the tokens of one turn are not a prefix of the next, and "
            "training over several turns would use tokens that the policy did not sample; use a template that does not "
            "change earlier turns, or train on single turns"
        )
