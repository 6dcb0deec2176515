"""Preflight: what would stop a certification or a guarded run, found in seconds, each with what to do.

Codes are stable: a script may rely on them. WP0xx environment, WP1xx models, WP2xx data, WP3xx policy and keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from weightproof.certifying.preflight_data import context_length, examine_data, loss_limits
from weightproof.certifying.preflight_environment import Finding, Level, Plan, examine_environment
from weightproof.errors import InputError, WeightproofError
from weightproof.folders.checkpoints import Checkpoint, open_checkpoint
from weightproof.policy import Policy, load_policy
from weightproof.snapshots.tensor_store import readable

CODES: Mapping[str, str] = {
    "WP001": "versions of the libraries",
    "WP002": "plug-ins that cannot be loaded",
    "WP003": "threads and processes",
    "WP004": "free memory for the models",
    "WP005": "free disk space",
    "WP006": "W&B",
    "WP101": "model folder",
    "WP102": "weights that cannot be measured",
    "WP103": "dtype of the weights",
    "WP104": "model class",
    "WP105": "subject against base",
    "WP106": "context length",
    "WP201": "tokenizer",
    "WP202": "tokenizer of subject against base",
    "WP203": "data file",
    "WP204": "amount of data",
    "WP301": "policy",
    "WP302": "what the policy requires",
    "WP303": "signing key",
}
"""What each code is about."""


def examine(plan: Plan) -> list[Finding]:
    """Every check that the plan gives something for, in order of the codes. Nothing is loaded or changed."""
    found = [*examine_environment(plan)]
    models: dict[str, Checkpoint] = {}
    for which, folder in (("base", plan.base), ("subject", plan.subject)):
        if folder is not None:
            findings, checkpoint = _model(which, folder)
            found += findings
            if checkpoint is not None:
                models[which] = checkpoint
    found += [*_memory(plan, models), *_pair(models)]
    policy, findings = _policy(plan)
    found += [*findings, *_context(models, policy), *examine_data(plan, models, policy), *_key(plan)]
    return sorted(found, key=lambda finding: finding.code)


def _memory(plan: Plan, models: Mapping[str, Checkpoint]) -> Iterator[Finding]:
    """One model at a time in memory, a few copies of its largest tensor, and the cached outputs."""
    if not models:
        return
    sizes = {which: weight_bytes(one) for which, one in models.items()}
    largest = max(tensor_bytes for one in models.values() for tensor_bytes in _tensor_bytes(one))
    needed = max(sizes.values()) + 4 * largest + (512 << 20)
    free = _free_memory()
    what = f"about {readable(needed)} needed to run one model of {readable(max(sizes.values()))} at a time"
    if free is None:
        yield Finding("WP004", Level.OK, what)
    elif free < needed:
        do = "free some memory, use a larger machine, or give --weights-only: that needs a few copies of one tensor"
        yield Finding("WP004", Level.WARN, f"{what}, {readable(free)} free", do)
    else:
        yield Finding("WP004", Level.OK, f"{what}, {readable(free)} free")


def _free_memory() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        return None
    return None


def _tensor_bytes(checkpoint: Checkpoint) -> list[int]:
    return [torch.Size(one.shape).numel() * one.dtype.itemsize for one in checkpoint.tensors] or [0]


def weight_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of all tensors of a folder."""
    return sum(_tensor_bytes(checkpoint))


# ---------------------------------------------------------------- models


def _model(which: str, folder: Path) -> tuple[list[Finding], Checkpoint | None]:
    try:
        checkpoint = open_checkpoint(folder)
    except InputError as error:
        return [Finding("WP101", Level.ERROR, f"{which}: {error}", "give a folder written by save_pretrained")], None
    files = len(checkpoint.weight_files)
    size = readable(weight_bytes(checkpoint))
    found = [Finding("WP101", Level.OK, f"{which}: {len(checkpoint.tensors)} tensors, {size}, {files} weight files")]
    refused = [matrix.name for matrix in checkpoint.matrices if matrix.refusal is not None]
    if len(refused) == len(checkpoint.matrices):
        do = "dequantise the model and save it again; without a matrix no weight guard gives a verdict"
        found.append(Finding("WP102", Level.ERROR, f"{which}: no weight matrix can be measured", do))
    elif refused:
        what = f"{which}: {len(refused)} of {len(checkpoint.matrices)} matrices are not measured ({refused[0]}, ...)"
        found.append(Finding("WP102", Level.WARN, what, "weightproof inspect says why, matrix by matrix"))
    return [
        *found,
        _dtypes(which, checkpoint),
        _architecture(which, checkpoint),
    ], checkpoint


