"""`jaxrl sample`: completions of prompts from the command line, from a file, or from the terminal."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl_llm.bounds import file_bytes
from jaxrl_llm.commands.arguments import require_positive
from jaxrl_llm.compilation_cache import enable_compilation_cache
from jaxrl_llm.data import HuggingFaceTokenizer
from jaxrl_llm.data.buckets import bucket_of, buckets
from jaxrl_llm.data.encoding import Row, padded_prompts
from jaxrl_llm.data.json_files import json_objects
from jaxrl_llm.data.prompts import ChatPrompts
from jaxrl_llm.experience import without_end
from jaxrl_llm.ranges import NonNegative, require_range
from jaxrl_llm.rollout import Controls, Drawn, make_stream, stop_automaton
from jaxrl_llm.run.restored import Policy, restored_policy

_KINDS = ("prompt", "messages", "token_ids")
# For a model without a known context length.
_LONGEST_PROMPT = 2**20
# Tokens decoded between two checks of which completions have ended.
_PIECE = 16


class Request(NamedTuple):
    """A prompt to complete.

    Attributes:
      given: the text, messages or token ids of the input.
      shown: the same as text for display.
      ids: token ids of the prompt.
    """

    given: Any
    shown: str
    ids: list[int]


class Limits(NamedTuple):
    """Largest numbers of tokens.

    Attributes:
      prompt: of a prompt.
      completion: of a completion.
      reason: origin of the first limit, for messages.
    """

    prompt: int
    completion: int
    reason: str


def sample(options: argparse.Namespace) -> None:
    """Read prompts, sample and print; `jaxrl sample --help` lists the options.

    Raises:
      ValueError: for contradictory options, and prompts that cannot be read or are too long.
    """
    require_positive(options, "samples", "max_tokens", "batch")
    require_range(NonNegative, options.temperature, "--temperature")
    enable_compilation_cache()
    if options.chat and options.token_ids:
        raise ValueError("--chat and --token-ids are both given, but token ids are a prompt already; drop one of them")
    if options.json and options.jsonl:
        raise ValueError("--json and --jsonl are both given; drop one of them")
    lines: list[tuple[str, Mapping[str, Any]]] = [
        (f"--prompt {text[:80]!r}", {"prompt": text}) for text in options.prompt
    ]
    lines += [(f"--token-ids {text[:80]!r}", {"token_ids": _numbers(text)}) for text in options.token_ids]
    lines += _file_lines(Path(options.prompts)) if options.prompts else []
    as_json = options.json or options.jsonl
    talks = not lines and not as_json and sys.stdin.isatty()
    if not lines and not talks:
        lines = _text_lines("standard input", sys.stdin.read())
    policy = restored_policy(options.path, chat=options.chat)
    limits = _limits(policy, options.max_tokens)
    requests = [_request(policy, limits, where, line, chat=options.chat) for where, line in lines]
    longest = max((len(request.ids) for request in requests), default=limits.prompt)
    policy = policy.for_context(longest + limits.completion)
    drawn = make_drawn(policy, limits, options)
    if talks:
        _converse(policy, limits, drawn, options.samples)
        return
    piece = limits.completion if as_json else 1 if len(requests) * options.samples == 1 else _PIECE
    results: list[dict[str, Any]] = []
    for part, pieces in _batches(requests, drawn, min(options.batch, len(requests)), piece):
        if not as_json:
            show(pieces, [f"{request.shown} -> " for request in part for _ in range(options.samples)], policy)
            continue
        entries = _entries(policy, part, options.samples, pieces)
        if options.jsonl:
            print("".join(json.dumps(entry) + "\n" for entry in entries), end="", flush=True)
        else:
            results += entries
    if options.json:
        print(json.dumps(results, indent=2))


def make_drawn(
    policy: Policy, limits: Limits, options: argparse.Namespace
) -> Callable[[Sequence[Request], Sequence[int], int], Iterator[Drawn]]:
    """(requests, their numbers, tokens per piece) -> completions so far, after each piece.

    The number of a request is used as its prompt id, from which the random keys are derived. Prompts are padded to the
    smallest of `buckets` that holds them, so each width is one program.
    """
    model, tokenizer = policy.model, policy.tokenizer
    stop = None
    if options.stop:  # the embedding may have more rows than the tokenizer has tokens
        unused = [None] * (model.vocabulary_size - tokenizer.vocabulary_size)
        stop = stop_automaton(options.stop, [*tokenizer.token_bytes(), *unused])
    stream = make_stream(
        model,
        samples_per_prompt=options.samples,
        max_completion_tokens=limits.completion,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
        temperature=0.0 if options.greedy else options.temperature,
        controls=Controls(
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            min_completion_tokens=options.min_tokens,
            stop=stop,
        ),
    )
    params = policy.params if model.for_decoding is None else jax.jit(model.for_decoding)(policy.params)
    key, widths = jax.random.key(options.seed), buckets(limits.prompt)

    def drawn(requests: Sequence[Request], numbers: Sequence[int], piece: int) -> Iterator[Drawn]:
        rows = [Row({"item_id": number}, r.ids, []) for r, number in zip(requests, numbers, strict=True)]
        width = bucket_of(max(len(r.ids) for r in requests), widths)
        return stream(params, padded_prompts(rows, tokenizer.pad_id, (width, 1)), key, piece=piece)

    return drawn


def _batches(
    requests: Sequence[Request], drawn: Callable, size: int, piece: int
) -> Iterator[tuple[Sequence[Request], Iterator[Drawn]]]:
    """Requests of each batch, in order, and their completions; the last batch is padded to avoid a compilation."""
    for first in range(0, len(requests), size):
        part = requests[first : first + size]
        more = size - len(part)
        numbers = [*range(first, first + len(part)), *[first] * more]
        yield part, drawn([*part, *[part[0]] * more], numbers, piece)


def show(
    pieces: Iterable[Drawn], starts: Sequence[str], policy: Policy, write: Callable[[str], Any] | None = None
) -> None:
    """Print completions in order, each after its start: a single one while it grows, several when each is complete.

    A character whose bytes are spread over several tokens is printed when its last byte is known.
    """
    write = write or (lambda text: print(text, end="", flush=True))
    row, said = 0, ""
    for drawn in pieces:
        while row < len(starts) and (drawn.over[row] or len(starts) == 1):
            over = drawn.over[row]
            text = _text(policy, drawn.tokens[row][: drawn.length[row]])
            text = starts[row] + (text if over else text.rstrip("\ufffd"))
            if text.startswith(said):
                write(text[len(said) :])
                said = text
            elif over:  # later tokens have changed the text of earlier ones
                write("\n" + text)
            if not over:
                break
            write(" (cut at the length limit)\n" if drawn.truncated[row] else "\n")
            row, said = row + 1, ""


def _text(policy: Policy, tokens: Sequence[int]) -> str:
    """The text of a completion, without end of sequence."""
    return policy.tokenizer.decode(without_end(tokens, policy.tokenizer.eos_ids))


def _entries(
    policy: Policy, requests: Sequence[Request], samples: int, pieces: Iterable[Drawn]
) -> list[dict[str, Any]]:
    """The JSON entry of each completion."""
    *_, drawn = pieces
    entries = []
    for row, length in enumerate(drawn.length[: len(requests) * samples]):
        tokens = drawn.tokens[row][:length].tolist()
        entries.append(
            {
                "prompt": requests[row // samples].given,
                "completion": _text(policy, tokens),
                "tokens": tokens,
                "logprobs": np.round(drawn.logprobs[row][:length].astype(float), 6).tolist(),
                "truncated": bool(drawn.truncated[row]),
            }
        )
    return entries


def _converse(policy: Policy, limits: Limits, drawn: Callable, samples: int) -> None:
    """Read prompts line by line from the terminal; each gets a new number, so a repeated prompt is sampled anew."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and history, for `input`
    print(f"{policy.source}: a line is a prompt; Ctrl-C ends a completion, Ctrl-D ends", file=sys.stderr)
    number = 0
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line.strip():
            continue
        try:
            request = _request(policy, limits, "this prompt", {"prompt": line}, chat=False)
            pieces = drawn([request], [number], 1 if samples == 1 else _PIECE)
            number += 1
            show(pieces, [""] * samples, policy)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print()


