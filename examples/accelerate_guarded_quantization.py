"""Train and quantize a language model on every process of an `accelerate launch` run, under guard.

    accelerate launch --config_file recipes/weightproof_recipes/accelerate/cpu_x2.yaml \
        examples/accelerate_guarded_quantization.py

A small byte-level Llama learns Python from the standard library's own sources. Then its weights are rounded twice:
INT8 does no harm and is kept, INT2 does and is rolled back on every process, bit for bit. The output folder gets one
certificate and one offline W&B run. With `--model` a model of yours is quantized instead, without training.
"""

import argparse
import hashlib
import sysconfig
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from weightproof import Certificate, attach, edits

WINDOW = 128  # bytes of text a row


def main() -> None:
    """Train under guard, then round the weights to 8 and to 2 bits."""
    args = parse_arguments()
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), log_with="wandb")
    args.out.mkdir(parents=True, exist_ok=True)
    offline = {"mode": "offline", "dir": str(args.out), "settings": {"silent": True}}
    accelerator.init_trackers("guarded-quantization", init_kwargs={"wandb": offline})
    accelerator.print(f"world size {accelerator.num_processes} on {accelerator.device.type}")

    set_seed(0)
    model = small_llama() if args.model is None else AutoModelForCausalLM.from_pretrained(args.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text, held_out = windows_of_source_code()
    data = DataLoader(text, batch_size=16, shuffle=True)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    retain = held_out if args.model is None else None  # else random tokens decide

    with attach(accelerator, model, optimizer, every=50, retain=retain, output_dir=args.out) as guard:
        if args.model is None:
            train(accelerator, model, optimizer, data, args.steps)
        for bits in (8, 2):
            before = fingerprint(model)
            step = guard.apply(edits.RTN(bits))
            after = fingerprint(model)
            verdict = f"INT{bits} {step.decision.action:8} {step.applied:8}"
            say_in_order(accelerator, f"{verdict} weights {before} -> {after}")

    if accelerator.is_main_process:
        path = args.out / "certificate.json"
        certificate = Certificate.load(path)
        world_size = certificate.predicate["world_size"]
        accelerator.print(f"certificate {path}: world size {world_size}, sha256 {certificate.digest[:16]}")
    accelerator.end_training()


def train(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: DataLoader, steps: int
) -> None:
    """The usual loop on Accelerate: the guard needs no line in it."""
    model.train()
    done = 0
    while done < steps:
        for ids in data:
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if done % 50 == 0 or done == steps:
                accelerator.print(f"step {done}: loss {loss.item():.2f} nats a byte")
            if done == steps:
                break


def small_llama() -> LlamaForCausalLM:
    """Four layers over bytes, 0.9 M parameters, randomly initialised."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=WINDOW,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def windows_of_source_code() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of bytes to train on, and 16 others that were held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    ids = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8).long()
    rows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    held_out = torch.zeros(len(rows), dtype=torch.bool)
    held_out[:: len(rows) // 16] = True
    return rows[~held_out], rows[held_out]


def fingerprint(model: torch.nn.Module) -> str:
    """The first digits of a SHA-256 over the weights that this process holds, computed without weightproof."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def say_in_order(accelerator: Accelerator, line: str) -> None:
    """Print one line of every process, by rank."""
    for rank, said in enumerate(gather_object([line])):
        accelerator.print(f"rank {rank}: {said}")


def parse_arguments() -> argparse.Namespace:
    """What can be changed from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a causal language model to quantize; default: train one")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of training")
    parser.add_argument("--out", type=Path, default=Path("guarded-quantization"), help="folder for the evidence")
    return parser.parse_args()


if __name__ == "__main__":
    main()
