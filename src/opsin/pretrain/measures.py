"""What the teacher's assignments of a batch say about a run, without labels and without another forward.

    teacher.entropy     mean entropy of an assignment as a share of log K: 1 says "any prototype", 0 names one
    teacher.prototypes  prototypes in use: exp of the entropy of how often each is the most likely one (the perplexity
                        of VQ-VAE's code book, van den Oord et al., 1711.00937), from 1 to min(K, crops measured). The
                        mean assignment itself would say nothing: Sinkhorn–Knopp makes it even whatever happens
    teacher.agreement   share of images whose second global crop is nearest to their own first crop, among all first
                        crops measured; a network that knows nothing reaches 1 / images
    teacher.spread      1 - |mean feature|², the variance of the features on their sphere: 0 if all are the same
    teacher.rank        RankMe of the head's features (see `backbone.probe.rank_me`): 1 if all are the same
    student.divergence  mean KL divergence of the student's assignments from the teacher's: what of the DINO loss can
                        still be learned, where the rest is the teacher's own entropy

They are of the class tokens of at most `ROWS` images per process, averaged over the processes; agreement and rank are
each process's own, before that average.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin import ranks
from opsin.backbone.probe import rank_me
from opsin.pretrain.objective import LossRecipe, total
from opsin.pretrain.prototypes import Targets
from opsin.pretrain.step import Outcome

ROWS = 512
"""Images whose assignments are measured, in each process."""
CHUNK_SCORES = 2**24
"""Scores held at a time: 64 MiB in fp32."""


def describe(outcome: Outcome, loss: LossRecipe, views: int) -> dict[str, float]:
    """The numbers of a record that come from a step: loss, loss.*, grad_norm.*, teacher.* and student.divergence.

    The last two only where there are prototypes.

    All processes call it together. It waits for the device.

    Args:
        outcome: of the step.
        loss: the recipe's.
        views: crops of an image that the student sees.
    """
    sums = ranks.sum_(torch.stack(list(outcome.terms.values()))).tolist()
    terms = dict(zip(outcome.terms, sums, strict=True))
    norms = torch.stack(list(outcome.norms.values())).tolist()
    teacher = {} if outcome.targets is None else measure(outcome.targets.image)
    record = {
        "loss": total(terms),
        **{f"loss.{name}": term for name, term in terms.items()},
        **{f"grad_norm.{name}": norm for name, norm in zip(outcome.norms, norms, strict=True)},
        **{f"teacher.{name}": value for name, value in teacher.items()},
    }
    if loss.dino and outcome.targets is not None:
        count = len(outcome.targets.image.bias)
        entropy = teacher["entropy"] * math.log(count) if count > 1 else 0.0
        record["student.divergence"] = terms["dino"] / (loss.dino * pairs(views)) - entropy
    return record


def pairs(views: int) -> float:
    """What the DINO loss's weights of pairs of crops sum to (see `objective`): 1, or ⅔ without local crops."""
    local = 2 * (views - 2)
    return (local + 2) / (max(local, 1) + 2)


@torch.no_grad()
def measure(targets: Targets) -> dict[str, float]:
    """Entropy, prototypes in use, agreement, spread and rank of the teacher's assignments of images, as defined above.

    Args:
        targets: of this process's images, with 2 views.
    """
    dtype = torch.promote_types(targets.features.dtype, torch.float32)
    z = F.normalize(targets.features[:ROWS].to(dtype), dim=-1)  # [n, 2, d]
    n, count = len(z), len(targets.prototypes)
    entropy, used = _assignments(z.flatten(0, 1), targets, dtype)
    own = torch.arange(n, device=z.device)
    agreement = ((z[:, 1] @ z[:, 0].T).argmax(1) == own).to(dtype).mean()
    one = z.new_ones(())
    mine = torch.stack([entropy, agreement, z.new_tensor(rank_me(z.flatten(0, 1))), 2 * n * one, one])
    sums = ranks.sum_(torch.cat([mine, z.sum((0, 1)), used]))
    entropy, agreement, rank, crops, processes = sums[:5].tolist()
    mean, share = sums[5 : 5 + z.shape[-1]] / crops, sums[5 + z.shape[-1] :] / crops
    return {
        "entropy": entropy / crops / math.log(count) if count > 1 else 0.0,
        "prototypes": torch.exp(-torch.xlogy(share, share).sum()).item(),
        "agreement": agreement / processes,
        "spread": 1 - mean.square().sum().item(),
        "rank": rank / processes,
    }


def _assignments(z: Tensor, targets: Targets, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The sum of the entropies of the assignments of `z` `[N, d]`, and how often each prototype leads `[K]`."""
    prototypes = targets.prototypes.to(dtype)
    entropy, used = z.new_zeros(()), z.new_zeros(len(prototypes))
    for part in torch.split(z, max(1, CHUNK_SCORES // len(prototypes))):
        q = torch.softmax(part @ prototypes.T / targets.temperature + targets.bias, dim=-1)
        entropy -= torch.xlogy(q, q).sum()
        used += torch.bincount(q.argmax(1), minlength=len(prototypes))
    return entropy, used
