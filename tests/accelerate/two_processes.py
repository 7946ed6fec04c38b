"""One of two processes of test_distributed.py: `two_processes.py RANK FILE`. Prints what it saw; raises where it differs."""

from __future__ import annotations

import copy
import os
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import detr_fast
from detr_fast import nn as ours
from detr_fast import use_backend
from detr_fast.models.transformer import Transformer

STEPS = 3


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True), 2, nn.LayerNorm(16))


def batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[rank, 3:] = True
    return torch.randn(2, 5, 16, generator=generator), padding


def loss_of(model: nn.Module, rank: int, step: int) -> torch.Tensor:
    x, padding = batch(rank, step)
    return model(x, src_key_padding_mask=padding).square().sum()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    # Attention's key biases have no gradient but rounding, which Adam would divide by itself: losses then differ by 5e-4.
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, rank, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def truth(rank: int) -> list[float]:
    """The same training in one process, on the mean of both ranks' gradients."""
    model, losses = build(), []
    optimizer = adam(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        values = [loss_of(model, r, step) for r in (0, 1)]
        (sum(values) / 2).backward()
        optimizer.step()
        losses.append(values[rank].item())
    return losses


def data_parallel(rank: int) -> list[float]:
    """Accelerated in the middle of training, through the wrapper."""
    model = DistributedDataParallel(build())
    optimizer = adam(model)
    losses = train(model, optimizer, rank, range(1))
    report = detr_fast.accelerate(model)
    assert {one.name.split(".")[0] for one in report.switched} == {"module"}
    with use_backend(attention="sdpa"):
        losses += train(model, optimizer, rank, range(1, 2))
    detr_fast.restore(model)
    return losses + train(model, optimizer, rank, range(2, STEPS))


def fully_sharded(rank: int) -> list[float]:
    """Accelerated first; a model that is sharded already is left alone where its classes were replaced."""
    model = build()
    plain = copy.deepcopy(model)
    detr_fast.accelerate(model)
    for one in (model, plain):
        for layer in one.layers:
            fully_shard(layer)
        fully_shard(one)
    assert isinstance(model.layers[0], ours.TransformerEncoderLayer)
    report = detr_fast.accelerate(plain)
    assert {one.name for one in report.left} == {"", "layers.0", "layers.1"}
    assert all("FSDP2" in one.reason for one in report.left)
    assert {one.name for one in detr_fast.restore(model).left} == {"", "layers.0", "layers.1"}
    detr_fast.accelerate(model)
    optimizer = adam(model)
    with use_backend(attention="sdpa"):
        return train(model, optimizer, rank, range(STEPS))


def sharded_by_layer() -> None:
    """DETR's transformer, each of whose layers gathers its own parameters when it is called."""
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 16), torch.randn(1, 4, 16), torch.randn(3, 16)
    for pre_norm in (False, True):
        model = Transformer(16, 2, 2, 2, 24, 0.0, pre_norm)
        expected = model(*inputs).detach()
        for layer in (*model.encoder.layers, *model.decoder.layers):
            fully_shard(layer)
        fully_shard(model)
        for gradients in (False, True):
            with use_backend(attention="sdpa"), torch.set_grad_enabled(gradients):
                found = model(*inputs)
            torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-5)
        found.sum().backward()


def detection_loss(rank: int) -> None:
    """transformers' loss and ours in its place: divided by the boxes of all processes where accelerate knows of them."""
    from accelerate import PartialState
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

    from detr_fast.adapters.hugging_face_loss_detr import object_detection_loss

    names = (
        "class_cost",
        "bbox_cost",
        "giou_cost",
        "bbox_loss_coefficient",
        "giou_loss_coefficient",
        "eos_coefficient",
    )
    config = SimpleNamespace(num_labels=5, auxiliary_loss=False, **dict.fromkeys(names, 1.0))
    count = (5, 2)[rank]
    labels = [{"class_labels": torch.arange(count), "boxes": torch.rand(count, 4) * 0.5 + 0.2}]
    arguments = (torch.randn(1, 7, 6), labels, "cpu", torch.rand(1, 7, 4) * 0.5 + 0.2, config)

    def bbox() -> torch.Tensor:
        with use_backend(matching_cost="eager"):  # or ours would leave one layer on a CPU to transformers
            losses = [loss(*arguments)[1]["loss_bbox"] for loss in (ForObjectDetectionLoss, object_detection_loss)]
        torch.testing.assert_close(losses[1], losses[0])
        return losses[0]

    alone = bbox()  # each process by itself: transformers asks accelerate, not torch.distributed
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    assert PartialState(cpu=True).num_processes == 2
    torch.testing.assert_close(bbox() / alone, torch.tensor(count / (7 / 2 / 2)))
    if rank == 1:  # whose batch then goes to transformers, while the other's is ours: they add up the same number
        labels[0]["class_labels"] = torch.full((count,), 5)
    torch.testing.assert_close(bbox() / alone, torch.tensor(count / (7 / 2 / 2)))


def main(rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    expected = torch.tensor(truth(rank))
    for train_one in (data_parallel, fully_sharded):
        torch.testing.assert_close(torch.tensor(train_one(rank)), expected, rtol=1e-5, atol=0)
        print(train_one.__name__, "as in one process")
    sharded_by_layer()
    print("sharded_by_layer as in one process")
    if find_spec("transformers") and find_spec("accelerate") and find_spec("scipy"):
        detection_loss(rank)
        print("detection_loss as transformers'")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
    # FSDP2 keeps the process group, whose threads go on: one that lets go of a tensor while Python ends aborts the process.
    sys.stdout.flush()
    os._exit(0)
