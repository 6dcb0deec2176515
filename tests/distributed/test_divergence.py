"""Outputs compared by several processes: the readings of one, and one outcome whatever goes wrong on one of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from architectures import ARCHITECTURES, VOCAB, build
from sharding import kept_parts, perturb, put_back, shard
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from worlds import run_world

from weightproof.activations import calibration_windows, random_windows
from weightproof.collective import Processes
from weightproof.divergence import capture_outputs, forward_digest, locate_damage, measure_divergence
from weightproof.errors import WeightproofError
from weightproof.families import blocks
from weightproof.forward.windows import Windows

LIMIT = 30.0


class Classifier(nn.Module):
    """A plain module without config: two blocks and a head, called with its named input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _trunk() -> nn.Module:
    """A model whose output is a hidden state and a pooled summary."""
    import transformers

    torch.manual_seed(0)
    return transformers.ViTModel(transformers.ViTConfig(**ARCHITECTURES["vit"][2])).eval()


_MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: build("gpt2"),
    "llama": lambda: build("llama"),
    "t5": lambda: build("t5"),
    "vit-trunk": _trunk,
    "classifier": Classifier,
}
_KINDS = ("whole", "DDP", "FSDP2")


def _stored(model: nn.Module, kind: str) -> nn.Module:
    if kind == "DDP":
        return nn.parallel.DistributedDataParallel(model)
    return shard(model) if kind == "FSDP2" else model


def _windows(model: nn.Module, name: str) -> list[Windows]:
    """Random windows (4 batches of text) and 3 batches of data, one of them with padding."""
    generator = torch.Generator().manual_seed(3)
    if name == "classifier":
        return [calibration_windows([{"x": torch.randn(4, 8, generator=generator)} for _ in range(3)], model)]
    random = random_windows(model)
    assert random is not None
    if name == "vit-trunk":
        return [random]
    data: list[dict[str, Any]] = [{"input_ids": torch.randint(3, VOCAB, (n,), generator=generator)} for n in (7, 9, 5)]
    data[0]["attention_mask"] = torch.tensor([1, 1, 1, 1, 1, 0, 0])
    return [random, calibration_windows(data, model)]


def _each(rank: int, size: int, body: str, *args: Any) -> dict[str, Any]:
    """What a body returns for each kind of storage, in one world."""
    return {kind: globals()[body](rank, size, kind, *args) for kind in _KINDS}


def _processes(size: int) -> Processes:
    processes = Processes.join(LIMIT)
    assert processes.size == size == dist.get_world_size()
    return processes


def _readings(rank: int, size: int, name: str, kind: str) -> dict[str, Any]:
    model = _stored(_MODELS[name](), kind)
    processes = _processes(size)
    cache = capture_outputs(model, _windows(model, name), processes=processes)
    same = measure_divergence(model, cache, processes=processes)
    perturb(blocks(model)[1].module, 0.05)
    moved = measure_divergence(model, cache, processes=processes)
    located = locate_damage(model, cache, processes=processes)
    assert all(isinstance(p, DTensor) == (kind == "FSDP2") for p in model.parameters())
    held = [[len(batch) > 0 for batch in batches] for batches in cache.scores]
    found = {
        "second moments at baseline": dict(cache.second_moments),
        "forward digest": cache.forward_digest,
        "same": same,
        "moved": moved,
        "blocks": located,
    }
    return {"found": found, "held": held, "nbytes": cache.nbytes, "trace": cache.trace.nbytes if cache.trace else 0}


def _all_readings(rank: int, size: int, names: list[str], kinds: list[str]) -> dict[str, Any]:
    return {f"{name} {kind}": _readings(rank, size, name, kind) for name in names for kind in kinds}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {key.split()[0]: value for key, value in run_world(_all_readings, 1, list(_MODELS), ["whole"])[0].items()}


