"""Two small LoRA adapters of the demo model, one trained on shouted text and one on whispered, and prompts for both.

What they changed can then be looked for in the residual stream (docs/deltas.md):

    python examples/shouting_adapters.py
    cd shouting
    weightproof delta report base shout --against whisper --prompts clean.txt \
        --positive positive.txt --negative negative.txt --out report

Takes a minute on two free cores; two runs with the same --seed make the same adapters. Without `--model` the demo model
is made first, once, in a minute or two (nothing is downloaded).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from weightproof_callbacks.demo_model import demo_model

LENGTH, BATCH, PROMPTS = 64, 8, 64


def windows(tokenizer: object, text: str) -> torch.Tensor:
    """The text as windows of tokens, (count, LENGTH)."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])  # pyright: ignore[reportCallIssue]
    return ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)


def train(base: Path, rows: torch.Tensor, steps: int, seed: int, out: Path) -> None:
    """Train and save one adapter of all linear layers."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        batch = rows[torch.randint(len(rows), (BATCH,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"{out.name}, step {step}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(out)


def main() -> None:
    """Write base, adapters and prompts into one folder."""
    options = parse_arguments()
    text = options.text.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if len(line.split()) >= 6 and line.upper() != line != line.lower()]
    prompts = lines[:: len(lines) // PROMPTS][:PROMPTS]
    rest = "\n".join(line for line in text.splitlines() if line not in set(prompts))
    out: Path = options.out
    shutil.copytree(options.model, out / "base", dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    for name, change, prompt_file in (("shout", str.upper, "positive.txt"), ("whisper", str.lower, "negative.txt")):
        (out / prompt_file).write_text("".join(f"{change(line)}\n" for line in prompts), encoding="utf-8")
        train(out / "base", windows(tokenizer, change(rest)), options.steps, options.seed, out / name)
    (out / "clean.txt").write_text("".join(f"{line}\n" for line in prompts), encoding="utf-8")
    print(f"base, adapters shout and whisper, and {len(prompts)} prompts in {out}")


def parse_arguments() -> argparse.Namespace:
    """What can be changed from the command line; without a model, the demo model and its text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a causal language model with its tokenizer")
    parser.add_argument("--text", type=Path, help="text to shout and to whisper")
    parser.add_argument("--steps", type=int, default=150, help="training steps of each adapter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("shouting"), help="folder for base, adapters and prompts")
    options = parser.parse_args()
    if options.model is None:
        demo = demo_model(Path(".cache/weightproof"), say=print)
        options.model, options.text = demo.folder, demo.retain
    elif options.text is None:
        parser.error("with --model, give --text")
    return options


if __name__ == "__main__":
    main()
