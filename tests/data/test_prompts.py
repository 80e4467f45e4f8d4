"""A completion is trained behind the prompt that it is sampled from, whatever a template makes of either."""

from __future__ import annotations

import pytest

from jaxrl_llm.data import encode_prompts, load_tokenizer, supervised_batches, with_chat, with_prompt_format
from jaxrl_llm.data.chat import ChatTemplate
from jaxrl_llm.data.prompts import ChatPrompts, completion_tokens

TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML = TURN + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# The last answer is rendered with its thought, earlier ones without.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ITEM = {"item_id": 0, "body": "2+3?", "answer": "5"}


def chat(directories, template=CHATML, **options):
    return with_chat(load_tokenizer(directories.qwen(template)), **options)


def test_prompt_and_completion_are_the_whole_conversation(directories, reference):
    tokenizer = chat(directories, system_prompt="Be short.", format="{body} Think.")
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2+3? Think."}]
    theirs = reference(directories.qwen(CHATML))
    prompt = tokenizer.prompt_ids(ITEM)
    assert prompt == theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    completion = tokenizer.completion_ids(ITEM, "It is 5.")
    whole = theirs.apply_chat_template([*messages, {"role": "assistant", "content": "It is 5."}])["input_ids"]
    # The newline behind the end of the turn is never sampled.
    assert [*prompt, *completion, *tokenizer.encode("\n")] == whole
    assert completion == [*tokenizer.encode("It is 5."), tokenizer.eos_id]


def test_conversations_of_records(directories):
    tokenizer = chat(directories, system_prompt="Be short.", format="{body}!")
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert tokenizer.prompts.messages(ITEM | {"messages": said}) == [
        {"role": "system", "content": "Be short."},
        *said[:2],
        {"role": "user", "content": "c!"},
    ]
    # A system message of the record's own stays, and the record is not written to.
    own = [{"role": "system", "content": "s"}, *said]
    assert tokenizer.prompts.messages(ITEM | {"messages": own})[0] == own[0]
    assert said[2]["content"] == "c"


def test_plain_prompts(directories):
    tokenizer = with_prompt_format(load_tokenizer(directories.llama()), "Q: {body}\nA:")
    assert tokenizer.prompt_ids(ITEM) == [0, *tokenizer.encode("Q: 2+3?\nA:")]
    assert tokenizer.completion_ids(ITEM, " 5") == [*tokenizer.encode(" 5"), tokenizer.eos_id]
    with pytest.raises(ValueError, match=r"item 0 .* a conversation of 1 message, which a plain prompt format"):
        encode_prompts(
            [ITEM | {"messages": [{"role": "user", "content": "x"}]}],
            tokenizer,
            max_prompt_tokens=9,
            max_answer_tokens=9,
        )


def test_supervised_batches_train_on_the_end_of_the_turn(directories):
    tokenizer = chat(directories)
    batch = supervised_batches(
        [ITEM | {"response": "It is 5."}],
        tokenizer,
        sequences_per_step=1,
        max_prompt_tokens=40,
        max_completion_tokens=20,
        seed=0,
    )[0]
    assert (
        tokenizer.backend.decode(batch.tokens[0][: batch.length[0]], skip_special_tokens=False) == "It is 5.<|im_end|>"
    )


def test_a_record_without_reference_completion_is_named(directories):
    with pytest.raises(ValueError, match=r"item 0 \('2\+3\?'\) .* no reference completion"):
        supervised_batches(
            [ITEM | {"response": ""}],
            chat(directories),
            sequences_per_step=1,
            max_prompt_tokens=40,
            max_completion_tokens=20,
            seed=0,
        )