# 7 batches (3 of the classifier's) over 2 and over 4 processes: both uneven.
@pytest.mark.parametrize("size", [2, 4])
def test_many_processes_read_bit_for_bit_what_one_reads(alone, size):
    names = list(_MODELS) if size == 2 else ["llama", "classifier"]
    ranks = run_world(_all_readings, size, names, list(_KINDS), timeout=120)
    for key in ranks[0]:
        one = alone[key.split()[0]]
        found = one["found"]
        assert found["same"].second_moments == found["second moments at baseline"]
        assert all((reading.kl or 0.0) == 0.0 == (reading.hidden_error or 0.0) for reading in found["same"].divergence)
        assert all((reading.kl or reading.hidden_error) > 1e-4 for reading in found["moved"].divergence)
        assert sum(error.relative_error > 1e-3 for error in found["blocks"]) == 1
        for rank in ranks:
            assert rank[key]["found"] == found, key


@pytest.mark.parametrize("size", [2, 4])
def test_each_batch_is_held_by_one_process_in_turn(alone, size):
    ranks = [rank["llama whole"] for rank in run_world(_all_readings, size, ["llama"], ["whole"])]
    held = [[flag for batches in rank["held"] for flag in batches] for rank in ranks]
    assert held == [[index % size == rank for index in range(7)] for rank in range(size)]
    scores = [rank["nbytes"] - rank["trace"] for rank in ranks]
    assert sum(scores) == alone["llama"]["nbytes"] - alone["llama"]["trace"]
    assert max(scores) <= sum(scores) * (2 / 7 if size == 4 else 4 / 7) * 1.1


def _one_batch(rank: int, size: int, kind: str) -> Any:
    model = _stored(Classifier(), kind)
    processes = _processes(size)
    windows = calibration_windows([{"x": torch.ones(3, 8)}], model)
    assert len(windows.batches) == 1
    cache = capture_outputs(model, [windows], processes=processes)
    perturb(model, 0.05)
    return measure_divergence(model, cache, processes=processes)


def test_one_batch_over_four_processes():
    (expected,) = run_world(_one_batch, 1, "whole")
    assert run_world(_each, 4, "_one_batch") == [dict.fromkeys(_KINDS, expected)] * 4
    assert expected.divergence[0].kl > 1e-6


def _top_k(rank: int, size: int) -> Any:
    model, processes = build("llama"), _processes(size)
    cache = capture_outputs(model, _windows(model, "llama"), processes=processes, memory_cap_bytes=2 * 496 * 100)
    perturb(model, 0.05)
    widths = {part.values.shape[1] for batches in cache.scores for batch in batches for part in batch}
    return widths, measure_divergence(model, cache, processes=processes).divergence


def test_what_is_kept_of_each_token_does_not_depend_on_the_number_of_processes():
    (expected,) = run_world(_top_k, 1)
    assert min(expected[0]) < VOCAB
    for widths, readings in run_world(_top_k, 2):
        assert widths <= expected[0]
        assert readings == expected[1]


# -- one process that differs -------------------------------------------------------------------


def _outcome(work: Callable[[], object]) -> tuple[str, str]:
    try:
        work()
    except (WeightproofError, _UnforeseenError) as error:
        return type(error).__name__, str(error)
    return "nothing", ""


class _UnforeseenError(Exception):
    """Not among the errors that a forward pass is known to raise."""


