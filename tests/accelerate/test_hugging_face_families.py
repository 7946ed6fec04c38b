"""Models of transformers that copied layers from each other: known by their code, and as before once accelerated."""

from __future__ import annotations

import importlib
from collections import Counter

import pytest
import torch
from torch.func import functional_call

import detr_fast
from detr_fast import use_backend
from detr_fast.adapters import feed_forward, hugging_face_alibi, hugging_face_layers, hugging_face_swin
from detr_fast.adapters.base import fingerprint, reads
from detr_fast.dispatch import BackendError
from detr_fast.explanation import explaining
from detr_fast.testing import assert_as_accurate_as_eager

transformers = pytest.importorskip("transformers")
from tests.accelerate.families import MODELS, SPEECH, decode, lw_detr_layer, seq2seq, source, t5, translate, vision  # noqa: E402


@pytest.mark.parametrize("name", MODELS)
def test_copied_layers_are_as_before_and_run_on_our_ops(name, assert_unchanged):
    torch.manual_seed(1)
    make, call, ops = MODELS[name]
    model = make().train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    report = assert_unchanged(model, call)
    assert all("loss" in one.reason or "runs on 'eager' attention" in one.reason for one in report.left)
    with explaining(model) as records, torch.no_grad(), use_backend(attention="eager"):
        call(model)
    taken = Counter()
    for record in records:
        taken[record.op] += 0 if "+ norm" in record.shapes or "+ residual" in record.shapes else record.calls
    assert {op: taken[op] for op in ops} == ops
    detr_fast.restore(model)
    assert not any("detr_fast" in type(module).__module__ for module in model.modules())


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("DabDetr's encoder", 1),
        ("DabDetr's decoder", 2),
        ("GroundingDino", 3),
        ("Mask2Former", 3),
        ("Mask2Former's decoder", 8),
        ("OneFormer's decoder, normalised first", 8),
        ("GroundingDino's pixels", 1),
        ("GroundingDino's encoder", 9),
        ("OmDetTurbo's encoder", 1),
        ("OmDetTurbo's decoder", 3),
        ("Mask2Former's pixels", 1),
        ("OneFormer's pixels", 1),
    ],
)
def test_weights_that_are_asked_for_are_theirs(name, weights):
    make, call, _ = MODELS[name]
    layer = make().double().eval()
    expected = call(layer, weights=True)
    detr_fast.accelerate(layer)
    with use_backend(attention="sdpa"):
        found = call(layer, weights=True)
    assert len(found) == 1 + weights
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_grounding_dinos_encoder_gives_weights_to_a_hook():
    make, call, _ = MODELS["GroundingDino's encoder"]
    encoder = make().double().eval()
    expected, seen = call(encoder), []
    detr_fast.accelerate(encoder)
    for part in (encoder.layers[0].fusion_layer.attn, encoder.layers[1]):
        part.register_forward_hook(lambda part, given, found: seen.append(found[1]))
    with use_backend(attention="eager"):
        torch.testing.assert_close(call(encoder), expected)
    (_, to_words), weights = seen
    assert [tuple(one.shape) for one in (to_words, *weights[:3])] == [(4, 6, 12), (4, 12, 6), (4, 6, 12), (2, 2, 6, 6)]


@pytest.mark.parametrize("heads", [2, 3])  # the second with a scale that is no power of two
def test_biases_by_distance_are_as_accurate_in_16_bits_as_written_out(heads):
    torch.manual_seed(1)
    options = {"hidden_size": 48, "num_attention_heads": heads, "image_size": 40, "patch_size": 8}
    kind = transformers.models.sam.modeling_sam.SamVisionSdpaAttention
    theirs, ours = (kind(transformers.SamVisionConfig(**options), 0) for _ in range(2))
    detr_fast.accelerate(ours)
    names = [name for name, _ in theirs.named_parameters()]
    parameters = [torch.randn_like(p) * p.shape[-1] ** -0.5 for p in theirs.parameters()]

    def run(module):
        return lambda x, *given: functional_call(module, dict(zip(names, given)), (x,))[0]

    def accelerated(*given):
        with use_backend(attention="eager"):
            return run(ours)(*given)

    inputs = (torch.randn(2, 5, 5, 48), *parameters)
    assert_as_accurate_as_eager(accelerated, reference=run(theirs), inputs=inputs, dtype=torch.bfloat16)


