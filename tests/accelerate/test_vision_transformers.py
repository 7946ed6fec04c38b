"""timm's and torchvision's vision transformers, with random weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import detr_fast
from detr_fast import use_backend
from detr_fast.adapters.base import names_used
from detr_fast.explanation import explaining
from detr_fast.testing.counters import count

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
timm_adapter = pytest.importorskip("detr_fast.adapters.timm")


def timm_vit(**options):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(1)
    settings = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}
    return VisionTransformer(**settings, **options)


def torchvision_vit(**options):
    torch.manual_seed(1)
    model = torchvision.models.VisionTransformer(24, 8, 2, 4, 32, 48, num_classes=3, **options)
    nn.init.normal_(model.heads.head.weight)  # zeros at first, which would hide everything below
    return model


def look(model):
    dtype = next(model.parameters()).dtype
    return [model(torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(2)).to(dtype))]


MODELS = {
    "timm": timm_vit,
    "timm, normalised queries and keys": lambda: timm_vit(qk_norm=True, init_values=0.1),
    "timm, normalised outputs": lambda: timm_vit(scale_attn_norm=True),
    "torchvision": torchvision_vit,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_as_before(name, training, assert_unchanged):
    model = MODELS[name]().train(training)
    report = assert_unchanged(model, look)
    assert not report.left
    norms = sum(isinstance(m, nn.LayerNorm) for m in model.modules())
    assert len(report.switched) == norms + 6  # two blocks with an attention and a feed-forward block each
    with explaining(model) as records:
        look(model)
    assert sum(r.op == "attention" for r in records) == 2
    assert sum(r.op == "feed_forward" for r in records) == 2
    added = sum(r.calls for r in records if r.op == "add_layer_norm")
    assert added == 2
    assert sum(r.calls for r in records if r.op == "layer_norm") == norms - added


def torchvision_swin(version=1, **options):
    """Windows of 4 by 4 in features of 6 by 5 and 3 by 3, which are smaller than a window; one block of two is shifted."""
    from torchvision.models import swin_transformer as swin

    torch.manual_seed(1)
    kinds = {} if version == 1 else {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    sizes = {"patch_size": [4, 4], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    model = swin.SwinTransformer(**sizes, mlp_ratio=2.0, stochastic_depth_prob=0.0, num_classes=3, **kinds, **options)
    for name, parameter in model.named_parameters():
        if "bias" in name or "cpb" in name:
            nn.init.normal_(parameter)
    return model


def timm_swin(version=1):
    from timm.models import swin_transformer, swin_transformer_v2

    torch.manual_seed(1)
    kind = swin_transformer.SwinTransformer if version == 1 else swin_transformer_v2.SwinTransformerV2
    sizes = {"img_size": (32, 24), "patch_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4)}
    model = kind(**sizes, mlp_ratio=2.0, window_size=4, drop_path_rate=0.0, num_classes=3)
    for name, parameter in model.named_parameters():
        if "bias" in name or "cpb" in name:
            nn.init.normal_(parameter)
    return model


def timm_other(kind, **options):
    models = pytest.importorskip(f"timm.models.{kind.lower()}")
    torch.manual_seed(1)
    sizes = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0}
    model = getattr(models, kind)(**sizes, num_classes=3, **options)
    for name, parameter in model.named_parameters():
        if "bias" in name or "gamma" in name:
            nn.init.normal_(parameter)
    return model


ALL = {"attention": 2, "feed_forward": 2, "add_layer_norm": 2}
OTHERS = {
    "EVA": (lambda: timm_other("Eva"), (24, 24), ALL),
    "EVA, rotated": (
        lambda: timm_other("Eva", use_rot_pos_emb=True, qkv_fused=False, init_values=0.1),
        (24, 24),
        ALL,
    ),
    "BEiT": (lambda: timm_other("Beit", use_rel_pos_bias=True, init_values=0.1), (24, 24), ALL),
    "BEiT, one bias": (lambda: timm_other("Beit", use_shared_rel_pos_bias=True), (24, 24), ALL),
    "timm": (timm_swin, (32, 24), {"attention": 3, "feed_forward": 3, "add_layer_norm": 3}),
    "timm, second version": (lambda: timm_swin(2), (32, 24), {"attention": 3, "feed_forward": 3}),
    "torchvision": (torchvision_swin, (24, 20), {"attention": 4, "feed_forward": 4, "add_layer_norm": 4}),
    "torchvision, second version": (lambda: torchvision_swin(2), (24, 20), {"attention": 4, "feed_forward": 4}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_with_biases_by_position_or_rotated_it_is_as_before(name, assert_unchanged):
    make, size, ops = OTHERS[name]

    def call(model):
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
        return [model(images.to(next(model.parameters()).dtype))]

    model = make().train()
    report = assert_unchanged(model, call)
    assert not report.left
    with explaining(model) as records:
        call(model)
    assert {op: sum(r.calls for r in records if r.op == op) for op in ops} == ops


@pytest.mark.parametrize("library", ["timm", "torchvision", "transformers"])
def test_features_in_which_windows_fit_are_not_padded(library, assert_unchanged):
    if library == "timm":
        from timm.models.swin_transformer import SwinTransformerBlock

        block = SwinTransformerBlock(16, (8, 8), 2, window_size=4, shift_size=2)
    elif library == "torchvision":
        block = torchvision.models.swin_transformer.SwinTransformerBlock(16, 2, [4, 4], [2, 2])
    else:
        swin = pytest.importorskip("transformers.models.swin.modeling_swin")
        config = swin.SwinConfig(window_size=4, drop_path_rate=0.0, _attn_implementation="sdpa")
        block = swin.SwinLayer(config, 16, (8, 8), 2, shift_size=2)
    x = torch.randn(2, 8, 8, 16, dtype=torch.float64)
    given = (x.flatten(1, 2), (8, 8)) if library == "transformers" else (x,)

    def call(module):
        found = module(*given)
        return [found[0] if isinstance(found, tuple) else found]

    assert count(lambda: call(block.double())).launches["aten.constant_pad_nd.default"] == 1
    assert_unchanged(block, call)
    with use_backend(attention="eager"):
        assert "aten.constant_pad_nd.default" not in count(lambda: call(block)).launches


@pytest.mark.parametrize("shift", [[2, 0], [0, 1], [1, 2]])
def test_windows_are_shifted_along_each_axis_as_torchvision_does(shift, assert_unchanged):
    from torchvision.models.swin_transformer import ShiftedWindowAttention

    attention = ShiftedWindowAttention(16, [3, 4], shift, 2, qkv_bias=False)
    x = torch.randn(2, 7, 9, 16, dtype=torch.float64)
    assert_unchanged(attention, lambda module: [module(x), module(x[:, :3])])


def attention_in_windows(library):
    """Of 3 by 3 tokens, with 2 heads of 8, and what calls it for its output."""
    if library == "timm":
        from timm.models.swin_transformer import WindowAttention

        attention = WindowAttention(16, 2, window_size=(3, 3))
        return attention, attention
    swin = pytest.importorskip("transformers.models.swin.modeling_swin")
    config = swin.SwinConfig(attention_probs_dropout_prob=0.0)
    config._attn_implementation = "sdpa"
    attention = swin.SwinAttention(config, 16, 2, 3)
    return attention, lambda x, mask: attention(x, mask)[0]


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_the_mask_of_shifted_windows_is_repeated_for_no_image(library):
    attention, call = attention_in_windows(library)
    detr_fast.accelerate(attention.to("meta"))
    mask = torch.empty(4, 9, 9, device="meta")
    found = []
    for images in (1, 3):
        x = torch.empty(4 * images, 9, 16, device="meta", requires_grad=True)
        attention.zero_grad()
        with use_backend(attention="triton"):
            found.append(count(lambda x=x: call(x, mask).sum().backward()))
    assert found[0].launches == found[1].launches
    # Of 8 windows more: q, k and v, the output twice, the log-sum-exp.
    assert found[1].saved_bytes - found[0].saved_bytes == 8 * 9 * (5 * 16 + 2) * 4


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_copies_pickles_and_restore(name):
    model = MODELS[name]().eval()
    kinds, expected, keys = [type(m) for m in model.modules()], look(model)[0], list(model.state_dict())
    detr_fast.accelerate(model)
    assert list(model.state_dict()) == keys
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(look(twin)[0], expected)
        detr_fast.restore(twin)
        assert [type(m) for m in twin.modules()] == kinds


@pytest.mark.parametrize("mask", ["bool", "float", "causal"])
def test_masks_mean_what_they_mean_to_timm(mask):
    from timm.models.vision_transformer import Attention

    attention = Attention(32, 4, qkv_bias=True)
    x, visible = torch.randn(2, 5, 32), torch.ones(5, 5, dtype=torch.bool).tril()
    options = {
        "bool": {"attn_mask": visible},
        "float": {"attn_mask": torch.randn(2, 1, 5, 5)},
        "causal": {"is_causal": True},
    }[mask]
    expected = attention(x, **options)
    detr_fast.accelerate(attention)
    with detr_fast.use_backend(attention="eager"):
        torch.testing.assert_close(attention(x, **options), expected)


def test_with_timms_fused_attention_switched_off_the_original_runs():
    model = timm_vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    expected = look(model)[0]
    detr_fast.accelerate(model)
    with explaining(model) as records:
        assert torch.equal(look(model)[0], expected)
    assert {r.op for r in records} == {"layer_norm", "add_layer_norm", "feed_forward"}


def test_another_version_of_a_class_is_left_alone(monkeypatch):
    from timm.models.vision_transformer import Attention

    def forward(self, x, attn_mask=None, is_causal=False):
        return self.rotate(self.qkv(x))

    monkeypatch.setattr(Attention, "forward", forward)
    report = detr_fast.accelerate(timm_vit())
    assert {one.reason for one in report.left} == {"this version of timm computes it differently (rotate)"}


def test_an_older_version_whose_attention_takes_no_mask_is_left_alone(monkeypatch):
    from timm.models.vision_transformer import Attention, Block

    def attend(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(y))

    def forward(self, x):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    monkeypatch.setattr(Attention, "forward", attend)
    monkeypatch.setattr(Block, "forward", forward)
    monkeypatch.setitem(timm_adapter._KNOWN, Attention, names_used(attend))
    model = timm_vit().eval()
    expected = look(model)[0]
    left = {one.kind: one.reason for one in detr_fast.accelerate(model).left}
    assert left["timm.Attention"] == "this version of timm calls it differently (self x)"
    assert torch.equal(look(model)[0], expected)


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_it_compiles_to_one_graph(name):
    model = MODELS[name]().eval()
    expected = look(model)[0]
    detr_fast.accelerate(model)
    torch.testing.assert_close(look(torch.compile(model, fullgraph=True, backend="eager"))[0], expected)


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_torchscript_and_torch_fx_get_what_they_got(name):
    model = MODELS[name]().eval()
    expected = look(model)[0]
    detr_fast.accelerate(model)
    for other in (torch.jit.script(model), torch.fx.symbolic_trace(model)):
        torch.testing.assert_close(look(other)[0], expected)


def test_a_compiled_model_is_accelerated_and_explained():
    model = torch.compile(timm_vit().eval(), backend="eager")
    expected = look(model)[0]
    report = detr_fast.accelerate(model, example_inputs=(torch.randn(2, 3, 24, 24),))
    assert sum(r.op == "attention" for r in report.explanation) == 2
    torch.testing.assert_close(look(model)[0], expected)


def test_a_block_whose_part_is_hooked_later_calls_it():
    model, seen = timm_vit(), []
    detr_fast.accelerate(model)
    model.blocks[0].mlp.fc2.register_forward_hook(lambda *_: seen.append(1))
    with explaining(model) as records:
        look(model)
    assert seen == [1]
    assert [r.module for r in records if r.op == "feed_forward"] == ["blocks.1.mlp"]


class GELUTanh(nn.Module):
    """A user's own, under the name of timm's."""

    def forward(self, x):
        return x * torch.tanh(x)


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (
            GELUTanh,
            f"its activation {GELUTanh.__module__.partition('.')[0]}.GELUTanh is none that the fused block knows",
        ),
        (nn.Tanh, "its activation torch.nn.Tanh is none that the fused block knows"),
        (timm.layers.activations.GELU, None),
        (timm.layers.activations.GELUTanh, None),
    ],
)
def test_activations_are_known_by_their_class_not_by_its_name(activation, reason, assert_unchanged):
    report = assert_unchanged(timm_vit(act_layer=activation), look)
    assert {one.reason for one in report.left} == (set() if reason is None else {reason})
