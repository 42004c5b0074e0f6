"""Runs inside ComfyUI (see inside.py): checkpoint folders as native and as wrapped objects, against the library."""

# ruff: noqa: ANN001, ANN201
import copy
import json
from pathlib import Path

import comfy.latent_formats
import comfy.model_base
import comfy.sample
import comfy.samplers
import folder_paths
import stage
import torch
from diffusers import UNet2DConditionModel
from inside import call, part, result
from safetensors.torch import load_file

checkpoint = part("nodes.runtime.comfy.checkpoint")
loader = part("nodes.runtime.comfy.model")
vaes = part("nodes.runtime.comfy.vae")
native = part("nodes.runtime.comfy.native")
library = part("latent_guidance.models.checkpoint")
files = part("latent_guidance.models.files")
units = part("latent_guidance.models.unet")
denoisers = part("latent_guidance.denoiser")
schedules = part("latent_guidance.schedules")

folder = Path(folder_paths.models_dir) / "latent_guidance" / "tiny"
scheduler = files.read_json(folder / "scheduler" / "scheduler_config.json")
space = loader.LatentSpace(4, 0.8, lambda: None)


def far(a, b):
    return float((a - b).abs().max() / b.abs().max())


# --- the tiny checkpoint ----------------------------------------------------------------------------------------------

model, clip, vae = call("LGLoadCheckpoint", checkpoint="tiny")
result["classes"] = [
    type(model.model.diffusion_model).__module__.split(".")[0],
    type(vae.first_stage_model).__module__.split(".")[0],
]
result["model is a plain ModelPatcher"] = type(model).__name__
result["scale factor"] = model.model.latent_format.scale_factor
reference = library.load_vae(folder)
image = torch.rand(1, 64, 96, 3)
latent = reference.encode(image.movedim(-1, 1) * 2 - 1, sample=False)
result["vae encode"] = far(vae.encode(image), latent)
result["vae decode"] = far(vae.decode(latent), ((reference.decode(latent) + 1) / 2).movedim(1, -1))
wrapped_vae = vaes.wrapped_vae(library.load_vae(folder).network, files.read_json(folder / "vae" / "config.json"))
result["wrapped vae encode"] = far(wrapped_vae.encode(image), latent)
result["wrapped vae decode"] = far(wrapped_vae.decode(latent), vae.decode(latent))
drawn = [vaes.encode(each, image, sample=True, seed=4) for each in (vae, wrapped_vae)]
generator = torch.Generator().manual_seed(4)
result["vae sample"] = far(drawn[0], reference.encode(image.movedim(-1, 1) * 2 - 1, sample=True, generator=generator))
result["wrapped vae sample"] = far(drawn[1], drawn[0])
result["sample is not the mode"] = far(drawn[0], latent)
encoded = load_file(
    Path(folder_paths.get_input_directory()) / "encoded.safetensors"
)  # by the library, whose Python has open_clip
for name, prompt in json.loads(Path(folder_paths.get_input_directory(), "prompts.json").read_text()).items():
    theirs = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0]
    result[f"clip {name}"] = far(theirs[0], encoded[f"{name}.tokens"])
    result[f"clip pooled {name}"] = far(theirs[1]["pooled_output"], encoded[f"{name}.pooled"])

# --- UNets: which map, and whether they agree -------------------------------------------------------------------------

