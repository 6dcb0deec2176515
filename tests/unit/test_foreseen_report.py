"""What curvature foretells, in the report, in words, and where nobody gave factors: nowhere."""

from __future__ import annotations

import json
from typing import Any

import pytest
from report_cases import HOSTILE, statement
from trained_models import RECIPES, load, make_windows

from weightproof import Certificate, GuardSession, edits, fit_factors, report
from weightproof.cli import main
from weightproof.reporting.foreseen import MOST, foreseen


@pytest.fixture(scope="module")
def foretold() -> str:
    model = load("llama").model
    data = [{"input_ids": one["input_ids"]} for one in make_windows(RECIPES["llama"], 8, seed=70_000)]
    factors = fit_factors(model, data, "*.mlp.*", progress=False)
    session = GuardSession(model, factors=factors)
    session.apply(edits.RTN(bits=2))
    return session.certificate().to_json()


def forecast(found: dict[str, Any]) -> dict[str, Any]:
    """The reading that the last step was judged from."""
    predicate = found["predicate"]
    return predicate["readings"][predicate["steps"][-1]["judged_on"]["after"]]["curvature"]


def ranked(found: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(forecast(found)["matrices"], key=lambda one: -one["predicted"])


def certificate(found: dict[str, Any]) -> Certificate:
    return Certificate.from_json(json.dumps(found))


def test_the_page_ranks_the_matrices_and_names_the_worst(foretold):
    page = report.html(Certificate.from_json(foretold))
    section = page.partition('<section id="foreseen"')[2].partition("</section>")[0].replace("<wbr>", "")
    names = [one["name"] for one in ranked(json.loads(foretold))]
    places = [section.index(f'<span class="name">{name}</span>') for name in names]
    assert places == sorted(places)
    assert len(places) == 9
    assert "is to blame most" in section
    assert "quadratic no longer holds" in section
    assert "12 changed matrices without factors" in section
    assert '<a href="#foreseen">Predicted loss</a>' in page
    assert "is to blame most" in report.markdown(Certificate.from_json(foretold))


def test_without_factors_there_is_no_such_section():
    page = report.html(certificate(statement()))
    assert "foreseen" not in page
    assert "Predicted loss" not in page


def test_beyond_a_dozen_matrices_the_rest_is_added_up_and_names_are_no_markup(foretold):
    found = json.loads(foretold)
    reading = forecast(found)
    one = reading["matrices"][0]
    reading["matrices"] = [{**one, "name": f"m{i}", "predicted": float(i)} for i in range(MOST + 3)]
    reading["matrices"] += [{**one, "name": HOSTILE, "predicted": None, "reason": "it is not finite"}]
    page = report.html(certificate(found))
    section = page.partition('<section id="foreseen"')[2].partition("</section>")[0]
    assert "3 other matrices" in section
    assert "<script>" not in section
    assert "it is not finite" in section
    facts = foreseen(found["predicate"]["steps"][-1], {"curvature": reading})
    assert facts is not None
    assert (facts.others, facts.rest, facts.total) == (3, 3.0, sum(range(MOST + 3)))
    assert facts.rows[0].name == f"m{MOST + 2}"


def test_nothing_predicted_blames_nobody(foretold):
    found = json.loads(foretold)
    reading = forecast(found)
    reading["matrices"] = [{**reading["matrices"][0], "predicted": 0.0}]
    facts = foreseen(found["predicate"]["steps"][-1], {"curvature": reading})
    assert facts is not None
    assert facts.sentence == "By curvature the change should cost nothing."
    reading["matrices"] = []
    assert "By curvature nothing can be said of this change." in report.html(certificate(found))


def test_explain_names_the_matrix_to_blame(foretold, tmp_path, capsys):
    path = tmp_path / "certificate.json"
    path.write_text(foretold)
    worst = ranked(json.loads(foretold))[0]
    for arguments, said in ((), f"{worst['name']} is to blame most"), (("--json",), ""):
        with pytest.raises(SystemExit) as left:
            main(["explain", str(path), *arguments])
        assert not left.value.code
        text = capsys.readouterr().out
        assert said in text
    predicted = json.loads(text)["predicted"]
    assert next(iter(predicted["by_matrix"].items())) == (worst["name"], pytest.approx(worst["predicted"]))
    assert predicted["total"] == pytest.approx(sum(predicted["by_matrix"].values()))