def _dtypes(which: str, checkpoint: Checkpoint) -> Finding:
    stored = sorted({str(one.dtype).removeprefix("torch.") for one in checkpoint.tensors})
    said = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    what = f"{which}: stored as {', '.join(stored)}"
    if isinstance(said, str) and said not in stored:
        do = "set dtype in config.json to that of the files: outputs are otherwise those of rounded weights"
        return Finding("WP103", Level.WARN, f"{what}, but config.json has it run in {said}", do)
    return Finding("WP103", Level.OK, what)


def _architecture(which: str, checkpoint: Checkpoint) -> Finding:
    config = checkpoint.config
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        do = "add it to config.json, or give --weights-only"
        return Finding("WP104", Level.WARN, f"{which}: config.json names no architecture: it cannot be run", do)
    if "auto_map" in config:
        do = "code in a model folder is never run: only --weights-only works if transformers lacks the class"
        return Finding("WP104", Level.WARN, f"{which}: {names[0]} comes with code of its own", do)
    if "quantization_config" in config:
        do = "dequantise the model and save it again"
        return Finding("WP104", Level.ERROR, f"{which}: {names[0]} is stored quantised", do)
    return Finding("WP104", Level.OK, f"{which}: {names[0]}")


def _context(models: Mapping[str, Checkpoint], policy: Policy | None) -> Iterator[Finding]:
    if "base" not in models or (length := context_length(models["base"].config)) is None:
        return
    windows = loss_limits(policy).length
    if length > windows:
        what = f"base: a context of {length} tokens, compared on windows of at most {windows}"
        do = "raise limits.loss.length in a policy file if long contexts matter; else they are listed as not tested"
        yield Finding("WP106", Level.WARN, what, do)
    else:
        yield Finding("WP106", Level.OK, f"base: a context of {length} tokens")


def _pair(models: Mapping[str, Checkpoint]) -> Iterator[Finding]:
    if len(models) < 2:
        return
    base, subject = models["base"], models["subject"]
    kinds = [one.config.get("model_type") for one in (base, subject)]
    if kinds[0] != kinds[1]:
        do = "give two versions of one model"
        yield Finding("WP105", Level.ERROR, f"the base is a {kinds[0]} and the subject a {kinds[1]}", do)
        return
    then, now = ({one.name: one.shape for one in model.tensors} for model in (base, subject))
    odd = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
    if odd:
        what = f"{len(odd)} tensors are missing, new or of another shape, the first is {odd[0]}"
        yield Finding("WP105", Level.ERROR, what, "it will be rejected as it is: save the whole subject again")
    else:
        yield Finding("WP105", Level.OK, f"base and subject have the same {len(then)} tensors")


# ---------------------------------------------------------------- policy, data, key


def _policy(plan: Plan) -> tuple[Policy | None, list[Finding]]:
    try:
        policy = load_policy(plan.policy)
    except WeightproofError as error:
        return None, [Finding("WP301", Level.ERROR, str(error), "weightproof policy show balanced prints a valid one")]
    found = [Finding("WP301", Level.OK, f"policy {policy.name}, digest {policy.digest[:12]}")]
    if "loss" in policy.required and plan.retain is None:
        do = "give --retain text, or choose another policy"
        found.append(Finding("WP302", Level.ERROR, f"policy {policy.name} requires a loss and there is no data", do))
    elif plan.retain is None:
        do = "give --retain text for a decision on the loss"
        found.append(Finding("WP302", Level.WARN, "without data only outputs on random tokens can accept", do))
    else:
        found.append(Finding("WP302", Level.OK, f"required guards: {', '.join(policy.required) or 'none'}"))
    return policy, found


def _key(plan: Plan) -> Iterator[Finding]:
    if plan.key is None:
        return
    from weightproof.signing import load_private_key

    try:
        load_private_key(plan.key)
    except WeightproofError as error:
        yield Finding("WP303", Level.ERROR, str(error), "weightproof keygen makes a key that only you can read")
        return
    yield Finding("WP303", Level.OK, f"the key {plan.key} can sign")


__all__ = ["CODES", "Finding", "Level", "Plan", "context_length", "examine", "weight_bytes"]
