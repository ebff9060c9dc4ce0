"""The prompted encoder: equal to CLIP without prompts; effects of deep and spectral prompts."""

import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import nn
from torch.nn import functional as F

from sptseg.core import UserError
from sptseg.models.encoder import PromptedBlock, PromptedEncoder, embed_patches, parse_blocks
from sptseg.models.prompts import DeepPrompts, SpectralPrompt


def clip_encoder(**options):
    torch.manual_seed(0)
    visual = VisionTransformer(32, 8, 24, 4, 3, 2.0, output_dim=16, act_layer=QuickGELU, **options)
    visual.class_embedding.data *= 5
    return visual.eval()


def make_encoder(num_blocks=4, filter_std=None, blocks=(), **options):
    visual = clip_encoder()
    deep = DeepPrompts(num_blocks=num_blocks, num_prompts=3, width=24, patch_size=8)
    spectral = None if filter_std is None else SpectralPrompt(grid=(4, 4), width=24, std=filter_std)
    return PromptedEncoder(
        visual=visual, deep_prompts=deep, spectral_prompt=spectral, spectral_blocks=blocks, **options
    ).eval()


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_without_prompts_it_is_clip():
    encoder = make_encoder(num_blocks=0, class_embedding_count=1)
    encoder.prompt_norm = nn.Identity()
    patches, cls = encoder(IMAGES)
    visual = clip_encoder(output_tokens=True)
    pooled, tokens = visual(IMAGES)
    assert torch.allclose(cls, F.normalize(pooled, dim=-1), atol=1e-5)
    assert torch.allclose(patches.flatten(2).mT, F.normalize(tokens @ visual.proj, dim=-1), atol=1e-5)


def test_the_class_embedding_counts():
    once, twice = (make_encoder(class_embedding_count=count) for count in (1, 2))
    twice.load_state_dict(once.state_dict())
    assert not torch.allclose(once(IMAGES)[1], twice(IMAGES)[1], atol=1e-3)
    once.visual.class_embedding.data *= 2
    assert torch.allclose(once(IMAGES)[1], twice(IMAGES)[1], atol=1e-6)


def test_embeddings_are_unit_norm_on_any_grid():
    encoder = make_encoder(filter_std=0.1, blocks=(1, 2))
    for height, width in ((32, 32), (40, 24), (64, 48)):
        patches, cls = encoder(torch.randn(2, 3, height, width))
        assert patches.shape == (2, 16, height // 8, width // 8) and cls.shape == (2, 16)
        assert torch.allclose(patches.norm(dim=1), torch.ones(()), atol=1e-5)
        assert torch.allclose(cls.norm(dim=1), torch.ones(()), atol=1e-5)


def test_prompts_have_no_position():
    encoder = make_encoder()
    before = encoder(IMAGES)[0]
    encoder.deep_prompts.embeddings.data = encoder.deep_prompts.embeddings.data.flip(1)
    assert torch.allclose(encoder(IMAGES)[0], before, atol=1e-5)
    encoder.deep_prompts.embeddings.data[-1] += 1
    assert not torch.allclose(encoder(IMAGES)[0], before, atol=1e-3), "yet they matter, in the last block too"


@pytest.mark.parametrize("activation", [QuickGELU, nn.GELU])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_block_is_open_clips_without_outputs_at_the_prompts(activation, count):
    """Values and gradients, in float64."""
    torch.manual_seed(0)
    block = VisionTransformer(32, 8, 24, 1, 3, 2.0, output_dim=16, act_layer=activation).transformer.resblocks[0]
    block = block.double().requires_grad_(False)
    tokens, prompts = torch.randn(2, 17, 24).double(), torch.randn(2, count, 24).double() if count else None
    given = [part.requires_grad_() for part in (tokens, prompts) if part is not None]
    weights = torch.randn(2, 17, 24).double()
    whole = block(torch.cat([tokens[:, :1], *given[1:], tokens[:, 1:]], 1))
    expected = whole[:, [0, *range(1 + count, 17 + count)]]
    output = PromptedBlock()(block, tokens, prompts)
    assert torch.allclose(output, expected, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(PromptedBlock()(block, tokens, prompts), output)
    for ours, theirs in zip(
        *(torch.autograd.grad((y * weights).sum(), given) for y in (output, expected)), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_every_block_gets_its_own_prompts():
    encoder, seen = make_encoder(num_blocks=2), []
    encoder.run_block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    encoder(IMAGES)
    assert [block for block, _, _ in seen] == list(encoder.visual.transformer.resblocks)
    assert all(tokens.shape == (2, 17, 24) for _, tokens, _ in seen)
    for (_, _, prompts), expected in zip(seen, [*encoder.deep_prompts(2), None, None], strict=True):
        assert prompts is expected is None or torch.equal(prompts, expected)
    assert torch.equal(seen[0][1], embed_patches(encoder.visual, IMAGES))


def test_the_filter_works_in_its_blocks_only():
    plain, silent, early, late = (
        make_encoder(filter_std=std, blocks=blocks)
        for std, blocks in ((None, ()), (0.0, (1, 2)), (0.5, (1, 2)), (0.5, (4,)))
    )
    for other in (silent, early, late):
        other.load_state_dict({**other.state_dict(), **plain.state_dict()})
    late.spectral_prompt.load_state_dict(early.spectral_prompt.state_dict())
    outputs = [encoder(IMAGES)[0] for encoder in (plain, silent, early, late)]
    assert torch.equal(outputs[0], outputs[1])
    assert all(not torch.allclose(outputs[0], other, atol=1e-3) for other in outputs[2:])
    assert not torch.allclose(outputs[2], outputs[3], atol=1e-3)
    inputs = []
    for encoder in (late, plain):
        encoder.run_block.register_forward_pre_hook(lambda module, given: inputs.append(given[1]))
        encoder(IMAGES)
    cls, patches = inputs[7][:, 0], inputs[7][:, 1:]
    assert torch.allclose(inputs[3][:, 1:], patches + late.spectral_prompt(cls, patches, (4, 4)), atol=1e-5)


def test_clip_stays_frozen_and_in_evaluation_mode():
    encoder = make_encoder(filter_std=0.1, blocks=(1,)).train()
    assert encoder.deep_prompts.training and not any(module.training for module in encoder.visual.modules())
    sum(output.sum() for output in encoder(IMAGES)).backward()
    assert all(tensor.grad is None for tensor in encoder.visual.parameters())
    trained = {name: tensor for name, tensor in encoder.named_parameters() if not name.startswith("visual.")}
    assert all(tensor.grad is not None and tensor.grad.abs().max() > 0 for tensor in trained.values())


def test_ranges_of_blocks():
    assert parse_blocks("", 12) == () and parse_blocks("1-2", 12) == (1, 2) and parse_blocks(" 3 ", 4) == (3,)
    assert parse_blocks("11-12", 12) == (11, 12) and parse_blocks("1-6", 6) == (1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize("text", ["2-1", "0-1", "0", "1-13", "13", "1-", "-1", "a-b", "1,2", "1-2-3", "1.5"])
def test_impossible_ranges_are_refused(text):
    with pytest.raises(UserError, match="^spectral_blocks: ") as error:
        parse_blocks(text, 12)
    assert repr(text) in str(error.value) and "1-12" in str(error.value)
