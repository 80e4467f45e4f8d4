"""The recipes of published methods: there is one for every method, it has its reference, and it trains."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import shipped
from jaxrl_llm.commands.data_preview import refusals
from jaxrl_llm.config import Config, parse_config, read_tree
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.losses import negative_log_likelihood
from jaxrl_llm.models.decoder import transformer
from jaxrl_llm.models.export import save_model
from jaxrl_llm.models.transformer_config import TransformerConfig
from jaxrl_llm.network_names import compared_with
from jaxrl_llm.rows import Written, demonstrations
from jaxrl_llm.run.batches import demonstration_batches, prompt_batches
from jaxrl_llm.run.explain import step_shapes
from jaxrl_llm.run.nonfinite import not_finite
from jaxrl_llm.run.problems import data_sets
from jaxrl_llm.run.setup import Parts, parts
from jaxrl_llm.run.staged import staged
from jaxrl_llm.run.stages import written_of
from jaxrl_llm.run.stored_answers import stored_answers
from jaxrl_llm.signatures import signature
from jaxrl_llm.training import make_train_step

VOCABULARY = CharacterTokenizer().vocabulary_size
FILES = {path.stem: path for path in shipped.method_files()}
RECIPES = sorted(FILES.keys() - {"base"})
# The others are trained by the slow tests.
AMONG_THE_FAST = ["grpo"]

# Recipes of several stages are trained as a whole in tests/run/test_written_recipes.py and test_across_stages.py.
TRAINED_ELSEWHERE = {
    "continual",
    "light_r1",
    "reward_model_then_rl",
    "rm_ensemble",
    "reward_robust",
    "process_reward_model",
    "unpacked_ppo",
    "rto",
}
TRAINED_ELSEWHERE |= {"llm_judge", "thought_judge", "generative_judge", "sotopia"}
# tests/run/test_hint_recipes.py
TRAINED_ELSEWHERE |= {"agent_rlvr", "compose", "dsp", "expo", "metacognitive_reuse", "mobile_r1"}
TRAINED_ELSEWHERE |= {"math_shepherd", "critique_rl", "generator_and_critic"}

# Every published method and its recipes.
METHODS = {
    "aggregation": ("grpo", "dapo", "dr_grpo", "bnpo", "rl_plus"),
    "REINFORCE": ("reinforce",),
    "RLOO": ("rloo",),
    "GRPO / Dr.GRPO": ("grpo", "dr_grpo"),
    "PPO+GAE": ("ppo",),
    "REINFORCE++": ("reinforce_plus_plus", "reinforce_plus_plus_baseline"),
    "DAPO": ("dapo",),
    "GSPO / GSPO-token": ("gspo", "gspo_token"),
    "CISPO": ("cispo",),
    "importance correction": ("tis",),
    "KL estimators": ("kl_estimators",),
    "f-divergences": ("vocabulary_js", "top_k_kl", "alpha_divergence"),
    "OPO, ReMax, pass@k, SAPO": ("opo", "remax", "pass_at_k", "sapo"),
    "GDPO": ("gdpo",),
    "DPH-RL": ("dph_f", "dph_js"),
    "RL-PLUS": ("rl_plus",),
    "StableReinforce": ("stable_reinforce",),
    "RiskPO": ("riskpo",),
    "Lp-Reg": ("lp_reg",),
    "MAPO": ("mapo", "mapo_batch", "mapo_turn"),
    "Credit of steps": ("igpo", "lare", "math_shepherd", "salt", "thought_process", "tree_rl", "vine_ppo"),
    "ProGRPO": ("progrpo",),
    "GRPO-lambda": ("grpo_lambda",),
    "DLER": ("dler",),
    "SAFE": ("safe",),
    "SPINE": ("spine",),
    "STEER": ("steer",),
    "DISPO": ("dispo",),
    "EPO": ("epo",),
    "PSR / NSR / W-REINFORCE": ("psr", "nsr", "weighted_reinforce"),
    "BNPO": ("bnpo",),
    "TOPR": ("topr",),
    "OREAL": ("oreal",),
    "AEPO": ("aepo",),
    "NFT": ("nft",),
    "REC / OPMD / AsymRE": ("rec", "opmd", "asymre"),
    "ReMix": ("remix",),
    "T1": ("t1",),
    "AMFT": ("amft",),
    "XRPO": ("xrpo",),
    "PF-PPO": ("pf_ppo",),
    "P3O": ("p3o",),
    "SPO": ("spo",),
    "HBPO": ("hbpo",),
    "ROVER": ("rover",),
    "DRPO": ("drpo",),
    "COPO": ("copo",),
    "VERL": ("verl",),
    "Reinforce-Ada": ("reinforce_ada",),
    "Knapsack RL": ("knapsack_rl",),
    "SCoRe": ("score",),
    "DPO": ("dpo", "dpo_norm", "r_dpo", "ld_dpo", "wpo"),
    "Token-level DPO": ("tdpo", "tgdpo"),
    "Noisy pairs": ("cdpo", "robust_dpo"),
    "Links": ("slic_hinge", "ipo", "exo", "discopop", "f_dpo", "aot"),
    "Anchored": ("nca", "apo_zero", "apo_down", "bco_pair"),
    "Likelihood beside": ("rpo", "vpo", "mpo"),
    "No reference": ("simpo", "alphapo", "cpo", "orpo"),
    "KTO": ("kto", "bco"),
    "Fresh pairs": ("online_dpo", "iterative_dpo", "tr_dpo", "rso"),
    "Reward models": ("outcome_reward_model", "helpsteer_regression", "plackett_luce", "multi_attribute"),
    "Reward models from pairs": ("basereward", "helpsteer_preference", "polar", "rewarddance", "pairwise_rl"),
    "Weak-to-strong": ("weak_to_strong",),
    "Two answers at once": ("pit_gap_model", "pit_improver", "pit", "goal_conditioned"),
    "RL against reward models": ("cooper", "unpacked_ppo", "rto"),
    "Self-play": ("sppo", "inpo", "dno", "spin"),
    "Opponents": ("nash_md", "xpo", "online_vpo"),
    "PRefLexOR": ("preflexor",),
    "Scored text": ("phf_conditional", "phf_filter", "phf_unlikelihood", "phf_rwr", "phf_awr"),
    "Judges of their own": ("spark", "urpo"),
    "KEPO": ("kepo",),
    "Dynamic reward weighting": ("drw_hypervolume", "drw_gradients"),
    "Bilevel": ("barfi", "parl"),
    "Value-augmented sampling": ("value_augmented_sampling",),
    "MOSS-RLHF": ("moss_contrastive", "meta_rm"),
    "Judges that write": ("webarbiter", "rm_nlhf", "unified_thinking"),
    "Critics": ("critique_rl", "critique_coder", "generator_and_critic"),
    "Regret": ("regret_preference",),
    "Robust values": ("riql",),
    "On-policy distillation": ("on_policy_distillation",),
    "Light-R1": ("light_r1",),
    "Bradley-Terry reward model": ("reward_model_then_rl",),
    "Meow-Tea-Taro": ("meow_tea_taro", "meow_tea_taro_budget", "meow_tea_taro_grpo"),
    "VeriFree": ("verifree",),
    "NOVER": ("nover",),
    "RLCR": ("rlcr",),
    "CURE": ("cure",),
    "SEC": ("sec",),
    "Curricula": (
        "annealed_hints",
        "competence",
        "craft_gui",
        "curr_reft",
        "medcco",
        "power_law_replay",
        "qweb",
        "sari",
    ),
    "DADS": ("dads",),
    "VAS": ("variance_aware_sampling",),
    "Pass rates": ("acereason", "guru", "learnability", "rif_rft"),
    "One-shot RLVR": ("one_shot_rlvr",),
    "TopoCurate": ("topocurate",),
    "Prefix-RFT": ("prefix_rft",),
    "ExPO": ("expo",),
    "R3L": ("r3l",),
    "CLEANER": ("cleaner",),
    "RL for machine-learning engineering": ("rl_mle",),
    "Agent-RLVR": ("agent_rlvr",),
    "Early abort": ("early_abort",),
    "ThreadWeaver": ("threadweaver",),
    "ReST-MCTS*": ("rest_mcts",),
    "Partial rollouts": ("partial_rollouts",),
    "Metacognitive reuse": ("metacognitive_reuse",),
    "Composition": ("compose",),
    "Directional stimulus prompting": ("dsp",),
    "UFT": ("uft",),
    "Self-reinforcement": ("self_reinforcement",),
    "Mobile-R1": ("mobile_r1",),
    "Model-task alignment": ("model_task_alignment",),
    "Dual-head distillation": ("dual_head",),
    "Templates": ("ppe", "prompt_augmentation", "re2"),
    "Co-Reward": ("co_reward",),
    "Verifiers": ("exact_match_f1", "format_think", "gui_g1", "light_if", "numeric_match", "ton"),
    "Gates": ("crm", "g_ra", "p_grpo", "sophia_trust", "videorft"),
    "Lengths": ("cosine_length", "kimi_length", "l1_exact", "l1_max", "observe_r1"),
    "Scales": ("armed", "clip_whiten", "job_reward", "medgrpo", "par"),
    "Ensembles": ("rm_ensemble", "reward_robust"),
    "Confidence": ("mmboundary", "scoring_rules"),
    "Noise": ("noisy_rewards", "reasoning_pattern"),
    "Steps": ("clip_delta", "pbrs", "verpo"),
    "Votes": ("ttrl", "ttrv", "empo", "evol_rl", "trapo"),
    "Certainty": ("intuitor", "entropy_minimisation", "urlvr"),
    "Likelihood": ("jepo", "likelihood_rewards", "rlp", "rlpr", "rmt"),
    "Step models": ("process_reward_model", "spa_rl"),
    "Distributions": ("hl_gauss", "quantile_critic", "reach_aware", "return_functional", "slim"),
    "Bonuses": ("multirole", "rep_exp", "srpo"),
    "GKD": ("gkd",),
    "Knowledge distillation": ("logit_distillation",),
    "DistiLLM": ("distillm",),
    "MiniLLM": ("minillm",),
    "Sequence-level distillation": ("sequence_distillation",),
    "Several teachers": ("several_teachers",),
    "Self-distillation": ("self_distillation",),
    "ReFT": ("reft",),
    "ReLIFT": ("relift",),
    "Supervised beside": ("supervised_beside", "srft"),
    "Self-training": ("raft", "rest", "b_star"),
    "Continual": ("continual",),
    "Priming": ("priming",),
    "DLER, difficulty-aware": ("difficulty_aware_dler",),
    "Judges": ("llm_judge", "tp_grpo", "sotopia", "generative_judge", "thought_judge", "calm"),
    "Scaffolds": ("rusca",),
    "Tool calls": ("toolrl",),
    "Detectors": ("t2i_hacking",),
    "Embeddings": ("vlm_rm",),
}
# Textbook methods, without a paper on arXiv.
WITHOUT_ARXIV = {"job_reward", "pbrs", "reinforce", "scoring_rules", "vocabulary_js", "top_k_kl", "alpha_divergence"}
WITHOUT_ARXIV |= {"t2i_hacking"}
WITHOUT_ARXIV |= {"r3l"}
WITHOUT_ARXIV |= {"supervised_beside", "annealed_hints", "competence", "learnability", "power_law_replay"}
STAGES = {
    "advantage",
    "policy loss",
    "regulariser",
    "optimisation",
    "baseline",
    "curriculum",
    "distillation",
    "hybrid",
    "sampling",
    "multi-turn",
    "preference loss",
    "prompt",
    "reward",
    "reward model",
}

# Micro tasks: (options of the task, longest prompt, longest completion).
MICRO: dict[str, tuple[dict[str, Any], int, int]] = {
    "addition": ({"levels": [1], "options": {"scratchpad": False}}, 7, 6),
    "bargaining": ({"levels": [2]}, 9, 40),
    "calculator": ({"levels": [1]}, 15, 64),
    "chain": ({"levels": [1], "options": {"direct_share": 0.5}}, 8, 12),
    "composition": ({"levels": [1]}, 14, 30),
    "countdown": ({"levels": [2], "options": {"scratchpad": False, "largest_number": 9}}, 12, 8),
    "grid": ({"levels": [1, 2], "options": {"size": 3}}, 22, 32),
    "function_calls": ({"levels": [1]}, 9, 22),
    "sorting": ({"levels": [3]}, 15, 12),
    "two_chains": ({"levels": [1], "options": {"parallel_share": 0.5}}, 12, 30),
    "self_correction": ({"levels": [1], "options": {"problem_options": {"scratchpad": False}}}, 7, 14),
}
# Too hard for the micro policy; the recipes of these tasks reward more than right answers.
UNSOLVED = {"sorting", "function_calls", "two_chains"}

# The columns of a line of a judged file, by the kind of the source.
JUDGED: dict[str, Any] = {
    "pairs": lambda one, other: (
        {"chosen": str(one + other), "rejected": str(one)} | {"margin": other, "reference": str(one + other)}
    ),
    "verdicts": lambda one, other: {"first": str(one + other), "second": str(one), "better": "first"},
    "labels": lambda one, other: {"completion": str(one + other % 2), "label": other < 2},
    "steps": lambda one, other: {"steps": [f"{one};", str(one + other % 2)], "labels": [1, int(other < 2)]},
    "rankings": lambda one, other: {"completions": [str(one + other), str(one + other + 1), str(one)]},
    "ratings": lambda one, other: (
        {"completion": str(one + other % 2), "rating": 4.0 - other % 5}
        | dict.fromkeys(("helpfulness", "verbosity"), other % 5)
    ),
    "distributions": lambda one, other: likely(str(one + other)),
}


def likely(text: str) -> dict[str, Any]:
    """A completion with a teacher's distributions of low entropy."""
    ids = CharacterTokenizer().completion_ids({"body": "", "item_id": 0}, text)
    return {
        "completion": text,
        "top_tokens": [[i, (i + 1) % 9] for i in ids],
        "top_logprobs": [[-0.1, -3.0]] * len(ids),
    }


