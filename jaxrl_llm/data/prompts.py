"""From a record to the tokens of its prompt and of a completion: by a chat template, or by a plain format.

A policy is trained on completions after exactly the prompt that it is sampled from. A completion is the text that the
template adds to this prompt. If the template renders the prompt or the answer differently when the answer is given, the
completion is the text of the answer with the end of the turn, as the policy would have sampled it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from jaxrl_llm.bounds import counted
from jaxrl_llm.data.chat import ChatTemplate, Message, rewritten_turn

Record = Mapping[str, Any]
PLACE = "{body}"
# An answer that templates do not change.
_PROBE = "so it is"


class Encoder(Protocol):
    """The interface of a tokenizer for prompt formats."""

    @property
    def prefix_ids(self) -> tuple[int, ...]: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class PromptFormat(Protocol):
    """How records become tokens; `PlainPrompts` and `ChatPrompts` are two."""

    def prompt_ids(self, encoder: Encoder, item: Record) -> list[int]: ...
    def completion_ids(self, encoder: Encoder, item: Record, text: str) -> list[int]: ...


@dataclass(frozen=True)
class PlainPrompts:
    """The prefix ids of the tokenizer, then a format with the record's body in it.

    Attributes:
      format: text with `{body}` where the record's body goes; other braces are plain text.
    """

    format: str = PLACE

    def __post_init__(self) -> None:
        require_place("prompt format", self.format)

    def prompt_ids(self, encoder: Encoder, item: Record) -> list[int]:
        """Tokens of the prompt."""
        if "messages" in item:
            raise ValueError(
                f"the record is a conversation of {counted(len(item['messages']), 'message')}, which a plain prompt "
                "format does not support; use the chat template, or map a single prompt field"
            )
        return [*encoder.prefix_ids, *encoder.encode(formatted(self.format, item["body"], item))]

    def completion_ids(self, encoder: Encoder, item: Record, text: str) -> list[int]:
        """Tokens of a completion with its end of sequence, encoded separately from the prompt, as it is sampled."""
        del item
        return [*encoder.encode(text), encoder.eos_ids[0]]


@dataclass(frozen=True, eq=False)
class ChatPrompts:
    """A conversation rendered by a chat template, ending with the header of the assistant's turn.

    Attributes:
      template: the template with its variables.
      system_prompt: first message of conversations without a system message; None for none.
      format: text of the last user message, with `{body}` where its content goes.
      rewritten_history: "error" refuses a conversation whose earlier assistant turns the template changes; "allow"
        uses it as the template renders it, which is correct if only the last turn is trained on.
    """

    template: ChatTemplate
    system_prompt: str | None = None
    format: str = PLACE
    rewritten_history: Literal["error", "allow"] = "error"

    def __post_init__(self) -> None:
        require_place("prompt format", self.format)
        if self.rewritten_history not in ("error", "allow"):
            raise ValueError(f"rewritten_history is {self.rewritten_history!r}; it must be 'error' or 'allow'")

    def messages(self, item: Record) -> list[Message]:
        """The conversation of a record before the assistant's turn."""
        given: list[Message] = list(item.get("messages") or [{"role": "user", "content": item["body"]}])
        if given[-1]["role"] == "user":
            given[-1] = {**given[-1], "content": formatted(self.format, given[-1]["content"], item)}
        if self.system_prompt is not None and given[0]["role"] != "system":
            given.insert(0, {"role": "system", "content": self.system_prompt})
        return given

    def prompt_ids(self, encoder: Encoder, item: Record) -> list[int]:
        """Tokens of the prompt.

        Raises:
          ValueError: if the template refuses the conversation, or changes its earlier turns.
        """
        messages = self.messages(item)
        if self.rewritten_history == "error":
            turn = rewritten_turn(self.template, messages)
            if turn is not None:
                raise ValueError(
                    f"the chat template renders message {turn} of the conversation, "
                    f"{str(messages[turn].get('content'))[:80]!r}, with changes (for example without its reasoning); "
                    "use a template that keeps earlier turns, remove the item, or set rewritten_history to 'allow' to "
                    "use the conversation as the template renders it"
                )
        return encoder.encode(self.template.rendered(messages, add_generation_prompt=True))

    def completion_ids(self, encoder: Encoder, item: Record, text: str) -> list[int]:
        """Tokens of a completion with the end of the assistant's turn.

        Raises:
          ValueError: if the turn does not end with an end of sequence, or the text contains one.
        """
        return _ended(completion_tokens(self.template, encoder, self.messages(item), text), encoder, text)


