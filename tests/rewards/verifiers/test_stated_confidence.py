"""Reading a stated confidence."""

import pytest

from jaxrl_llm.rewards import stated_confidence

PERCENT = {"opening": "<c>", "closing": "</c>", "scale": 100}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<t>1+2+0=03</t><a>3</a><c>80</c>", 0.8),
        ("<a>3</a><c> 5 </c>", 0.05),
        ("<c>10</c> no, <c>90</c>", 0.9),
        ("<c>100</c>", 1.0),
        ("<c>0</c>", 0.0),
        ("<c>12.5</c>", 0.125),
        ("<c>80%</c>", 0.8),
        ("<c>101</c>", None),
        ("<c>-1</c>", None),
        ("<c>high</c>", None),
        ("<c></c>", None),
        ("<c>80", None),
        ("</c>80<c>", None),
        ("<a>80</a>", None),
        ("", None),
    ],
)
def test_a_number_between_tags(text, expected):
    assert stated_confidence([text], **PERCENT) == [expected]


def test_shares_are_the_default_and_rows_are_read_alone():
    texts = ["so <confidence>0.8</confidence>", "<confidence>1.7</confidence>", "<confidence>.25</confidence>"]
    assert stated_confidence(texts) == [0.8, None, 0.25]
    assert stated_confidence(texts[::-1]) == [0.25, None, 0.8]
    assert stated_confidence([]) == []


def test_a_scale_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"scale is 0; .* must be above 0"):
        stated_confidence([], scale=0)
