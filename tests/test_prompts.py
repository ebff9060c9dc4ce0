"""Prompts: the spectral one is a circular convolution, the deep ones are drawn per image."""

import math

import numpy as np
import pytest
import torch

from sptseg.models.prompts import (
    DeepPrompts,
    MatmulSpectralPrompt,
    SpectralPrompt,
    filter_to_kernel,
    hermitian_part,
    resize_filter,
)

GRIDS = [(4, 4), (5, 5), (4, 7), (5, 6), (1, 3), (3, 1), (2, 2)]


def random_spectrum(grid, width=3):
    return torch.randn(grid[0], grid[1] // 2 + 1, width, dtype=torch.complex64)


def close(found, expected, share=1e-5):
    """Equal up to a share of the largest value."""
    return (found - expected).abs().max() <= share * expected.abs().max()


def prompt_and_tokens(grid, width=3):
    prompt = SpectralPrompt(grid=grid, width=width, std=1.0)
    return prompt, torch.randn(2, width), torch.randn(2, grid[0] * grid[1], width)


@pytest.mark.parametrize("grid", GRIDS)
def test_spectral_prompt_is_a_circular_convolution(grid):
    (height, width), (prompt, cls, patches) = grid, prompt_and_tokens(grid)
    spectrum = torch.view_as_complex(prompt.filter.detach()).numpy().astype(complex)
    kernel = np.fft.irfft2(spectrum, s=grid, axes=(0, 1))  # ignores what is not Hermitian
    feature_map = (patches * cls[:, None]).view(2, height, width, -1).double().numpy()
    expected = np.zeros_like(feature_map)
    for y in range(height):
        for x in range(width):
            for v in range(height):
                for u in range(width):
                    expected[:, y, x] += kernel[v, u] * feature_map[:, (y - v) % height, (x - u) % width]
    found = prompt(cls, patches, grid).detach().view(expected.shape).numpy()
    assert np.allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("grid", [*GRIDS, (1, 1), (12, 12), (32, 32)])
@pytest.mark.parametrize("trained", ["same grid", (6, 8)])
def test_matmuls_filter_as_the_fft_does(grid, trained):
    """The filter may violate the symmetry of a real signal, and may come from another grid."""
    prompt = SpectralPrompt(grid=grid if trained == "same grid" else trained, width=3, std=1.0)
    cls, patches = torch.randn(2, 3), torch.randn(2, grid[0] * grid[1], 3)
    before = {name: value.clone() for name, value in prompt.state_dict().items()}
    matmuls = MatmulSpectralPrompt(prompt, grid)
    assert close(matmuls(cls, patches, grid), prompt(cls, patches, grid).detach())
    assert not list(matmuls.parameters()) and all((prompt.state_dict()[name] == before[name]).all() for name in before)


@pytest.mark.parametrize("grid", GRIDS)
def test_what_is_not_hermitian_has_no_influence_and_gets_no_gradient(grid):
    prompt, cls, patches = prompt_and_tokens(grid)
    spectrum = torch.view_as_complex(prompt.filter.detach())
    idle = torch.zeros_like(spectrum)
    idle[:, 0] = random_spectrum(grid)[:, 0]
    idle -= hermitian_part(idle, grid[1])
    assert idle.abs().max() > 0.1
    before = prompt(cls, patches, grid)
    before.square().sum().backward()
    gradient = torch.view_as_complex(prompt.filter.grad)
    assert close(hermitian_part(gradient, grid[1]), gradient)
    assert gradient.abs().max() > 0
    prompt.filter.data += torch.view_as_real(idle)
    assert close(prompt(cls, patches, grid), before)


@pytest.mark.parametrize("grid", GRIDS)
def test_resizing_to_the_same_grid_changes_nothing(grid):
    real = torch.fft.rfft2(torch.randn(*grid, 3), dim=(0, 1))
    assert torch.allclose(resize_filter(real, grid[1], grid), real, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("larger", [(7, 9), (8, 8), (8, 9)])
def test_a_filter_keeps_its_kernel_on_other_grids(grid, larger):
    spectrum = random_spectrum(grid)
    grown = resize_filter(spectrum, grid[1], larger)
    kernel, grown_kernel = filter_to_kernel(spectrum, grid[1]), filter_to_kernel(grown, larger[1])
    top, left = larger[0] // 2 - grid[0] // 2, larger[1] // 2 - grid[1] // 2
    inside = grown_kernel[top : top + grid[0], left : left + grid[1]]
    assert torch.allclose(inside, kernel, atol=1e-5)
    assert torch.isclose(grown_kernel.abs().sum(), kernel.abs().sum(), rtol=1e-4), "nothing outside"
    assert torch.allclose(resize_filter(grown, larger[1], grid), hermitian_part(spectrum, grid[1]), atol=1e-5)


def test_a_prompt_answers_on_other_grids():
    prompt, cls, _ = prompt_and_tokens((4, 4))
    for grid in ((6, 5), (3, 4), (4, 4)):
        assert prompt(cls, torch.randn(2, grid[0] * grid[1], 3), grid).shape == (2, grid[0] * grid[1], 3)


def test_the_filter_works_in_float32_under_autocast():
    prompt, cls, patches = prompt_and_tokens((4, 5))
    plain = prompt(cls, patches, (4, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prompt(cls, patches, (4, 5)), plain)
    halved = prompt(cls.bfloat16(), patches.bfloat16(), (4, 5))
    assert halved.dtype == torch.bfloat16 and close(halved.float(), plain, 0.1)


def test_deep_prompts_are_drawn_for_every_image():
    torch.manual_seed(0)
    deep = DeepPrompts(num_blocks=3, num_prompts=4, width=32, patch_size=8)
    sets = deep(5)
    assert len(sets) == 3 and all(tokens.shape == (5, 4, 32) for tokens in sets)
    assert not torch.equal(sets[0][0], sets[0][1]), "dropout differs from image to image"
    dropped = torch.stack(sets).eq(0).float().mean()
    assert 0.05 < dropped < 0.16
    still = torch.stack(deep.eval()(5))
    assert all(torch.equal(still[:, 0], still[:, image]) for image in range(5))
    assert torch.allclose(still[:, 0], deep.projection(deep.embeddings))


def test_deep_prompts_start_in_their_range():
    deep = DeepPrompts(num_blocks=12, num_prompts=20, width=64, patch_size=16)
    bound = math.sqrt(6 / (3 * 16 * 16 + 64))
    assert 0.95 * bound < deep.embeddings.abs().max() <= bound
    assert torch.isclose(deep.embeddings.std(), torch.tensor(bound / math.sqrt(3)), rtol=0.05)
    assert torch.isclose(deep.projection.weight.std(), torch.tensor(math.sqrt(2 / 64)), rtol=0.1)
