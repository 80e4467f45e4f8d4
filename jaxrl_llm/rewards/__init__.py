"""From completions to rewards: verifiers inside the program and on the host, shaping, combination."""

from __future__ import annotations

from jaxrl_llm.rewards.combination.consistency import consistent_accuracy
from jaxrl_llm.rewards.combination.weighted_sum import weighted_sum
from jaxrl_llm.rewards.guarded import Guarded
from jaxrl_llm.rewards.host import RewardError, checked_host_reward
from jaxrl_llm.rewards.intrinsic.answer_likelihood import answer_likelihood
from jaxrl_llm.rewards.intrinsic.certainty import (
    negative_entropy,
    sequence_likelihood,
    token_mean,
    vocabulary_certainty,
)
from jaxrl_llm.rewards.intrinsic.exploration import count_bonus, coverage_gains, elliptical_bonus
from jaxrl_llm.rewards.intrinsic.novelty import (
    leverage_bonus,
    majority_novelty,
    mean_hidden,
    nearness_to_success,
    ngram_counts,
)
from jaxrl_llm.rewards.intrinsic.perplexity import perplexity_ranks, reasoning_perplexity
from jaxrl_llm.rewards.intrinsic.thoughts import answer_after_thought, thought_length, thought_mask
from jaxrl_llm.rewards.intrinsic.trusted_prompts import known_share, trusted_trajectories
from jaxrl_llm.rewards.intrinsic.votes import (
    answer_frequency,
    collective_match,
    labelled_or_voted,
    majority_match,
    paired_majority_match,
    semantic_entropy,
)
from jaxrl_llm.rewards.judges.asked import Judge, JudgeError
from jaxrl_llm.rewards.judges.ratings import expected_rating, judge_rating, judge_rubric, stated_rating
from jaxrl_llm.rewards.judges.reward_models import learned_reward
from jaxrl_llm.rewards.judges.tournaments import judge_tournament
from jaxrl_llm.rewards.process.step_borders import step_borders
from jaxrl_llm.rewards.process.turn_rewards import (
    episode_reward,
    normalized_turn_rewards,
    reference_progress,
    self_correction_rewards,
    separated_turns,
    turn_end_rewards,
)
from jaxrl_llm.rewards.shaping.calibration import calibrated_correctness
from jaxrl_llm.rewards.shaping.length_limit import soft_overlong, truncation_zero
from jaxrl_llm.rewards.shaping.relative_length import relative_length_rewards
from jaxrl_llm.rewards.verifiers.answers import (
    answer_format,
    answer_ids,
    answer_present,
    answer_span,
    exact_answer,
    paired_answer_ids,
)
from jaxrl_llm.rewards.verifiers.latex_answers import latex_match
from jaxrl_llm.rewards.verifiers.lexical_diversity import lexical_diversity
from jaxrl_llm.rewards.verifiers.numbers import extract_number, number_match, parsed_number
from jaxrl_llm.rewards.verifiers.stated_confidence import stated_confidence
from jaxrl_llm.rewards.verifiers.text_answers import (
    answer_order_share,
    answer_position_share,
    column_share,
    countdown,
    exact_match,
    extract_answer,
)
from jaxrl_llm.rewards.verifiers.voted_answers import voted_answer

__all__ = [
    "Guarded",
    "Judge",
    "JudgeError",
    "RewardError",
    "answer_after_thought",
    "answer_format",
    "answer_frequency",
    "answer_ids",
    "answer_likelihood",
    "answer_order_share",
    "answer_position_share",
    "answer_present",
    "answer_span",
    "calibrated_correctness",
    "checked_host_reward",
    "collective_match",
    "column_share",
    "consistent_accuracy",
    "count_bonus",
    "countdown",
    "coverage_gains",
    "elliptical_bonus",
    "episode_reward",
    "exact_answer",
    "exact_match",
    "expected_rating",
    "extract_answer",
    "extract_number",
    "judge_rating",
    "judge_rubric",
    "judge_tournament",
    "known_share",
    "labelled_or_voted",
    "latex_match",
    "learned_reward",
    "leverage_bonus",
    "lexical_diversity",
    "majority_match",
    "majority_novelty",
    "mean_hidden",
    "nearness_to_success",
    "negative_entropy",
    "ngram_counts",
    "normalized_turn_rewards",
    "number_match",
    "paired_answer_ids",
    "paired_majority_match",
    "parsed_number",
    "perplexity_ranks",
    "reasoning_perplexity",
    "reference_progress",
    "relative_length_rewards",
    "self_correction_rewards",
    "semantic_entropy",
    "separated_turns",
    "sequence_likelihood",
    "soft_overlong",
    "stated_confidence",
    "stated_rating",
    "step_borders",
    "thought_length",
    "thought_mask",
    "token_mean",
    "truncation_zero",
    "trusted_trajectories",
    "turn_end_rewards",
    "vocabulary_certainty",
    "voted_answer",
    "weighted_sum",
]