def test_swins_attention_leaves_to_the_registry_what_is_not_ours():
    model = MODELS["Swin"][0]().eval()
    attention = model.encoder.layers[0].blocks[0].attention
    x = torch.randn(8, 16, 16)
    expected = attention(x)[0]
    detr_fast.accelerate(model)
    with use_backend(attention="eager"), pytest.raises(BackendError, match="SwinAttention gives it max_length_q"):
        attention(x, max_length_q=4)
    model.set_attn_implementation("eager")
    with use_backend(attention="eager"):
        y, weights = attention(x)
    torch.testing.assert_close(y, expected)
    assert weights.shape == (8, 2, 16, 16)


GENERATORS = {
    "Bart": lambda: seq2seq("Bart", "ForConditionalGeneration"),
    "Whisper": lambda: seq2seq("Whisper", "ForConditionalGeneration", **SPEECH),
    "T5": lambda: t5(use="ForConditionalGeneration"),
    "MT5, gated": lambda: t5("MT5", "ForConditionalGeneration"),
    "GPT2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=20, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0
        )
    ),
}


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_what_is_generated_stays_the_same_with_and_without_a_cache(name, cache):
    torch.manual_seed(1)
    model = GENERATORS[name]().double().eval()
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "use_cache": cache is not None}
    options["cache_implementation"] = cache
    expected = model.generate(**source(model), **options)
    detr_fast.accelerate(model)
    with explaining(model) as records:
        assert torch.equal(model.generate(**source(model), **options), expected)
    with use_backend(attention="eager"):
        assert torch.equal(model.generate(**source(model), **options), expected)
    assert any(one.op in ("add_layer_norm", "attention") for one in records)


@pytest.mark.parametrize("kind", ["Bart", "Whisper", "T5"])
def test_a_layers_dropout_draws_what_it_drew(kind):
    if kind == "T5":
        model = t5(dropout_rate=0.2)
    else:
        model = seq2seq(kind, activation_dropout=0.2, attention_dropout=0.2, **(SPEECH if kind == "Whisper" else {}))
    model.config.dropout = 0.2
    for module in model.modules():
        if isinstance(getattr(module, "activation_dropout", None), float):
            module.dropout = 0.2
    torch.manual_seed(4)
    (expected,) = translate(model.double().train())
    detr_fast.accelerate(model)
    torch.manual_seed(4)
    with use_backend(attention="sdpa"):
        torch.testing.assert_close(translate(model)[0], expected)


def test_a_block_takes_its_input_by_the_name_that_it_had():
    block = vision("CLIPVision").encoder.layers[0].mlp
    x = torch.randn(2, 3, 32)
    expected = block(hidden_states=x)
    detr_fast.accelerate(block)
    with explaining(block) as records:
        torch.testing.assert_close(block(hidden_states=x), expected)
        for wrong in ({}, {"x": x}, {"hidden_states": x, "more": x}):
            with pytest.raises(TypeError):
                block(**wrong)
    assert [one.op for one in records] == ["feed_forward"]


def test_a_block_whose_layers_differ_in_dtype_is_called():
    """T5's second layer stays in fp32 where the model is in fp16."""
    config = transformers.T5Config(d_model=16, d_ff=24, dropout_rate=0.0, feed_forward_proj="relu")
    block = transformers.models.t5.modeling_t5.T5DenseActDense(config).half()
    block.wo.float()
    x = torch.randn(2, 3, 16, dtype=torch.float16)
    expected = block(x)
    detr_fast.accelerate(block)
    with explaining(block) as records:
        assert torch.equal(block(x), expected)
        block.wo.half()
        block(x)
    assert [one.op for one in records] == ["feed_forward"]


def test_a_block_that_drops_before_its_activation_is_called():
    """SAM 3's; and SAM 2's whose output is a sigmoid's is left alone."""
    config = transformers.models.sam3.configuration_sam3.Sam3ViTConfig(
        hidden_size=16, intermediate_size=24, hidden_dropout=0.5
    )
    block = transformers.models.sam3.modeling_sam3.Sam3MLP(config)
    detr_fast.accelerate(block)
    taken = []
    for training in (True, False):
        with explaining(block.train(training)) as records:
            block(torch.randn(2, 3, 16))
        taken.append([one.op for one in records])
    assert taken == [[], ["feed_forward"]]
    block = transformers.models.sam2.modeling_sam2.Sam2FeedForward(16, 24, 16, 2, sigmoid_output=True)
    assert not detr_fast.accelerate(block).switched


