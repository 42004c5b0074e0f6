"""Runs inside ComfyUI (see inside.py): what guidance asks ComfyUI's memory management for, and how it is interrupted."""

# ruff: noqa: ANN001, ANN002, ANN003, ANN201, ANN204, ANN205
import gc
import importlib
import weakref
from collections import namedtuple

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models
import torch
from inside import call, far, part, refused, result
from stage import Stage, cfg, classifier_for

memory = part("nodes.runtime.comfy.memory")
latents = part("latent_guidance.guidance.latents").Latents
model, clip, vae = call("LGLoadCheckpoint", checkpoint="tiny")
(positive,) = call("LGTextEncode", clip=clip, text="a red apple")
(negative,) = call("LGNullConditioning", clip=clip)
stage = Stage(model, positive, negative, torch.zeros(2, 4, 8, 8))
large = Stage(model, positive, negative, torch.zeros(1, 4, 16, 24), steps=1)
format = model.get_model_object("latent_format")
classifier = classifier_for(latents("checkpoint", 4, float(format.scale_factor)))


class Looking:
    """A CLIP that says what its graph takes, and nothing else."""

    network, image_size, mean, std = None, 8, (0.5,) * 3, (0.5,) * 3

    def graph_used(self, pictures):
        return pictures * 1000.0 * unit

    def text_features(self, texts):
        return torch.nn.functional.one_hot(torch.arange(len(texts)), 3).float()

    def image_features(self, pictures):
        return torch.nn.functional.normalize(pictures.flatten(2).mean(dim=2), dim=1)


class Sum:
    """A loss in any space that counts how often it is asked, and interrupts ComfyUI at its ``stop``-th time."""

    def __init__(self, space="latent", stop=0):
        self.space, self.asked, self.stop = space, 0, stop

    def __call__(self, estimate):
        self.asked += 1
        if self.asked == self.stop:
            comfy.model_management.interrupt_current_processing()
        return estimate.square().flatten(1).sum(dim=1)


# what is reserved, and whether the model is loaded whole
loads = []
load_models_gpu = comfy.model_management.load_models_gpu


def watched(models, memory_required=0, *args, **kwargs):
    loads.append(
        {
            "most": memory_required,
            "least": kwargs.get("minimum_memory_required"),
            "whole": kwargs.get("force_full_load"),
        }
    )
    return load_models_gpu(models, memory_required, *args, **kwargs)


def loaded(action):
    loads.clear()
    comfy.model_management.load_models_gpu = watched
    try:
        action()
    finally:
        comfy.model_management.load_models_gpu = load_models_gpu
    return list(loads)


def by_clip(crops):
    loss = call("LGLossCLIPText", clip=Looking(), texts="a", crops=crops)[0]
    return call("LGMPGD", loss=loss, vae=vae, rules=cfg(2.0))[0]


def mpgd(space, **more):
    return call("LGMPGD", loss=Sum(space), vae=vae, rules=cfg(2.0), **more)[0]


unit = float(model.model.memory_required([1, 4, 8, 8]))
result["unit"], result["graph"], result["decoded"] = unit, memory.graph_factor(model.model), memory.DECODED
result["families"] = {
    name: [hasattr(comfy.supported_models, name), factor, memory.GRAPH] for name, factor in memory.GRAPHS.items()
}
result["a picture"] = float(vae.memory_used_decode((1, 4, 8, 8), vae.vae_dtype))
result["a tile"] = float(vae.memory_used_decode((1, 4, 16, 16), vae.vae_dtype))
result["half a picture"] = float(vae.memory_used_decode((1, 4, 4, 4), vae.vae_dtype))
through = call("LGDPS", loss=Sum(), rules=cfg(2.0))[0]
result["reserved"] = {
    "CFG": loaded(lambda: stage.ours(cfg(2.0)))[0],
    "a leaf, latents": loaded(lambda: stage.ours(mpgd("latent")))[0],
    "a leaf, pictures": loaded(lambda: stage.ours(mpgd("picture")))[0],
    "a leaf, half pictures": loaded(lambda: stage.ours(mpgd("picture", decode_at=0.5)))[0],
    "a leaf, 3 cutouts": loaded(lambda: stage.ours(by_clip(3)))[0],
    "a leaf, 30 cutouts": loaded(lambda: stage.ours(by_clip(30)))[0],
    "a leaf, in tiles": loaded(lambda: large.ours(mpgd("picture", decode_tile=16)))[0],
    "on a model, pictures": loaded(
        lambda: stage.core(
            call("LGApplyGuidance", model=model, rules=call("LGMPGD", loss=Sum("picture"), vae=vae)[0])[0], 2.0
        )
    )[0],
    "through": loaded(lambda: stage.ours(through))[0],
    "through, one condition": loaded(lambda: stage.ours(call("LGDPS", loss=Sum())[0], negative=False))[0],
    "two nodes": loaded(
        lambda: stage.ours(
            through,
            model=call("LGApplyGuidance", model=model, rules=call("LGMPGD", loss=Sum("picture"), vae=vae)[0])[0],
        )
    )[0],
    "off": loaded(lambda: stage.ours(call("LGDPS", loss=Sum(), guidance_scale=0.0, rules=cfg(2.0))[0]))[0],
}

