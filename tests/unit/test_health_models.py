"""Training health of models: what is captured, of which blocks, without a trace, and the four cases."""

import copy
import math

import pytest
import torch
import trained_models
from architectures import ARCHITECTURES, build, example_inputs
from torch import nn
from torch.nn.functional import cross_entropy

from weightproof import health
from weightproof.errors import InputError

PLACES = {"t5": 6, "whisper": 6}


def batches_of(name, count=8, rows=4):
    found = [example_inputs(name, batch=rows, seed=seed) for seed in range(count)]
    if name == "vit":
        return [{**one, "labels": torch.arange(rows) % 5} for one in found]
    if name in ("t5", "whisper"):
        return [{**one, "labels": one["decoder_input_ids"]} for one in found]
    return [{**one, "labels": one["input_ids"]} for one in found]


class ResidualMLP(nn.Module):
    """x -> embed -> blocks -> head, without a config; rows (n, d)."""

    def __init__(self, width=16, depth=3, classes=4):
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.layers_of_mine = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh()) for _ in range(depth)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        h = self.embed(x)
        for block in self.layers_of_mine:
            h = block(h)
        return self.head(h)


def mlp_batches(count=8, rows=16):
    generator = torch.Generator().manual_seed(0)
    return [
        {"x": torch.randn(rows, 8, generator=generator), "y": torch.randint(4, (rows,), generator=generator)}
        for _ in range(count)
    ]


def mlp_loss(model, batch):
    return cross_entropy(model(batch["x"]), batch["y"], reduction="none")


# ---- what is captured -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "mamba"])
def test_every_architecture_at_initialisation_does_not_fail(name):
    report = health.diagnose(build(name), batches_of(name), in_warmup=True, digest=False)
    assert len(report.layers) == PLACES.get(name, 3)
    assert report.overall == "pass", str(report)
    assert all(value is not None and value > 0 for value in (*report.residual_norms, *report.bp_grad_norms))
    assert report.provenance.rows == 4
    assert report.provenance.loss > 0


def test_readings_equal_a_slow_pass():
    model, batch = build("llama").double(), batches_of("llama", count=1)[0]
    report = health.diagnose(model, [batch], digest=False)
    states = []
    handles = [layer.register_forward_hook(lambda *a: states.append(a[2])) for layer in model.model.layers]
    logits = model(input_ids=batch["input_ids"]).logits
    for state in states:
        state.retain_grad()
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    loss.backward()
    for handle in handles:
        handle.remove()
    for index, state in enumerate(states, start=1):
        norms, gradients = state.detach().norm(dim=-1).flatten(), state.grad[:, :-1].norm(dim=-1).flatten()
        assert report.residual_norms[index] == pytest.approx(float(norms.quantile(0.5)), rel=1e-9)
        assert report.residual_maxima[index] == pytest.approx(float(norms.max()), rel=1e-9)
        assert report.bp_grad_norms[index] == pytest.approx(float(gradients.quantile(0.5)), rel=1e-9)
        cosine = health.stability(state.grad.sum(dim=1))
        assert report.diagnostics["stability"].per_layer[index] == pytest.approx(cosine, rel=1e-6)
    assert report.provenance.loss == pytest.approx(float(loss.detach()) / (4 * 7), rel=1e-9)


