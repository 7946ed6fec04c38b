from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn as torch_nn

from detr_fast import nn, use_backend
from detr_fast.models import ImageSource, Seq2Seq, TextSource

ROUNDING = {"rtol": 1e-9, "atol": 1e-9}  # in fp64
CACHES = ["growing", "static"]
WORDS, VOCABULARY = 11, 7
SENTENCES = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 3, 4, 0, 0], [5, 0, 0, 0, 0, 0]])
TARGETS = torch.tensor([[3, 4, 5, 2], [6, 2, 0, 0], [2, 0, 0, 0]])


def text_source():
    return TextSource(nn.TokenEmbedding(WORDS, 16, padding_idx=0))


def image_source(embedding=None):
    embedding = nn.PatchEmbedding(3, 16, 2, flatten=False) if embedding is None else embedding
    return ImageSource(embedding, nn.SinePositionEmbedding2D(16))


def build(source=None, **options):
    """A small Seq2Seq in fp64 whose every parameter counts: torch starts biases at 0 and norms at 1."""
    torch.manual_seed(6)  # writes different and changing tokens for each sentence, which most seeds do not
    sizes = {"d_model": 16, "nhead": 4, "num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 24}
    model = Seq2Seq(source or text_source(), VOCABULARY, **sizes, **options).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            if name.startswith("head"):
                parameter.mul_(4.0)  # so that choices differ from sequence to sequence
    return model.eval()


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("norm_first", [False, True])
def test_logits_are_those_of_torch_nns_transformer(norm_first):
    model = build(norm_first=norm_first)
    twin = torch_nn.Transformer(16, 4, 2, 2, 24, batch_first=True, norm_first=norm_first, dtype=torch.float64).eval()
    own = model.state_dict()
    twin.load_state_dict({key: own[key] for key in twin.state_dict()})
    padding = SENTENCES == 0
    inputs = torch.cat((torch.ones(3, 1, dtype=torch.long), TARGETS[:, :-1]), 1)
    features = twin(
        model.source(SENTENCES)[0],
        model.position(model.target(inputs)),
        tgt_mask=torch.full((4, 4), -torch.inf, dtype=torch.float64).triu(1),
        src_key_padding_mask=padding,
        memory_key_padding_mask=padding,
    )
    logits = model(SENTENCES, TARGETS)
    torch.testing.assert_close(logits, F.linear(features, model.head.weight, model.head.bias), **ROUNDING)
    loss = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), ignore_index=0)
    torch.testing.assert_close(model(SENTENCES, TARGETS, return_loss=True), loss, **ROUNDING)


def test_no_target_sees_itself_or_what_follows():
    model = build()
    logits = model(SENTENCES, TARGETS)
    changed = TARGETS.clone()
    changed[:, 2] = 6
    again = model(SENTENCES, changed)
    torch.testing.assert_close(again[:, :3], logits[:, :3], **ROUNDING)
    assert (again[:, 3] - logits[:, 3]).abs().max() > 0.01


@pytest.mark.parametrize("training", [False, True])
def test_padding_of_the_source_changes_nothing(training):
    model = build(dropout=0.0).train(training)
    short = model(SENTENCES[1:2, :4], TARGETS[1:2])
    padded = model(SENTENCES[1:2], TARGETS[1:2])
    torch.testing.assert_close(padded, short, **ROUNDING)
    explicit = model(SENTENCES[:1], TARGETS[:1], SENTENCES[1:2] == 0)
    torch.testing.assert_close(explicit, model(SENTENCES[:1, :4], TARGETS[:1]), **ROUNDING)


def test_padding_of_an_image_changes_nothing_once_positions_are_normalised():
    model = build(image_source())
    images = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    mask = torch.zeros(2, 8, 6, dtype=torch.bool)
    mask[1, 4:] = True
    mask[1, :, 4:] = True
    whole = model(images[1:, :, :4, :4], TARGETS[:1])
    # Bottom and right of the padding the padded image holds noise, which nothing may see.
    padded = model(images, TARGETS[:2].flip(0), mask)[1:]
    torch.testing.assert_close(padded, whole, **ROUNDING)


