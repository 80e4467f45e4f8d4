"""Compilations are counted, and one that nobody expects is reported with its cause."""

from __future__ import annotations

import logging
import random

import jax
import jax.numpy as jnp

from jaxrl_llm.run.compilation import CompilationWatch


def fresh(offset):
    return jax.jit(lambda x: x * 2 + offset)


def unheard_of() -> float:
    """A number that no program of an earlier session holds, should their cache be in use."""
    return random.SystemRandom().random()


def test_programs_are_counted_while_the_watch_is_open():
    program, one, two = fresh(unheard_of()), jnp.ones(1), jnp.ones(2)
    with CompilationWatch() as watch:
        program(one)
        program(one)
        assert watch.count == 1
        program(two)
        assert watch.count == 2
        assert watch.seconds > 0
    program(jnp.ones(3))
    assert watch.count == 2


def test_what_compiles_after_warm_up_is_reported_with_its_cause(capfd, caplog):
    reports = []
    program, one, two, three = fresh(unheard_of()), jnp.ones(1), jnp.ones(2), jnp.ones(3)
    with CompilationWatch() as watch:
        program(one)
        watch.expect_none(reports.append)
        program(one)
        assert reports == []
        program(two)
        watch.allow()
        program(three)
    assert len(reports) == 1
    assert "compiled after warm-up" in reports[0]
    assert "now f32[2] and before f32[1]" in reports[0]
    # Nothing leaks onto the terminal, and jax's logging is as it was.
    assert capfd.readouterr().err == ""
    assert caplog.records == []
    assert not jax.config.jax_explain_cache_misses
    assert logging.getLogger("jax").propagate


def test_a_program_of_the_persistent_cache_is_read_and_not_compiled():
    offset, x, reports = unheard_of(), jnp.ones(1), []
    with CompilationWatch() as watch:
        fresh(offset)(x)
        assert (watch.count, watch.read) == (1, 0)
        seconds = watch.seconds
        watch.expect_none(reports.append)
        fresh(offset)(x)  # another function, and the same program
        assert (watch.count, watch.read, watch.seconds) == (1, 1, seconds)
        fresh(unheard_of())(x)
        assert (watch.count, watch.read) == (2, 1)
    assert [report.split(" after")[0] for report in reports] == ["read from the cache of programs", "compiled"]


def test_why_a_program_is_not_kept_is_not_shown(capfd, caplog):
    reports, x = [], jnp.ones(1)
    with CompilationWatch() as watch:
        watch.expect_none(reports.append)
        logging.getLogger("jax._src.compiler").warning("Not writing persistent cache entry for 'jit_f' because ...")
        fresh(unheard_of())(x)
    assert len(reports) == 1
    assert caplog.records == []
    assert capfd.readouterr().err == ""


def test_what_else_jax_says_is_not_lost(caplog):
    with CompilationWatch() as watch:
        watch.expect_none(print)
        logging.getLogger("jax._src.xla_bridge").warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


def test_a_watch_that_is_closed_reports_nothing():
    reports = []
    with CompilationWatch() as watch:
        watch.expect_none(reports.append)
    fresh(unheard_of())(jnp.ones(1))
    assert reports == []
    assert not jax.config.jax_explain_cache_misses