def test_first_token_sinks_move_the_maximum_not_the_median():
    """A massive activation at token 0 is what healthy language models have."""
    model, batches = build("llama"), batches_of("llama")
    before = health.diagnose(model, batches, digest=False)

    def sink(_module, _args, output):
        spiked = output.clone()
        spiked[:, 0] *= 1e4
        return spiked

    with_sink = model.model.layers[0].register_forward_hook(sink)
    after = health.diagnose(model, batches, digest=False)
    with_sink.remove()
    assert after.residual_maxima[1] > 1e3 * before.residual_maxima[1]
    assert after.residual_norms[1] == pytest.approx(before.residual_norms[1], rel=0.5)
    assert after.diagnostics["residual_growth"].status == "pass"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padding_is_not_read(name):
    model = build(name)
    plain = batches_of(name, count=2)
    padded = []
    for batch in plain:
        ids, labels = (nn.functional.pad(batch[key], (0, 5), value=value) for key, value in
                       (("input_ids", 7), ("labels", -100)))  # fmt: skip
        mask = torch.zeros_like(ids)
        mask[:, :8] = 1
        padded.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    first, second = (health.diagnose(model, one, digest=False) for one in (plain, padded))
    assert first.provenance.tokens == second.provenance.tokens == 64
    assert second.residual_norms == pytest.approx(first.residual_norms, rel=1e-5)
    assert second.residual_maxima == pytest.approx(first.residual_maxima, rel=1e-5)
    assert second.bp_grad_norms == pytest.approx(first.bp_grad_norms, rel=1e-4)
    assert second.cross_batch == pytest.approx(first.cross_batch, rel=1e-3)


