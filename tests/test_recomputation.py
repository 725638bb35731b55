"""Activation checkpointing keeps less and changes nothing."""

import pytest
import torch
from conftest import make_batch, small_objective
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ssl_vit import engine, recomputation
from ssl_vit.errors import UserError

CASES = {
    "mae": [],
    "dino": ["backbone.drop_path_rate=0.4"],  # two passes of the blocks before the backward pass, with other draws
    "supervised": ["backbone.drop_path_rate=0.4"],
}


def passes(objective: nn.Module) -> tuple[float, dict[str, torch.Tensor], int]:
    """(loss, gradients, bytes kept for the backward pass)."""
    kept = []
    with saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
        loss = objective(make_batch(objective, torch.arange(8)))["loss"]
    loss.backward()
    return loss.item(), {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}, sum(kept)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_the_same_bits(name):
    settings = [*CASES[name], "backbone.depth=4"]
    plain, again = small_objective(name, *settings), small_objective(name, *settings)
    recomputation.recompute(engine.blocks(again))
    assert again.state_dict().keys() == plain.state_dict().keys()
    loss, gradients, kept = passes(plain)
    other, recomputed, fewer = passes(again)
    assert other == loss and fewer < 0.5 * kept
    assert recomputed.keys() == gradients.keys()
    for key, value in gradients.items():
        assert torch.equal(recomputed[key], value), key
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        [ours], [theirs] = (objective.eval().exported.features(images) for objective in (again, plain))
    assert all(map(torch.equal, ours, theirs))


def test_what_has_no_blocks_or_batch_norm_in_them_is_refused():
    with pytest.raises(UserError, match="this backbone has none"):
        recomputation.recompute([])
    with pytest.raises(UserError, match="twice in the running statistics"):
        recomputation.recompute([nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))])
