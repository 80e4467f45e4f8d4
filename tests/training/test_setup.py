"""What is built from a config before compute is spent."""

import pytest

from jaxrl_llm.config import parse_config
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.training.setup import data_sets, encoded, parts

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
