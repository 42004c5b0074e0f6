"""Configs and weights that are garbled, absurd or of another network: each is refused by name, before memory is taken."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from latent_guidance.errors import UserError
from latent_guidance.models import building, checkpoint
from latent_guidance.models.checkpoint import load_checkpoint, load_classifier, load_text_encoder, load_unet, load_vae
from latent_guidance.models.classifier import Classifier, ClassifierConfig, new_classifier
from latent_guidance.models.configs import smallest_side
from latent_guidance.models.files import load_weights, write_safetensors
from latent_guidance.models.tokenizer import load_tokenizer
from latent_guidance.models.unet import ConditionedUNet, new_unet, unet_config

LOADERS: dict[str, Callable[[Path], object]] = {
    "unet": load_unet,
    "vae": load_vae,
    "text_encoder": load_text_encoder,
    "classifier": load_classifier,
}


def change(folder: Path, component: str, **fields: Any) -> Path:
    path = folder / component / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return path


@pytest.mark.parametrize(
    ("component", "field", "value", "expected"),
    [
        ("unet", "addition_embed_type", "text_time", "null"),
        ("unet", "class_embed_type", "timestep", "projection or null"),
        ("unet", "encoder_hid_dim_type", "text_image_proj", "null"),
        ("unet", "in_channels", -4, "a whole number from 1"),
        ("unet", "block_out_channels", [32, 10**12], "each a whole number from 1"),
        ("unet", "block_out_channels", [32] * 1000, "a list of 1 to 12"),
        ("unet", "layers_per_block", 10**9, "a whole number from 1 to 128, or one for each level"),
        ("unet", "layers_per_block", [1, 1, 1], "2 entries"),
        ("unet", "down_block_types", ["DownBlock2D"], "2 entries"),
        ("unet", "attention_head_dim", 0, "a whole number from 1"),
        ("unet", "cross_attention_dim", [64, 64], "a whole number from 1"),
        ("unet", "norm_eps", math.nan, "a number from 0 to 1"),
        ("vae", "in_channels", 4, "3"),
        ("vae", "out_channels", 1, "3"),
        ("vae", "latent_channels", 10**12, "a whole number from 1"),
        ("vae", "layers_per_block", -1, "a whole number from 1"),
        ("vae", "scaling_factor", 10**400, "a number above 0"),
        ("text_encoder", "max_position_embeddings", 76, "from 77"),
        ("text_encoder", "vocab_size", 49407, "from 49408"),
        ("text_encoder", "hidden_act", "relu", "quick_gelu or gelu"),
        ("text_encoder", "num_hidden_layers", 10**9, "from 1 to 128"),
        ("text_encoder", "num_attention_heads", 3, "a divisor of 64"),
        ("text_encoder", "layer_norm_eps", 1e-6, "1e-05"),
    ],
)
def test_a_field_is_named(
    tiny_copy: Callable[[], Path], component: str, field: str, value: object, expected: str
) -> None:
    folder = tiny_copy()
    LOADERS[component](folder)
    path = change(folder, component, **{field: value})
    with pytest.raises(UserError) as error:
        LOADERS[component](folder)
    for words in (str(path), f"{field} = ", expected, "To mend it"):
        assert words in str(error.value)
    assert len(str(error.value)) < 1500


NASTY = [None, "x" * 10**5, -1, 0, 10**9, 10**400, math.nan, [], [[1]], {}, True]


@pytest.mark.parametrize("value", NASTY, ids=[repr(value)[:12] for value in NASTY])
@pytest.mark.parametrize("component", LOADERS)
def test_whatever_stands_in_a_config_it_is_a_user_error_or_loads(
    tiny_copy: Callable[[], Path], component: str, value: object
) -> None:
    folder = tiny_copy()
    path = folder / component / "config.json"
    good = json.loads(path.read_text())
    refused = 0
    for field in good:
        path.write_text(json.dumps({**good, field: value}))
        try:
            LOADERS[component](folder)
        except UserError as error:
            assert len(str(error)) < 2000
            refused += 1
    assert refused > 0.4 * len(good)


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The devices on which UNets and VAEs are built, in order."""
    devices: list[str] = []
    for name in ("new_unet", "new_vae"):
        build = getattr(checkpoint, name)

        def noted(config: dict[str, Any], build: Callable[[dict[str, Any]], object] = build) -> object:
            devices.append(torch.empty(0).device.type)
            return build(config)

        monkeypatch.setattr(checkpoint, name, noted)
    yield devices


