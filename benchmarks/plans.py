"""Training steps compiled ahead of time for TPU pods: memory and time, for the table of docs/plans.md.

python benchmarks/plans.py               # needs libtpu; about twenty minutes on two cores
python benchmarks/plans.py gemma3_27b    # one of them
python benchmarks/plans.py --estimate    # estimates from sizes without compilation, in half a minute
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from jaxrl_llm.config import load_config
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.planning.run_plan import plan

CONFIGS = Path(__file__).parents[1] / "configs"
GIB = 2**30
# (config, overrides, machine)
PLANS = (
    ("demo.yaml", (), "v5e:2x2"),
    ("plans/qwen3_8b.yaml", (), "v5e-64"),
    ("plans/qwen3_8b.yaml", ("mesh.tensor=4",), "v5p-64"),
    ("plans/llama3_70b.yaml", (), "v5p-256"),
    ("plans/qwen3_30b_a3b.yaml", (), "v6e-64"),
    ("plans/gemma3_27b.yaml", (), "v5p-64"),
    ("plans/gemma4_31b.yaml", (), "v5p-128"),
    ("plans/olmo3_32b.yaml", (), "v5p-64"),
    ("plans/gpt_oss_20b.yaml", (), "v6e-64"),
    ("plans/qwen3_5_9b.yaml", (), "v6e-64"),
    ("plans/qwen3_5_35b_a3b.yaml", (), "v6e-64"),
    ("plans/qwen3_next_80b_a3b.yaml", (), "v5p-128"),
    ("plans/glm4_5.yaml", (), "v5p-256"),
    ("plans/deepseek_v3.yaml", (), "v5p-512"),
)


def rows_of(found: dict[str, Any], overrides: tuple[str, ...]) -> list[str]:
    """The plan as two lines: memory, and time by phase."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    needs = " / ".join(f"{program['memory_bytes'] / GIB:.1f}" for program in found["programs"])
    seconds = sum(program["compile_seconds"] for program in found["programs"])
    config = " ".join([f"`{found['config']}`", *(f"`{override}`" for override in overrides)])
    memory = (config, found["topology"], str(found["devices"]), mesh, needs, f"{found['device_bytes'] / GIB:.1f}")
    phases = {phase["phase"]: phase for phase in found["phases"]}
    times = [
        f"{phases[name]['seconds']:.2f} ({phases[name]['bound']})" if name in phases else ""
        for name in ("prefill", "decode", "reference", "update")
    ]
    sent = sum(phases["update"]["collectives"].values()) / 1e9
    fits = "yes" if found["fits"] else "NO"
    return [
        "| " + " | ".join((*memory, fits, f"{seconds:.0f}")) + " |",
        "| " + " | ".join((config, found["topology"], *times, f"{sent:,.1f}")) + " |",
    ]


def estimated_row(found: dict[str, Any]) -> str:
    """The plan as one line: GiB in each phase and in the evaluation, estimated from sizes."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    held = {one.get("phase") or one["program"]: one["memory_bytes"] for one in (*found["phases"], *found["programs"])}
    names = ("prefill", "decode", "reference", "update", "evaluation")
    needs = [f"{held[name] / GIB:.1f}" if name in held else "" for name in names]
    room, fits = f"{found['device_bytes'] / GIB:.1f}", "yes" if found["fits"] else "NO"
    return "| " + " | ".join((f"`{found['config']}`", found["topology"], mesh, *needs, room, fits)) + " |"


def main(words: list[str] | None = None) -> list[dict[str, Any]]:
    """Compile all plans and print two tables and the versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="configs, without .yaml (default: all)")
    parser.add_argument("--estimate", action="store_true", help="compile nothing")
    parser.add_argument("--json", type=Path, help="also write the plans to this file")
    options = parser.parse_args(words)
    if unknown := {*options.names} - {Path(name).stem for name, _, _ in PLANS}:
        parser.error(f"no plan of {sorted(unknown)}; there are {sorted({Path(name).stem for name, _, _ in PLANS})}")
    plans, first, second = [], [], []
    for name, overrides, machine in PLANS:
        if options.names and Path(name).stem not in options.names:
            continue
        config = load_config(CONFIGS / name, list(overrides), vocabulary_size=CharacterTokenizer().vocabulary_size)
        report = lambda line: print(line, file=sys.stderr)  # noqa: E731
        found = plan(config, machine, compile_programs=not options.estimate, report=report)
        if options.estimate:
            plans.append(found)
            first.append(estimated_row(found))
            continue
        if found["method"] != "compiled":
            raise SystemExit(f"{name} on {machine} was not compiled: {found['note']}")
        memory, times = rows_of(found, overrides)
        plans.append(found)
        first.append(memory)
        second.append(times)
    if options.json:
        options.json.write_text(json.dumps(plans, indent=2))
    if options.estimate:
        print("| config | machine | mesh | prefill | decode | reference | update | evaluation | of GiB | fits |")
        print("|---|---|---|---|---|---|---|---|---|---|", *first, sep="\n")
        return plans
    print("| config | machine | devices | mesh | GiB: collect / learn | of | fits | compiled in s |")
    print("|---|---|---|---|---|---|---|---|", *first, sep="\n")
    print("\n| config | machine | prefill s | decode s | reference s | update s | update sends GB |")
    print("|---|---|---|---|---|---|---|", *second, sep="\n")
    print("\n" + ", ".join(f"{name} {version}" for name, version in plans[0]["versions"].items()))
    return plans


if __name__ == "__main__":
    main()
