from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from architectures import build
from hand_readings import verdict

from weightproof import GuardSession
from weightproof.errors import InputError, PolicyError
from weightproof.folders.jsonable import canonical_json, json_digest, to_jsonable
from weightproof.guards.circuits import Circuits
from weightproof.guards.divergence import Divergence
from weightproof.guards.invariants import Invariants
from weightproof.guards.loss import Loss
from weightproof.guards.rmt import RMT
from weightproof.guards.spectral import Spectral
from weightproof.guards.variance import Variance
from weightproof.judgement.situations import SITUATIONS
from weightproof.policy import TIERS, Policy, decide, decision_digest, evidence_digest, load_policy
from weightproof.types import Action, Assurance, Measurement, Outcome, Verdict

GUARDS = (Invariants, Spectral, RMT, Circuits, Divergence, Variance, Loss)
QUIET = dict.fromkeys(("invariants", "spectral", "rmt", "circuits", "divergence", "variance"), "PASS")
BLIND = QUIET | {"divergence": "NOT_MEASURED", "variance": "NOT_MEASURED"}


def settle(tier: str | Policy, outcomes: dict[str, str], kind: str = "unknown"):
    verdicts = [verdict(guard, outcome, f"reason of {guard}") for guard, outcome in outcomes.items()]
    return decide(load_policy(tier), verdicts, kind=kind, step=7)


def cell(tier: str | Policy, outcomes: dict[str, str], kind: str = "unknown") -> str:
    found = settle(tier, outcomes, kind)
    return f"{found.action}{', warned' if found.warned else ''}"


# The table of docs/policy.md: situation, verdicts, then conservative, balanced, aggressive.
ROLL, KEEP, WARNED = "ROLLBACK", "KEEP", "KEEP, warned"
TABLE = [
    ("t0_fail", {**QUIET, "invariants": "FAIL"}, ROLL, ROLL, ROLL),
    ("t0_fail", {**QUIET, "invariants": "FAIL", "loss": "PASS"}, ROLL, ROLL, ROLL),
    ("required_not_measured", {**QUIET, "invariants": "NOT_MEASURED", "loss": "PASS"}, ROLL, ROLL, ROLL),
    ("required_not_measured", {"spectral": "PASS", "divergence": "PASS", "loss": "PASS"}, ROLL, ROLL, ROLL),
    ("loss_rejects", {**QUIET, "loss": "FAIL"}, ROLL, ROLL, ROLL),
    ("loss_accepts", {**QUIET, "loss": "PASS"}, KEEP, KEEP, KEEP),
    ("loss_accepts_warned", {**QUIET, "loss": "PASS", "rmt": "WARN"}, ROLL, WARNED, KEEP),
    ("loss_accepts_warned", {**QUIET, "loss": "PASS", "spectral": "FAIL"}, ROLL, WARNED, KEEP),
    ("loss_accepts_warned", {**QUIET, "loss": "PASS", "divergence": "FAIL"}, ROLL, WARNED, KEEP),
    ("loss_undecided", {**QUIET, "loss": "WARN"}, ROLL, ROLL, WARNED),
    ("outputs_reject", {**QUIET, "loss": "WARN", "divergence": "FAIL"}, ROLL, ROLL, ROLL),
    ("gross_without_outputs", {**QUIET, "loss": "WARN", "spectral": "FAIL", "divergence": "WARN"}, ROLL, ROLL, ROLL),
]
# Without a loss verdict `conservative` never gets beyond the missing requirement.
NO_LOSS = [
    ("outputs_reject", {**QUIET, "divergence": "FAIL"}, ROLL, ROLL),
    ("outputs_reject", {**QUIET, "divergence": "FAIL", "spectral": "FAIL"}, ROLL, ROLL),
    ("outputs_reject", {**QUIET, "divergence": "WARN", "variance": "FAIL"}, ROLL, ROLL),
    ("no_loss_outputs_pass_quiet", QUIET, KEEP, KEEP),
    ("no_loss_outputs_pass_quiet", {**QUIET, "variance": "NOT_MEASURED"}, KEEP, KEEP),
    ("no_loss_outputs_pass_warned", {**QUIET, "spectral": "WARN"}, WARNED, KEEP),
    ("no_loss_outputs_pass_warned", {**QUIET, "spectral": "FAIL"}, WARNED, KEEP),
    ("no_loss_outputs_pass_warned", {**QUIET, "rmt": "WARN"}, WARNED, KEEP),
    ("no_loss_outputs_pass_warned", {**QUIET, "divergence": "WARN"}, WARNED, KEEP),
    ("no_loss_outputs_pass_warned", {**QUIET, "variance": "FAIL"}, WARNED, KEEP),
    ("no_loss_outputs_pass_warned", {**QUIET, "invariants": "WARN"}, WARNED, KEEP),
    ("gross_without_outputs", {**BLIND, "spectral": "FAIL"}, ROLL, ROLL),
    ("gross_without_outputs", {**QUIET, "spectral": "FAIL", "divergence": "WARN"}, ROLL, ROLL),
    ("gross_without_outputs", {"invariants": "PASS", "spectral": "FAIL"}, ROLL, ROLL),
    ("no_forward_weights_pass", BLIND, ROLL, WARNED),
    ("no_forward_weights_warned", {**BLIND, "spectral": "WARN"}, ROLL, ROLL),
    ("no_forward_weights_warned", {**BLIND, "invariants": "WARN"}, ROLL, ROLL),
    ("no_forward_weights_warned", {**BLIND, "rmt": "NOT_MEASURED"}, ROLL, ROLL),
    ("no_forward_weights_warned", {**BLIND, "circuits": "NOT_MEASURED"}, ROLL, ROLL),
    ("no_forward_weights_warned", {**BLIND, "circuits": "WARN"}, ROLL, ROLL),
    ("no_loss_outputs_pass_warned", {**QUIET, "circuits": "FAIL"}, WARNED, KEEP),
    ("gross_without_outputs", {**BLIND, "circuits": "FAIL"}, ROLL, ROLL),
    ("nothing_measured", {**BLIND, **dict.fromkeys(("spectral", "rmt", "circuits"), "NOT_MEASURED")}, ROLL, ROLL),
    ("nothing_measured", {"invariants": "PASS"}, ROLL, ROLL),
]


