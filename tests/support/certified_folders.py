"""Model folders for tests of certify: a briefly trained Llama with a tokenizer, edits of it, and its kind of text."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch
from trained_models import NUM_SYMBOLS, VOCAB_SIZE, chain_samples, load

from weightproof.edits import RTN
from weightproof.weights import iter_weight_matrices


def save_tokenizer(folder: Path, *, shift: int = 0) -> None:
    """A tokenizer of words `w0` ... for the symbols of the chain; `shift` gives each word another id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{(index + shift) % NUM_SYMBOLS}": index for index in range(NUM_SYMBOLS)}
    vocabulary |= {f"<unused{index}>": index for index in range(NUM_SYMBOLS, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unused39>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unused39>").save_pretrained(folder)


def save_model(model: torch.nn.Module, folder: Path) -> Path:
    """A model with the tokenizer."""
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def quantized(model: torch.nn.Module, bits: int) -> torch.nn.Module:
    """A copy with every matrix that `RTN` selects rounded to `bits`."""
    edited, edit = copy.deepcopy(model), RTN(bits)
    with torch.no_grad():
        for matrix in iter_weight_matrices(edited):
            if matrix.refusal is None and edit.selects(matrix):
                matrix.load().copy_(edit.plan(matrix, None))
    return edited


def write_text(path: Path, *, rows: int = 400, seed: int = 50_000) -> Path:
    """Text of the chain, one sequence a line."""
    lines = [" ".join(f"w{token}" for token in row.tolist()) for row in chain_samples(rows, 32, seed)]
    path.write_text("\n".join(lines) + "\n")
    return path


def make_folders(root: Path) -> Path:
    """`base`, `int8`, `int2` and `retain.txt` in a folder."""
    model = load("llama").model
    save_model(model, root / "base")
    for bits in (8, 2):
        save_model(quantized(model, bits), root / f"int{bits}")
    write_text(root / "retain.txt")
    return root


def copied(folder: Path, to: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(folder, to)
    return to