def judged_file(kind: str, directory: str, most: int = 2) -> str:
    """8 x most lines."""
    path = Path(directory) / f"{kind}-{most}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = [(one, other) for one in range(1, 9) for other in range(1, most + 1)]
    lines = [{"prompt": f"A:{one}+{other}"} | JUDGED[kind](one, other) for one, other in pairs]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def checkpoint(directory: str) -> str:
    """A checkpoint of a model with other sizes than the micro policy."""
    path = Path(directory) / "checkpoint"
    if not path.exists():
        config = TransformerConfig(vocabulary_size=VOCABULARY, width=24, layers=2, heads=3, kv_heads=1)
        save_model(path, transformer(config).init(jax.random.key(7)), config)
    return str(path)


def supply(tree: dict[str, Any], data_directory: str, most: int = 2) -> None:
    """Name files of judged completions, and a checkpoint for each network with a path."""
    for part in (tree, *tree.get("stages", [])):
        sources = part.get("source", [])
        for source in sources if isinstance(sources, list) else [sources]:
            for name, hyper in source.items() if isinstance(source, dict) else ():
                if name in JUDGED:
                    hyper["file"] = judged_file(name, data_directory, most)
        for network in part.get("networks", {}).values():
            if "path" in network:
                network["path"] = checkpoint(data_directory)


