"""The built-in tokenizer: one token per character, and a few control tokens; it needs no training and no download."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxrl_llm.bounds import counted
from jaxrl_llm.data.prompts import PLACE, formatted

CONTROLS = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<t>",  # think
    "</t>",
    "<a>",  # answer
    "</a>",
    "<c>",  # tool call
    "</c>",
    "<o>",  # observation
    "</o>",
    "<r>",  # revise
    "<n>",  # end of turn
)
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+-*/%=()<>,.;:?!&~#|_'\" \n"


@dataclass(frozen=True)
class CharacterTokenizer:
    r"""One token per character; a control token has a spelling, such as `<t>`, and is a single token.

    `<` and `>` are characters too: in a text the longest match wins, so `<a>` is always the control token.
    `decode(encode(text)) == text` for every text that can be encoded. The converse does not hold: ids that spell a
    control token in single characters decode to the same text as the control token. The library therefore never encodes
    a decoded completion again.

    >>> tokenizer = CharacterTokenizer()
    >>> tokenizer.decode(tokenizer.encode("<t>1<2</t>"))
    '<t>1<2</t>'
    >>> len(tokenizer.encode("<t>1<2</t>"))
    5

    Attributes:
      controls: control tokens in the order of their ids; the first three are padding, begin and end of sequence.
      characters: characters, numbered after the control tokens.
    """

    controls: tuple[str, ...] = CONTROLS
    characters: str = CHARACTERS

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """The text of every token, by id."""
        return self.controls + tuple(self.characters)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {text: number for number, text in enumerate(self.tokens)}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.controls, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) + "|.", re.DOTALL)

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @property
    def pad_id(self) -> int:
        """Padding. Masks are computed from lengths, never from this id."""
        return 0

    @property
    def bos_id(self) -> int:
        """Begin of sequence."""
        return 1

    @property
    def eos_id(self) -> int:
        """End of sequence."""
        return 2

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a completion: only end of sequence."""
        return (self.eos_id,)

    def prompt_ids(self, item: Mapping[str, Any]) -> list[int]:
        """Tokens of a record's prompt: begin of sequence, solved examples if it has any, body, newline.

        Raises:
          ValueError: for a conversation, which needs a chat template.
        """
        if "messages" in item:
            raise ValueError(f"a conversation of {counted(len(item['messages']), 'message')} needs a chat template")
        return [self.bos_id, *self.encode(formatted(PLACE, item["body"], item) + "\n")]

    def completion_ids(self, item: Mapping[str, Any], text: str) -> list[int]:
        """Tokens of a completion and end of sequence; the same for every record."""
        del item
        return [*self.encode(text), self.eos_id]

    def token_bytes(self) -> list[bytes | None]:
        """The bytes of each token, by id."""
        return [text.encode() for text in self.tokens]

    def id(self, token_text: str) -> int:
        """Id of one token given by its text.

        Raises:
          ValueError: if the text is not exactly one token.
        """
        if token_text not in self._ids:
            raise ValueError(
                f"{token_text!r} is not a token of the built-in tokenizer; a token is one character of "
                f"{self.characters!r} or one of {', '.join(self.controls)}"
            )
        return self._ids[token_text]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
          ValueError: for a character outside the alphabet; names the character and its position.
        """
        # Most texts have no control token, and iterating over characters is several times faster than the pattern.
        pieces = self._pattern.findall(text) if "<" in text else text
        ids = self._ids
        try:
            return [ids[piece] for piece in pieces]
        except KeyError as error:
            character = error.args[0]
            raise ValueError(
                f"character {character!r} at position {text.index(character)} of {text[:80]!r} is not in the alphabet "
                f"of the built-in tokenizer, {self.characters!r}; remove it or use another tokenizer"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, control tokens spelled out.

        Raises:
          ValueError: for an id outside of [0, vocabulary_size).
        """
        numbers = [int(number) for number in ids]
        for position, number in enumerate(numbers):
            if not 0 <= number < len(self.tokens):
                raise ValueError(
                    f"token id {number} at position {position} is outside of the built-in tokenizer's range "
                    f"0..{len(self.tokens) - 1}; decode only ids of this tokenizer"
                )
        return "".join([self.tokens[number] for number in numbers])
