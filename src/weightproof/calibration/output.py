"""Write a calibration: a policy that names its evidence, and every draw beside it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from weightproof.calibration.calibrating import Calibration
from weightproof.errors import InputError
from weightproof.folders.files import write_atomically
from weightproof.judgement.policy_file import parse_policy
from weightproof.policy import TIERS

SUFFIXES = (".yaml", ".yml")


def draws_path(policy: Path) -> Path:
    """Where the draws of a policy lie: `mine.yaml` has `mine.draws.json`."""
    return policy.with_name(f"{policy.stem}.draws.json")


def journal_path(policy: Path) -> Path:
    """Where they are kept while they are made."""
    return policy.with_name(f"{policy.stem}.draws.jsonl")


def check_output(policy: Path, *, force: bool, source: Path | None = None) -> None:
    """Refuse an output that is no policy file or would replace something, before anything long.

    Args:
        policy: The file to write.
        force: Replace what is there.
        source: A file that the draws are read from; it may be the one that is written.

    Raises:
        InputError: Saying what to do.
    """
    if policy.suffix not in SUFFIXES:
        raise InputError(f"-o {policy}: a policy file ends in .yaml")
    for path in (policy, draws_path(policy)):
        is_source = source is not None and path.exists() and path.samefile(source)
        if path.is_dir() or (path.exists() and not force and not is_source):
            raise InputError(f"{path} exists: choose another file with -o, or add --force")


def save(found: Calibration, policy: Path, *, force: bool = False) -> tuple[Path, Path]:
    """Write the policy and the draws; each file is the old one or the new one, never a part.

    Raises:
        InputError: If one exists and `force` is not given, or cannot be written.
    """
    if not force:
        check_output(policy, force=False)
    text = policy_text(found, policy.stem)
    parse_policy(text, origin=str(policy), name=policy.stem)  # nothing is written that could not be read
    beside = draws_path(policy)
    write_atomically(beside, _json_text(found).encode())
    write_atomically(policy, text.encode())
    return policy, beside


def policy_text(found: Calibration, name: str) -> str:
    """The policy file as text; its name is not that of a tier."""
    source, fit = found.provenance, found.fit
    told = (
        f"{source.command}, weightproof {source.version}: {len(found.draws)} draws (seed {source.seed}) of model "
        f"{source.model_digest[:16]}; {fit.in_words}"
    )
    limits = {
        guard: {key: {"value": value, "source": told} for key, value in keys.items()}
        for guard, keys in fit.limits.items()
    }
    body = {
        "name": f"{name}-calibrated" if name in TIERS else name,
        "extends": fit.tier,
        "description": f"The tier {fit.tier} with limits calibrated on one model.",
        "limits": limits,
    }
    head = f"# Written by weightproof calibrate; every draw is in {name}.draws.json.\n"
    return head + yaml.safe_dump(body, sort_keys=False, width=116, default_flow_style=None, allow_unicode=True)


def to_json(found: Calibration) -> dict[str, Any]:
    """Everything, ready for JSON."""
    fit = asdict(found.fit)
    return {
        "provenance": asdict(found.provenance),
        "fit": fit,
        "draws": [one.to_json() for one in found.draws],
    }


def _json_text(found: Calibration) -> str:
    """A draw a line, so that files can be compared."""
    content = to_json(found)
    rows = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in content.pop("draws"))
    head = json.dumps(content, indent=1, allow_nan=False)
    return f'{head[:-2]},\n "draws": [\n{rows}\n ]\n}}\n'