def small(name: str, data_directory: str) -> dict[str, Any]:
    """A recipe for a micro model: the same method with fewer and shorter samples."""
    tree = read_tree(FILES[name])
    rollout, training = tree["rollout"], tree["training"]
    samples = min(rollout["samples_per_prompt"], 4)
    cuts = min(training.get("minibatches_per_epoch", 1), 2)
    plan = rollout.get("plan") or {}
    hints = plan.get("prefixes", {}).get("texts", []) if isinstance(plan, dict) else []
    hint = max(map(len, hints), default=0)
    task = tree["task"]["name"]
    chosen, longest_prompt, longest = MICRO[task]
    if tree["task"].get("options", {}).get("confidence"):
        chosen, longest = {**chosen, "options": {**chosen["options"], "confidence": True}}, longest + 4
    if asked := {name: v for name, v in tree["task"].get("options", {}).items() if name in ("claims", "attempts")}:
        chosen, longest_prompt = {**chosen, "options": asked}, longest_prompt + 4
    if tree.get("data", {}).get("selection"):  # several arms
        chosen, longest_prompt = {**chosen, "levels": [1, 2]}, longest_prompt + 2
    shown = [part.get("data", {}).get("templates", {}) for part in (tree, *tree.get("stages", []))]
    told = [stage.get("data", {}).get("privileged") or "" for stage in (tree, *tree.get("stages", []))]
    longest_prompt += max((40 for text in told if text), default=0)
    for text in (text for templates in shown for text in templates.values()):
        longest_prompt = max(longest_prompt, len(text) + 10 * text.count("{body}"))
    rollout |= {"samples_per_prompt": samples, "max_prompt_tokens": longest_prompt}
    rollout |= {"max_completion_tokens": longest + hint}
    if "environment" in tree:
        tree["environment"]["max_turn_tokens"] = 6
    training |= {"prompts_per_step": 4, "minibatches_per_epoch": cuts, "learning_rate": 0.01, "warmup_steps": 0}
    if training.get("freeze_policy_steps"):
        training["freeze_policy_steps"] = 1
    if training.get("alignment_every_steps"):
        training["alignment_every_steps"] = 2
    for tried in [plan, *(stage.get("rollout", {}).get("plan") or {} for stage in tree.get("stages", []))]:
        for hyper in tried.values() if isinstance(tried, dict) else ():
            hyper |= {"branches": min(hyper["branches"], samples - 1)} if "branches" in hyper else {}
            hyper |= {"tokens_per_step": rollout["max_completion_tokens"] - 1} if "tokens_per_step" in hyper else {}
            hyper |= {"branches": 2, "threads": 1} if "threads" in hyper else {}
            hyper |= {"first_samples": 2} if "first_samples" in hyper else {}
            hyper |= {"after_tokens": 2} if "after_tokens" in hyper else {}
    stages = tree.get("stages", [])
    for stage in stages:
        if "train_items" in stage.get("task", {}):
            stage["task"]["train_items"] = min(stage["task"]["train_items"], 64)
    if any("think" in stage.get("data", {}).get("response", "") for stage in stages):  # demonstrations of a scratch
        chosen = {**chosen, "options": {**chosen["options"], "scratchpad": True}}
        rollout["max_completion_tokens"] += 8
    sources = tree.get("source", ["sampler"])
    tree["source"] = sources if isinstance(sources, list) else [sources]
    for source in (*tree["source"], *(stage["source"] for stage in stages if "source" in stage)):
        for name, hyper in source.items() if isinstance(source, dict) else ():
            for size in hyper.keys() & {"sequences_per_step", "groups_per_step"}:
                hyper[size] = samples * cuts
            if name == "hardest":
                hyper["sequences_per_pass"] = samples * cuts
            if name == "solved_answers":  # the micro policy solves few prompts reliably
                hyper |= {"attempts": 1, "min_correct": 1}
    supply(tree, data_directory)
    for entry in tree["credit"]:
        if entry.get("well_formed") == "answer_format":  # the micro task has no think part
            entry["well_formed"] = {"answer_format": {"require_think": False}}
        for method in entry.values():
            if isinstance(method, dict) and "sample_budgets" in method:
                method["sample_budgets"]["samples_per_prompt"] = samples
            if isinstance(method, dict) and "item_numbers" in method:  # of another level
                method["item_numbers"]["values"]["1"] = [0.0, 0.5, 1.0]
    return tree | {
        "task": {"name": task, "train_items": 64, "validation_items": 4, "test_items": 4} | chosen,
        "data": tree.get("data", {}) | {"directory": data_directory},
        "warm_start": {"steps": 0},
        "model": {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1},
        "rollout": rollout,
        "training": training,
    }


