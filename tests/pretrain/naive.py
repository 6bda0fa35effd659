"""The textbook formulation of the prototype losses, with every score stored: the readable twin of `prototypes.py`."""

import torch
from torch import Tensor


def sinkhorn(scores: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Sinkhorn–Knopp on `[N, K]` scores as the reference writes it: columns to 1/K, rows to 1/N."""
    q = torch.exp(scores / temperature).T
    k, n = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / k
        q = q / q.sum(0, keepdim=True) / n
    return (q * n).T


def log_sinkhorn(scores: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """The same in the log domain, for scores whose exponential overflows."""
    log_q = scores / temperature
    for _ in range(iterations):
        log_q = log_q - torch.logsumexp(log_q, 0, keepdim=True)
        log_q = log_q - torch.logsumexp(log_q, 1, keepdim=True)
    return log_q.exp()


def loss(student: Tensor, weight: Tensor, q: Tensor, pairs: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Σ_n w_n Σ_mt P_mt CE(q_nt, softmax(student_nm Wᵀ / τ)) for student `[n, m, d]` and assignments q `[n, t, K]`."""
    log_p = torch.log_softmax(student @ weight.T / temperature, dim=-1)
    cross_entropy = -torch.einsum("ntk,nmk->nmt", q, log_p)
    return (weights[:, None, None] * pairs * cross_entropy).sum()
