"""Selections with memory: the worked example of each card, and what holds for all of them."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import selection
from jaxrl_llm.experience import TrainState
from jaxrl_llm.run import checkpoints, stored_states
from jaxrl_llm.selection.pools import items_by_weight, record_ids

sys.path.insert(0, str(Path(__file__).parent))

from every_selection import COUNT, EVERY, RECORDS, elsewhere, learned, made, of_library, rows_of

NAN = float("nan")
# (function, its data, what the card says)
EXAMPLES = {
    "dads shares": (selection.deficit_shares, [[0.2, 0.6, 0.9]], [0.734987, 0.19374, 0.071273]),
    "dads at temperature 1": (
        lambda r: selection.deficit_shares(r, temperature=1.0),
        [[0.2, 0.6, 0.9]],
        [0.461488, 0.309344, 0.229168],
    ),
    "dads at the target": (selection.deficit_shares, [[1.0, 2.0]], [0.5, 0.5]),
    "dads counts": (lambda s: selection.share_counts(s, count=8), [[0.6, 0.3, 0.1]], [5, 3, 0]),
    "counts of equal shares": (lambda s: selection.share_counts(s, count=4), [[0.25, 0.25, 0.25, 0.25]], [1, 1, 1, 1]),
    "variance": (selection.informativeness, [[0.5, 0.0, 0.25, 1.0, NAN]], [0.25, 0.0, 0.1875, 0.0, 0.25]),
    "deviation": (lambda p: selection.informativeness(p, rule="deviation"), [[0.125, 0.5]], [0.661438, 1.0]),
    "mixed": (lambda p: selection.informativeness(p, rule="mixed"), [[0.1, 1.0]], [0.569533, 0.0]),
    "light-r1 band": (
        lambda p: selection.informativeness(p, rule="band", low=0.2, high=0.625),
        [[0.1, 0.2, 0.5, 0.7]],
        [0, 0, 1, 0],
    ),
    "rif": (lambda p: selection.informativeness(p, rule="band", low=0.0), [[1 / 3, 0.0, 1.0]], [1, 0, 1]),
    "guru, two maps": (
        selection.kept_by_two_maps,
        [[0, 0.1, 0.5, 0.5, 1], [0, 0.3, 0.89, 0.9, 1]],
        [0, 0, 1, 0, 0],
    ),
    "guru, one map": (lambda p: selection.kept_by_two_maps(p, p), [[0, 0.1, 0.5, 0.9]], [0, 0, 1, 0]),
    "guru, unknown": (selection.kept_by_two_maps, [[NAN, 0.5], [0.2, NAN]], [1, 1]),
    "distinct pairs": (
        selection.distinct_pairs,
        [[[1, 2, 3, 4], [1, 2, 3, 5], [7, 7, 7, 7]], np.ones((3, 4)), [0, 0, 1], np.ones(3)],
        [2 / 3, 2 / 3, 1 / 3],
    ),
    "distinct pairs of what is there": (
        selection.distinct_pairs,
        [[[1, 2, 9, 9], [1, 2, 3, 5]], [[1, 1, 0, 0], [1, 1, 1, 1]], [0, 0], [1, 0]],
        [1, 0],
    ),
    "medcco plateau": (
        lambda s: [selection.has_plateaued(s[:n], window=2, tolerance=0.05) for n in range(4, 9)],
        [[0.1, 0.3, 0.5, 0.6, 0.62, 0.63, 0.63, 0.63]],
        [0, 0, 0, 1, 1],
    ),
    "flat at chance": (lambda s: selection.has_plateaued(s, window=2), [[0.0, 0, 0, 0]], 0),
    "craft-gui batch": (
        lambda s, t: jnp.bincount(selection.stage_slots(s, t, jax.random.key(0), count=32, replay=0.2), length=3),
        [2, 0],
        [3, 3, 26],
    ),
    "nothing before the first": (
        lambda s, t: selection.stage_slots(s, t, jax.random.key(0), count=5, replay=0.5),
        [0, 3],
        [0, 0, 0, 0, 0],
    ),
    "fewer slots than stages, by turns": (
        lambda s, t: selection.stage_slots(s, t, jax.random.key(0), count=4, replay=0.5),
        [3, 1],
        [2, 0, 3, 3],
    ),
    "competence": (
        lambda s: selection.competence(s, total_steps=100, first=0.1),
        [[0, 25, 100, 300]],
        [0.1, 0.507445, 1.0, 1.0],
    ),
    "topology": (
        selection.topology_value,
        [[[0, 1, 3], [0, 2, 4], [0, 1, 4]], [1, 0, 1], [0, 0, 0], [1, 1, 1]],
        [0.625] * 3,
    ),
    "potential": (
        selection.success_potential,
        [[[0, 1, 3], [0, 2, 4], [0, 1, 4], [0, 1, -1]], [1, 0, 1, 1], [2, 2, 2, 1], [1, 1, 1, 1]],
        [[2 / 3, 1, 1], [2 / 3, 0, 0.5], [2 / 3, 1, 0.5], [1, 1, 0]],
    ),
    "equal paths": (
        selection.topology_value,
        [[[0, 1], [0, 1], [5, 6]], [1, 1, 0], [0, 0, 1], [1, 1, 0]],
        [0.25, 0.25, 0],
    ),
    "paths": (
        selection.path_value,
        [[[0, 1, 3, -1], [0, 2, 1, 3], [0, 2, 4, -1], [0, 2, 4, -1]], [1, 1, 0, 0], [0] * 4, [1] * 4],
        [1 / 3, 2 / 3, 0, 0],
    ),
    "keys of turns": (
        lambda *data: (
            k := selection.turn_keys(*data, turns=3),
            jnp.stack([k[0, 0] == k[1, 1], k[0, 1] == k[1, 0], k[1, 0] == k[1, 1], k[0, 2] == -1]),
        )[1],
        [[[4, 5, 6, 9], [5, 4, 4, 5]], [[0, 0, 1, 2], [0, 0, 1, 1]], [3, 4]],
        [1, 0, 0, 1],
    ),
}


@pytest.fixture(autouse=True, scope="module")
def quickly_compiled():
    """These tests wait for the compiler, and for next to nothing else."""
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)


def arrays(data):
    return [np.asarray(d, np.float32 if np.asarray(d).dtype == float else np.int32) for d in data]


def test_worked_examples():
    @jax.jit
    def every(data):
        return {name: function(*data[name]) for name, (function, *_) in EXAMPLES.items()}

    found = every({name: arrays(data) for name, (_, data, _) in EXAMPLES.items()})
    for name, (*_, expected) in EXAMPLES.items():
        np.testing.assert_allclose(np.asarray(found[name]), expected, atol=2e-6, err_msg=name)


# ---- what holds for all of them -------------------------------------------------------------------------------------

ORDER = np.random.default_rng(3).permutation(len(RECORDS))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Choices of six steps: of all, with records and rows in other places, and from a checkpoint on."""
    shuffled = [RECORDS[n] for n in ORDER]
    every = {name: (made(name), made(name, shuffled)) for name in EVERY}
    names, others = [r["prompt"] for r in RECORDS], [r["prompt"] for r in shuffled]

    @jax.jit
    def step(state):
        memory, chosen = {}, {}
        key = jax.random.fold_in(state.key, state.step)
        for name, (one, other) in every.items():
            held = state.memory[name]
            chosen[name] = one.choose(held[0], key, COUNT), other.choose(held[1], key, COUNT)
            rows, moved = rows_of(chosen[name][0], names), elsewhere(rows_of(chosen[name][1], others))
            memory[name] = [learned(one, held[0], rows), learned(other, held[1], moved)]
        told = {name: every[name][0].report(memory[name][0]) for name in every}
        return state.replace(memory=memory, step=state.step + 1), chosen, told

    memory = jax.jit(lambda: {name: [one.init(), other.init()] for name, (one, other) in every.items()})()
    # On one device by name, as what is restored is; otherwise the step would be compiled twice.
    first = jax.device_put(TrainState({}, memory, jax.random.key(0), jnp.int32(0)), jax.devices()[0])
    state, choices, directory = first, [], tmp_path_factory.mktemp("checkpoints")
    for number in range(6):
        if number == 3:
            with checkpoints.checkpoint_manager(directory, keep=1) as manager:
                checkpoints.save(manager, 3, state, {"step": 3})
        state, chosen, told = step(state)
        choices.append(chosen)
    state, again = stored_states.restore(directory, 3, first), []
    for _ in range(3, 6):
        state, chosen, _ = step(state)
        again.append(chosen)
    return choices, again, told


