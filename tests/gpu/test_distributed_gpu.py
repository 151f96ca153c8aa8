"""FSDP on one GPU: how much of a network it is given when the others' shards are elsewhere."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from mimo import MiMo, MiMoConfig
from mimo.recipes import build_recipe
from mimo.recipes.base import Objective
from mimo.training.distributed import distribute

RANKS = 8


@pytest.fixture
def one_of_many():
    """A group in which this process is one of several; the others answer nothing, and sharding asks nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=RANKS)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("offload", [False, True])
def test_a_gpu_never_holds_more_than_its_shards_and_one_block(one_of_many, offload):
    config = MiMoConfig.from_preset("mimo-b-k600")
    device = torch.device("cuda", torch.cuda.current_device())
    model = MiMo(config)
    first = model.blocks[0].mlp.up.weight.detach().clone()
    blocks = [*model.blocks, *model.decoder.blocks]
    whole, block = (4 * sum(p.numel() for p in module.parameters()) for module in (model, blocks[0]))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    distribute(Objective(model, build_recipe(config)), blocks, "fsdp", device, offload=offload, varies=False)
    peak, held = (f() - before for f in (torch.cuda.max_memory_allocated, torch.cuda.memory_allocated))
    shards = 0 if offload else whole / RANKS
    assert held < shards + 2**24 and peak < shards + 1.5 * block + 2**24 and peak < whole / 3
    rows = len(first) // RANKS
    assert torch.equal(model.blocks[0].mlp.up.weight.to_local().cpu(), first[rows : 2 * rows])
