"""The transaction: keep, restore, refuse, report; the model is never left half changed."""

import copy
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import build
from torch import nn

from weightproof import BaselineError, Certificate, EditRejectedError, GuardSession, InputError, edits, kinds
from weightproof.readings import tensors as tensor_readings
from weightproof.snapshot import tensor_digest
from weightproof.snapshots import tensor_store
from weightproof.transactions.guard_state import GuardState
from weightproof.types import Action, Outcome


@pytest.fixture
def llama():
    """Untrained, with a head that says something: the outputs of a small random one hardly differ whatever they are."""
    torch.manual_seed(0)
    model = build("llama")
    scale(model, "lm_head.weight", 4.0)
    return model


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model, state):
    now = model.state_dict()
    assert now.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(now[name], tensor), name


def scale(model, name, factor):
    with torch.no_grad():
        model.get_parameter(name).mul_(factor)


DOWN = "model.layers.1.mlp.down_proj.weight"


def test_int8_is_kept_and_recorded(llama):
    session = GuardSession(llama)
    step = session.apply(edits.RTN(8))
    assert step.decision.action is Action.KEEP, step.decision.reason
    assert step.applied == "kept"
    assert step.record.kind == "quantize"
    assert step.record.digest_before != step.record.digest_after == session.model_digest
    assert all(0 < delta < 0.05 for delta in step.record.relative_delta.values())
    assert session.certificate().model_digest == session.model_digest


def test_gross_damage_is_rolled_back_bit_for_bit(llama):
    before = state_of(llama)
    session = GuardSession(llama)
    with session.edit("x1000") as step:
        for name, _ in llama.named_parameters():
            scale(llama, name, 1000.0)
    assert step.decision.action is Action.ROLLBACK
    assert step.applied == "restored"
    assert_same(llama, before)


