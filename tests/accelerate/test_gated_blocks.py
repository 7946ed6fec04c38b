"""Gated feed-forward blocks of transformers, timm and repositories, accelerated: what they were, with one launch for the gate."""

from __future__ import annotations

import copy
import functools
import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import detr_fast
from detr_fast import use_backend
from detr_fast.explanation import explaining
from detr_fast.testing import count

pytest.importorskip("transformers")
mlp = pytest.importorskip("timm.layers.mlp")
WIDTH, HIDDEN = 24, 40
CONFIG = SimpleNamespace(
    hidden_size=WIDTH,
    intermediate_size=HIDDEN,
    hidden_act="silu",
    hidden_activation="gelu_pytorch_tanh",
    mlp_bias=True,
    use_bias=False,
    dropout_rate=0.0,
    rms_norm_eps=1e-6,
    shared_intermediate_size=HIDDEN,
    mlp_dropout=0.0,
    d_model=WIDTH,
    d_ff=HIDDEN,
    dense_act_fn="gelu_pytorch_tanh",
    dim_ff=HIDDEN,
    block_ff_dim=HIDDEN,
    block_auto_adjust_ff_dim=False,
    swiglu_limit=0.5,
    swiglu_alpha=1.702,
)


class CopiedFromDinov2(nn.Module):
    def __init__(self):
        super().__init__()
        self.w12, self.w3 = nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        x12 = self.w12(x)
        x1, x2 = x12.chunk(2, dim=-1)
        hidden = F.silu(x1) * x2
        return self.w3(hidden)


class CopiedFromDinov3(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(*sizes) for sizes in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)))

    def forward(self, x):
        x1 = self.w1(x)
        x2 = self.w2(x)
        hidden = F.silu(x1) * x2
        return self.w3(hidden)


def of(model, name, *arguments, **settings):
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    return getattr(module, name)(SimpleNamespace(**(vars(CONFIG) | settings)), *arguments)


def idefics():
    module = importlib.import_module("transformers.models.idefics.modeling_idefics")
    return module.IdeficsMLP(WIDTH, HIDDEN, "silu")


def glu(**options):
    return mlp.GluMlp(WIDTH, 2 * HIDDEN, act_layer=nn.SiLU, **options)


# Of each code that is known a class; whether its two projections are one.
BLOCKS = {
    "Llama": lambda: of("llama", "LlamaMLP"),
    "Gemma": lambda: of("gemma", "GemmaMLP", hidden_act="gelu_pytorch_tanh"),
    "DINOv3": lambda: of("dinov3_vit", "DINOv3ViTGatedMLP"),
    "Qwen2.5-VL": lambda: of("qwen2_5_vl", "Qwen2_5_VLMLP", True),
    "Idefics": idefics,
    "RecurrentGemma": lambda: of("recurrent_gemma", "RecurrentGemmaMlp", intermediate_size=2 * HIDDEN),
    "Llama 4": lambda: of("llama4", "Llama4TextMLP"),
    "T5Gemma": lambda: of("t5gemma", "T5GemmaMLP"),
    "BitNet": lambda: of("bitnet", "BitNetMLP", hidden_act="relu"),
    "Phi-3": lambda: of("phi3", "Phi3MLP"),
    "Granite": lambda: of("granitemoeshared", "GraniteMoeSharedMLP"),
    "ModernBERT": lambda: of("modernbert", "ModernBertMLP", hidden_activation="gelu"),
    "Moonshine": lambda: of("moonshine", "MoonshineDecoderMLP", "silu"),
    "CLVP": lambda: of("clvp", "ClvpGatedLinearUnit", hidden_act="gelu"),
    "Phi-4's audio": lambda: of("phi4_multimodal", "Phi4MultimodalAudioMLP", activation="silu"),
    "T5": lambda: of("t5", "T5DenseGatedActDense"),
    "T5, its activation written out": lambda: of("t5", "T5DenseGatedActDense", dense_act_fn="gelu_new"),
    "LongT5": lambda: of("longt5", "LongT5DenseGatedActDense"),
    "CPM-Ant": lambda: of("cpmant", "CpmAntDenseGatedACT"),
    "DeepSeek V4": lambda: of("deepseek_v4", "DeepseekV4MLP"),
    "GLM-5": lambda: of("glm5_next", "Glm5NextTextMLP"),
    "GLM-5's vision": lambda: of("glm5_next", "Glm5NextVisionMLP"),
    "GLM-5's merger": lambda: importlib.import_module(
        "transformers.models.glm5_next.modeling_glm5_next"
    ).Glm5NextVisionPatchMerger(WIDTH, HIDDEN, "silu", 0.5),
    "LFM2": lambda: of("lfm2", "Lfm2MLP"),
    "a copy of DINOv2's": CopiedFromDinov2,
    "a copy of DINOv3's": CopiedFromDinov3,
    "timm": lambda: mlp.SwiGLU(WIDTH, HIDDEN, norm_layer=nn.LayerNorm),
    "timm, packed": lambda: glu(gate_last=False),
    "timm, the gate last": glu,
    "ViTamin": lambda: importlib.import_module("timm.models.vitamin").GeGluMlp(WIDTH, HIDDEN),
}


