"""RMSNorms, torch.nn's, transformers', timm's and their copies, accelerated: what they were, by one kernel."""

from __future__ import annotations

import copy
import functools
import importlib
import types

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import detr_fast
from detr_fast import use_backend
from detr_fast.adapters import rms_layers, t5_layers
from detr_fast.adapters.base import fingerprint
from detr_fast.explanation import explaining
from detr_fast.testing import count

transformers = pytest.importorskip("transformers")
from tests.accelerate.families import t5, translate  # noqa: E402

timm_layers = pytest.importorskip("timm.layers")
llama = importlib.import_module("transformers.models.llama.modeling_llama")
qwen = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
kimi = importlib.import_module("transformers.models.kimi_linear.modeling_kimi_linear")
deepseek = importlib.import_module("transformers.models.deepseek_v4.modeling_deepseek_v4")
WIDTH = 40
# Of each code that is known one class: its module, its name, and whether its weight is 0 at first.
NORMS = {
    "torch.nn": lambda: nn.RMSNorm(WIDTH, eps=1e-5),
    "Llama": lambda: of("llama", "LlamaRMSNorm"),
    "Olmo2": lambda: of("olmo2", "Olmo2RMSNorm"),
    "Helium": lambda: of("helium", "HeliumRMSNorm"),
    "T5": lambda: of("t5", "T5LayerNorm"),
    "Gemma": lambda: of("gemma", "GemmaRMSNorm"),
    "Moshi": lambda: of("moshi", "MoshiRMSNorm"),
    "Gemma 3n": lambda: of("gemma3n", "Gemma3nRMSNorm"),
    "Gemma 3n, without a weight": lambda: of("gemma3n", "Gemma3nRMSNorm", with_scale=False),
    "DeepSeek V4, without a weight": lambda: deepseek.DeepseekV4UnweightedRMSNorm(1e-5),
    "a copy of Meta's Llama": lambda: CopiedRMSNorm(WIDTH),
    "timm": lambda: timm_layers.RmsNorm(WIDTH, eps=1e-5),
    "timm, without a weight": lambda: timm_layers.RmsNorm(WIDTH, eps=1e-5, affine=False),
}


class CopiedRMSNorm(nn.Module):
    """As it stands in many repositories, and in transformers' Llama 4."""

    def __init__(self, dim: int):
        super().__init__()
        self.eps = 1e-5
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        output = self._norm(x.float()).type_as(x)
        return output * self.weight


def of(model, name, **options):
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    return getattr(module, name)(WIDTH, eps=1e-5, **options)


def pair(name, dtype):
    """A norm with a weight of no ones, and the same accelerated."""
    torch.manual_seed(2)
    original = NORMS[name]().to(dtype)
    with torch.no_grad():
        for weight in original.parameters():
            weight.uniform_(0.5, 2.0)
    ours = copy.deepcopy(original)
    report = detr_fast.accelerate(nn.ModuleDict({"norm": ours}))
    assert [one.name for one in report.switched] == ["norm"]
    assert list(ours.state_dict()) == list(original.state_dict())
    return ours, original


def step(norm, x):
    x = x.detach().requires_grad_()
    y = norm(x)
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, (x, *norm.parameters()), dy)]


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("input", "weight"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),  # as under autocast
    ],
    ids=str,
)
@pytest.mark.parametrize("name", NORMS)
def test_an_accelerated_rms_norm_gives_what_it_did_in_the_same_dtypes(name, input, weight):
    ours, original = pair(name, weight)
    x = (torch.randn(3, 5, WIDTH) * 2 + 1).to(input)
    with use_backend(rms_norm="triton"), explaining(ours) as records:
        found = step(ours, x)
    assert {(r.op, r.chosen) for r in records} == {("rms_norm", "triton")}
    narrow = torch.bfloat16 if torch.bfloat16 in (input, weight) else input
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[narrow]
    exact = step(original.float(), x.float())  # theirs round after each step, ours once
    for one, theirs, truth in zip(found, step(original.to(weight), x), exact, strict=True):
        assert one.dtype == theirs.dtype
        limit = tolerance * float(truth.abs().max())
        assert float((one.float() - truth).abs().max()) <= limit
        assert float((one.float() - theirs.float()).abs().max()) <= limit


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_without_a_kernel_their_own_code_runs(name, dtype):
    ours, original = pair(name, dtype)
    x = torch.randn(3, WIDTH).to(dtype)
    for backend in ({}, {"rms_norm": "eager"}):
        with use_backend(**backend):
            assert all(map(torch.equal, step(ours, x), step(original, x)))
    detr_fast.restore(holder := nn.ModuleList([ours]))
    assert type(holder[0]) is type(original)


