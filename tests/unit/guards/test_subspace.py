"""The subspace guard: directions that came with a merge or with steering. Advice: it decides nothing."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import trained_models
from hand_readings import after, baseline
from safetensors.torch import save_file
from torch import Tensor, nn
from trained_adapters import adapter_folder

from weightproof import Action, GuardSession, InputError, Outcome, edits, kinds, load_policy
from weightproof.certifying.certification import Request, certify_folders
from weightproof.certifying.form import content_of
from weightproof.deltas import Delta, LowRank
from weightproof.errors import PolicyError
from weightproof.guards.subspace import INTRUDERS, Subspace, SubspaceLimits
from weightproof.judgement.judging import GUARDS, Judged, decide_on, is_asked, judge_all
from weightproof.judgement.stored_directions import StoredDirections
from weightproof.lora.adapters import read_adapter
from weightproof.readings.readings_json import readings_json, readings_of
from weightproof.registry import plugins
from weightproof.types import DirectionsReading, Measurement, StoredCosine, SubspaceReading, Verdict
from weightproof.verification.result import Findings
from weightproof.verification.verdicts import check_verdicts

DOWN, OTHER = "model.layers.1.mlp.down_proj.weight", "model.layers.2.self_attn.o_proj.weight"
# Changes stay whatever the other guards say: an adapter that is planted costs what it costs.
MONITOR = load_policy("balanced").override(mode="monitor")


def reading(name: str, *cosines: float, earlier: tuple[float, ...] = (), stored: tuple[StoredCosine, ...] = ()):
    return DirectionsReading(name, "ffn", cosines, earlier, stored, "exact, float64")


def judge(*matrices: DirectionsReading, limits: SubspaceLimits | None = None, **changes) -> Verdict:
    found = SubspaceReading(matrices, **changes)
    return Subspace().judge(baseline(), replace(after(), subspace=found), limits or SubspaceLimits())


def numbers(verdict: Verdict, statistic: str = INTRUDERS) -> dict[str, float | None]:
    return {one.target: one.value for one in verdict.measurements if one.statistic == statistic}


class TestJudgement:
    def test_low_cosines_are_counted_over_earlier_changes_too(self):
        quiet = judge(reading("a", 0.99, 0.7), reading("b", 1.0))
        assert (quiet.outcome, quiet.num_measured, quiet.num_eligible) == (Outcome.PASS, 2, 2)
        assert numbers(quiet) == {"a": 0.0, "b": 0.0}
        assert numbers(quiet, "least_direction_cosine") == {"a": 0.7, "b": 1.0}
        loud = judge(reading("a", 0.99, 0.3, 0.1), reading("b", 1.0, earlier=(0.2, 0.8)))
        assert loud.outcome is Outcome.WARN
        assert numbers(loud) == {"a": 2.0, "b": 1.0}
        assert "agree with those before by 0.10 at the least" in loud.reason
        assert "1 of them came with earlier changes" in str([one.reason for one in loud.measurements])

    def test_it_never_fails(self):
        assert judge(reading("a", *[0.0] * 50)).outcome is Outcome.WARN

    def test_limits_move_what_counts(self):
        found = reading("a", 0.45, 0.2)
        assert numbers(judge(found)) == {"a": 2.0}
        assert numbers(judge(found, limits=SubspaceLimits(cosine=0.3))) == {"a": 1.0}
        assert judge(found, limits=SubspaceLimits(max_intruders=2)).outcome is Outcome.PASS

    def test_a_matrix_that_this_change_left_alone_is_only_reported(self):
        carried = judge(reading("a", earlier=(0.1, 0.2)))
        assert (carried.outcome, numbers(carried)) == (Outcome.PASS, {"a": 2.0})

    def test_what_was_not_measured_is_no_pass(self):
        unread = DirectionsReading("a", "ffn", None, (), (), "none", "it holds NaN or inf")
        found = judge(unread)
        assert (found.outcome, found.reason) == (Outcome.NOT_MEASURED, "a: it holds NaN or inf")
        partly = judge(unread, reading("b", 1.0))
        assert (partly.outcome, partly.num_measured, partly.num_eligible) == (Outcome.PASS, 1, 2)
        assert judge().reason == "no weight matrix changed"
        nothing = Subspace().judge(baseline(), after(), SubspaceLimits())
        assert (nothing.outcome, nothing.num_eligible) == (Outcome.NOT_MEASURED, 0)

    def test_of_a_matrix_without_learned_structure_nothing_is_asked(self):
        found = Subspace().judge(
            baseline(),
            replace(after(), subspace=SubspaceReading((reading("a", 0.1),)), untrained=frozenset({"a"})),
            SubspaceLimits(),
        )
        assert found.outcome is Outcome.NOT_MEASURED
        assert "no learned structure before" in str(found.measurements[0].reason)

    def test_writing_into_a_stored_direction_warns_beyond_chance(self):
        def of(cosine: float, chance: float) -> Measurement:
            stored = (StoredCosine("refusal", cosine, chance),)
            return next(m for m in judge(reading("a", 1.0, stored=stored)).measurements if "stored" in m.statistic)

        assert of(0.2, 0.03).outcome is Outcome.PASS
        loud = of(-0.4, 0.03)
        assert (loud.outcome, loud.value, loud.limit, loud.reference) == (Outcome.WARN, -0.4, 0.3, 0.03)
        assert loud.reason == "with the stored direction 'refusal'"
        assert of(0.4, 0.125).outcome is Outcome.PASS  # narrow: chance reaches farther
        assert of(0.99, 0.5).limit == 1.0

    def test_directions_that_fit_nothing_are_named(self):
        found = judge(reading("a", 1.0), directions="d" * 64, not_compared=("x", "y"))
        assert found.reason.endswith("; the stored direction 'x' fits no changed matrix, nor do 1 more")

    @pytest.mark.parametrize(
        ("key", "value"),
        [("cosine", 0.0), ("cosine", 1.5), ("max_intruders", -1), ("top", 0), ("top", 1.5), ("max_side", -1),
         ("direction_cosine", math.nan), ("directions", 3), ("directions", "")],
    )  # fmt: skip
    def test_wrong_limits_are_refused(self, key, value):
        with pytest.raises(PolicyError, match=key):
            SubspaceLimits(**{key: value})


class TestAdvice:
    @pytest.mark.parametrize("tier", ["conservative", "balanced", "aggressive"])
    def test_no_tier_decides_otherwise_for_a_warning(self, tier):
        policy, quiet = load_policy(tier), after()
        loud = replace(quiet, subspace=SubspaceReading((reading("a", 0.0),)))
        verdicts = [judge_all(policy, Judged(baseline(), baseline(), one)) for one in (quiet, loud)]
        assert set(verdicts[1]) - set(verdicts[0]) == {"subspace"}
        assert verdicts[1]["subspace"].outcome is Outcome.WARN
        without, with_it = (decide_on(policy, one, kind="unknown", step=1, world_size=1) for one in verdicts)
        assert (without.action, without.situation) == (with_it.action, with_it.situation)
        assert (without.warned, without.assurance) == (with_it.warned, with_it.assurance)

    def test_where_nothing_was_merged_it_leaves_no_trace(self):
        assert "subspace" in plugins(GUARDS)
        assert not is_asked(Subspace(), after())
        assert "subspace" not in readings_json(after())
        assert readings_of(readings_json(after())).subspace is None

    def test_readings_go_through_json(self):
        stored = (StoredCosine("x", 0.5, 0.1),)
        unread = DirectionsReading("b", "ffn", None, (0.25,), (), "none", "no")
        found = SubspaceReading((reading("a", 0.5, 1.0, earlier=(0.1,), stored=stored), unread), "d", ("y",))
        assert readings_of(readings_json(replace(after(), subspace=found))).subspace == found


# ---------------------------------------------------------------- sessions


def llama() -> nn.Module:
    return trained_models.load("llama").model


def planted(model: nn.Module, name: str, strength: float, *, seed: int = 0) -> Delta:
    """One new direction, as strong as `strength` times the strongest there, spread over all of the weaker half."""
    u, s, vh = torch.linalg.svd(model.get_parameter(name).detach().double(), full_matrices=False)
    half = len(s) // 2
    signs = torch.randint(2, (2, half), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    left, right = u[:, half:] @ signs[0] / half**0.5, signs[1] @ vh[half:] / half**0.5
    return Delta({name: LowRank((strength * s[0] * left).float()[:, None], right.float()[None])})


def within(model: nn.Module, name: str, share: float) -> Delta:
    """A change of the strength of what is there, in its own leading directions."""
    u, s, vh = torch.linalg.svd(model.get_parameter(name).detach().double(), full_matrices=False)
    left = share * u[:, :4] * s[:4]
    return Delta({name: LowRank(left.float(), vh[:4].float())})


def verdict_of(step) -> Verdict | None:
    return next((one for one in step.decision.verdicts if one.guard == "subspace"), None)


def found_in(step) -> SubspaceReading:
    assert step.judged.after.subspace is not None
    return step.judged.after.subspace


def test_a_planted_intruder_is_found_and_growth_of_what_was_there_is_not():
    model = llama()
    session = GuardSession(model, policy=MONITOR)
    benign = session.apply(edits.steer(within(model, DOWN, 0.5)))
    assert verdict_of(benign).outcome is Outcome.PASS
    assert numbers(verdict_of(benign)) == {DOWN: 0.0}
    loud = session.apply(edits.steer(planted(model, DOWN, 2.0)))
    assert verdict_of(loud).outcome is Outcome.WARN
    assert numbers(verdict_of(loud)) == {DOWN: 1.0}
    (only,) = found_in(loud).matrices
    assert only.cosines is not None
    assert only.cosines[0] < 0.5 < min(only.cosines[1:])
    assert only.cosines[0] == pytest.approx(slow_cosine(model, DOWN), abs=1e-6)


def slow_cosine(model: nn.Module, name: str) -> float:
    """Of the first left singular vector now with those before, by whole decompositions."""
    now = model.get_parameter(name).detach().double()

    before = now - planted_sum[name].double() if name in planted_sum else now
    u, s, _ = torch.linalg.svd(before, full_matrices=False)
    mass = (u.T @ torch.linalg.svd(now).U[:, 0]).square()
    groups = [float(mass[(s <= value) & (s >= 0.99 * value)].sum()) for value in s.tolist()]
    return math.sqrt(max(groups))


planted_sum: dict[str, Tensor] = {}


@pytest.fixture(autouse=True)
def _what_was_added(monkeypatch):
    """Remember the last change that was planned, so that an oracle can take it out again."""
    plan = edits.Steer.plan

    def noted(self, matrix, context=None):
        after_it = plan(self, matrix, context)
        if after_it is not None:
            planted_sum[matrix.name] = after_it - matrix.load()
        return after_it

    planted_sum.clear()
    monkeypatch.setattr(edits.Steer, "plan", noted)


def test_adapters_merged_one_after_the_other_add_up():
    model = llama()
    session = GuardSession(model, policy=MONITOR)
    for count, seed in ((1.0, 1), (2.0, 2)):
        step = session.apply(edits.steer(planted(model, DOWN, 2.0, seed=seed)))
        assert numbers(verdict_of(step)) == {DOWN: count}
    assert len(found_in(step).matrices[0].earlier) >= 1
    other = session.apply(edits.steer(within(model, OTHER, 0.2)))
    assert numbers(verdict_of(other)) == {DOWN: 2.0, OTHER: 0.0}
    assert verdict_of(other).outcome is Outcome.PASS  # what came before is reported, not held against this one
    rounded = session.apply(edits.RTN(bits=8))
    assert numbers(verdict_of(rounded))[DOWN] == 2.0


def test_the_count_goes_on_after_a_resume(tmp_path):
    model = llama()
    session = GuardSession(model, policy=MONITOR)
    session.apply(edits.steer(planted(model, DOWN, 2.0, seed=1)))
    session.save_state(tmp_path)
    session.close()
    resumed = GuardSession(model, policy=MONITOR)
    resumed.load_state(tmp_path)
    step = resumed.apply(edits.steer(planted(model, DOWN, 2.0, seed=2)))
    assert numbers(verdict_of(step)) == {DOWN: 2.0}


def test_what_was_rolled_back_does_not_count_and_what_was_taken_out_is_forgotten():
    model = llama()
    session = GuardSession(model, policy="balanced")
    lost = session.apply(edits.steer(planted(model, DOWN, 5.0)))
    assert (lost.decision.action, numbers(verdict_of(lost))) == (Action.ROLLBACK, {DOWN: 1.0})
    again = session.apply(edits.steer(within(model, DOWN, 0.01)))
    assert numbers(verdict_of(again)) == {DOWN: 0.0}

    watched = GuardSession(llama(), policy=MONITOR)
    weight = watched.model.get_parameter(DOWN)
    before = weight.detach().clone()
    watched.apply(edits.steer(planted(watched.model, DOWN, 2.0)))
    with watched.edit("put back") as step:
        weight.data.copy_(before)
    assert verdict_of(step) is None


def test_other_changes_are_not_read():
    model = llama()
    session = GuardSession(model, policy="aggressive")
    step = session.apply(edits.RTN(bits=8))
    assert verdict_of(step) is None
    assert step.judged.after.subspace is None
    session.watch()
    model.get_parameter(DOWN).data.mul_(1.0001)
    window = session.check_window(step=1, raw_losses=[1.0])
    assert verdict_of(window) is None


def test_a_declared_merge_of_others_is_read_too():
    model = llama()
    session = GuardSession(model, policy=MONITOR)
    delta = planted(model, DOWN, 2.0).dense(DOWN)
    with session.edit("merge", kind=kinds.LoraMerge({DOWN: delta})) as step:
        model.get_parameter(DOWN).data.add_(delta)
    assert numbers(verdict_of(step)) == {DOWN: 1.0}


def test_the_rest_of_the_decision_is_what_it_is_without_the_reading(monkeypatch):
    def decided():
        model = llama()
        return GuardSession(model).apply(edits.steer(within(model, DOWN, 0.02))).decision

    with_it = decided()
    monkeypatch.setattr("weightproof.judgement.subspace_probe.KINDS", ())
    without = decided()
    assert "subspace" not in [one.guard for one in without.verdicts]
    assert [one for one in with_it.verdicts if one.guard != "subspace"] == list(without.verdicts)
    assert (with_it.action, with_it.situation, with_it.warned) == (without.action, without.situation, without.warned)


def test_what_has_no_directions_has_a_reason():
    model = llama()
    session = GuardSession(model, policy=MONITOR)
    delta = torch.zeros_like(model.get_parameter(DOWN))
    with session.edit("nan", kind=kinds.LoraMerge({DOWN: delta + 1.0})) as step:
        model.get_parameter(DOWN).data[0, 0] = math.nan
    assert verdict_of(step).reason == f"{DOWN}: it holds NaN or inf: it has no singular vectors"
    plain = trained_models.untrained("llama")
    noise = GuardSession(plain, policy=MONITOR)
    step = noise.apply(edits.steer(Delta({DOWN: 1e-4 * torch.randn(plain.get_parameter(DOWN).shape)})))
    assert verdict_of(step).outcome is Outcome.NOT_MEASURED


def test_the_certificate_holds_the_reading_and_is_judged_again_from_it():
    model = llama()
    session = GuardSession(model, policy=MONITOR)
    session.apply(edits.steer(planted(model, DOWN, 2.0)))
    certificate = session.certificate()
    content, findings = content_of(certificate), Findings()
    check_verdicts(content, findings)
    assert findings.differences == []
    stated = content.predicate.steps[-1].judged_on
    assert stated is not None
    assert content.readings[stated.after].subspace == found_in(session.history[-1])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_matrix_that_a_trained_adapter_changes_is_read(name):
    session = GuardSession(trained_models.load(name).model, policy=MONITOR)
    edit = edits.LoraMerge(str(adapter_folder(name)))
    step = session.apply(edit)
    changed = set(read_adapter(adapter_folder(name)).deltas)
    assert {one.name for one in found_in(step).matrices} == changed
    counts = numbers(verdict_of(step))
    assert all(1 <= count <= 10 for count in counts.values() if count is not None)
    assert sum(count is not None for count in counts.values()) > len(changed) / 2


def test_a_policy_can_leave_large_matrices_out():
    model = llama()
    policy = MONITOR.override({"subspace": {"max_side": 63}})
    step = GuardSession(model, policy=policy).apply(edits.steer(planted(model, DOWN, 2.0)))
    assert verdict_of(step).outcome is Outcome.NOT_MEASURED
    assert "its shorter side is 64" in verdict_of(step).reason


def test_two_folders_are_read_as_a_session_reads_them(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "base")
    delta = planted(model, DOWN, 2.0)
    session = GuardSession(model, policy=MONITOR)
    step = session.apply(edits.steer(delta))
    model.save_pretrained(tmp_path / "merged")

    def certified(kind: object):
        request = Request(tmp_path / "base", tmp_path / "merged", MONITOR, kind, weights_only=True)
        return certify_folders(request)

    found = certified(kinds.LoraMerge({DOWN: delta.dense(DOWN)}))
    assert found.case.current.subspace is not None
    (only,) = found.case.current.subspace.matrices
    assert only.cosines == pytest.approx(found_in(step).matrices[0].cosines, abs=1e-9)
    assert numbers(verdict_of(found)) == {DOWN: 1.0}
    assert verdict_of(certified(None)) is None


# ---------------------------------------------------------------- stored directions


def watching(path: Path) -> object:
    return MONITOR.override({"subspace": {"directions": str(path)}})


def stored_of(step) -> dict[tuple[str, str], StoredCosine]:
    return {(one.name, cosine.direction): cosine for one in found_in(step).matrices for cosine in one.stored}


def test_a_change_that_writes_into_a_stored_direction_is_named(tmp_path):
    model = llama()
    generator = torch.Generator().manual_seed(3)
    refusal, style = (torch.randn(shape, generator=generator) for shape in ((64,), (2, 64)))
    path = tmp_path / "directions.safetensors"
    save_file({"refusal": refusal, "model.layers.2.style": style, "narrow": torch.ones(7)}, path)
    session = GuardSession(model, policy=watching(path))
    change = torch.outer(refusal / refusal.norm(), torch.randn(192, generator=generator))
    step = session.apply(edits.steer(Delta({DOWN: 0.01 * change, OTHER: 0.01 * torch.randn(64, 64)})))
    cosines = stored_of(step)
    assert set(cosines) == {(DOWN, "refusal"), (OTHER, "refusal"), (OTHER, "model.layers.2.style")}
    assert cosines[DOWN, "refusal"].cosine == pytest.approx(1.0, abs=1e-3)
    assert cosines[OTHER, "refusal"].cosine < 0.4
    assert cosines[OTHER, "model.layers.2.style"].chance == pytest.approx(math.sqrt(2 / 64))
    assert found_in(step).directions == StoredDirections.load(path).digest
    verdict = verdict_of(step)
    assert verdict.outcome is Outcome.WARN
    loud = [m for m in verdict.measurements if m.outcome is Outcome.WARN and m.statistic != INTRUDERS]
    assert [(m.target, m.reason) for m in loud] == [(DOWN, "with the stored direction 'refusal'")]
    assert "'narrow' fits no changed matrix" in verdict.reason
    # Asked for by the user, it is read of any edit.
    assert stored_of(session.apply(edits.RTN(bits=4)))


def test_a_stored_change_is_compared_matrix_by_matrix(tmp_path):
    model = llama()
    first, second = planted(model, DOWN, 0.1, seed=1), planted(model, DOWN, 0.1, seed=2)
    other = Delta({**first.scaled(-1.0).parts, OTHER: torch.ones(64, 64)})
    other.save(tmp_path / "evil")
    session = GuardSession(model, policy=watching(tmp_path / "evil"))
    step = session.apply(edits.steer(first))
    assert stored_of(step)[DOWN, DOWN].cosine == pytest.approx(-1.0, abs=1e-3)
    assert found_in(step).not_compared == (OTHER,)
    assert found_in(step).directions == other.digest
    expected = float((first.dense(DOWN) * second.dense(DOWN)).sum() / first.dense(DOWN).norm() ** 2)
    step = session.apply(edits.steer(second))
    assert stored_of(step)[DOWN, DOWN].cosine == pytest.approx(-expected, abs=1e-3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.zeros(4)}, "'a' is zero"),
        ({"a": torch.ones(2, 2, 2)}, r"'a' is no direction: it must be \(width,\)"),
        ({"a": torch.full((4,), torch.nan)}, "of finite numbers"),
        ({"a": torch.ones(4, dtype=torch.long)}, "is no direction"),
        (None, "cannot be read"),
    ],
)
def test_bad_directions_are_refused_before_anything_is_read(tmp_path, content, message):
    path = tmp_path / "bad.safetensors"
    if content is None:
        path.write_bytes(b"torn")
    else:
        save_file(content, path)
    with pytest.raises(InputError, match=message):
        GuardSession(llama(), policy=watching(path))


def test_a_missing_file_of_directions_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        GuardSession(llama(), policy=watching(tmp_path / "none.safetensors"))


def test_dependent_directions_span_what_they_span(tmp_path):
    path = tmp_path / "d.safetensors"
    save_file({"twice": torch.stack([torch.ones(6), 2 * torch.ones(6)])}, path)
    stored = StoredDirections.load(path)
    assert stored.bases["twice"].shape == (6, 1)
    assert copy.deepcopy(stored.digest) == StoredDirections.load(path).digest
