from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trained_models
from architectures import build
from torch import Tensor

from weightproof.candidates import shapes
from weightproof.candidates.activation_side import ACTIVATION_CEILING, ACTIVATION_SIDE
from weightproof.candidates.candidate import Candidate, Sources
from weightproof.candidates.captures import Captures, Reading
from weightproof.candidates.capturing import capture
from weightproof.candidates.compound import COMPOUND
from weightproof.candidates.registry import CANDIDATES
from weightproof.candidates.weight_side import WeightSide
from weightproof.deltas import Delta

# The rest of the table: candidates that are made from weights alone, and the ceiling of the change itself.
FROM_WEIGHTS = (
    "lm_head_read", "logits_null", "global_read", "global_write", "global_write_not_global_read", "write", "attn_write",
    "mlp_write", "write_not_lm_head_read", "write_not_global_read", "write_not_downstream_read", "mlp_up_read",
    "mlp_gate_read", "attn_qkv_read", "attn_ov_write", "mlp_roundtrip_write", "qk_circuit", "input_super", "kv_super",
    "causally_isolated", "input_super_not_lm_read", "dW_left_basis_ceiling",
)  # fmt: skip
LAYERS, PROMPTS, WIDTH, INNER, RANK = 3, 14, 24, 40, 4
INSIDE = ("up_output", "gate_output", "activated")
OURS = {one.name: one for one in (*ACTIVATION_SIDE, *COMPOUND, ACTIVATION_CEILING)}

# The table of candidates that are made from activations, with their families.
TABLE = {
    "gate_kernel": "W:MLP",
    "attention_sink": "W:OV",
    "suppressed": "act:clean",
    "amplified": "act:clean",
    "added_features": "act:clean",
    "global_clean_resid_pca": "act:baseline",
    "global_persona_resid_pca": "act:baseline",
    "layer_clean_resid_pca": "act:baseline",
    "TaskDiff_contrast": "act:persona",
    "attn_min_taskdiff": "act:attn-selected",
    "attn_max_taskdiff": "act:attn-selected",
    "attn_diff_taskdiff": "act:attn-selected",
    "attn_min_x_diffnorm_taskdiff": "act:attn-selected",
    "up_proj_input_contrast": "act:up_proj",
    "up_proj_output_written_contrast": "act:up_proj",
    "gate_active_written": "act:MLP",
    "chars_clusters": "act:cluster",
    "churn": "act:clean",
    "rotation_contrast": "act:rotation",
    "qk_x_chars_clusters": "compound",
    "WNR_union_TaskDiff": "compound",
    "TaskDiff_lora_ceiling": "ceiling",
}


def reading(seed: int) -> Reading:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    lengths = torch.randint(3, 7, (PROMPTS,), generator=generator).tolist()
    return Reading(
        stream=draw(LAYERS + 1, PROMPTS, WIDTH),
        first=draw(LAYERS + 1, PROMPTS, WIDTH),
        sequences=tuple(draw(LAYERS, length, WIDTH) for length in lengths),
        attention=tuple(draw(LAYERS, length).softmax(1) for length in lengths),
        mlp=tuple(
            {"up_input": draw(PROMPTS, WIDTH)} | {key: draw(PROMPTS, INNER) for key in INSIDE} for _ in range(LAYERS)
        ),
    )


