"""The budget planner: nothing stays changed by planning, the guards decide, and what is written can be run."""

import json
import math
from contextlib import closing
from dataclasses import replace

import pytest
import torch
import trained_models

from weightproof import GuardSession, planner
from weightproof.cli import main
from weightproof.edits import RTN
from weightproof.errors import InputError
from weightproof.planner import Choice, MixedPlan, ModelSize, Option
from weightproof.planner.sizes import Grid
from weightproof.policy import load_policy
from weightproof.probes import digest_of, read_tensors
from weightproof.procedure import run as recipe_run
from weightproof.recipe import load_recipe
from weightproof.weights import iter_weight_matrices

BUDGET = 1.03


def digest(model):
    return digest_of(read_tensors(model, {}, ()))


@pytest.fixture(scope="module")
def session():
    model = trained_models.load("llama").model
    policy = planner.budget_policy("balanced", BUDGET, has_loss=True)
    session = GuardSession(model, policy=policy, retain=trained_models.calibration_windows("llama", 8))
    yield session
    session.close()


@pytest.fixture(scope="module")
def found(session):
    """Of attention only: few passes."""
    before = digest(session.model)
    found = planner.plan(session, BUDGET, (8, 2, 4, 3), granularity="group", group_size=32, include=("attn",))
    assert digest(session.model) == before
    return found


# ---- planning -------------------------------------------------------------------------------------------------------


def test_a_plan_has_every_selected_matrix_once_and_keeps_to_the_budget(session, found):
    expected = [m.name for m in iter_weight_matrices(session.model) if m.family == "attn"]
    assert list(found.edit.bits) == sorted(expected)
    assert found.nats <= found.allowed == math.log(BUDGET)
    assert found.is_exact
    assert "calibration" in found.predictor
    assert [option.bits for option in found.choices[0].options] == [2, 3, 4, 8]


def test_predictions_are_measured_with_one_matrix_quantized(session, found):
    """The prediction of a choice is the KL of a session's own reading of that edit alone."""
    choice = found.choices[2]
    with session.edit("alone", on_violation="monitor") as step:
        kept = {m.name: m.load().clone() for m in iter_weight_matrices(session.model) if m.name in choice.matrices}
        for matrix in iter_weight_matrices(session.model):
            if matrix.name in kept:
                matrix.load().copy_(RTN(2, "group", 32).plan(matrix))
    (reading,) = [one for one in step.divergence if one.windows == "calibration"]
    for matrix in iter_weight_matrices(session.model):
        if matrix.name in kept:
            matrix.load().copy_(kept[matrix.name])
    assert choice.options[0].nats == pytest.approx(reading.kl, rel=1e-6)
    assert choice.options[0].nats > choice.options[2].nats > 0.0


def test_what_is_free_is_not_measured_wider(session):
    class Nothing:
        name, asked = "nothing", []

        def predict(self, matrices, bits):
            self.asked.append(bits)
            return 0.0 if bits == 3 else 1.0

    found = planner.plan(session, BUDGET, (2, 3, 4, 8), predictor=Nothing(), include=("*.q_proj.weight",))
    assert Nothing.asked == [2, 3] * len(found.choices)
    assert set(found.bits.values()) == {3}
    assert [option.measured for option in found.choices[0].options] == [True, True, False, False]
    assert found.passes == 2 * len(found.choices)


def test_matrices_that_run_together_get_one_width(session):
    class Size:
        name = "size"

        def predict(self, matrices, bits):
            return 1e-4 * len(matrices) / bits

    found = planner.plan(session, BUDGET, (3, 8), predictor=Size(), together=True)
    assert {len(choice.matrices) for choice in found.choices} == {1, 2, 3}
    assert any(choice.name.endswith("self_attn.qkv") for choice in found.choices)


@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_a_trial_leaves_the_model_as_it_was(session, raised):
    before, trials = digest(session.model), []
    watched = [m.load() for m in iter_weight_matrices(session.model) if m.name.endswith("k_proj.weight")]
    originals = [values.clone() for values in watched]

    def fail(module, inputs):
        if not all(torch.equal(now, then) for now, then in zip(watched, originals, strict=True)):
            trials.append(module)
            if len(trials) == 2:  # not the first trial of all
                raise raised("in the middle of a pass")

    hook = session.model.register_forward_pre_hook(fail)
    try:
        with pytest.raises((raised, InputError), match="in the middle of a pass"):
            planner.plan(session, BUDGET, (2,), include=("*.k_proj.weight",))
    finally:
        hook.remove()
    assert len(trials) >= 2
    assert digest(session.model) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"budget": 1.0}, "number above 1"),
        ({"budget": 0.99}, "number above 1"),
        ({"budget": math.nan}, "number above 1"),
        ({"bits": ()}, "widths to choose from"),
        ({"bits": "4"}, "widths to choose from"),
        ({"bits": (0, 4)}, "from 2 to 8, not 0"),
        ({"granularity": "group"}, "group_size"),
        ({"include": ("nothing*",)}, "selects no weight matrix"),
    ],
)
def test_requests_that_make_no_sense(session, arguments, words):
    with pytest.raises(InputError, match=words):
        planner.plan(session, **arguments)