def test_sums_do_not_depend_on_the_batch_size():
    """A mean loss would: the floor is for gradients of the sum."""
    model = build("llama")
    big = batches_of("llama", count=1, rows=16)[0]
    small = [{key: value[start : start + 2] for key, value in big.items()} for start in range(0, 16, 2)]
    one, eight = (health.diagnose(model, batches, digest=False) for batches in ([big], small))
    assert eight.bp_grad_norms == pytest.approx(one.bp_grad_norms, rel=1e-4)
    assert eight.diagnostics["stability"].per_layer == pytest.approx(one.diagnostics["stability"].per_layer, rel=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks(reentrant):
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(ResidualMLP):
        def forward(self, x):
            h = self.embed(x)
            for block in self.layers_of_mine:
                h = checkpoint(block, h, use_reentrant=reentrant)
            return self.head(h)

    torch.manual_seed(0)
    plain = ResidualMLP()
    model = Checkpointed()
    model.load_state_dict(plain.state_dict())
    options = {"blocks": "layers_of_mine", "loss": mlp_loss, "digest": False}
    if reentrant:
        with pytest.raises(InputError, match="use_reentrant=False"):
            health.diagnose(model, mlp_batches(), **options)
        return
    found, wanted = (health.diagnose(one, mlp_batches(), **options) for one in (model, plain))
    assert found.bp_grad_norms == wanted.bp_grad_norms
    assert found.residual_norms == wanted.residual_norms


def test_transformers_gradient_checkpointing_stays_on():
    model = build("llama").train()
    model.activation_checkpointing_enable()
    report = health.diagnose(model, batches_of("llama"), digest=False)
    assert report.bp_grad_norms == health.diagnose(build("llama"), batches_of("llama"), digest=False).bp_grad_norms
    assert model.training
    assert model.is_activation_checkpointing


def test_frozen_embeddings_and_adapters():
    """With LoRA nothing below the first adapter needs a gradient: the graph begins at the first block."""
    model = build("llama")
    wanted = health.diagnose(model, batches_of("llama"), digest=False)
    model.requires_grad_(False)
    found = health.diagnose(model, batches_of("llama"), digest=False)
    assert found.bp_grad_norms == wanted.bp_grad_norms
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_tuples_and_shared_blocks():
    class Shared(nn.Module):
        """One block, run three times, that returns a tuple."""

        def __init__(self):
            super().__init__()
            self.block = nn.Linear(8, 8)
            self.block.register_forward_hook(lambda _m, _a, output: (output, None))

        def forward(self, x):
            for _ in range(3):
                x = self.block(x)[0]
            return x[:, :4]

    torch.manual_seed(0)
    model = Shared()
    report = health.diagnose(model, mlp_batches(), blocks=[model.block], loss=mlp_loss)
    assert report.layers == ("block input", "block", "block #2", "block #3")


# ---- blocks ---------------------------------------------------------------------------------------------------------


def test_any_list_of_blocks_that_the_user_names():
    torch.manual_seed(0)
    model = ResidualMLP()
    options = {"loss": mlp_loss, "digest": False}
    by_name = health.diagnose(model, mlp_batches(), blocks="layers_of_mine", **options)
    assert by_name.layers == ("layers_of_mine.0 input", *(f"layers_of_mine.{i}" for i in range(3)))
    for blocks in (model.layers_of_mine, list(model.layers_of_mine), [list(model.layers_of_mine)], None):
        assert health.diagnose(model, mlp_batches(), blocks=blocks, **options).layers == by_name.layers
    two = health.diagnose(
        model, mlp_batches(), blocks=[[model.layers_of_mine[0]], list(model.layers_of_mine)[1:]], **options
    )
    assert two.layers[2] == "layers_of_mine.1 input"
    assert two.bp_grad_norms[0] == by_name.bp_grad_norms[0]


def test_a_model_without_blocks_says_so():
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(InputError, match=r"Sequential has no list of blocks: name its list of blocks"):
        health.diagnose(model, mlp_batches(), loss=mlp_loss)
    with pytest.raises(InputError, match="no module 'nowhere'"):
        health.diagnose(ResidualMLP(), mlp_batches(), blocks="nowhere", loss=mlp_loss)
    with pytest.raises(InputError, match="not a list of blocks"):
        health.diagnose(ResidualMLP(), mlp_batches(), blocks=nn.Linear(2, 2), loss=mlp_loss)


# ---- the loss -------------------------------------------------------------------------------------------------------


def test_the_reduction_must_be_known():
    def total(model, batch):
        return mlp_loss(model, batch).sum()

    def mean(model, batch):
        return mlp_loss(model, batch).mean()

    def counted(model, batch):
        return mean(model, batch), len(batch["y"])

    def run(loss, reduction=None):
        torch.manual_seed(0)
        return health.diagnose(ResidualMLP(), mlp_batches(), loss=loss, reduction=reduction).bp_grad_norms

    wanted = run(mlp_loss)
    assert run(total, "sum") == pytest.approx(wanted, rel=1e-5)
    assert run(counted, "mean") == pytest.approx(wanted, rel=1e-5)
    for loss, reduction, words in (
        (total, None, "nothing says how it was reduced"),
        (mean, "mean", "over how many"),
        (mlp_loss, "mean", "gives one number"),
        (lambda _m, _b: 3.0, "sum", "not a floating point tensor"),
        (total, "average", "reduction must be one of"),
    ):
        with pytest.raises(InputError, match=words):
            run(loss, reduction)
    with pytest.raises(InputError, match="give loss="):
        health.diagnose(ResidualMLP(), mlp_batches())


def test_bad_batches_are_refused():
    model = build("llama")
    for batches, words in (([], "no batch"), ([1], "not a dict"), ({"input_ids": 1}, "list of dicts")):
        with pytest.raises(InputError, match=words):
            health.diagnose(model, batches)
    with pytest.raises(InputError, match="labels of its own"):
        health.diagnose(model, batches_of("llama"), labels="sampled", depth="skip")
    with pytest.raises(InputError, match="Trace"):
        health.diagnose(lambda _batch: 1, mlp_batches())


# ---- no trace -------------------------------------------------------------------------------------------------------


def test_nothing_of_a_training_is_touched():
    model = build("gpt2", attn_pdrop=0.1, resid_pdrop=0.1).train()
    model.transformer.h[0].eval()
    model.transformer.wte.weight.requires_grad_(False)
    model(**batches_of("gpt2")[0]).loss.backward()
    flags = [module.training for module in model.modules()]
    before = copy.deepcopy({name: (p.detach(), p.grad, p.requires_grad) for name, p in model.named_parameters()})
    state = torch.get_rng_state()
    for depth in (None, "skip", "reinit"):
        health.diagnose(model, batches_of("gpt2"), depth=depth)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags
    for name, parameter in model.named_parameters():
        weight, gradient, needed = before[name]
        assert torch.equal(parameter, weight), name
        assert parameter.requires_grad == needed, name
        assert (parameter.grad is None) == (gradient is None), name
        assert gradient is None or torch.equal(parameter.grad, gradient), name
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# ---- the four cases -------------------------------------------------------------------------------------------------


def four_cases():
    trained = trained_models.load("llama")
    batches = [{key: value[:16] for key, value in one.items()} for one in trained.heldout]
    exploding = copy.deepcopy(trained.model)
    floor = copy.deepcopy(trained.model)
    with torch.no_grad():
        exploding.model.layers[1].mlp.down_proj.weight.mul_(1e5)
        floor.lm_head.weight.mul_(1e-9)
    early = trained_models.untrained("llama")
    return {
        "healthy early": (health.diagnose(early, batches, in_warmup=True), "pass", ()),
        "healthy trained": (health.diagnose(trained.model, batches), "pass", ()),
        "exploding": (health.diagnose(exploding, batches), "fail", ("residual_growth",)),
        "gradient at floor": (health.diagnose(floor, batches), "fail", ("gradient_floor",)),
    }


def test_four_cases():
    found = four_cases()
    for name, (report, overall, flags) in found.items():
        assert report.overall == overall, f"{name}: {report}"
        assert report.flags == flags, f"{name}: {report}"
    exploding, floor = found["exploding"][0], found["gradient at floor"][0]
    growth = exploding.diagnostics["residual_growth"]
    assert growth.location == "model.layers.1"
    assert growth.value > 1e3
    assert floor.diagnostics["gradient_floor"].value < 1e-7
    healthy = found["healthy trained"][0].diagnostics["gradient_floor"].value
    assert healthy > 1e3 * floor.diagnostics["gradient_floor"].threshold


def test_small_embeddings_are_no_explosion():
    """Growth counts from unit scale on: a stream of .02 a feature may be brought to 1 by its first block."""
    model = trained_models.load("llama").model
    batches = [{key: value[:8] for key, value in one.items()} for one in trained_models.load("llama").heldout]
    before = health.diagnose(model, batches)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e-3)
    after = health.diagnose(model, batches)
    assert health.block_growth(after.residual_norms)[0] > 100
    assert after.diagnostics["residual_growth"].value < 10 * before.diagnostics["residual_growth"].value
    assert after.diagnostics["residual_growth"].status == "pass"


