"""Running a completion's code with its unit tests, in a process of its own with a deadline.

The process is a guard against endless loops, memory and exits, and no sandbox: it may read and write what the user may.
Run completions of a model that is not trusted in a container.
"""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_RUNNER = """
import resource, runpy, sys
token = sys.stdin.read()
resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 24, 1 << 24))
runpy.run_path("program.py", run_name="__main__")
print(token)
"""


def code_of(completion: str) -> str:
    """The code of a completion: its last fenced block, or all of it where there is none.

    >>> code_of("Here it is:\\n```python\\nx = 1\\n```\\nDone.")
    'x = 1\\n'
    """
    blocks = _BLOCK.findall(completion)
    return blocks[-1] if blocks else completion


def passes_tests(program: str, tests: str, *, seconds: float = 10.0, memory_bytes: int = 1 << 30) -> bool:
    """Whether a program followed by its tests runs to the end without an exception, in time and memory.

    A program that leaves early (`sys.exit(0)`) has not passed. The tests run in an empty temporary directory, with
    Python's isolated mode and without the environment of the caller.

    Args:
      program: Python source.
      tests: Python source that raises where something is wrong.
      seconds: until the process is killed.
      memory_bytes: address space of the process.
    """

    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "program.py").write_text(f"{program}\n\n{tests}\n", encoding="utf-8")
        token = secrets.token_hex(8)  # which the program is not told
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", _RUNNER.format(memory=memory_bytes)],
                cwd=place,
                env={"PATH": os.defpath, "HOME": place},
                input=token.encode(),
                capture_output=True,
                timeout=seconds,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.stdout.decode(errors="replace").rstrip().endswith(token)


def code_grader(*, seconds: float = 10.0):
    """A grader of code: `raw` of a record has `test` (with `entry_point`, as HumanEval) or `test_list` (as MBPP).

    Where the completion does not define `entry_point`, it goes on behind the prompt, as a base model writes it.
    """

    def grade(record: Mapping[str, Any], completion: str) -> tuple[bool, str | None]:
        line, code = record["raw"], code_of(completion)
        entry = line.get("entry_point")
        if entry and f"def {entry}" not in code:
            code = str(line.get("prompt", record["body"])) + completion
        tests = line["test"] if "test" in line else "\n".join([line.get("test_setup_code", ""), *line["test_list"]])
        right = passes_tests(code, f"{tests}\n\ncheck({entry})" if entry else tests, seconds=seconds)
        return right, "passes" if right else "fails"

    return grade
