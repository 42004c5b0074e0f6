"""Runs inside ComfyUI (see inside.py): a CLIP on decoded pictures, of an open_clip folder and of a CLIP_VISION with its CLIP."""

# ruff: noqa: ANN001, ANN201, ANN202
import importlib.util
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import comfy.clip_vision
import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from inside import call, far, part, refused, result

gradients = part("latent_guidance.guidance.gradient")
model, clip, vae = call("LGLoadCheckpoint", checkpoint="tiny")
(positive,) = call("LGTextEncode", clip=clip, text="a red apple")
(negative,) = call("LGNullConditioning", clip=clip)
latent = torch.zeros(2, 4, 8, 8)
noise = comfy.sample.prepare_noise(latent, 5)
sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", 3)
(cfg,) = call("LGCFG", guidance_scale=2.0)
WIDTH = 64  # of the tiny text encoder


def vision(width=WIDTH):
    """A tiny random CLIP_VISION."""
    config = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "hidden_act": "quick_gelu",
        "model_type": "clip_vision_model", "num_channels": 3, "patch_size": 4, "image_size": 16, "projection_dim": width,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(config), "utf-8")
        made = comfy.clip_vision.ClipVisionModel(str(file))
    draw = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(w.shape, generator=draw) * 0.1 for name, w in made.get_sd().items()}
    assert not made.load_sd(weights)[0]
    return made


def sampled(rules):
    guider = call("LGGuider", model=model, positive=positive, negative=negative, rules=rules)[0]
    return guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=5)


def value(loss, samples):
    return loss(call("LGVAEDecode", samples={"samples": samples}, vae=vae)[0].movedim(-1, 1) * 2 - 1)


def slope(loss, network):
    """How far the loss's slope along its gradient is from the gradient's length, as a part of it."""
    gradients.normal_parameters_(network)
    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(4)).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf).sum(), leaf)
        length = float(gradient.norm())
        step = 0.05 * gradient / length
        seen = float((loss(leaf.detach() + step) - loss(leaf.detach() - step)).double()) / 0.1
    return abs(seen / length - 1)


def kept(picture_clip):
    """The bytes that autograd keeps of looking at two pictures, as a part of what is reserved for them."""
    network, side = picture_clip.network, picture_clip.image_size
    gradients.normal_parameters_(network)
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.inference_mode(False), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        picture_clip.image_features(torch.rand(2, 3, side, side).requires_grad_())
    total = sum(t.untyped_storage().nbytes() for place, t in storages.items() if place not in own)
    return total / picture_clip.graph_used(2)


def follow(name, picture_clip):
    """What following a text by ``picture_clip`` does, by a rule at the estimate and by one through the UNet."""
    options = dict(distance="spherical", crops=3, smallest_crop=0.5, mirror=True, seed=1)
    whole = dict(distance="spherical", crops=1, smallest_crop=1.0, mirror=False, seed=1)  # the same at each step
    loss, other, same = (
        call("LGLossCLIPText", clip=picture_clip, texts="a red apple | blurry:-0.5", **chosen)[0]
        for chosen in (options, {**options, "seed": 2}, whole)
    )
    for node in ("LGMPGD", "LGDPS"):
        chain = [call(node, loss=one, vae=vae, guidance_scale=0.3, rules=cfg)[0] for one in (loss, other, same)]
        guided, elsewhere, along = map(sampled, chain)
        result[f"{name} {node}: lower by"] = float((value(same, plain) - value(same, along)).min())
        result[f"{name} {node}: again"] = far(guided, sampled(chain[0]))
        result[f"{name} {node}: another seed"] = far(guided, elsewhere)
    result[f"{name}: slope"] = slope(loss, picture_clip.network)
    result[f"{name}: kept"] = kept(picture_clip)
    result[f"{name}: managed"] = any(
        loaded.is_clone(picture_clip.patcher) for loaded in comfy.model_management.loaded_models()
    )
    comfy.model_management.unload_all_models()
    picture_clip.network.to(torch.float64).to(torch.float32)  # inference mode makes these inference tensors
    result[f"{name}: inference tensors"] = any(p.is_inference() for p in picture_clip.network.parameters())
    result[f"{name}: after unloading"] = far(guided, sampled(chain[0]))


plain = sampled(cfg)
result["open_clip is there"] = importlib.util.find_spec("open_clip") is not None
if result["open_clip is there"]:
    follow("open_clip", call("LGLoadPictureCLIP", picture_clip="tiny")[0])
else:
    result["no open_clip"] = refused(lambda: call("LGLoadPictureCLIP", picture_clip="tiny"))

clip_vision = vision()
tower = clip.cond_stage_model.clip_l
result["identity"] = refused(lambda: call("LGPictureCLIP", clip_vision=clip_vision, clip=clip))
for name, made in {
    "zeros": torch.zeros(WIDTH, WIDTH),
    "nan": torch.full((WIDTH, WIDTH), torch.nan),
    "trained": torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2)) / 8,
}.items():
    tower.transformer.text_projection.weight = torch.nn.Parameter(made, requires_grad=False)
    if name != "trained":
        result[name] = refused(lambda: call("LGPictureCLIP", clip_vision=clip_vision, clip=clip))
result["another width"] = refused(lambda: call("LGPictureCLIP", clip_vision=vision(48), clip=clip))
result["no projection"] = refused(
    lambda: call("LGPictureCLIP", clip_vision=SimpleNamespace(model=torch.nn.Linear(2, 2)), clip=clip)
)
result["no CLIP"] = refused(
    lambda: call("LGPictureCLIP", clip_vision=clip_vision, clip=SimpleNamespace(cond_stage_model=torch.nn.Linear(2, 2)))
)

(joined,) = call("LGPictureCLIP", clip_vision=clip_vision, clip=clip)
picture = torch.randint(0, 256, (2, 16, 16, 3), generator=torch.Generator().manual_seed(3)) / 255
core = torch.nn.functional.normalize(clip_vision.encode_image(picture)["image_embeds"].float(), dim=1)
mean, std = torch.tensor(joined.mean), torch.tensor(joined.std)
ours = joined.image_features(((picture - mean) / std).movedim(-1, 1))
result["image features and ComfyUI's own"] = far(core, ours.cpu())
tower.return_projected_pooled = True
tower.options_default = (*tower.options_default[:2], True)
pooled = [clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)[1] for text in ("an apple", "a lamp")]
core = torch.nn.functional.normalize(torch.cat(pooled).float(), dim=1)
result["text features and ComfyUI's own"] = far(core, joined.text_features(["an apple", "a lamp"]))
follow("CLIP_VISION", joined)