def _limits(policy: Policy, max_tokens: int | None) -> Limits:
    completion = max_tokens or policy.max_completion_tokens
    found = []
    if policy.max_prompt_tokens is not None:
        found.append(Limits(policy.max_prompt_tokens, completion, "the run's rollout.max_prompt_tokens"))
    if policy.context_tokens is not None:
        context = f"the model's context of {policy.context_tokens} tokens"
        if policy.context_tokens <= completion:
            raise ValueError(
                f"completions may have {completion} tokens, which leaves no room for a prompt in {context}; set "
                "--max-tokens lower"
            )
        reason = f"the room that completions of up to {completion} tokens leave in {context}"
        found.append(Limits(policy.context_tokens - completion, completion, reason))
    return min(found, default=Limits(_LONGEST_PROMPT, completion, "more than fits"))


def _request(policy: Policy, limits: Limits, where: str, line: Mapping[str, Any], *, chat: bool) -> Request:
    """One prompt as tokens, checked."""
    if len(line) != 1 or not set(line) <= set(_KINDS):
        raise ValueError(f"{where} has the fields {', '.join(line) or 'none'}; give one of {', '.join(_KINDS)} alone")
    ((kind, given),) = line.items()
    tokenizer = policy.tokenizer
    if kind == "token_ids":
        if chat:
            raise ValueError(f"{where} holds token ids, which are a prompt already; leave --chat out, or give messages")
        ids = _vocabulary_ids(given, policy.model.vocabulary_size, where)
        request = Request(given, " ".join(map(str, ids)), ids)
    elif kind == "messages":
        if not isinstance(tokenizer, HuggingFaceTokenizer) or not isinstance(tokenizer.prompts, ChatPrompts):
            raise ValueError(
                f"{where} holds messages, but no chat template is in use; add --chat with a model directory, or give "
                "the prompt as a text"
            )
        last = _last_message(given, where)
        request = Request(given, last, _encoded(tokenizer, {"body": last, "messages": given}, where))
    else:
        if not isinstance(given, str):
            raise ValueError(f"{where}: prompt is {str(given)[:80]}; it must be a text")
        request = Request(given, given, _encoded(tokenizer, {"body": given}, where))
    if not request.ids:
        raise ValueError(f"{where} holds no token; a prompt needs at least one")
    if len(request.ids) > limits.prompt:
        raise ValueError(
            f"{where} does not fit: its prompt has {len(request.ids)} tokens, more than {limits.prompt}, "
            f"{limits.reason}; shorten it"
        )
    return request