class Weights:
    """The few matrices that candidates of activations ask for: 4 heads that share 2 values."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(9)
        shapes_of = {"down": (WIDTH, INNER), "up": (INNER, WIDTH), "o": (WIDTH, 32), "v": (16, WIDTH)}
        self.parts = {k: torch.randn(*v, generator=generator, dtype=torch.float64) for k, v in shapes_of.items()}
        self.layers = [SimpleNamespace(name=f"layers.{index}") for index in range(LAYERS)]

    def matrix(self, _layer: int, name: str) -> list[Tensor]:
        return [self.parts[name]]

    def heads(self, _layer: int) -> tuple[int, int]:
        return 4, 2

    def by_head(self, _layer: int, name: str) -> Tensor:
        return self.parts[name].reshape(2, 8, WIDTH).repeat_interleave(2, 0).reshape(32, WIDTH)


def captures(**changes: Any) -> Captures:
    steered = torch.randn(LAYERS, PROMPTS, WIDTH, generator=torch.Generator().manual_seed(8))
    names = tuple(f"layers.{index}" for index in range(LAYERS))
    found = {"clean": reading(0), "positive": reading(1), "negative": reading(2), "steered": steered}
    return Captures(names, activation="silu", **{**found, **changes})


def build_one(name: str, layer: int = 1, rank: int = RANK, **changes: Any) -> Tensor | str:
    weights: Any = Weights()
    return OURS[name].build(Sources(weights, captures(**changes), rank=rank), layer)


def projector(basis: Tensor) -> Tensor:
    return basis @ basis.T


def slow_pca(rows: list[Tensor], rank: int, *, centred: bool) -> Tensor:
    """Leading eigenvectors of the sum of outer products, one after the other."""
    mean = sum(rows, torch.zeros_like(rows[0])) / len(rows) if centred else torch.zeros_like(rows[0])
    total = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for row in rows:
        total += torch.outer(row - mean, row - mean)
    return torch.linalg.eigh(total).eigenvectors[:, -rank:]


def same_subspace(found: Tensor | str, expected: Tensor) -> bool:
    assert isinstance(found, Tensor), found
    assert found.dtype is torch.float64
    torch.testing.assert_close(found.T @ found, torch.eye(found.shape[1], dtype=torch.float64))
    assert found.shape == expected.shape
    return bool((projector(found) - projector(expected)).abs().max() < 1e-6)


FIT = range(0, PROMPTS, 2)


def stream(which: str, layer: int, row: int) -> Tensor:
    return getattr(captures(), which).stream[layer + 1, row].double()


def magnitudes(kind: str) -> list[Tensor]:
    rows = []
    for row in FIT:
        sizes = [stream("clean", layer, row).abs() for layer in range(LAYERS)]
        rises, falls = torch.zeros(WIDTH).double(), torch.zeros(WIDTH).double()
        for before, after in itertools.pairwise(sizes):
            rises += (after - before).clamp(min=0)
            falls += (before - after).clamp(min=0)
        kinds = {"suppressed": torch.minimum(rises, falls), "added_features": rises}
        rows.append(kinds.get(kind, (sizes[-1] - sizes[0]).clamp(min=0)))
    return rows


def contrast(layer: int = 1) -> list[Tensor]:
    return [stream("positive", layer, row) - stream("negative", layer, row) for row in FIT]


def mlp(which: str, what: str, layer: int = 1) -> list[Tensor]:
    return [getattr(captures(), which).mlp[layer][what][row].double() for row in FIT]


def every_layer(*sides: str) -> list[Tensor]:
    return [stream(side, layer, row) for side in sides for layer in range(LAYERS) for row in FIT]


def written(rows: list[Tensor]) -> list[Tensor]:
    return [Weights().parts["down"] @ row for row in rows]


def up_written() -> list[Tensor]:
    pairs = zip(mlp("positive", "up_output"), mlp("negative", "up_output"), strict=True)
    return written([a - b for a, b in pairs])


def up_input() -> list[Tensor]:
    return [a - b for a, b in zip(mlp("positive", "up_input"), mlp("negative", "up_input"), strict=True)]


def sinks() -> list[Tensor]:
    parts = Weights().parts
    first = sum((captures().clean.first[0, row].double() for row in FIT), torch.zeros(WIDTH).double()) / len(FIT)
    found = []
    for head in range(4):
        o, v = parts["o"][:, 8 * head : 8 * head + 8], parts["v"][8 * (head // 2) : 8 * (head // 2) + 8]
        found.append(o @ (v @ first))
    return found


ORACLES: dict[str, tuple[list[Tensor], bool, int]] = {
    "suppressed": (magnitudes("suppressed"), True, RANK),
    "amplified": (magnitudes("amplified"), True, RANK),
    "added_features": (magnitudes("added_features"), True, RANK),
    "global_clean_resid_pca": (every_layer("clean"), True, RANK),
    "global_persona_resid_pca": (every_layer("positive", "negative"), True, RANK),
    "layer_clean_resid_pca": ([stream("clean", 1, row) for row in FIT], True, RANK),
    "churn": ([stream("clean", 1, row) - stream("clean", 0, row) for row in FIT], True, RANK),
    "TaskDiff_contrast": (contrast(), False, RANK),
    "up_proj_input_contrast": (up_input(), False, RANK),
    "up_proj_output_written_contrast": (up_written(), False, RANK),
    "gate_active_written": (written(mlp("clean", "activated")), True, RANK),
    "attention_sink": (sinks(), True, 3),
    "TaskDiff_lora_ceiling": ([captures().steered[1, row].double() for row in FIT], False, RANK),
}


@pytest.mark.parametrize("name", ORACLES)
def test_principal_directions_are_those_of_a_slow_oracle(name):
    rows, centred, rank = ORACLES[name]
    assert same_subspace(build_one(name), slow_pca(rows, rank, centred=centred))


def test_directions_come_strongest_first():
    found = build_one("layer_clean_resid_pca", rank=3)
    assert isinstance(found, Tensor)
    rows = [stream("clean", 1, row) for row in FIT]
    for count in (1, 2, 3):
        assert same_subspace(found[:, :count], slow_pca(rows, count, centred=True))


def test_the_mean_gate_opens_the_way_from_up_to_down():
    gates = mlp("clean", "gate_output")
    opening = sum((g * torch.sigmoid(g) for g in gates), torch.zeros(INNER).double()) / len(gates)
    parts = Weights().parts
    whole = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for neuron in range(INNER):
        whole += opening[neuron] * torch.outer(parts["down"][:, neuron], parts["up"][neuron])
    assert same_subspace(build_one("gate_kernel"), torch.linalg.svd(whole).U[:, :RANK])


@pytest.mark.parametrize("name", [name for name in TABLE if name.startswith("attn_")])
def test_token_differences_are_weighted_by_the_attention_of_the_last_token(name):
    positive, negative = captures().positive, captures().negative
    assert positive is not None
    assert negative is not None
    rows = []
    for prompt in FIT:
        length = min(len(positive.attention[prompt][1]), len(negative.attention[prompt][1]))
        for back in range(1, length + 1):
            difference = (positive.sequences[prompt][1, -back] - negative.sequences[prompt][1, -back]).double()
            a, b = float(positive.attention[prompt][1, -back]), float(negative.attention[prompt][1, -back])
            weight = {
                "attn_min_taskdiff": min(a, b),
                "attn_max_taskdiff": max(a, b),
                "attn_diff_taskdiff": abs(a - b),
                "attn_min_x_diffnorm_taskdiff": min(a, b) * float(difference.norm()),
            }[name]
            rows.append(weight**0.5 * difference)
    assert same_subspace(build_one(name), slow_pca(rows, RANK, centred=False))


def slow_centres(samples: list[Tensor], count: int) -> list[Tensor]:
    mean = sum(samples, torch.zeros_like(samples[0])) / len(samples)
    points = [one - mean for one in samples]
    found = sorted(points, key=lambda one: -float(one.norm()))[:count]
    for _ in range(8):
        members: list[list[Tensor]] = [[] for _ in found]
        for point in points:
            distances = [float((point - centre).norm()) for centre in found]
            members[distances.index(min(distances))].append(point)
        found = [sum(m, torch.zeros_like(c)) / len(m) if m else c for m, c in zip(members, found, strict=True)]
    return found


def test_clusters_are_those_of_a_slow_oracle_and_the_same_every_time():
    samples = [stream(side, 1, row) for side in ("clean", "positive", "negative") for row in FIT]
    expected = torch.stack(slow_centres(samples, 8))
    assert torch.allclose(shapes.centres(torch.stack(samples)), expected)
    assert torch.equal(shapes.centres(torch.stack(samples)), shapes.centres(torch.stack(samples)))
    assert same_subspace(build_one("chars_clusters"), slow_pca(list(expected), RANK, centred=True))


def test_eight_centres_span_seven_directions_and_never_an_eighth():
    found = build_one("chars_clusters", rank=8)
    assert isinstance(found, Tensor)
    assert found.shape == (WIDTH, 7)


def test_an_empty_cluster_keeps_its_centre():
    samples = torch.tensor([[0.0, 0.0], [0.0, 0.0], [10.0, 0.0], [10.0, 0.0]])
    found = shapes.centres(samples, count=4)
    assert torch.isfinite(found).all()
    assert {tuple(row) for row in found.tolist()} == {(-5.0, 0.0), (5.0, 0.0)}


def test_a_planted_rotation_is_found_with_its_plane():
    generator = torch.Generator().manual_seed(3)
    frame = torch.linalg.qr(torch.randn(WIDTH, 6, generator=generator, dtype=torch.float64)).Q
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    angle = torch.tensor(0.7, dtype=torch.float64)
    turn = torch.eye(6, dtype=torch.float64)
    turn[:2, :2] = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    found = shapes.rotation(x @ frame.T, x @ turn.T @ frame.T + 3.0, rank=2)
    assert same_subspace(found, frame[:, :2])
    assert shapes.rotation(x @ frame.T, x @ frame.T, rank=2).shape[1] == 0
    assert shapes.rotation(x @ frame.T, x @ turn.T @ frame.T, rank=5).shape[1] == 2


def test_a_rotation_comes_in_whole_planes():
    found = build_one("rotation_contrast", rank=3)
    assert isinstance(found, Tensor)
    assert found.shape == (WIDTH, 2)
    assert build_one("rotation_contrast", rank=1) == "a rotation has planes: it needs a rank of 2 or more"


def test_half_way_between_two_planes():
    eye = torch.eye(6, dtype=torch.float64)
    first = eye[:, :2]
    second = torch.stack([eye[:, 0], (eye[:, 1] + eye[:, 2]) / 2**0.5], 1)
    middle = eye[:, 1] + (eye[:, 1] + eye[:, 2]) / 2**0.5
    expected = torch.stack([eye[:, 0], middle / middle.norm()], 1)
    assert same_subspace(shapes.bisector(first, second, 2), expected)
    assert same_subspace(shapes.bisector(first, second, 1), expected[:, :1])  # the smallest angle first


def test_no_direction_is_made_of_rounding():
    """Equal states have no direction; nor has a difference that is only what float32 leaves."""
    flat = torch.full((5, WIDTH), 0.1) * torch.arange(WIDTH)
    assert shapes.principal(flat, RANK).shape == (WIDTH, 0)
    assert shapes.principal(flat, RANK, about_zero=True).shape == (WIDTH, 1)
    one = reading(1)
    close = Reading(one.stream * (1 + 2e-7), one.first, mlp=one.mlp, sequences=one.sequences, attention=one.attention)
    same = "what it is made from is the same for every prompt, or differs by no more than rounding"
    assert build_one("TaskDiff_contrast", positive=close, negative=one) == same
    assert build_one("TaskDiff_lora_ceiling", steered=torch.full((LAYERS, PROMPTS, WIDTH), 1e-9)) == same


def test_planted_contrast_gives_its_direction_and_no_other():
    plain = reading(1)
    direction = torch.linalg.qr(torch.randn(WIDTH, 2, generator=torch.Generator().manual_seed(6))).Q
    strength = torch.linspace(1, 3, PROMPTS)[:, None] * torch.tensor([1.0, 0.0]) + torch.tensor([0.0, 1.0])
    shifted = Reading(plain.stream + strength @ direction.T, plain.first, mlp=plain.mlp)
    found = build_one("TaskDiff_contrast", positive=shifted, negative=plain, rank=8)
    assert same_subspace(found, torch.linalg.qr(direction.double()).Q)


def test_bases_use_the_fit_half_only():
    moved = reading(0)
    for row in range(1, PROMPTS, 2):
        moved.stream[:, row] = 100.0
    for name in ("layer_clean_resid_pca", "suppressed", "churn", "chars_clusters"):
        first, second = build_one(name), build_one(name, clean=moved)
        assert isinstance(first, Tensor)
        assert isinstance(second, Tensor)
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", OURS)
def test_what_is_missing_is_said_in_words(name):
    weights: Any = Weights()
    gaps = {"mlp": "no MLP here", "attention": "no attention here"}
    bare = Captures(captures().layers, Reading(reading(0).stream, reading(0).first, gaps=gaps))
    wanted = OURS[name].needs & {"contrast", "attention", "mlp", "delta"}
    if name in ("qk_x_chars_clusters", "WNR_union_TaskDiff"):
        return  # their parts ask for themselves: see below
    assert "no prompts" in str(OURS[name].build(Sources(weights), 0))
    found = OURS[name].build(Sources(weights, bare, rank=RANK), 0)
    assert isinstance(found, str) == bool(wanted)
    if wanted == {"mlp"}:
        assert found == "no MLP here"
    other = Captures(("elsewhere",), bare.clean)
    if not wanted:
        assert OURS[name].build(Sources(weights, other, rank=RANK), 0) == "no activations were read of layers.0"


def test_our_part_of_the_table_is_complete():
    assert {name: one.family for name, one in OURS.items()} == TABLE
    for one in OURS.values():
        assert one.axis_kind == {"W:MLP": "write", "W:OV": "write", "ceiling": "ceiling"}.get(one.family, "mixed")
        assert one.build.__doc__ or one.name in TABLE
    names = [one.name for one in CANDIDATES]
    assert len(names) == len(set(names)) == 44
    assert sum(one.axis_kind == "ceiling" for one in CANDIDATES) == 2
    assert set(names) == {*TABLE, *FROM_WEIGHTS}


# ---------------------------------------------------------------- real models

UNDEFINED = {"gpt2": {"gate_kernel": "no gate"}, "llama": {}}


def sources_of(name: str) -> Sources:
    model = trained_models.load(name).model
    side = WeightSide.of(model)
    generator = torch.Generator().manual_seed(1)
    parts = {key: 0.01 * torch.randn(one.d_out, one.d_in, generator=generator) for key, one in side.writers(1).items()}
    ids = trained_models.chain_samples(20, 12, seed=3)
    delta = Delta(parts, {})
    read = capture(model, {"input_ids": ids}, {"input_ids": ids.flip(0)}, {"input_ids": ids.flip(1)}, delta=delta)
    return Sources(side, read, delta, rank=RANK, broad_rank=12)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_candidate_computes_on_a_trained_model_or_says_why_not(name):
    sources = sources_of(name)
    for one in OURS.values():
        found = sources.basis(one, 1)
        if one.name in UNDEFINED[name]:
            assert UNDEFINED[name][one.name] in str(found)
            continue
        assert isinstance(found, Tensor), (one.name, found)
        limit = 2 * RANK if one.name == "WNR_union_TaskDiff" else 3 if one.name == "attention_sink" else RANK
        assert found.shape == (64, limit), one.name
        assert torch.allclose(found.T @ found, torch.eye(limit, dtype=torch.float64), atol=1e-9)


def test_a_union_holds_both_of_its_parts():
    sources = sources_of("llama")
    found = sources.basis(OURS["WNR_union_TaskDiff"], 1)
    assert isinstance(found, Tensor)
    for name in ("write_not_downstream_read", "TaskDiff_contrast"):
        part = next(one for one in CANDIDATES if one.name == name).build(sources, 1)
        assert isinstance(part, Tensor)
        assert torch.allclose(projector(found) @ part, part, atol=1e-9)


def test_a_compound_says_which_of_its_parts_is_missing():
    model = build("llama")
    side = WeightSide.of(model)
    ids = torch.randint(3, 60, (4, 6), generator=torch.Generator().manual_seed(0))
    found = OURS["WNR_union_TaskDiff"].build(Sources(side, capture(model, {"input_ids": ids}), rank=2, broad_rank=8), 0)
    assert str(found).startswith("TaskDiff_contrast: there are no pairs")


def test_stacked_experts_leave_everything_else_defined():
    model = build("mixtral")
    side = WeightSide.of(model)
    ids = torch.randint(3, 60, (12, 6), generator=torch.Generator().manual_seed(0))
    read = capture(model, {"input_ids": ids}, {"input_ids": ids.flip(0)}, {"input_ids": ids.flip(1)})
    sources = Sources(side, read, rank=2, broad_rank=8)
    for one in ACTIVATION_SIDE:
        found = one.build(sources, 0)
        assert isinstance(found, str) == ("mlp" in one.needs or one.name == "suppressed"), (one.name, found)
        if one.name == "suppressed":
            assert found == "what comes and goes again takes three blocks or more"


def test_candidates_are_plain_data():
    assert all(isinstance(one, Candidate) and callable(one.build) for one in CANDIDATES)
    assert {need for one in CANDIDATES for need in one.needs} <= {
        "weights",
        "clean",
        "contrast",
        "attention",
        "mlp",
        "delta",
    }
