"""Direct feedback alignment against backpropagation: the same network, the same data, two reports of training health.

    python examples/direct_feedback_alignment.py                  # about a minute on one core
    python examples/direct_feedback_alignment.py --plot dfa.png   # with a picture of the report on feedback alignment

Direct feedback alignment (Nokland 2016, arXiv:1609.01596) trains every block with a fixed random projection of the
output's error in place of the gradient. Its accuracy looks reasonable. But the final normalisation makes the loss blind
to the scale of the residual stream, and nothing in the rule sees that scale either: it grows without bound, the true
gradient at the blocks fades, and a network whose blocks were never trained does as well.

The data are synthetic: labels of a random deep teacher on Gaussian inputs, so that nothing is downloaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name

from weightproof import health

INPUTS, WIDTH, DEPTH, CLASSES = 16, 64, 4, 10
TRAIN, TEST, BATCH = 20_000, 10_000, 128


class Block(nn.Module):
    """One pre-norm residual block: h + W2 gelu(W1 norm(h))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        """(rows, width) -> (rows, width)."""
        return h + self.down(F.gelu(self.up(self.norm(h))))


class ResidualMLP(nn.Module):
    """Embedding, blocks, final norm and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(INPUTS, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def states(self, x: Tensor, *, detached: bool = False) -> list[Tensor]:
        """What enters the first block, then what leaves each; each in a graph of its own where `detached`."""
        found = [self.embed(x)]
        for block in self.blocks:
            found.append(block(found[-1].detach() if detached else found[-1]))
        return found

    def logits(self, h: Tensor) -> Tensor:
        """Scores of what leaves the last block."""
        return self.head(self.norm(h))


def data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and labels for training, then for testing: the classes of a random teacher of three layers."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(TRAIN + TEST, INPUTS, generator=generator)
    hidden = inputs
    for fan_in, fan_out in ((INPUTS, 32), (32, 32), (32, 32)):
        hidden = torch.tanh(hidden @ torch.randn(fan_in, fan_out, generator=generator) * 2 / fan_in**0.5)
    scores = hidden @ torch.randn(32, CLASSES, generator=generator)
    labels = (scores - scores.mean(dim=0)).argmax(dim=1)
    return inputs[:TRAIN], labels[:TRAIN], inputs[TRAIN:], labels[TRAIN:]


def backpropagation(net: ResidualMLP, x: Tensor, y: Tensor) -> None:
    """Gradients of the loss."""
    F.cross_entropy(net.logits(net.states(x)[-1]), y).backward()


class FeedbackAlignment:
    """Direct feedback alignment: each block is taught by the output's error through a matrix of its own."""

    def __init__(self, seed: int = 7) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.feedback = [torch.randn(CLASSES, WIDTH, generator=generator) / CLASSES**0.5 for _ in range(DEPTH + 1)]

    def __call__(self, net: ResidualMLP, x: Tensor, y: Tensor) -> None:
        """The backward pass of this rule: no gradient passes from block to block."""
        states = net.states(x, detached=True)
        logits = net.logits(states[-1].detach())
        F.cross_entropy(logits, y).backward()  # the head alone learns from the loss
        error = (logits.detach().softmax(dim=1) - F.one_hot(y, CLASSES)) / len(x)
        torch.autograd.backward(states, [error @ matrix for matrix in self.feedback])


def train(rule, x: Tensor, y: Tensor, *, steps: int, frozen: bool = False) -> ResidualMLP:
    """One network, trained by a rule that fills `.grad`; with `frozen` only what is beside the blocks learns."""
    torch.manual_seed(0)
    net, order = ResidualMLP(), torch.Generator().manual_seed(1)
    with health.frozen_blocks(net.blocks if frozen else []):
        optimizer = torch.optim.Adam([one for one in net.parameters() if one.requires_grad], lr=5e-3)
        for _ in range(steps):
            rows = torch.randint(len(x), (BATCH,), generator=order)
            optimizer.zero_grad()
            rule(net, x[rows], y[rows])
            optimizer.step()
    return net


def trace_of(net: ResidualMLP):
    """One pass for the diagnosis, with a graph from end to end.

    The training cuts it between blocks; whole, it gives the loss's gradient, not the signal that the rule puts there.
    """

    def trace(batch) -> health.Trace:
        states = net.states(batch["x"])
        return health.Trace(states, F.cross_entropy(net.logits(states[-1]), batch["y"], reduction="none"))

    return trace


@torch.no_grad()
def right(net: ResidualMLP, x: Tensor, y: Tensor) -> list[float]:
    """1 for every test example that is classified rightly, else 0."""
    return (net.logits(net.states(x)[-1]).argmax(dim=1) == y).float().tolist()


def main(steps: int = 1500, plot: Path | None = None) -> dict[str, health.HealthReport]:
    """Train both twins and the frozen baseline, diagnose the twins, and print what the reports say."""
    x, y, test_x, test_y = data()
    batches = [{"x": test_x[i : i + BATCH], "y": test_y[i : i + BATCH]} for i in range(0, 16 * BATCH, BATCH)]
    baseline = right(train(backpropagation, x, y, steps=steps, frozen=True), test_x, test_y)
    reports = {}
    for name, rule in (("backpropagation", backpropagation), ("direct feedback alignment", FeedbackAlignment())):
        net = train(rule, x, y, steps=steps)
        reports[name] = health.diagnose(
            trace_of(net),
            batches,
            depth=health.depth_from_scores(right(net, test_x, test_y), baseline),
            step=steps,
            method_name=name,
        )
        print(reports[name], end="\n\n")
    if plot is not None:
        plot.write_bytes(health.health_png(reports["direct feedback alignment"]))
        print(f"wrote {plot}")
    return reports


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--plot", type=Path, help="PNG file")
    options = parser.parse_args()
    main(options.steps, options.plot)
