"""Plausible wrong attempts: one step of a reference scratch is changed, and the error is propagated to the answer."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from jaxrl_llm.data.tasks import chain


class Attempt(NamedTuple):
    """Scratch and answer of an attempt."""

    think: str
    answer: str


def addition(body: str, column: int, change: int) -> Attempt:
    """The scratch of a sum with one column's sum changed, its carry and digit propagated.

    Args:
      body: such as "A:47+85".
      column: number of the column from the right, from 0.
      change: added to the column's sum modulo 20, 1 to 9.

    >>> addition("A:47+85", 0, 1)
    Attempt(think='7+5+0=13;4+8+1=13', answer='133')
    """
    a, b = body.removeprefix("A:").split("+")
    width = max(len(a), len(b))
    carry, written, digits = 0, [], ""
    for place, (x, y) in enumerate(zip(reversed(a.zfill(width)), reversed(b.zfill(width)), strict=True)):
        total = int(x) + int(y) + carry
        total = (total + change) % 20 if place == column else total
        written.append(f"{x}+{y}+{carry}={total:02d}")
        carry, digits = total // 10, str(total % 10) + digits
    return Attempt(";".join(written), str(int(f"{carry}{digits}")))


def modular_chain(body: str, step: int, change: int) -> Attempt:
    """The scratch of a chain with one step's result changed, and the later steps computed from it.

    Args:
      body: such as "M7:3+5*2-4".
      step: number of the step, from 0.
      change: added to its result modulo the chain's prime.

    >>> modular_chain("M7:3+5*2-4", 0, 1)
    Attempt(think='3+5=2;2*2=4;4-4=0', answer='0')
    """
    modulus, start, steps = chain.parsed(body)
    head = chain.item(modulus, start, steps[: step + 1])
    wrong = (int(head.answer) + change) % modulus
    kept = head.think.rpartition("=")[0] + f"={wrong}"
    tail = chain.item(modulus, wrong, steps[step + 1 :])
    return Attempt(";".join(part for part in (kept, tail.think) if part), tail.answer)


def random_addition(rng: Random, body: str, think: str, answer: str) -> Attempt:
    """A random column and change; the answer is always wrong, because the column's digit is."""
    del think, answer
    columns = max(map(len, body.removeprefix("A:").split("+")))
    return addition(body, rng.randrange(columns), rng.randint(1, 9))


def random_chain(rng: Random, body: str, think: str, answer: str) -> Attempt:
    """A random step and change, among those that change the answer (a later factor 0 would remove the error)."""
    del think
    modulus, _, steps = chain.parsed(body)
    while True:
        attempt = modular_chain(body, rng.randrange(len(steps)), rng.randrange(1, modulus))
        if attempt.answer != answer:
            return attempt


def random_deduction(rng: Random, body: str, think: str, answer: str) -> Attempt:
    """Another verdict out of T, F and U, after a scratch without its last rule."""
    del body
    return Attempt(think.rpartition(";")[0], rng.choice([verdict for verdict in "TFU" if verdict != answer]))