@pytest.mark.parametrize("name", EVERY)
def test_laws(runs, name):
    choices, again, told = runs
    of_data = np.array([one[name][0] for one in choices])
    of_others = np.array([one[name][1] for one in choices])
    assert of_data.min() >= 0
    assert of_data.max() < len(RECORDS)
    # Prompts and rows in another order, among absent rows: the same prompts are chosen.
    np.testing.assert_array_equal(ORDER[of_others], of_data)
    # A memory that was stored: the same choices.
    np.testing.assert_array_equal([one[name] for one in again], np.stack([of_data, of_others], 1)[3:])
    assert all(np.isfinite(value) for value in told[name].values())
    chances = [value for key, value in told[name].items() if key.startswith("chance/")]
    assert not chances or sum(chances) == pytest.approx(1.0, abs=1e-6)


def test_all_selections_of_the_library_are_among_them():
    described = {"bandit", "by_entropy", "by_pass_rate", "domain_aware", "easy_to_hard", "growing_difficulty"}
    assert described | {"most_variable", "topology_aware", "variance_aware"} <= set(of_library())


def test_stages_follow_each_other(runs):
    choices, _, told = runs
    levels = np.array([r["level"] for r in RECORDS])[[one["easy_to_hard"][0] for one in choices]]
    # Chosen behind updates 0, 1, ..: a choice behind n updates is that of step n + 1.
    assert [set(row) for row in levels.tolist()] == [{1}, {1, 2}, {1, 2}, {1, 2, 3}, {1, 2, 3}, {1, 2, 3}]
    assert told["easy_to_hard"]["stage"] == 2
    few = [set(np.asarray(one["most_variable"][0]).tolist()) for one in choices]
    assert len(few[2]) == 2
    assert few[2] == few[3] == few[5]


