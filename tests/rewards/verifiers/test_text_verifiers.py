"""Verifiers of text: the worked example of each card, unreadable text, and empty text."""

from __future__ import annotations

import inspect
import json
import time

import pytest

from jaxrl_llm import rewards
from jaxrl_llm.fields import TEXT
from jaxrl_llm.rewards.verifiers.text_formats import INSTRUCTIONS

THINK = "<think>\na\n</think>\n<answer>\n4\n</answer>"
BUILT_IN = {"think_tags": ("<t>", "</t>"), "answer_tags": ("<a>", "</a>")}
CALL = {"name": "search", "parameters": {"q": "a", "k": 5}}
BOX = {"width": 100, "height": 120}
NEAR = {"completions": ["[20, 30, 40, 60]"], "answers": ["[25, 25, 45, 50]"]}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
FORTY = "I need to wait. " * 2
LOOP = " ".join(["so it is"] * 30)


def call(*parameters, name="search", **rest):
    return json.dumps({"name": name, "parameters": dict(parameters)} | rest)


def said(*calls):
    return f"<tool_call>{chr(10).join(calls)}</tool_call>"


TOOLS = {"format_weight": 0.0}
# (function, its arguments, expected)
EXAMPLES = [
    (
        rewards.tag_format,
        {
            "completions": ["<think>a</think> 4", "4", "<think>a<think>b</think>", "", " <think></think>"],
            "grammar": "think",
        },
        [1, 0, 0, 0, 0],
    ),
    (
        rewards.tag_format,
        {
            "completions": [
                "<think>a</think>\n<answer>4</answer>",
                "<think>a</think> so <answer>4</answer>",
                "",
                "<answer>4</answer><think></think>",
            ]
        },
        [1, 0, 0, 0],
    ),
    # An empty thought counts as a thought, a missing one does not.
    (rewards.tag_format, {"completions": ["<think>\n\n</think>\n<answer>4</answer>", "<answer>4</answer>"]}, [1, 0]),
    (rewards.tag_format, {"completions": [THINK, "<think>\na</think>", ""], "grammar": "tags"}, [1, 0.25, 0]),
    (
        rewards.tag_format,
        {"completions": ["<t>3+4</t><a>7</a>", "<t></t><a></a>", "<a>7</a>", "<t>1</t><a>7</a><a>8</a>"], **BUILT_IN},
        [1, 1, 0, 0],
    ),
    (rewards.pattern_match, {"completions": ["so #### 4", "#### x", ""], "pattern": r"#### \d"}, [1, 0, 0]),
    (rewards.pattern_match, {"completions": ["a\nb", "ab "], "pattern": "a.b", "where": "whole"}, [1, 0]),
    (
        rewards.schema_match,
        {
            "completions": [
                '{"n": 4}',
                '{"n": 4.5}',
                '```json\n{"n": 4}\n```',
                "4}",
                "",
                "[" * 100_000,
                '{"n": NaN}',
                '{"n": 1, "n": 2}',
            ],
            "schema": SCHEMA,
        },
        [1, 0, 1, 0, 0, 0, 0, 0],
    ),
    (
        rewards.schema_match,
        {
            "completions": ["<a>[1]</a>", "[1]", "<a>{}</a>"],
            "schema": {"type": "array"},
            "tags": ("<a>", "</a>"),
            "readable": 0.2,
        },
        [1, 0, 0.2],
    ),
    (rewards.schema_match, {"completions": ["null", "nul"]}, [1, 0]),
    (
        rewards.exact_match,
        {
            "completions": ["<answer> 7 </answer>", "<a>7</a>"],
            "answers": ["7", "7"],
            "tags": ("<answer>", "</answer>"),
        },
        [1, 0],
    ),
    (rewards.exact_match, {"completions": ["7 ", "<a>7</a>"], "answers": ["7", "7"], "tags": None}, [1, 0]),
    (rewards.exact_match, {"completions": ["so\n#### 7", "7"], "answers": ["7", "7"], "tags": "marked"}, [1, 0]),
    (
        rewards.word_match,
        {"completions": ["The cat!", "dog", "", "a the"], "answers": ["cat", "cat", "cat", "an"]},
        [1, 0, 0, 1],
    ),
    (
        rewards.word_match,
        {
            "completions": ["<answer>cat</answer>", "cat"],
            "answers": ["dog|cat"] * 2,
            "tags": ("<answer>", "</answer>"),
            "separator": "|",
        },
        [1, 0],
    ),
    (
        rewards.word_match,
        {"completions": ["the big cat", "", "cat cat", "sat, cat"], "answers": ["cat sat"] * 4, "form": "f1"},
        [0.5, 0, 0.5, 1],
    ),
    (
        rewards.word_match,
        {"completions": ["the-cat", "the-cat"], "answers": ["the cat", "cat"], "punctuation_to_space": True},
        [1, 0],
    ),
    (
        rewards.text_similarity,
        {
            "completions": ["the cat sat", "", "the cat sits there"],
            "items": [{"answer": "the cat sits there"}] * 3,
            "form": "word_error",
        },
        [0.5, 0, 1],
    ),
    (
        rewards.text_similarity,
        {
            "completions": ["<t>1+2</t>", "1+2", "<t></t>", "<t>1</t>"],
            "items": [{"think": "1+3"}, {"think": "1+2"}, {"think": ""}, {}],
            "field": "think",
            "tags": ("<t>", "</t>"),
        },
        [2 / 3, 0, 1, None],
    ),
    (
        rewards.text_similarity,
        {"completions": ["the cat sat", ""], "items": [{"answer": "the cat sat down"}] * 2, "form": "rouge1"},
        [0.857143, 0],
    ),
    (
        rewards.text_similarity,
        {"completions": ["the cat sat"], "items": [{"answer": "the cat sat down"}], "form": "rouge"},
        [(0.857143 + 0.8 + 0.857143) / 3],
    ),
    (
        rewards.text_similarity,
        {"completions": ["the cat sat on it", ""], "items": [{"answer": "the cat sat on it"}] * 2, "form": "bleu"},
        [1, 0],
    ),
    (
        rewards.text_similarity,
        {"completions": ["the cat", "xyz"], "items": [{"answer": "the cat"}] * 2, "form": "chrf"},
        [1, 0],
    ),
    (
        rewards.relative_error,
        {"completions": ["#### 1.1", "#### 5", "#### 0", "#### none", ""], "answers": ["1", "2", "0", "1", "1"]},
        [0.9, 0, 0, 0, 0],
    ),
    (
        rewards.relative_error,
        {"completions": ["<a>1e400</a>", "<a>2</a>"], "answers": ["1", "2"], "tags": ("<a>", "</a>")},
        [0, 1],
    ),
    (
        rewards.choice_match,
        {
            "completions": [
                "The answer is (B).",
                r"\boxed{C}",
                "A or B",
                "Answer: d",
                "(B) Paris",
                "#### B",
                "B. Paris",
                "I think it is a cat",
                "",
            ],
            "answers": list("BCADBBBAA"),
        },
        [1, 1, 0, 1, 1, 1, 1, 0, 0],
    ),
    (
        rewards.choice_match,
        {
            "completions": [
                "The answer is B because A is wrong.",
                "answer is a dog",
                r"\boxed{\text{(A)}}",
                "(A) (B)",
                "A, B",
                "The answer is: **C**",
                "answer: A\nAnswer: B",
            ],
            "answers": list("BAAAACB"),
        },
        [1, 0, 1, 0, 0, 1, 1],
    ),
    (
        rewards.choice_match,
        {
            "completions": ["<a>B</a>", "B", "<a>E</a>"],
            "answers": ["B"] * 3,
            "tags": ("<a>", "</a>"),
            "options": "ABCD",
        },
        [1, 0, 0],
    ),
    (rewards.box_match, {**NEAR, **BOX}, [1.211684]),
    (
        rewards.box_match,
        {
            "completions": [
                "",
                "[1, 2, 3]",
                "[40, 30, 20, 60]",
                "[25, 25, 45, 50]",
                "box [25,25,45,50] of 2",
                "[90, 110, 99, 119]",
            ],
            "answers": ["[25, 25, 45, 50]"] * 6,
            **BOX,
        },
        [0, 0, 0, 1.375, 0, 0.125 / (1 + 0.35 / 0.35) * 0 + 0.046242],
    ),
    (
        rewards.span_overlap,
        {"completions": ["2 to 6", "6 to 2", "", "4 and 4", "9-9"], "answers": ["4 8"] * 3 + ["4 4", "1 2"]},
        [1 / 3, 0, 0, 1, 0],
    ),
    (
        rewards.vector_closeness,
        {"completions": ["2 5", "2", "", "99 5", "3 5"], "answers": ["3 5"] * 5, "scale": 10},
        [0.947368, 0, 0, 0, 1],
    ),
    (
        rewards.reasoning_patterns,
        {
            "completions": [
                "Wait, so we need to add. Therefore 9. Alternatively let me check",
                "",
                FORTY,
                "thus user: thus",
            ]
        },
        [0.25, 0, 0.1, 0],
    ),
    (
        rewards.reasoning_patterns,
        {"completions": [LOOP, "so it is 4"], "phrases": ("so it is",), "enough": 1, "ngram": 3},
        [1 - 3 / 88, 1],
    ),
    (
        rewards.instructions_kept,
        {
            "completions": ["Because it rains.", "", "no"],
            "items": [{}, {"instructions": {"excludes": "x"}}, {"instructions": {"most_words": 0}}],
            "instructions": {"most_words": 2, "contains": "because"},
        },
        [0.5, 2 / 3, 0],
    ),
    (
        rewards.instructions_kept,
        {
            "completions": ["a b", "a b c", "a"],
            "items": [{"asked": {"most_words": 2, "ends_with": "b"}}] * 2 + [{}],
            "field": "asked",
            "strict": True,
        },
        [1, 0, None],
    ),
    (
        rewards.tool_calls_match,
        {"completions": [said(call(("q", "a"), ("k", 3)))], "answers": [json.dumps([CALL])], **TOOLS},
        [1.5],
    ),
    (
        rewards.tool_calls_match,
        {
            "completions": [said(json.dumps(CALL)), said("{"), "none", "", said(call(name="find"))],
            "answers": [json.dumps([CALL])] * 5,
        },
        [4, -3, -3, -3, -2],
    ),
    (
        rewards.tool_calls_match,
        {"completions": ["no call", said(json.dumps(CALL)), ""], "answers": ["[]"] * 3},
        [1, 0, 1],
    ),
    (
        rewards.tool_calls_match,
        {
            "completions": [said(call(("q", "b"), ("k", 5))), said(call(("q", "a")))],
            "answers": [json.dumps(CALL)] * 2,
            "form": "coarse",
            **TOOLS,
        },
        [3, -3],
    ),
    (
        rewards.tool_calls_match,
        {
            "completions": [said(call(("q", "b"), ("k", 5))), said(json.dumps(CALL))],
            "answers": [json.dumps(CALL)] * 2,
            "form": "strict",
            **TOOLS,
        },
        [-3, 3],
    ),
    # Calls in Python syntax; anything but a call of a name with constants is unreadable.
    (
        rewards.tool_calls_match,
        {
            "completions": [
                said(one) for one in ("f(q='a', k=3)", "f(k=5, q='a')", "f(1)", "f(q=g())", "x.f()", "f(" * 999)
            ],
            "answers": ["f(q='a', k=5)"] * 6,
            **TOOLS,
        },
        [1.5, 3, -3, -3, -3, -3],
    ),
    # Two calls of one name: each reference call is matched with the nearest remaining call; parameter order is ignored.
    (
        rewards.tool_calls_match,
        {
            "completions": [said(call(("k", 1)), call(("k", 2)))],
            "answers": [call(("k", 2)) + "\n" + call(("k", 1))],
            **TOOLS,
        },
        [3],
    ),
    (
        rewards.tool_calls_match,
        {
            "completions": [said('{"name": "search", "arguments": {"k": 5, "q": "a"}}')],
            "answers": [json.dumps(CALL)],
            **TOOLS,
        },
        [3],
    ),
]


