"""The process that renders chat templates, in jinja2's immutable sandbox. It imports nothing of jaxrl_llm.

A line of JSON in: {source, variables, date}; one out: {text}, or {error}, and {line} where the template itself is
wrong. A template may loop for ever, double a text forty times, or ask for an indent of a billion spaces: a request that
takes more than `SECONDS` of computing ends the process, and so may one of more than `MOST_BYTES` of memory.
"""

from __future__ import annotations

import datetime
import functools
import json
import resource
import signal
import sys
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
        """`{% generation %}` marks what an assistant said; here it is a plain block, since masks come from lengths."""

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


def rendered(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request."""
    from jinja2 import TemplateSyntaxError

    date = datetime.date.fromordinal(request["date"])
    try:
        text = compiled(request["source"]).render(request["variables"] | {"strftime_now": date.strftime})
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


def main() -> None:
    environment()
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("true", flush=True)
    for line in sys.stdin:
        # Computing time, not that of the clock: what else the machine does must not decide. SIGPROF ends a process.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        print(json.dumps(rendered(json.loads(line))), flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main()
