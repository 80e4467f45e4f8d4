"""What lists of a step consist of: a function, and how it is called or weighted there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from jaxrl_llm.experience import Method
from jaxrl_llm.fields import TEXT
from jaxrl_llm.network_names import compared_with
from jaxrl_llm.ranges import Count, Natural, NonNegative, PositiveShare, Share, require_ranges
from jaxrl_llm.signatures import name_of, names, on_host, required


@dataclass(frozen=True)
class Reward:
    """One reward function of a recipe: a column of `reward_components`.

    Attributes:
      function: returns one number a row; one that names text runs on the host (`signatures.on_host`).
      weight: factor in the sum that is maximised.
      name: for metrics and messages.
      deadline_s: seconds that one call of a reading may take; None waits.
      value_on_failure: the reward where a call fails or takes too long; None ends the step with an error.
    """

    function: Callable[..., Any]
    weight: float = 1.0
    name: str = ""
    deadline_s: float | None = None
    value_on_failure: float | None = None

    @property
    def on_host(self) -> bool:
        """Whether it is a reading."""
        return on_host(self.function)


@dataclass(frozen=True)
class Fill:
    """One entry of a recipe's credit list: names in, one or several names out.

    Attributes:
      fields: the name, or names, that the function's value becomes: an array, or a tuple or a dictionary of them.
      function: a function of named data, a reading, or a `Method`.
      name: for metrics, memory and messages.
      deadline_s, value_on_failure: of a reading, as for `Reward`.
    """

    fields: str | tuple[str, ...]
    function: Callable[..., Any] | Method
    name: str = ""
    deadline_s: float | None = None
    value_on_failure: float | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names that it fills."""
        return (self.fields,) if isinstance(self.fields, str) else tuple(self.fields)

    @property
    def on_host(self) -> bool:
        """Whether it is a reading."""
        return on_host(self.function)

    @property
    def over_vocabulary(self) -> bool:
        """Whether it reads whole next-token distributions of the policy before the update."""
        return "log_probabilities" in names(self.function)

    @property
    def memory_name(self) -> str:
        """Key of the method's memory in `TrainState.memory`."""
        return f"{','.join(self.names)}:{self.name}"


@dataclass(frozen=True)
class LossTerm:
    """One loss of a recipe.

    Attributes:
      function: returns a `Loss`.
      coefficient: a number, or a function (or `Method`) of experience fields and metrics that returns one.
      name: for metrics and messages.
    """

    function: Callable[..., Any]
    coefficient: Any = 1.0
    name: str = ""

    @property
    def coefficient_changes(self) -> bool:
        """Whether the coefficient is computed anew in each step."""
        return callable(self.coefficient) or isinstance(self.coefficient, Method)

    @property
    def compares(self) -> str | None:
        """The name of the functional over the vocabulary that it carries; None without one."""
        return next((name for name in sorted(names(self.function)) if compared_with(name) is not None), None)

    @property
    def on_written(self) -> bool:
        """Whether it is a loss on written completions."""
        return "written_mask" in names(self.function)

    @property
    def memory_name(self) -> str:
        """Key of the coefficient's memory in `TrainState.memory`."""
        return f"coefficient:{self.name}"


@dataclass(frozen=True)
class View:
    """A function that makes another sequence of each row, whose tokens networks score, or write.

    Attributes:
      function: of named data, returns `Sequences`, or `Branches` for several sequences that go on from the row. One
        that names text runs on the host and returns a pair (prompt, completion) a row, as texts or lists of token ids,
        or None for a row that has none: its mask is 0 throughout. Of a view that is written it returns the prompt
        alone.
      max_prompt_tokens: width of the prompts of a view on the host; None is room for a row's prompt and completion.
      max_completion_tokens: width of what is scored there; None is that of a row's completion.
      name: set by the composition.
      deadline_s: of a view on the host, as for `Reward`; no sequence could stand for one that failed.
      written_by: the network that completes the prompts, as the step finds it ("policy" too); None for a view whose
        function gives the completion. Readings get its texts as `<view>_text`.
      temperature: that it writes at; 0 is greedy.
      mixed_with: a second network: tokens are drawn from the normalised product of both distributions.
      share: exponent of the second one in it; 0 leaves the first alone.
      guided_by: a network with a head of one number: the likeliest tokens are drawn the more often, the more it says
        that they lead to (`models.mixture.value_guided`).
      strength: of that, nats a unit of value.
      candidates: tokens whose values are looked at.
    """

    function: Callable[..., Any]
    max_prompt_tokens: int | None = None
    max_completion_tokens: int | None = None
    name: str = ""
    deadline_s: float | None = None
    written_by: str | None = None
    temperature: float = 1.0
    mixed_with: str | None = None
    share: Share = 0.5
    guided_by: str | None = None
    strength: NonNegative = 3.0
    candidates: Count = 20

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"views.{self.name}: temperature is {self.temperature}; it must be at least 0 (greedy)")
        require_ranges(self, f"views.{self.name}")
        for key in ("written_by", "mixed_with", "guided_by"):
            if not isinstance(name := getattr(self, key), str | None):
                raise ValueError(f"views.{self.name}.{key} is {name!r}, but it must be the name of a network")
        if self.mixed_with is not None and self.written_by in (None, self.mixed_with):
            raise ValueError(
                f"views.{self.name}: mixed_with is {self.mixed_with!r}, but written_by {self.written_by!r}; name "
                "another network there, which it is mixed with"
            )
        if self.guided_by is not None and (self.written_by is None or self.mixed_with is not None):
            raise ValueError(
                f"views.{self.name}: guided_by is {self.guided_by!r}, which guides what one network writes; name that "
                "one as written_by, and leave mixed_with out"
            )

    @property
    def writers(self) -> tuple[str, ...]:
        """The networks that write its completions."""
        return tuple(name for name in (self.written_by, self.mixed_with) if name)

    @property
    def asked(self) -> tuple[str, ...]:
        """All networks that its completions need."""
        return (*self.writers, *((self.guided_by,) if self.guided_by else ()))

    @property
    def on_host(self) -> bool:
        """Whether it is a reading."""
        return on_host(self.function)

    @property
    def stored(self) -> bool:
        """Whether rows hold its sequences, because they cannot be made again of the row."""
        return self.on_host or self.written_by is not None

    @property
    def value_on_failure(self) -> None:
        """A failure ends the step."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of rows that it is made of."""
        return frozenset(required([self.function])) - TEXT