def test_a_model_without_logits_has_no_perplexity():
    headless = trained_models.load("llama").model.model
    with closing(GuardSession(headless)) as session, pytest.raises(InputError, match="no logits"):
        planner.plan(session)


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_sizes_count_scales_zero_points_and_everything_else(session):
    matrix = next(m for m in iter_weight_matrices(session.model) if m.name.endswith("down_proj.weight"))
    assert (matrix.d_out, matrix.d_in) == (64, 192)
    assert Grid("channel").num_bytes(matrix, 4) == (64 * 192 * 4 + 64 * 16) // 8
    assert Grid("tensor").num_bytes(matrix, 3) == (64 * 192 * 3 + 16) // 8
    assert Grid("group", 80).num_bytes(matrix, 2) == (64 * 192 * 2 + 64 * 3 * 16) // 8
    assert Grid("group", 64, symmetric=False).num_bytes(matrix, 4) == (64 * 192 * 4 + 64 * 3 * (16 + 4)) // 8
    parameters = sum(one.numel() for one in session.model.parameters())
    size = ModelSize.of(session.model, [matrix])
    assert (size.stored, size.half, size.others) == (4 * parameters, 2 * parameters, 4 * (parameters - 64 * 192))


# ---- raising --------------------------------------------------------------------------------------------------------


def _plan(*harms, chosen=0):
    options = [tuple(Option(bits, nats, bits) for bits, nats in zip((2, 4, 8), item, strict=True)) for item in harms]
    choices = tuple(Choice(f"m{i}", (f"m{i}",), item, chosen, 8) for i, item in enumerate(options))
    return MixedPlan(1.5, Grid(), choices, ModelSize(100, 50, 10), "given", 0)


def test_the_worst_is_raised_first_and_nothing_is_lowered():
    found = _plan((1.0, 0.1, 0.0), (0.2, 0.1, 0.0), (5.0, 4.0, 0.5))
    assert found.bits == {"m0": 2, "m1": 2, "m2": 2}
    first = found.raised(found.nats - 0.01)
    assert first.bits == {"m0": 2, "m1": 2, "m2": 8}  # 4.5 nats for 6 bytes: more a byte than any other
    second = first.raised(first.nats - 0.01)
    assert second.bits == {"m0": 4, "m1": 2, "m2": 8}
    assert second.size == 10 + 4 + 2 + 8
    assert found.raised(0.0).bits == {"m0": 8, "m1": 8, "m2": 8}


def test_when_no_prediction_helps_all_is_raised_and_then_nothing_is_left():
    found = _plan((0.1, 0.1, 0.1), (0.2, 0.2, 0.2))
    last = found.raised(0.05)
    assert set(last.bits.values()) == {8}
    assert last.raised(0.05) is None


def test_infinite_harm_is_raised_out_of():
    found = _plan((math.inf, 0.1, 0.0), (math.inf, math.inf, 0.2))
    assert found.raised(1.0).bits == {"m0": 4, "m1": 8}
    json.dumps(found.to_json(), allow_nan=False)


# ---- carrying out ---------------------------------------------------------------------------------------------------


def test_rounds_go_on_until_the_interval_accepts(session, found):
    """Begun with everything at 2 bits, which the budget does not allow."""
    before = digest(session.model)
    least = found.choose([0] * len(found.choices))
    carried = planner.carry_out(session, least)
    try:
        assert carried.accepted
        assert carried.decided_by == "loss"
        assert len(carried.rounds) > 1
        assert [one.action for one in carried.rounds[:-1]] == ["ROLLBACK"] * (len(carried.rounds) - 1)
        assert carried.rounds[-1].upper <= BUDGET
        assert all(a.size < b.size for a, b in zip(carried.rounds, carried.rounds[1:], strict=False))
        assert all(
            b.bits[n] >= a.bits[n] for a, b in zip(carried.rounds, carried.rounds[1:], strict=False) for n in a.bits
        )
        kept = session.history[-1].record
        assert set(kept.changed_names) == set(carried.plan.bits)
        for matrix in iter_weight_matrices(session.model):
            if matrix.name in carried.plan.bits:
                row = matrix.load()[0, :32]
                assert len(row.unique()) <= 2 ** carried.plan.bits[matrix.name]
        assert len(session.certificate().predicate["steps"]) == len(session.history)
    finally:
        session.model.load_state_dict(trained_models.load("llama").model.state_dict())
    assert digest(session.model) == before


def test_the_policy_of_a_budget_decides_by_its_interval_in_every_tier():
    for tier in ("conservative", "balanced", "aggressive"):
        policy = planner.budget_policy(tier, BUDGET, has_loss=True)
        assert policy.limits["loss"]["tau"] == BUDGET
        assert policy.actions["loss_undecided"] == "ROLLBACK"
        assert {"invariants", "loss"} <= set(policy.required)
        blind = planner.budget_policy(tier, BUDGET, has_loss=False)
        assert blind.limits["divergence"]["kl"] == math.log(BUDGET)
        assert {"invariants", "divergence"} <= set(blind.required)