@pytest.fixture(autouse=True, scope="module")
def quickly_compiled():
    """These tests spend most of their time in the compiler."""
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)


@pytest.fixture(scope="session")
def micro(data_directory):
    """A recipe's config at micro size, with overrides."""

    def make(name: str, *overrides: str) -> Config:
        return parse_config(small(name, data_directory), overrides, vocabulary_size=VOCABULARY)

    return make


@pytest.fixture(scope="session")
def policy(micro) -> Any:
    """Recipe -> parameters of a micro policy that gives some right answers and some wrong ones."""

    @functools.cache
    def trained_on(recipe: str) -> Any:
        built = parts(micro(recipe))
        losses = [negative_log_likelihood]
        step = make_train_step(built.model, optax.adam(0.02), source=Written(32), losses=losses)
        batches = demonstration_batches(built, data_sets(built.config)["train"], 32)
        state = step.init(jax.random.key(0))
        for index in range(64):
            state, _ = step(state, written=demonstrations(batches[index]))
        return jax.device_get(state.params)

    first_of = {
        "addition": "base",
        "bargaining": "mapo_turn",
        "calculator": "g_ra",
        "chain": "copo",
        "countdown": "psr",
        "grid": "meow_tea_taro_grpo",
        "self_correction": "score",
        "function_calls": "toolrl",
        "sorting": "verpo",
        "two_chains": "threadweaver",
    }

    def chosen(recipe: str) -> str:
        task = read_tree(FILES[recipe])["task"]
        # Recipes with another form of completions have a separate warm start.
        if task.get("options", {}).get("claims"):
            return "webarbiter"
        if task.get("options", {}).get("attempts"):
            return "critique_coder"
        return "rlcr" if task.get("options", {}).get("confidence") else first_of[task["name"]]

    return lambda recipe: trained_on(chosen(recipe))


