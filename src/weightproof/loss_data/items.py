"""Windows with labels: the user's examples, cut so that a loss can be read from each piece.

Which loss a model has is told from its class and config, by the names that transformers uses:
next tokens ("causal"), hidden tokens ("masked"), one class a token ("tokens"), labels of a decoder ("seq2seq") or one
class an example ("classes").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weightproof.errors import InputError
from weightproof.forward.calibration import LABEL_NAMES, decoder_inputs, examples_of, samples_of, tensors_of
from weightproof.forward.windows import (
    Item,
    digest_items,
    is_encoder_decoder,
    main_input,
    special_ids,
    takes,
    vocab_size,
)
from weightproof.numerics.matrices import seeded_generator

IGNORED = -100
MASKED_FRACTION = 0.15
DOCUMENT_NAMES = ("document", "document_id", "doc_id")

_MASKED = ("MaskedLM", "PreTraining")
_TOKENS = ("TokenClassification",)
_CLASSES = ("SequenceClassification", "ImageClassification", "AudioClassification", "VideoClassification")
_CAUSAL = ("CausalLM", "LMHeadModel", "LMHead", "ConditionalGeneration")


@dataclass(frozen=True, slots=True)
class Form:
    """How the examples of one set become windows.

    Attributes:
        task: "causal", "masked", "tokens", "seq2seq" or "classes"; "plain" where only the user's metric knows.
        length: Tokens per window at most.
        name: Of the set, in errors ("retain", "target").
        mask_token_id: What hides a token of a masked language model; None for seeded random tokens.
    """

    task: str
    length: int
    name: str
    mask_token_id: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LossItem:
    """One window: inputs without a batch axis, labels, how many scores they give, and its document.

    `document` is None where documents are unknown.
    """

    inputs: Item
    labels: torch.Tensor | None
    num_scored: int
    document: str | None


def task_of(model: nn.Module) -> tuple[str | None, str]:
    """The task of a model, or None with the reason why no loss is known for it."""
    config = getattr(model, "config", None)
    inner = getattr(model, "get_base_model", None)
    classes = [kind for one in (model, inner() if callable(inner) else model) for kind in type(one).__mro__]
    names = tuple(kind.__name__ for kind in classes if not hasattr(kind, "_get_fsdp_state"))
    shown = names[0] if names else type(model).__name__
    if config is None:
        return None, f"{shown} has no config that says what it was trained for: give a metric"
    if _ends(names, _CLASSES):
        problem = getattr(config, "problem_type", None)
        if problem in ("regression", "multi_label_classification") or getattr(config, "num_labels", 2) == 1:
            return None, f"{shown} predicts numbers or several labels at once: give a metric"
        return "classes", ""
    kinds = {
        "tokens": _ends(names, _TOKENS),
        "masked": _ends(names, _MASKED),
        "seq2seq": is_encoder_decoder(model),
        "causal": _ends(names, _CAUSAL) and main_input(model) == "input_ids",
    }
    task = next((task for task, fits in kinds.items() if fits), None)
    return task, "" if task else f"no loss is known for {shown}: give a metric"


def _ends(names: tuple[str, ...], endings: tuple[str, ...]) -> bool:
    return any(name.endswith(endings) for name in names)


def loss_items(data: object, model: nn.Module, form: Form, *, by_window: bool = False) -> Iterator[LossItem]:
    """Every window of `data`, in its order; duplicates too.

    An example that gives several windows is one document, unless it names its own under `document`. A flat list
    or tensor of token ids is one text without known documents, and so are the pieces of any data `by_window`.

    Raises:
        InputError: If an example cannot be used: the message says which and why.
    """
    is_flat = by_window or _is_flat(data, model)
    for number, example in enumerate(examples_of(data, model, form.name, None)):
        named = next((example[key] for key in DOCUMENT_NAMES if example.get(key) is not None), None)
        tensors = _with_labels(tensors_of(example, model, form.name), example)
        for row, sample in enumerate(samples_of(tensors, model)):
            document = None if is_flat else _document(named, number, row)
            for inputs, labels, num_scored in _windows(
                sample, model, form, f"example {number} of the {form.name} data"
            ):
                if num_scored:
                    yield LossItem(inputs, labels, num_scored, document)


def _is_flat(data: object, model: nn.Module) -> bool:
    """Whether the data is one stream of token ids, of no document that we know."""
    if isinstance(data, Mapping):
        main = torch.as_tensor(data.get(main_input(model), ()))
        return main.ndim == 1
    if isinstance(data, torch.Tensor) or hasattr(data, "dtype"):
        return getattr(data, "ndim", 0) == 1
    return isinstance(data, (list, tuple)) and bool(data) and isinstance(data[0], int)


def _document(named: Any, number: int, row: int) -> str:
    if named is None:
        return f"{number}.{row}"
    if isinstance(named, (list, tuple, torch.Tensor)) and len(named) > row:
        named = named[row]
    return f"named {named}"


def _with_labels(tensors: Item, example: Mapping[str, Any]) -> Item:
    """Labels that a plain module's forward does not take are still what a metric is given."""
    if any(key in tensors for key in LABEL_NAMES):
        return tensors
    given = next((example[key] for key in LABEL_NAMES if example.get(key) is not None), None)
    return tensors if given is None else {**tensors, "labels": torch.as_tensor(given).detach().cpu()}