def _encoded(tokenizer: Any, item: Mapping[str, Any], where: str) -> list[int]:
    try:
        return tokenizer.prompt_ids(item)
    except ValueError as error:
        raise ValueError(f"{where} cannot be encoded: {error}") from error


def _last_message(messages: Any, where: str) -> str:
    """The text of the last message."""
    fine = isinstance(messages, list) and messages
    for message in messages if fine else ():
        fine = fine and isinstance(message, Mapping) and {"role", "content"} <= message.keys()
        fine = fine and isinstance(message["role"], str) and isinstance(message["content"], str)
    if not fine or messages[-1]["role"] == "assistant":
        raise ValueError(
            f"{where}: messages is {str(messages)[:80]}; give a list of objects with role and content, the "
            "last not of the assistant"
        )
    return messages[-1]["content"]


def _vocabulary_ids(ids: Any, size: int, where: str) -> list[int]:
    if not isinstance(ids, list) or not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
        raise ValueError(f"{where}: token_ids is {str(ids)[:80]}; it must be a list of whole numbers")
    if outside := [each for each in ids if not 0 <= each < size]:
        raise ValueError(f"{where} names the token id {outside[0]}, but the model's ids are 0 to {size - 1}")
    return ids


def _numbers(text: str) -> list[int]:
    try:
        return [int(each) for each in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"--token-ids is {text[:80]!r}; give whole numbers, for example '1 2 3'") from None


def _file_lines(file: Path) -> list[tuple[str, Mapping[str, Any]]]:
    if file.suffix in (".json", ".jsonl"):
        return json_objects(file, "--prompts")
    try:
        return _text_lines(str(file), file_bytes(file.expanduser()).decode("utf-8"))
    except OSError as error:
        raise ValueError(f"--prompts {file} cannot be read: {error.strerror}; give the path of a file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {file} is not text in UTF-8: {error}; convert it") from None


def _text_lines(where: str, text: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Every line that is not blank."""
    numbered = enumerate(text.replace("\r\n", "\n").split("\n"), start=1)
    lines: list[tuple[str, Mapping[str, Any]]] = [
        (f"{where}, line {number}", {"prompt": line}) for number, line in numbered if line.strip()
    ]
    if not lines:
        raise ValueError(f"{where} holds no prompt; write one a line, or give --prompt, --prompts or --token-ids")
    return lines