@pytest.mark.parametrize(
    ("embedding", "shape", "tokens"),
    [
        (nn.PatchEmbedding(3, 16, (4, 2), flatten=False), (3, 8, 6), 6),
        (nn.PixelEmbedding(5, 16, flatten=False), (5, 2, 3), 6),
    ],
    ids=["patches", "pixels"],
)
def test_images_and_feature_maps_are_sources(embedding, shape, tokens):
    model = build(image_source(embedding))
    images = torch.randn(2, *shape, dtype=torch.float64)
    memory, padding = model.encode(images)
    assert memory.shape == (2, tokens, 16)
    assert padding is None
    assert model.generate(images, 5).shape[0] == 2
    model.train()(images, TARGETS[:2], return_loss=True).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_each_block_takes_the_previous_ones_output_and_keys_and_values_from_the_encoders_last():
    model = build()
    seen = {}

    def remember(name):
        return lambda module, args, kwargs, output: seen.__setitem__(name, (args, kwargs, output))

    for name, module in model.named_modules():
        module.register_forward_hook(remember(name), with_kwargs=True)
    model(SENTENCES, TARGETS)
    memory = seen["encoder"][2]
    first, second = seen["decoder.layers.0"], seen["decoder.layers.1"]
    assert second[0][0] is first[2]
    assert first[0][1] is memory
    assert second[0][1] is memory
    assert seen["decoder.layers.1.multihead_attn"][0][1] is memory
    assert seen["decoder.layers.1.multihead_attn"][0][2] is memory


@pytest.mark.parametrize("kind", ["learned", "zeros", "random"])
def test_queries_are_filled_all_at_once(kind):
    model = build(queries=nn.DecoderQueries(4, 16, kind), dropout=0.0)
    torch.manual_seed(0)
    logits = model(SENTENCES)
    assert logits.shape == (3, 4, VOCABULARY)
    torch.manual_seed(0)
    inputs = model.position(model.queries(torch.empty(3, 1, 16, dtype=torch.float64)))
    memory, padding = model.encode(SENTENCES)
    expected = model.head.logits(model.decoder(inputs, memory, memory_key_padding_mask=padding))
    torch.testing.assert_close(logits, expected, **ROUNDING)
    assert (logits[:, 0] - logits[:, 1]).abs().max() > 0.01  # zeros differ by their positions
    torch.manual_seed(0)
    loss = model(SENTENCES, TARGETS, return_loss=True)
    torch.testing.assert_close(
        loss, F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), ignore_index=0), **ROUNDING
    )


def greedily(model, source, steps):
    """Decoding as its definition has it: all tokens so far through the whole model, the likeliest next one appended."""
    written = torch.empty(len(source), 0, dtype=torch.long)
    for _ in range(steps):
        next_one = torch.zeros(len(source), 1, dtype=torch.long)
        logits = model(source, torch.cat((written, next_one), 1))[:, -1]
        logits[:, :2] = -torch.inf
        ended = (written == 2).any(1)
        written = torch.cat((written, logits.argmax(-1).where(~ended, 0)[:, None]), 1)
    return written


