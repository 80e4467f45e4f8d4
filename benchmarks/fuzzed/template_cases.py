"""Fuzzed chat templates."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from fuzzed.mutations import Case, damaged, mutated

PIECES = (
    "{{ messages[0].content }}",
    "{{ bos_token }}",
    "{% for message in messages %}{{ message.role }}{% endfor %}",
    "text\n",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{% set n = namespace(s='aaaaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "{% set n = namespace(s='aaaaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "{% set n = namespace(l=[1]) %}{% for i in range(60) %}{% set n.l = n.l + n.l %}{% endfor %}",
    "{{ 'a' | indent(1000000000, true) }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a' * 10000000000 }}",
    "{{ [0] * 10000000000 }}",
    "{{ messages | tojson(indent=1000000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ 2 ** 2 ** 2 ** 2 ** 2 ** 2 ** 2 }}",
    "{{ strftime_now('%1000000000d') }}",
    "{{ lipsum(n=100000) }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "{{ " + "-" * 5000 + "1 }}",
    "{{ " + "1+" * 5000 + "1 }}",
    "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    "{{ a" + ".b" * 5000 + " }}",
    "{{ a" + "|e" * 5000 + " }}",
    "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% include 'x' %}",
    "{% extends 'x' %}",
    "{% import 'x' as y %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ self }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception('a' * 100000) }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ 1 // 0 }}",
    "{{ none.x.y }}",
    "{{ 'a' | replace('', 'b' * 100000) | replace('', 'b' * 100000) }}",
    "{{ (range(99999) | list) | tojson }}",
    "{{ range(99999) | join('x' * 99999) }}",
    "{{ 'a' | batch(10**9, 'x') | list }}",
    "{{ range(9) | slice(10**9) | list }}",
    "{{ ('a' * 100000) | wordwrap(1) }}",
    "{{ ('<' * 100000) | striptags }}",
    "{{ ('http://' * 50000) | urlize }}",
    "{{ messages | map(attribute='role') | list | string }}",
    "{{ '\\ud800' }}",
    "{#",
    "{%",
    "{{",
    "{% raw %}",
    "{% generation %}",
    "{{ '" + "a" * 100_000 + "' }}",
    "{{ " + "9" * 10_000 + " }}",
    "{% set x = 'a' %}" * 5000,
    "\x00",
    "{{ strftime_now('\x00') }}",
    "{{ strftime_now(3) }}",
)


def templates(random_: random.Random, folder: Path) -> Callable[[int], Case]:
    """Chat templates assembled from harmless and hostile pieces, and damaged ordinary ones."""
    from jaxrl_llm.data.chat import ChatTemplate, rewrites_history

    usual = (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )

    def case(number: int) -> Case:
        if random_.random() < 0.3:
            source = damaged(random_, usual.encode()).decode("utf-8", "replace")
        else:
            source = "".join(random_.choice(PIECES) for _ in range(random_.choice((1, 1, 2, 3))))
        options = mutated(random_, {"enable_thinking": False, "a": [1]}) if random_.random() < 0.3 else {}

        def run() -> None:
            template = ChatTemplate(source, {"eos_token": "</s>", "bos_token": "<s>"}, options)
            template.rendered([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
            rewrites_history(template)

        return Case(f"templates {number}: {source[:60]!r}", run)

    return case