@pytest.mark.parametrize(("function", "given", "expected"), EXAMPLES, ids=[f.__name__ for f, _, _ in EXAMPLES])
def test_an_example(function, given, expected):
    found = function(**given)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == other or one == pytest.approx(other, abs=2e-6, nan_ok=True)
    columns = {key: value for key, value in given.items() if key in ("completions", "answers", "items")}
    backwards = function(**given | {key: value[::-1] for key, value in columns.items()})
    assert repr(backwards) == repr(found[::-1]), "rows are read alone"
    assert function(**given | {key: [] for key in columns}) == []


@pytest.mark.parametrize(
    ("name", "value", "good", "bad"),
    [
        ("least_words", 2, "don't go", "go"),
        ("most_words", 1, "go", "do go"),
        ("least_characters", 3, "abc", "ab"),
        ("most_characters", 2, "ab", "abc"),
        ("sentences", 2, "One. Two!", "One two."),
        ("paragraphs", 2, "a\n\nb", "a\nb"),
        ("bullets", 2, "- a\n- b", "- a"),
        ("contains", ["A", "b"], "ab", "a"),
        ("excludes", ["a", "b"], "c", "cB"),
        ("starts_with", "So", "So it", "It"),
        ("ends_with", "done.", "All done.", "done"),
        ("lower_case", True, "ab", "aB"),
        ("upper_case", True, "AB", "aB"),
        ("json", True, "[1]", "[1"),
        ("pattern", r"\d+", "a1", "a"),
    ],
)
def test_an_instruction(name, value, good, bad):
    assert INSTRUCTIONS[name](good, value)
    assert not INSTRUCTIONS[name](bad, value)