@pytest.mark.parametrize("cache", [*CACHES, None])
@pytest.mark.parametrize("norm_first", [False, True])
def test_greedy_decoding_is_the_definitions(norm_first, cache):
    model = build(norm_first=norm_first)
    written = model.generate(SENTENCES, 20, cache=cache)  # longer than the growing cache's first buffer
    expected = greedily(model, SENTENCES, 20)
    assert torch.equal(F.pad(written, (0, 20 - written.shape[1])), expected)
    assert len(written.unique(dim=0)) == 3


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("position", ["sines", "learned"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("backend", [{}, {"attention": "eager"}], ids=str)
def test_every_cached_step_has_the_logits_of_decoding_without_a_cache(backend, norm_first, position, cache):
    from detr_fast.models import decoding

    model = build(
        norm_first=norm_first, position=nn.LearnedPositionalEmbedding(18, 16) if position == "learned" else None
    )
    tokens = torch.randint(2, VOCABULARY, (18, 6))
    with torch.no_grad(), use_backend(**backend):
        memory, padding = model.encode(SENTENCES)
        cached, plain = (
            decoding.start(model, memory, padding, cache=kind, capacity=18, copies=2) for kind in (cache, None)
        )
        for step, newest in enumerate(tokens):
            torch.testing.assert_close(cached.step(newest), plain.step(newest), **ROUNDING)
            rows = torch.tensor([1, 1, 2, 3, 5, 4]) if step % 5 == 4 else torch.arange(6)
            cached.reorder(rows)
            plain.reorder(rows)


@pytest.mark.parametrize("cache", CACHES)
def test_sampling_and_beams_with_a_cache_are_those_without(cache):
    model = build()
    options = {"top_k": 3, "temperature": 1.5}
    drawn = [
        model.generate(SENTENCES, 18, **options, generator=torch.Generator().manual_seed(3), cache=c)
        for c in (cache, None)
    ]
    assert torch.equal(*drawn)
    for penalty in (0.0, 1.0):
        found = [model.beam_search(SENTENCES, 18, beams=3, length_penalty=penalty, cache=c) for c in (cache, None)]
        assert torch.equal(found[0].tokens, found[1].tokens)
        torch.testing.assert_close(found[0].scores, found[1].scores, **ROUNDING)


def test_sampling_draws_only_the_likeliest_by_their_probabilities():
    model = build()
    source = SENTENCES[:1].expand(20_000, -1)
    memory, padding = model.encode(SENTENCES[:1])
    logits = model.head.logits(model.decode(torch.ones(1, 1, dtype=torch.long), memory, padding))[0, 0].detach()
    logits[:2] = -torch.inf
    values, indices = logits.topk(3)
    drawn = model.generate(source, 1, top_k=3, temperature=2.0)[:, 0]
    frequencies = torch.bincount(drawn, minlength=VOCABULARY) / len(drawn)
    expected = torch.zeros(VOCABULARY).index_copy(0, indices, (values / 2.0).softmax(-1).float())
    torch.testing.assert_close(frequencies, expected, rtol=0.0, atol=0.02)
    assert torch.equal(frequencies > 0, expected > 0)
    assert torch.equal(model.generate(SENTENCES, 8, top_k=1), model.generate(SENTENCES, 8))


def every_sequence(length):
    """All that can be written in at most `length` tokens: 3 to 6, ended by 2 or by the length."""
    for count in range(length):
        yield from ((*words, 2) for words in itertools.product(range(3, VOCABULARY), repeat=count))
    yield from itertools.product(range(3, VOCABULARY), repeat=length)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 0.6])
def test_a_beam_search_with_room_for_all_finds_the_best_of_all(penalty):
    model = build()
    sequences = [torch.tensor([*words, *[0] * (3 - len(words))]) for words in every_sequence(3)]
    targets = torch.stack(sequences)
    found = model.beam_search(SENTENCES, 3, beams=len(sequences), length_penalty=penalty)
    for row, source in enumerate(SENTENCES):
        log_prob = model(source.expand(len(targets), -1), targets).log_softmax(-1)
        scores = (log_prob.gather(2, targets[..., None]).squeeze(2) * (targets != 0)).sum(1)
        scores, order = (scores / (targets != 0).sum(1).double() ** penalty).sort(descending=True)
        torch.testing.assert_close(found.scores[row], scores.detach(), **ROUNDING)
        assert torch.equal(found.tokens[row], targets[order])


def test_one_beam_is_greedy_and_more_are_no_worse():
    model = build()
    one = model.beam_search(SENTENCES, 10, beams=1)
    greedy = model.generate(SENTENCES, 10)
    assert torch.equal(one.tokens[:, 0], greedy)
    assert (model.beam_search(SENTENCES, 10, beams=8).scores[:, 0] >= one.scores[:, 0] - 1e-9).all()


