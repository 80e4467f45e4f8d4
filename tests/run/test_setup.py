"""What is built from a config before compute is spent."""

import numpy as np
import pytest

from jaxrl_llm.config import parse_config
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.experience import Source
from jaxrl_llm.run.setup import data_sets, demonstration_batches, encoded, parts, prompt_batches

VOCABULARY = CharacterTokenizer().vocabulary_size


def test_a_held_out_prompt_that_does_not_fit_is_named(micro_config):
    config = parse_config(micro_config, ["rollout.max_prompt_tokens=7"], vocabulary_size=VOCABULARY)
    with pytest.raises(ValueError, match="7"):  # two digits and two digits make nine tokens
        encoded(parts(config), data_sets(config)["test"])


def test_or_is_left_out_where_the_config_says_so(micro_config):
    changes = ["rollout.max_prompt_tokens=7", "data.overlong_prompts=drop"]
    config = parse_config(micro_config, changes, vocabulary_size=VOCABULARY)
    test = data_sets(config)["test"]
    kept = encoded(parts(config), test)
    assert 0 < len(kept.length) < len(test)
    assert kept.length.max() <= 7


CONVERSATIONS = {"name": "calculator", "levels": [1], "train_items": 8, "validation_items": 2, "test_items": 2}


def conversation_config(micro_config, *changes):
    sizes = ["rollout.max_prompt_tokens=12", "rollout.max_completion_tokens=40"]
    task = {"task": CONVERSATIONS}
    return parse_config(micro_config | task, [*sizes, *changes], vocabulary_size=VOCABULARY)


def test_the_warm_start_of_a_task_of_several_turns_leaves_observations_out(micro_config):
    config = conversation_config(micro_config)
    built = parts(config)
    batch = demonstration_batches(built, data_sets(config)["train"], 4)[0]
    observed = batch.source == Source.OBSERVATION
    assert observed.any(axis=1).all()
    np.testing.assert_array_equal(batch.mask, (batch.source == Source.DEMONSTRATION).astype(np.float32))


def test_conversations_are_not_taken_for_reference_completions(micro_config):
    config = conversation_config(micro_config, "rollout.demonstration_in_group=true")
    with pytest.raises(ValueError, match="an environment answers the task in turns"):
        prompt_batches(parts(config), data_sets(config)["train"])
