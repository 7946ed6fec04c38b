"""Captured steps, without a GPU: an emulated CUDA graph records operations, runs none of them, and replays them."""

from __future__ import annotations

import copy
from collections import UserDict
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import detr_fast
from benchmarks.hardware import DEVICE, sized
from detr_fast.dispatch import use_backend
from detr_fast.engine import captured, graphs
from detr_fast.engine.bound import Bound
from detr_fast.engine.captured import CapturedInference, CapturedStep
from detr_fast.engine.ema import ExponentialMovingAverage
from detr_fast.engine.graphs import GraphedFunction, shapes_of, tensors_of
from detr_fast.engine.metrics import DeviceMetrics
from detr_fast.models import ModelConfig, NestedTensor, Targets, build_criterion, build_model

TINY = ModelConfig(
    backbone="conv",
    num_classes=4,
    num_queries=6,
    d_model=16,
    heads=2,
    encoder_layers=1,
    decoder_layers=2,
    feedforward=16,
    backbone_width=4,
    dropout=0.0,
)


def batch(seed, size=(32, 32), count=3, padded=True):
    random = torch.Generator().manual_seed(seed)
    images = torch.rand(2, 3, *size, generator=random)
    boxes = torch.rand(2, 4, 4, generator=random) * 0.4 + 0.3
    labels = torch.randint(4, (2, 4), generator=random)
    mask = torch.zeros(2, *size, dtype=torch.bool)
    sizes = ((size[0], size[1] - seed), size)  # known on the host; a shape is one all the same
    return NestedTensor(images, mask, padded, sizes), Targets(boxes, labels, torch.tensor([count, 1]))


def training(dropout=0.0, scaled=False, packed=False, **settings):
    torch.manual_seed(0)
    model = build_model(replace(TINY, dropout=dropout, packed=packed)).train()
    criterion = build_criterion(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    ema = ExponentialMovingAverage(model, 0.9)
    metrics = DeviceMetrics(("loss", "loss_ce", "broken_targets"), "cpu")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    step = CapturedStep(model, criterion, optimizer, clip_norm=0.1, ema=ema, metrics=metrics, scaler=scaler, **settings)
    return SimpleNamespace(model=model, optimizer=optimizer, schedule=schedule, ema=ema, metrics=metrics, step=step)


def run(one, seeds, **kinds):
    losses = []
    for seed in seeds:
        losses.append(float(one.step(*batch(seed, **kinds))["loss"]))
        one.schedule.step()
    return losses


def assert_same_state(a, b, atol=1e-6):
    for pair in zip(a.model.state_dict().values(), b.model.state_dict().values()):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=atol)
    for pair in zip(a.ema.module.state_dict().values(), b.ema.module.state_dict().values()):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=atol)


def by_hand(seeds):
    """The same training, written out."""
    one = training(capture=False)
    metrics = []
    for number, seed in enumerate(seeds, 1):
        images, targets = batch(seed)
        losses = one.step.criterion(one.model(images), targets)
        total = one.step.criterion.weighted_sum(losses)
        one.optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(one.model.parameters(), 0.1)
        one.optimizer.step()
        one.schedule.step()
        one.ema.update(one.model, number)
        metrics.append(total.item())
    return one, metrics


def test_on_a_cpu_steps_run_eagerly_and_say_so():
    one, expected = training(), by_hand(range(3))
    assert run(one, range(3)) == expected[1]
    for pair in zip(one.model.parameters(), expected[0].model.parameters()):
        assert torch.equal(*pair)
    assert one.step.reason == "the parameters are on cpu, and CUDA graphs need a GPU"
    assert str(one.step) == "the training step: runs eagerly: the parameters are on cpu, and CUDA graphs need a GPU"


def test_backward_runs_on_the_steps_own_thread_and_other_backwards_where_they_did():
    one, seen = training(capture=False), []
    next(one.model.parameters()).register_hook(lambda _: seen.append(torch._C._is_multithreading_enabled()))
    run(one, range(1))
    assert seen == [False]
    assert torch._C._is_multithreading_enabled()


def test_replayed_steps_train_as_eager_ones_do(emulated):
    one, (expected, losses) = training(), by_hand(range(6))
    assert run(one, range(6)) == pytest.approx(losses, rel=1e-5)
    assert_same_state(one, expected)
    assert one.step.graphs == len(emulated) == 1
    assert one.metrics.read()["loss"] == pytest.approx(sum(losses) / 6, rel=1e-5)
    assert one.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5**6)  # the schedule's number, no tensor
    assert one.optimizer.param_groups[0]["capturable"] is False
    assert emulated[0].mode == "thread_local"
    assert str(one.step) == "the training step: 1 CUDA graphs for 1 shapes"