def test_beams_for_which_there_is_no_sequence_are_empty():
    found = build().beam_search(SENTENCES, 1, beams=7)  # only 2 to 6 can be written
    assert found.scores.isneginf().tolist() == [[False] * 5 + [True] * 2] * 3
    assert found.tokens[:, 5:].unique().tolist() == [0]


def test_sequences_end_with_eos_and_padding_and_no_longer_than_they_must():
    model = build()
    written = model.generate(SENTENCES.repeat(4, 1), 30, top_k=5, temperature=50.0)
    assert written.shape[1] < 30
    for row in written.tolist():
        end = row.index(2)
        assert set(row[:end]) <= {3, 4, 5, 6}
        assert set(row[end + 1 :]) <= {0}
    assert (written[:, -1] == 2).any()


def test_a_static_caches_step_is_one_graph_for_all_positions():
    from torch._dynamo.testing import CompileCounterWithBackend

    from detr_fast.models import decoding

    model = build().requires_grad_(False)
    memory, padding = model.encode(SENTENCES)
    compiled, plain = (decoding.start(model, memory, padding, cache="static", capacity=5) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(compiled.step, fullgraph=True, backend=counter)
    for newest in torch.randint(2, VOCABULARY, (5, 3)):
        torch.testing.assert_close(step(newest), plain.step(newest), **ROUNDING)
    assert counter.frame_count == 1


def test_decoding_leaves_modes_and_gradients_as_they_were():
    model = build().train()
    model.encoder.eval()
    before = [module.training for module in model.modules()]
    written = model.generate(SENTENCES, 5)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(written, model.eval().generate(SENTENCES, 5))  # there was no dropout
    assert not model.beam_search(SENTENCES, 3).scores.requires_grad


def test_layers_start_different_from_each_other():
    model = Seq2Seq(text_source(), VOCABULARY, 16, 4, 2, 2, 24)
    for stack in (model.encoder, model.decoder):
        assert not torch.equal(stack.layers[0].linear1.weight, stack.layers[1].linear1.weight)


def test_embedding_and_head_can_be_tied_and_saved():
    model = build()
    model.head.weight = model.target.weight
    twin = build()
    twin.head.weight = twin.target.weight
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(SENTENCES, TARGETS), model(SENTENCES, TARGETS))
    assert len(list(twin.parameters())) == len(list(build().parameters())) - 1


@pytest.mark.parametrize("cache", [*CACHES, None])
def test_a_source_of_nothing_but_padding_or_of_nothing_and_an_empty_batch_do_not_hurt(cache):
    model = build()
    source = torch.cat((SENTENCES[:1], torch.zeros(1, 6, dtype=torch.long)))
    alone = model.generate(SENTENCES[:1], 6, cache=cache)
    together = model.generate(source, 6, cache=cache)
    assert torch.equal(F.pad(together[:1], (0, 6 - together.shape[1])), F.pad(alone, (0, 6 - alone.shape[1])))
    assert model.generate(SENTENCES[:0], 6, cache=cache).shape == (0, 0)
    assert model.beam_search(SENTENCES[:0], 6, beams=2, cache=cache).tokens.shape == (0, 2, 0)
    nothing = SENTENCES[:1, :0]
    assert model.generate(nothing, 6, cache=cache).shape[0] == 1
    torch.testing.assert_close(model(nothing, TARGETS[:1]), model(source[1:], TARGETS[:1]), **ROUNDING)
    assert model.train()(SENTENCES[:0], TARGETS[:0]).shape == (0, 4, VOCABULARY)


def test_a_layer_that_a_cache_does_not_know_is_refused_and_decodes_without():
    class Loud(nn.TransformerDecoderLayer):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    model = build()
    model.decoder.layers[1].__class__ = Loud
    with pytest.raises(TypeError, match=r"exactly nn\.TransformerDecoderLayer; got Loud: use cache=None"):
        model.generate(SENTENCES, 4)
    assert torch.equal(model.generate(SENTENCES, 4, cache=None), greedily(model, SENTENCES, 4))


