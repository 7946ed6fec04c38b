from __future__ import annotations

import copy
import importlib
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from detr_fast import accelerate, restore, use_backend
from detr_fast.testing import count

pytest.importorskip("transformers")

OF_A_SHAPE = {
    "detr.modeling_detr.DetrSinePositionEmbedding": {},
    "conditional_detr.modeling_conditional_detr.ConditionalDetrSinePositionEmbedding": {},
    "deformable_detr.modeling_deformable_detr.DeformableDetrSinePositionEmbedding": {},
    "maskformer.modeling_maskformer.MaskFormerSinePositionEmbedding": {},
    "mask2former.modeling_mask2former.Mask2FormerSinePositionEmbedding": {},
    "oneformer.modeling_oneformer.OneFormerSinePositionEmbedding": {},
    "sam2.modeling_sam2.Sam2SinePositionEmbedding": {},
    "sam3.modeling_sam3.Sam3SinePositionEmbedding": {},
}
OF_A_MASK = {
    "grounding_dino.modeling_grounding_dino.GroundingDinoSinePositionEmbedding": None,
    "table_transformer.modeling_table_transformer.TableTransformerSinePositionEmbedding": {"embedding_dim": 16},
}


def find(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"transformers.models.{module}"), name)


def visible_of(height, width, *sizes):
    mask = torch.zeros(len(sizes), height, width, dtype=torch.bool)
    for image, (rows, columns) in zip(mask, sizes):
        image[:rows, :columns] = True
    return mask


MASK = visible_of(7, 9, (7, 9), (5, 4))


class Model(torch.nn.Module):
    def __init__(self, position):
        super().__init__()
        self.position = position

    def forward(self, *args, **kwargs):
        return self.position(*args, **kwargs)


@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("path", OF_A_SHAPE)
def test_positions_of_a_shape_are_theirs(path, normalize):
    model = Model(find(path)(num_position_features=16, normalize=normalize, temperature=20))
    given = {"shape": torch.Size([2, 8, 7, 9]), "device": torch.device("cpu"), "mask": MASK}
    expected = model(**given, dtype=torch.float32)
    report = accelerate(model)
    assert len(report.switched) == 1
    torch.testing.assert_close(model(**given, dtype=torch.float32), expected, rtol=0, atol=0)  # on a CPU theirs
    with use_backend("eager"):
        found = model(**given, dtype=torch.float32)
        rounded = model(**given, dtype=torch.bfloat16)
    # Of pixels that are padding in all of their row or column nobody asks.
    seen = (MASK.any(1, keepdim=True) & MASK.any(2, keepdim=True))[:, None].expand_as(expected)
    torch.testing.assert_close(found[seen], expected[seen])
    torch.testing.assert_close(rounded, found.bfloat16())
    restore(model)
    assert type(model.position) is find(path)


@pytest.mark.parametrize("path", OF_A_MASK)
def test_positions_of_a_mask_are_theirs(path):
    options = OF_A_MASK[path]
    config = types.SimpleNamespace(d_model=32, positional_embedding_temperature=20)
    position = find(path)(config) if options is None else find(path)(**options, normalize=True)
    model, features = Model(position), torch.zeros(2, 8, 7, 9)
    expected = model(features, MASK)
    assert len(accelerate(model).switched) == 1
    with use_backend("eager"):
        torch.testing.assert_close(copy.deepcopy(model)(features, MASK), expected)
        torch.testing.assert_close(model(features, MASK.long()), expected, rtol=0, atol=0)  # theirs


def test_a_gpu_takes_one_launch_and_theirs_where_there_is_no_mask():
    model = Model(find("detr.modeling_detr.DetrSinePositionEmbedding")(128, normalize=True))
    accelerate(model)
    with FakeTensorMode():
        mask = torch.ones(2, 25, 34, dtype=torch.bool, device="cuda")
        given = (torch.Size([2, 8, 25, 34]), torch.device("cuda"), torch.float32)
        counts = count(lambda: model(*given, mask))
        assert dict(counts.launches) == {"sine_positions_kernel": 1}
        assert "sine_positions_kernel" not in count(lambda: model(*given, None)).launches


def test_a_builder_of_the_users_own_is_left_alone():
    kind = find("detr.modeling_detr.DetrSinePositionEmbedding")

    class Own(kind):
        @staticmethod
        def build_sine_position_embedding(*args):
            return torch.zeros(1)

    for position in (Own(8), kind(8)):
        if type(position) is kind:
            position.build_sine_position_embedding = lambda *args: torch.zeros(1)
        model = Model(position)
        accelerate(model)
        with use_backend("eager"):
            assert model(torch.Size([1, 1, 2, 2]), "cpu", torch.float32, MASK).shape == (1,)
