"""Somebody changed a model: judge the change from the two folders, sign what was found, check it from the weights.

    python examples/certify_two_folders.py
    python examples/certify_two_folders.py --model BASE --retain held_out.txt --edited EDITED --kind int8

Without `--edited` the base is rounded to `--bits` bits here, as a script of somebody else would do it: no guard
watches. Every command of weightproof is printed as you would type it. Exit code 0: the edited folder may take the
place of the base; 1: it must not; 2: too little was measured. Without `--model` the base is the demo model (made
once, in a minute or two, from the sources of Python's standard library; nothing is downloaded).
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from weightproof_callbacks.demo_model import demo_model


def main() -> int:
    """Certify and verify; then show that one changed weight is found."""
    options = parse_arguments()
    base, out = options.model, options.out
    edited, kind = options.edited, options.kind
    if edited is None:
        edited, kind = out / "edited", f"int{options.bits}"
        round_weights(base, options.bits, edited)

    key, certificate = out / "weightproof.key", out / "certificate.json"
    key.unlink(missing_ok=True)
    key.with_name("weightproof.key.pub").unlink(missing_ok=True)
    weightproof("keygen", key)
    claim = ["--kind", kind] if kind else []
    decided = weightproof("certify", base, edited, "--retain", options.retain, *claim, "--sign", key, "-o", out)
    trusted = ["--base", base, "--key", f"{key}.pub"]
    weightproof("verify", certificate, "--model", edited, *trusted, "--level", 2)

    tampered = out / "tampered"
    change_one_weight(edited, tampered)
    weightproof("verify", certificate, "--model", tampered, *trusted, "--level", 1)
    return decided


def weightproof(*words: object) -> int:
    """Print a command of weightproof, run it, and return its exit code."""
    command = ["weightproof", *map(str, words)]
    print(f"\n$ {' '.join(command)}", flush=True)
    code = subprocess.run([sys.executable, "-m", *command], check=False).returncode
    print(f"(exit code {code})")
    return code


def round_weights(base: Path, bits: int, folder: Path) -> None:
    """Round every linear layer but the head to so many bits, with one scale a row."""
    model = AutoModelForCausalLM.from_pretrained(base)
    top = 2 ** (bits - 1) - 1
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                scale = module.weight.abs().amax(dim=1, keepdim=True) / top
                module.weight.copy_((module.weight / scale).round().clamp(-top, top) * scale)
    model.save_pretrained(folder)
    for file in base.glob("tokenizer*"):
        shutil.copy(file, folder)


def change_one_weight(folder: Path, copy: Path) -> None:
    """A copy of a model folder in which one weight of one matrix is another."""
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    file = next(copy.glob("*.safetensors"))
    tensors = load_file(file)
    next(iter(tensors.values())).flatten()[0] += 0.001
    save_file(tensors, file, metadata={"format": "pt"})


def parse_arguments() -> argparse.Namespace:
    """What can be changed from the command line; without a model, the demo model and its text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the base, with its tokenizer")
    parser.add_argument("--retain", type=Path, help="text on which the edited model must not be worse")
    parser.add_argument("--edited", type=Path, help="folder of the edited model; default: made from the base")
    parser.add_argument("--kind", help="what the edit claims to be, such as int8")
    parser.add_argument("--bits", type=int, default=8, help="of the edit that is made here")
    parser.add_argument("--out", type=Path, default=Path("certified"), help="folder for models and evidence")
    options = parser.parse_args()
    if options.model is None:
        demo = demo_model(Path(".cache/weightproof"), say=print)
        options.model, options.retain = demo.folder, demo.retain
    elif options.retain is None:
        parser.error("with --model, give --retain")
    return options


if __name__ == "__main__":
    sys.exit(main())