# a sampler's own classifier is loaded beside the model with what the model needs, and never with nothing
(shift,) = call("LGClassifierMeanShift", classifier=classifier, label="cat", guidance_scale=1.0)
(ddpm,) = call("LGSamplerDDPM", variance="beta", rules=shift)


def by_ddpm(rules):
    return stage.guider(rules).sample(stage.noise, stage.latent, ddpm, stage.sigmas, disable_pbar=True, seed=5)


result["beside the sampler"] = loaded(lambda: by_ddpm(cfg(2.0)))
result["beside the sampler, through"] = loaded(lambda: by_ddpm(through))

# an interrupt is heard inside a step
tfg = {"guidance_scale": 0.0, "iterations": 30, "gamma": 0.0}
for space in ("picture", "latent"):
    loss = Sum(space, stop=2)
    said = refused(lambda loss=loss: stage.ours(call("LGTrainingFreeGuidance", loss=loss, vae=vae, **tfg)[0]))
    result[f"interrupted, {space}"] = [said, loss.asked]
    comfy.model_management.interrupt_current_processing(False)
both = call(
    "LGLossSum", loss_1=call("LGLossClassLabel", classifier=classifier, label="cat")[0], loss_2=Sum("latent", stop=2)
)[0]
said = refused(lambda: stage.ours(call("LGTrainingFreeGuidance", loss=both, **tfg)[0]))
result["interrupted, classifier"] = [said, both.loss_2.asked]
comfy.model_management.interrupt_current_processing(False)

# what is left in memory after a run through the network: done, failed, and interrupted


class Saved:
    """What autograd keeps of a tensor, for as long as its graph lives."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()  # without the graph, which would keep itself
        graphs.add(self)
        most[0] = max(most[0], len(graphs))


class Fails(Sum):
    """A loss that fails at its second time, when the network has its graph."""

    def __call__(self, estimate):
        if self.asked == 1:
            raise ValueError("on purpose")
        return super().__call__(estimate)


def living():
    """Bytes of all tensors that Python knows of."""
    gc.collect()
    storages = [each.untyped_storage() for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def through_once(make, errors):
    """Sample by DPS and the loss that ``make`` makes, keep its error in ``errors``; weak references to what took part."""
    loss = make()
    guider = stage.guider(call("LGDPS", loss=loss, rules=cfg(2.0))[0])
    try:
        stage.run(guider)
    except BaseException as error:  # an interrupt is no Exception in newer ComfyUIs
        errors.append(error)
    comfy.model_management.interrupt_current_processing(False)
    return [weakref.ref(found) for found in (loss, guider, guider.model_patcher)]


def left_of(make):
    """What is still there after such a run, while its error is kept and after that."""
    through_once(make, [])  # makes what is made once
    before, errors = living(), []
    most[0] = 0
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        parts = through_once(make, errors)
    said, kept = "".join(type(error).__name__ for error in errors), [len(graphs), living() - before]
    errors.clear()
    bytes_left = living() - before
    return {
        "said": said, "at most": most[0], "graph, error kept": kept[0], "bytes, error kept": kept[1],
        "graph": len(graphs), "bytes": bytes_left, "parts": sum(found() is not None for found in parts),
    }  # fmt: skip


def interrupting():
    """A loss that interrupts ComfyUI at its second time, and then asks a classifier, who hears of it."""
    heard = call("LGLossClassLabel", classifier=classifier, label="cat")[0]
    return call("LGLossSum", loss_1=Sum(stop=2), loss_2=heard)[0]


graphs, most = weakref.WeakSet(), [0]
result["left"] = {
    "done": left_of(Sum), "failed": left_of(Fails), "interrupted": left_of(interrupting),
}  # fmt: skip

# several GPUs, and networks under dynamic VRAM
spread = model.clone()
spread.set_additional_models("multigpu", [classifier.patcher])
result["several GPUs"] = refused(lambda: stage.guider(through, model=spread))
result["several GPUs, a leaf"] = refused(lambda: stage.guider(mpgd("latent"), model=spread))


class Control:
    previous_controlnet = None

    def get_models(self):
        return [Paged]

    def get_extra_hooks(self):
        return []


class Paged:
    @staticmethod
    def is_dynamic():
        return True


controlled = [[entry[0], {**entry[1], "control": Control()}] for entry in positive]
result["a ControlNet under dynamic VRAM"] = refused(
    lambda: call("LGGuider", model=model, positive=controlled, negative=negative, rules=through)
)

if hasattr(
    comfy.model_patcher, "ModelPatcherDynamic"
):  # on a CPU ComfyUI makes none: one that behaves so towards those who ask

    class Dynamic(comfy.model_patcher.ModelPatcher):
        non_dynamic_delegate_model = None
        get_non_dynamic_delegate = comfy.model_patcher.ModelPatcherDynamic.get_non_dynamic_delegate

        def is_dynamic(self):
            return True

    def dynamic(patcher, loader):
        made = Dynamic(patcher.model, patcher.load_device, patcher.offload_device)
        made.cached_patcher_init = None if loader is None else (lambda disable_dynamic: loader(), ())
        return made

    plain = call("LGLoadCheckpoint", checkpoint="tiny")[0]
    times = []
    paged = dynamic(plain, lambda: times.append(0) or call("LGLoadCheckpoint", checkpoint="tiny")[0])
    lora = {"diffusion_model.out.2.weight": (0.5 * torch.ones_like(plain.model.diffusion_model.out[2].weight),)}
    for patcher in (paged, patched := model.clone()):
        assert patcher.add_patches(lora, 1.0)
    guiders = [stage.guider(through, model=paged) for _ in range(2)]
    result["dynamic"] = {
        "of the guiders": [guider.model_patcher.is_dynamic() for guider in guiders],
        "loaded once more": len(times),
        "same as plain": far(stage.ours(through, model=patched), stage.run(guiders[0])),
        "without the LoRA": far(stage.ours(through), stage.run(guiders[0])),
        "a leaf rule's": stage.guider(mpgd("latent"), model=paged).model_patcher.is_dynamic(),
        "no loader": refused(lambda: stage.guider(through, model=dynamic(plain, None))),
    }
    own = vae.patcher
    vae.patcher = dynamic(own, lambda: call("LGLoadCheckpoint", checkpoint="tiny")[2].patcher)
    decoder = call("LGMPGD", loss=Sum("picture"), vae=vae)[0][0].vae
    result["dynamic"]["of the decoder"] = decoder.patcher.is_dynamic()
    result["dynamic"]["its network is its patcher's"] = (
        decoder.network is decoder.patcher.model and decoder.network is not own.model
    )
    by_plain = (vae.first_stage_model.decode(stage.noise), decoder.decode(stage.noise, clamp=False))
    result["dynamic"]["pictures"] = far(by_plain[0], by_plain[1])
    vae.patcher = dynamic(own, None)
    result["dynamic"]["a VAE without a loader"] = refused(lambda: call("LGMPGD", loss=Sum("picture"), vae=vae))
    vae.patcher = own

# nodes that change how many tokens there are, beside weakened attention


def hyper_tile():
    """``model`` with core's HyperTile, in the form of either version."""
    cls = importlib.import_module("comfy_extras.nodes_hypertile").HyperTile
    inputs = {"tile_size": 32, "swap_size": 2, "max_depth": 3, "scale_depth": False}
    made = cls.execute(model, **inputs) if hasattr(cls, "execute") else cls().patch(model, **inputs)
    return getattr(made, "result", made)[0]


