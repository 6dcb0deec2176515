"""`weightproof policy show|diff`: resolved values with their sources, and only what differs."""

from __future__ import annotations

import json

import pytest

from weightproof import cli
from weightproof.cli.policy import differences, is_provisional, source_of, values_of
from weightproof.policy import TIERS, load_policy


@pytest.fixture
def call(capsys):
    def run(*argv):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(part) for part in ("policy", *argv)])
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


@pytest.mark.parametrize("tier", TIERS)
def test_every_value_of_a_tier_is_shown_with_its_source(call, tier):
    code, out, _ = call("show", tier, "--json")
    found = json.loads(out)
    policy = load_policy(tier)
    assert (code, found["digest"]) == (0, policy.digest)
    for situation, action in policy.actions.items():
        assert found["values"][f"actions.{situation}"]["value"] == action
        assert found["values"][f"actions.{situation}"]["source"]
    limits = {key: entry for key, entry in found["values"].items() if key.startswith("limits.")}
    assert limits["limits.divergence.kl"]["value"] == policy.limits["divergence"]["kl"]
    assert all(entry["source"] for entry in limits.values())


def test_provisional_values_are_marked(call):
    policy = load_policy("balanced")
    marked = [key for key in values_of(policy) if is_provisional(policy, key)]
    assert marked
    assert any(key.startswith("limits.spectral.") for key in marked)
    assert "limits.divergence.kl" not in marked
    _, out, _ = call("show")
    assert "provisional" in out
    assert f"{marked[0]} *" in out


def test_a_difference_is_shown_from_both_sides(call, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("extends: balanced\nname: own\nlimits:\n  divergence: {kl: {value: 0.03, source: measured here}}\n")
    code, out, _ = call("diff", "balanced", own, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["differences"] == {"limits.divergence.kl": {"first": 0.041, "second": 0.03}}
    assert found["digests"]["first"] != found["digests"]["second"]
    assert source_of(load_policy(own), "limits.divergence.kl") == "measured here"
    assert "0.03" in call("diff", "balanced", own)[1]


def test_equal_policies_have_no_difference(call):
    assert "no value differs" in call("diff", "aggressive", "aggressive")[1]
    assert differences({"a": 1}, {"a": 1, "b": 2}) == {"b": ("-", 2)}


@pytest.mark.parametrize("argv", [("show", "balansed"), ("diff", "balanced", "nowhere.yaml"), ("absent",)])
def test_what_is_no_policy_is_bad_input(call, argv):
    code, _, err = call(*argv)
    assert code == 3
    assert err
