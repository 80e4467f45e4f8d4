"""The functions of the process that renders chat templates, in jinja2's immutable sandbox.

A template may loop for ever, double a text forty times, or indent by a billion spaces: the process ends after `SECONDS`
of CPU time, and its memory is limited to `MOST_BYTES`.
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
    """jinja2's sandbox with the settings and the helper functions that `transformers` gives it."""
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
        # jinja2's own filter escapes HTML, which no tokenizer has seen.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = as_json
    made.globals["raise_exception"] = refuse
    return made


@functools.lru_cache(maxsize=16)
def compiled(source: str) -> Any:
    """The template of a text."""
    return environment().from_string(source)


@functools.cache
def limit_memory() -> None:
    """Of this process, from now on; macOS refuses, and there whoever has started it looks at its memory alone."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))


def rendered(source: str, variables: dict[str, Any], date: datetime.date) -> dict[str, Any]:
    """{text}, or {error}, with {line} for an error in the template itself; to be called in a separate process.

    Args:
      source: text of the template.
      variables: what it may name.
      date: today's, for `strftime_now`.
    """
    environment()
    limit_memory()
    # CPU time, not wall-clock time, so that other load does not matter. SIGPROF ends the process.
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
            return {"error": f"it wrote {len(text):,} characters, more than {LONGEST_TEXT:,}"}
        return {"text": text}
    except TemplateSyntaxError as error:
        return {"error": str(error.message)[:1000], "line": error.lineno}
    except RecursionError:
        return {"error": "it is nested too deeply, or calls itself without end"}
    except MemoryError:
        return {"error": f"it needs more than {MOST_BYTES:,} bytes of memory"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:1000]}"}