CALLED = {
    "one tensor": lambda src, tgt: src,
    "arguments": lambda src, tgt: (src, tgt),
    "arguments by name": lambda src, tgt: UserDict(src=src, tgt=tgt),
}


@pytest.mark.parametrize("called", CALLED)
def test_any_models_step_is_captured_with_any_loss(emulated, called):
    def train(capture):
        torch.manual_seed(0)
        layer = {"d_model": 8, "nhead": 2, "dim_feedforward": 8, "dropout": 0.0, "batch_first": True}
        one = called == "one tensor"
        model = nn.TransformerEncoderLayer(**layer) if one else nn.Transformer(8, 2, 1, 1, 8, 0.0, batch_first=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        loss = nn.CrossEntropyLoss()
        step = CapturedStep(model, lambda y, labels: loss(y.flatten(0, 1), labels), optimizer, capture=capture)
        losses = []
        for _ in range(5):
            inputs = CALLED[called](torch.randn(2, 3, 8), torch.randn(2, 3, 8))
            results = step(inputs, torch.randint(8, (6,)))
            assert list(results) == ["loss"]
            losses.append(float(results["loss"]))
        return losses, step

    (expected, _), (found, step) = train(False), train(True)
    assert found == pytest.approx(expected, rel=1e-5)
    assert step.graphs == len(emulated) == 1


def test_an_accelerated_hugging_face_detector_is_replayed(emulated):
    transformers = pytest.importorskip("transformers")
    resnet = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], out_features=["stage2"])
    sizes = {"d_model": 16, "num_queries": 6, "encoder_layers": 1, "decoder_layers": 1, "use_timm_backbone": False}
    sizes |= {f"{kind}_{name}": 2 for kind in ("encoder", "decoder") for name in ("attention_heads", "ffn_dim")}
    model = transformers.DetrForObjectDetection(transformers.DetrConfig(backbone_config=resnet, **sizes)).eval()
    detr_fast.accelerate(model)
    inference = CapturedInference(model)
    mask = torch.ones(2, 32, 32, dtype=torch.long)
    mask[1, 20:] = 0
    for _ in range(4):
        images = torch.rand(2, 3, 32, 32)
        found = inference(pixel_values=images, pixel_mask=mask)
        with torch.no_grad():
            expected = model(pixel_values=images, pixel_mask=mask)
        torch.testing.assert_close(found.logits, expected.logits)
        torch.testing.assert_close(found.pred_boxes, expected.pred_boxes)
    assert inference.graphs == 1, inference.reason


def test_the_optimizer_takes_large_parameters_first_and_keeps_its_order(emulated):
    one = training()
    (group,) = one.optimizer.param_groups
    before, state = list(group["params"]), one.optimizer.state_dict()["param_groups"]
    seen = []
    one.optimizer.register_step_pre_hook(lambda *_: seen.append([p.numel() for p in group["params"]]))
    run(one, range(4))
    sizes = [p.numel() for p in before]
    assert seen == [sorted(sizes, reverse=True)] * 3  # two steps, and the capture
    assert sizes != seen[0]
    assert all(a is b for a, b in zip(group["params"], before))
    assert one.optimizer.state_dict()["param_groups"][0]["params"] == state[0]["params"]


def packed_batch(seed, widths):
    images, targets = batch(seed, size=(32, 128))
    mask = torch.arange(128) >= torch.tensor(widths)[:, None, None].expand(2, 32, 1)
    return replace(images, mask=mask, sizes=tuple((32, width) for width in widths)), targets


def test_packed_steps_are_captured_and_train_as_padded_eager_ones_do(emulated):
    widths = [(50, 100), (64, 112), (80, 96), (70, 110), (100, 50)]
    batches = [packed_batch(*one) for one in enumerate(widths)]
    padded, packed = training(capture=False), training(packed=True)
    expected = [float(padded.step(*given)["loss"]) for given in batches]
    with use_backend(attention_varlen="eager"):  # which reads no lengths on the host, as nothing does on a GPU
        found = [float(packed.step(*given)["loss"]) for given in batches]
    assert found == pytest.approx(expected, rel=1e-4)
    assert_same_state(packed, padded, atol=1e-5)  # other sums, which AdamW's first steps magnify
    assert packed.step.graphs == len(emulated) == 1
    assert {len(packed.model.with_packing(images).packing.index) for images, _ in batches} == {
        24
    }  # of 32 that are padded


def test_packed_inference_has_a_graph_for_each_number_of_tokens(emulated):
    model = build_model(replace(TINY, packed=True)).eval()
    inference = CapturedInference(model)
    with use_backend(attention_varlen="eager"):
        for seed, widths in enumerate([(50, 100), (64, 112), (80, 96), (128, 128), (120, 128), (127, 113)]):
            images, _ = packed_batch(seed, widths)
            found = inference(images)
            torch.testing.assert_close(found["pred_boxes"], model(images)["pred_boxes"])
    assert inference.graphs == 2