def gated(norm, x, gate):
    x, gate = (t.detach().requires_grad_() for t in (x, gate))
    y = norm(x, gate)
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, (x, gate, norm.weight), dy)]


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("input", "weight", "ops"),
    [
        (torch.float32, torch.float32, ["gated_activation", "rms_norm"]),
        (torch.bfloat16, torch.bfloat16, ["gated_activation", "rms_norm"]),
        (torch.bfloat16, torch.float32, ["rms_norm"]),  # whose product is in fp32, and the gate is not
    ],
    ids=str,
)
def test_a_norm_that_is_gated_is_as_accurate_as_theirs(input, weight, ops):
    torch.manual_seed(2)
    original = qwen.Qwen3NextRMSNormGated(WIDTH, eps=1e-5).to(weight)
    torch.nn.init.uniform_(original.weight, 0.5, 2.0)
    ours = copy.deepcopy(original)
    assert detr_fast.accelerate(nn.ModuleList([ours])).switched
    given = [(torch.randn(15, WIDTH) * 2 + 1).to(input), torch.randn(15, WIDTH).to(input)]
    with use_backend(rms_norm="triton", gated_activation="triton"), explaining(ours) as records:
        found = gated(ours, *given)
    assert sorted(r.op for r in records) == ops
    theirs, exact = gated(original, *given), gated(original.double(), *(t.double() for t in given))
    for one, other, truth in zip(found, theirs, exact, strict=True):
        assert one.dtype == other.dtype
        floor = 4 * torch.finfo(input).eps * float(truth.abs().max())
        assert float((one - truth).abs().max()) <= 2 * float((other - truth).abs().max()) + floor


@pytest.mark.parametrize("change", ["cpu", "eager", "sigmoid", "broadcast"])
def test_of_a_gated_norm_what_no_kernel_takes_is_theirs(change):
    original = qwen.Qwen3NextRMSNormGated(WIDTH, eps=1e-5)
    original.activation = "sigmoid" if change == "sigmoid" else "silu"
    ours, x = copy.deepcopy(original), torch.randn(3, WIDTH)
    gate = torch.randn(1 if change == "broadcast" else 3, WIDTH)
    detr_fast.accelerate(nn.ModuleList([ours]))
    with use_backend(**{} if change == "cpu" else {"rms_norm": "eager", "gated_activation": "eager"}):
        assert all(map(torch.equal, gated(ours, x, gate), gated(original, x, gate)))


MORE = {
    "Mixtral": {"num_local_experts": 2, "experts_implementation": "eager"},  # others take no fp64
    "Granite": {"residual_multiplier": 0.5},
    "Gemma3": {"rope_parameters": None},
}


def language_model(kind):
    sizes = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, **MORE.get(kind, {})}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")(**sizes, **tokens)
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 2.0)
    return model.train()


IDS = torch.arange(3, 15).view(2, 6)
PADDING = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])


