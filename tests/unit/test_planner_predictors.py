"""Predictors that do not run the model: what they compute, what they refuse, and that a plan by them is carried out."""

import json
import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import trained_models
from worlds import run_world

from weightproof import GuardSession, fit_factors, planner
from weightproof.cli import main
from weightproof.collective import Processes
from weightproof.curvature import predict_loss_change
from weightproof.edits import RTN
from weightproof.errors import InputError
from weightproof.parallel.shards import Shard
from weightproof.planner import Curvature, Frobenius, Grid, Scene
from weightproof.planner.mixed_plan import output_windows
from weightproof.planner.weight_errors import predictor_named
from weightproof.weights import iter_weight_matrices

WIDTHS = (2, 3, 4, 8)
GRID = {"granularity": "group", "group_size": 32}
POLICY = planner.budget_policy("balanced", 1.03, has_loss=True)


@pytest.fixture(scope="module")
def model():
    return trained_models.load("llama").model


@pytest.fixture(scope="module")
def factors(model):
    return fit_factors(model, trained_models.calibration_windows("llama", 3), progress=False)


@pytest.fixture(scope="module")
def session(model):
    with closing(GuardSession(model, policy=POLICY, retain=trained_models.calibration_windows("llama", 8))) as session:
        yield session


def exit_code(*arguments: str) -> int:
    try:
        main(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def planned(session, predictor, **given):
    return planner.plan(session, 1.03, WIDTHS, **GRID, predictor=predictor, **given)


def test_curvature_predicts_what_predict_loss_change_says(session, model, factors):
    found = planned(session, Curvature(factors))
    assert found.passes == 0
    assert "curvature" in found.predictor
    assert factors.digest[:12] in found.predictor
    before = {one.name: one.load().clone() for one in iter_weight_matrices(model)}
    after = {one.name: RTN(3, **GRID).plan(one) for one in iter_weight_matrices(model) if one.name in factors}
    expected = predict_loss_change(factors, before, before | after).by_matrix
    for choice in found.choices:
        option = next(one for one in choice.options if one.bits == 3)
        if option.measured:
            assert option.nats == pytest.approx(expected[choice.name], rel=1e-9)
    assert found.nats <= found.allowed
    assert sum(one.measured for choice in found.choices for one in choice.options) > len(found.choices)


def test_matrices_of_one_group_are_added(session, factors):
    one_by_one = planned(session, Curvature(factors), include=("model.layers.0.self_attn.*",))
    together = planned(session, Curvature(factors), include=("model.layers.0.self_attn.*",), together=True)
    nats = {choice.name: choice.options[0].nats for choice in one_by_one.choices}
    group = next(choice for choice in together.choices if len(choice.matrices) == 3)
    assert group.options[0].nats == pytest.approx(sum(nats[name] for name in group.matrices), rel=1e-12)


def test_frobenius_sums_to_the_kl_of_all_matrices_at_a_width(session, model):
    chosen = tuple(one for one in iter_weight_matrices(model) if one.family == "ffn")
    grid, alone = Grid(**GRID), Processes.alone()
    scene = Scene(model, chosen, (2, 4), grid, alone, lambda: output_windows(session))
    predictor = Frobenius().prepare(scene)
    measured = planner.MeasuredDivergence(model, output_windows(session), grid, alone)
    for width in (2, 4):
        assert predictor.predict(chosen, width) == pytest.approx(measured.predict(chosen, width), rel=1e-9)
        parts = [predictor.predict((one,), width) for one in chosen]
        assert sum(parts) == pytest.approx(predictor.predict(chosen, width), rel=1e-9)
    assert predictor.passes == 2


def test_frobenius_without_calibration_is_the_squared_norm(session, model):
    (matrix,) = [one for one in iter_weight_matrices(model) if one.name.endswith("1.mlp.up_proj.weight")]
    scene = Scene(model, (matrix,), WIDTHS, Grid(**GRID), Processes.alone(), lambda: output_windows(session))
    error = RTN(2, **GRID).plan(matrix).double() - matrix.load().double()
    found = Frobenius(calibrate=False).prepare(scene).predict((matrix,), 2)
    assert found == pytest.approx(float((error**2).sum()), rel=1e-12)


def test_what_breaks_is_infinite(model, factors):
    (matrix,) = [one for one in iter_weight_matrices(model) if one.name.endswith("1.mlp.up_proj.weight")]
    scene = Scene(model, (matrix,), WIDTHS, Grid(**GRID), Processes.alone(), tuple)
    predictor = Curvature(factors).prepare(scene)
    kept = float(matrix.load()[0, 0])
    matrix.load()[0, 0] = math.nan
    try:
        assert predictor.predict((matrix,), 2) == math.inf
    finally:
        matrix.load()[0, 0] = kept
    assert 0 < predictor.predict((matrix,), 2) < math.inf


def test_factors_of_other_weights_and_missing_ones_are_refused(session, model, factors):
    fewer = replace(factors, by_name={name: factors[name] for name in factors if "up_proj" in name})
    with pytest.raises(InputError, match=r"there are no factors for .*0.mlp.gate_proj"):
        planned(session, Curvature(fewer), include=("*mlp*",))
    few = replace(factors, by_name={name: replace(factors[name], tokens=100) for name in factors})
    with pytest.raises(InputError, match="no full rank"):
        planned(session, Curvature(few), include=("*mlp*",))
    (matrix,) = [one for one in iter_weight_matrices(model) if one.name.endswith("1.mlp.up_proj.weight")]
    kept = matrix.load().clone()
    matrix.load().mul_(1.5)
    try:
        with pytest.raises(InputError, match=r"other weights: .*up_proj"):
            planned(session, Curvature(factors), include=("*up_proj*",))
    finally:
        matrix.load().copy_(kept)


def test_a_predictor_is_chosen_by_name(factors):
    assert predictor_named("measured", None) is None
    assert isinstance(predictor_named("frobenius", None), Frobenius)
    assert isinstance(predictor_named("curvature", factors), Curvature)
    for name, given, message in (
        ("hessian", None, "predictor must be measured, curvature or frobenius"),
        ("curvature", None, "needs factors"),
        ("measured", factors, "uses no factors"),
    ):
        with pytest.raises(InputError, match=message):
            predictor_named(name, given)


@pytest.mark.parametrize("make", [Curvature, lambda _: Frobenius()])
def test_a_sharded_matrix_is_refused(model, factors, make):
    (matrix,) = [one for one in iter_weight_matrices(model) if one.name.endswith("1.mlp.up_proj.weight")]
    sharded = replace(matrix, shard=Shard((192, 64), torch.float32, "rows", ((0, 96), (96, 192)), matrix.load()[:96]))
    with pytest.raises(InputError, match=r"up_proj.*sharded over processes"):
        make(factors).prepare(Scene(model, (sharded,), WIDTHS, Grid(**GRID), Processes.alone(), tuple))


def _predict_in_each_process(rank: int, _size: int, folder: str) -> list[float]:
    model = trained_models.load("llama").model
    factors = planner_factors(folder)
    processes = Processes.join(60.0)
    try:
        chosen = tuple(one for one in iter_weight_matrices(model) if one.name in factors)
        predictor = Curvature(factors).prepare(Scene(model, chosen, WIDTHS, Grid(**GRID), processes, tuple))
        if rank == 1:  # a rank that reads something else must not come to another plan
            with torch.no_grad():
                chosen[0].load().mul_(1.01)
        return [predictor.predict(chosen, width) for width in WIDTHS]
    finally:
        processes.close()


def planner_factors(folder: str):
    from weightproof.curvature import Factors

    return Factors.load(Path(folder))


def test_two_processes_get_one_number(tmp_path, factors):
    factors.save(tmp_path)
    first, second = run_world(_predict_in_each_process, 2, str(tmp_path))
    assert first == second
    assert first == sorted(first, reverse=True)


def test_the_verb_plans_by_curvature(tmp_path, model, factors, capsys):
    model.save_pretrained(tmp_path / "base")
    windows = trained_models.calibration_windows("llama", 8)
    rows = [json.dumps({"input_ids": row.tolist()}) for window in windows for row in window["input_ids"]]
    (tmp_path / "retain.jsonl").write_text("\n".join(rows) + "\n")
    factors.save(tmp_path / "factors.safetensors")
    common = [str(tmp_path / "base"), "--budget", "1.05", "--bits", "3,8", "--group-size", "32"]
    data = ["--retain", str(tmp_path / "retain.jsonl"), "--include", "*mlp*", "--json"]
    by_curvature = ["--predictor", "curvature", "--factors", str(tmp_path / "factors.safetensors")]
    assert exit_code("plan", *common, *data, *by_curvature) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["predictor"].startswith("curvature")
    assert told["passes"] == 0
    assert exit_code("plan", *common, "--predictor", "curvature") == 3
    assert "needs factors" in capsys.readouterr().err
