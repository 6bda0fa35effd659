"""The loop that trains heads: an interrupted training equals one that was not."""

import pytest
import torch
from torch import nn

from opsin.errors import OpsinError
from opsin.evaluate.training import train


def setting(seed=0):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    return module, torch.optim.AdamW(module.parameters(), lr=0.1)


def batch_of(step):
    rng = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, generator=rng), torch.randint(2, (8,), generator=rng)


def run(module, optimiser, folder, steps=10, stop_at=None, every=0.0, **options):
    def batches(start):
        for step in range(start, steps):
            if step == stop_at:
                raise KeyboardInterrupt
            yield batch_of(step)

    folder.mkdir(exist_ok=True)
    train(
        module,
        optimiser,
        lambda step: 1 - step / steps,
        batches,
        lambda batch: nn.functional.cross_entropy(module(batch[0]), batch[1]),
        steps,
        folder,
        show=False,
        every=every,
        **options,
    )
    return module


def test_a_stopped_training_goes_on_as_if_it_had_not_been(tmp_path):
    whole = run(*setting(), tmp_path / "whole")
    module, optimiser = setting()
    with pytest.raises(KeyboardInterrupt):
        run(module, optimiser, tmp_path / "stopped", stop_at=6)
    gone_on = run(*setting(seed=1), tmp_path / "stopped")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, gone_on.state_dict()[name]), name
    finished = run(*setting(seed=2), tmp_path / "stopped", stop_at=0)  # reads no batch
    assert torch.equal(finished[1].weight, whole[1].weight)
    assert not finished.training


@pytest.mark.parametrize("content", [b"", b"hello world\n", b"half", None])
def test_a_damaged_state_is_passed_over(tmp_path, content):
    whole = run(*setting(), tmp_path / "a")
    path = tmp_path / "a" / "state.pt"
    if content is None:
        torch.save({"weights": torch.zeros(2)}, path)  # another's
    else:
        path.write_bytes(path.read_bytes()[:200] if content == b"half" else content)
    again = run(*setting(), tmp_path / "a")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_the_rate_is_the_scheduled_one(tmp_path):
    module, _ = setting()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.5)
    run(module, optimiser, tmp_path / "a", steps=4)
    assert optimiser.param_groups[0]["lr"] == 0.5 * (1 - 3 / 4)


def test_gradients_are_clipped_together(tmp_path):
    module, _ = setting()
    before = torch.cat([p.detach().clone().flatten() for p in module.parameters()])
    run(module, torch.optim.SGD(module.parameters(), lr=1.0), tmp_path / "c", steps=1, clip=0.01)
    moved = torch.cat([p.detach().flatten() for p in module.parameters()]) - before
    assert 0.0099 < moved.norm() < 0.0101


def test_a_loss_that_is_not_finite_is_one_sentence(tmp_path):
    module, optimiser = setting()
    with torch.no_grad():
        module[1].weight.fill_(torch.inf)
    with pytest.raises(OpsinError, match="the loss is nan at step"):
        run(module, optimiser, tmp_path / "n")


def test_the_end_is_kept_and_states_are_saved_again_and_again(tmp_path):
    run(*setting(), tmp_path / "w", every=1e9)
    assert torch.load(tmp_path / "w/state.pt", weights_only=True)["step"] == 10
    with pytest.raises(KeyboardInterrupt):
        run(*setting(), tmp_path / "s", stop_at=6)
    assert torch.load(tmp_path / "s/state.pt", weights_only=True)["step"] == 6
