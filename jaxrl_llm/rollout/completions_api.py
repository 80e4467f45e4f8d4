"""One request to an OpenAI-compatible engine (vLLM, SGLang): token ids in, token ids and log-probabilities out.

Every response is checked, so that an engine with missing or different numbers is detected at the first request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxrl_llm.bounds import natural
from jaxrl_llm.endpoints import Endpoint, EndpointError, answer

TOKEN_ID = "token_id:"


class Completion(NamedTuple):
    """One sampled completion.

    Attributes:
      tokens: ids, end of sequence included.
      logprobs: log-probability of each, as the engine reports it.
      ended: with end of sequence, not at the limit.
    """

    tokens: list[int]
    logprobs: list[float]
    ended: bool


def completion(
    engine: Endpoint,
    prompt: Sequence[int],
    *,
    seed: int,
    temperature: float,
    max_completion_tokens: int,
    eos_ids: Sequence[int],
    vocabulary_size: int,
    what: str,
) -> Completion:
    """Sample one completion of a prompt.

    The request sets everything that an engine could otherwise take from its defaults (a model's generation_config.json
    sets top-k and top-p), so that the distribution is softmax(logits / temperature) over the vocabulary.

    Raises:
      EndpointError: see `answer` and `checked_completion`.
    """
    body = {
        "model": engine.model,
        "prompt": list(prompt),
        "max_tokens": max_completion_tokens,
        "n": 1,
        "seed": seed,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(eos_ids),
        "logprobs": 1,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        **engine.request,
    }
    path = "/v1/completions"
    found = answer(engine, path, body, what=what)
    return checked_completion(
        found,
        prompt,
        max_completion_tokens=max_completion_tokens,
        eos_ids=eos_ids,
        vocabulary_size=vocabulary_size,
        where=f"the answer of {engine.address(path)} to {what}",
    )


def checked_completion(
    found: Any,
    prompt: Sequence[int],
    *,
    max_completion_tokens: int,
    eos_ids: Sequence[int],
    vocabulary_size: int,
    where: str,
) -> Completion:
    """The single completion of a response, after checks.

    Raises:
      EndpointError: for more or fewer than one choice; missing, too few, too many or invalid ids or log-probabilities;
        a prompt that differs from the request; a completion that neither ended nor reached the limit.
    """
    choices = found.get("choices") if isinstance(found, Mapping) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        count = f"{len(choices)} choices" if isinstance(choices, list) else "no list of choices"
        raise EndpointError(
            f"{where} has {count}, where one was asked for; leave n out of rollout.engine.request, and check that the "
            "address is that of the engine itself"
        )
    choice = choices[0]
    described = choice.get("logprobs")
    logprobs = described.get("token_logprobs") if isinstance(described, Mapping) else None
    if not isinstance(described, Mapping) or not isinstance(logprobs, list):
        raise EndpointError(
            f"{where} has no log-probabilities (logprobs.token_logprobs); training needs one for each token, so use an "
            "engine whose /v1/completions returns them (vLLM: --max-logprobs at least 1)"
        )
    tokens = _token_ids(choice, described, where)
    if len(logprobs) != len(tokens):
        raise EndpointError(
            f"{where} has {len(logprobs)} log-probabilities for {len(tokens)} tokens; each token needs its own, so "
            "turn off all options that change tokens after sampling (echo, trimmed stop tokens, merged pieces)"
        )
    for position, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocabulary_size:
            raise EndpointError(
                f"{where} has token {token!r} at position {position}, but the policy's ids are 0 to "
                f"{vocabulary_size - 1}; the engine serves another model or tokenizer, or pads its vocabulary"
            )
        number = isinstance(logprob, int | float) and not isinstance(logprob, bool)
        if not number or not math.isfinite(logprob) or logprob > 1e-3:
            raise EndpointError(
                f"{where} has log-probability {logprob!r} at position {position}; it must be finite and at most 0, so "
                "check the engine's log for overflow (NaN scores) and its logprobs mode"
            )
    sent = choice.get("prompt_token_ids")
    if sent is not None and list(sent) != list(prompt):
        raise EndpointError(
            f"{where} says that its prompt had {len(sent)} tokens ({str(sent[:8])[1:-1]} ...), but {len(prompt)} were "
            f"sent ({str(list(prompt)[:8])[1:-1]} ...); turn off special tokens or truncation that the engine adds"
        )
    ends = [position for position, token in enumerate(tokens) if token in set(eos_ids)]
    ended = bool(ends) and ends[0] == len(tokens) - 1
    if ends and not ended:
        raise EndpointError(
            f"{where} goes on for {len(tokens) - 1 - ends[0]} tokens after end of sequence; leave ignore_eos out of "
            "rollout.engine.request"
        )
    if not ended and len(tokens) != max_completion_tokens:
        raise EndpointError(
            f"{where} stops after {len(tokens)} of at most {max_completion_tokens} tokens without end of sequence "
            f"{tuple(eos_ids)} (finish_reason {choice.get('finish_reason')!r}); raise the engine's context length, and "
            "let it return the token it stops at"
        )
    if len(tokens) > max_completion_tokens:
        raise EndpointError(
            f"{where} has {len(tokens)} tokens, more than the {max_completion_tokens} that were asked for; use an "
            "engine that obeys max_tokens"
        )
    return Completion(tokens, [min(float(value), 0.0) for value in logprobs], ended)


def _token_ids(choice: Mapping[str, Any], described: Mapping[str, Any], where: str) -> list[Any]:
    """Ids from the field `token_ids`, or from tokens of the form `token_id:123`."""
    written = described.get("tokens")
    named = None
    if isinstance(written, list) and all(isinstance(t, str) and t.startswith(TOKEN_ID) for t in written):
        ids = [natural(t[len(TOKEN_ID) :]) for t in written]
        named = [t if id is None else id for t, id in zip(written, ids, strict=True)]
    for ids in (choice.get("token_ids"), described.get("token_ids"), named):
        if isinstance(ids, list) and ids:
            return ids
    raise EndpointError(
        f"{where} has no token ids; text cannot be encoded again without changing tokens, so use an engine that knows "
        "return_token_ids or return_tokens_as_token_ids"
    )