@pytest.mark.parametrize(("situation", "outcomes", "conservative", "balanced", "aggressive"), TABLE)
def test_policy_table(situation, outcomes, conservative, balanced, aggressive):
    assert settle("balanced", outcomes).situation == situation
    assert [cell(tier, outcomes) for tier in TIERS] == [conservative, balanced, aggressive]


@pytest.mark.parametrize(("situation", "outcomes", "balanced", "aggressive"), NO_LOSS)
def test_policy_table_without_loss(situation, outcomes, balanced, aggressive):
    assert settle("balanced", outcomes).situation == situation
    assert [cell(tier, outcomes) for tier in TIERS] == [ROLL, balanced, aggressive]
    # The rows that `conservative` has for it hold once the user no longer requires loss.
    relaxed = load_policy("conservative").override(required=["invariants"])
    assert settle(relaxed, outcomes).situation == situation
    assert cell(relaxed, outcomes) == ROLL


@pytest.mark.parametrize(
    ("situation", "outcomes", "expected"),
    [
        ("train_ok", QUIET, KEEP),
        ("train_ok", {"invariants": "PASS", "spectral": "PASS"}, KEEP),
        ("train_ok", {"invariants": "PASS", "spectral": "NOT_MEASURED"}, KEEP),
        ("train_warned", {**QUIET, "rmt": "WARN"}, WARNED),
        ("train_fail", {**QUIET, "spectral": "FAIL"}, ROLL),
        ("train_fail", {**QUIET, "divergence": "FAIL"}, ROLL),
        ("t0_fail", {**QUIET, "invariants": "FAIL"}, ROLL),
        ("required_not_measured", {"spectral": "PASS"}, ROLL),
    ],
)
def test_windows_of_training_are_the_same_in_every_tier(situation, outcomes, expected):
    for tier in TIERS:
        assert settle(tier, outcomes, "train").situation == situation
        assert cell(tier, outcomes, "train") == expected


def test_every_situation_is_reachable_and_has_an_action_with_a_source():
    reached = {settle("balanced", outcomes).situation for _, outcomes, *_ in TABLE + NO_LOSS}  # type: ignore[misc]
    assert reached == {name for name in SITUATIONS if not name.startswith("train_")}
    for tier in TIERS:
        assert set(load_policy(tier).actions) == set(SITUATIONS)


