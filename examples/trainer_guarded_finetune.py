"""Fine-tune with an ordinary `Trainer` under guard; halfway a bad edit is made, taken back, and you read why.

    python examples/trainer_guarded_finetune.py
    python examples/trainer_guarded_finetune.py --model FOLDER --train train.txt --retain held_out.txt

The bad edit rounds every weight matrix to two bits. It is judged on text that the model must not get worse on, rolled
back bit for bit, and the training goes on as if nothing had happened. Without `--model` the demo model is trained on
(made once, in a minute or two, from the sources of Python's standard library; nothing is downloaded).
"""

import argparse
import hashlib
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from weightproof import GuardCallback, LossData, edits
from weightproof_callbacks.demo_model import demo_model

WINDOW = 64  # tokens a row


def main() -> None:
    """Train, with one bad edit on the way, and say what the guard did."""
    options = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    halfway = options.steps // 2
    guard = GuardCallback(
        policy="balanced",
        every=10,
        edits={halfway: edits.RTN(bits=2)},
        retain=LossData(options.retain, encode=partial(tokenizer.encode, verbose=False)),
        output_dir=options.out,
    )
    fingerprints = Fingerprints(halfway)  # before the guard in the list: it reads before the edit is made
    arguments = TrainingArguments(
        output_dir=str(options.out / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=1e-4,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = rows_of(tokenizer(options.train.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[fingerprints, guard])
    trainer.train()

    print()
    for step in guard.history:
        print(f"step {step.step:3}  {step.name:18} {step.decision.action:8} {step.applied}")
    bad = next(step for step in guard.history if step.name.startswith("rtn"))
    print(f"\nwhy: {bad.decision.reason}")
    print(f"weights at step {halfway}: {fingerprints.before} before the edit, {fingerprints.after} after the rollback")
    print(f"certificate and log in {options.out}")


def rows_of(ids: list[int]) -> list[dict[str, torch.Tensor]]:
    """Token ids, cut into rows that a `Trainer` takes."""
    rows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    return [{"input_ids": row, "labels": row} for row in rows]


class Fingerprints(TrainerCallback):
    """The weights at the end of one step and at the beginning of the next, read with nothing of weightproof."""

    def __init__(self, step: int) -> None:
        self.step, self.before, self.after = step, "", ""

    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        """Read them before the edit, which the guard makes after this."""
        if state.global_step == self.step:
            self.before = fingerprint(model)

    def on_step_begin(self, args, state, control, model, **kwargs) -> None:
        """Read them again before they are trained on."""
        if state.global_step == self.step:
            self.after = fingerprint(model)


def fingerprint(model: torch.nn.Module) -> str:
    """The first digits of a SHA-256 over the weights."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def parse_arguments() -> argparse.Namespace:
    """What can be changed from the command line; without a model, the demo model and its texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a causal language model with its tokenizer")
    parser.add_argument("--train", type=Path, help="text to train on")
    parser.add_argument("--retain", type=Path, help="other text, on which the model must not get worse")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
    parser.add_argument("--out", type=Path, default=Path("guarded-finetune"), help="folder for the evidence")
    options = parser.parse_args()
    if options.model is None:
        demo = demo_model(Path(".cache/weightproof"), say=print)
        options.model, options.train, options.retain = demo.folder, demo.train, demo.retain
    elif options.train is None or options.retain is None:
        parser.error("with --model, give --train and --retain")
    return options


if __name__ == "__main__":
    main()
