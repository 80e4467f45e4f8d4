"""From completions to rewards: verifiers inside the program and on the host, shaping, combination."""

from __future__ import annotations

from jaxrl_llm.rewards.combination.columns import reward_column
from jaxrl_llm.rewards.combination.dominated_volume import dominated_volume, hypervolume_guided
from jaxrl_llm.rewards.combination.gates import (
    concise_correctness,
    gated_sum,
    length_conciseness,
    outcome_gated_sum,
    trusted_sum,
)
from jaxrl_llm.rewards.combination.sums import annealed_sum, blended_rewards, ensemble_score, floored_sum
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
from jaxrl_llm.rewards.intrinsic.likelihood_gains import likelihood_gain
from jaxrl_llm.rewards.intrinsic.novelty import (
    leverage_bonus,
    majority_novelty,
    mean_hidden,
    nearness_to_success,
    ngram_counts,
)
from jaxrl_llm.rewards.intrinsic.perplexity import perplexity_ranks, reasoning_perplexity
from jaxrl_llm.rewards.intrinsic.privileged import answer_in_prompt, own_prompt
from jaxrl_llm.rewards.intrinsic.thoughts import (
    answer_after_thought,
    answer_without_thought,
    thought_length,
    thought_mask,
)
from jaxrl_llm.rewards.intrinsic.trusted_prompts import known_share, trusted_trajectories
from jaxrl_llm.rewards.intrinsic.turn_answers import answer_after_turns
from jaxrl_llm.rewards.intrinsic.votes import (
    answer_frequency,
    collective_match,
    labelled_or_voted,
    majority_match,
    paired_majority_match,
    semantic_entropy,
)
from jaxrl_llm.rewards.judges.asked import Judge, JudgeError
from jaxrl_llm.rewards.judges.judged_turns import judge_turns
from jaxrl_llm.rewards.judges.ratings import expected_rating, judge_rating, judge_rubric, stated_rating
from jaxrl_llm.rewards.judges.reward_models import learned_reward, robust_score, step_value
from jaxrl_llm.rewards.judges.tournaments import judge_tournament
from jaxrl_llm.rewards.judges.verdict_rewards import (
    attribute_reward,
    closer_than_opponent,
    critique_overlap,
    critique_reward,
    differing_answers,
    ranking_agreement,
    right_verdict,
    stated_verdict,
    verdict_agreement,
    verdict_question,
)
from jaxrl_llm.rewards.judges.verdict_tokens import filled_text, judged_example, unbiased_comparison, verdict_score
from jaxrl_llm.rewards.judges.written_rubrics import contrastive_rubrics
from jaxrl_llm.rewards.process.attributed_turns import attributed_turns, subgoal_rewards
from jaxrl_llm.rewards.process.rare_tests import weighted_tests
from jaxrl_llm.rewards.process.step_borders import step_borders
from jaxrl_llm.rewards.process.step_scores import (
    added_span_rewards,
    aggregated_steps,
    continuation_labels,
    duration_weights,
    labels_at_ends,
    milestone_reward,
    progress_attribution,
    step_end_scores,
)
from jaxrl_llm.rewards.process.step_shaping import accumulated_potentials, clipped_delta, potential_shaped
from jaxrl_llm.rewards.process.turn_rewards import (
    episode_reward,
    normalized_turn_rewards,
    reference_progress,
    self_correction_rewards,
    separated_turns,
    turn_count,
    turn_end_rewards,
)
from jaxrl_llm.rewards.process.turn_tokens import transition_ids, turn_marks
from jaxrl_llm.rewards.shaping.bounded import (
    clipped_rewards,
    percentile_bounded,
    reference_bounded,
    running_normalized,
    whitened_rewards,
)
from jaxrl_llm.rewards.shaping.calibration import (
    calibrated_correctness,
    proper_score,
    step_calibration,
)
from jaxrl_llm.rewards.shaping.correct_length import (
    cosine_length,
    length_band_bonus,
    repetition_penalty,
    shortest_right_bonus,
    target_length,
)
from jaxrl_llm.rewards.shaping.difficulty import difficulty_truncation
from jaxrl_llm.rewards.shaping.length_limit import shrinking_budget_length, soft_overlong, truncation_zero
from jaxrl_llm.rewards.shaping.noisy import flipped_rewards, pattern_calibrated, spurious_rewards
from jaxrl_llm.rewards.shaping.parallel_paths import accelerated, longest_path, with_threads
from jaxrl_llm.rewards.shaping.projected_similarity import projected_similarity
from jaxrl_llm.rewards.shaping.relative_length import relative_length_rewards
from jaxrl_llm.rewards.shaping.similarity_scale import sharpened_scores, stretched_scores
from jaxrl_llm.rewards.verifiers.answers import (
    answer_format,
    answer_ids,
    answer_present,
    answer_span,
    answer_token_tests,
    exact_answer,
    paired_answer_ids,
)
from jaxrl_llm.rewards.verifiers.behaviours import behaviour_counts
from jaxrl_llm.rewards.verifiers.boxes import box_match, span_overlap, vector_closeness
from jaxrl_llm.rewards.verifiers.graded_programs import graded_programs
from jaxrl_llm.rewards.verifiers.keywords import keyword_rewards
from jaxrl_llm.rewards.verifiers.latex_answers import latex_match
from jaxrl_llm.rewards.verifiers.lexical_diversity import lexical_diversity
from jaxrl_llm.rewards.verifiers.numbers import extract_number, number_match, parsed_number
from jaxrl_llm.rewards.verifiers.reasoning_phrases import reasoning_patterns
from jaxrl_llm.rewards.verifiers.stated_confidence import stated_confidence
from jaxrl_llm.rewards.verifiers.text_answers import (
    answer_order_share,
    answer_position_share,
    column_share,
    countdown,
    exact_match,
    extract_answer,
    item_numbers,
)
from jaxrl_llm.rewards.verifiers.text_formats import instructions_kept, pattern_match, schema_match, tag_format
from jaxrl_llm.rewards.verifiers.text_similarity import choice_match, relative_error, text_similarity, word_match
from jaxrl_llm.rewards.verifiers.tool_calls import tool_calls_match
from jaxrl_llm.rewards.verifiers.turn_formats import turn_format_reward
from jaxrl_llm.rewards.verifiers.unit_tests import unit_tests
from jaxrl_llm.rewards.verifiers.voted_answers import voted_answer