def test_layers_that_read_the_same_are_told_apart_by_what_they_give_their_attentions():
    layers = [transformers.models.rt_detr.modeling_rt_detr.RTDetrDecoderLayer]
    layers += [transformers.models.deformable_detr.modeling_deformable_detr.DeformableDetrDecoderLayer]
    first, second = (layer.forward for layer in layers)
    assert reads(first) == reads(second)
    found = [hugging_face_layers._CODE[fingerprint(forward)].__name__ for forward in (first, second)]
    assert found == ["RTDetrDecoderLayer", "DeformableDetrDecoderLayer"]


def test_a_fingerprint_is_of_what_code_says():
    def one(self, x: int, *, y=None) -> int:
        """Adds."""
        return self.add(x, y)  # here

    def same(self, x, *, y=None):
        return self.add(
            x,
            y,
        )

    def another(self, x, *, y=None):
        return self.add(y, x)

    def other_default(self, x, *, y=0):
        return self.add(x, y)

    assert fingerprint(one) == fingerprint(same) == "40ce2c86bcca5ecb"
    assert len({fingerprint(f) for f in (one, another, other_default)}) == 3
    assert fingerprint(len) is None
    assert fingerprint(eval("lambda self: self")) is None
    two = lambda self: self; assert fingerprint(two) is None  # fmt: skip  # noqa: E702, E731