def test_untrained_models_fail_when_they_explode():
    model = trained_models.untrained("llama")
    batches = trained_models.load("llama").heldout[:2]
    assert health.diagnose(model, batches, in_warmup=True).overall == "pass"
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e5)
    one = health.diagnose(model, batches, in_warmup=True).diagnostics["residual_growth"]
    assert (one.status, one.location) == ("fail", "model.layers.1")


def test_a_rescaled_stream_shrinks_gradients_and_keeps_the_product():
    """The floor is growth seen through the last normalisation: ||h|| ||g|| stays what it was."""
    model, batches = trained_models.untrained("llama"), batches_of("llama")
    batches = [{key: value % 32 for key, value in one.items()} for one in batches]
    before = health.diagnose(model, batches)
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight.mul_(1e5)
    after = health.diagnose(model, batches)
    ratio = after.residual_norms[-1] / before.residual_norms[-1]
    assert ratio > 1e3
    assert after.bp_grad_norms[-1] < 10 * before.bp_grad_norms[-1] / ratio
    products = [report.diagnostics["scale_product"].value for report in (before, after)]
    assert products[1] == pytest.approx(products[0], rel=0.5)


def test_early_models_agree_and_are_not_blamed_for_it():
    """At initialisation all samples share the gradient of token frequencies; later they do not."""
    trained = trained_models.load("llama")
    early = health.diagnose(trained_models.untrained("llama"), trained.heldout, in_warmup=True)
    late = health.diagnose(trained.model, trained.heldout)
    assert health.batch_stability(early.diagnostics["stability"].value, 128) > 0.30
    assert early.diagnostics["stability"].status == "skipped"
    assert late.diagnostics["stability"].status == "pass"
    assert late.diagnostics["stability"].interval is not None
    warned = health.diagnose(trained_models.untrained("llama"), trained.heldout)
    assert warned.overall == "warn"  # never more than a warning
    few = health.diagnose(trained.model, trained.heldout[:3])
    assert few.diagnostics["stability"].status == "skipped"


