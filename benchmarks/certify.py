"""What `weightproof certify --weights-only` costs on two checkpoints of 1 GiB: peak memory and time in reads.

Run `python benchmarks/certify.py` (Linux, 3 GiB of disk below the system's temporary folder, or --folder). It makes
the checkpoints from a Llama configuration with seeded weights, certifies each change in a fresh process with at most
two threads, and writes what it measured to `certify.json` beside it. It leaves with 1 where the memory aim is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("certify.json")
THREADS = 2
AIM_GIB = 1.5
GIB = 1 << 30

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 1024, 2816, 16, 32000
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "num_attention_heads": 16,
    "num_key_value_heads": 16, "head_dim": 64, "vocab_size": VOCABULARY, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip
NUM_SPIKES = 16


# ---------------------------------------------------------------- checkpoints


def shapes_of(layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    prefix = f"model.layers.{layer}"
    for name in ("q", "k", "v", "o"):
        yield f"{prefix}.self_attn.{name}_proj.weight", (HIDDEN, HIDDEN)
    yield f"{prefix}.mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)
    yield f"{prefix}.mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)
    yield f"{prefix}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
    yield f"{prefix}.input_layernorm.weight", (HIDDEN,)
    yield f"{prefix}.post_attention_layernorm.weight", (HIDDEN,)


def parts() -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes of one file each."""
    yield {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        yield dict(shapes_of(layer))
    yield {"lm_head.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}


def make(folder: Path, edit: Callable[[str, Any], Any]) -> Path:
    """A sharded checkpoint of noise with planted directions, seeded by name; `edit` changes each tensor."""
    import torch
    from safetensors.torch import save_file

    from weightproof.numerics.matrices import seeded_generator

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    index: dict[str, str] = {}
    for number, shapes in enumerate(parts()):
        tensors = {}
        for name, shape in shapes.items():
            generator = seeded_generator("certify benchmark", name)
            if len(shape) == 1:
                tensor = 1 + 0.1 * torch.randn(shape, generator=generator)
            else:
                tensor = 0.02 * torch.randn(shape, generator=generator)
                left = torch.randn(shape[0], NUM_SPIKES, generator=generator) / shape[0] ** 0.5
                right = torch.randn(NUM_SPIKES, shape[1], generator=generator) / shape[1] ** 0.5
                edge = 0.02 * (shape[0] ** 0.5 + shape[1] ** 0.5)
                tensor += edge * (left * torch.linspace(3, 1.2, NUM_SPIKES)) @ right
            tensors[name] = edit(name, tensor)
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file)
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def same(_: str, tensor: Any) -> Any:
    return tensor


def int8(name: str, tensor: Any) -> Any:
    """Every linear map rounded to 8 bits per row."""
    if tensor.ndim != 2 or "embed" in name or "head" in name:
        return tensor
    step = tensor.abs().amax(1, keepdim=True) / 127
    return (tensor / step).round() * step


def one_layer(name: str, tensor: Any) -> Any:
    """One layer moved a little, as an edit of a fact does; all other tensors are the same bytes."""
    return tensor * 1.001 if name.startswith("model.layers.7.") else tensor


# ---------------------------------------------------------------- one measurement, in a process of its own


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def forget(folders: list[Path]) -> None:
    """Drop the files from the page cache, so that the next read comes from the disk."""
    for folder in folders:
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_once(folders: list[Path]) -> float:
    """Seconds to read every file once into one buffer."""
    buffer = bytearray(1 << 22)
    started = time.perf_counter()
    for folder in folders:
        for path in sorted(folder.iterdir()):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    return time.perf_counter() - started


def measure(base: Path, subject: Path, kind: str | None) -> dict[str, Any]:
    import torch

    from weightproof.certifying import comparison
    from weightproof.certifying.certification import Request, certify_folders
    from weightproof.kinds import Quantize
    from weightproof.policy import load_policy

    torch.set_num_threads(THREADS)
    seconds: dict[str, float] = {}

    def timed(name: str) -> None:
        function = getattr(comparison, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

        setattr(comparison, name, call)

    for name in ("file_digests", "read_state_of", "tensor_readings", "change_of", "circuits_of"):
        timed(name)
    forget([base, subject])
    from_disk = read_once([base, subject])
    from_memory = min(read_once([base, subject]) for _ in range(3))
    request = Request(base, subject, load_policy("balanced"), kind=Quantize(8) if kind else None, weights_only=True)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of importing
    started, used = time.perf_counter(), time.process_time()
    certified = certify_folders(request)
    total, used = time.perf_counter() - started, time.process_time() - used
    after = certified.case.current
    rungs = Counter(one.method.split(",")[0].rstrip("0123456789").rstrip("-") for one in after.matrices.values())
    counts = Counter(one.method.split("(")[0] for one in after.bulks.values())
    return {
        "situation": certified.decision.situation,
        "num_changed": len(after.edit.changed_names) if after.edit else 0,
        "peak_gib_above_import": round((status("VmHWM") - before) / GIB, 3),
        "seconds": round(total, 1),
        "processor_seconds": round(used, 1),
        "read_both_once_seconds": {"disk": round(from_disk, 2), "page_cache": round(from_memory, 2)},
        "hash_both_once_seconds": round(seconds["file_digests"], 2),
        "in_reads_from_disk": round(total / from_disk, 1),
        "in_reads_from_page_cache": round(total / from_memory),
        "in_hashes": round(total / seconds["file_digests"]),
        "seconds_by_step": {name: round(value, 1) for name, value in seconds.items()},
        "norm_rungs_of_the_subject": rungs,
        "spike_counts_of_the_subject": counts,
        "certificate_mib": round(len(certified.certificate.canonical()) / (1 << 20), 2),
    }


def in_fresh_process(base: Path, subject: Path, kind: str) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "OPENBLAS_NUM_THREADS": str(THREADS)}
    argv = [sys.executable, __file__, "--measure", str(base), str(subject), kind]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        base, subject, kind = arguments.measure
        print(json.dumps(measure(Path(base), Path(subject), kind or None)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        root = Path(temporary)
        base = make(root / "base", same)
        size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        found: dict[str, Any] = {"checkpoint_gib": round(size / GIB, 3), "threads": THREADS, "aim_gib": AIM_GIB}
        largest = 4 * VOCABULARY * HIDDEN
        found["largest_tensor_gib"] = round(largest / GIB, 3)
        for edit, kind in ((int8, "int8"), (one_layer, "")):
            subject = make(root / edit.__name__, edit)
            found[edit.__name__] = in_fresh_process(base, subject, kind)
            print(edit.__name__, json.dumps(found[edit.__name__], indent=1))
    from speed import versions

    found["versions"] = versions()
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    worst = max(found[name]["peak_gib_above_import"] for name in ("int8", "one_layer"))
    if worst > AIM_GIB:
        sys.exit(f"peak memory {worst} GiB above the import baseline, more than {AIM_GIB}")


if __name__ == "__main__":
    main()
