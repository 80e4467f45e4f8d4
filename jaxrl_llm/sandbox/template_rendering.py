"""Functions of the process that renders chat templates in jinja2's immutable sandbox.

A template may contain an infinite loop, double a text forty times, or indent by a billion spaces. So the process is
killed after `SECONDS` of CPU time, and its memory is limited to `MOST_BYTES`.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import resource
import signal
from typing import Any, NoReturn

SECONDS = 1.0
MOST_BYTES = 2**29
LONGEST_TEXT = 10_000_000


@functools.cache
def environment() -> Any:
    """jinja2's sandbox with the same settings and helper functions as in `transformers`."""
    import jinja2
    import jinja2.nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks assistant text; here it is a plain block, since masks come from lengths."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def as_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own filter escapes HTML, which differs from the text that models were trained on.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = as_json
    made.globals["raise_exception"] = refuse
    return made


@functools.lru_cache(maxsize=16)
def compiled(source: str) -> Any:
    """The compiled template of a source text."""
    return environment().from_string(source)


@functools.cache
def limit_memory() -> None:
    """Limit the memory of this process. On macOS the call fails, and only the check in `Workers` limits the memory."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))


def rendered(source: str, variables: dict[str, Any], date: datetime.date) -> dict[str, Any]:
    """{text}, or {error} with {line} if the template has a syntax error. Must be called in a separate process.

    Args:
      source: text of the template.
      variables: variables of the template.
      date: today's date, for `strftime_now`.
    """
    environment()
    limit_memory()
    # CPU time, not wall-clock time, so that other load does not matter. SIGPROF kills the process.
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        return _rendered(source, variables | {"strftime_now": date.strftime})
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _rendered(source: str, variables: dict[str, Any]) -> dict[str, Any]:
    from jinja2 import TemplateSyntaxError

    try:
        text = compiled(source).render(variables)
        if len(text) > LONGEST_TEXT:
            return {"error": f"its output has {len(text):,} characters; at most {LONGEST_TEXT:,} are allowed"}
        return {"text": text}
    except TemplateSyntaxError as error:
        return {"error": str(error.message)[:1000], "line": error.lineno}
    except RecursionError:
        return {"error": "it is nested too deeply, or has an infinite recursion"}
    except MemoryError:
        return {"error": f"it needs more than {MOST_BYTES:,} bytes of memory"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:1000]}"}
