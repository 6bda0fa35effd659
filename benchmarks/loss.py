"""The memory-linear prototype loss against the textbook formulation: time, memory, and how far their gradients differ.

    python benchmarks/loss.py [--rows 1024] [--prototypes 65536]

Every variant runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from common import device, finish

from opsin.bench.timing import PeakMemory, spread, synchronise, timed
from opsin.pretrain.prototypes import Prototypes

TEMPERATURE = 0.05


def textbook(z_teacher: torch.Tensor, z_student: torch.Tensor, teacher: Prototypes, student: Prototypes) -> None:
    """Scores, Sinkhorn–Knopp and cross-entropy with every [rows, K] matrix stored, as the reference does."""
    with torch.no_grad():
        q = torch.exp(z_teacher[:, 0] @ teacher.weight().T / TEMPERATURE).T
        q /= q.sum()
        for _ in range(3):
            q /= q.sum(1, keepdim=True) * len(q)
            q /= q.sum(0, keepdim=True) * q.shape[1]
        q = (q * q.shape[1]).T
    loss = -(q * torch.log_softmax(z_student[:, 0] @ student.weight().T / 0.1, dim=-1)).sum(-1).mean()
    loss.backward()


def fused(z_teacher: torch.Tensor, z_student: torch.Tensor, teacher: Prototypes, student: Prototypes) -> None:
    """The same through `Prototypes`."""
    counted = z_teacher.new_ones(len(z_teacher), dtype=torch.bool)
    targets = teacher.balance(
        z_teacher, counted, torch.tensor(TEMPERATURE, device=z_teacher.device), 3, z_teacher.dtype
    )
    weights = z_student.new_full((len(z_student),), 1 / len(z_student))
    student(z_student, targets, z_student.new_ones(1, 1), weights, 0.1)[0].backward()


def measure(variant: str, rows: int, prototypes: int, repeats: int) -> dict[str, Any]:
    """Time, peak memory beyond the inputs of one variant, and a digest of its gradient."""
    torch.manual_seed(0)
    on = device()
    teacher, student = (Prototypes(prototypes, 256).to(on) for _ in range(2))
    z_teacher = F.normalize(torch.randn(rows, 1, 256, device=on), dim=-1)
    z_student = F.normalize(torch.randn(rows, 1, 256, device=on), dim=-1).requires_grad_()
    call = {"textbook": textbook, "fused": fused}[variant]

    def step() -> None:
        z_student.grad = None
        call(z_teacher, z_student, teacher, student)

    inputs = torch.cuda.memory_allocated() if on.type == "cuda" else 0
    memory = PeakMemory(on)
    memory.reset()
    step()
    synchronise(on)
    peak = memory.read() - inputs
    assert z_student.grad is not None
    return {
        "seconds": asdict(spread(timed(step, on, repeats))),
        "peak_mib": peak / 2**20,
        "gradient_norm": z_student.grad.norm().item(),
    }


def main() -> None:
    """Measure both variants and print them side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variant", choices=["textbook", "fused"], help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.variant:
        print(json.dumps(measure(a.variant, a.rows, a.prototypes, a.repeats)))
        return
    results = {}
    for variant in ("textbook", "fused"):
        line = [sys.executable, __file__, "--variant", variant, "--rows", str(a.rows), "--repeats", str(a.repeats)]
        line += ["--prototypes", str(a.prototypes)]
        results[variant] = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
    book, ours = results["textbook"], results["fused"]
    finish(
        "loss",
        {
            "rows": a.rows,
            "prototypes": a.prototypes,
            **results,
            "time_ratio": book["seconds"]["median"] / ours["seconds"]["median"],
            "memory_ratio": book["peak_mib"] / ours["peak_mib"],
            "gradient_norm_difference": abs(ours["gradient_norm"] / book["gradient_norm"] - 1),
        },
    )


if __name__ == "__main__":
    main()
