"""Fuzzed configs."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from fuzzed.mutations import Case, damaged, mutated, paths, strange

ROOT = Path(__file__).parents[2]


def configs(random_: random.Random, folder: Path) -> Callable[[int], Case]:
    """Shipped configs, changed as text, as a tree, or by overrides."""
    import yaml

    from jaxrl_llm.commands.arguments import loaded_config
    from jaxrl_llm.config import read_tree
    from jaxrl_llm.run.setup import parts
    from jaxrl_llm.run.staged import last_stage

    shipped = sorted((ROOT / "configs").rglob("*.yaml"))
    trees = [read_tree(path) for path in shipped]
    names = tuple(sorted({key for tree in trees for path in paths(tree) for key in path if isinstance(key, str)}))
    file, dumper = folder / "fuzzed.yaml", getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    shutil.copytree(ROOT / "configs", folder / "configs")

    def case(number: int) -> Case:
        chosen = random_.randrange(len(shipped))
        way, overrides = random_.random(), []
        if way < 0.25:
            content = damaged(random_, shipped[chosen].read_bytes())
            written = folder / "configs" / shipped[chosen].relative_to(ROOT / "configs").parent / "fuzzed.yaml"
        else:
            tree = mutated(random_, trees[chosen], names) if way < 0.8 else trees[chosen]
            content = yaml.dump(tree, Dumper=dumper, allow_unicode=True).encode("utf-8", "replace")
            written = file
            if way >= 0.8:
                path = list(random_.choice(list(paths(tree))))
                if random_.random() < 0.3:
                    path.append(random_.choice(names))
                value = yaml.safe_dump(strange(random_, tree), default_flow_style=True).removesuffix("\n...\n")
                overrides = [f"{'.'.join(map(str, path))}={value}"]

        def run() -> None:
            written.write_bytes(content)
            parts(last_stage(loaded_config([str(written), *overrides])))

        return Case(f"configs {number}: {shipped[chosen].name} {overrides}", run)

    return case
