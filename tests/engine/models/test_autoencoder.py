"""Images to latents and back: scale and shift, sizes, and what may not pass for an image."""

import numpy as np
import pytest
import tiny
import torch
from cdpo.engine.basics.errors import NumericsError
from cdpo.engine.models.autoencoder import Autoencoder
from PIL import Image
from refusals import refused


def picture(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def autoencoder(**changes: object) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(tiny.vae(**changes).eval())


def test_latents_are_shifted_and_scaled():
    plain = autoencoder(scaling_factor=1.0).encode([picture(16, 16)])
    latents = autoencoder(scaling_factor=0.25, shift_factor=0.5).encode([picture(16, 16)])
    torch.testing.assert_close(latents, (plain - 0.5) * 0.25, rtol=0, atol=1e-6)


@pytest.mark.parametrize("change", [{}, {"shift_factor": 0.3}])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 40)])
def test_decoding_undoes_what_encoding_does(change, height, width):
    codec = autoencoder(**change)
    image = picture(height, width)
    latents = codec.encode([image])
    assert latents.shape == (1, *codec.latent_shape((height, width)))
    assert codec.pixel_shape(latents) == (height, width)
    with torch.no_grad():
        batch = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        direct = codec.vae(batch).sample
    [decoded] = codec.decode(latents)
    expected = ((direct / 2 + 0.5).clamp(0, 1) * 255).round()[0].permute(1, 2, 0).numpy()
    assert decoded.size == (width, height)
    assert np.abs(np.asarray(decoded).astype(int) - expected).max() <= 1


def test_large_batches_go_through_the_vae_in_parts(monkeypatch):
    codec, images = autoencoder(), [picture(16, 16)] * 5
    whole = codec.encode(images)
    decoded = codec.decode(whole)
    monkeypatch.setattr("cdpo.engine.models.autoencoder.MAX_PIXELS", 2 * 16 * 16 + 5)
    sizes: list[int] = []
    for layer in (codec.vae.encoder, codec.vae.decoder):
        layer.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    torch.testing.assert_close(codec.encode(images), whole, rtol=0, atol=1e-6)
    again = codec.decode(whole)
    assert sizes == [2, 2, 1] * 2
    difference = np.asarray(again[4]).astype(int) - np.asarray(decoded[4])
    assert len(again) == 5 and np.abs(difference).max() <= 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_denoiser_that_overflowed_is_named_as_the_denoiser(bad):
    latents = torch.zeros(2, 4, 8, 8)
    latents[1, 0, 0, 0] = bad
    with refused(NumericsError, "non-finite", "denoiser"):
        autoencoder().decode(latents)


def test_a_vae_that_overflows_is_named_as_the_vae():
    """As weights do that were cast to fp16 when they were stored."""
    codec = autoencoder()
    codec.vae.decoder.conv_in.weight.data[0, 0, 0, 0] = torch.tensor(7e4).half().float()
    with refused(NumericsError, "non-finite", "model.vae"):
        codec.decode(torch.ones(1, 4, 8, 8))
