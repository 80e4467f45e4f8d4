"""Freed memory is given back after long compilations, once a process asks for it."""

from __future__ import annotations

import jax
import pytest

from jaxrl_llm import allocator


@pytest.fixture
def registered(monkeypatch):
    """What would be registered with jax, which keeps its listeners for good."""
    found = []
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", found.append)
    allocator.give_back_after_compiling.cache_clear()
    yield found
    allocator.give_back_after_compiling.cache_clear()


class Library:
    def __init__(self, calls):
        self.malloc_trim = calls.append


def test_only_long_compilations_are_followed_by_it(registered, monkeypatch):
    calls = []
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: Library(calls))
    assert allocator.give_back_after_compiling()
    assert allocator.give_back_after_compiling()
    (listen,) = registered
    listen("/jax/core/compile/backend_compile_duration", 5.0, fun_name="step")
    listen("/jax/core/compile/backend_compile_duration", 0.1)
    listen("/jax/core/compile/jaxpr_trace_duration", 5.0)
    assert calls == [0]


def test_another_c_library_is_left_alone(registered, monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert not allocator.give_back_after_compiling()
    assert registered == []