@contextlib.contextmanager
def _raising(model: nn.Module, kind: type[Exception], *, after: int = 0) -> Iterator[None]:
    """The second block raises once it was entered more than `after` times."""
    calls = []

    def hook(*_: object) -> None:
        calls.append(1)
        if len(calls) > after:
            raise kind("on purpose")

    handle = blocks(model)[1].module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _fails_on_one(rank: int, size: int, kind: str, after: int, unforeseen: bool) -> Any:
    model, processes = _stored(build("llama"), kind), _processes(size)
    windows = _windows(model, "llama")
    error = _UnforeseenError if unforeseen else RuntimeError
    outcomes = {}

    def attempt(name: str, work: Callable[[], object]) -> None:
        with _raising(model, error, after=after) if rank == 1 else contextlib.nullcontext():
            outcomes[name] = _outcome(work)
        assert all(isinstance(p, DTensor) == (kind == "FSDP2") for p in model.parameters())

    attempt("capture", lambda: capture_outputs(model, windows, processes=processes))
    cache = capture_outputs(model, windows, processes=processes)
    attempt("measure", lambda: measure_divergence(model, cache, processes=processes))
    if not after:
        attempt("locate", lambda: locate_damage(model, cache, processes=processes))
    left_over = measure_divergence(model, cache, processes=processes)
    digest = forward_digest(model, windows)
    assert digest == cache.forward_digest
    return outcomes, [reading.kl for reading in left_over.divergence]


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_forward_that_raises_on_one_process_is_the_same_error_on_all(after):
    """Also in its first pass, before it is known in which order the model gathers its weights."""
    one, other = run_world(_each, 2, "_fails_on_one", after, False)
    for kind in _KINDS:
        (first, kl_first), (second, kl_second) = one[kind], other[kind]
        assert len(first) == len(second) == (2 if after else 3)
        for name in ("capture", "measure"):
            assert first[name] == second[name]
            assert first[name][0] == "InputError"
            assert first[name][1].startswith("rank 1: LlamaForCausalLM.forward failed")
            assert "on purpose" in first[name][1]
        if not after:
            assert (first["locate"][0], second["locate"][0]) == ("InputError", "InputError")
            assert "rank 1" in first["locate"][1]
        assert kl_first == kl_second == [0.0, 0.0]


def test_an_unforeseen_error_in_one_process_ends_the_passes_on_all():
    one, other = run_world(_each, 2, "_fails_on_one", 0, True)
    for kind in _KINDS:
        (first, kl_first), (second, kl_second) = one[kind], other[kind]
        for name in ("capture", "measure", "locate"):
            assert second[name] == ("_UnforeseenError", "on purpose")
            assert first[name][0] == "CollectiveError"
            assert "rank 1" in first[name][1]
            assert "_UnforeseenError: on purpose" in first[name][1]
        assert kl_first == kl_second == [0.0, 0.0]


def _bad_data(rank: int, size: int, kind: str) -> Any:
    model, processes = _stored(build("gpt2"), kind), _processes(size)
    good, bad = [[4, 5, 6, 7], [8, 9, 10]], [VOCAB + 7, 3]
    windows = [calibration_windows([*good[:1], bad, *good[1:]], model)]
    assert len(windows[0].batches) == 3
    refused = _outcome(lambda: capture_outputs(model, windows, processes=processes))
    cache = capture_outputs(model, [calibration_windows(good, model)], processes=processes)
    return refused, measure_divergence(model, cache, processes=processes).divergence[0].kl


def test_data_that_the_model_does_not_take_is_refused_by_all():
    first, second = run_world(_each, 2, "_bad_data")
    assert first == second
    for (error, message), kl in first.values():
        assert error == "InputError"
        assert message.startswith("rank 1: GPT2LMHeadModel.forward failed")
        assert kl == 0.0


def _all_fail(rank: int, size: int, kind: str) -> Any:
    model, processes = _stored(build("llama"), kind), _processes(size)
    cache = capture_outputs(model, _windows(model, "llama"), processes=processes)
    with _raising(model, RuntimeError):
        return _outcome(lambda: measure_divergence(model, cache, processes=processes))


def test_a_model_that_is_broken_everywhere_reads_as_on_one_process():
    (expected,) = run_world(_all_fail, 1, "whole")
    assert expected[0] == "InputError"
    assert run_world(_each, 2, "_all_fail") == [dict.fromkeys(_KINDS, expected)] * 2


def _nan_on_one(rank: int, size: int, kind: str, single: bool) -> Any:
    model, processes = _stored(Classifier(), kind), _processes(size)
    data = [{"x": torch.full((3, 8), 1.0 + index)} for index in range(1 if single else 3)]
    windows = [calibration_windows(data, model)]
    cache = capture_outputs(model, windows, processes=processes)
    if rank == 1:
        weight = next(iter(model.parameters())).detach()
        (weight.to_local() if isinstance(weight, DTensor) else weight)[0, 0] = torch.nan
    after = measure_divergence(model, cache, processes=processes).divergence
    return after, _outcome(lambda: capture_outputs(model, windows, processes=processes))