__all__ = [
    "Guarded",
    "Judge",
    "JudgeError",
    "RewardError",
    "accelerated",
    "accumulated_potentials",
    "added_span_rewards",
    "aggregated_steps",
    "annealed_sum",
    "answer_after_thought",
    "answer_after_turns",
    "answer_format",
    "answer_frequency",
    "answer_ids",
    "answer_in_prompt",
    "answer_likelihood",
    "answer_order_share",
    "answer_position_share",
    "answer_present",
    "answer_span",
    "answer_token_tests",
    "answer_without_thought",
    "attribute_reward",
    "attributed_turns",
    "behaviour_counts",
    "blended_rewards",
    "box_match",
    "calibrated_correctness",
    "checked_host_reward",
    "choice_match",
    "clipped_delta",
    "clipped_rewards",
    "closer_than_opponent",
    "collective_match",
    "column_share",
    "concise_correctness",
    "continuation_labels",
    "contrastive_rubrics",
    "cosine_length",
    "count_bonus",
    "countdown",
    "coverage_gains",
    "critique_overlap",
    "critique_reward",
    "differing_answers",
    "difficulty_truncation",
    "dominated_volume",
    "duration_weights",
    "elliptical_bonus",
    "ensemble_score",
    "episode_reward",
    "exact_answer",
    "exact_match",
    "expected_rating",
    "extract_answer",
    "extract_number",
    "filled_text",
    "flipped_rewards",
    "floored_sum",
    "gated_sum",
    "graded_programs",
    "hypervolume_guided",
    "instructions_kept",
    "item_numbers",
    "judge_rating",
    "judge_rubric",
    "judge_tournament",
    "judge_turns",
    "judged_example",
    "keyword_rewards",
    "known_share",
    "labelled_or_voted",
    "labels_at_ends",
    "latex_match",
    "learned_reward",
    "length_band_bonus",
    "length_conciseness",
    "leverage_bonus",
    "lexical_diversity",
    "likelihood_gain",
    "longest_path",
    "majority_match",
    "majority_novelty",
    "mean_hidden",
    "milestone_reward",
    "nearness_to_success",
    "negative_entropy",
    "ngram_counts",
    "normalized_turn_rewards",
    "number_match",
    "outcome_gated_sum",
    "own_prompt",
    "paired_answer_ids",
    "paired_majority_match",
    "parsed_number",
    "pattern_calibrated",
    "pattern_match",
    "percentile_bounded",
    "perplexity_ranks",
    "potential_shaped",
    "progress_attribution",
    "projected_similarity",
    "proper_score",
    "ranking_agreement",
    "reasoning_patterns",
    "reasoning_perplexity",
    "reference_bounded",
    "reference_progress",
    "relative_error",
    "relative_length_rewards",
    "repetition_penalty",
    "reward_column",
    "right_verdict",
    "robust_score",
    "running_normalized",
    "schema_match",
    "self_correction_rewards",
    "semantic_entropy",
    "separated_turns",
    "sequence_likelihood",
    "sharpened_scores",
    "shortest_right_bonus",
    "shrinking_budget_length",
    "soft_overlong",
    "span_overlap",
    "spurious_rewards",
    "stated_confidence",
    "stated_rating",
    "stated_verdict",
    "step_borders",
    "step_calibration",
    "step_end_scores",
    "step_value",
    "stretched_scores",
    "subgoal_rewards",
    "tag_format",
    "target_length",
    "text_similarity",
    "thought_length",
    "thought_mask",
    "token_mean",
    "tool_calls_match",
    "transition_ids",
    "truncation_zero",
    "trusted_sum",
    "trusted_trajectories",
    "turn_count",
    "turn_end_rewards",
    "turn_format_reward",
    "turn_marks",
    "unbiased_comparison",
    "unit_tests",
    "vector_closeness",
    "verdict_agreement",
    "verdict_question",
    "verdict_score",
    "vocabulary_certainty",
    "voted_answer",
    "weighted_sum",
    "weighted_tests",
    "whitened_rewards",
    "with_threads",
    "word_match",
]
