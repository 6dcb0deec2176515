"""What a user gets who misuses a session, or whose model or disk fails in the middle: never a model half changed."""

import math

import pytest
import torch
from architectures import build
from torch import nn

from weightproof import Certificate, GuardSession, InputError, PolicyError, RestoreError, edits, kinds, load_policy
from weightproof.judgement import evidence
from weightproof.policy import decision_digest
from weightproof.snapshot import Snapshot
from weightproof.types import Action, Outcome

HEAD = "lm_head.weight"


@pytest.fixture
def llama():
    return build("llama")


def scale(model, factor, name=HEAD):
    with torch.no_grad():
        model.get_parameter(name).mul_(factor)


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model, before):
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], before[name]) for name in before)


def verdict(step, guard):
    return next(v for v in step.verdicts if v.guard == guard)


@pytest.mark.parametrize("factor", [1.0001, 1000.0], ids=["kept", "rejected"])
def test_a_picture_that_cannot_be_drawn_leaves_no_change_behind(llama, tmp_path, monkeypatch, factor):
    session, before = GuardSession(llama, output_dir=tmp_path, snapshot_dir=tmp_path / "snapshots"), bits(llama)

    def out_of_memory(*_):
        raise MemoryError

    monkeypatch.setattr(evidence, "spectrum_of_worst", out_of_memory)
    with pytest.raises(MemoryError), session.edit("x"):
        scale(llama, factor)
    assert_same(llama, before)
    assert list((tmp_path / "snapshots").iterdir()) == []
    session.close()


@pytest.mark.parametrize("targets", [5, [5], ["lm_head", None]])
def test_targets_that_are_no_globs_are_refused_before_anything_changes(llama, targets):
    session = GuardSession(llama)
    with pytest.raises(InputError, match="globs"), session.edit("x", targets=targets):
        pytest.fail("the block was entered")
    assert session.apply(edits.RTN(8)).applied == "kept"


def test_nothing_can_be_judged_after_close(llama, tmp_path):
    session = GuardSession(llama, output_dir=tmp_path)
    session.watch()
    session.close()
    session.close()
    before = bits(llama)
    with pytest.raises(InputError, match="closed"):
        session.apply(edits.RTN(8))
    with pytest.raises(InputError, match="closed"):
        session.check_window(step=1)
    assert_same(llama, before)
    assert session.certificate().model_digest == session.model_digest


@pytest.mark.parametrize("model", [None, "gpt2", {}])
def test_what_is_no_module_is_refused_by_name(model):
    with pytest.raises(InputError, match=type(model).__name__):
        GuardSession(model)


@pytest.mark.parametrize("policy", [None, 5])
def test_what_is_no_policy_is_refused(policy):
    with pytest.raises(PolicyError, match="balanced"):
        load_policy(policy)


def test_floating_point_numbers_are_no_token_ids(llama):
    with pytest.raises(InputError, match="integers"):
        GuardSession(llama, retain=torch.rand(4, 16))


def test_a_want_of_memory_is_no_verdict_about_the_model(llama):
    def starve(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    session, before = GuardSession(llama), {name: p.clone() for name, p in llama.named_parameters()}
    with pytest.raises(torch.OutOfMemoryError), session.edit("int8"):
        llama.model.layers[0].mlp.down_proj.weight.data.mul_(1.001)
        handle = llama.model.register_forward_pre_hook(starve)
    handle.remove()
    assert session.history == ()
    assert all(torch.equal(p, before[name]) for name, p in llama.named_parameters())


def test_a_forward_pass_that_raises_is_named_and_not_called_nan(llama):
    session = GuardSession(llama)
    with session.edit("break") as step:
        del llama.model.layers[0].mlp.up_proj
    assert step.applied == "restored"
    outputs = verdict(step, "divergence")
    assert outputs.outcome is Outcome.FAIL
    assert "no longer runs" in outputs.reason
    assert "up_proj" in outputs.reason
    assert "NaN" not in outputs.reason


def test_a_halted_decision_has_the_digest_of_what_it_says(llama):
    session = GuardSession(llama)
    with pytest.raises(RestoreError), session.edit("hook"):
        llama.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits * 50)
    decision = session.history[-1].decision
    assert decision.action is Action.HALT
    assert decision.digest == decision_digest(decision)