# Each fingerprint is of a class that transformers has: where it changes, ours has to be looked at again.
KNOWN = {
    "clip.CLIPMLP": feed_forward,
    "detr.DetrMLP": feed_forward,
    "d_fine.DFineMLP": feed_forward,
    "vitdet.VitDetMlp": feed_forward,
    "wav2vec2.Wav2Vec2FeedForward": feed_forward,
    "sam.SamMLPBlock": feed_forward,
    "dinov3_vit.DINOv3ViTMLP": feed_forward,
    "qwen3_vl.Qwen3VLVisionMLP": feed_forward,
    "qwen2_vl.VisionMlp": feed_forward,
    "llava.LlavaMultiModalProjector": feed_forward,
    "voxtral.VoxtralMultiModalProjector": feed_forward,
    "gpt_neo.GPTNeoMLP": feed_forward,
    "gptj.GPTJMLP": feed_forward,
    "gpt_neox.GPTNeoXMLP": feed_forward,
    "focalnet.FocalNetMlp": feed_forward,
    "parakeet.ParakeetEncoderFeedForward": feed_forward,
    "vitpose_backbone.VitPoseBackboneMLP": feed_forward,
    "t5.T5DenseActDense": feed_forward,
    "nllb_moe.NllbMoeDenseActDense": feed_forward,
    "clip.CLIPEncoderLayer": hugging_face_layers,
    "pp_ocrv5_mobile_rec.PPOCRV5MobileRecBlock": hugging_face_layers,
    "yolos.YolosLayer": hugging_face_layers,
    "bart.BartEncoderLayer": hugging_face_layers,
    "mbart.MBartEncoderLayer": hugging_face_layers,
    "bart.BartDecoderLayer": hugging_face_layers,
    "mbart.MBartDecoderLayer": hugging_face_layers,
    "whisper.WhisperDecoderLayer": hugging_face_layers,
    "wav2vec2.Wav2Vec2EncoderLayer": hugging_face_layers,
    "wav2vec2.Wav2Vec2EncoderLayerStableLayerNorm": hugging_face_layers,
    "blip.BlipEncoderLayer": hugging_face_layers,
    "dinov2.Dinov2Layer": hugging_face_layers,
    "gpt2.GPT2Block": hugging_face_layers,
    "opt.OPTDecoderLayer": hugging_face_layers,
    "biogpt.BioGptDecoderLayer": hugging_face_layers,
    "gpt_neo.GPTNeoBlock": hugging_face_layers,
    "gpt_neo.GPTNeoSelfAttention": hugging_face_layers,
    "gptj.GPTJAttention": hugging_face_layers,
    "bloom.BloomBlock": hugging_face_layers,
    "mpt.MptBlock": hugging_face_layers,
    "distilbert.TransformerBlock": hugging_face_layers,
    "sam.SamTwoWayAttentionBlock": hugging_face_layers,
    "dab_detr.DetrAttention": hugging_face_layers,
    "dab_detr.DabDetrAttention": hugging_face_layers,
    "dab_detr.DabDetrDecoderLayerSelfAttention": hugging_face_layers,
    "dab_detr.DabDetrDecoderLayerFFN": hugging_face_layers,
    "dab_detr.DabDetrEncoderLayer": hugging_face_layers,
    "grounding_dino.GroundingDinoMultiheadAttention": hugging_face_layers,
    "mask2former.Mask2FormerAttention": hugging_face_layers,
    "grounding_dino.GroundingDinoDecoderLayer": hugging_face_layers,
    "swin.SwinLayer": hugging_face_layers,
    "swin.SwinAttention": hugging_face_swin,
    "whisper.WhisperAttention": hugging_face_swin,
    "qwen2_audio.Qwen2AudioAttention": hugging_face_swin,
    "maskformer.maskformer_swin.MaskFormerSwinSelfAttention": hugging_face_layers,
    "maskformer.maskformer_swin.MaskFormerSwinLayer": hugging_face_layers,
    "donut.donut_swin.DonutSwinLayer": hugging_face_layers,
    "swinv2.Swinv2SelfAttention": hugging_face_layers,
    "mpnet.MPNetSelfAttention": hugging_face_layers,
    "mpnet.MPNetAttention": hugging_face_layers,
    "data2vec.data2vec_vision.Data2VecVisionSdpaSelfAttention": hugging_face_layers,
    "deformable_detr.DeformableDetrEncoderLayer": hugging_face_layers,
    "deformable_detr.DeformableDetrDecoderLayer": hugging_face_layers,
    "rt_detr.RTDetrDecoderLayer": hugging_face_layers,
    "lw_detr.LwDetrDecoderLayer": hugging_face_layers,
    "d_fine.DFineDecoderLayer": hugging_face_layers,
    "d_fine.DFineGate": hugging_face_layers,
    "omdet_turbo.OmDetTurboEncoderLayer": hugging_face_layers,
    "omdet_turbo.OmDetTurboDeformableTransformerDecoderLayer": hugging_face_layers,
    "lw_detr.LwDetrMLP": hugging_face_layers,
    "grounding_dino.GroundingDinoDeformableLayer": hugging_face_layers,
    "grounding_dino.GroundingDinoEncoder": hugging_face_layers,
    "mm_grounding_dino.MMGroundingDinoEncoder": hugging_face_layers,
    "grounding_dino.GroundingDinoEncoderLayer": hugging_face_layers,
    "grounding_dino.GroundingDinoFusionLayer": hugging_face_layers,
    "grounding_dino.GroundingDinoBiMultiHeadAttention": hugging_face_layers,
    "grounding_dino.GroundingDinoTextEnhancerLayer": hugging_face_layers,
    "sam2.Sam2MultiScaleBlock": hugging_face_layers,
    "sam3.Sam3ViTLayer": hugging_face_layers,
    "hiera.HieraLayer": hugging_face_layers,
    "hiera.HieraMaskUnitAttention": hugging_face_layers,
    "sam.SamVisionSdpaAttention": hugging_face_layers,
    "vitdet.VitDetAttention": hugging_face_layers,
    "vitdet.VitDetLayer": hugging_face_layers,
    "sam2.Sam2FeedForward": feed_forward,
    "sam3.Sam3MLP": feed_forward,
    "sam2.Sam2MultiScaleAttention": hugging_face_swin,
    "mask2former.Mask2FormerPixelDecoderEncoderLayer": hugging_face_layers,
    "oneformer.OneFormerPixelDecoderEncoderLayer": hugging_face_layers,
    "mask2former.Mask2FormerMaskedAttentionDecoderLayer": hugging_face_layers,
    "oneformer.OneFormerTransformerDecoderLayer": hugging_face_layers,
    "rf_detr.RfDetrDinov2Layer": hugging_face_layers,
    "lw_detr.LwDetrViTLayer": hugging_face_layers,
    "dinov3_vit.DINOv3ViTLayer": hugging_face_layers,
    "segformer.SegformerLayer": hugging_face_layers,
    "pvt_v2.PvtV2BlockLayer": hugging_face_layers,
    "pvt_v2.PvtV2SelfAttention": hugging_face_layers,
    "pvt.PvtEfficientSelfAttention": hugging_face_layers,
    "beit.BeitLayer": hugging_face_layers,
    "sam.SamVisionLayer": hugging_face_layers,
    "sam3.Sam3DetrEncoderLayer": hugging_face_layers,
    "sam3.Sam3DetrDecoderLayer": hugging_face_layers,
}


