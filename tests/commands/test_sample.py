"""`jaxrl sample`: prompts from everywhere, completions as they grow and as JSON, and what is refused."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxrl_llm import cli
from jaxrl_llm.commands import sample as sample_command
from jaxrl_llm.commands.sample import show
from jaxrl_llm.data import CharacterTokenizer, encode_prompts, load_tokenizer, with_chat
from jaxrl_llm.experience import without_end
from jaxrl_llm.models.weights import longest_context
from jaxrl_llm.rollout import Drawn, generate
from jaxrl_llm.run.restored import Policy, restored_policy

TOKENIZER = CharacterTokenizer()
TEMPLATE = (
    "{% for m in messages %}<u>{{ m.role }}: {{ m.content }}<e>{% endfor %}"
    "{% if add_generation_prompt %}<u>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def policy(make_bigram):
    """Random symbols, with an end after some twelve of them."""
    model = make_bigram(TOKENIZER.vocabulary_size)
    params = model.init(jax.random.key(0))
    params["scores"] = params["scores"].at[:, TOKENIZER.eos_id].set(2.5)
    return Policy(model, params, TOKENIZER, Path("policy"), max_prompt_tokens=100, max_completion_tokens=24)


@pytest.fixture(scope="module")
def chatting(make_bigram, tmp_path_factory):
    """Bytes, a chat template, and a context of 64 tokens."""
    directory = tmp_path_factory.mktemp("chat")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<u>", "<e>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<e>"}))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = load_tokenizer(directory)
    model = make_bigram(tokenizer.vocabulary_size)
    params = model.init(jax.random.key(1))
    return Policy(model, params, tokenizer, directory, max_completion_tokens=16, context_tokens=64)


@pytest.fixture
def jaxrl(monkeypatch, capsys, policy):
    """Call `jaxrl sample POLICY ...` on a policy in memory; gives what it printed."""

    def run(*arguments: str, policy=policy, stdin: str | None = None, status: int = 0):
        def restored(path, *, chat):
            assert path == "POLICY"
            return replace(policy, tokenizer=with_chat(policy.tokenizer)) if chat else policy

        monkeypatch.setattr(sample_command, "restored_policy", restored)
        if stdin is not None:
            monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        assert cli.main(["sample", "POLICY", *arguments]) == status, capsys.readouterr().err
        said = capsys.readouterr()
        if status:
            assert said.err.startswith("error: ")
            assert said.err.count("\n") == 1
            return said.err
        return json.loads(said.out) if "--json" in arguments else said.out

    return run


def generated(policy, texts, *, samples=1, temperature=1.0, seed=0):
    """What `generate` gives for these prompts at their exact widths, all in one batch."""
    items = [{"body": text, "answer": "", "item_id": number} for number, text in enumerate(texts)]
    longest = max(len(policy.tokenizer.prompt_ids(item)) for item in items)
    prompts = encode_prompts(items, policy.tokenizer, max_prompt_tokens=longest, max_answer_tokens=1)
    run = jax.jit(
        lambda key: generate(
            policy.model,
            policy.params,
            prompts,
            key,
            0,
            samples_per_prompt=samples,
            max_completion_tokens=24,
            eos_ids=policy.tokenizer.eos_ids,
            pad_id=policy.tokenizer.pad_id,
            temperature=temperature,
        )
    )
    return jax.device_get(run(jax.random.key(seed)))


def assert_generated(entries, made):
    assert len(entries) == len(made.length)
    assert {entry["truncated"] for entry in entries} == {True, False}
    for row, entry in enumerate(entries):
        own = slice(0, made.length[row])
        assert entry["tokens"] == made.tokens[row][own].tolist()
        assert entry["completion"] == TOKENIZER.decode(without_end(entry["tokens"], TOKENIZER.eos_ids))
        assert entry["truncated"] == made.truncated[row]
        np.testing.assert_allclose(entry["logprobs"], made.behaviour_logprobs[row][own], atol=1e-5)


TEXTS = ["a", "bcd", "e" * 70, "f", "gh"]


@pytest.mark.parametrize("batch", ["1", "2", "5", "64"])
def test_completions_are_those_of_generate_in_any_batches(jaxrl, policy, batch):
    prompts = [word for text in TEXTS for word in ("--prompt", text)]
    found = jaxrl(*prompts, "-n", "3", "--batch", batch, "--seed", "7", "--json")
    assert [entry["prompt"] for entry in found] == [text for text in TEXTS for _ in range(3)]
    assert_generated(found, generated(policy, TEXTS, samples=3, seed=7))


def test_prompts_come_from_files_arguments_and_standard_input(jaxrl, policy, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"b\r\n\n  \nc d\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "b"}\n\n{"token_ids": [1, 15, 7]}\n')
    by_file = jaxrl("--prompt", "a", "--prompts", str(tmp_path / "prompts.txt"), "--json")
    assert [entry["prompt"] for entry in by_file] == ["a", "b", "c d"]
    assert jaxrl("--json", stdin="a\nb\n\nc d\n") == by_file
    mixed = jaxrl("--token-ids", "3, 4 5", "--prompts", str(tmp_path / "prompts.jsonl"), "--json")
    assert [entry["prompt"] for entry in mixed] == [[3, 4, 5], "b", [1, 15, 7]]
    # A prompt in tokens is the prompt in text.
    ids = " ".join(map(str, TOKENIZER.prompt_ids({"body": "a"})))
    (given,) = jaxrl("--token-ids", ids, "--json")
    assert given["tokens"] == by_file[0]["tokens"]


def test_each_line_of_jsonl_is_a_completion(jaxrl):
    arguments = ("--prompt", "a", "--prompt", "b", "-n", "2", "--batch", "1")
    lines = jaxrl(*arguments, "--jsonl").splitlines()
    assert [json.loads(line) for line in lines] == jaxrl(*arguments, "--json")


def test_conversations_go_through_the_chat_template(jaxrl, chatting, tmp_path):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "?"}]
    file = tmp_path / "talks.jsonl"
    file.write_text(json.dumps({"messages": talk}) + "\n" + json.dumps({"prompt": "hi"}) + "\n")
    found = jaxrl("--prompts", str(file), "--chat", "--greedy", "--json", policy=chatting)
    assert [entry["prompt"] for entry in found] == [talk, "hi"]
    texts = ["<u>user: hi<e><u>assistant: ho<e><u>user: ?<e><u>assistant: ", "<u>user: hi<e><u>assistant: "]
    for entry, text in zip(found, texts, strict=True):
        ids = " ".join(map(str, chatting.tokenizer.encode(text)))
        (plain,) = jaxrl("--token-ids", ids, "--greedy", "--json", policy=chatting)
        assert entry["tokens"] == plain["tokens"]
    assert "? -> " in jaxrl("--prompts", str(file), "--chat", policy=chatting)


# ---- on the terminal ------------------------------------------------------------------------------------------------


def drawn(tokens, length, over, truncated=None):
    rows = np.array(tokens)
    return Drawn(
        rows, np.zeros(rows.shape), np.array(length), np.array(over), np.array(truncated or [False] * len(over))
    )


def written(pieces, starts, policy):
    parts = []
    show(pieces, starts, policy, parts.append)
    return parts


def test_a_single_completion_grows_and_no_character_is_shown_in_part(chatting):
    ids = chatting.tokenizer.encode("aé€b")  # one, two, three and one byte
    assert len(ids) == 7
    pieces = [drawn([ids], [n], [n == 7], [n == 7]) for n in range(1, 8)]
    parts = [part for part in written(pieces, ["q -> "], chatting) if part]
    assert parts == ["q -> a", "é", "€", "b", " (cut at the length limit)\n"]


def test_what_stays_broken_is_shown_at_the_end(chatting):
    ids = chatting.tokenizer.encode("a€")[:2]
    assert written([drawn([ids], [1], [False]), drawn([ids], [2], [True])], [""], chatting) == ["a", "\ufffd", "\n"]


def test_text_that_later_tokens_change_is_written_again(chatting):
    class Changing:
        eos_ids = ()

        def decode(self, ids):
            return {1: "x", 2: "y "}[len(ids)]

    pieces = [drawn([[5, 6]], [1], [False]), drawn([[5, 6]], [2], [True])]
    assert written(pieces, ["q: "], replace(chatting, tokenizer=Changing())) == ["q: x", "\nq: y ", "\n"]


def test_several_completions_are_shown_whole_and_in_order(policy):
    a, b = TOKENIZER.encode("aaaa"), TOKENIZER.encode("bbbb")
    pieces = [
        drawn([a, b, a], [2, 1, 2], [False, True, False]),
        drawn([a, b, a], [3, 1, 4], [True, True, False]),
        drawn([a, b, a], [3, 1, 4], [True, True, True]),
    ]
    # The third row fills the batch up and belongs to nobody.
    assert written(pieces, ["1: ", "2: "], policy) == ["1: aaa", "\n", "2: b", "\n"]


def test_the_terminal_shows_what_json_says(jaxrl):
    for prompts in (["--prompt", "a"], ["--prompt", "a", "--prompt", "bcd", "-n", "2", "--batch", "1"]):
        expected = "".join(
            f"{entry['prompt']} -> {entry['completion']}{' (cut at the length limit)' * entry['truncated']}\n"
            for entry in jaxrl(*prompts, "--json")
        )
        assert jaxrl(*prompts) == expected
    assert jaxrl("--token-ids", "1 20", "--greedy").startswith("1 20 -> ")


def test_a_conversation_on_the_terminal(jaxrl, policy, monkeypatch, capsys):
    lines = iter(["a", "", "π", "b"])

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def read(prompt):
        assert prompt == "> "
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sample_command, "restored_policy", lambda path, chat: policy)
    assert cli.main(["sample", "POLICY"]) == 0
    said = capsys.readouterr()
    # What cannot be encoded is no prompt, and the next one has its number.
    both = jaxrl("--prompt", "a", "--prompt", "b", "--json")
    shown = [entry["completion"] + " (cut at the length limit)" * entry["truncated"] for entry in both]
    assert said.out == f"{shown[0]}\n{shown[1]}\n\n"
    assert "error: this prompt cannot be encoded: character 'π'" in said.err


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--chat", "--token-ids", "1"], "--chat and --token-ids are both given"),
        (["--json", "--jsonl", "--prompt", "a"], "--json and --jsonl are both given"),
        (["--token-ids", "1 two"], "--token-ids is '1 two'; give whole numbers"),
        (["--token-ids", " "], "holds no token; a prompt needs at least one"),
        (["--token-ids", "1 999"], f"the token id 999, but the model's ids are 0 to {TOKENIZER.vocabulary_size - 1}"),
        (["--token-ids", "-1"], "names the token id -1"),
        (["--prompt", "a" * 99], "does not fit: its prompt has 101 tokens, more than 100, the run's"),
        (["--prompt", "π"], "cannot be encoded: character 'π' at position 0"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt cannot be read: No such file"),
        (["--prompts", "nowhere.jsonl"], "--prompts nowhere.jsonl cannot be read: No such file"),
        (["--prompt", "a", "--batch", "0"], "--batch is 0; it must be at least 1"),
        (["--prompt", "a", "--top-p", "0"], "top_p is 0.0; it must lie in (0, 1]"),
        (["--prompt", "a", "--min-tokens", "99"], "min_completion_tokens is 99, more than"),
    ],
)
def test_arguments_that_cannot_be(jaxrl, arguments, message):
    assert message in jaxrl(*arguments, status=2)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.txt", b" \n\n", "p.txt holds no prompt; write one a line"),
        ("p.txt", b"\xff\xfe", "is not text in UTF-8"),
        ("p.jsonl", b"", "p.jsonl has no lines"),
        ("p.jsonl", b'{"prompt": "a"}\n{"promt": "b"}', "line 2 has the fields promt; give one of prompt, messages"),
        ("p.jsonl", b'{"prompt": "a", "answer": "b"}', "line 1 has the fields prompt, answer; give one of"),
        ("p.jsonl", b"{}", "line 1 has the fields none"),
        ("p.jsonl", b"[1]", "element 1 has a int, not an object"),
        ("p.jsonl", b'{"prompt": 3}', "prompt is 3; it must be a text"),
        ("p.jsonl", b'{"token_ids": [1, true]}', "token_ids is [1, True]; it must be a list of whole numbers"),
        ("p.jsonl", b'{"token_ids": []}', "line 1 holds no token"),
        ("p.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}', "no chat template is in use; add --chat"),
        ("p.jsonl", b'{"prompt": ', "line 1 is not JSON"),
    ],
)
def test_files_that_cannot_be(jaxrl, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in jaxrl("--prompts", str(tmp_path / name), status=2)


@pytest.mark.parametrize(
    "line, message",
    [
        ({"token_ids": [5]}, "holds token ids, which are a prompt already; leave --chat out"),
        ({"messages": []}, "messages is []; give a list of objects with role and content"),
        ({"messages": [{"role": "user"}]}, "give a list of objects with role and content"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the last not of the assistant"),
        (
            {"prompt": "a" * 40},
            "more than 48, the room that completions of up to 16 tokens leave in the model's context of 64",
        ),
    ],
)
def test_chats_that_cannot_be(jaxrl, chatting, tmp_path, line, message):
    (tmp_path / "p.jsonl").write_text(json.dumps(line))
    assert message in jaxrl("--prompts", str(tmp_path / "p.jsonl"), "--chat", policy=chatting, status=2)


def test_completions_that_fill_the_context(jaxrl, chatting):
    said = jaxrl("--prompt", "a", "--max-tokens", "64", policy=chatting, status=2)
    assert "which leaves no room for a prompt in the model's context of 64 tokens; set --max-tokens lower" in said


def test_nothing_to_complete(jaxrl):
    assert "standard input holds no prompt" in jaxrl(stdin="\n \n", status=2)


def test_the_context_of_a_model_directory_is_known(tmp_path):
    def context(**config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return longest_context(tmp_path)

    assert context(max_position_embeddings=2048) == 2048
    assert context(text_config={"max_position_embeddings": 512}) == 512
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert context(max_position_embeddings=32768, rope_scaling=yarn) == 131072
    llama = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    assert context(max_position_embeddings=131072, rope_scaling=llama) == 131072
    assert context() is None


def test_a_run_is_sampled_from(jaxrl, finished_run, capsys):
    found = restored_policy(finished_run.directory)
    assert (found.max_prompt_tokens, found.max_completion_tokens, found.context_tokens) == (9, 6, None)
    texts = ["A:1+2", "A:47+85"]
    entries = jaxrl(*(word for text in texts for word in ("--prompt", text)), "--json", policy=found)
    streamed = [jaxrl("--prompt", texts[0], policy=found)]
    assert streamed[0].startswith(f"{texts[0]} -> {entries[0]['completion']}")