def differ(one: Any, other: Any) -> bool:
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), jax.device_get(one), jax.device_get(other))
    return not all(jax.tree.leaves(same))


def trained(built: Parts, policy: Any, steps: int) -> tuple[Any, list[dict[str, Any]]]:
    """The state after some steps like those of a run, and the metrics of each step."""
    config, key = built.config, jax.random.key(0)
    data = data_sets(config)
    source: Any = data["train"]
    written = written_of(built, data)
    if asked := next((feed.stored for feed in built.feeds if feed.stored), None):
        kept = stored_answers(built, policy, source, key, **asked)
        source = [source[int(number)] for number in kept.explored]
        count, width = built.step.composition.written.rows, config.rollout.max_completion_tokens
        written = lambda step: kept.batch(key, step, count, answer_width=width)  # noqa: E731
    prompts = prompt_batches(built, source) if built.step.composition.rollout is not None else None
    state, seen = built.step.init(key, jax.tree.map(jnp.asarray, policy), built.given()), []
    for index in range(steps):
        given = (None, None) if prompts is None else (prompts[index].prompts, prompts[index].items)
        state, metrics = built.step(state, *given, written(index) if written else None)
        seen.append(jax.device_get(metrics))
    return state, seen


@pytest.mark.methods
@pytest.mark.parametrize(
    "name",
    [
        name if name in AMONG_THE_FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in RECIPES
        if name not in TRAINED_ELSEWHERE
    ],
)
def test_a_recipe_trains(name, micro, policy):
    start = policy(name)
    for built in stages_of(micro(name)):
        a_stage_trains(built, start)