@pytest.mark.parametrize("wrap", [torch.compile, AveragedModel, lambda model: torch.compile(AveragedModel(model))])
def test_a_packed_model_in_a_wrapper_gets_its_packing(emulated, wrap, recwarn):
    inference = CapturedInference(wrap(build_model(replace(TINY, packed=True))))
    images, _ = packed_batch(0, (50, 100))
    given = captured._for_a_graph(inference.model, images)
    assert given.packing is not None
    assert given.sizes is None
    assert not any("packed=True" in str(w.message) for w in recwarn.list)


def test_a_packed_model_inside_another_is_said_to_be_captured_padded(emulated):
    class Resizing(nn.Module):  # and may do anything with its batches
        def __init__(self):
            super().__init__()
            self.module = build_model(replace(TINY, packed=True))

    model = Resizing()
    said = "a Detr has packed=True but is captured with padding: .* inside Resizing"
    assert captured._for_a_graph(model, packed_batch(0, (50, 100))[0]).packing is None
    with pytest.warns(RuntimeWarning, match=said):
        CapturedInference(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    with pytest.warns(RuntimeWarning, match=said):
        CapturedStep(model, build_criterion(TINY), optimizer)


def test_each_shape_has_a_graph_of_its_own_in_one_pool(emulated):
    one = training()
    for size in ((32, 32), (32, 48)):
        run(one, range(4), size=size)
    run(one, range(2), size=(32, 32))
    run(one, range(1), size=(32, 32), padded=False)  # known to have no padding: another program
    assert one.step.graphs == 2
    assert emulated[0].pool is emulated[1].pool
    assert one.step.taken == 11
    assert one.step._number.item() == 11


def test_named_tuples_are_taken():
    class Pair(NamedTuple):
        x: torch.Tensor
        scale: float

    class Model(nn.Linear):
        def forward(self, pair):
            return Pair(super().forward(pair.x) * pair.scale, pair.scale)

    model, given = Model(3, 2), Pair(torch.randn(4, 3), 2.0)
    assert torch.equal(CapturedInference(model)(given).x, model(given).x)


def test_dropout_is_new_on_each_replay(emulated):
    one = training(dropout=0.5)
    run(one, [0, 0, 0])
    for group in one.optimizer.param_groups:
        group["lr"] = 0.0
    one.step(*batch(0))
    losses = {float(one.step(*batch(0))["loss_ce"]) for _ in range(4)}
    assert len(losses) == 4


def test_a_gradient_scaler_takes_part(emulated):
    one, (expected, losses) = training(scaled=True), by_hand(range(5))
    assert run(one, range(5)) == pytest.approx(losses, rel=1e-5)
    assert_same_state(one, expected)
    before = copy.deepcopy(one.model.state_dict())
    images, targets = batch(9)
    one.step(NestedTensor(images.tensors * float("inf"), images.mask), targets)
    assert one.step.graphs == 1
    for name, value in one.model.named_parameters():
        assert torch.equal(value, before[name])  # skipped
    assert one.step.scaler.get_scale() == 512


def test_what_was_counted_on_the_device_comes_with_the_metrics(emulated):
    one = training()
    run(one, range(3))
    one.metrics.read()
    images, targets = batch(0)
    targets.labels[0, 0] = 99
    one.step(images, targets)
    assert one.metrics.read()["broken_targets"] == 1


def test_a_failing_capture_falls_back_with_the_reason(emulated):
    calls = []

    def function(x):
        calls.append(len(x))
        if calls.count(2) == 3:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x * 2

    graphed = GraphedFunction(function, torch.device("cpu"))
    for _ in range(3):
        kept = graphed(torch.ones(1))
    assert graphed.graphs == 1
    with pytest.warns(RuntimeWarning, match="no CUDA graphs, the capture failed .*operation not permitted"):
        results = [graphed(torch.full((2,), float(i))) for i in range(5)]
    assert [r[0].item() for r in results] == [0, 2, 4, 6, 8]
    assert "the capture failed" in graphed.reason
    assert graphed.graphs == 0  # which nothing will replay any more, and whose memory eager calls need
    assert kept.tolist() == [2.0]


def test_too_many_shapes_run_eagerly_and_say_so_once(emulated, monkeypatch, recwarn):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 1)
    graphed = GraphedFunction(lambda x: x + 1, torch.device("cpu"), warmup=1)
    for size in (1, 2, 3):
        for value in range(3):
            assert graphed(torch.full((size,), float(value)))[0] == value + 1
    assert graphed.graphs == 1
    assert sum("pad batches to fewer sizes" in str(w.message) for w in recwarn.list) == 1