def test_a_guard_with_nothing_of_its_kind_in_the_model_leaves_nothing_open():
    verdicts = [verdict(guard, outcome) for guard, outcome in BLIND.items() if guard != "circuits"]
    empty = Verdict("circuits", Outcome.NOT_MEASURED, (), "the model has no attention", 0, 0)
    found = decide(load_policy("aggressive"), [*verdicts, empty], kind="unknown", step=1)
    assert (found.situation, found.action) == ("no_forward_weights_pass", Action.KEEP)
    assert "circuits (the model has no attention)" in found.reason
    unread = replace(empty, num_eligible=3)
    assert decide(load_policy("aggressive"), [*verdicts, unread], kind="unknown", step=1).action is Action.ROLLBACK


def test_conservative_says_that_loss_is_required_and_missing():
    found = settle("conservative", QUIET)
    assert found.situation == "required_not_measured"
    assert "a loss verdict is required and missing (there is no loss data)" in found.reason


def test_reason_names_policy_guard_and_measurement():
    found = settle("balanced", {**QUIET, "divergence": "FAIL", "variance": "FAIL"})
    assert found.reason == (
        "policy 'balanced': the outputs reject the change: divergence: reason of divergence (also variance)"
    )


def test_what_was_not_measured_is_said_even_where_the_edit_is_kept():
    assert (
        "not measured: variance (reason of variance)"
        in settle("balanced", {**QUIET, "variance": "NOT_MEASURED"}).reason
    )


@pytest.mark.parametrize(
    ("outcomes", "assurance"),
    [
        ({**QUIET, "loss": "WARN"}, Assurance.LOSS),
        (QUIET, Assurance.OUTPUTS_ONLY),
        ({**QUIET, "loss": "NOT_MEASURED"}, Assurance.OUTPUTS_ONLY),
        (BLIND, Assurance.WEIGHTS_ONLY),
        (dict.fromkeys(BLIND, "NOT_MEASURED"), Assurance.NONE),
        ({}, Assurance.NONE),
    ],
)
def test_assurance_is_the_highest_tier_measured(outcomes, assurance):
    assert settle("balanced", outcomes).assurance is assurance


def test_no_verdicts_at_all_is_never_kept():
    assert all(settle(tier, {}).action is Action.ROLLBACK for tier in TIERS)


def test_a_worse_verdict_never_gives_a_better_action():
    rank = {ROLL: 0, WARNED: 1, KEEP: 2}
    levels = ("PASS", "WARN", "FAIL")
    guards = ("spectral", "rmt", "divergence", "variance", "loss")
    for tier in TIERS:
        policy = load_policy(tier).override(required=["invariants"])
        every = list(itertools.product(levels, repeat=len(guards)))
        actions = {
            chosen: rank[cell(policy, {"invariants": "PASS", **dict(zip(guards, chosen, strict=True))})]
            for chosen in every
        }
        for chosen, index in itertools.product(every, range(len(guards))):
            if chosen[index] != "FAIL":
                worse = list(chosen)
                worse[index] = levels[levels.index(chosen[index]) + 1]
                assert actions[tuple(worse)] <= actions[chosen], (tier, chosen, guards[index])


def test_verdict_of_an_unregistered_guard_is_an_error():
    with pytest.raises(InputError, match="did you mean 'spectral'"):
        settle("balanced", {"spectrl": "PASS"})