def stages_of(config: Config) -> list[Parts]:
    return [stage["parts"] for stage in staged(config)]


def a_stage_trains(built: Parts, start: Any) -> None:
    state, seen = trained(built, start, 3)
    assert int(state.step) == 3
    for metrics in seen:
        assert {f"loss/{term.name}" for term in built.step.composition.losses} <= metrics.keys()
        assert not not_finite({label: float(value) for label, value in metrics.items()})
    if built.step.composition.rollout is not None and built.config.task.name not in UNSOLVED:
        assert 0 < sum(metrics["correct_share"] for metrics in seen) < 3, "the test needs right and wrong answers"
    if "gradient_norm" in seen[-1]:  # the policy is not updated while only a reward model is trained
        assert differ(state.params, start)
    else:
        assert built.step.composition.learning - {"policy"}
    learning = built.step.composition.learning
    assert {name for name, one in state.networks.items() if one.optimizer_state is not None} == {"policy", *learning}
    for name in learning - {"policy"}:
        params = state.networks[name].params
        assert np.abs(params["head"]["weight"]).max() > 0 if "head" in params else differ(params, start)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if number % 56 else name
        for number, name in enumerate(RECIPES)
        if name not in AMONG_THE_FAST
    ],
)
def test_a_recipe_is_composed_and_traced(name, micro):
    """Shapes of all arrays of a step, without running it. One of 56 is fast; test_config.py composes all."""
    reported = set()
    for built in stages_of(micro(name)):
        reported |= a_stage_is_traced(built)
    # Others are measured elsewhere: evaluations, episodes, and sources of data that a micro task lacks.
    shown = {
        metric
        for metric in read_tree(FILES[name])["shows"]
        if not metric.startswith(("validation/", "episode/", "source/"))
    }
    assert shown <= reported