@pytest.mark.parametrize(
    "part", ["decoder", "decoder.layers.1", "decoder.layers.0.self_attn", "decoder.layers.1.multihead_attn"]
)
def test_what_a_cache_would_pass_over_is_refused_and_counts_without(part):
    model = build()
    handle = model.get_submodule(part).register_forward_hook(
        lambda m, _, y: (2 * y[0], *y[1:]) if isinstance(y, tuple) else 2 * y
    )
    for cache in CACHES:
        with pytest.raises(TypeError, match="which a cache would pass over: use cache=None"):
            model.generate(SENTENCES, 4, cache=cache)
    assert torch.equal(model.generate(SENTENCES, 4, cache=None), greedily(model, SENTENCES, 4))
    handle.remove()
    model.generate(SENTENCES, 4)


def test_a_decoder_of_the_users_decodes_without_a_cache():
    class Louder(nn.TransformerDecoder):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    model = build()
    model.decoder.__class__ = Louder
    with pytest.raises(TypeError, match=r"the decoder, a Louder, is wrapped, hooked or replaced.*use cache=None"):
        model.generate(SENTENCES, 4)
    assert torch.equal(model.generate(SENTENCES, 4, cache=None), greedily(model, SENTENCES, 4))


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 16, "vdim": 15}])
@pytest.mark.parametrize("part", ["self_attn", "multihead_attn"])
def test_attention_to_more_than_was_written_is_refused_with_a_cache(part, options):
    model = build()
    setattr(model.decoder.layers[1], part, nn.MultiheadAttention(16, 2, batch_first=True, **options).double())
    for cache in CACHES:
        with pytest.raises(TypeError, match=rf"{part} has add_bias_kv.*which a cache does not know: use cache=None"):
            model.generate(SENTENCES, 4, cache=cache)
    if "kdim" not in options:
        assert torch.equal(model.generate(SENTENCES, 4, cache=None), greedily(model, SENTENCES, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(SENTENCES), r"without queries needs targets \(N, L\); to write tokens, call generate"),
        (
            lambda m: build(queries=nn.DecoderQueries(2, 16))(SENTENCES, return_loss=True),
            "return_loss=True needs targets",
        ),
        (lambda m: build(queries=nn.DecoderQueries(2, 16)).generate(SENTENCES, 3), "writes all tokens at once"),
        (lambda m: m(SENTENCES, TARGETS[:2]), "got 3 sources but 2 targets"),
        (lambda m: m(SENTENCES[0], TARGETS), r"takes token ids \(N, S\); got \(6,\)"),
        (lambda m: m.generate(SENTENCES, 0), "got max_length=0"),
        (
            lambda m: m.generate(SENTENCES, 3, cache="dynamic"),
            "got cache='dynamic'; expected 'growing', 'static' or None",
        ),
        (lambda m: m.generate(SENTENCES, 3, top_k=0), "got top_k=0"),
        (lambda m: m.generate(SENTENCES, 3, top_k=2, temperature=0.0), "got temperature=0.0; expected more than 0"),
        (lambda m: m.generate(SENTENCES, 3, top_k=2, temperature=float("nan")), "got temperature=nan"),
        (lambda m: m.generate(SENTENCES, 3, temperature=0.5), "are for sampling: pass top_k as well"),
        (lambda m: m.beam_search(SENTENCES, 3, beams=0), "got 0 beams"),
        (lambda m: build(eos_idx=7), r"must lie in \[0, 7\), the vocabulary; got .*'eos_idx': 7"),
        (lambda m: build(eos_idx=1), "eos_idx must be a token of its own"),
        (lambda m: ImageSource(nn.PixelEmbedding(3, 16), nn.Identity()), r"need PixelEmbedding\(…, flatten=False\)"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_told_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call(build())
