"""`weightproof explain` on a certificate of several steps: the one that was not kept is named, and can be explained."""

from __future__ import annotations

import json

import pytest
from architectures import build
from rich.markup import escape

from weightproof import GuardSession, cli, edits
from weightproof.cli.decision_view import next_for, open_console


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    model = build("llama")
    session = GuardSession(model)
    assert session.apply(edits.RTN(8)).applied == "kept"
    with session.edit("a thousandfold") as step:
        model.lm_head.weight.data *= 1000.0
    assert step.applied == "restored"
    assert session.apply(edits.RTN(7)).applied == "kept"
    return session.certificate().save(tmp_path_factory.mktemp("evidence") / "certificate.json")


@pytest.fixture
def explain(certificate, capsys):
    def run(*options):
        with pytest.raises(SystemExit) as stop:
            cli.main(["explain", str(certificate), *options])
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


def test_what_was_not_kept_is_named_beside_the_last_step(explain):
    code, words, _ = explain()
    assert code == 0
    assert "3 steps were judged; this is the last one" in words
    assert "not kept: step 2, a thousandfold: ROLLBACK, restored (explain it with --step 2)" in words
    assert "KEEP: rtn-int7-channel" in words


def test_an_earlier_step_is_explained_on_demand(explain):
    code, words, _ = explain("--step", "2")
    assert code == 0
    assert "3 steps were judged; this is step 2, a thousandfold" in words
    assert "ROLLBACK: a thousandfold" in words
    assert "not kept:" not in words  # no other was
    found = json.loads(explain("--step", "2", "--json")[1])
    assert (found["name"], found["applied"]) == ("a thousandfold", "restored")
    assert found["not_tested"] == ["the certificate lists it for its last step: see there, without --step"]


def test_a_step_that_was_never_judged_is_one_sentence(explain):
    code, _, err = explain("--step", "7")
    assert code == 3
    assert err == "error: no step 7 was judged: this certificate has 1, 2, 3\n"


def test_names_of_matrices_are_no_emoji(capsys):
    open_console().print("layers.0.mlp:up: relative_distance", markup=False)
    open_console().print(escape("layers.0.mlp:up: relative_distance"))
    assert capsys.readouterr().out.splitlines() == ["layers.0.mlp:up: relative_distance"] * 2


@pytest.mark.parametrize(("kind", "words"), [("train", "lower the learning rate"), ("quantize", "repair what")])
def test_a_broken_window_needs_another_advice_than_a_broken_edit(kind, words):
    assert next_for({"situation": "t0_fail", "kind": kind}).startswith(words)
