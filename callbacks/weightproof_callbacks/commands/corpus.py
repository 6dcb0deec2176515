"""Real text that every machine has: the sources of Python's own standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from weightproof.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "<|end|>"


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts by file name, split by file: no file is in both parts."""

    train: dict[str, str]
    heldout: dict[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Token windows of equal length.

    Attributes:
        ids: (num_windows, window) token ids.
        num_bytes: (num_windows,) bytes of text behind the tokens that are predicted (all but the
            first of a window), so that a loss in nats becomes bits per byte whatever the vocabulary.
    """

    ids: torch.Tensor
    num_bytes: torch.Tensor


def standard_library() -> Path:
    """Folder of the running interpreter's own modules."""
    return Path(sysconfig.get_path("stdlib"))


def source_files(root: Path, exclude: Collection[str], max_bytes: int) -> list[Path]:
    """Python files below `root`, in order of name, at most `max_bytes` of them.

    Where the folder holds more, the files with the smallest hash of their relative name are taken:
    a choice that depends neither on the order of the file system nor on a neighbour's name.

    Raises:
        InputError: If there are none.
    """
    found = [path for path in root.rglob("*.py") if not set(path.relative_to(root).parts) & set(exclude)]
    chosen, used = [], 0
    for path in sorted(found, key=lambda path: _hash(path, root)):
        size = path.stat().st_size
        if used + size <= max_bytes:
            chosen.append(path)
            used += size
    if not chosen:
        raise InputError(f"no Python sources below {root}: the demo needs the standard library's .py files")
    return sorted(chosen)


def read_corpus(root: Path, exclude: Collection[str], max_bytes: int, heldout_fraction: float) -> Corpus:
    """Read the files and hold some out, chosen by the hash of their names.

    Raises:
        InputError: If either part would be empty.
    """
    train: dict[str, str] = {}
    heldout: dict[str, str] = {}
    for path in source_files(root, exclude, max_bytes):
        text = path.read_text(encoding="utf-8", errors="ignore")
        part = heldout if int(_hash(path, root, "held out")[:8], 16) < heldout_fraction * 2**32 else train
        part[path.relative_to(root).as_posix()] = text
    if not train or not heldout:
        raise InputError(f"{len(train)} training and {len(heldout)} held-out files below {root}: too few for the demo")
    return Corpus(train, heldout)


def train_tokenizer(texts: Sequence[str], vocab_size: int, window: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text is encoded without loss, an unknown token does not exist."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, model_max_length=window)


def cut_windows(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, window: int) -> Windows:
    """Encode the texts, join them with an end token, and cut them into windows; the rest is dropped.

    Raises:
        InputError: If there are not even `window` tokens.
    """
    encoder = tokenizer.backend_tokenizer
    end = encoder.get_vocab()[END]
    ids: list[int] = []
    for encoding in encoder.encode_batch(list(texts)):
        ids.extend(encoding.ids)
        ids.append(end)
    count = len(ids) // window
    if not count:
        raise InputError(f"{len(ids)} tokens of text do not fill one window of {window}")
    grid = torch.tensor(ids[: count * window]).view(count, window)
    return Windows(grid, token_bytes(tokenizer)[grid[:, 1:]].sum(dim=1))


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Bytes of text behind each token id: byte-level BPE writes one character a byte; the end token has none."""
    vocabulary = tokenizer.backend_tokenizer.get_vocab()
    sizes = torch.zeros(len(vocabulary), dtype=torch.long)
    for token, index in vocabulary.items():
        sizes[index] = 0 if token == END else len(token)
    return sizes


def beginning(texts: Sequence[str], max_bytes: int) -> str:
    """The beginning of every text, each of the same length, together at most `max_bytes` of UTF-8.

    Many files a little rather than a few whole: a loss on it is a loss on all of them.
    """
    share = max_bytes // max(1, len(texts))
    parts = [text.encode()[:share].decode(errors="ignore").rpartition("\n")[0] for text in texts]
    return "\n".join(part for part in parts if part.strip()) + "\n"


def spread(windows: Windows, count: int) -> Windows:
    """`count` windows evenly spread over all, so that every part of the text is seen."""
    picks = torch.linspace(0, len(windows.ids) - 1, min(count, len(windows.ids))).round().long()
    return Windows(windows.ids[picks], windows.num_bytes[picks])


def _hash(path: Path, root: Path, purpose: str = "order") -> str:
    return hashlib.sha256(f"{purpose}:{path.relative_to(root).as_posix()}".encode()).hexdigest()