class TestDigests:
    def test_decision_digest_covers_what_was_decided_and_no_numbers(self):
        value = Measurement("rmt", "m", "s", math.nan, -math.inf, None)
        verdicts = [Verdict("invariants", Outcome.PASS, (value,), "fine", 1, 1)]
        policy = load_policy("balanced")
        one = decide(policy, verdicts, kind="unknown", step=3, world_size=2)
        assert one.digest == decide(policy, verdicts, kind="unknown", step=3).digest == decision_digest(one)
        for changes in ({"step": 4}, {"warned": True}, {"reported": (value,)}, {"action": Action.HALT}):
            assert decision_digest(replace(one, **changes)) != one.digest
        other = replace(value, value=1.0, reason="another last digit")
        moved = [Verdict("invariants", Outcome.PASS, (other,), "fine, nearly", 1, 1)]
        assert decide(policy, moved, kind="unknown", step=3).digest == one.digest
        failed = [Verdict("invariants", Outcome.PASS, (replace(value, outcome=Outcome.FAIL),), "fine", 1, 1)]
        assert decision_digest(replace(one, verdicts=tuple(failed))) != one.digest

    def test_evidence_digest_covers_everything_but_the_digests(self):
        value = Measurement("rmt", "m", "s", math.nan, -math.inf, None)
        verdicts = [Verdict("invariants", Outcome.PASS, (value,), "fine", 1, 1)]
        one = decide(load_policy("balanced"), verdicts, kind="unknown", step=3, world_size=2)
        assert one.evidence_digest == evidence_digest(one) == evidence_digest(replace(one, digest="x"))
        moved = replace(verdicts[0], measurements=(replace(value, value=1.0),))
        for changes in ({"step": 4}, {"world_size": 1}, {"reason": "other"}, {"verdicts": (moved,)}):
            assert evidence_digest(replace(one, **changes)) != one.evidence_digest

    def test_policy_digest_covers_limits_actions_and_sources(self):
        policy = load_policy("balanced")
        assert policy.digest == load_policy("balanced").digest
        assert len({load_policy(tier).digest for tier in TIERS}) == 3
        assert policy.override(limits={"spectral": {"gross_growth": 5}}).digest != policy.digest
        assert policy.override(actions={"loss_undecided": "KEEP"}).digest != policy.digest

    def test_an_overridden_tier_does_not_pass_for_the_tier(self):
        once = load_policy("balanced").override(actions={"loss_undecided": "KEEP"})
        assert once.name == once.override(limits={"divergence": {"kl": 0.01}}).name == "balanced, overridden"
        assert once.override(name="mine").name == "mine"

    def test_json_has_no_room_for_nan_so_it_is_written_out(self):
        value = {
            "a": math.nan,
            "b": (math.inf, -math.inf),
            "c": Outcome.WARN,
            "d": 2**60,
            "e": {3, 1},
            "p": Path("a/b"),
        }
        assert to_jsonable(value) == {
            "a": "NaN",
            "b": ["Infinity", "-Infinity"],
            "c": "WARN",
            "d": str(2**60),
            "e": [1, 3],
            "p": "a/b",
        }
        assert canonical_json({"b": 1.0, "a": True}) == b'{"a":true,"b":1}'
        assert json_digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
        with pytest.raises(InputError, match="no JSON form"):
            to_jsonable({"f": len})


class TestTiers:
    @pytest.mark.parametrize("tier", TIERS)
    def test_every_limit_of_every_guard_is_written_with_its_source(self, tier):
        policy = load_policy(tier)
        for guard in GUARDS:
            keys = [item.name for item in fields(guard.Limits)]
            assert sorted(policy.limits.get(guard.name, {})) == sorted(keys)
            for key in keys:
                assert len(policy.sources[f"limits.{guard.name}.{key}"]) > 15
        for situation in SITUATIONS:
            assert (
                "docs/policy.md" in policy.sources[f"actions.{situation}"]
                or "docs/guards" in policy.sources[f"actions.{situation}"]
            )

    def test_balanced_is_what_the_dataclasses_default_to(self):
        for guard in GUARDS:
            assert load_policy("balanced").limits_for(guard) == guard.Limits()

    def test_tiers_grow_laxer(self):
        tiers = [load_policy(tier) for tier in TIERS]
        for guard, key in (
            (Divergence, "kl"),
            (Divergence, "hidden_error"),
            (Variance, "band"),
            (RMT, "margin"),
            (RMT, "deadband"),
            (Circuits, "distance"),
            (Loss, "tau"),
        ):
            values = [getattr(policy.limits_for(guard), key) for policy in tiers]
            assert values == sorted(values)
        kappas = [policy.limits_for(Spectral).kappa["default"] for policy in tiers]
        assert kappas == [0.062, 0.15, 0.18]
        assert [policy.limits_for(Divergence).kl for policy in tiers] == [0.01, 0.041, 0.11]

    def test_required_guards(self):
        assert load_policy("conservative").required == ("invariants", "divergence", "loss")
        assert load_policy("balanced").required == load_policy("aggressive").required == ("invariants",)


