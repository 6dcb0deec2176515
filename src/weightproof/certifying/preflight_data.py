"""The part of a preflight that looks at tokenizers and data: whether the loss guard will have enough to read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightproof.certifying.preflight_environment import Finding, Level, Plan
from weightproof.errors import InputError
from weightproof.folders.checkpoints import Checkpoint
from weightproof.folders.loading import LOADERS
from weightproof.folders.text_data import read_examples
from weightproof.policy import Policy
from weightproof.registry import load_plugin

# Tokens counted at most: a file that holds so many has enough for every tier.
MOST_TOKENS = 200_000
_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions", "seq_length")
# Models whose position tables begin to count behind the padding index.
_BEHIND_PADDING = frozenset({
    "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet",
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
})  # fmt: skip


def context_length(config: Mapping[str, Any]) -> int | None:
    """Longest token sequence that config.json names; None where it names none."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    known = [part[field] for part in parts for field in _POSITIONS if isinstance(part.get(field), int)]
    return min(known) if known else None


def loss_limits(policy: Policy | None) -> Any:
    """Limits of the loss guard under a policy; those of the guard where there is none."""
    guard = load_plugin("weightproof.guards", "loss")
    return guard.Limits() if policy is None else policy.limits_for(guard)


@dataclass(frozen=True, slots=True)
class _Cut:
    """How the loss guard will cut examples: tokens a window, or (`whole`) one window an example."""

    length: int
    whole: bool

    def windows(self, example: Mapping[str, Any]) -> int:
        """Windows of one example."""
        if self.whole or "label" in example:
            return 1
        return -(-len(example.get("input_ids", ())) // self.length)


def _cut(models: Mapping[str, Checkpoint], limits: Any) -> _Cut:
    config = next((one.config for one in models.values()), {})
    context = context_length(config)
    if (
        context is not None and config.get("model_type") in _BEHIND_PADDING
    ):  # as `windows.max_length` finds in the model
        context -= int(config.get("pad_token_id") or 0) + 1
    length = limits.length if context is None else min(limits.length, max(1, context))
    return _Cut(length, bool(config.get("is_encoder_decoder")))


def examine_data(plan: Plan, models: Mapping[str, Checkpoint], policy: Policy | None) -> Iterator[Finding]:
    """Tokenizers of both models, and each data file."""
    tokenizers: dict[str, tuple[Any, Any]] = {}
    for which, checkpoint in models.items():
        try:
            tokenizers[which] = load_plugin(LOADERS, "tokenizer")(checkpoint.folder)
        except InputError as error:
            yield Finding("WP201", Level.ERROR, f"{which}: {error}", "copy the tokenizer files of the model again")
            continue
        has = "has a tokenizer" if tokenizers[which][0] is not None else "has no tokenizer"
        needs = tokenizers[which][0] is None and any(_is_text(path) for path in (plan.retain, plan.target))
        do = "copy the tokenizer files into the folder, or give .jsonl with input_ids" if needs else ""
        yield Finding("WP201", Level.ERROR if needs else Level.OK, f"{which} {has}", do)
    if len(tokenizers) == 2:
        yield _tokenizers(tokenizers)
    encode = next((one[0] for one in tokenizers.values() if one[0] is not None), None)
    limits = loss_limits(policy)
    for name, path in (("retain", plan.retain), ("target", plan.target)):
        if path is not None:
            yield from _file(name, path, encode, (_cut(models, limits), limits))


def _is_text(path: Path | None) -> bool:
    return path is not None and path.suffix.lower() != ".jsonl"


def _tokenizers(found: Mapping[str, tuple[Any, Any]]) -> Finding:
    if found["base"][1] == found["subject"][1]:
        return Finding("WP202", Level.OK, "base and subject make the same tokens of a text")
    do = "put the base's tokenizer files into the subject's folder: else no loss can be compared"
    return Finding("WP202", Level.ERROR, "the tokenizers of base and subject differ", do)


def _file(name: str, path: Path, encode: Callable[[str], Any] | None, about: tuple[_Cut, Any]) -> Iterator[Finding]:
    if encode is None and _is_text(path):
        return  # WP201 says so
    cut, limits = about
    num_windows = num_tokens = 0
    try:
        for example in read_examples(path, encode, name=name):
            num_windows += cut.windows(example)
            num_tokens += len(example.get("input_ids", ()))
            if num_tokens > MOST_TOKENS:
                break
    except InputError as error:
        yield Finding("WP203", Level.ERROR, str(error), "give UTF-8 text, or .jsonl with text or input_ids")
        return
    more = "more than " if num_tokens > MOST_TOKENS else ""
    yield Finding("WP203", Level.OK, f"{name}: {more}{num_tokens} tokens in {path}")
    yield _amount(name, f"{more or 'about '}{num_windows} windows", limits.too_little(num_windows, num_tokens), about)


def _amount(name: str, what: str, short: str | None, about: tuple[_Cut, Any]) -> Finding:
    """Whether a file reaches the coverage floor of the policy, cut as the loss guard will cut it."""
    cut, limits = about
    if short is None:
        size = "one an example" if cut.whole else f"of at most {cut.length} tokens"
        return Finding("WP204", Level.OK, f"{name}: {what}, {size}; at most {limits.max_windows} are read")
    do = f"give at least {limits.min_windows} windows and {limits.min_tokens} tokens, or the loss is not measured"
    return Finding("WP204", Level.WARN, f"{name}: {short}", do)
