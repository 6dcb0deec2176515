"""Planted memorisation: a model learns a language, and 48 random strings by heart; K-FAC editing drops the strings.

The language is a Markov chain (four successors a token), so that the loss of a model that knows it is known: its
entropy. Every edit is measured by what is still recited (greedy, from 8 tokens) and by the loss on fresh text of the
language; controls keep as much of the weights by another rule. Trains for a minute or a few on a CPU.

    python examples/forget_memorised.py
    python examples/forget_memorised.py --quick   # a fifth of the training, one edit and one control: seconds
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from weightproof import GuardSession, edits, fit_factors
from weightproof.curvature import Factors
from weightproof.edits.kfac_picture import sweep_png
from weightproof.edits.kfac_sweep import SweepRow, best_at, clean_nll, recall, sweep

VOCABULARY, LENGTH, STRINGS, PREFIX = 64, 32, 48, 8
CHANCES = torch.tensor([0.5, 0.25, 0.15, 0.1])
TARGETS = tuple(f"*layers.{layer}.mlp.{name}_proj*" for layer in (1, 2) for name in ("gate", "up"))


class Language:
    """A Markov chain in which four tokens may follow each."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.following = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:4] for _ in range(VOCABULARY)])
        self.strings = torch.randint(VOCABULARY, (STRINGS, LENGTH), generator=generator)

    def text(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Fresh windows of the language, (count, LENGTH)."""
        tokens = torch.empty(count, LENGTH, dtype=torch.long)
        tokens[:, 0] = torch.randint(VOCABULARY, (count,), generator=generator)
        for place in range(1, LENGTH):
            chosen = torch.multinomial(CHANCES, count, replacement=True, generator=generator)
            tokens[:, place] = self.following[tokens[:, place - 1], chosen]
        return tokens

    def batch(self, generator: torch.Generator) -> torch.Tensor:
        """Forty windows of the language and eight of the strings."""
        chosen = torch.randint(STRINGS, (8,), generator=generator)
        return torch.cat([self.text(40, generator), self.strings[chosen]])


def trained(language: Language, steps: int) -> LlamaForCausalLM:
    """A Llama of three layers that has learned both."""
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=4, max_position_embeddings=64, **shape)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        batch = language.batch(generator)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 250 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def experiment(language: Language, model: LlamaForCausalLM, *, quick: bool = False) -> tuple[Factors, list[SweepRow]]:
    """Factors of the data it was trained on, and what edits and controls of equal size do to recital and clean loss."""
    generator = torch.Generator().manual_seed(3)
    clean = [{"input_ids": language.text(64, torch.Generator().manual_seed(seed))} for seed in range(10, 14)]
    factors = fit_factors(model, [{"input_ids": language.batch(generator)} for _ in range(60)], "*.mlp.*")
    metrics = {"recall": recall(language.strings, PREFIX), "clean NLL": clean_nll(clean)}
    energies, formulas, controls = [0.99, 0.95, 0.9, 0.8, 0.6], ["original", "modified"], ["svd", "random", "inverse"]
    if quick:
        energies, formulas, controls = [0.8], ["original"], ["svd"]
    return factors, sweep(model, factors, energies, formulas, metrics=metrics, include=TARGETS, controls=controls)


def show(rows: list[SweepRow]) -> None:
    """The table of a sweep."""
    print(f"{'edit':<9} {'energy':>6} {'pairs kept':>10} {'recited':>8} {'clean NLL':>9}")
    for row in rows:
        recited, nll = row.metrics["recall"], row.metrics["clean NLL"]
        print(f"{row.edit:<9} {row.energy:>6g} {row.kept_pairs:>10.1%} {recited:>8.1%} {nll:>9.4f}")


def main() -> None:
    """Train, fit, sweep, edit under guard."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="training steps; default 1500, with --quick 300")
    parser.add_argument("--quick", action="store_true", help="less training, one edit and one control")
    parser.add_argument("--out", type=Path, default=Path("forget-memorised"), help="folder for factors and evidence")
    given = parser.parse_args()

    language = Language(seed=0)
    model = trained(language, given.steps or (300 if given.quick else 1500))
    factors, rows = experiment(language, model, quick=given.quick)
    show(rows)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "sweep.png").write_bytes(sweep_png(rows))
    factors.save(given.out)
    cheapest = best_at(rows, "recall", 0.05, "clean NLL")
    print("cheapest edit of each kind that leaves less than 5 % recited:")
    for label, row in sorted(cheapest.items(), key=lambda pair: pair[1].metrics["clean NLL"]):
        rise = row.metrics["clean NLL"] - rows[0].metrics["clean NLL"]
        print(f"  {label:<9} energy {row.energy:<5g} clean NLL {rise:+.4f}")

    # The strings are no longer recited, and the language must not get worse: that is what `retain` demands.
    retain = [row for seed in range(20, 24) for row in language.text(64, torch.Generator().manual_seed(seed))]
    session = GuardSession(model, policy="balanced", retain=retain, output_dir=given.out)
    energy = 0.8 if given.quick else 0.9
    step = session.apply(edits.KFAC(factors, energy=energy, include=TARGETS))
    print(f"energy {energy} under guard: {step.decision.action}, {step.decision.reason}")
    print(f"recited afterwards: {recall(language.strings, PREFIX)(model):.1%}; certificate and picture in {given.out}")
    session.close()


if __name__ == "__main__":
    main()