def a_stage_is_traced(built: Parts) -> set[str]:
    """The names of the metrics of its steps."""
    c = built.step.composition
    _, metrics, rows = step_shapes(built)
    count = rows.tokens.shape[0]
    if c.rollout is None:
        assert count == c.written.rows
    else:
        assert count == c.plan.samples * (4 + c.plan.extra_groups(4))
        assert rows["rewards"].shape == rows["correct"].shape == (count,)
    for term in c.credit:
        for filled in (name for name in term.names if not name.startswith("metric/")):
            assert rows[filled].shape[0] == count
    # A loss reads outputs of the trained policy, or fields of the rows.
    known = set(rows.known()) | {"logprobs", "entropy", "values", "over_vocabulary", *c.learning}
    beside = (c.written.provides if c.written else set()) | ({"written_mask"} if c.written or c.hardest else set())
    beside |= {f"{name}_over_vocabulary" for name in c.networks}
    for term in c.losses:
        wanted = set(signature(term.function).required) - known - beside
        assert all(c.score(one) or compared_with(one) or one.startswith("router") for one in wanted), wanted
    return set(metrics)


@pytest.mark.slow
def test_steps_that_are_continued_may_be_read_from_text(micro, policy):
    steps = "{continued_steps: {choose: {step_borders: {pattern: '[0-9]'}}, continuations: 2, max_turns: 3}}"
    credit = "[{turn_labels: continuation_labels}, {advantages: step_value_gains}]"  # the plan provides `turn`
    built = parts(micro("vine_ppo", f"rollout.plan={steps}", f"credit={credit}"))
    _, seen = trained(built, policy("vine_ppo"), 3)
    assert all(step["seconds/turn"] > 0 < step["continued_tokens"] for step in seen)
    assert all(np.isfinite(step["loss"]) for step in seen)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_starts_as_it_is_shipped(name, data_directory):
    """Its own problems, demonstrations and limits are accepted; files of the user's own are supplied."""
    tree = read_tree(FILES[name])
    supply(tree, data_directory, 9)
    assert not refusals(parse_config(tree, vocabulary_size=VOCABULARY))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_where_it_comes_from(name):
    tree = read_tree(FILES[name])
    about = tree["about"]
    assert tree["name"] == name
    assert about["paper"]
    assert set(about["stage"].replace(" / ", " + ").split(" + ")) <= STAGES
    assert about["certainty"] in {"verified", "recalled", "reconstructed"}
    if name not in WITHOUT_ARXIV:
        assert re.fullmatch(r"\d{4}\.\d{5}", about["arxiv"])
    assert tree["shows"], "what should a user see move?"
    comment = [line for line in FILES[name].read_text().splitlines() if line.startswith("# ")]
    assert 2 <= len(comment) <= 4


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_its_method_itself(name):
    """Inherited losses of `base` would train without an error, so each other config must have its own losses."""
    own = FILES[name].read_text()
    assert re.search(r"^extends: (\.\./base|\.\./\.\./\w+|\w+)\.yaml$", own, re.M)
    found = set(re.findall(r"^(credit|losses|rewards):", own, re.M))
    assert {"credit", "losses"} <= found if "extends: ../base" in own else found


def test_every_method_has_a_recipe():
    assert {name for recipes in METHODS.values() for name in recipes} == set(RECIPES)


def hyper_parameters(tree: Any) -> list[tuple[str, Any]]:
    """All (name, value) pairs of a recipe, at any depth."""
    if isinstance(tree, dict):
        return [*tree.items(), *(pair for value in tree.values() for pair in hyper_parameters(value))]
    return [pair for value in tree for pair in hyper_parameters(value)] if isinstance(tree, list) else []