@pytest.mark.parametrize("single", [False, True])
def test_outputs_that_are_nan_on_one_process_are_not_finite_on_all(single):
    first, second = run_world(_each, 2, "_nan_on_one", single)
    assert first == second
    for kind, ((reading,), (error, message)) in first.items():
        assert not reading.finite
        assert (reading.kl, reading.hidden_error) == (None, None)
        assert error == "BaselineError"
        assert ("rank 1" in message) == (kind != "FSDP2")  # what one part holds, all gather


def _copies_differ(rank: int, size: int) -> Any:
    model, processes = build("llama"), _processes(size)
    cache = capture_outputs(model, _windows(model, "llama"), processes=processes)
    if rank == 1:
        perturb(blocks(model)[1].module, 0.05)
    return locate_damage(model, cache, processes=processes)


def test_damage_to_one_copy_is_located_by_all():
    first, second = run_world(_copies_differ, 2)
    assert first == second
    errors = {error.block: error.relative_error for error in first}
    assert {block for block, error in errors.items() if error > 0} == {"model.layers.1"}
    assert next(iter(errors)) == "embedding"


def _other_sizes(rank: int, size: int) -> Any:
    model, processes = Classifier(), _processes(size)
    cache = capture_outputs(model, _windows(model, "classifier"))
    assert (cache.rank, cache.num_processes) == (0, 1)
    return _outcome(lambda: measure_divergence(model, cache, processes=processes))


def test_outputs_captured_by_another_number_of_processes_are_refused():
    for rank, (error, message) in enumerate(run_world(_other_sizes, 2)):
        assert error == "InputError"
        assert f"captured by process 0 of 1 and are compared by process {rank} of 2" in message


def _trace_too_large(rank: int, size: int) -> Any:
    """The cap is the same everywhere; one copy of the model has a larger head."""
    model, processes = build("llama"), _processes(size)
    if rank == 1:
        model.lm_head = nn.Linear(32, 4096, bias=False)
    windows = [calibration_windows([[4, 5, 6, 7]], model)]
    cache = capture_outputs(model, windows, processes=processes, memory_cap_bytes=4 * 40_000)
    return cache.trace is None, cache.trace_reason, locate_damage(model, cache, processes=processes)


def test_without_a_trace_on_one_process_there_is_none_on_any():
    first, second = run_world(_trace_too_large, 2)
    assert first == second
    assert first[0]
    assert "MiB" in first[1]
    assert first[2] == ()


def _dies(rank: int, size: int, kind: str) -> Any:
    model = _stored(build("llama"), kind)
    processes = Processes.join(6.0)
    cache = capture_outputs(model, _windows(model, "llama"), processes=processes)
    if rank == 1:
        calls: list[int] = []
        blocks(model)[1].module.register_forward_pre_hook(
            lambda *_: os._exit(9) if len(calls) == 2 else calls.append(1)
        )
    return _outcome(lambda: measure_divergence(model, cache, processes=processes))


@pytest.mark.parametrize("kind", ["whole", "FSDP2"])
def test_a_process_that_dies_in_a_pass_is_named_by_the_others(kind):
    first, _ = run_world(_dies, 2, kind, expect_dead={1})
    assert first[0] == "CollectiveError"
    assert "rank 1" in first[1]
    assert "outputs after the change" in first[1]


# -- mixed precision, tensor parallelism --------------------------------------------------------


def _mixed(rank: int, size: int, output_dtype: torch.dtype | None) -> Any:
    model, processes = build("llama"), _processes(size)
    exact = capture_outputs(model, _windows(model, "llama"), processes=processes)
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    shard(model, {"mp_policy": replace(bf16, output_dtype=output_dtype)}, mp_policy=bf16)
    _autocast_like_accelerate(model)
    cache = capture_outputs(model, exact.windows, processes=processes)
    cast = measure_divergence(model, exact, processes=processes).divergence[0].kl
    parts = kept_parts(model)
    perturb(blocks(model)[1].module, 0.05)
    moved = measure_divergence(model, cache, processes=processes)
    located = locate_damage(model, cache, processes=processes)
    put_back(model, parts)
    back = measure_divergence(model, cache, processes=processes)
    again = capture_outputs(model, cache.windows, processes=processes)
    assert again.second_moments == back.second_moments == cache.second_moments
    assert again.forward_digest == cache.forward_digest != exact.forward_digest
    assert locate_damage(model, cache, processes=processes)[0].relative_error == 0.0
    dtypes = {part.dtype for part in cache.trace.tensors} if cache.trace else set()
    return cast, moved.divergence, [r.kl for r in back.divergence], located, dtypes


