"""Numbers in text, exactly: what is the same number, what is another, and what is none."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm.rewards import extract_number, number_match, parsed_number
from jaxrl_llm.run.recipes import reward_terms

# Spellings are separated by semicolons.
SAME = {
    Fraction(
        72
    ): r"72; +72; 72.; 72.0; 072; 72.00 dollars; $72; 72$; $72.00; \$72; 72 clips; x = 72; 72\text{ cm}; 72 m^2; "
    r"72 m2; 72 km/h; (72); **72**; $72$; \(72\); 72nd; 7.2e1; is 72!; 72 apples!; 72 cm²; 72 m³; 72 s⁻¹; 答案是72; "
    r"72元; 72 billiard balls; 72 millionaires; 7.2 \times 10^{1}; 144/2; \frac{144}{2}; "
    r"72^\circ; 72°; €72; 72 €; \boxed{72}; 8*9 = 72",
    Fraction(-5, 2): "-2.5; -5/2; -\\frac{5}{2}; -\\dfrac52; -2\\frac{1}{2}; -2 1/2; \u22122.5; -$2.50; $-2.50; "
    r"\frac{-5}{2}; - 2.5; x = -2.5; \tfrac{5}{-2}",
    Fraction(1234567): "1,234,567; 1234567; 1{,}234{,}567; 1,\\!234,\\!567; 1\\,234\\,567; 1\u00a0234\u00a0567; "
    "1,234,567.0; 1'234'567; 1’234’567; 1_234_567; 1\u2009234\u2009567",
    Fraction(3_000_000): "3 million; 3e6; 3 \\cdot 10^6; 3,000 thousand; 3\u00d710^6; 3 Millions; "
    "3-million; 3 MILLION; 3M; $3M; 3mn; 30 lakh; 3 thousand thousands; 3 million dollars; 30,00,000; ३०,००,०००; "
    "3million; 3 mn; $3 mn",
    Fraction(-7): "–7; —7; ‒7; ‐7; －7; ﹣7; −７; is –7; –$7; minus 7; is Negative 7; minus $7; -USD 7; -US$7; –Rs. 7; "
    "-R$ 7; -\u200e7; 是-7",
    Fraction(20_000): "20k; 20K; $20k; 20 thousand dollars; 2 hundred hundreds; 20 k; 20 k€; 2×10⁴; 2 \\times 10^{4}",
    Fraction(10**6): "10^6; 10^{6}; 10⁶; 10**6; 1*10**6; 1 x 10^6",
    Fraction(24): "2 dozen; 2 Dozens; 24 hours; 24h; 24 per day; US$24; 24 USD; ₹24; 24 mi/h; 24 a day; 24 K; 24 a.m.",
    Fraction(1, 2): r"0.5; .5; 1/2; \frac12; \frac 1 2; 5e-1; 0.50; ½; ٠٫٥; 1∕2; 5 × 10⁻¹",
    Fraction(3, 2): "1½; 1 1/2; 1 ½",
}
NONE = (
    r"; abc; 1 2; 3 or 4; (1, 2); 1,2,3; 10:30; 5.5.5; 1/0; \frac{1}{0}; 2^{10}; 2^10; 3\pi; \sqrt{2}; 2\sqrt{3}; "
    r"\frac{x}{2}; 3x + 4; > 5; about - 5; 1/2/3; \approx 5; 5 - 3; 1,23; 1e9999; 7^; x2; \boxed{5; NaN; inf; five; "
    "3–5; 2 zillion; 2 Gazillions; 2 Mio.; 2 Mrd; 2 milliards; 2 Millionen; 2 millones; 2 milhões; 2 lac; "
    "2 hundredths; 2万; 2 億; 2만; 2 млн; 2 тыс.; 2 लाख; 2 करोड़; 2 مليون; 5 permille; 2**3; 2³; 1 234; "
    "2x; 2 x; 5i; 3n; 5‰; XII; 三; 5²; 1.234,56; 3,5; "
    "\u221e; 5\u03c0; " + "9" * 500
)


@pytest.mark.parametrize("value, text", [(value, text) for value, texts in SAME.items() for text in texts.split("; ")])
def test_the_same_number(value, text):
    assert parsed_number(text) == value


@pytest.mark.parametrize("text", NONE.split("; "))
def test_no_number(text):
    assert parsed_number(text) is None


@given(st.fractions())
def test_every_fraction_is_read_back(value):
    assert parsed_number(str(value)) == value
    assert number_match([f"so #### {value}"], [str(value)]) == [1.0]


@given(st.integers(), st.integers(0, 4))
def test_every_decimal_is_read_back(number, places):
    value = Fraction(number, 10**places)
    assert parsed_number(f"{number:,}") == number
    sign, digits = "-" * (number < 0), f"{abs(number):0{places + 1}d}"
    assert parsed_number(f"{sign}{digits[: len(digits) - places]}.{digits[len(digits) - places :]}0") == value


@given(st.text(alphabet="0123456789.,-+/%$ ^{}\\boxedfrac=#e\n", max_size=60))
def test_any_text_has_a_verdict(text):
    (reward,) = number_match([text], ["72"])
    assert reward in (0.0, 1.0)
    said = extract_number(text)
    assert said is None or parsed_number(said) is not None


@pytest.mark.parametrize(
    "text, reward",
    [
        ("She sold 48/2 = 24 in May, so 48 + 24 = 72 altogether.", 1.0),
        ("The answer is **72**.", 1.0),
        ("24 + 48\n#### 72", 1.0),
        ("24 + 48\n#### 72\nChecked: 48 + 24.", 1.0),
        (r"so \boxed{72}. Let me check 48.", 1.0),
        (r"#### 24 \boxed{72}", 1.0),
        (r"\boxed{24} #### 72 clips", 1.0),
        ("72 clips in 2 months", 0.0),
        ("-72", 0.0),
        ("72.1", 0.0),
        ("#### 24", 0.0),
        ("72\n#### unknown", 0.0),
        ("#### 72 73 74", 0.0),
        (r"\boxed{72, 24}", 0.0),
        ("72 ####", 0.0),
        (r"so \boxed{72", 0.0),
        ("", 0.0),
        ("no number", 0.0),
    ],
)
def test_completions(text, reward):
    assert number_match([text], ["72"]) == [reward]


@pytest.mark.parametrize(
    "extraction, rewards",
    [
        ("any", [1.0, 1.0, 1.0, 0.0]),
        ("marked", [0.0, 1.0, 1.0, 0.0]),
        ("hashes", [0.0, 1.0, 0.0, 0.0]),
        ("boxed", [0.0, 0.0, 1.0, 0.0]),
        ("last", [1.0, 1.0, 1.0, 0.0]),
    ],
)
def test_where_the_number_is_looked_for(extraction, rewards):
    texts = ["it is 72", "#### 72", r"\boxed{72}", "none"]
    assert number_match(texts, ["72"] * 4, extraction=extraction) == rewards


def test_a_percent_sign_is_a_unit_or_a_hundredth():
    texts = ["50%", r"50\%", "50 percent", "50", "0.5"]
    assert number_match(texts, ["50"] * 5) == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert number_match(texts, ["50%"] * 5) == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert number_match(texts, ["0.5"] * 5, percent="hundredth") == [1.0, 1.0, 1.0, 0.0, 1.0]


def test_a_percent_sign_is_both_where_one_side_has_it():
    answers = ["0.5", "50", "50%", "50%", "0%"]
    assert number_match(["50%", "50%", "50%", "0.5%", "0"], answers, percent="either") == [1.0, 1.0, 1.0, 0.0, 1.0]


def test_tolerances():
    texts, answers = ["0.3333333", "0.333", "50%", "50"], ["1/3", "1/3", "50", "50%"]
    assert number_match(texts, answers) == [0.0, 0.0, 1.0, 1.0]
    assert number_match(texts, answers, rtol=1e-6, percent="hundredth") == [1.0, 0.0, 0.0, 0.0]
    assert number_match(["9.5", "-0.5", ""], ["9", "0", "0"], atol=0.5) == [1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match=r"rtol is -1.*at least 0"):
        number_match([], [], rtol=-1)


def test_tags_are_a_mark_like_the_others():
    texts = [
        "<answer> 7 </answer> or 9",
        "<answer>7</answer> #### 8",
        r"\boxed{} 5",
        "<answer>7",
        "9 </answer> <answer>",
    ]
    said = [number_match(texts, [answer] * 5, tags=("<answer>", "</answer>")) for answer in "7859"]
    assert said == [[1, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0] * 5, [0, 0, 0, 0, 1]]
    assert number_match(["<a>1</a> 2"] * 2, ["1", "2"], tags=("<a>", "</a>"), extraction="last") == [0, 1]


def test_references_may_be_solutions():
    assert number_match(["72", "1/2"], ["48+24=72\n#### 72", r"thus \boxed{\frac{1}{2}}"]) == [1.0, 1.0]


@pytest.mark.parametrize("answer", ["x+1", "", "1 or 2", "#### none"])
def test_a_reference_that_is_no_number_is_an_error(answer):
    with pytest.raises(ValueError, match=r"the reference answer of row 1 is .*, which is not a number"):
        number_match(["1", "1"], ["1", answer])


def test_bad_options():
    with pytest.raises(ValueError, match="extraction is 'first'; it must be one of 'any'"):
        number_match(["1"], ["1"], extraction="first")  # pyright: ignore
    with pytest.raises(ValueError, match="extraction is 'first'"):
        extract_number("1", extraction="first")  # pyright: ignore
    with pytest.raises(ValueError, match="percent is 'sign'"):
        number_match(["1"], ["1"], percent="sign")  # pyright: ignore
    with pytest.raises(ValueError, match="shorter"):
        number_match(["1", "2"], ["1"])


@pytest.mark.parametrize(
    "piece", ["1", "1,", "-", " ", "$ ", "\\frac", "1 ", "{", "\\boxed{", "1.1", ",111", "\\text{", "1/", "= ", "10^"]
)
def test_no_completion_stalls_the_host(piece):
    start = time.perf_counter()
    number_match([piece * 20_000], ["72"])
    assert time.perf_counter() - start < 5


def test_the_last_number_for_display_and_votes():
    assert extract_number("between 3-5, say $-1,234.50.") == "$-1,234.50"
    assert extract_number("1,2,3") == "3"
    assert extract_number("48 - 5") == "5"
    assert extract_number("x=-5") == "-5"
    assert extract_number("#### none") is None
    assert extract_number("GPT4 says nothing") is None


def test_recipes_can_name_it():
    (term,) = reward_terms([{"number_match": {"extraction": "boxed"}}])
    assert term.on_host
    assert term.function(completions=[r"\boxed{1}"], answers=["1"]) == [1.0]