def test_a_thought_that_the_template_adds_belongs_to_the_completion(directories):
    template = TURN.replace(
        "{{ m.content }}", "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' }}{{ m.content }}"
    )
    tokenizer = chat(directories, template + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    assert tokenizer.decode(tokenizer.completion_ids(ITEM, "5")) == "<think>\n\n</think>\n\n5"


# As DeepSeek-R1's distillations write it: the turn opens with a thought, and an answer loses the one it has.
R1 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# As Qwen3 writes it with enable_thinking false: an empty thought, unless the answer has one of its own.
NO_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and '</think>' not in m.content %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# Nothing opens the turn, and yet the thought is dropped.
DROPPED = R1.replace("<think>\n{% endif %}", "{% endif %}")
COUNTED = "{{ messages | length }} " + CHATML
THOUGHT = "<think>\n2 and 3\n</think>\n\nIt is 5."


@pytest.mark.parametrize(
    "template, options, prompt, text, completion",
    [
        (R1, {}, "assistant\n<think>\n", "2 and 3\n</think>\n\nIt is 5.", None),
        (R1, {}, "assistant\n<think>\n", "5", None),
        (DROPPED, {}, "assistant\n", THOUGHT, None),
        (NO_THINKING, {"enable_thinking": False}, "<think>\n\n</think>\n\n", "5", None),
        (NO_THINKING, {"enable_thinking": False}, "<think>\n\n</think>\n\n", THOUGHT, None),
        (NO_THINKING, {}, "assistant\n", "5", "<think>\n\n</think>\n\n5"),
        (NO_THINKING, {}, "assistant\n", THOUGHT, None),
        (COUNTED, {}, "assistant\n", "5", None),
    ],
)
def test_a_completion_is_what_is_sampled_behind_the_prompt(directories, template, options, prompt, text, completion):
    tokenizer = chat(directories, template, options=options)
    assert tokenizer.backend.decode(tokenizer.prompt_ids(ITEM), skip_special_tokens=False).endswith(prompt)
    expected = [*tokenizer.encode(text if completion is None else completion), tokenizer.eos_id]
    assert tokenizer.completion_ids(ITEM, text) == expected


def test_an_answer_that_the_tokenizer_would_join_to_the_prompt_is_encoded_alone(directories):
    tokenizer = load_tokenizer(directories.llama())
    assert len(tokenizer.encode(" clips")) == 1
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% if m.role == 'user' %} cl{% endif %}{% endfor %}")
    said = completion_tokens(template, tokenizer, [{"role": "user", "content": "sold"}], "ips")
    assert said == tokenizer.encode("ips")


def test_a_template_that_ignores_the_generation_prompt_is_refused(directories):
    header = r"ignores add_generation_prompt: it writes the header .*'<\|im_start\|>assistant\\n'"
    with pytest.raises(ValueError, match=header):
        chat(directories, TURN)


def test_a_template_whose_prompt_needs_no_header_is_taken(directories):
    tokenizer = with_chat(
        load_tokenizer(
            directories.mistral(
                "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
                "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
            )
        )
    )
    assert tokenizer.decode(tokenizer.prompt_ids(ITEM)) == "<s>[INST] 2+3?[/INST]"
    # Begin of sequence is the template's; none is put in front of it.
    assert tokenizer.prompt_ids(ITEM).count(1) == 1
    assert tokenizer.completion_ids(ITEM, "5") == [*tokenizer.encode(" 5"), tokenizer.eos_id]


def test_a_turn_that_ends_with_no_end_of_sequence_is_refused(directories):
    turn = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</turn>\n{% endfor %}"
    with pytest.raises(ValueError, match=r"ends the assistant's turn with '</turn>\\n', but none .*generation_config"):
        chat(directories, turn + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def test_end_of_sequence_is_added_where_the_template_writes_none(directories):
    tokenizer = chat(directories, "{% for m in messages %}{{ m.content }}\n{% endfor %}")
    assert tokenizer.completion_ids(ITEM, "5")[-1] == tokenizer.eos_id
    assert tokenizer.completion_ids(ITEM, "")[-1] == tokenizer.eos_id


def test_an_end_of_sequence_inside_of_a_completion_is_refused(directories):
    tokenizer = chat(directories)
    with pytest.raises(ValueError, match="end of sequence before its end: ' and on"):
        tokenizer.completion_ids(ITEM, "5<|im_end|> and on")


def test_a_conversation_that_the_template_rewrites_is_refused_or_allowed(directories):
    thought = {"role": "assistant", "content": "<think>2, 3</think>5"}
    item = ITEM | {"messages": [{"role": "user", "content": "2+3?"}, thought, {"role": "user", "content": "4+5?"}]}
    limits = {"max_prompt_tokens": 99, "max_answer_tokens": 9}
    with pytest.raises(ValueError, match=r"item 0 .* renders message 1 of the conversation, '<think>2, 3</think>5'"):
        encode_prompts([item], chat(directories, FORGETFUL), **limits)
    allowed = chat(directories, FORGETFUL, rewritten_history="allow")
    prompts = encode_prompts([item], allowed, **limits)
    assert "2, 3" not in allowed.decode(prompts.tokens[0])
    # A single turn, and a conversation that is kept, need no permission.
    assert encode_prompts([ITEM], chat(directories, FORGETFUL), **limits).length[0] > 0
    assert "2, 3" in allowed.decode(encode_prompts([item], chat(directories), **limits).tokens[0])


def test_bad_options(directories):
    tokenizer = load_tokenizer(directories.qwen(CHATML))
    with pytest.raises(ValueError, match="rewritten_history is 'maybe'"):
        ChatPrompts(ChatTemplate(CHATML), rewritten_history="maybe")  # pyright: ignore
    with pytest.raises(ValueError, match="has no place for the prompt"):
        with_chat(tokenizer, format="Think.")