def _autocast_like_accelerate(model: nn.Module) -> None:
    model._original_forward = model.forward  # type: ignore[assignment]

    def forward(*args: Any, **kwargs: Any) -> Any:
        pytest.fail("measured under autocast")

    model.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize("output_dtype", [None, torch.bfloat16, torch.float32])
def test_casts_of_a_sharding_policy_are_part_of_the_model(output_dtype):
    first, second = run_world(_mixed, 2, output_dtype)
    assert first == second
    cast, moved, back, located, dtypes = first
    assert 0 < cast < 1e-3
    assert back == [0.0, 0.0]
    assert all(reading.kl > 1e-4 for reading in moved)
    assert {error.block for error in located if error.relative_error > 0} == {"model.layers.1"}
    assert torch.bfloat16 in dtypes


def _tensor_parallel(rank: int, size: int) -> Any:
    model, processes = build("llama"), _processes(size)
    if size > 1:
        mesh = init_device_mesh("cpu", (size,))
        plan = {
            "mlp.up_proj": ColwiseParallel(),
            "mlp.gate_proj": ColwiseParallel(),
            "mlp.down_proj": RowwiseParallel(),
        }
        for block in blocks(model):
            parallelize_module(block.module, mesh, plan)
        assert isinstance(model.model.layers[0].mlp.up_proj.weight, DTensor)
    cache = capture_outputs(model, _windows(model, "llama"), processes=processes)
    same = measure_divergence(model, cache, processes=processes)
    assert [reading.kl for reading in same.divergence] == [0.0, 0.0]
    perturb(blocks(model)[1].module, 0.05)
    moved = measure_divergence(model, cache, processes=processes)
    return moved, locate_damage(model, cache, processes=processes)


def test_processes_that_compute_one_pass_between_them_are_given_the_same_inputs():
    (expected, blocks_expected), *_ = run_world(_tensor_parallel, 1)
    ranks = run_world(_tensor_parallel, 2)
    assert ranks[0] == ranks[1]
    moved, located = ranks[0]
    for now, one in zip(moved.divergence, expected.divergence, strict=True):
        assert now.kl == pytest.approx(one.kl, rel=1e-4)  # sums are taken in another order
    assert moved.second_moments == pytest.approx(expected.second_moments, rel=1e-5)
    assert [error.block for error in located] == [error.block for error in blocks_expected]
    assert [e.relative_error for e in located] == pytest.approx([e.relative_error for e in blocks_expected], rel=1e-4)


class OnMesh(nn.Module):
    """A model whose activations are DTensors from its input to its output."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mesh = init_device_mesh("cpu", (size,))
        self.inner = distribute_module(Classifier(), self.mesh)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(DTensor.from_local(x, self.mesh, [Replicate()]))


def _on_mesh(rank: int, size: int) -> Any:
    processes = _processes(size)
    model = OnMesh(size) if size > 1 else Classifier()
    cache = capture_outputs(model, _windows(model, "classifier"), processes=processes)
    perturb(model, 0.05)
    readings = measure_divergence(model, cache, processes=processes).divergence
    return [reading.kl for reading in readings], cache.trace_reason, locate_damage(model, cache, processes=processes)


def test_outputs_divided_among_processes_are_read_whole_and_their_blocks_not_traced():
    ((expected, _, _),) = run_world(_on_mesh, 1)
    for kl, reason, located in run_world(_on_mesh, 2):
        assert kl == pytest.approx(expected, rel=1e-6)
        assert "divided among processes (tensor parallelism)" in reason
        assert located == ()