@pytest.mark.parametrize("name", sorted({*RECIPES} - {"nft"}))  # its constant is a scale and not a length
def test_sizes_that_a_method_repeats_are_those_of_the_recipe(name):
    tree = read_tree(FILES[name])
    samples = tree["rollout"]["samples_per_prompt"]
    sizes = {
        "max_completion_tokens": tree["rollout"]["max_completion_tokens"],
        "samples_per_prompt": samples,
        "sequences_per_step": samples * tree["training"]["prompts_per_step"],
        "total_steps": tree["training"]["steps"],
    }
    for key, value in hyper_parameters([tree["credit"], tree["losses"]]):
        assert value == sizes.get(key, value), key


DIVERGENCE = "losses=[clipped_surrogate, {divergence: {%s}}]"


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        # an unknown generator
        ("vocabulary_js", DIVERGENCE % "generator: jensen_shanon", "'jensen_shanon'.*did you mean 'jensen_shannon'"),
        ("dph_f", "losses=[{rehearsal_divergence: {generator: forward}}]", "'forward'.*did you mean 'forward_kl'"),
        # gradient forms that do not fit the origin of the tokens
        (
            "vocabulary_js",
            DIVERGENCE % "samples: vocabulary, gradient: score_function",
            "'score_function', which does not exist for samples='vocabulary'; it must be one of exact",
        ),
        (
            "alpha_divergence",
            DIVERGENCE % "samples: policy, gradient: exact",
            "'exact', which does not exist for samples='policy'; it must be one of score_function, importance_corr",
        ),
        ("top_k_kl", DIVERGENCE % "samples: vocabulary, k: 16", "k is 16, but samples='vocabulary'.*leave k out"),
        ("top_k_kl", DIVERGENCE % "generator: renyi, samples: policy", "use samples='vocabulary' or 'top_k'"),
        # numbers out of their range
        ("vocabulary_js", DIVERGENCE % "generator: jensen_shannon, mixture: 1.5", "mixture is 1.5;.*between 0 and 1"),
        ("alpha_divergence", DIVERGENCE % "generator: alpha, alpha: 1", "alpha is 1.0;.*other than 0 and 1"),
        ("top_k_kl", DIVERGENCE % "samples: top_k, k: 0", "k is 0; it must be at least 1"),
        (
            "kl_estimators",
            DIVERGENCE % "coefficient: {adaptive_kl: {sequences_per_step: 16, init: -1.0}}",
            r"losses\.divergence\.coefficient\.adaptive_kl\.init is -1.0; it must be above 0",
        ),
        ("remix", "source=[sampler, {replay: {share: 1.5}}]", r"replay.share is 1.5;.*\(0, 1\)"),
        ("t1", "networks.reference.decay=1.5", r"networks\.\*\.decay is 1.5;.*\[0, 1\]"),
        ("safe", "networks.twin_target.decay=-1", r"networks\.\*\.decay is -1.0;.*\[0, 1\]"),
        # fields without a provider
        ("grpo", "credit=[]", "loss 'clipped_surrogate' names 'advantages'.*add an entry to credit that fills it"),
        ("dph_f", "source=sampler", "names 'stored_logprobs'.*source: demonstrations, solved_answers or a file"),
        ("aepo", "rollout.plan=null", r"names 'extra'.*rollout\.plan: mixed_temperature"),
        ("copo", "credit=[advantages: group_normalized]", "names 'global_advantages', which nothing in this step"),
        ("spine", "credit=[rewards: majority_match]", "'majority_match' names 'answer_id', which nothing in this step"),
        ("sec", "credit=[turn_rewards: {reference_progress: {max_turns: 2}}]", "names 'turn'.*turn: separated_turns"),
    ],
)
def test_a_recipe_that_cannot_be_composed_is_refused(name, override, message, micro):
    with pytest.raises(ValueError, match=message):
        parts(micro(name, override))


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("dapo", "losses=[{clipped_surrogate: {clip_low: -0.2}}]", "clipped_surrogate.clip_low is -0.2; .* at least 0"),
        ("reinforce_plus_plus", "credit=[advantages: {reinforce_plus_plus: {gamma: 1.5}}]", "gamma is 1.5"),
    ],
)
def test_what_only_the_arrays_of_a_step_can_tell_is_refused_before_anything_is_computed(name, override, message, micro):
    with pytest.raises(ValueError, match=message):
        step_shapes(parts(micro(name, override)))
