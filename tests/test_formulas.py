"""Plain-text formulas become LaTeX that says the same."""

from __future__ import annotations

import doctest
import importlib
import sys
from pathlib import Path

import pytest
from latex2mathml.converter import convert

DOCS = Path(__file__).parents[1] / "docs"


def docs_module(name: str):
    """A module of docs/, which import each other by their bare names."""
    sys.path.insert(0, str(DOCS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(DOCS))


formulas = docs_module("formulas")
FormulaError, items, latex = formulas.FormulaError, formulas.items, formulas.latex

TRANSLATIONS = [
    ("A = (r - b) / (s + eps)", r"A = \frac{r - b}{s + \varepsilon}"),
    ("c m / 3", r"c\,\frac{m}{3}"),
    ("pi n / 2L", r"\pi\,\frac{n}{2L}"),
    ("1/u - f/u", r"1 / u - f / u"),
    ("r - mean_{j != i} r_j", r"r - \mathrm{mean}_{j \ne i}\,r_{j}"),
    ("x_ij + pi_old_t + R_{s+1}", r"x_{ij} + \pi_{\text{old},t} + R_{s + 1}"),
    ("r_(1) - r_(2)", r"r_{(1)} - r_{(2)}"),
    ("(S - q_d)^+ + u^a + sg(1 - pi)^gamma", r"(S - q_{d})^{+} + u^{a} + \mathrm{sg}(1 - \pi)^{\gamma}"),
    ("|r| ** exponent", r"\lvert r \rvert^{\text{exponent}}"),
    ("-|b - n| / L", r"- \frac{\lvert b - n \rvert}{L}"),
    ("beta <- beta * 2", r"\beta \leftarrow \beta \cdot 2"),
    ("low <= w >= 3 != 4", r"\text{low} \le w \ge 3 \ne 4"),
    ("C(n - 1, k)", r"\binom{n - 1}{k}"),
    ("sqrt((1 - q) / q)", r"\sqrt{\frac{1 - q}{q}}"),
    ("sqrt u - 1", r"\sqrt{u} - 1"),
    ("floor(n) + ceil(a / b)", r"\lfloor n \rfloor + \left\lceil \frac{a}{b}\right\rceil"),
    ("exp(-sum_t d / n)", r"\exp\left( - \sum_{t} \frac{d}{n} \right)"),
    ("log2 f_a", r"\log_2 f_{a}"),
    ("1e-8 + 2.5e-3 + 40%", r"10^{-8} + 2.5 \times 10^{-3} + 40\%"),
    ("KL(policy || M)", r"\mathrm{KL}(\text{policy} \,\Vert\, M)"),
    ("H(pi(. | state))", r"H(\pi(\cdot \mid \text{state}))"),
    ("f'(u) grad logprobs", r"f'(u)\,\nabla\text{ logprobs}"),
    ("#{k : p_k == q_k}", r"\#\{k : p_{k} = q_{k} \}"),
    ("E_reference[f(u)]", r"E_{\text{reference}}[f(u)]"),
]


@pytest.mark.parametrize("text, expected", TRANSLATIONS, ids=[text for text, _ in TRANSLATIONS])
def test_a_formula_is_translated(text, expected):
    assert latex(text) == expected
    assert r"\<" not in convert(expected)


@pytest.mark.parametrize("text", [text for text, _ in TRANSLATIONS])
def test_spaces_around_the_whole_change_nothing(text):
    assert latex(f"  {text} ") == latex(text)


def test_names_of_code_are_told_from_words():
    code = {"clip_low", "share", "rewards"}
    assert latex("1 - clip_low", code) == r"1 - \mathtt{clip\_low}"
    assert latex("share * n", code) == r"\mathtt{share} \cdot n"
    assert latex("2 * share", {"other"}) == r"2 \cdot \text{share}"
    assert latex("0 where the rewards are equal", code) == r"0\text{ where the rewards are equal}"
    assert latex("w where share <= w", code) == r"w\text{ where } \mathtt{share} \le w"


def test_a_word_keeps_its_place_between_symbols():
    assert latex("f_a the share of samples with answer a") == r"f_{a}\text{ the share of samples with answer } a"
    assert latex("a lower bound") == r"\text{a lower bound}"
    assert latex("log pi of answer i") == r"\log \pi\text{ of answer } i"
    assert latex("x is max of I") == r"x\text{ is max of } I"
    assert latex("one has -1") == r"\text{one has } {-} 1"


def test_a_fraction_takes_what_stands_before_and_after_it():
    assert latex("a * b / c * d") == r"a \cdot \frac{b}{c} \cdot d"
    assert latex("gap / share of right answers") == r"\frac{\text{gap}}{\text{share of right answers}}"
    assert latex("1 / sum_j s_j") == r"\frac{1}{\sum_{j} s_{j}}"
    assert latex("(a) (b) / (c)") == r"(a)\,\frac{b}{c}"
    assert latex("((a + b) (c + d)) / 2") == r"\frac{(a + b)\,(c + d)}{2}"
    assert latex("f(a) / f(b)") == r"\frac{f(a)}{f(b)}"


def test_pieces_say_what_they_are():
    assert [piece.kind for piece in items("x = 1 where r > 0, else log y")] == [
        *("atom", "operator", "atom", "prose", "atom", "operator", "atom", "punctuation", "prose", "prefix", "atom"),
    ]


@pytest.mark.parametrize(
    "text", ["(a + b", "a + b)", "/ 2", "|a", "C(n)", "x_", "[0, B)", "sqrt(a, b)", "a £ b", "x ^"]
)
def test_a_formula_that_cannot_be_is_refused(text):
    with pytest.raises(FormulaError, match="formula"):
        latex(text)


def test_the_examples_in_its_docstrings_hold():
    assert doctest.testmod(formulas).failed == doctest.testmod(docs_module("formula_tokens")).failed == 0