def merging():
    """``model`` with every second query left out and put back, as Token Merging does it to layers of full size, which tiny has not."""
    merged = model.clone()
    merged.set_model_attn1_patch(lambda q, k, v, _: (q[:, ::2], k, v))
    merged.set_model_attn1_output_patch(lambda out, _: out.repeat_interleave(2, dim=1))
    return merged


others = {"ToMe": merging(), "HyperTile": hyper_tile()}
weak = {
    "identity": call("LGPerturbedAttention", layers="all", scale=1.0)[0],
    "blur": call("LGSmoothedEnergy", layers="all", blur_sigma=1.0, scale=1.0)[0],
}
for node, changed in others.items():
    for name, rules in weak.items():
        result[f"{node}, {name}"] = refused(lambda rules=rules, changed=changed: large.ours(rules, model=changed))
    result[f"{node}, CFG"] = refused(lambda changed=changed: large.ours(cfg(2.0), model=changed))

# a guider that changes its scale from step to step


class Falling(comfy.samplers.CFGGuider):
    def predict_noise(self, x, timestep, model_options=None, seed=None):
        self.cfg = 3.0 if float(timestep.max()) > float(stage.sigmas[1]) * 1.001 else 1.5
        return super().predict_noise(x, timestep, model_options, seed)


def falling(model):
    guider = Falling(model)
    guider.set_conds(positive, negative)
    return stage.run(guider)


on_model = call("LGApplyGuidance", model=model, rules=call("LGLimitedInterval", sigma_lo=0.0, sigma_hi=1000.0)[0])[0]
result["a scale that falls"] = far(falling(model), falling(on_model))
result["it does fall"] = far(falling(model), stage.core(model, 3.0))

# conditions as named tuples, and windows over what has no height
Pair = namedtuple("Pair", "a b")
normal_conds = part("nodes.runtime.comfy.gradients").normal_conds
pair = normal_conds([{"model_conds": Pair(torch.ones(1), 2)}])[0]["model_conds"]
result["a named tuple"] = type(pair).__name__
result["windows over a line"] = refused(
    lambda: Stage(model, positive, negative, torch.zeros(1, 4, 8)).ours(call("LGSlidingWindow", scale=1.0, size=0.7)[0])
)
