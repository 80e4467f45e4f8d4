"""Countdown: `C:3 6 12>30` -> `12*3-6`, an expression that uses every number once and reaches the target."""

from __future__ import annotations

from fractions import Fraction
from random import Random
from typing import NamedTuple

from jaxrl_llm.data.tasks.expressions import ExpressionError, parse
from jaxrl_llm.data.tasks.items import Item, Task, require_bool, require_int, require_subset

WRONG = 0.1  # reward of a wrong answer; no answer has reward 0
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_OPERATORS_BY_LEVEL = {2: "+-", 3: "+-*"}


class _Tree(NamedTuple):
    value: Fraction | int
    text: str
    precedence: int
    steps: tuple[str, ...]


def problem(body: str) -> tuple[tuple[int, ...], int]:
    """Numbers and target of a body.

    Raises:
      ValueError: if the text is not a Countdown problem.

    >>> problem("C:3 6 12>30")
    ((3, 6, 12), 30)
    """
    numbers, arrow, target = body.strip().removeprefix("C:").partition(">")
    try:
        if not body.startswith("C:") or not arrow:
            raise ValueError
        return tuple(int(number) for number in numbers.split(" ")), int(target)
    except ValueError:
        raise ValueError(
            f"{body!r} is not a Countdown problem; a body reads 'C:' numbers separated by spaces '>' target, "
            "for example 'C:3 6 12>30'"
        ) from None


def reward(body: str, answer: str | None) -> float:
    """Reward of an answer: 1 if it is right, 0.1 if it is wrong, 0 if there is none.

    A right answer is an expression of the grammar in `expressions` that uses each given number exactly once and whose
    exact value is the target.

    >>> reward("C:3 6 12>30", "12*3-6"), reward("C:3 7 12>30", "(12-7)*3+15"), reward("C:3 7 12>30", None)
    (1.0, 0.1, 0.0)
    """
    numbers, target = problem(body)
    if answer is None:
        return 0.0
    try:
        value, integers = parse(answer)
    except ExpressionError:
        return WRONG
    return 1.0 if value == target and sorted(integers) == sorted(numbers) else WRONG


def solvable(numbers: tuple[int, ...], target: int, *, operators: str = "+-*/") -> bool:
    """Whether some expression over all the numbers has the target's value, by exhaustive pairwise reduction.

    >>> solvable((3, 3, 8, 8), 24), solvable((1, 1, 1), 9)
    (True, False)
    """
    pools = {tuple(sorted(Fraction(number) for number in numbers))}
    for _ in range(len(numbers) - 1):
        pools = {
            tuple(sorted((*rest, value)))
            for pool in pools
            for i, j in ((i, j) for i in range(len(pool)) for j in range(len(pool)) if i != j)
            for rest in [tuple(pool[k] for k in range(len(pool)) if k not in (i, j))]
            for operator in operators
            if (value := _applied(operator, pool[i], pool[j])) is not None
        }
    return (Fraction(target),) in pools


def _applied(operator: str, left: Fraction | int, right: Fraction | int) -> Fraction | int | None:
    match operator:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
    if right == 0:
        return None
    quotient = Fraction(left) / right
    return int(quotient) if quotient.denominator == 1 else quotient


def _tree(rng: Random, numbers: list[int], operators: str) -> _Tree | None:
    """A random binary tree over the numbers in their order; None if it divides by zero."""
    if len(numbers) == 1:
        return _Tree(numbers[0], str(numbers[0]), 3, ())
    cut = rng.randrange(1, len(numbers)) if len(numbers) > 2 else 1
    left, right = _tree(rng, numbers[:cut], operators), _tree(rng, numbers[cut:], operators)
    operator = rng.choice(operators)
    value = None if left is None or right is None else _applied(operator, left.value, right.value)
    if left is None or right is None or value is None:
        return None
    precedence = _PRECEDENCE[operator]
    left_text = f"({left.text})" if left.precedence < precedence else left.text
    # a-(b-c) and a/(b/c) need their parentheses, a+(b-c) and a*(b/c) do not
    tight = right.precedence < precedence or (right.precedence == precedence and operator in "-/")
    right_text = f"({right.text})" if tight else right.text
    step = f"{left.value}{operator}{right.value}={value}"
    return _Tree(value, f"{left_text}{operator}{right_text}", precedence, (*left.steps, *right.steps, step))


def task(
    *,
    operators: str | None = None,
    largest_number: int = 20,
    smallest_target: int = 1,
    largest_target: int = 100,
    failed_attempts: int = 2,
    scratchpad: bool = True,
) -> Task:
    """Reach a target with `level` numbers, each used exactly once. Every problem is solvable by construction.

    Args:
      operators: operators of the problems, a subset of "+-*/"; None uses + - for two numbers, + - * for three, and
        + - * / for four and more.
      largest_number: numbers are uniform in 1..largest_number (papers use 100).
      smallest_target: lowest target.
      largest_target: highest target.
      failed_attempts: largest number of combinations in the scratch that miss the target, each followed by `no`,
        before the one that reaches it, followed by `yes`.
      scratchpad: write a search trace before the answer.
    """
    if operators is not None:
        operators = require_subset("operators", operators, "+-*/")
    require_int("largest_number", largest_number, low=1)
    require_int("smallest_target", smallest_target)
    require_int("largest_target", largest_target, low=smallest_target)
    require_int("failed_attempts", failed_attempts, low=0)
    require_bool("scratchpad", scratchpad)

    def trace(rng: Random, numbers: list[int], allowed: str, target: int, solution: _Tree) -> str:
        written: list[str] = []
        for _ in range(rng.randint(0, failed_attempts)):
            tried = _tree(rng, rng.sample(numbers, len(numbers)), allowed)
            if tried is not None and tried.value != target:
                written += [*tried.steps, "no"]
        return ";".join([*written, *solution.steps, "yes"])

    def draw(rng: Random, level: int) -> Item | None:
        allowed = operators or _OPERATORS_BY_LEVEL.get(level, "+-*/")
        for _ in range(20):
            numbers = [rng.randint(1, largest_number) for _ in range(level)]
            solution = _tree(rng, rng.sample(numbers, level), allowed)
            if solution is None or isinstance(solution.value, Fraction):
                continue
            if smallest_target <= solution.value <= largest_target:
                target = solution.value
                think = trace(rng, numbers, allowed, target, solution) if scratchpad else ""
                body = f"C:{' '.join(map(str, numbers))}>{target}"
                return Item(body, think, solution.text, "countdown", level, f"countdown-{level}")
        return None

    return Task(
        name="countdown",
        draw=draw,
        verify=lambda item, answer: reward(item.body, answer),
        levels=(2, 3, 4),
        last_level=6,
        description="reach a target with given numbers; the level is how many numbers",
        options={
            "operators": operators,
            "largest_number": largest_number,
            "smallest_target": smallest_target,
            "largest_target": largest_target,
            "failed_attempts": failed_attempts,
            "scratchpad": scratchpad,
        },
        scratchpad=scratchpad,
        reward="countdown",
    )