def test_a_large_network_is_refused_without_its_memory(tiny_copy: Callable[[], Path], on_meta: list[str]) -> None:
    folder = tiny_copy()
    load_unet(folder)
    assert on_meta == ["meta", "cpu"]
    change(folder, "unet", block_out_channels=[65536, 65536], layers_per_block=64)
    change(folder, "vae", block_out_channels=[65536] * 4)
    for load in (load_unet, load_vae):
        on_meta.clear()
        with pytest.raises(UserError, match=r"\.safetensors does not hold this .* where the config asks for .*65536"):
            load(folder)
        assert on_meta == ["meta"]


def test_a_large_file_is_refused_unread(tiny_copy: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_copy()
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        out.truncate(8 + len(header) + 2**40)  # a terabyte of holes
    monkeypatch.setattr(building, "read_safetensors", lambda path: pytest.fail(f"{path} was read"))
    with pytest.raises(UserError, match=r"does not hold this UNet|not a readable safetensors file"):
        load_unet(folder)


@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("unet", "conv_in.bias"),
        ("vae", "decoder.conv_in.bias"),
        ("text_encoder", "text_model.final_layer_norm.bias"),
        ("classifier", "head.bias"),
    ],
)
def test_weights_that_are_no_numbers(tiny_copy: Callable[[], Path], component: str, name: str) -> None:
    folder = tiny_copy()
    (file,) = (folder / component).glob("*.safetensors")
    weights = load_file(file)
    own = "ln_final.bias" if component == "text_encoder" else name
    for bad in (math.nan, math.inf, -math.inf):
        changed = weights[name].clone()
        changed[1] = bad
        save_file({**weights, name: changed}, file)
        with pytest.raises(UserError, match=rf"{file.name} holds NaN or infinity in '{own}'"):
            LOADERS[component](folder)
    save_file({**weights, name: weights[name].to(torch.int32)}, file)
    with pytest.raises(UserError, match=rf"{file.name} does not hold this .*'{own}' in whole numbers"):
        LOADERS[component](folder)
    save_file({**weights, name: torch.full_like(weights[name], 3e38)}, file)  # finite, though their sum is not
    LOADERS[component](folder)


def test_a_weight_too_large_for_the_networks_own_type(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 1).half()
    weights = {"weight": torch.full((1, 2), 6.5e4), "bias": torch.zeros(1)}
    load_weights(module, weights, path=tmp_path / "w", what="UNet")
    with pytest.raises(UserError, match="NaN or infinity in 'weight', a weight of this UNet"):
        load_weights(module, {**weights, "weight": torch.full((1, 2), 7e4)}, path=tmp_path / "w", what="UNet")
    assert bool(torch.isfinite(module.weight).all())


def test_numbers_too_large_for_a_file_leave_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"weight": torch.full((3,), 6.5e4)}, dtype=torch.float16)
    before = path.read_bytes()
    for bad in (7e4, -7e4):
        with pytest.raises(UserError, match=r"weight has a number that torch\.float16 cannot hold, 7e\+04"):
            write_safetensors(path, {"weight": torch.tensor([1.0, bad])}, dtype=torch.float16)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_projections_of_different_shapes(tiny_copy: Callable[[], Path]) -> None:
    folder = tiny_copy()
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    name = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    for shape in ((64, 63), (64,), ()):
        save_file({**weights, name: torch.zeros(shape)}, file)
        with pytest.raises(UserError, match=r"resblocks\.0\.attn\.in_proj_weight.*model\.safetensors"):
            load_text_encoder(folder)