class TestUserPolicies:
    def write(self, folder: Path, text: str) -> Path:
        path = folder / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    def test_a_file_extends_a_tier_with_plain_numbers(self, tmp_path):
        path = self.write(
            tmp_path,
            "extends: balanced\n"
            "limits:\n  spectral: {gross_growth: 5, kappa: {ffn: 0.3}}\n"
            "  divergence: {kl: {value: 0.01, source: our own sweep, provisional: true}}\n"
            "actions: {loss_undecided: KEEP_WARNED}\n",
        )
        policy = load_policy(path)
        assert policy.name == "mine"
        limits = policy.limits_for(Spectral)
        assert limits.gross_growth == 5.0
        assert limits.kappa == {"default": 0.15, "attn": 0.15, "ffn": 0.3}
        assert policy.limits_for(Divergence).kl == 0.01
        assert policy.sources["limits.spectral.gross_growth"] == "user"
        assert policy.sources["limits.divergence.kl"] == "our own sweep"
        assert "limits.divergence.kl" in policy.provisional
        assert policy.actions["loss_undecided"] == "KEEP_WARNED"
        assert load_policy(str(path)).digest == policy.digest

    def test_override_marks_the_user_as_source(self):
        base = load_policy("balanced")
        mine = base.override(
            limits={"rmt": {"epsilon": {"attn": 0.2}}}, actions={"loss_undecided": "KEEP"}, name="mine"
        )
        assert mine.limits_for(RMT).epsilon == {"default": 0.31, "ffn": 0.31, "expert": 0.31, "attn": 0.2}
        assert mine.sources["limits.rmt.epsilon"] == mine.sources["actions.loss_undecided"] == "user"
        assert "limits.rmt.epsilon" not in mine.provisional
        assert base.limits_for(RMT).epsilon["attn"] == 0.31
        assert load_policy(mine) is mine

    def test_mode_is_part_of_the_policy_and_of_its_digest(self, tmp_path):
        watching = load_policy(self.write(tmp_path, "extends: balanced\nmode: monitor\n"))
        assert (watching.mode, load_policy("balanced").mode) == ("monitor", "gate")
        assert load_policy("balanced").override(mode="monitor").mode == "monitor"
        assert watching.override(actions={"loss_undecided": "KEEP"}).mode == "monitor"
        assert load_policy("balanced").override(mode="monitor").digest != load_policy("balanced").override().digest
        for text, said in (("mode: monitr", "did you mean 'monitor'"), ("mode: 3", "must be text")):
            with pytest.raises(PolicyError, match=said):
                load_policy(self.write(tmp_path, f"extends: balanced\n{text}\n"))

    @pytest.mark.parametrize("on_violation", ["rollback", "raise", "revert-worst"])
    def test_a_policy_that_monitors_reports_and_changes_nothing(self, on_violation):
        model = build("llama")
        session = GuardSession(model, policy=load_policy("balanced").override(mode="monitor"))
        with session.edit("x1000", on_violation=on_violation) as step, torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1000.0)
            broken = [parameter.clone() for parameter in model.parameters()]
        assert step.decision is not None
        assert (step.decision.action, step.applied, step.monitor) == (Action.ROLLBACK, "kept", True)
        assert all(torch.equal(now, then) for now, then in zip(model.parameters(), broken, strict=True))
        stated = session.certificate().statement["predicate"]
        assert stated["policy"]["resolved"]["mode"] == "monitor"  # type: ignore[index]

    def test_any_cell_can_be_overridden(self):
        mine = load_policy("balanced").override(actions={"required_not_measured": "KEEP_WARNED"})
        assert cell(mine, {"spectral": "PASS"}) == WARNED

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("extends: balncd\n", "did you mean 'balanced'"),
            ("limit: {}\nextends: balanced\n", "unknown key 'limit'; did you mean 'limits'"),
            ("extends: balanced\nlimits: {spectrl: {kappa: 1}}\n", "unknown guard 'spectrl'; did you mean 'spectral'"),
            ("extends: balanced\nlimits: {rmt: {epsilom: 1}}\n", "no limit 'epsilom'; did you mean 'epsilon'"),
            ("extends: balanced\nlimits: {rmt: {q: 100}}\n", "no limit 'q'"),
            ("extends: balanced\nlimits: {rmt: {epsilon: -0.1}}\n", "'epsilon' must be a finite number at least 0"),
            ("extends: balanced\nlimits: {rmt: {epsilon: x}}\n", "'epsilon' must be a number, not 'x'"),
            ("extends: balanced\nlimits: {rmt: {epsilon: 1e-7}}\n", "write 1.0e-7"),
            ("extends: balanced\nlimits: {rmt: {margin: 0.9}}\n", "'margin' must be a finite number at least 1"),
            ("extends: balanced\nlimits: {divergence: {kl: .nan}}\n", "'kl' must be a finite number"),
            ("extends: balanced\nlimits: {divergence: {kl: true}}\n", "'kl' must be a number"),
            ("extends: balanced\nlimits: {divergence: {kl: [1]}}\n", "limits.divergence.kl must be a number"),
            ("extends: balanced\nlimits: {divergence: {kl: {valu: 1}}}\n", "must be a number, not {'valu'"),
            ("extends: balanced\nlimits: {divergence: {kl: {value: 1, sauce: x}}}\n", "did you mean 'source'"),
            ("extends: balanced\nlimits: {spectral: {kappa: {fnn: 1}}}\n", "did you mean 'ffn'"),
            ("extends: balanced\nlimits: {spectral: 5}\n", "limits.spectral must be a mapping"),
            ("extends: balanced\nlimits: {invariants: {strict: 1}}\n", "no limit 'strict'"),
            ("extends: balanced\nactions: {loss_undecidd: KEEP}\n", "did you mean 'loss_undecided'"),
            ("extends: balanced\nactions: {loss_undecided: KEEPS}\n", "did you mean 'KEEP'"),
            ("extends: balanced\nactions: {loss_undecided: HALT}\n", "unknown action 'HALT'"),
            ("extends: balanced\nrequired: [divergenc]\n", "did you mean 'divergence'"),
            ("extends: balanced\nrequired: divergence\n", "must be a list"),
            ("name: alone\n", "gives no action for t0_fail"),
            ("extends: balanced\nextends: aggressive\n", "written twice, the second time in line 2"),
            ("extends: [balanced\n", "is not valid YAML in line 2"),
            ("- balanced\n", "must be a mapping"),
            ("", "must be a mapping"),
            ("extends: balanced\nname: 3\n", "name must be text"),
            ("extends: balanced\nlimits: {1: {}}\n", "each key must be text"),
        ],
    )
    def test_wrong_file_is_one_clear_sentence(self, tmp_path, text, said):
        with pytest.raises(PolicyError) as caught:
            load_policy(self.write(tmp_path, text))
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("balancd", "did you mean 'balanced'"),
            ("", "unknown policy ''"),
            ("missing.yaml", "'missing.yaml' cannot be read: No such file"),
            (Path("missing"), "cannot be read"),
        ],
    )
    def test_unknown_policy(self, name, said):
        with pytest.raises(PolicyError, match=said):
            load_policy(name)

    def test_override_is_checked_too(self):
        base = load_policy("balanced")
        for limits in ({"rmt": {"epsilon": -1.0}}, {"rmtt": {}}, {"rmt": 5}, {"spectral": {"correct": "magic"}}):
            with pytest.raises(PolicyError):
                base.override(limits=limits)  # type: ignore[arg-type]