def read(model):
    return [model(input_ids=IDS, attention_mask=PADDING).logits]


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Mixtral", "Granite", "Phi3", "Gemma3", "Glm4", "Starcoder2"])
def test_a_language_model_is_as_before(kind, assert_unchanged):
    model = language_model(kind)
    report = assert_unchanged(model, read)
    assert sum(("LayerNorm" if kind == "Starcoder2" else "RMSNorm") in one.now for one in report.switched) >= 5
    assert sum(one.now.endswith("DecoderLayer") for one in report.switched) == 2


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("kind", "hooked", "counted"),
    [
        ("Llama", False, (2, 3)),
        ("Llama", True, (0, 5)),
        ("Granite", False, (2, 3)),
        ("Gemma3", False, (2, 11)),
        ("Starcoder2", False, (2, 3)),
        ("T5", False, (6, 6)),
        ("T5", True, (0, 12)),
    ],
)
def test_a_layers_second_norm_takes_the_sum_before_it_unless_it_has_hooks(kind, hooked, counted, step):
    model, call = (t5().float(), translate) if kind == "T5" else (language_model(kind), read)
    outputs, gradients = step(model, call)
    detr_fast.accelerate(model)
    if hooked:
        for module in [*model.modules()]:
            if type(module).__name__ in ("LlamaDecoderLayer", "T5Block"):
                part = module.layer[0] if kind == "T5" else module.post_attention_layernorm
                part.register_forward_hook(lambda *_: None)
    norm = "layer_norm" if kind == "Starcoder2" else "rms_norm"
    with explaining(model) as records:
        found, found_gradients = step(model, call, {norm: "triton", f"add_{norm}": "triton"})
    added = sum(r.calls for r in records if (r.op, r.chosen) == (f"add_{norm}", "triton"))
    alone = sum(r.calls for r in records if (r.op, r.chosen) == (norm, "triton"))
    assert (added, alone) == counted
    torch.testing.assert_close(found, outputs, rtol=1e-4, atol=1e-4)
    for name, expected in gradients.items():
        torch.testing.assert_close(found_gradients[name], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


LAYERS = "llama.Llama mixtral.Mixtral granite.Granite phi3.Phi3 gemma3.Gemma3 glm4.Glm4 glm4v.Glm4vText"
BLOCKS = "t5.T5Block umt5.UMT5Block longt5.LongT5Block"
T5_PARTS = "SelfAttention CrossAttention LocalSelfAttention TransientGlobalSelfAttention FF"


def test_the_code_of_each_layer_that_is_known_is_transformers():
    found = set()
    for name in [*(f"{layer}DecoderLayer" for layer in LAYERS.split()), "qwen2_vl.Qwen2VLVisionBlock", *BLOCKS.split()]:
        model, kind = name.split(".")
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        found.add(fingerprint(getattr(module, kind).forward))
    assert found == set(rms_layers._CODE)


def test_the_code_of_t5s_blocks_parts_is_transformers():
    found = set()
    for model, of in (
        ("t5", "T5"),
        ("umt5", "UMT5"),
        ("longt5", "LongT5"),
        ("switch_transformers", "SwitchTransformers"),
    ):
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        layers = [getattr(module, f"{of}Layer{part}", None) for part in T5_PARTS.split()]
        found |= {fingerprint(layer.forward) for layer in layers if layer is not None}
    assert found == set(t5_layers._LAYERS)


class VisionBlocks(nn.Module):
    """A block of Qwen2-VL's vision model, and one of Qwen2.5-VL's, which normalises otherwise."""

    def __init__(self):
        super().__init__()
        for model, of in (("qwen2_vl", "Qwen2VL"), ("qwen2_5_vl", "Qwen2_5_VL")):
            sizes = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4}
            module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
            settings = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
            config = getattr(settings, f"{of}VisionConfig")(**sizes)
            config._attn_implementation = "sdpa"
            setattr(self, model, getattr(module, f"{of}VisionBlock")(config))

    def forward(self, x):
        angles = torch.linspace(0, 3, 6 * 8, dtype=x.dtype).view(6, 8)
        for block in self.children():
            x = block(x, torch.tensor([0, 4, 6]), position_embeddings=(angles.cos(), angles.sin()))
        return x


def test_blocks_of_vision_models_take_their_second_norm_with_the_sum(assert_unchanged):
    torch.manual_seed(1)
    x = torch.randn(6, 32, dtype=torch.float64)
    report = assert_unchanged(VisionBlocks(), lambda model: [model(x)])
    assert sum("VisionBlock" in one.now for one in report.switched) == 2
    assert not report.left


@pytest.mark.parametrize(("name", "launches"), [("NewGELUActivation", 8), ("FastGELUActivation", 9)])
def test_a_gelu_that_is_written_out_is_one_launch(name, launches, assert_unchanged):
    activation = getattr(transformers.activations, name)()
    kind, x = type(activation), torch.linspace(-6, 6, 61, device="meta", dtype=torch.bfloat16)
    counted = [count(lambda: activation(x)).total_launches]
    model = nn.Sequential(nn.Linear(1, 61), activation)
    assert_unchanged(model, lambda one: [one(torch.linspace(-6, 6, 61, dtype=torch.float64)[:, None])])
    with use_backend("triton"):
        counted.append(count(lambda: activation(x)).total_launches)
    assert counted == [launches, 1]
    detr_fast.restore(activation)
    assert type(activation) is kind