# -- one sample to windows -------------------------------------------------------------------------

_Window = tuple[Item, torch.Tensor | None, int]


def _windows(sample: Item, model: nn.Module, form: Form, where: str) -> Iterator[_Window]:
    labels = next((sample[key] for key in LABEL_NAMES if key in sample), None)
    sample = {key: value for key, value in sample.items() if key not in LABEL_NAMES}
    if main_input(model) == "input_ids" and "input_ids" in sample and form.task != "plain":
        sample = _trimmed(sample, model, where)
        if not sample:
            return
    if form.task in ("causal", "masked", "tokens"):
        yield from _token_windows(sample, labels, model, form, where)
    elif form.task == "seq2seq":
        yield from _pair(sample, labels, model, form, where)
    elif form.task == "classes":
        yield _one_class(sample, labels, model, form, where)
    else:
        yield sample, labels, 1


def _trimmed(sample: Item, model: nn.Module, where: str) -> Item:
    """Without padding at either end; fields of one value a token keep step. {} where nothing is left."""
    ids = sample["input_ids"]
    if not ids.numel():
        return {}
    if ids.is_floating_point():
        raise InputError(f"{where} holds floating point numbers where token ids belong: give integers")
    if ids.ndim != 1:
        return sample
    check_range(ids, vocab_size(model), "token id", where)
    mask = sample.get("attention_mask")
    if mask is None or mask.shape != ids.shape:
        return {**sample, "input_ids": ids.long()}
    real = mask.ne(0).nonzero().flatten()
    if not len(real):
        return {}
    kept = {**sample, "input_ids": ids.long()}
    first, last = int(real[0]), int(real[-1]) + 1
    kept = {key: value[first:last] if _per_token(value, ids) else value for key, value in kept.items()}
    kept["_first"] = torch.tensor(first)
    return kept


def check_range(ids: torch.Tensor, size: int | None, what: str, where: str) -> None:
    """Refuse ids or labels that the model does not have; `size` None where it is not known how many those are.

    Raises:
        InputError: Naming one of them.
    """
    if not ids.numel() or size is None:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= size:
        raise InputError(
            f"{where} holds the {what} {low if low < 0 else high}, and the model has {size} (0 to {size - 1}): "
            "was it made with the tokenizer of another model?"
        )


def _per_token(value: torch.Tensor, ids: torch.Tensor) -> bool:
    return value.ndim > 0 and value.shape[0] == ids.shape[0]


def _token_windows(
    sample: Item, labels: torch.Tensor | None, model: nn.Module, form: Form, where: str
) -> Iterator[_Window]:
    """Non-overlapping pieces; labels beside them, IGNORED where nothing is scored."""
    first = int(sample.pop("_first", torch.tensor(0)))
    ids = sample["input_ids"]
    if labels is not None and labels.ndim == 0 and form.task == "causal":
        labels = None  # a class of the text, which a language model does not predict
    if labels is not None and labels.ndim == 1 and first + len(ids) <= len(labels):
        labels = labels[first : first + len(ids)]
    if labels is not None and labels.shape != ids.shape:
        raise InputError(f"{where} has {labels.numel()} labels beside {ids.numel()} token ids: give one a token")
    if labels is None and form.task == "tokens":
        raise InputError(f"{where} has no labels: give one a token (-100 where none is scored)")
    for piece in _pieces(sample, form.length):
        start = int(piece.pop("_start"))
        given = None if labels is None else labels[start : start + len(piece["input_ids"])].long()
        if given is None and form.task == "masked":
            yield _masked(piece, model, form)
            continue
        given = piece["input_ids"].clone() if given is None else given
        mask = piece.get("attention_mask")
        if mask is not None:
            given = given.masked_fill(mask.eq(0), IGNORED)
        check_range(given[given != IGNORED], _num_classes(model, form), "label", where)
        scored = given[1:] if form.task == "causal" else given
        yield _without_full_mask(piece), given, int(scored.ne(IGNORED).sum())