@dataclass(frozen=True)
class Update:
    """How one batch of experience becomes parameter updates.

    Attributes:
      epochs_per_batch: passes over the batch.
      minibatches_per_epoch: optimiser updates a pass; each takes whole groups.
      sequences_per_microbatch: rows differentiated at once; None takes a whole minibatch.
      packing: rows are packed into bins for passes over them: numbers of bins as shares of the rows, of which a batch
        takes the smallest that holds it; empty packs nothing.
      completion_buckets: widths that completions are trimmed to for passes over them; a batch takes the smallest that
        holds it. Empty trims nothing.
      freeze_policy_steps: first steps in which only other networks learn.
      alignment_every_steps: steps between two measurements of `alignment`; 0 never measures it.
      alignment_learning_rate: the step size that it is measured for.
    """

    epochs_per_batch: Count = 1
    minibatches_per_epoch: Count = 1
    sequences_per_microbatch: Count | None = None
    packing: tuple[PositiveShare, ...] = ()
    completion_buckets: tuple[Count, ...] = ()
    freeze_policy_steps: Natural = 0
    alignment_every_steps: Natural = 0
    alignment_learning_rate: NonNegative = 1e-4

    def __post_init__(self):
        require_ranges(self, "update")
        if self.packing and self.completion_buckets:
            raise ValueError(
                "training.packing and training.completion_buckets are both set, but packed rows have no padding that "
                "could be trimmed; leave one of them out"
            )


def reward_term(term: Reward | Callable[..., Any] | tuple[Callable[..., Any], float]) -> Reward:
    """A reward function, or (function, weight), as a term."""
    if isinstance(term, Reward):
        return term if term.name else replace(term, name=name_of(term.function))
    pair: Any = term if _is_pair(term) else (term, 1.0)
    function, weight = pair
    if not callable(function) or not isinstance(weight, Real) or not math.isfinite(weight):
        raise ValueError(f"rewards holds {term!r}; give a function, (function, weight), or a Reward")
    return Reward(function, float(weight), name_of(function))


def fill_term(term: Fill | tuple[Any, Any]) -> Fill:
    """A (name or names, function) pair as a term."""
    if isinstance(term, Fill):
        return term if term.name else replace(term, name=name_of(term.function))
    pair: Any = term if _is_pair(term) else (None, None)
    names, function = pair
    several = (names,) if isinstance(names, str) else names
    made = callable(function) or isinstance(function, Method)
    if not made or not isinstance(several, tuple) or not all(isinstance(name, str) for name in several):
        raise ValueError(f"credit holds {term!r}; give (name, function), ((name, name), function), or a Fill")
    return Fill(names, function, name_of(function))


def loss_term(term: Any) -> LossTerm:
    """A loss function, or (function, coefficient), as a term."""
    if isinstance(term, LossTerm):
        return term if term.name else replace(term, name=name_of(term.function))
    function, coefficient = term if _is_pair(term) else (term, 1.0)
    if not callable(function) or not (
        callable(coefficient) or isinstance(coefficient, (Real, Method)) or hasattr(coefficient, "dtype")
    ):
        raise ValueError(f"losses holds {term!r}; give a function, (function, coefficient), or a LossTerm")
    return LossTerm(function, coefficient, name_of(function))


def _is_pair(term: Any) -> bool:
    return isinstance(term, (tuple, list)) and len(term) == 2 and not isinstance(term, Method)


def listed(name: str, given: Any, made: Callable[[Any], Any]) -> tuple[Any, ...]:
    """Entries of a list as terms; `name` is what messages call it."""
    if not isinstance(given, (list, tuple)) or isinstance(given, Method):
        raise ValueError(f"{name} is {given!r}; give a list, of one entry too")
    return tuple(map(made, given))