def test_a_small_call_on_a_gpu_launches_no_more_than_it_did(unmeasured):
    launches = []
    for accelerated in (False, True):
        with FakeTensorMode(), torch.device("cuda"):
            norm = of("gemma", "GemmaRMSNorm")
            norm.weight = nn.Parameter(torch.empty(WIDTH, dtype=torch.bfloat16))
            if accelerated:
                detr_fast.accelerate(norm)
            x = torch.empty(1, WIDTH, dtype=torch.bfloat16)
            launches.append(count(lambda norm=norm, x=x: norm(x)).total_launches)
    assert launches[0] == launches[1]


@pytest.mark.parametrize("name", NORMS)
def test_under_autocast_on_a_gpu_the_dtype_is_theirs(name, unmeasured):
    torch.set_autocast_enabled("cuda", True)  # `torch.autocast` wants a GPU
    try:
        with FakeTensorMode(), torch.device("cuda"), torch.no_grad(), use_backend(rms_norm="triton"):
            model = nn.ModuleList([NORMS[name]()])
            x = torch.empty(7, WIDTH, dtype=torch.bfloat16)
            expected = model[0](x).dtype
            detr_fast.accelerate(model)
            assert model[0](x).dtype == expected
    finally:
        torch.set_autocast_enabled("cuda", False)


def doubled(forward):
    @functools.wraps(forward)
    def run(self, x):
        return 2 * forward(self, x)

    return run


def overriding():
    class Mine(llama.LlamaRMSNorm):
        forward = doubled(llama.LlamaRMSNorm.forward)

    return Mine(WIDTH)


def with_another_norm():
    class Mine(CopiedRMSNorm):
        def _norm(self, x):
            return super()._norm(x - x.mean(-1, keepdim=True))

    return Mine(WIDTH)


def wrapped():
    class WrappedRMSNorm(nn.Module):
        eps, weight = 1e-5, 1.0
        _norm, forward = CopiedRMSNorm._norm, doubled(CopiedRMSNorm.forward)

    return WrappedRMSNorm()


def of_another_torch():
    class OtherRMSNorm(nn.Module):
        eps, weight = 1e-5, 1.0
        _norm = types.FunctionType(CopiedRMSNorm._norm.__code__, {"torch": types.SimpleNamespace(rsqrt=torch.sqrt)})
        forward = CopiedRMSNorm.forward

    return OtherRMSNorm()


def replaced():
    norm = CopiedRMSNorm(WIDTH)
    norm._norm = torch.sigmoid
    return norm


UNKNOWN = "its code is that of no RMSNorm that is known here"
LEFT = [
    (overriding, "Mine overrides forward or _norm of LlamaRMSNorm"),
    (with_another_norm, "Mine overrides forward or _norm of CopiedRMSNorm"),
    (wrapped, UNKNOWN),
    (of_another_torch, UNKNOWN),
    (replaced, "its _norm was replaced on the instance"),
    (lambda: kimi.KimiLinearRMSNormGated(WIDTH), UNKNOWN),  # normalises, and then multiplies by a sigmoid
]


@pytest.mark.parametrize(("make", "reason"), LEFT)
def test_a_norm_that_computes_something_else_is_left_alone_and_why_is_said(make, reason):
    norm = make()
    kind = type(norm)
    report = detr_fast.accelerate(model := nn.ModuleList([norm, nn.LayerNorm(4)]))
    assert type(model[0]) is kind
    assert [one.reason for one in report.left] == [reason]


@pytest.mark.interpreter
def test_an_eps_that_is_a_tensor_is_read_by_the_norms_own_code():
    norm = CopiedRMSNorm(WIDTH)
    norm.eps = torch.tensor(0.5)
    expected = norm(x := torch.randn(3, WIDTH))
    detr_fast.accelerate(model := nn.ModuleList([norm]))
    with use_backend(rms_norm="triton"):
        assert torch.equal(model[0](x), expected)