def _num_classes(model: nn.Module, form: Form) -> int | None:
    config = getattr(model, "config", None)
    return getattr(config, "num_labels", None) if form.task == "tokens" else vocab_size(model)


def _pieces(sample: Item, length: int) -> Iterator[Item]:
    ids = sample["input_ids"]
    along = {key for key, value in sample.items() if _per_token(value, ids)}
    whole = set(sample) - along
    for start in range(0, max(1, len(ids)), length):
        if start and whole:
            return  # an image or a sound that belongs to the text: only its first piece has it
        piece = {key: value[start : start + length] if key in along else value for key, value in sample.items()}
        if "position_ids" in piece and start:
            piece["position_ids"] = piece["position_ids"] - piece["position_ids"][0]
        yield {**piece, "_start": torch.tensor(start)}


def _without_full_mask(item: Item) -> Item:
    mask = item.get("attention_mask")
    return {key: value for key, value in item.items() if key != "attention_mask"} if _is_full(mask) else item


def _is_full(mask: torch.Tensor | None) -> bool:
    return mask is not None and bool(mask.ne(0).all())


def _masked(piece: Item, model: nn.Module, form: Form) -> _Window:
    """Hide 15 % of the tokens, chosen by their content: the same before and after any change."""
    ids = piece["input_ids"]
    roles = torch.tensor(sorted(special_ids(model)), dtype=ids.dtype)
    free = ~torch.isin(ids, roles)
    if "attention_mask" in piece:
        free &= piece["attention_mask"].ne(0)
    places = free.nonzero().flatten()
    generator = seeded_generator("masked windows", digest_items([{"input_ids": ids}]))
    count = max(1, round(MASKED_FRACTION * len(places))) if len(places) else 0
    hidden = places[torch.randperm(len(places), generator=generator)[:count]]
    labels = torch.full_like(ids, IGNORED)
    labels[hidden] = ids[hidden]
    replaced = ids.clone()
    if form.mask_token_id is None:
        plain = torch.tensor([i for i in range(vocab_size(model) or 1) if i not in special_ids(model)] or [0])
        replaced[hidden] = plain[torch.randint(len(plain), (count,), generator=generator)]
    else:
        replaced[hidden] = form.mask_token_id
    return _without_full_mask({**piece, "input_ids": replaced}), labels, count


def _pair(sample: Item, labels: torch.Tensor | None, model: nn.Module, form: Form, where: str) -> Iterator[_Window]:
    """One pair of input and decoder labels, each cut to the length."""
    sample.pop("_first", None)
    if labels is None or labels.ndim != 1:
        raise InputError(f"{where} has no labels for the decoder: give 'labels' (token ids) beside the input")
    scored = labels.ne(IGNORED).nonzero().flatten()
    if not len(scored):
        return
    labels = labels[: min(form.length, int(scored[-1]) + 1)].long()
    check_range(labels[labels != IGNORED], vocab_size(model), "label", where)
    ids = sample.get("input_ids")
    if ids is not None and main_input(model) == "input_ids":
        sample = {k: v[: form.length] if _per_token(v, ids) else v for k, v in sample.items()}
    if "decoder_input_ids" in sample:
        sample = {k: v[: len(labels)] if k.startswith("decoder_") else v for k, v in sample.items()}
    else:
        sample = {**sample, **decoder_inputs(sample, labels, model)}
    yield _without_full_mask(sample), labels, int(labels.ne(IGNORED).sum())


def _one_class(sample: Item, labels: torch.Tensor | None, model: nn.Module, form: Form, where: str) -> _Window:
    sample.pop("_first", None)
    if labels is None or labels.numel() != 1 or labels.is_floating_point():
        raise InputError(f"{where} has no label: give 'label', the number of its class")
    label = labels.reshape(()).long()
    check_range(label.reshape(1), getattr(getattr(model, "config", None), "num_labels", None), "label", where)
    ids = sample.get("input_ids")
    if ids is not None:
        sample = {k: v[: form.length] if _per_token(v, ids) else v for k, v in sample.items()}
        if not takes(model, "attention_mask"):
            sample.pop("attention_mask", None)
    return sample, label, 1
