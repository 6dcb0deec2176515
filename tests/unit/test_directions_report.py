"""The directions of a merge in the report and in words; where nothing was merged: nowhere."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from report_cases import HOSTILE, statement
from safetensors.torch import save_file
from trained_models import load

from weightproof import Certificate, Delta, GuardSession, edits, load_policy, report
from weightproof.cli import main
from weightproof.reporting.directions import MOST, directions

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("stored") / "directions.safetensors"
    direction = torch.randn(64, generator=torch.Generator().manual_seed(1))
    save_file({"refusal": direction, "narrow": torch.ones(5)}, path)
    policy = load_policy("balanced").override({"subspace": {"directions": str(path)}}, mode="monitor")
    session = GuardSession(load("llama").model, policy=policy)
    generator = torch.Generator().manual_seed(2)
    strong = 0.5 * torch.outer(direction, torch.randn(192, generator=generator))
    weak = 1e-3 * torch.randn(64, 64, generator=generator)
    session.apply(edits.steer(Delta({DOWN: strong, "model.layers.0.self_attn.o_proj.weight": weak})))
    return session.certificate().to_json()


def reading(found: dict[str, Any]) -> dict[str, Any]:
    predicate = found["predicate"]
    return predicate["readings"][predicate["steps"][-1]["judged_on"]["after"]]["subspace"]


def section(page: str) -> str:
    return page.partition('<section id="directions"')[2].partition("</section>")[0].replace("<wbr>", "")


def test_the_page_says_which_matrix_has_new_directions(merged):
    page = report.html(Certificate.from_json(merged))
    text = section(page)
    assert f"1 leading direction of 1 matrix (of 2 that were read) is new, most of them in {DOWN}." in text
    assert text.index(DOWN) < text.index("o_proj.weight</span>")
    assert "Stored directions that fit no changed matrix: narrow." in text
    assert "refusal 1" in text
    assert reading(json.loads(merged))["directions"][:12] in text
    assert '<a href="#directions">Directions</a>' in page
    assert "1 leading direction of 1 matrix" in report.markdown(Certificate.from_json(merged))


def test_where_nothing_was_merged_there_is_no_such_section():
    page = report.html(Certificate.from_json(json.dumps(statement())))
    assert 'id="directions"' not in page
    assert "Directions" not in page


def test_beyond_a_dozen_matrices_the_rest_is_counted_and_names_are_no_markup(merged):
    found = json.loads(merged)
    one = reading(found)["matrices"][0]
    reading(found)["matrices"] = [{**one, "name": f"m{index}"} for index in range(MOST + 2)]
    reading(found)["matrices"].append({**one, "name": HOSTILE, "cosines": None, "reason": "it is not finite"})
    text = section(report.html(Certificate.from_json(json.dumps(found))))
    assert "3 other matrices" in text
    assert "<script>" not in text
    facts = directions(found["predicate"]["steps"][-1], {"subspace": reading(found)})
    assert facts is not None
    assert (facts.read, facts.total, facts.others) == (0, 0, 3)
    assert facts.sentence == "Of no matrix directions could be read."


def test_nothing_new_is_said_to_be_nothing(merged):
    found = json.loads(merged)
    step = found["predicate"]["steps"][-1]
    for verdict in step["verdicts"]:
        for item in verdict["measurements"]:
            if item["statistic"] == "num_intruder_dimensions":
                item["value"] = 0
    facts = directions(step, {"subspace": {**reading(found), "not_compared": []}})
    assert facts is not None
    assert facts.sentence == "None of the leading directions of 2 matrices is new."
    assert facts.left_out == ""
    assert directions(step, {}) is None


def test_explain_says_it_in_words(merged, tmp_path, capsys):
    path = tmp_path / "certificate.json"
    path.write_text(merged)
    for arguments, said in ((), f"most of them in {DOWN}"), (("--json",), ""):
        with pytest.raises(SystemExit) as left:
            main(["explain", str(path), *arguments])
        assert not left.value.code
        text = capsys.readouterr().out
        assert said in text
    told = json.loads(text)["new_directions"]
    assert (told["total"], told["by_matrix"][DOWN]) == (1, 1)