def pair(name, dtype=torch.float32):
    """A block, and the same accelerated."""
    torch.manual_seed(2)
    original = BLOCKS[name]().to(dtype)
    ours = copy.deepcopy(original)
    report = detr_fast.accelerate(nn.ModuleDict({"mlp": ours}))
    assert {one.name: one.now for one in report.switched}["mlp"] == "detr_fast.ops.gated_activation"
    assert list(ours.state_dict()) == list(original.state_dict())
    return ours, original


def step(block, x):
    x = x.detach().requires_grad_()
    y = block(x)
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, (x, *block.parameters()), dy)]


@pytest.mark.interpreter
@pytest.mark.parametrize("name", BLOCKS)
def test_an_accelerated_block_gives_what_it_did_on_a_kernel(name):
    ours, original = pair(name)
    x = torch.randn(3, 5, WIDTH)
    with use_backend(gated_activation="triton"), explaining(ours) as records:
        found = step(ours, x)
    assert {(r.op, r.chosen) for r in records if "gated" in r.op} == {("gated_activation", "triton")}
    for one, theirs in zip(found, step(original, x), strict=True):
        torch.testing.assert_close(one, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in BLOCKS if "written out" not in name])
def test_without_a_kernel_the_bits_are_theirs(name, dtype):
    ours, original = pair(name, dtype)
    x = torch.randn(3, WIDTH).to(dtype)
    for backend in ({}, {"gated_activation": "eager"}):
        with use_backend(**backend):
            for one, theirs in zip(step(ours, x), step(original, x), strict=True):
                assert torch.equal(one, theirs)
    detr_fast.restore(holder := nn.ModuleList([ours]))
    assert type(holder[0]) is type(original)


@pytest.mark.parametrize("name", ["Llama", "Phi-3", "LFM2"])
def test_it_compiles_into_one_graph_which_has_pytorchs_operations(name):
    ours, original = pair(name)
    x = torch.randn(3, WIDTH)
    with use_backend(attention="eager"):  # so that the dispatcher is asked on a CPU
        y = torch.compile(ours, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, original(x))


class Lora(nn.Module):
    """As PEFT wraps a projection."""

    def __init__(self, base):
        super().__init__()
        self.base, self.low, self.high = base, nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, base.out_features)

    def forward(self, x):
        return self.base(x) + self.high(self.low(x))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["Llama", "Phi-3"])
def test_wrapped_and_hooked_projections_are_called(name):
    ours, original = pair(name)
    part = "gate_proj" if name == "Llama" else "gate_up_proj"
    seen = []
    for block in (ours, original):
        torch.manual_seed(4)
        setattr(block, part, Lora(getattr(block, part)))
        block.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    x = torch.randn(3, WIDTH)
    with use_backend(gated_activation="triton"):
        found = step(ours, x)
    for one, theirs in zip(found, step(original, x), strict=True):
        torch.testing.assert_close(one, theirs, rtol=1e-4, atol=1e-5)
    assert seen == [(3, HIDDEN)] * 2


@pytest.mark.interpreter
def test_an_activation_that_is_hooked_or_replaced_later_is_called():
    ours, _ = pair("Llama")
    x, seen = torch.randn(3, WIDTH), []
    hook = ours.act_fn.register_forward_hook(lambda *_: seen.append(1))
    with use_backend(gated_activation="triton"):
        ours(x)
        assert seen == [1]
        hook.remove()
        ours.act_fn = nn.Sigmoid()
        expected = ours.down_proj(torch.sigmoid(ours.gate_proj(x)) * ours.up_proj(x))
        torch.testing.assert_close(ours(x), expected)


@pytest.mark.interpreter
@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
def test_t5s_last_projection_may_stay_in_fp32(narrow):
    ours, original = pair("T5")
    for block in (ours, original):
        block.to(narrow).wo.float()
    x = torch.randn(3, WIDTH).to(narrow)
    expected = original(x)
    with use_backend(gated_activation="triton"):
        y = ours(x)
    assert y.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


def test_a_gpu_launches_one_operation_for_activation_and_product_and_keeps_less():
    counts = []
    for accelerated in (False, True):
        with FakeTensorMode(), torch.device("cuda"):
            block = of("llama", "LlamaMLP", hidden_size=256, intermediate_size=1024, mlp_bias=False)
            if accelerated:
                detr_fast.accelerate(block)
            x = torch.empty(16_384, 256)
            counts.append(count(lambda block=block, x=x: block(x)))
    assert [one.total_launches for one in counts] == [5, 4]
    hidden = 16_384 * 1024 * 4
    assert counts[0].bytes_moved - counts[1].bytes_moved == 2 * hidden