def test_no_hyper_parameter_has_the_name_of_a_text():
    """A function with a text parameter in the singular is called for each row."""
    for name in rewards.__all__:
        function = getattr(rewards, name)
        if inspect.isfunction(function) and name != "checked_host_reward":
            parameters = inspect.signature(function).parameters.values()
            assert not TEXT & {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}, name


def test_every_instruction_is_tested():
    (marks,) = (mark for mark in test_an_instruction.pytestmark if mark.name == "parametrize")
    assert {case[0] for case in marks.args[1]} == set(INSTRUCTIONS)


@pytest.mark.parametrize(
    ("function", "given", "message"),
    [
        (rewards.tag_format, {"grammar": "xml"}, "grammar is 'xml'; it must be one of think"),
        (rewards.pattern_match, {"pattern": "("}, r"pattern is '\(', which is not a valid regular expression"),
        (rewards.pattern_match, {"pattern": "a", "where": "start"}, "where is 'start'"),
        (rewards.schema_match, {"schema": {"type": "number of"}}, "schema is not a valid JSON Schema"),
        (rewards.schema_match, {"schema": {"$ref": "https://example.org/s"}}, "refers to 'https://example.org/s'"),
        (rewards.word_match, {"answers": [""], "form": "em"}, "form is 'em'"),
        (rewards.text_similarity, {"items": [{}], "form": "meteor"}, "form is 'meteor'"),
        (rewards.relative_error, {"answers": ["x"]}, "reference answer of row 0 is 'x', which is not a number"),
        (rewards.choice_match, {"answers": ["Paris"]}, "row 0 is 'Paris', which is not one of the options A, B"),
        (rewards.box_match, {"answers": ["1 2"], **BOX}, "row 0 is '1 2', which is not a box"),
        (rewards.span_overlap, {"answers": ["2 1"]}, "row 0 is '2 1', which is not a span"),
        (rewards.vector_closeness, {"answers": ["x"], "scale": 1}, "row 0 is 'x', which holds no number"),
        (rewards.vector_closeness, {"answers": ["1"], "scale": 0}, "scale is 0"),
        (rewards.tool_calls_match, {"answers": ["search"]}, "row 0 is 'search', which is not a list of tool calls"),
        (rewards.tool_calls_match, {"answers": ["[]"], "form": "soft"}, "form is 'soft'"),
        (rewards.instructions_kept, {"items": [{}], "instructions": {"most_word": 1}}, "row 0 name 'most_word'"),
    ],
)
def test_what_cannot_be_is_refused(function, given, message):
    with pytest.raises(ValueError, match=message):
        function(**{"completions": ["1"]}, **given)


def test_numbers_of_a_record():
    values = {"2": (0.1, 0.5), "3": (1.0,)}
    assert rewards.item_numbers({"level": 2}, field="level", values=values) == (0.1, 0.5)
    assert rewards.item_numbers({"level": "3"}, field="level", values=values) == 1.0
    with pytest.raises(ValueError, match=r"no numbers for level .None., only for 2, 3"):
        rewards.item_numbers({}, field="level", values=values)


WORDS = ("contains", "excludes", "starts_with", "ends_with", "pattern")


@pytest.mark.parametrize("piece", ["a ", "(", "1,", "{", "```", "<think>", "answer is ", "- ", "''", ". ", "\n"])
def test_no_completion_stalls_the_host(piece):
    text, start = piece * 5_000, time.perf_counter()
    for function, given in {function: given for function, given, _ in EXAMPLES}.items():
        if function is not rewards.text_similarity:
            columns = {key: value[:1] for key, value in given.items() if key in ("answers", "items")}
            function(**given | columns | {"completions": [text]})
    asked = {name: "x" if name in WORDS else 1 for name in INSTRUCTIONS}
    rewards.instructions_kept([text], [{}], instructions=asked)
    assert time.perf_counter() - start < 2
