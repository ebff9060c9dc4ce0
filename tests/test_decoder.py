"""Decoders: high- and low-frequency attention against naive loops, and properties of queries and masks."""

import math

import pytest
import torch
from torch.nn import functional as F

from sptseg.core import UserError
from sptseg.models.decoder import CROSS, Decoder, SGDCross, TaskTokenSelection, ZegCLIPCross
from sptseg.models.hilo import HiLo, head_split

KINDS = tuple(CROSS)


def inputs(classes=5, grid=(7, 5), width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    feature_map = F.normalize(torch.randn(2, width, *grid, generator=generator), dim=1)
    cls, text = (F.normalize(torch.randn(count, width, generator=generator), dim=-1) for count in (2, classes))
    return feature_map, cls, text


def make(kind, **options):
    torch.manual_seed(1)
    decoder = Decoder(kind=kind, width=16, **options)
    for parameter in decoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return decoder.eval()


def naive_attention(queries, keys, values):
    """Attention of one head, one query at a time."""
    rows = []
    for query in queries:
        logits = [float(query @ key) / math.sqrt(len(query)) for key in keys]
        weights = [math.exp(logit - max(logits)) for logit in logits]
        rows.append(sum(weight / sum(weights) * value for weight, value in zip(weights, values, strict=True)))
    return torch.stack(rows)


def naive_hilo(model, image, high_heads, head_width):
    """HiLo of one image (h, w, d), written from the description alone."""
    height, width, d = image.shape
    rows, columns = math.ceil(height / 3) * 3, math.ceil(width / 3) * 3
    padded = torch.zeros(rows, columns, d)
    padded[:height, :width] = image
    qkv = padded @ model.high.qkv.weight.T
    high = torch.zeros(rows, columns, high_heads * head_width)
    for y in range(0, rows, 3):
        for x in range(0, columns, 3):
            window = qkv[y : y + 3, x : x + 3].reshape(9, 3, high_heads, head_width)
            for head in range(high_heads):
                answer = naive_attention(*window[:, :, head].unbind(1)).view(3, 3, head_width)
                high[y : y + 3, x : x + 3, head * head_width : (head + 1) * head_width] = answer
    cells = torch.stack(
        [padded[y : y + 3, x : x + 3].sum((0, 1)) / 9 for y in range(0, rows, 3) for x in range(0, columns, 3)]
    )
    query = (padded @ model.low.query.weight.T).view(rows * columns, -1, head_width)
    key, value = (cells @ model.low.key_value.weight.T).view(len(cells), 2, -1, head_width).unbind(1)
    heads = [naive_attention(query[:, head], key[:, head], value[:, head]) for head in range(query.shape[1])]
    low = model.low.projection(torch.cat(heads, -1)).view(rows, columns, -1)
    return torch.cat([high, low], -1)[:height, :width]


@torch.no_grad()
@pytest.mark.parametrize("split", ["code", "paper"])
@pytest.mark.parametrize("grid", [(4, 5), (3, 6), (7, 2)])
def test_hilo_equals_naive_attention(grid, split):
    torch.manual_seed(0)
    model, feature_map = HiLo(width=8, num_heads=4, split=split), torch.randn(2, 8, *grid)
    high_heads = {"code": 1, "paper": 3}[split]
    found = model(feature_map).unflatten(1, grid)
    for image, answer in zip(feature_map.movedim(1, -1), found, strict=True):
        assert torch.allclose(answer, naive_hilo(model, image, high_heads, 2), atol=1e-5)


def test_padding_takes_part():
    torch.manual_seed(0)
    model, feature_map = HiLo(width=8, num_heads=4), torch.randn(1, 8, 4, 4)
    alone = model(feature_map).unflatten(1, (4, 4))
    for fill, same in ((torch.zeros(()), True), (torch.randn(()), False)):
        surrounded = fill.expand(1, 8, 6, 6).clone()
        surrounded[..., :4, :4] = feature_map
        inside = model(surrounded).unflatten(1, (6, 6))[:, :4, :4]
        assert torch.allclose(inside, alone, atol=1e-6) == same


def test_heads_are_split_as_code_or_paper_say():
    assert head_split(8) == (1, 7) and head_split(8, "paper") == (7, 1)
    assert all(sum(head_split(heads)) == heads for heads in range(2, 20))
    for arguments in ((1,), (8, "other")):
        with pytest.raises(UserError, match="head_split"):
            head_split(*arguments)
    with pytest.raises(UserError, match="multiple of 8"):
        HiLo(width=20)


def test_task_token_selects_by_clamped_cosine():
    selection, patches = TaskTokenSelection(width=6), torch.randn(2, 9, 6)
    assert torch.equal(selection.transform, torch.eye(6)), "the transform starts as the identity"
    selection.transform.data = torch.randn(6, 6)
    for image, kept in zip(patches, selection(patches), strict=True):
        for patch, answer in zip(image, kept, strict=True):
            cosine = patch @ selection.task_token / (patch.norm() * selection.task_token.norm())
            assert torch.allclose(answer, cosine.clamp(0) * patch @ selection.transform, atol=1e-5)
    assert torch.isfinite(selection(torch.zeros(1, 2, 6))).all()


@pytest.mark.parametrize("cross", [SGDCross, ZegCLIPCross])
def test_the_mask_alone_equals_the_mask_beside_the_update(cross):
    feature_map, _, text = inputs()
    module, queries = cross(width=16).eval(), torch.randn(2, 5, 16)
    assert torch.allclose(module.mask(queries, feature_map), module(queries, feature_map)[1], atol=1e-5)


def test_zegclip_masks_are_the_mean_of_the_heads_logits():
    feature_map, _, _ = inputs()
    module, queries = ZegCLIPCross(width=16, num_heads=4), torch.randn(2, 5, 16)
    query, key = module.query(queries), module.key(feature_map.flatten(2).mT)
    per_head = [query[..., i : i + 4] @ key[..., i : i + 4].mT / 4**0.5 for i in range(0, 16, 4)]
    assert torch.allclose(module.mask(queries, feature_map), sum(per_head) / 4, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_classes_do_not_see_one_another(kind, layers):
    feature_map, cls, text = inputs()
    decoder = make(kind, num_layers=layers)
    together = decoder(feature_map, cls, text)
    assert together.shape == (2, 5, 7, 5)
    for index in range(5):
        assert torch.allclose(decoder(feature_map, cls, text[index : index + 1])[:, 0], together[:, index], atol=1e-5)
    shuffled = torch.tensor([3, 0, 4, 1, 2])
    assert torch.allclose(decoder(feature_map, cls, text[shuffled]), together[:, shuffled], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_images_do_not_see_one_another(kind):
    feature_map, cls, text = inputs()
    decoder = make(kind)
    assert torch.allclose(decoder(feature_map, cls, text)[1:], decoder(feature_map[1:], cls[1:], text), atol=1e-5)


@pytest.mark.parametrize("layers", [1, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_everything_in_a_decoder_gets_a_gradient(kind, layers):
    decoder = make(kind, num_layers=layers)
    decoder(*inputs()).square().sum().backward()
    idle = [
        name
        for name, tensor in decoder.named_parameters()
        if tensor.grad is None or (tensor.grad.abs().max() == 0 and not name.endswith("key.bias"))
    ]
    assert not idle, "only the bias of keys may get zeros: a softmax does not notice it"


@pytest.mark.parametrize("kind", KINDS)
def test_layers_start_as_copies(kind):
    decoder = Decoder(kind=kind, width=16, num_layers=4)
    first = decoder.layers[0].state_dict()
    assert all(torch.equal(layer.state_dict()[name], first[name]) for layer in decoder.layers for name in first)
    assert all(torch.equal(tensor, first[f"cross.{name}"]) for name, tensor in decoder.last.state_dict().items())
    assert decoder.layers[0].linear1.weight is not decoder.layers[1].linear1.weight


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_drawn_in_training_only(kind):
    decoder, given = make(kind), inputs()
    assert torch.equal(decoder(*given), decoder(*given))
    assert not torch.equal(decoder.train()(*given), decoder(*given))
    silent = make(kind, dropout=0.0).train()
    assert torch.equal(silent(*given), silent(*given))


@pytest.mark.parametrize("options", [{"kind": "unet"}, {"kind": "sgd", "num_layers": 0}])
def test_unknown_decoders_are_refused(options):
    with pytest.raises(UserError, match="^decoder: "):
        Decoder(width=16, **options)