BASE = dict(
    sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=2,
)  # fmt: skip
VARIANTS = {
    "plain": {},
    "AdaGN": dict(resnet_time_scale_shift="scale_shift"),
    "linear projection": dict(use_linear_projection=True),
    "layers by level": dict(layers_per_block=(1, 2)),
    "two transformer layers": dict(transformer_layers_per_block=2),
    "attention everywhere": dict(
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2
    ),
    "heads of one width": dict(
        attention_head_dim=(1, 2),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    ),
    "no attention in the middle": dict(
        mid_block_type="UNetMidBlock2D", down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
    ),
    "16 norm groups": dict(norm_num_groups=16),
    "condition vector": dict(class_embed_type="projection", projection_class_embeddings_input_dim=32),
    "another activation": dict(act_fn="gelu"),
    "learned range": dict(out_channels=8),
}
x, sigma = torch.randn(2, 4, 8, 12), torch.tensor([0.7, 9.0])
context, vector = torch.randn(2, 77, 32), torch.randn(2, 32)
result["unets"] = {}
for name, change in VARIANTS.items():
    torch.manual_seed(1)
    with torch.inference_mode(False):
        unet = UNet2DConditionModel(**(BASE | change)).eval()
    weights = {key: value.detach().clone() for key, value in unet.state_dict().items()}
    made = loader.native_model(dict(unet.config), weights, scheduler, space, path=folder)
    entry = {"native": not isinstance(made, str), "why": made if isinstance(made, str) else ""}
    outside = denoisers.NetworkDenoiser(
        units.ConditionedUNet(unet),
        *schedules.schedule_from_config(scheduler)[::-1],
        learned_range=name == "learned range",
    )
    expected = outside(x, sigma, {"tokens": context, "vector": vector})
    inside_it = loader.wrapped_model(copy.deepcopy(unet), scheduler, space)
    entry["wrapped"] = far(inside_it.model.apply_model(x, sigma, c_crossattn=context, y=vector), expected)
    if entry["native"]:
        entry["far"] = far(made.model.apply_model(x, sigma, c_crossattn=context), expected)
        key = next(key for key in weights if key.endswith("conv1.weight"))
        other = loader.native_model(
            dict(unet.config), weights | {key: weights[key] + 0.01}, scheduler, space, path=folder
        )
        entry["with one weight changed"] = far(other.model.apply_model(x, sigma, c_crossattn=context), expected)
    result["unets"][name] = entry

# --- a wrapped MODEL samples and is guided like any other -------------------------------------------------------------------

torch.manual_seed(1)
with torch.inference_mode(False):
    unet = UNet2DConditionModel(**(BASE | VARIANTS["condition vector"])).eval()
wrapped = loader.wrapped_model(unet, scheduler, space)
condition = [[context[:1], {"pooled_output": vector[:1]}]]
other = [[context[1:], {"pooled_output": vector[1:]}]]
empty = torch.zeros(1, 4, 8, 8)


def sampled(model, positive, negative, scale):
    noise = comfy.sample.prepare_noise(empty, 3)
    return comfy.sample.sample(
        model, noise, 4, scale, "euler", "karras", positive, negative, empty, seed=3, disable_pbar=True
    )


result["wrapped: finite"] = bool(torch.isfinite(sampled(wrapped, condition, other, 3.0)).all())
result["wrapped: condition acts"] = far(
    sampled(wrapped, condition, other, 1.0), sampled(wrapped, other, condition, 1.0)
)
(classifier, _) = call("LGLoadClassifier", classifier="tiny")
(rules,) = call(
    "LGClassifierGuidance", classifier=classifier, label="Flags", guidance_scale=60.0, combine="any", sigma_lo=0.0, sigma_hi=1000.0,
    every_k=1, clip=1000.0, scaling="raw", form="score",
)  # fmt: skip
(guided,) = call("LGApplyGuidance", model=wrapped, rules=rules)
(both,) = call("LGCFG", guidance_scale=3.0, rules=rules)
guider = call("LGGuider", model=wrapped, positive=condition, negative=other, rules=both)[0]
levels = comfy.samplers.calculate_sigmas(wrapped.get_model_object("model_sampling"), "karras", 4)
euler, start = comfy.samplers.sampler_object("euler"), comfy.sample.prepare_noise(empty, 3)
result["wrapped: guider"] = far(
    sampled(guided, condition, other, 3.0), guider.sample(start, empty, euler, levels, disable_pbar=True, seed=3)
)
perturbed = wrapped.clone()
perturbed.set_model_attn1_replace(lambda q, k, v, extra_options: v, "middle", 0)
with stage.noted() as said:
    unmoved = [sampled(perturbed, condition, other, 3.0) for _ in range(2)]
result["wrapped: another node's attention"] = [said, far(sampled(wrapped, condition, other, 3.0), unmoved[1])]
around = wrapped.clone()
around.add_wrapper_with_key("diffusion_model", "half", lambda network, *args, **more: 0.5 * network(*args, **more))
cached = stage.core_node(
    wrapped, "nodes_easycache", "EasyCacheNode", reuse_threshold=3.0, start_percent=0.0, end_percent=1.0, verbose=False
)
as_it_is = sampled(wrapped, condition, other, 3.0)
result["wrapped: another node's wrapper"] = {
    name: far(as_it_is, sampled(model, condition, other, 3.0)) for name, model in (("half", around), ("cached", cached))
}
result["wrapped: guided"] = far(sampled(guided, condition, other, 3.0), sampled(wrapped, condition, other, 3.0))

# --- noise levels and previews ---------------------------------------------------------------------------------------------

