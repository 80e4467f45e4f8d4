"""The README's Python is run as it stands, and its commands exist."""

import re
from pathlib import Path

from jaxrl_llm.cli import _parser

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_researchers_loop_runs_and_prints_three_steps(capsys):
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "make_train_step" in block]
    assert len(code.strip().splitlines()) <= 36
    exec(compile(code, "README.md", "exec"), {})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 3
    assert all("nan" not in line for line in lines)


def test_the_first_two_commands_stay():
    assert re.findall(r"```bash\n(.*?)\n```", README, re.S)[:2] == [
        "pip install . && jaxrl train configs/demo.yaml",
        "pip install -e '.[test]' && pytest -n auto --dist loadfile -m 'not slow'",
    ]


def test_the_readmes_commands_are_commands():
    mentioned = set(re.findall(r"^jaxrl (\w+)", README, re.M))
    known = set(_parser()._subparsers._group_actions[0].choices)
    assert mentioned <= known
    assert mentioned >= {"eval", "sample", "explain", "tasks", "methods", "doctor"}