def test_a_session_that_would_accept_more_is_refused(found):
    model = trained_models.load("llama").model
    windows = trained_models.calibration_windows("llama", 8)
    with closing(GuardSession(model, retain=windows)) as loose, pytest.raises(InputError, match="more than the budget"):
        planner.carry_out(loose, found)
    policy = planner.budget_policy("balanced", BUDGET, has_loss=True)
    with (
        closing(GuardSession(model, policy=policy, retain=windows[0]["input_ids"][:4])) as short,
        pytest.raises(InputError, match="cannot decide on a perplexity ratio"),
    ):
        planner.carry_out(short, found)
    keeps = load_policy("aggressive").override({"loss": {"tau": BUDGET}})
    with (
        closing(GuardSession(model, policy=keeps, retain=windows)) as undecided,
        pytest.raises(InputError, match="keeps what its loss guard cannot decide"),
    ):
        planner.carry_out(undecided, found)
    with closing(GuardSession(model)) as blind, pytest.raises(InputError, match="without retain data"):
        planner.carry_out(blind, replace(found, budget=1.001))


# ---- the verb -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    trained_models.load("llama").model.save_pretrained(folder)
    rows = [row.tolist() for window in trained_models.calibration_windows("llama", 8) for row in window["input_ids"]]
    (folder.parent / "retain.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return folder


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(["plan", *map(str, arguments)])
    return stop.value.code


def test_the_verb_plans_measures_and_writes_a_recipe_that_runs(folder, tmp_path, capsys):
    out, retain = tmp_path / "planned", folder.parent / "retain.jsonl"
    code = run(folder, "--budget", BUDGET, "--bits", "2,4,8", "--group-size", 32, "--retain", retain, "--out", out,
               "--include", "*.self_attn.o_proj.weight", "--save-model")  # fmt: skip
    shown = capsys.readouterr().out
    assert code == 0, shown
    assert "of uniform int8" in shown
    assert "perplexity ratio: budget 1.03" in shown
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rounds"][-1]["action"] == "KEEP"
    recipe = load_recipe(out / "recipe.yaml")
    assert recipe.policy.limits["loss"]["tau"] == BUDGET
    assert recipe.steps[0].make().bits == summary["rounds"][-1]["bits"]
    with pytest.raises(SystemExit) as verified:
        main(["verify", str(out / "model" / "certificate.json"), "--model", str(out / "model"), "--base", str(folder),
              "--unsigned-ok", "--level", "2"])  # fmt: skip
    assert verified.value.code == 0, capsys.readouterr().out


def test_a_budget_that_no_width_reaches_says_what_was_reached(folder, tmp_path, capsys):
    out = tmp_path / "planned"
    code = run(folder, "--budget", 1.0001, "--bits", "2,3", "--include", "*.self_attn.v_proj.weight", "--retain",
               folder.parent / "retain.jsonl", "--out", out)  # fmt: skip
    shown = capsys.readouterr().out
    assert code in (1, 2), shown
    assert "the largest choice tried (3 bits) reached 1.0" in shown
    assert load_recipe(out / "recipe.yaml").steps[0].expect == "ROLLBACK"


def test_without_retain_data_kl_stands_in_and_is_said_to(folder, capsys):
    code = run(folder, "--bits", "4,8", "--include", "*.self_attn.q_proj.weight", "--json")
    shown = json.loads(capsys.readouterr().out)
    assert code == shown["exit_code"] == 0
    assert shown["decided_by"] == "KL on random tokens"
    assert shown["rounds"][-1]["kl"] <= math.log(1.01)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--bits", "0"), "from 2 to 8, not 0"),
        (("--bits", ""), "whole numbers from 2 to 8"),
        (("--bits", "4,x"), "whole numbers from 2 to 8"),
        (("--budget", "1"), "above 1"),
        (("--include", "nothing"), "selects no weight matrix"),
        (("--save-model",), "--out"),
        (("--retain", "missing.txt"), "missing.txt"),
        (("--policy", "balancd"), "balanced"),
    ],
)
def test_bad_input_of_the_verb(folder, arguments, words, capsys):
    assert run(folder, *arguments) == 3
    assert words in capsys.readouterr().err


def test_nothing_is_half_written(folder, tmp_path, capsys):
    out = tmp_path / "planned"
    assert run(folder, "--include", "nothing", "--out", out) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_may_plan_within_a_budget(folder, tmp_path):
    content = {
        "model": str(folder),
        "data": {"retain": str(folder.parent / "retain.jsonl")},
        "guards": {"loss": {"tau": BUDGET}},
        "edits": [
            {
                "plan": {"budget": BUDGET, "bits": [4, 8], "include": ["*.self_attn.o_proj.weight"]},
                "name": "planned",
                "save": False,
            }
        ],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    result = recipe_run.run(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "out")
    assert result.code == 0
    (step,) = result.steps
    assert step.action == "KEEP"
    assert step.size < result.base_size
    content["guards"] = {}
    (tmp_path / "loose.yaml").write_text(json.dumps(content))
    with pytest.raises(InputError, match="more than the budget"):
        recipe_run.run(load_recipe(tmp_path / "loose.yaml"), tmp_path / "loose")