def test_documented_table_is_the_one_that_decides():
    page = Path(__file__).parents[2].joinpath("docs", "policy.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in lines]
    documented = {row[0].strip("`"): row[2:] for row in rows}
    cells = {"KEEP": "KEEP", "KEEP_WARNED": "KEEP, warned", "ROLLBACK": "ROLLBACK"}
    tiers = [load_policy(tier) for tier in TIERS]
    assert documented == {name: [cells[tier.actions[name]] for tier in tiers] for name in SITUATIONS}
    assert list(documented) == list(SITUATIONS)  # in the order in which they are tried


def test_no_other_policy_bears_the_name_of_a_tier(tmp_path):
    lax = tmp_path / "lax.yaml"
    lax.write_text("name: conservative\nextends: conservative\nlimits: {loss: {tau: 1000}}\nrequired: []\n")
    with pytest.raises(PolicyError, match=r"is called 'conservative' and is not that tier"):
        load_policy(lax)
    with pytest.raises(PolicyError, match="cannot be called 'balanced'"):
        load_policy("balanced").override({"loss": {"tau": 1000.0}}, name="balanced")
    same = tmp_path / "balanced.yaml"
    same.write_text("extends: balanced\n")
    assert load_policy(same).digest == load_policy("balanced").digest


def test_what_is_done_to_one_loaded_tier_does_not_reach_the_next():
    load_policy("balanced").limits["spectral"]["kappa"] = 9.0
    assert load_policy("balanced").limits["spectral"]["kappa"] != 9.0