def test_kept_outputs_are_said_to_pass_not_to_be_unchanged(llama):
    step = GuardSession(llama).apply(edits.RTN(8))
    assert "outputs pass" in step.decision.reason
    assert "unchanged" not in step.decision.reason


def test_a_value_known_only_coarsely_says_so(llama):
    step = GuardSession(llama).apply(edits.RTN(4), on_violation="monitor")
    rows = [m for m in verdict(step, "spectral").measurements if m.statistic == "log_spectral_norm_ratio"]
    coarse = [m for m in rows if m.reason is not None]
    assert coarse
    assert all("known to lie in [" in m.reason or "lie in [" in m.reason for m in coarse)
    truth = {
        name: torch.linalg.matrix_norm(w.double(), 2) for name, w in build("llama").state_dict().items() if w.ndim == 2
    }
    for row in rows:
        now = torch.linalg.matrix_norm(llama.state_dict()[row.target].double(), 2)
        error = abs(float((now / truth[row.target]).log()) - row.value)
        assert error < 0.01 or row.reason is not None, row


@pytest.mark.parametrize(
    "text",
    [
        '{"predicateType":"urn:weightproof:certificate:v1"}',
        '{"predicateType":"urn:weightproof:certificate:v1","subject":[],"predicate":{}}',
        '{"predicateType":"urn:weightproof:certificate:v1","subject":[{"digest":{"sha256":"00"}}]}',
    ],
)
def test_half_a_certificate_is_refused_when_read(text):
    with pytest.raises(InputError, match="whole"):
        Certificate.from_json(text)


def test_a_model_random_in_eval_mode_is_restored_without_complaint():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.calls = iter(range(1000))

        def forward(self, x):
            return self.linear(x) + 0.001 * next(self.calls)

    model = Noisy()
    session, before = GuardSession(model, retain=[torch.randn(16, 8)]), bits(model)
    with session.edit("x1000") as step:
        scale(model, 1000.0, "linear.weight")
    assert step.applied == "restored"
    assert_same(model, before)


def test_a_configuration_goes_back_with_the_weights_it_describes(llama):
    before, config, layers = bits(llama), llama.config, llama.model.layers
    session = GuardSession(llama)
    with session.edit("cut") as step:
        llama.model.layers = layers[:1]
        llama.config.num_hidden_layers = 1
    assert step.applied == "restored"
    with session.edit("grow") as step:
        llama.resize_token_embeddings(80, mean_resizing=False)
    assert step.applied == "restored"
    assert (llama.config.num_hidden_layers, llama.config.vocab_size) == (2, 64)
    assert llama.config is config
    assert llama.model.layers is layers
    assert_same(llama, before)


def test_a_replaced_configuration_and_one_within_it_go_back():
    class Config:
        def __init__(self, size):
            self.size, self.tags = size, ["a"]

        def to_dict(self):
            return vars(self)

    model = nn.Linear(8, 8)
    model.config = Config(8)
    model.config.text_config = Config(4)
    outer, inner = model.config, model.config.text_config
    snapshot = Snapshot.capture(model)
    inner.size = 5
    inner.tags.append("b")
    outer.text_config = Config(7)
    model.config = Config(9)
    snapshot.restore()
    assert model.config is outer
    assert outer.text_config is inner
    assert (inner.size, inner.tags) == (4, ["a"])


@pytest.mark.parametrize("losses", [["a"], [None], 1.0])
def test_losses_that_are_no_numbers_do_not_lock_the_session(llama, losses):
    session = GuardSession(llama)
    session.watch()
    with pytest.raises(InputError, match="raw_losses"):
        session.check_window(step=1, raw_losses=losses)
    assert session.check_window(step=2, raw_losses=torch.tensor([1.0, 2.0])).applied == "kept"


UP = "model.layers.0.mlp.up_proj.weight"