def test_depth_utility_of_a_trained_model():
    trained = trained_models.load("llama")
    for depth in ("skip", "reinit"):
        one = health.diagnose(trained.model, trained.heldout, depth=depth).diagnostics["depth_utility"]
        assert one.status == "pass", one.message
        assert len(one.per_layer) == 3
        assert min(one.per_layer) > 0.02
    useless = copy.deepcopy(trained.model)
    with torch.no_grad():
        for layer in useless.model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
    one = health.diagnose(useless, trained.heldout, depth="skip").diagnostics["depth_utility"]
    assert (one.status, one.value) == ("fail", 0)


def test_nan_is_invalid():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    report = health.diagnose(model, batches_of("llama"))
    assert report.overall == "invalid"
    assert "residual_growth" in report.flags
    assert report.diagnostics["residual_growth"].location == "model.layers.1"


def test_half_precision_underflow_is_seen():
    model = build("llama").half()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-4)
    report = health.diagnose(model, batches_of("llama"), in_warmup=True)
    assert report.provenance.dtype == "float16"
    assert report.diagnostics["gradient_underflow"].status == "warn"
    assert health.diagnose(build("llama").bfloat16(), batches_of("llama"), in_warmup=True).overall == "pass"


# ---- networks with a backward pass of their own ---------------------------------------------------------------------


def test_a_trace_says_the_same_as_hooks():
    torch.manual_seed(0)
    model = ResidualMLP()

    def trace(batch):
        hidden = [model.embed(batch["x"])]
        for block in model.layers_of_mine:
            hidden.append(block(hidden[-1]))
        return health.Trace(hidden, cross_entropy(model.head(hidden[-1]), batch["y"], reduction="none"))

    by_hooks = health.diagnose(model, mlp_batches(), loss=mlp_loss)
    by_trace = health.diagnose(trace, mlp_batches())
    assert by_trace.residual_norms == by_hooks.residual_norms
    assert by_trace.bp_grad_norms == by_hooks.bp_grad_norms
    assert by_trace.layers == ("h0", "h1", "h2", "h3")


def test_a_cut_graph_is_said_and_own_gradients_are_taken():
    torch.manual_seed(0)
    model = ResidualMLP()

    def trace(batch, *, own):
        hidden = [model.embed(batch["x"]).detach()]
        for block in model.layers_of_mine:
            hidden.append(block(hidden[-1]).detach())
        hidden[-1].requires_grad_()
        loss = cross_entropy(model.head(hidden[-1]), batch["y"], reduction="none")
        signals = [torch.ones_like(one) for one in hidden] if own else None
        return health.Trace(hidden, loss, gradients=signals)

    cut = health.diagnose(lambda batch: trace(batch, own=False), mlp_batches())
    assert cut.bp_grad_norms[:3] == (None, None, None)
    assert cut.diagnostics["gradient_floor"].status == "warn"
    assert "none reaches h0 and 2 more" in cut.diagnostics["gradient_floor"].message
    given = health.diagnose(lambda batch: trace(batch, own=True), mlp_batches())
    assert given.bp_grad_norms == pytest.approx([4.0] * 4)
    with pytest.raises(InputError, match="3 gradients"):
        health.diagnose(lambda b: health.Trace([b["x"]] * 2, b["x"].sum(1), [None] * 3), mlp_batches())


# ---- data -----------------------------------------------------------------------------------------------------------


def test_data_becomes_batches_of_one_size():
    rows = [{"input_ids": list(range(3, 3 + size))} for size in (5, 9, 4, 12, 7, 8, 6)]
    batches = health.health_batches(rows, build("llama"), batches=3, rows=3, length=10)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3]
    assert batches[0]["attention_mask"].sum(dim=1).tolist() == [5, 9, 4]
    assert batches[0]["labels"][0].tolist() == [3, 4, 5, 6, 7, *[-100] * 4]
    with pytest.raises(InputError, match="fewer than one batch"):
        health.health_batches(rows, build("llama"), rows=16)
    sampled = health.random_batches(build("vit"), batches=3, rows=2)
    assert [one["pixel_values"].shape[0] for one in sampled] == [2, 2, 2]