def test_a_band_goes_through_its_prompts_by_turns(runs):
    choices, _, _ = runs
    inside = [n for n, r in enumerate(RECORDS) if 0.1 < r["rate"] < 0.9]
    assert set(np.asarray(choices[0]["band"][0]).tolist()) <= set(inside)
    assert len(set(np.asarray(choices[0]["band"][0]).tolist())) == COUNT


def test_draws_by_weight_are_in_proportion_and_even_without_weights():
    ids = record_ids(RECORDS[:4])
    weights = jnp.array([0.28, 0.18, 0.17, 0.04])  # of the card of VAS
    drawn = jax.jit(lambda w: items_by_weight(w, jax.random.key(1), 20000, ids))
    share = np.bincount(drawn(weights), minlength=4) / 20000
    np.testing.assert_allclose(share, [0.41791, 0.268657, 0.253731, 0.059701], atol=0.012)
    np.testing.assert_allclose(np.bincount(drawn(weights * 0), minlength=4) / 20000, 0.25, atol=0.012)
    assert set(np.asarray(drawn(jnp.array([0.0, 1, 0, 0])))) == {1}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: selection.by_pass_rate(records=RECORDS, rate=0.0), "rate is 0 and pass_rate is missing"),
        (lambda: selection.by_pass_rate(records=RECORDS, pass_rate="level"), r"level of record 1 is 2; it must lie in"),
        (lambda: selection.by_pass_rate(records=RECORDS, rule="band", low=0.5, high=0.5), "low must be below high"),
        (
            lambda: selection.most_variable(records=RECORDS, explore_steps=1, prompts=13),
            "prompts is 13, but the data has 12 prompts",
        ),
        (lambda: selection.easy_to_hard(records=RECORDS, level="steps"), "a record has no 'steps'"),
        (lambda: selection.domain_aware(records=RECORDS[:1]), "domains is domain, but all 1 records are of one kind"),
    ],
)
def test_what_cannot_be_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_places_of_low_entropy_come_first_and_of_high_entropy_later():
    records = [{"body": str(number)} for number in range(9)]
    made = selection.by_entropy(records=records, total_steps=10, first=(1.0, 0.0, 0.0), last=(0.0, 0.0, 1.0))
    memory, weight = made.init(), jnp.ones(9)
    memory = made.update(memory, jnp.arange(9), jnp.arange(9, dtype=jnp.float32).at[4].set(NAN), weight)
    assert bool(jnp.isnan(memory.entropy[4]))
    again = made.update(memory, jnp.arange(9), jnp.arange(9, dtype=jnp.float32)[::-1], weight)
    np.testing.assert_array_equal(again.entropy, [0, 1, 2, 3, 4, 5, 6, 7, 8])  # the first reading stays
    for steps, expected in ((0, {0, 1, 2}), (3, {0, 1, 2}), (7, {6, 7, 8}), (10, {6, 7, 8})):
        chosen = made.choose(again._replace(steps=jnp.int32(steps)), jax.random.key(1), 12)
        assert set(chosen.tolist()) == expected
    np.testing.assert_allclose(made.report(again._replace(steps=jnp.int32(5)))["hardest_tier"], 0.5)
    with pytest.raises(ValueError, match="first has 3 probabilities and last 2"):
        selection.by_entropy(records=records, total_steps=10, last=(0.5, 0.5))
    with pytest.raises(ValueError, match=r"until is 0\.2 and hold is 0\.3"):
        selection.by_entropy(records=records, total_steps=10, until=0.2)