def of(name):
    model, *file, kind = name.split(".")
    return getattr(importlib.import_module(f"transformers.models.{model}.modeling_{file[0] if file else model}"), kind)


def test_all_code_that_is_known_is_transformers():
    found = {feed_forward: set(), hugging_face_layers: set(), hugging_face_swin: set()}
    for name, adapter in KNOWN.items():
        found[adapter].add(fingerprint(of(name).forward))
    assert all(prints == set(adapter._CODE) for adapter, prints in found.items())
    parts = ("bloom.BloomAttention", "bloom.BloomMLP", "mpt.MptAttention", "mpt.MptMLP")
    assert {fingerprint(of(name).forward) for name in parts} == hugging_face_alibi._PARTS


@pytest.mark.parametrize("name", ["LwDetr", "SiglipVision"])
def test_where_kernels_are_asked_about_it_still_compiles_to_one_graph(name):
    make, call, _ = MODELS[name]
    model = make().double().eval()
    with torch.no_grad():
        expected = call(model)[0]
        detr_fast.accelerate(model)
        torch.compiler.reset()
        with use_backend("eager"):
            found = call(torch.compile(model, fullgraph=True, backend="eager"))[0]
    torch.testing.assert_close(found, expected)


def test_where_an_attention_breaks_the_graph_the_layer_around_it_is_compiled_as_theirs_is():
    layer = lw_detr_layer().double().eval()
    layer.cross_attn.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    graphs = []

    def compiled():
        torch.compiler.reset()
        graphs.append(0)
        layer.compile(backend=counting)
        return decode(layer)

    def counting(module, _):
        graphs[-1] += 1
        return module.forward

    expected = compiled()
    detr_fast.accelerate(layer)
    with use_backend("eager"):
        torch.testing.assert_close(compiled(), expected)
    assert graphs == [3, 3]


@pytest.mark.parametrize("where", ["in a subclass", "in the class", "on the instance"])
def test_an_attention_with_another_helper_that_ours_would_not_call_is_left_alone(where, monkeypatch):
    model = MODELS["Pvt"][0]().double().eval()
    attention = next(part for part in model.modules() if type(part).__name__ == "PvtEfficientSelfAttention")
    kind = type(attention)
    theirs = kind.transpose_for_scores

    def transpose_for_scores(self, hidden_states):
        return theirs(self, hidden_states).flip(-1) * 0.5

    if where == "in a subclass":
        body = {"__module__": kind.__module__, "transpose_for_scores": transpose_for_scores}
        attention.__class__ = type("Mine", (kind,), body)
    elif where == "in the class":
        monkeypatch.setattr(kind, "transpose_for_scores", transpose_for_scores)
    else:
        attention.transpose_for_scores = transpose_for_scores.__get__(attention)
    expected = MODELS["Pvt"][1](model)
    report = detr_fast.accelerate(model)
    with use_backend("eager"):
        torch.testing.assert_close(MODELS["Pvt"][1](model), expected)
    (reason,) = {one.reason for one in report.left}
    assert "transpose_for_scores" in reason


def test_what_a_mask_is_joined_with_is_computed_once_for_each_kind_of_layer_and_anew_where_the_mask_changes():
    mask, made = torch.zeros(2), []

    def join() -> torch.Tensor:
        made.append(mask + 1)
        return made[-1]

    for _ in range(2):
        for kind in ("global", "local"):
            hugging_face_alibi.joined_with(mask, (kind,), join)
    assert len(made) == 2
    mask += 1
    assert hugging_face_alibi.joined_with(mask, ("global",), join).tolist() == [2.0, 2.0]
    with torch.inference_mode():
        hugging_face_alibi.joined_with(mask, ("global",), join)
    assert not hugging_face_alibi.joined_with(mask, ("global",), join).is_inference()