@pytest.mark.parametrize("pad", [["!"], {"content": ["!"]}, {"content": {}}, {}, 5, None, "x" * 10**5])
def test_a_padding_token_that_is_none(tmp_path: Path, pad: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad}))
    with pytest.raises(UserError, match=r"tokenizer_config\.json names the padding token") as error:
        load_tokenizer(tmp_path)
    assert len(str(error.value)) < 1000


def test_a_scheduler_config_is_refused_with_the_checkpoint(tiny_copy: Callable[[], Path]) -> None:
    from latent_guidance.models.unet import network_denoiser

    folder = tiny_copy()
    whole = load_checkpoint(folder)
    with pytest.raises(UserError, match=r"num_train_timesteps = 'many' in scheduler_config\.json"):
        network_denoiser(whole.unet, {**whole.scheduler_config, "num_train_timesteps": "many"})


def test_a_unet_whose_middle_alone_attends_needs_tokens() -> None:
    config = unet_config(channels=(32, 32), attention=(False, False), token_width=None)
    assert ConditionedUNet(new_unet(config)).needs == ()
    middle = {**config, "mid_block_type": "UNetMidBlock2DCrossAttn"}
    assert ConditionedUNet(new_unet(middle)).needs == ("tokens",)


@pytest.mark.parametrize(
    ("channels", "sides"),
    [((64, 64), (2, 1)), ((32, 64), (4, 3)), ((64, 32), (4, 3)), ((64, 64, 32), (8, 5)), ((32,), (2, 2))],
)
@pytest.mark.parametrize("padding", [0, 1])
def test_the_smallest_latents_are_the_smallest_that_run(
    channels: tuple[int, ...], sides: tuple[int, int], padding: int
) -> None:
    levels = len(channels)
    config = unet_config(channels=channels, attention=(False,) * levels, token_width=None, heads=1)
    unet = new_unet({**config, "downsample_padding": padding}).eval()
    network = ConditionedUNet(unet)
    side = network.smallest
    assert side == sides[padding]
    with torch.no_grad():
        assert network(torch.zeros(1, 4, side, side), torch.zeros(1)).shape[-1] == side
        if side > 1:
            small = torch.zeros(1, 4, side - 1, side - 1)
            with pytest.raises((ValueError, RuntimeError)):
                unet(small, torch.zeros(1), encoder_hidden_states=None)
            with pytest.raises(UserError, match=rf"at least {side}x{side} .*{8 * side}x{8 * side} pixels"):
                network(small, torch.zeros(1))


def test_classifiers_and_vaes_say_how_small(tiny_folder: Path) -> None:
    classifier, vae = load_classifier(tiny_folder), load_vae(tiny_folder)
    with pytest.raises(UserError, match=r"latents of 2x2 for a classifier.*at least 3x3"):
        classifier.logits(torch.zeros(1, 4, 2, 2), torch.zeros(1))
    assert classifier.logits(torch.zeros(1, 4, 3, 3), torch.zeros(1)).shape == (1, 4)
    for act in (lambda: vae.decode(torch.zeros(1, 4, 1, 1)), lambda: vae.encode(torch.zeros(1, 3, 8, 8), sample=False)):
        with pytest.raises(UserError, match=r"latents of 1x1 for a VAE.*16x16 pixels"):
            act()
    with torch.no_grad():
        assert vae.decode(torch.zeros(1, 4, 2, 2)).shape == (1, 3, 16, 16)
    assert smallest_side([64], 32) == 1 and smallest_side([64], None) == 1


def test_two_loads_of_one_classifier_have_one_fingerprint(tiny_folder: Path, tiny_copy: Callable[[], Path]) -> None:
    first, alone = load_classifier(tiny_folder), load_classifier(tiny_folder / "classifier" / "model.safetensors")
    assert first.fingerprint is not None and first.fingerprint == alone.fingerprint
    copy = tiny_copy()
    assert load_classifier(copy).fingerprint == first.fingerprint
    change(copy, "classifier", labels=["a", "b", "c", "d"])
    assert load_classifier(copy).fingerprint != first.fingerprint
    config = ClassifierConfig.from_json(first.config.to_json())
    assert Classifier(new_classifier(config)).fingerprint is None
