"""What one process does in the tests of masters and placements; the tests compare what comes back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from zero_engines import (
    Ragged,
    Setup,
    batch,
    differing,
    engine_of,
    join,
    largest,
    live_part,
    named,
    output_of,
    parts,
    ragged,
    small_llama,
    step,
    write,
)

from weightproof.errors import InputError
from weightproof.parallel import placements
from weightproof_callbacks.sharded import ZeroMasters, find_masters
from weightproof_callbacks.training_state import clear_optimizer_state

WEIGHT = "model.layers.1.mlp.up_proj.weight"


def masters_of(engine: Any) -> ZeroMasters:
    found = find_masters(None, engine, None)
    assert found is not None
    return found


def copies(masters: ZeroMasters) -> dict[str, torch.Tensor]:
    return {name: master.clone() for name, master in masters.tensors().items()}


def put(tensors: dict[str, torch.Tensor], kept: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(kept[name])


def life_of_a_write(rank: int, size: int, setup: Setup) -> dict[str, Any]:
    """A write taken back in weights and masters, beside an undisturbed twin; then a raw and a refreshed write."""
    join(size)
    engine, twin = engine_of(small_llama(), setup), engine_of(small_llama(), setup)
    masters = masters_of(engine)
    facts: dict[str, Any] = {"optimizer": type(engine.optimizer).__name__, "stale": {"at first": masters.stale()}}
    for seed in (1, 2):
        step(engine, seed)
        step(twin, seed)
    facts["stale"]["after training"] = masters.stale()
    facts["unlike the twin"] = {"after training": differing(parts(engine), parts(twin))}

    weights, kept = parts(engine), copies(masters)
    write(engine, WEIGHT, 0.0)
    facts["written"] = largest(engine, WEIGHT)
    facts["stale after a raw write"] = masters.stale()
    write(engine, WEIGHT, 0.5)
    masters.refresh([WEIGHT])
    facts["stale"]["after refresh"] = masters.stale()
    facts["refreshed masters"] = differing(copies(masters), kept)
    put({name: live_part(parameter) for name, parameter in named(engine).items()}, weights)
    put(masters.tensors(), kept)
    placements.settle(engine.module)
    facts["stale"]["after taking it back"] = masters.stale()
    step(engine, 3)
    step(twin, 3)
    facts["unlike the twin"]["after the next step"] = differing(parts(engine), parts(twin))
    facts["unlike the twin"]["masters"] = differing(copies(masters), copies(masters_of(twin)))

    write(engine, WEIGHT, 0.0)
    step(engine, 4, learning_rate=0.0)
    facts["raw write, one step later"] = largest(engine, WEIGHT)
    write(engine, WEIGHT, 0.0)
    masters.refresh([WEIGHT])
    step(engine, 5, learning_rate=0.0)
    facts["refreshed write, one step later"] = largest(engine, WEIGHT)
    step(engine, 6, learning_rate=1e-3)
    facts["refreshed write, after learning"] = largest(engine, WEIGHT)
    return facts


def life_of_moments(rank: int, size: int, setup: Setup) -> dict[str, Any]:
    """Moments cleared after some steps, beside an engine that begins at the same weights."""
    join(size)
    engine, fresh = engine_of(small_llama(), setup), engine_of(small_llama(), setup)
    for seed in (1, 2):
        step(engine, seed)
    put({name: live_part(parameter) for name, parameter in named(fresh).items()}, parts(engine))
    put(masters_of(fresh).tensors(), copies(masters_of(engine)))
    placements.settle(fresh.module)
    facts: dict[str, Any] = {"cleared": clear_optimizer_state(engine.optimizer)}
    facts["cleared again"] = clear_optimizer_state(engine.optimizer)
    step(engine, 3)
    step(fresh, 3)
    facts["unlike the fresh one"] = differing(parts(engine), parts(fresh))
    facts["cleared later"] = clear_optimizer_state(engine.optimizer)
    return facts


def layout(rank: int, size: int, setup: Setup) -> dict[str, Any]:
    """The parts of an odd model as the library and as DeepSpeed see them."""
    join(size)
    whole = {name: parameter.detach().clone() for name, parameter in ragged().to(setup.dtype).named_parameters()}
    engine = engine_of(ragged(), setup)
    masters = masters_of(engine)
    found: dict[str, Any] = {}
    for name, parameter in named(engine).items():
        cut = placements.cut_of(parameter)
        assert cut is not None, name
        start, end = cut.ranges[cut.rank]
        own = whole[name].flatten()[start:end]
        found[name] = {
            "shape": placements.shape_of(parameter),
            "layout": cut.layout,
            "ranges": cut.ranges,
            "refusal": placements.refusal_of(parameter),
            "is the part": torch.equal(placements.local_of(parameter), own),
            "type": type(parameter.ds_tensor).__name__,
            "master": None if (master := masters.tensors().get(name)) is None else torch.equal(master, own.float()),
        }
    return found


def settling(rank: int, size: int, setup: Setup) -> dict[str, Any]:
    """A part written after `settle` is what the next forward pass uses, whatever was gathered ahead."""
    join(size)
    engine = engine_of(small_llama(), setup)
    for seed in (1, 2, 3):
        step(engine, seed)
    for _ in range(3):
        before = output_of(engine)
    statuses = {name: parameter.ds_status.name for name, parameter in named(engine).items()}
    placements.settle(engine.module)
    facts: dict[str, Any] = {
        "gathered": [name for name, status in statuses.items() if status == "AVAILABLE"],
        "on their way": [name for name, status in statuses.items() if status == "INFLIGHT"],
        "gathered after": [n for n, parameter in named(engine).items() if parameter.ds_status.name != "NOT_AVAILABLE"],
    }
    output_of(engine)
    facts["unused"] = []
    for name, parameter in named(engine).items():
        part = live_part(parameter)
        kept = part.clone()
        placements.settle(engine.module)
        part.mul_(-1.5)
        if torch.equal(output_of(engine), before):
            facts["unused"].append(name)
        placements.settle(engine.module)
        part.copy_(kept)
        if not torch.equal(output_of(engine), before):
            facts["unused"].append(f"{name} put back")
    facts["loss"] = step(engine, 4)
    return facts


def message_of(call: Any) -> str:
    try:
        call()
    except InputError as error:
        return str(error)
    return "nothing was refused"


def refusals(rank: int, size: int, setup: Setup) -> dict[str, Any]:
    """What is refused, and with which sentence."""
    join(size)
    engine = engine_of(small_llama(), setup)
    masters = masters_of(engine)
    facts = {"another model": message_of(lambda: find_masters(None, ragged(), engine.optimizer))}
    layer = engine.module.model.layers[1].mlp
    trained = layer.up_proj.weight
    layer.up_proj.weight = nn.Parameter(torch.zeros(56, 32))
    facts["replaced"] = message_of(lambda: masters.refresh([WEIGHT]))
    layer.up_proj.weight = trained
    if setup.stage < 3:
        whole = trained.data
        trained.data = torch.zeros(57, 32)
        facts["reshaped"] = message_of(masters.stale)
        trained.data = whole
    engine.optimizer.offloaded_states.add("hp_params")
    facts["moved"] = message_of(masters.tensors)
    engine.optimizer.offloaded_states.clear()
    whole_masters = engine_of(small_llama(), Setup(0, torch.bfloat16))
    facts["without ZeRO"] = message_of(lambda: find_masters(None, whole_masters, None))
    facts["nothing refused"] = message_of(masters.stale)
    return facts


def without_masters(rank: int, size: int) -> bool:
    """DeepSpeed in fp32 without ZeRO steps on the weights themselves."""
    join(size)
    return find_masters(None, engine_of(small_llama(), Setup(0)), None) is None


def prepared_by_accelerate(rank: int, size: int, setup: Setup) -> dict[str, Any]:
    """Found through whatever of the run is at hand, and a refreshed write that survives `accelerator.backward`."""
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DeepSpeedPlugin, DistributedType

    join(size)
    plugin = DeepSpeedPlugin(hf_ds_config={**setup.config, "gradient_accumulation_steps": 1})
    # On a machine without GPU: a state on the CPU, so that all processes count, and then no cpu=True for the
    # Accelerator, which would ignore the plugin in silence.
    PartialState(cpu=True)
    accelerator = Accelerator(deepspeed_plugin=plugin)
    assert accelerator.distributed_type == DistributedType.DEEPSPEED
    model = small_llama().to(setup.dtype)
    engine, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    found = {
        "engine": find_masters(None, engine, None),
        "optimizer": find_masters(None, model, optimizer),
        "accelerator": find_masters(accelerator, model, None),
        "all": find_masters(accelerator, engine, optimizer),
    }
    names = {key: sorted(masters.tensors()) for key, masters in found.items() if masters is not None}
    write(engine, WEIGHT, 0.0)
    stale = found["all"].stale()
    found["all"].refresh([WEIGHT])
    tokens = batch(1)
    accelerator.backward(engine(input_ids=tokens, labels=tokens).loss)
    return {
        "processes": accelerator.num_processes,
        "names": names,
        "stale": stale,
        "steps": engine.global_steps,
        "after": largest(engine, WEIGHT),
        "another pair": find_masters(accelerator, Ragged(), torch.optim.SGD([nn.Parameter(torch.ones(1))])) is None,
    }