def test_optimizer_still_trains_the_live_tensors_after_a_rollback(llama):
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-2)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    pointers = {p.data_ptr() for p in llama.parameters()}
    session = GuardSession(llama)
    with session.edit("x1000") as step:
        scale(llama, "lm_head.weight", 1000.0)
    assert step.applied == "restored"
    assert {id(p) for p in llama.parameters()} == held
    assert {p.data_ptr() for p in llama.parameters()} == pointers
    before = state_of(llama)
    llama(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    assert not torch.equal(llama.state_dict()["lm_head.weight"], before["lm_head.weight"])


def test_exception_in_the_block_restores_and_is_raised_again(llama):
    before = state_of(llama)
    session = GuardSession(llama)
    with pytest.raises(ZeroDivisionError), session.edit("broken"):
        scale(llama, DOWN, 3.0)
        _ = 1 / 0
    assert_same(llama, before)
    assert session.history == ()
    assert session.apply(edits.RTN(8)).applied == "kept"


def test_replaced_module_is_put_back(llama):
    before, original = state_of(llama), llama.model.layers[0].mlp.up_proj
    session = GuardSession(llama)
    with session.edit("replace") as step:
        torch.manual_seed(3)
        fresh = nn.Linear(original.in_features, original.out_features, bias=False)
        with torch.no_grad():
            fresh.weight.mul_(100)
        llama.model.layers[0].mlp.up_proj = fresh
    assert step.decision.action is Action.ROLLBACK
    assert step.record.replaced_modules
    assert llama.model.layers[0].mlp.up_proj is original
    assert_same(llama, before)


def test_monitor_reports_and_never_restores(llama):
    session = GuardSession(llama)
    with session.edit("x1000", on_violation="monitor") as step:
        scale(llama, DOWN, 1000.0)
    assert step.decision.action is Action.ROLLBACK
    assert step.applied == "kept"
    assert session.certificate().predicate["steps"][0]["monitor"] is True


def test_raise_restores_first(llama):
    before = state_of(llama)
    session = GuardSession(llama)
    with pytest.raises(EditRejectedError, match="x1000"), session.edit("x1000", on_violation="raise"):
        scale(llama, DOWN, 1000.0)
    assert_same(llama, before)
    assert session.history[0].applied == "restored"


def test_small_harms_add_up_against_the_baseline(llama):
    """Each of many equal steps would pass alone; the drift from the baseline does not."""
    session = GuardSession(llama)
    torch.manual_seed(1)
    noise = torch.randn_like(llama.lm_head.weight) * llama.lm_head.weight.std()
    actions = []
    for _ in range(40):
        with session.edit("noise") as step, torch.no_grad():
            llama.lm_head.weight.add_(noise, alpha=0.2)
        actions.append(step.decision.action)
        if step.decision.action is not Action.KEEP:
            break
    assert actions[0] is Action.KEEP
    assert actions[-1] is Action.ROLLBACK


def test_declared_quantize_that_is_not_one_breaks_its_contract(llama):
    session = GuardSession(llama)
    with session.edit("not int4", kind=kinds.Quantize(4), targets=[DOWN]) as step:
        scale(llama, DOWN, 1.0001)
    invariants = next(v for v in step.verdicts if v.guard == "invariants")
    assert invariants.outcome is Outcome.FAIL
    assert step.decision.action is Action.ROLLBACK


@pytest.mark.parametrize(
    "kind", [kinds.Quantize(8), kinds.Prune(0.0, scope="model"), kinds.LoraMerge({DOWN: torch.ones(32, 48)})]
)
def test_norm_changed_by_an_edit_of_weights_breaks_its_contract(llama, kind):
    session = GuardSession(llama)
    with session.edit("and a norm", kind=kind) as step:
        scale(llama, "model.norm.weight", 1.03)
    assert step.decision.action is Action.ROLLBACK
    assert "model.norm.weight" in step.decision.reason
    assert "altered_outside_matrices" in step.decision.reason


def test_cast_of_a_norm_is_held_to_its_rounding(llama):
    norm = llama.model.norm.weight
    scale(llama, "model.norm.weight", 1.003)
    session = GuardSession(llama)
    with session.edit("cast", kind=kinds.Cast("bfloat16")) as rounded, torch.no_grad():
        norm.copy_(norm.bfloat16().float())
        llama.lm_head.weight.copy_(llama.lm_head.weight.bfloat16().float())
    assert rounded.decision.action is Action.KEEP, rounded.decision.reason
    with session.edit("not a cast", kind=kinds.Cast("bfloat16")) as scaled:
        scale(llama, "model.norm.weight", 1.03)
    assert scaled.decision.action is Action.ROLLBACK


def test_change_outside_the_declared_targets_is_rolled_back(llama):
    session = GuardSession(llama)
    with session.edit("too much", targets="*.mlp.*") as step:
        scale(llama, DOWN, 1.0 + 1e-6)
        scale(llama, "model.layers.0.self_attn.q_proj.weight", 1.0 + 1e-6)
    assert step.decision.action is Action.ROLLBACK
    assert "q_proj" in step.decision.reason


def test_no_op_is_reported(llama):
    session = GuardSession(llama)
    with session.edit("nothing") as undeclared:
        pass
    assert undeclared.decision.action is Action.KEEP
    assert undeclared.decision.warned
    with session.edit("nothing", targets="*.mlp.*") as declared:
        pass
    assert declared.decision.action is Action.ROLLBACK


def test_conservative_says_that_loss_is_required(llama):
    step = GuardSession(llama, policy="conservative").apply(edits.RTN(8))
    assert step.decision.action is Action.ROLLBACK
    assert "loss" in step.decision.reason


def test_change_outside_any_edit_is_noticed(llama, caplog):
    session = GuardSession(llama)
    scale(llama, DOWN, 1000.0)
    with session.edit("innocent") as step:
        pass
    assert step.record.stray_names == (DOWN,)
    invariants = next(v for v in step.verdicts if v.guard == "invariants")
    assert any(m.statistic == "num_stray_tensors" and m.outcome is Outcome.WARN for m in invariants.measurements)
    assert "outside of any guarded edit" in caplog.text
    assert step.decision.action is Action.ROLLBACK


def test_measuring_leaves_no_trace(llama):
    llama.train()
    llama.model.layers[0].mlp.eval()
    llama(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    flags = {name: module.training for name, module in llama.named_modules()}
    grads = {name: p.grad.clone() for name, p in llama.named_parameters() if p.grad is not None}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in llama.named_modules()}
    generators = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    session = GuardSession(llama)
    session.apply(edits.RTN(8))
    assert {name: module.training for name, module in llama.named_modules()} == flags
    assert {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in llama.named_modules()} == hooks
    for name, grad in grads.items():
        assert torch.equal(llama.get_parameter(name).grad, grad)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert np.array_equal(np.random.get_state()[1], generators[1])  # noqa: NPY002
    assert random.getstate() == generators[2]


def test_retain_windows_serve_as_calibration(llama):
    windows = [{"input_ids": torch.randint(3, 60, (24,)).tolist()} for _ in range(4)]
    session = GuardSession(llama, retain=windows)
    assert [w.name for w in session.windows] == ["random", "calibration", "retain"]
    step = session.apply(edits.RTN(8))
    divergence = next(v for v in step.verdicts if v.guard == "divergence")
    assert {m.target for m in divergence.measurements if m.statistic.startswith("kl")} == {
        "random windows",
        "calibration windows",
    }


def test_module_without_a_guessable_input_is_never_accepted_by_weights_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    session = GuardSession(model)
    with session.edit("tiny") as step, torch.no_grad():
        model[0].weight.mul_(1 + 1e-6)
    divergence = next(v for v in step.verdicts if v.guard == "divergence")
    assert divergence.outcome is Outcome.NOT_MEASURED
    assert step.decision.action is Action.ROLLBACK


class Masked(nn.Module):
    """A module with an additive causal mask, as many hand-written models keep it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("mask", torch.full((8, 8), float("-inf")).triu(1))

    def forward(self, x):
        return torch.softmax(self.mask, -1) @ self.linear(x)


def test_mask_of_infinities_in_a_buffer_is_no_damage_until_it_changes():
    torch.manual_seed(0)
    model = Masked()
    session = GuardSession(model, retain=[{"x": torch.randn(1, 8, 16)} for _ in range(4)])
    with session.edit("noise") as step, torch.no_grad():
        model.linear.weight.add_(torch.randn(16, 16) * 1e-7)
    assert step.decision.action is Action.KEEP, step.decision.reason
    with session.edit("mask") as step:
        model.mask[0, 0] = float("-inf")
    assert step.decision.action is Action.ROLLBACK
    model.mask[0, 0] = float("nan")
    with pytest.raises(BaselineError, match="mask"):
        GuardSession(model)


LONG_FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic"}, {"rope_type": "longrope", **LONG_FACTORS}], ids=str)
def test_forward_pass_that_rewrites_a_rotary_table_does_not_spoil_a_restore(rope):
    torch.manual_seed(0)
    model = build("llama", rope_parameters={"rope_theta": 1e4, "factor": 2.0, **rope})
    session = GuardSession(model)
    model(input_ids=torch.randint(3, 60, (1, 100)))  # longer than the table: rewrites its buffer
    with session.edit("x1000") as step:
        scale(model, "lm_head.weight", 1000.0)
        model(input_ids=torch.randint(3, 60, (1, 100)))
    assert (step.decision.action, step.applied) == (Action.ROLLBACK, "restored")


def test_rotary_table_that_follows_the_length_is_no_change_of_weights():
    torch.manual_seed(0)
    model = build("llama", rope_parameters={"rope_theta": 1e4, "factor": 2.0, "rope_type": "longrope", **LONG_FACTORS})
    session = GuardSession(model)
    model(input_ids=torch.randint(3, 60, (1, 100)))
    step = session.apply(edits.RTN(8))
    assert step.decision.action is Action.KEEP, step.decision.reason
    assert step.record.stray_names == ()


class TestBadInput:
    def test_broken_baseline_is_refused(self, llama):
        scale(llama, DOWN, float("nan"))
        with pytest.raises(BaselineError, match="down_proj"):
            GuardSession(llama)

    def test_empty_retain(self, llama):
        with pytest.raises(InputError, match="has no window"):
            GuardSession(llama, retain=[])

    def test_empty_target(self, llama):
        with pytest.raises(InputError, match="target data has no window"):
            GuardSession(llama, target=[])

    def test_an_accelerator_of_other_processes_than_torch_knows(self, llama):
        with pytest.raises(InputError, match=r"4 processes and torch\.distributed 1"):
            GuardSession(llama, accelerator=SimpleNamespace(num_processes=4))

    def test_unknown_tier(self, llama):
        with pytest.raises(InputError, match="balanced"):
            GuardSession(llama, policy="balenced")

    def test_unknown_reaction_and_kind(self, llama):
        session = GuardSession(llama)
        with pytest.raises(InputError, match="rollback"), session.edit("x", on_violation="rolback"):
            pass
        with pytest.raises(InputError, match="preserving"), session.edit("x", kind="preservng"):
            pass
        assert session.apply(edits.RTN(8)).applied == "kept"

    def test_edits_do_not_nest(self, llama):
        session = GuardSession(llama)
        with pytest.raises(InputError, match="nest"), session.edit("outer"), session.edit("inner"):
            pass

    def test_edit_that_selects_nothing(self, llama):
        with pytest.raises(InputError, match="selects no"):
            GuardSession(llama).apply(edits.RTN(8, include=("no.such.*",)))

    def test_jsonl_needs_a_folder(self, llama):
        with pytest.raises(InputError, match="output_dir"):
            GuardSession(llama, trackers=["jsonl"])


class TestTrainingWindows:
    def test_healthy_window_becomes_the_last_good_state(self, llama):
        session = GuardSession(llama)
        session.watch()
        with torch.no_grad():
            for parameter in llama.parameters():
                parameter.add_(torch.randn_like(parameter) * 1e-3)
        step = session.check_window(step=5, raw_losses=[2.0, 1.9])
        assert (step.decision.action, step.applied) == (Action.KEEP, "kept")
        assert step.record.kind == "train"
        after = state_of(llama)
        scale(llama, DOWN, float("nan"))
        step = session.check_window(step=10, raw_losses=[1.8])
        assert (step.decision.action, step.applied) == (Action.ROLLBACK, "restored")
        assert_same(llama, after)

    def test_loss_that_is_not_finite_rolls_back(self, llama):
        session = GuardSession(llama)
        session.watch()
        before = state_of(llama)
        scale(llama, DOWN, 1.01)
        step = session.check_window(step=5, raw_losses=[2.0, float("nan")])
        assert step.decision.action is Action.ROLLBACK
        assert_same(llama, before)

    def test_growth_of_an_untrained_matrix_is_not_final_until_a_loss_was_seen(self, llama):
        """The scaled weights pass (pure bulk proves nothing), yet they never become the last good state."""
        session = GuardSession(llama)
        session.watch()
        before = state_of(llama)
        session.training.losses = [2.0, 2.01] * 10
        scale(llama, DOWN, 100.0)
        first = session.check_window(step=5, raw_losses=[2.0, 2.0, 2.0])
        second = session.check_window(step=10, raw_losses=[9.0, 9.0, 9.0])
        assert second.decision.action is Action.ROLLBACK, first.decision
        assert_same(llama, before)

    def test_state_saved_after_a_held_window_was_rejected_describes_the_restored_weights(self, llama, tmp_path):
        session = GuardSession(llama)
        session.watch()
        session.training.losses = [2.0, 2.01] * 10
        scale(llama, DOWN, 100.0)
        assert session.check_window(step=5, raw_losses=[2.0, 2.0, 2.0]).applied == "kept"
        assert session.check_window(step=10, raw_losses=[9.0, 9.0, 9.0]).applied == "restored"
        session.save_state(tmp_path)
        GuardSession(copy.deepcopy(llama)).load_state(tmp_path)

    def test_an_edit_after_a_held_window_is_charged_with_its_own_changes_only(self, llama):
        session = GuardSession(llama)
        session.watch()
        session.training.losses = [2.0, 2.01] * 10
        scale(llama, DOWN, 100.0)
        assert session.check_window(step=5, raw_losses=[2.0, 2.0, 2.0]).applied == "kept"
        with session.edit("small", targets="*.q_proj.weight") as step:
            scale(llama, "model.layers.0.self_attn.q_proj.weight", 1.01)
        assert step.record.stray_names == ()

    def test_a_kept_window_hashes_each_tensor_once(self, llama, monkeypatch):
        session = GuardSession(llama)
        session.watch()
        hashed: list[int] = []

        def counting(tensor):
            hashed.append(tensor.numel())
            return tensor_digest(tensor)

        monkeypatch.setattr(tensor_readings, "tensor_digest", counting)
        monkeypatch.setattr(tensor_store, "tensor_digest", counting)
        with torch.no_grad():
            for parameter in llama.parameters():
                parameter.mul_(1.001)
        assert session.check_window(step=5, raw_losses=[2.0]).applied == "kept"
        assert sum(hashed) == sum(parameter.numel() for parameter in llama.parameters()), "buffers did not change"

    def test_monitored_run_goes_on_after_weights_broke(self, llama):
        session = GuardSession(llama)
        session.watch()
        scale(llama, DOWN, 1.01)
        session.check_window(step=1, raw_losses=[2.0], on_violation="monitor")
        scale(llama, DOWN, float("nan"))
        broken = session.check_window(step=2, raw_losses=[2.0], on_violation="monitor")
        assert (broken.decision.action, broken.applied) == (Action.ROLLBACK, "kept")
        edit = session.apply(edits.RTN(8, exclude=(DOWN,)), on_violation="monitor")
        assert edit.decision.action is Action.ROLLBACK

    def test_window_without_a_last_good_state_is_an_error(self, llama):
        with pytest.raises(InputError, match="watch"):
            GuardSession(llama).check_window(step=1)

    def test_edit_after_training_is_judged_against_the_trained_state(self, llama):
        session = GuardSession(llama)
        session.watch()
        with torch.no_grad():
            for parameter in llama.parameters():
                parameter.mul_(1.5)
        assert session.check_window(step=5, raw_losses=[2.0]).applied == "kept"
        assert session.apply(edits.RTN(8), step=5).decision.action is Action.KEEP

    def test_kept_training_inside_an_edit_moves_the_baseline_too(self, llama):
        session = GuardSession(llama)
        with session.edit("fine-tune", kind="train") as step, torch.no_grad():
            for parameter in llama.parameters():
                parameter.mul_(1.5)
        assert step.decision.action is Action.KEEP
        after = session.apply(edits.RTN(8))
        assert (after.decision.action, after.applied) == (Action.KEEP, "kept"), after.decision.reason


class TestState:
    def test_full_disk_for_the_evidence_changes_no_verdict(self, llama, tmp_path, monkeypatch, caplog):
        before = state_of(llama)
        session = GuardSession(llama, output_dir=tmp_path)

        def full(*_args, **_options):
            raise InputError("cannot write certificate.json: No space left on device")

        monkeypatch.setattr(Certificate, "save", full)
        with pytest.raises(EditRejectedError), session.edit("x1000", on_violation="raise"):
            scale(llama, DOWN, 1000.0)
        assert_same(llama, before)
        assert "No space left" in caplog.text
        assert session.history[0].decision.action is Action.ROLLBACK

    def test_files_are_written_and_read_back(self, llama, tmp_path):
        session = GuardSession(llama, output_dir=tmp_path)
        session.apply(edits.RTN(8))
        session.close()
        certificate = Certificate.load(tmp_path / "certificate.json")
        assert certificate.model_digest == session.model_digest
        assert certificate.predicate["steps"][0]["action"] == "KEEP"
        assert certificate.predicate["cost"]["seconds"] > 0
        events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
        assert {event["type"] for event in events} == {"event", "picture", "certificate"}

    def test_resume_continues_history_and_refuses_other_weights(self, llama, tmp_path):
        session = GuardSession(llama)
        session.apply(edits.RTN(8))
        session.save_state(tmp_path)
        twin = copy.deepcopy(llama)
        resumed = GuardSession(twin)
        resumed.load_state(tmp_path)
        resumed.apply(edits.RTN(6))
        steps = resumed.certificate().predicate["steps"]
        assert [step["name"] for step in steps] == ["rtn-int8-channel", "rtn-int6-channel"]
        other = copy.deepcopy(llama)
        scale(other, DOWN, 2.0)
        with pytest.raises(BaselineError, match="down_proj"):
            GuardSession(other).load_state(tmp_path)

    @pytest.mark.parametrize("content", ["[]", "{}", '{"format": "weightproof-state-v9"}'])
    def test_state_of_another_format_is_refused(self, llama, tmp_path, content):
        GuardSession(llama).save_state(tmp_path)
        (tmp_path / "guard_state.json").write_text(content)
        with pytest.raises(BaselineError, match="no guard state that this version reads"):
            GuardSession(llama).load_state(tmp_path)

    def test_state_that_lacks_a_field_is_refused(self, llama, tmp_path):
        GuardSession(llama).save_state(tmp_path)
        path = tmp_path / "guard_state.json"
        content = json.loads(path.read_text())
        for field in content.keys() - {"format"}:
            path.write_text(json.dumps({key: value for key, value in content.items() if key != field}))
            with pytest.raises(BaselineError, match=rf"guard_state\.json was altered: '{field}'"):
                GuardState.load(tmp_path)

    def test_state_beside_readings_of_another_moment_is_refused(self, llama, tmp_path):
        GuardSession(llama).save_state(tmp_path)
        scale(llama, DOWN, 1.01)
        GuardSession(llama).baseline.save(tmp_path)  # a later save that ended before it wrote the JSON file
        with pytest.raises(BaselineError, match="different moments"):
            GuardState.load(tmp_path)

    def test_resume_under_another_policy_is_remarked(self, llama, tmp_path, caplog):
        GuardSession(llama).save_state(tmp_path)
        GuardSession(llama).load_state(tmp_path)
        assert "another policy" not in caplog.text
        GuardSession(llama, policy="aggressive").load_state(tmp_path)
        assert "another policy (aggressive)" in caplog.text

    def test_missing_state_is_named(self, llama, tmp_path):
        with pytest.raises(BaselineError, match=r"guard_state\.json"):
            GuardSession(llama).load_state(tmp_path)

    def test_snapshots_on_disk_restore_and_are_removed(self, llama, tmp_path):
        before = state_of(llama)
        session = GuardSession(llama, snapshot_dir=tmp_path / "snapshots")
        with session.edit("x1000"):
            scale(llama, DOWN, 1000.0)
        assert_same(llama, before)
        assert not [path for path in (tmp_path / "snapshots").rglob("*") if path.is_file()]

    def test_a_quiet_window_is_in_the_log_at_once_and_in_the_certificate_at_the_end(self, llama, tmp_path):
        session = GuardSession(llama, output_dir=tmp_path)
        session.watch()
        with torch.no_grad():
            for parameter in llama.parameters():
                parameter.mul_(1.001)
        step = session.check_window(step=5, raw_losses=[2.0])
        assert not step.decision.warned
        assert '"step": 5' in (tmp_path / "events.jsonl").read_text()
        assert not (tmp_path / "certificate.json").exists()
        session.close()
        assert [step["step"] for step in Certificate.load(tmp_path / "certificate.json").predicate["steps"]] == [5]