def completion_tokens(template: ChatTemplate, encoder: Encoder, messages: Sequence[Message], text: str) -> list[int]:
    """The tokens after the prompt for the answer `text` of the assistant.

    They are the tokens that the template adds to the prompt, if the result starts with the tokens of the prompt and
    contains the whole text, up to white space. Otherwise (some templates add a thought to the header, or drop the
    thought of a given answer) they are the text and the end of the turn, encoded separately.
    """
    prompt_text = template.rendered(messages, add_generation_prompt=True)
    whole_text = _answered(template, messages, text)
    prompt, whole = encoder.encode(prompt_text), encoder.encode(whole_text)
    squeezed = lambda part: "".join(part.split())  # noqa: E731
    if whole[: len(prompt)] == prompt and squeezed(text) in squeezed(whole_text.removeprefix(prompt_text)):
        return whole[len(prompt) :]
    end = _answered(template, messages, _PROBE).rpartition(_PROBE)
    return [*encoder.encode(text), *(encoder.encode(end[2]) if end[1] else [])]


def _answered(template: ChatTemplate, messages: Sequence[Message], text: str) -> str:
    return template.rendered([*messages, {"role": "assistant", "content": text}])


def require_turn(prompts: ChatPrompts, encoder: Encoder) -> None:
    """Check a template's prompt and turn on a short conversation before anything is encoded.

    Raises:
      ValueError: if the template ignores `add_generation_prompt`, or the assistant's turn does not end with an end of
        sequence.
    """
    item = {"body": "What is 2+3?"}
    messages, text = prompts.messages(item), "5"
    prompts.completion_ids(encoder, item, text)
    asked = prompts.template.rendered(messages, add_generation_prompt=True)
    added = _answered(prompts.template, messages, text).partition(asked)[2]
    if asked == prompts.template.rendered(messages) and added and not added.lstrip().startswith(text):
        header = added.partition(text)[0]
        raise ValueError(
            f"the chat template ignores add_generation_prompt: it writes the header {header!r} of the assistant's turn "
            "only when the answer is given, so the policy would have to sample this header; add "
            f"{{% if add_generation_prompt %}} with {header!r} to the template"
        )


def formatted(format: str, body: str, item: Record) -> str:
    """A body in its template and format, after the solved examples of the record, if it has any."""
    return item.get("prefix", "") + format.replace(PLACE, item.get("wording", PLACE).replace(PLACE, body))


def require_place(name: str, text: str) -> None:
    """Raises ValueError if a format has no place for the body."""
    if PLACE not in text:
        found = re.findall(r"\{\w+\}", text)
        instead = f", for example {text.replace(found[0], PLACE)!r}" if found else f", for example {text + PLACE!r}"
        raise ValueError(f"{name} {text!r} has no place for the prompt; write {PLACE} where the body goes{instead}")


def _ended(completion: list[int], encoder: Encoder, text: str) -> list[int]:
    """The completion up to its first end of sequence, inclusive: text after it is never sampled."""
    for place, token in enumerate(completion):
        if token in encoder.eos_ids:
            after = encoder.decode(completion[place + 1 :])
            if after.strip():
                raise ValueError(
                    f"the completion {text[:80]!r} has an end of sequence before its end: {after[:40]!r} would never "
                    "be sampled; remove the special token from the text"
                )
            return completion[: place + 1]
    decoded, said = encoder.decode(completion), text.strip()
    tail = decoded.rpartition(said)[2] if said else decoded
    if tail.strip():
        raise ValueError(
            f"the chat template ends the assistant's turn with {tail!r}, but none of its tokens ends a sequence (ids "
            f"{list(encoder.eos_ids)}), so sampling would never stop there; add the id to eos_token_id in "
            "generation_config.json"
        )
    return [*completion, encoder.eos_ids[0]]