def test_graphs_that_nothing_needs_any_more_make_room_for_others(emulated, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    monkeypatch.setattr(graphs, "MAX_UNUSED", 6)
    part = nn.Identity()
    part.number = 0
    graphed = GraphedFunction(lambda x: x + 1, torch.device("cpu"), bound=Bound(part), warmup=1)

    def call():
        for value in range(4):
            assert graphed(torch.full((2,), float(value)))[0] == value + 1

    for part.number in range(6):
        call()
        assert len(emulated) == part.number + 1
    assert graphed.graphs == 2
    monkeypatch.setattr(graphs, "MAX_UNUSED", 0)
    part.number = 6
    call()
    assert graphed.graphs == 1
    # PyTorch does not take up a pool again whose graphs are all gone.
    assert emulated[0].pool is emulated[-2].pool is not emulated[-1].pool


def test_inference_is_replayed(emulated):
    model = build_model(TINY)
    inference = CapturedInference(model)
    for seed in range(4):
        images, _ = batch(seed)
        found = inference(images)
        with torch.no_grad():
            expected = model(images)
        torch.testing.assert_close(found["pred_boxes"], expected["pred_boxes"])
        assert not found["pred_boxes"].requires_grad
    assert inference.graphs == 1
    assert not model.training


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "SGD has no 'capturable' setting; use torch.optim.AdamW"),
        (lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True), "unless the optimizer has fused=True"),
    ],
)
def test_what_cannot_be_captured_is_named(optimizer, reason):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = nn.Linear(2, 2, device="cuda")
        assert reason in captured.why_no_graph(model, optimizer(model.parameters()), object())


def test_shapes_tell_apart_what_a_graph_is_bound_to():
    (images, targets), same, other = (
        (captured._for_a_graph(nn.Linear(1, 1), i), t) for i, t in (batch(0), batch(1), batch(1, size=(32, 40)))
    )
    assert shapes_of((images, targets)) == shapes_of(same)
    assert hash(shapes_of(same)) == hash(shapes_of((images, targets)))
    assert shapes_of(other) != shapes_of(same)
    assert shapes_of({"a": images.tensors}) != shapes_of({"a": images.tensors.double()})
    assert len(tensors_of({"a": [images], "b": targets})) == 5


# In Triton's interpreter, what loops over keys or paths would take minutes.
ON_KERNELS = dict.fromkeys(sized(("linear_assignment", "matching_cost", "detection_losses"), ()), "triton")
IN_PARTS = ("layer_norm", "add_layer_norm", "attention", "linear_add_layer_norm", "feed_forward", "qkv_projection")
# In a graph the dispatcher may choose otherwise than outside, and what rounds otherwise trains otherwise: from the ninth step
# on, losses of such steps lie over 1e-4 apart, and at the 77th 2.5 %. The same implementations leave no such excuse.
ASKED = {
    "triton": dict.fromkeys(("layer_norm", "add_layer_norm", *sized(("attention",), ())), "triton") | ON_KERNELS,
    "eager": dict.fromkeys(IN_PARTS, "eager") | ON_KERNELS,
    "auto": {},
}


def train_on_a_gpu(capture, dropout=0.0, **asked):
    """The losses of 100 steps, none of which makes the host wait once it is captured."""
    steps = sized(100, 4)
    torch.manual_seed(0)
    model = build_model(replace(TINY, dropout=dropout)).to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    metrics = DeviceMetrics(("loss",), DEVICE)
    step = CapturedStep(model, build_criterion(TINY), optimizer, clip_norm=0.1, metrics=metrics, capture=capture)
    kept = torch.zeros(steps, device=DEVICE)
    try:
        with use_backend(**asked):
            for number in range(steps):
                given = graphs.moved(batch(number % 7), DEVICE)
                if number == 5:
                    torch.cuda.set_sync_debug_mode("error")
                kept[number] = step(*given)["loss"]
    finally:  # else all later tests fail
        torch.cuda.set_sync_debug_mode("default")
    assert step.graphs == int(capture), step.reason
    return kept.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("asked", ASKED)
def test_on_a_gpu_100_replayed_steps_train_as_eager_ones_without_a_synchronisation(asked):
    eager, replayed = (train_on_a_gpu(capture, **ASKED[asked]) for capture in (False, True))
    if asked == "auto":
        assert replayed[:5] == pytest.approx(eager[:5], rel=1e-4)
        assert replayed == pytest.approx(eager, rel=0.1)
    else:
        assert replayed == pytest.approx(eager, rel=sized(0, 1e-5), abs=0)  # bit for bit


@pytest.mark.gpu
def test_on_a_gpu_dropout_is_new_on_each_replay():
    losses = train_on_a_gpu(True, dropout=0.1)
    assert len(set(losses)) == len(losses)
