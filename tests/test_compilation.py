"""torch.compile of the blocks: when, of which, and with what result."""

import pytest
import torch
from conftest import small_objective, small_recipe
from test_recomputation import passes

from ssl_vit import compilation, engine


@pytest.mark.parametrize(
    ("settings", "device", "steps", "expected"),
    [
        ([], "cuda", 5000, True),
        ([], "cuda", 4999, False),
        ([], "cpu", 10**6, False),
        (["runtime.activation_checkpointing=true"], "cuda", 5000, False),
        (["runtime.compile=true"], "cpu", 1, True),
        (["runtime.compile=false"], "cuda", 10**6, False),
    ],
)
def test_long_runs_on_a_gpu_are_compiled_unless_asked_otherwise(settings, device, steps, expected):
    runtime = small_recipe("mae", *settings).runtime
    assert compilation.wanted(runtime, torch.device(device), steps) is expected


@pytest.mark.matrix  # half a minute each
@pytest.mark.leaves_threads
@pytest.mark.parametrize("name", ["mae", "dino"])
def test_compiled_blocks_give_the_same_losses_and_gradients(name):
    plain, compiled = small_objective(name), small_objective(name)
    blocks = engine.blocks(compiled)
    compilation.compile_blocks(blocks)
    assert len(blocks) > len(compiled.backbone.model.blocks)  # of the decoder or the teacher too
    loss, gradients, _ = passes(plain)
    other, ours, _ = passes(compiled)
    assert other == pytest.approx(loss, rel=1e-5)
    for key, value in gradients.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-6)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad(), compilation.paused():
        [found], [expected] = (objective.eval().exported.features(images) for objective in (compiled, plain))
    assert all(map(torch.equal, found, expected))
