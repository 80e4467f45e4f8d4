"""Running a completion's code with its unit tests, in a process of its own with a deadline.

The process is a guard against endless loops, memory and exits, and no sandbox: it may read and write what the user may.
Run completions of a model that is not trusted in a container.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_PASSED = "every unit test has passed"


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

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 24, 1 << 24))

    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "program.py"
        file.write_text(f"{program}\n\n{tests}\n\nprint({_PASSED!r})\n", encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(file)],
                cwd=place,
                env={"PATH": os.defpath, "HOME": place},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=seconds,
                preexec_fn=bounded,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0 and done.stdout.decode(errors="replace").rstrip().endswith(_PASSED)


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
