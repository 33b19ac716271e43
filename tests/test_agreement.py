import pytest

from dynprune.evaluation.agreement import agreement

CALL = '[{"name": "f", "arguments": {"a": 5, "b": "x"}}]'
TWO = '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]'
TWO_SWAPPED = '[{"name": "g", "arguments": {}}, {"name": "f", "arguments": {}}]'


@pytest.mark.parametrize(
    ("output", "full", "agrees"),
    [
        (CALL, CALL, True),
        (CALL, '[ {"arguments": {"b":"x","a":5.0}, "name":"f"} ]\n', True),
        (CALL, '{"name": "f", "arguments": {"a": 5, "b": "x"}}', True),
        (CALL, '[{"name": "f", "arguments": {"a": 5, "b": "y"}}]', False),
        (CALL, '[{"name": "f", "arguments": {"a": true, "b": "x"}}]', False),
        (TWO, TWO_SWAPPED, False),
        ("[]", "[]", True),
        ("Sure, I can", " Sure, I can\n", True),
        ("Sure, I can", "Sure,  I can", False),
        ("[{", "[{]", False),
        (CALL, CALL[:-1], False),
        ("[]", "", False),
    ],
)
def test_outputs_agree_by_their_calls_and_where_neither_parses_by_their_text(output, full, agrees):
    assert agreement([output], [full]) == agreement([full], [output]) == [float(agrees)]


def test_each_output_is_compared_with_its_own_query():
    assert agreement([CALL, "no", TWO], [CALL, CALL, TWO]) == [1.0, 0.0, 1.0]


def test_outputs_to_different_queries_are_not_compared():
    with pytest.raises(ValueError, match="2 outputs with pruning and 1 without"):
        agreement(["a", "b"], ["a"])
