"""Train a LoRA with PEFT and merge it under guard: merged twice is called by name and rolled back, once is kept.

    python examples/merge_lora_safely.py
    python examples/merge_lora_safely.py --model FOLDER --train train.txt --retain held_out.txt

The mistake is a common one: a script loads weights into which the adapter was merged already, and merges again. No
error, a model that still talks, and every delta of twice the size. Without `--model` the demo model is used (made
once, in a minute or two, from the sources of Python's standard library; nothing is downloaded).
"""

import argparse
import hashlib
from functools import partial
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from weightproof import GuardSession, LossData, kinds
from weightproof_callbacks.demo_model import demo_model

WINDOW = 64  # tokens a row


def main() -> None:
    """Train, merge wrongly, merge rightly."""
    options = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = torch.tensor(tokenizer(options.train.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    train_lora(options.model, ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW), options.steps, options.out / "lora")

    base = AutoModelForCausalLM.from_pretrained(options.model)
    model = peft.PeftModel.from_pretrained(base, options.out / "lora")
    session = GuardSession(
        model, retain=LossData(options.retain, encode=partial(tokenizer.encode, verbose=False)), output_dir=options.out
    )
    merge = kinds.LoraMerge(options.out / "lora")  # what both blocks claim to be; each is held to it
    before = fingerprint(model)

    with session.edit("merged twice", kind=merge) as step:
        model.merge_adapter()
        for layer in model.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.merged_adapters.clear()  # nobody knows any more that it was merged
        model.merge_adapter()
    print(f"{step.name}: {step.decision.action}, {step.applied}\n  {step.decision.reason}")
    print(f"  weights {before} before, {fingerprint(model)} after")

    with session.edit("merged once", kind=merge) as step:
        model.merge_adapter()
    print(f"{step.name}: {step.decision.action}, {step.applied}\n  {step.decision.reason}")
    print(f"  weights {before} before, {fingerprint(model)} after")

    session.close()
    merged = model.unload()  # the adapter's layers go, the merged weights stay
    merged.save_pretrained(options.out / "merged")
    tokenizer.save_pretrained(options.out / "merged")
    print(f"merged model in {options.out / 'merged'}, certificate and report in {options.out}")


def train_lora(folder: Path, rows: torch.Tensor, steps: int, out: Path) -> None:
    """Train a small adapter of every linear layer, as one does with PEFT, and save it."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    for step in range(steps):
        batch = rows[torch.randint(len(rows), (8,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(f"lora, step {step}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(out)


def fingerprint(model: torch.nn.Module) -> str:
    """The first digits of a SHA-256 over the weights, with nothing of weightproof."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def parse_arguments() -> argparse.Namespace:
    """What can be changed from the command line; without a model, the demo model and its texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a causal language model with its tokenizer")
    parser.add_argument("--train", type=Path, help="text to train the adapter on")
    parser.add_argument("--retain", type=Path, help="other text, on which the merged model must not be worse")
    parser.add_argument("--steps", type=int, default=60, help="training steps of the adapter")
    parser.add_argument("--out", type=Path, default=Path("merged-lora"), help="folder for adapter, model and evidence")
    options = parser.parse_args()
    if options.model is None:
        demo = demo_model(Path(".cache/weightproof"), say=print)
        options.model, options.train, options.retain = demo.folder, demo.train, demo.retain
    elif options.train is None or options.retain is None:
        parser.error("with --model, give --train and --retain")
    return options


if __name__ == "__main__":
    main()
