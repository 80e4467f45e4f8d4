"""The benchmarks run from start to table, in their smallest form, and say what they promise to say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def benchmark(name: str):
    """A benchmark as a module; the folder is no package."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_comparison_of_divergences_runs_and_writes_every_variant(tmp_path, monkeypatch, data_directory, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", data_directory)
    divergences = benchmark("divergences")
    written = tmp_path / "rows.json"
    variants = ["reverse KL", "Jensen-Shannon"]  # without and with rehearsal
    rows = divergences.main(["--quick", "--variants", *variants, "--json", str(written)])
    assert json.loads(written.read_text())["rows"] == rows
    assert [row["variant"] for row in rows] == [divergences.BEFORE, *variants]
    assert all(0 <= row["pass@1"] <= row["pass@8"] <= 1 for row in rows)
    shown = capsys.readouterr().out
    assert all(f"seed 0, {variant}" in shown for variant in variants)
    again = divergences.main(["--quick", "--variants", *variants, "--read", str(written)])
    assert again == rows  # nothing was lacking, so nothing was run
    assert "seed 0" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        divergences.main(["--read", str(written)])
    assert "was measured with steps 2" in capsys.readouterr().err


def test_the_plot_shows_every_variant(tmp_path):
    divergences = benchmark("divergences")
    rows = [
        {"seed": seed, "variant": variant, "pass@1": 0.2 + 0.1 * seed, "pass@8": 0.8}
        for seed in range(2)
        for variant in (divergences.BEFORE, *divergences.VARIANTS)
    ]
    figure = tmp_path / "figure.png"
    divergences.plot(rows, [1, 8], figure)
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_cost_of_a_divergence_over_the_vocabulary_is_measured(tmp_path, monkeypatch, capsys):
    costs = benchmark("vocabulary_divergence")
    written = tmp_path / "costs.json"
    sizes = {"vocabulary": 300, "width": 16, "layers": 1, "heads": 2, "rows": 4, "completion-tokens": 8}
    words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    costs.main([*words, "--repetitions", "2", "--top-k", "8", "--json", str(written)])
    table = json.loads(written.read_text())["table"]
    assert [row["case"] for row in table] == ["without", "sampled", "exact, reverse_kl", "top 8", costs.REFERENCE]
    # A batch as small as this is one chunk, so the array is there and must be reported.
    assert all(row["seconds"] > 0 and row["whole_array_in_program"] for row in table)
    assert "adds" in capsys.readouterr().out
