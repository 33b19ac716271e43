"""Fingerprints: what they are made of, and that everything they are made of matters."""

import hashlib
import json
from pathlib import Path

import pytest
from artifact_inputs import INPUTS
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dynprune.artifacts import fingerprint

repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=60)
json_floats = st.floats(allow_nan=False, allow_infinity=False)
json_leaves = st.none() | st.booleans() | st.integers() | json_floats | st.text()
json_values = st.recursive(
    json_leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
json_mappings = st.dictionaries(st.text(), json_values, max_size=4)


def test_the_fingerprint_is_the_sha256_of_sorted_compact_json():
    text = b'{"config":{"a":[1,null],"lr":0.001},"data":{"name":"bfcl"},"stage":"router","upstream":{"pairs":"ff"},"version":3}'
    found = fingerprint("router", 3, {"lr": 1e-3, "a": (1, None)}, {"name": "bfcl"}, {"pairs": "ff"})
    assert found == hashlib.sha256(text).hexdigest()[:16]


def reordered(value, rng):
    if isinstance(value, dict):
        items = [(key, reordered(item, rng)) for key, item in value.items()]
        rng.shuffle(items)
        return dict(items)
    return [reordered(item, rng) for item in value] if isinstance(value, list) else value


@repeatable
@given(json_mappings, st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_matter_at_any_depth(config, rng):
    assert fingerprint("s", 1, config, {}, {}) == fingerprint("s", 1, reordered(config, rng), {}, {})


@repeatable
@given(json_mappings, json_mappings)
def test_different_configurations_have_different_fingerprints(one, other):
    # repr tells 1, 1.0 and True apart, which == does not.
    assume(repr(reordered_by_key(one)) != repr(reordered_by_key(other)))
    assert fingerprint("s", 1, one, {}, {}) != fingerprint("s", 1, other, {}, {})
    assert fingerprint("s", 1, {}, one, {}) != fingerprint("s", 1, {}, other, {})


def reordered_by_key(value):
    if isinstance(value, dict):
        return {key: reordered_by_key(value[key]) for key in sorted(value)}
    return [reordered_by_key(item) for item in value] if isinstance(value, list) else value


@repeatable
@given(json_mappings)
def test_a_configuration_survives_its_manifest(config):
    read_back = json.loads(json.dumps(config))
    assert fingerprint("s", 1, config, {}, {}) == fingerprint("s", 1, read_back, {}, {})


@pytest.mark.parametrize(
    "changed",
    [
        {"stage": "pairs"},
        {"version": 2},
        {"config": {"strategy": "dfs", "limit": 21}},
        {"config": {"strategy": "dfs", "limit": 20.0}},
        {"config": {"strategy": "dfs", "limit": "20"}},
        {"config": {"strategy": "dfs", "limit": 20, "new": None}},
        {"data": {"name": "bfcl", "ids": ["b", "a"]}},
        {"data": {"name": "bfcl", "ids": ["ab"]}},
        {"upstream": {"adapters": "0123456789abcdee"}},
        {"upstream": {}},
        {"config": INPUTS["data"], "data": INPUTS["config"]},
    ],
)
def test_every_input_matters(changed):
    assert fingerprint(**INPUTS) != fingerprint(**(INPUTS | changed))


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (float("nan"), r"config\.router\.lr\[1\] is nan \(float\)"),
        (float("inf"), r"config\.router\.lr\[1\] is inf"),
        ({1, 2}, r"config\.router\.lr\[1\] is \{1, 2\} \(set\)"),
        (Path("x"), r"config\.router\.lr\[1\] is .*Path"),
        ({3: "x"}, r"config\.router\.lr\[1\] has the key 3 \(int\)"),
    ],
)
def test_a_value_without_a_json_form_is_named_by_its_key_path(value, key):
    with pytest.raises(ValueError, match=key):
        fingerprint("router", 1, {"router": {"lr": [0, value]}}, {}, {})
