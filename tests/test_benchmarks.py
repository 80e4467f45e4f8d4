"""The benchmarks run from start to table, in their smallest form, and say what they promise to say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def benchmark(name: str):
    """A benchmark as a module; the folder is not a package."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))  # for modules that benchmarks share
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where dataclasses look for it
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


@pytest.fixture
def beside_benchmarks(monkeypatch):
    """Their folder as Python has it when it runs one of them, and no interpreter of another project."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in ("TRL_PYTHON", "TUNIX_PYTHON"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.slow
def test_the_rollout_is_timed_beside_nobody(beside_benchmarks, tmp_path, capsys):
    written = tmp_path / "rollout.json"
    figures = benchmark("rollout").main(["--workload", "tiny", "--repetitions", "2", "--json", str(written)])
    assert json.loads(written.read_text()) == figures
    ours = figures["tiny"]["projects"]["jaxrl_llm"]
    assert ours["ratio"] == 1
    assert len(ours["all_seconds"]) == 2
    assert min(ours["seconds"], ours["first_token"], ours["first_call"], ours["peak_memory"]) > 0
    assert figures["tiny"]["rate_at_shape"] > 0
    shown = capsys.readouterr().out
    assert "transformers is left out: give --trl-python" in shown
    assert "tunix is left out: give --tunix-python" in shown


def test_an_interpreter_without_the_project_is_left_out(beside_benchmarks, capsys):
    broken = ["--trl-python", "/bin/false"]
    benchmark("rollout").main(["--workload", "--repetitions", "1", *broken])
    assert "transformers is left out: /bin/false cannot import trl" in capsys.readouterr().out


@pytest.mark.slow
def test_requests_of_skewed_lengths_keep_slots_busy(beside_benchmarks):
    sizes = ["--requests", "12", "--slots", "4", "--short", "2", "--long", "9", "--long-share", "0.3"]
    words = ["--workload", "--skewed", "--of", "tiny", "--repetitions", "1"]
    found = benchmark("rollout").main([*words, *sizes])["skewed"]
    batches, slots = found["cases"]["in batches"], found["cases"]["in slots"]
    assert batches["tokens"] == slots["tokens"] == sum(found["lengths"])
    assert slots["calls"] < batches["calls"]
    assert batches["utilisation"] < slots["utilisation"] <= 1


@pytest.mark.slow
def test_a_shared_prefill_is_that_of_one_sequence(beside_benchmarks):
    words = ["--workload", "--prompt", "24", "--samples", "4", "--of", "tiny", "--repetitions", "1"]
    found = benchmark("rollout").main(words)["prefill"]
    shared, single = found["one a prompt"], found["one a sample"]
    count = 4  # bytes of the one number that is not a row's: how far the cache is filled
    assert single["cache_bytes"] - count == 4 * (shared["cache_bytes"] - count)
    assert single["flops"] > 2 * shared["flops"]


@pytest.mark.slow
def test_a_training_step_is_timed(beside_benchmarks):
    figures = benchmark("step").main(["--workload", "tiny", "--repetitions", "1"])
    ours = figures["tiny"]["projects"]["jaxrl_llm"]
    assert ours["first_step"] > ours["seconds"] > 0
    assert figures["tiny"]["flops"] > 0


def test_a_worker_that_fails_says_why(beside_benchmarks, tmp_path):
    side_by_side = importlib.import_module("side_by_side")
    with pytest.raises(RuntimeError, match=r"(?s)the worker of jaxrl_llm ended.*config.json"):
        side_by_side.Worker("jaxrl_llm", "rollout", side_by_side.WORKLOADS["tiny"], tmp_path / "nothing")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [["1"], ["2"], ["2", "--apart"]])
def test_runs_that_are_killed_in_each_phase_are_equal(micro_yaml, capsys, processes):
    assert benchmark("kills").main([str(micro_yaml), "--kills", "4", "--processes", *processes]) == 0
    assert "runs differ" in capsys.readouterr().out


@pytest.mark.slow
def test_verifiers_and_a_judge_are_timed(capsys):
    assert benchmark("verifiers").main(["--completions", "32", "--judged", "16", "--latency", "0.02"]) == 0
    said = capsys.readouterr().out
    assert "endless: 0" in said
    assert "0 calls, nothing was" in said


@pytest.mark.slow
def test_the_demonstrations_of_rewards_that_train_nothing_run(tmp_path):
    demonstrations = benchmark("demonstrations/rewards")
    assert demonstrations.main(["tournament", "cycle", "--seeds", "1", "--output", str(tmp_path)]) == 0
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".svg"}
    entropy = json.loads((tmp_path / "cycle.json").read_text())["panels"]["entropy, nats"]
    assert entropy["SPO"][0][-1] > entropy["Bradley-Terry, fitted once"][0][-1]


@pytest.mark.slow
def test_packing_and_trimming_are_timed_beside_padding(tmp_path):
    written = tmp_path / "packing.json"
    sizes = {"rows": 4, "prompt": 16, "width": 16, "model-width": 16, "layers": 1, "batches": 2}
    figures = benchmark("packing").main(
        [part for name, value in sizes.items() for part in (f"--{name}", str(value))] + ["--json", str(written)]
    )
    assert json.loads(written.read_text()) == figures
    for name, one in figures.items():
        assert one["ratio"] > 0
        assert one["loss"][name] == pytest.approx(one["loss"]["padded"], rel=1e-5)


@pytest.mark.slow
def test_the_share_of_an_accelerators_limits_is_measured_in_its_smallest_form(tmp_path, capsys):
    sizes = {"rows": 8, "prompt": 16, "completion": 12, "update-rows": 8, "update-completion": 24, "microbatch": 4}
    few = sizes | {"side": 256, "copied": 2**20, "repetitions": 1}
    written = tmp_path / "figures.json"
    words = [word for name, size in few.items() for word in (f"--{name}", str(size))]
    figures = benchmark("accelerator").main(["--size", "tiny", *words, "--json", str(written)])
    assert json.loads(written.read_text())["decode"] == figures["decode"]
    assert figures["decode"][0]["share"] > 0
    assert 0 < figures["update"]["share"] < 2
    exact = {one["dtype"]: one["largest"] for one in figures["gap"]}
    assert exact["float32"] < 1e-5 < exact["bfloat16"]
    assert "share of bandwidth" in capsys.readouterr().out
