"""Steer a small language model along the contrast of two opposite adapters, as far as its guards allow.

    python examples/steer_with_guards.py
    python examples/steer_with_guards.py --quick   # less training, a coarser search

A tiny Llama learns a language in which even and odd symbols are equally likely. One LoRA is trained on text with more
even symbols, another on text with more odd ones; their contrast is a direction of weights from odd to even. Spectra
foretell how far it can be taken, a sweep shows what it does, a search finds the largest alpha that the guards keep on
text of the plain language, and that one is put in place with a certificate. Half a minute on one quiet CPU core.
"""

import argparse
import copy
import hashlib
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from weightproof import Delta, GuardSession, steer
from weightproof.steering import safe_alpha, search_alpha

SYMBOLS, LENGTH = 24, 32


def main() -> None:
    """Train, contrast, foretell, sweep, search, keep."""
    options = parse_arguments()
    out, steps = options.out, options.steps or (150 if options.quick else 400)
    torch.manual_seed(0)

    base = trained(tiny_llama(), share_even=0.5, steps=steps, seed=1)
    shares = ((0.8, "even"), (0.2, "odd"))
    positive, negative = (adapter(base, share, 3 * steps // 10, out / name) for share, name in shares)
    delta = Delta.contrast(positive, negative)
    sides = delta.metadata["sides"]
    print(delta)
    print(f"cosine of the adapters {sides['cosine']:.2f}, in common {sides['drift_ratio']:.2f} of what differs")
    print(f"written to {delta.save(out / 'odd-to-even.safetensors')}")

    table = safe_alpha(base, delta)
    print(f"\nforetold: within |alpha| {table.bound:.3f} no norm grows beyond the limit ({table.binding.name} binds);")
    first = table.first_to_emerge
    print(f"from {first.emergence:.3f} the delta stands out of the bulk of {first.name}")

    plain = sample(0.5, 256, seed=3)
    before = fingerprint(base)
    print("\n alpha  share of even  loss on plain text")
    with steer(base, delta, 0.0) as steering:
        for alpha in (-0.5, -0.25, 0.0, 0.25, 0.5):
            steering.set(alpha)  # always from the original weights
            print(f"{alpha:6.2f}  {share_of_even(base, plain):13.1%}  {loss(base, plain).item():.4f}")
    print(f"put back bit for bit: {fingerprint(base) == before}")

    windows = [{"input_ids": row[None]} for row in plain]
    session = GuardSession(base, policy="balanced", retain=windows, output_dir=out)
    print()
    found = search_alpha(
        session, delta, bracket=(0.0, 1.0), tolerance=0.3 if options.quick else 0.05, keep=True,
        on_trial=lambda one: print(f"alpha {one.alpha:.4f} {one.action:8} loss {one.loss:+.4f}  KL {one.kl:.4f}"),
    )  # fmt: skip
    session.close()
    print(f"\nkept {found.step}: {share_of_even(base, plain):.1%} even, loss {loss(base, plain).item():.4f}")
    print(f"certificate and report in {out}")


def tiny_llama() -> LlamaForCausalLM:
    """Two layers of width 64."""
    config = LlamaConfig(
        vocab_size=SYMBOLS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def sample(share_even: float, count: int, seed: int) -> torch.Tensor:
    """Text (count, LENGTH): after each symbol one of two even ones, which depend on it, or one of two odd ones."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(SYMBOLS, (count,), generator=generator)]
    for _ in range(LENGTH - 1):
        even = torch.rand(count, generator=generator) < share_even
        step = torch.randint(2, (count,), generator=generator)
        near = (rows[-1] * 5 + 3 * step) % (SYMBOLS // 2)
        rows.append(2 * near + torch.where(even, 0, 1))
    return torch.stack(rows, dim=1)


def loss(model: torch.nn.Module, text: torch.Tensor) -> torch.Tensor:
    """Mean loss, nats per symbol."""
    return model(input_ids=text, labels=text).loss


@torch.no_grad()
def share_of_even(model: torch.nn.Module, text: torch.Tensor) -> float:
    """Mean probability that the model gives to even symbols."""
    return float(model(input_ids=text).logits.softmax(-1)[..., ::2].sum(-1).mean())


def trained(model: torch.nn.Module, share_even: float, steps: int, seed: int) -> torch.nn.Module:
    """Train what is trainable on text with a share of even symbols."""
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for step in range(steps):
        loss(model, sample(share_even, 32, seed * 100_000 + step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def adapter(base: torch.nn.Module, share_even: float, steps: int, folder: Path) -> Delta:
    """Train a LoRA on the outputs of attention and MLP, save it, and read it back as a delta."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["o_proj", "down_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base), config)
        model = trained(model, share_even, steps=steps, seed=2)
        model.save_pretrained(folder)
    return Delta.from_adapter(folder, base=base)


def fingerprint(model: torch.nn.Module) -> str:
    """The first digits of a SHA-256 over the weights, with nothing of weightproof."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def parse_arguments() -> argparse.Namespace:
    """What can be changed from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="training steps of the base model; default 400, with --quick 150")
    parser.add_argument("--quick", action="store_true", help="less training, a coarser search")
    parser.add_argument("--out", type=Path, default=Path("steered"), help="folder for adapters, delta and evidence")
    return parser.parse_args()


if __name__ == "__main__":
    main()
