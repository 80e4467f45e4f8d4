"""A few widths of prompts, and batches that take the smallest one that holds theirs."""

from __future__ import annotations

import numpy as np
import pytest

from jaxrl_llm.data import CharacterTokenizer, Item, evaluation_batches, prompt_batches
from jaxrl_llm.data.buckets import bucket_of, buckets

TOKENIZER = CharacterTokenizer()
SIZES = {"max_prompt_tokens": 40, "max_answer_tokens": 2}
# Begin of sequence and newline make two tokens more.
ITEMS = [Item("1" * (length - 2), "", "1", "ones", 1, "") for length in (5, 9, 30, 8, 17, 6, 40, 7)]


def test_widths_are_powers_of_two_with_midpoints_where_they_are_wide():
    assert buckets(8192) == (64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
    assert buckets(1024) == (64, 128, 256, 512, 1024)
    assert buckets(1) == (1,)
    # A width just below the limit is not worth a program.
    assert buckets(80) == (80,)
    assert buckets(96) == (64, 96)


@pytest.mark.parametrize("limit", [1, 63, 64, 65, 100, 700, 1025, 5000, 40_000])
def test_every_length_has_a_width_and_there_are_few(limit):
    widths = buckets(limit)
    assert list(widths) == sorted(set(widths))
    assert widths[-1] == limit
    assert len(widths) <= 20
    for length in range(1, limit + 1, 7):
        width = bucket_of(length, widths)
        assert length <= width <= max(85, 8 * length / 3)


def test_what_has_no_width():
    with pytest.raises(ValueError, match="limit is 0; it must be at least 1"):
        buckets(0)
    with pytest.raises(ValueError, match=r"9 tokens are more than the largest of the widths \[4, 8\]"):
        bucket_of(9, (4, 8))


def test_a_batch_is_as_wide_as_its_longest_prompt_asks_for():
    sizes = {"prompts_per_step": 2, "seed": 0} | SIZES
    plain, cut = (prompt_batches(ITEMS, TOKENIZER, **sizes, widths=widths) for widths in (None, (10, 20, 40)))
    seen = set()
    for step in range(12):
        wide, narrow = plain[step].prompts, cut[step].prompts
        assert wide.tokens.shape == (2, 40)
        width = narrow.tokens.shape[1]
        assert width == bucket_of(max(narrow.length), (10, 20, 40))
        np.testing.assert_array_equal(narrow.tokens, wide.tokens[:, 40 - width :])
        np.testing.assert_array_equal(narrow.length, wide.length)
        assert cut[step].items == plain[step].items
        seen.add(width)
    assert len(seen) > 1


def test_demonstrations_come_with_narrow_prompts_too():
    sizes = {"prompts_per_step": 2, "seed": 0, "max_demonstration_tokens": 9} | SIZES
    batches = prompt_batches(ITEMS, TOKENIZER, **sizes, scratchpad=False, widths=(20, 40))
    widths = {batches[step].prompts.tokens.shape[1] for step in range(8)}
    assert widths == {20, 40}
    assert all(batches[step].prompts.fields["demonstration_tokens"].shape == (2, 9) for step in range(8))


def test_evaluation_batches_keep_their_order_and_have_the_width_they_need():
    batches = evaluation_batches(ITEMS, TOKENIZER, prompts_per_batch=3, **SIZES, widths=(10, 20, 40))
    assert [batch.prompts.tokens.shape for batch in batches] == [(3, 40), (3, 20), (3, 40)]
    found = [i["item_id"] for b in batches for i, weight in zip(b.items, b.weight, strict=True) if weight]
    assert found == list(range(8))
    alone = evaluation_batches(ITEMS[-1:], TOKENIZER, prompts_per_batch=3, **SIZES, widths=(10, 20, 40))
    assert alone[0].prompts.tokens.shape == (3, 10)