for kind in ("scaled_linear", "linear", "squaredcos_cap_v2"):
    config = scheduler | {"beta_schedule": kind, "beta_start": 0.0001, "beta_end": 0.02}
    made = loader.native_model(
        dict(UNet2DConditionModel(**BASE).config),
        dict(UNet2DConditionModel(**BASE).state_dict()),
        config,
        space,
        path=folder,
    )
    ours = schedules.schedule_from_config(config)[0].sigmas
    result[f"sigmas {kind}"] = far(made.get_model_object("model_sampling").sigmas, ours)
    rebuilt = comfy.model_base.model_sampling(made.model.model_config, made.model.model_type)
    result[f"sigmas {kind}, rebuilt by a core node"] = far(rebuilt.sigmas, ours)
factors, bias = model.model.latent_format.latent_rgb_factors, model.model.latent_format.latent_rgb_factors_bias
result["preview"] = [len(factors), len(factors[0]), len(bias)]


def preview_error(space, vae):
    """Root mean square distance of a preview's colours, in [-1, 1], from those of a picture of three discs on white."""
    picture, (rows, columns) = (
        torch.ones(128, 128, 3),
        torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij"),
    )
    for row, column, colour in ((40, 40, (1.0, 0.8, 0.1)), (40, 96, (0.8, 0.1, 0.1)), (92, 64, (0.1, 0.3, 0.7))):
        picture[(rows - row) ** 2 + (columns - column) ** 2 < 28**2] = torch.tensor(colour)
    latents = vae.encode(picture[None])[0].movedim(0, -1) * space.scale_factor
    shown = latents @ torch.tensor(space.latent_rgb_factors) + torch.tensor(space.latent_rgb_factors_bias)
    wanted = 2 * picture.unflatten(0, (16, 8)).unflatten(2, (16, 8)).mean(dim=(1, 3)) - 1
    return float((shown.clamp(-1, 1) - wanted).square().mean().sqrt())


with torch.inference_mode():
    emoji, _, emoji_vae = call("LGLoadCheckpoint", checkpoint="emoji")
    result["preview error"] = preview_error(emoji.model.latent_format, emoji_vae)
result["plain latent format has no preview"] = comfy.latent_formats.LatentFormat().latent_rgb_factors is None

# --- files that are not what they should be -----------------------------------------------------------------------------------


def refused(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


config, weights = dict(unet.config), dict(unet.state_dict())
plain = UNet2DConditionModel(**BASE)
lacking = {key: value for key, value in plain.state_dict().items() if not key.startswith("conv_out")}
result["refused: weights missing"] = refused(
    lambda: loader.native_model(dict(plain.config), lacking, scheduler, space, path=folder)
)
vae_config, vae_weights = (
    files.read_json(folder / "vae" / "config.json"),
    dict(library.load_vae(folder).network.state_dict()),
)
vae_weights["decoder.conv_in.weight"] = vae_weights["decoder.conv_in.weight"][:, :2]
result["refused: VAE weights of another shape"] = refused(lambda: vaes.native_vae(vae_config, vae_weights, path=folder))
texts = part("nodes.runtime.comfy.text")
text_config = files.read_json(folder / "text_encoder" / "config.json")
result["refused: no text weights"] = refused(lambda: texts.native_clip(text_config, {}, pad=49407, path=folder))
result["refused: another vocabulary"] = refused(
    lambda: texts.native_clip(text_config | {"vocab_size": 30000}, {}, pad=49407, path=folder)
)
relic = text_config | {
    "pad_token_id": 1,
    "eos_token_id": 2,
}  # as many published configs say, whatever their tokenizer does
text_weights, _ = files.read_safetensors(files.weights_file(folder / "text_encoder"))
text_weights = {name: weight.float() for name, weight in text_weights.items()}
plain, odd = (
    texts.encode(texts.native_clip(c, text_weights, pad=49407, path=folder), "a red cat")[0]
    for c in (text_config, relic)
)
result["relics in a text config: tokens"] = far(plain[0], odd[0])
result["relics in a text config: pooled"] = far(plain[1]["pooled_output"], odd[1]["pooled_output"])
with torch.inference_mode(False):
    table = UNet2DConditionModel(**BASE, num_class_embeds=5)
result["refused: class table"] = refused(lambda: loader.wrapped_model(table, scheduler, space))
result["refused: no such folder"] = refused(lambda: checkpoint.load_model(folder / "nothing"))