def test_a_small_call_on_a_gpu_launches_what_it_did(unmeasured):
    launches = []
    for accelerated in (False, True):
        with FakeTensorMode(), torch.device("cuda"):
            block = BLOCKS["Phi-3"]()
            if accelerated:
                detr_fast.accelerate(block)
            launches.append(count(lambda block=block: block(torch.empty(1, WIDTH))).total_launches)
    assert launches[0] == launches[1]


EXPERTS = {
    "Mixtral": ("mixtral", "MixtralExperts"),
    "DeepSeek V4": ("deepseek_v4", "DeepseekV4Experts"),
    "GLM-5": ("glm5_next", "Glm5NextTextExperts"),
    "gpt-oss": ("gpt_oss", "GptOssExperts"),
    "privacy filter": ("openai_privacy_filter", "OpenAIPrivacyFilterExperts"),
    "MiniMax M3": ("minimax_m3_vl", "MiniMaxM3VLExperts"),
}


def experts(name="Mixtral", implementation="grouped_mm", **options):
    settings = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": HIDDEN}
    settings |= {"_experts_implementation": implementation, **options}
    found = of(*EXPERTS[name], **settings)
    with torch.no_grad():
        for weight in found.parameters():
            weight.normal_(0, 0.2)
    return found


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "implementation"), [("Mixtral", "batched_mm"), *((name, "grouped_mm") for name in EXPERTS)]
)
def test_experts_take_the_gate_of_all_their_tokens_at_once(name, implementation):
    torch.manual_seed(3)
    original = experts(name, implementation)
    ours = copy.deepcopy(original)
    report = detr_fast.accelerate(nn.ModuleList([ours]))
    assert [one.now for one in report.switched] == ["detr_fast.ops.gated_activation (between experts' products)"]
    x, index, weight = torch.randn(6, WIDTH), torch.randint(4, (6, 2)), torch.rand(6, 2)
    found = []
    for block, backend in ((original, {}), (ours, {}), (ours, {"gated_activation": "triton"})):
        x = x.detach().requires_grad_()
        with use_backend(**backend), explaining(ours) as records:
            y = block(x, index, weight)
        found.append([y, *torch.autograd.grad(y.square().sum(), (x, *block.parameters()))])
    assert [(r.op, r.chosen, r.calls) for r in records] == [("gated_activation", "triton", 1)]
    assert all(map(torch.equal, found[0], found[1]))
    for one, theirs in zip(found[2], found[0], strict=True):
        torch.testing.assert_close(one, theirs, rtol=1e-4, atol=1e-5)


def test_experts_without_a_gate_are_left_alone():
    settings = {
        "n_routed_experts": 4,
        "moe_intermediate_size": HIDDEN,
        "mlp_hidden_act": "silu",
        "moe_latent_size": None,
    }
    without = of("nemotron_h", "NemotronHExperts", **settings)
    assert not detr_fast.accelerate(nn.ModuleList([without])).switched


def doubled(forward):
    @functools.wraps(forward)
    def run(self, x):
        return 2 * forward(self, x)

    return run


def overriding():
    class Mine(CopiedFromDinov2):
        forward = doubled(CopiedFromDinov2.forward)

    return Mine()


def hooked():
    block = BLOCKS["Llama"]()
    block.act_fn.register_forward_hook(lambda *_: None)
    return block


def replaced():
    block = BLOCKS["Llama"]()
    block.forward = torch.sigmoid
    return block


LEFT = [
    (overriding, "Mine overrides forward of CopiedFromDinov2"),
    (hooked, "act_fn has hooks, which must see its calls"),
    (replaced, "its forward was replaced on the instance"),
    (lambda: of("llama", "LlamaMLP", hidden_act="relu2"), "its activation transformers.ReLUSquaredActivation is none that the kernel knows"),
    (lambda: mlp.GluMlp(WIDTH, 2 * HIDDEN), "its activation torch.nn.Sigmoid is none that the kernel knows"),
    (lambda: experts("gpt-oss", swiglu_alpha=1.5), "its alpha is 1.5, where the kernel has 1.702"),
    (lambda: experts("DeepSeek V4", swiglu_limit=None), "its limit is None, where the kernel takes a number above 0"),
    (lambda: glu(use_conv=True), "its halves lie in dimension 1, as images' channels"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "reason"), LEFT)
def test_a_block_that_computes_something_else_is_left_alone_and_why_is_said(make, reason):
    block = make()
    kind = type(block)
    report = detr_fast.accelerate(model := nn.ModuleList([block, nn.LayerNorm(4)]))
    assert type(model[0]) is kind
    assert [one.reason for one in report.left] == [reason]


def test_code_that_calls_another_f_or_is_wrapped_is_another_block():
    class Wrapped(nn.Module):
        forward = doubled(CopiedFromDinov2.forward)

    class OfAnotherF(nn.Module):
        forward = type(doubled)(CopiedFromDinov2.forward.__code__, {"F": SimpleNamespace(silu=torch.sigmoid)})

    report = detr_fast.accelerate(nn.ModuleList([Wrapped(), OfAnotherF()]))
    assert not report.switched
