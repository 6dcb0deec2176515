"""Which optimizers have masters beside the weights, told without DeepSpeed; with it, see `tests/zero`."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from weightproof.errors import InputError
from weightproof_callbacks.sharded import clear_moments, find_masters
from weightproof_callbacks.training_state import clear_optimizer_state


def like_deepspeed(name, **attributes):
    """An optimizer that looks like one of DeepSpeed's by its module and by what it keeps."""
    kind = type(name, (), {"__module__": "deepspeed.runtime.zero.stage3"})
    optimizer = kind()
    vars(optimizer).update(attributes)
    return optimizer


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))


def test_without_deepspeed_there_are_no_masters(model):
    optimizer = torch.optim.AdamW(model.parameters())
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model, optimizer)
    assert find_masters(None, model, optimizer) is None
    assert find_masters(accelerator, *prepared) is None
    assert find_masters(accelerator, model, None) is None
    assert clear_moments(optimizer) is None
    assert clear_moments(prepared[1]) is None


def test_an_optimizer_that_names_its_list_like_a_master_is_not_deepspeed(model):
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.fp32_groups_flat = []
    assert find_masters(None, model, optimizer) is None


@pytest.mark.parametrize(
    ("name", "attributes", "reason"),
    [
        ("FP16_Optimizer", {"fp32_groups_flat": []}, "choose ZeRO stage 1, 2 or 3"),
        ("FP16_UnfusedOptimizer", {"fp32_groups": []}, "choose ZeRO stage 1, 2 or 3"),
        ("DeepSpeedZeroOptimizer_Stage3", {"fp32_partitioned_groups_flat": [], "swap_optimizer": True}, "NVMe"),
        ("DeepSpeedZeroOptimizer_Stage3", {"fp32_partitioned_groups_flat": [], "params_in_nvme_and_cpu": True}, "NVMe"),
        ("ZenFlowZeroOptimizerSequential", {"single_partition_of_fp32_groups": []}, "beside the training loop"),
        (
            "DeepSpeedZeroOptimizer",
            {"single_partition_of_fp32_groups": [], "zenflow": True},
            "beside the training loop",
        ),
        ("SuperOffloadOptimizer_Stage3", {"fp32_partitioned_groups_flat": []}, "beside the training loop"),
    ],
)
def test_masters_out_of_reach_are_refused_by_name(model, name, attributes, reason):
    wrapped = AcceleratedOptimizer.__new__(AcceleratedOptimizer)
    wrapped.optimizer = like_deepspeed(name, **attributes)
    with pytest.raises(InputError, match=f"{name} of DeepSpeed cannot be guarded: .*{reason}"):
        find_masters(None, model, wrapped)


def test_masters_without_a_model_cannot_be_named():
    flat = torch.ones(3)
    optimizer = like_deepspeed("DeepSpeedZeroOptimizer", single_partition_of_fp32_groups=[flat], bit16_groups=[[]])
    with pytest.raises(InputError, match="give the model, too"):
        find_masters(None, None, optimizer)


def test_moments_of_stage_3_are_cleared_although_its_groups_are_empty_between_steps():
    flat = torch.ones(3, requires_grad=True)
    inner = torch.optim.AdamW([flat])
    flat.grad = torch.ones(3)
    inner.step()
    inner.param_groups[0]["params"] = []
    optimizer = like_deepspeed("DeepSpeedZeroOptimizer_Stage3", fp32_partitioned_groups_flat=[flat], optimizer=inner)
    assert clear_optimizer_state(optimizer) == 1
    assert clear_optimizer_state(optimizer) == 0
    assert not inner.state