def test_small_harms_add_up_across_a_resume(llama, tmp_path):
    session = first = GuardSession(llama)
    for number in (1, 2, 3):
        with session.edit(f"a little more, {number}") as step:
            scale(llama, 1.06, UP)
        rows = {(m.target, m.statistic): m for m in verdict(step, "spectral").measurements}
        row = rows[UP, "log_spectral_norm_ratio"]
        assert row.value == pytest.approx(number * math.log(1.06), abs=0.03)
        session.save_state(tmp_path)
        session = GuardSession(llama)
        session.load_state(tmp_path)
        assert session.baseline.model_digest == first.baseline.model_digest
    assert verdict(step, "spectral").outcome is Outcome.WARN
    certificate = session.certificate()
    assert certificate.predicate["baseline"]["model_digest"] == first.baseline.model_digest
    assert any("before the resume" in line for line in certificate.predicate["not_tested"])


def test_a_window_that_awaits_the_next_one_can_be_saved_and_resumed(llama, tmp_path):
    session = GuardSession(llama)
    session.watch()
    scale(llama, 30.0, UP)
    assert session.check_window(step=1, raw_losses=[4.0], in_warmup=True).applied == "kept"
    session.save_state(tmp_path)
    resumed = GuardSession(llama)
    resumed.load_state(tmp_path)
    resumed.watch()
    assert resumed.check_window(step=2, raw_losses=[4.0]).applied == "kept"


def test_state_saved_twice_into_one_folder_is_the_last_one(llama, tmp_path):
    session, fresh = GuardSession(llama), bits(llama)
    session.apply(edits.RTN(8))
    session.save_state(tmp_path)
    llama.load_state_dict(fresh)
    GuardSession(llama).save_state(tmp_path)
    resumed = GuardSession(llama)
    resumed.load_state(tmp_path)
    assert resumed.model_digest == resumed.baseline.model_digest
    assert resumed.apply(edits.RTN(8)).applied == "kept"


def test_an_edit_that_selects_nothing_tells_which_matrices_there_are():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    session = GuardSession(model, retain=[torch.randn(4, 8)])
    with pytest.raises(InputError, match="families other"):
        session.apply(edits.RTN(8))
    assert session.apply(edits.RTN(8, include=("other",))).applied == "kept"


@pytest.mark.parametrize("trackers", ["jsonl", 5])
def test_trackers_that_are_no_list_are_refused(llama, trackers):
    with pytest.raises(InputError, match="list of trackers"):
        GuardSession(llama, trackers=trackers)


@pytest.mark.parametrize("after", ["float32", "float64"])
@pytest.mark.parametrize("before", ["bfloat16", "float32", "float64"])
def test_casts_between_wide_dtypes_are_measured(llama, before, after):
    llama.to(getattr(torch, before))
    session = GuardSession(llama)
    if before == after:
        assert session.apply(edits.RTN(8)).applied == "kept"
        return
    with session.edit("cast", kinds.Cast(after)) as step:
        llama.to(getattr(torch, after))
    assert step.applied == "kept", step.decision.reason
    assert all(delta < 1e-7 for delta in step.record.relative_delta.values())


def test_the_certificate_names_the_device_of_the_model_not_of_the_machine(llama, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert evidence.environment(llama)["device"] == "cpu"


def test_a_repair_of_what_monitor_mode_kept_broken_is_kept(llama):
    session, sound = GuardSession(llama), bits(llama)
    with session.edit("nan", on_violation="monitor") as step:
        scale(llama, math.nan)
    assert step.decision.action is Action.ROLLBACK
    with session.edit("repair") as step:
        llama.load_state_dict(sound)
    assert step.applied == "kept", step.decision.reason
    assert session.model_digest == session.baseline.model_digest


def test_an_edit_that_is_undone_reads_exactly_as_the_baseline(llama):
    session, before = GuardSession(llama), bits(llama)
    session.apply(edits.RTN(8))
    with session.edit("undo") as step:
        llama.load_state_dict(before)
    spectral = verdict(step, "spectral")
    assert spectral.outcome is Outcome.PASS
    assert all(m.value in (0.0, None) for m in spectral.measurements)
