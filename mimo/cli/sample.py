"""`mimo sample`: the options; mimo.sampling does the work."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mimo.cli.options import Device, changed, find_device, require_folder
from mimo.errors import InputError


@dataclass
class Sample:
    """Draw videos from a checkpoint; writes mp4, GIF and a contact sheet, and on request every pixel.

    What is not given is taken from the configuration in the checkpoint.

    Args:
        checkpoint: a run folder (its newest checkpoint) or one of its checkpoints/step_* folders.
        out: folder for the results.
        context: a video or npz trajectory whose first frames are continued; without it the video starts from nothing.
        context_frames: how many frames of --context are given to the model.
        start: first frame of --context that is used.
        interval: take every n-th frame of --context, and tell n to a model that was trained with --model.max-interval;
            it must have occurred in training. The default is the smallest of training.
        actions: npz file with the actions of the video; without it those of the context, in it or in an npz beside it.
        label: class of the video, 0 .. number of classes - 1.
        text: safetensors file with the features of a text, `text` [tokens, width], for a model that is told texts.
        frames: frames of the result, context included.
        count: number of videos.
        seed: of the noise; the same seed gives the same video.
        sampler: "ddim" for v-prediction, "euler" for flow, "ddpm" for a token head.
        steps: denoising steps per frame; of a model with a token head per token.
        mask_steps: of a model with a token head: in how many steps the tokens of a frame are predicted.
        history_guidance: 1 is none.
        class_guidance: of class or actions; 1 is none.
        window: latent frames that a frame sees, the latest, itself included: long videos in constant memory.
        sink: the first frames, which stay visible beside the window.
        temperature: factor on the noise that the first and the last frame start from, linear in between; 1 is none. Not
            VideoMAR's, which is --token-temperature, and not for a model with a token head.
        token_temperature: of a model with a token head: factor on the noise that its steps add, at the first frame and
            at late ones: last + (first - last) 10^-t. "1 0.9" is VideoMAR's.
        history_noise: standard deviation of the noise on the first and the last frame as the history of later ones; 0
            is none. A network that was trained with --model.noise-levels (MAGI) is told the nearest level.
        interpolate: the frames of a video longer than those of training stand at times between those of training
            (MAGI); for networks with positions="sincos".
        weights: the averaged weights, or those of the last step.
        tokenizer_weights: where the tokenizer's weights lie, if not where they lay when the model was trained.
        trust_pickle: read tokenizer weights that hold pickled objects, which can run any code.
        fps: frame rate of the results.
        format: an mp4 and a GIF are always written, to look at. "npz" adds `video` uint8 [F, H, W, 3], which every
            command reads as a clip, "png" a folder of frames: both at the network's own size with every pixel as it is.
        overwrite: replace results that are there.
        save_every: latent frames after which the unfinished run is saved in OUT/unfinished.
        resume: continue the run in OUT/unfinished that was interrupted; the other options are to be the same.
        device: where to sample; "auto" takes a GPU if there is one.
    """

    checkpoint: Path
    out: Path
    context: Path | None = None
    context_frames: int | None = None
    start: int = 0
    interval: int | None = None
    actions: Path | None = None
    label: Annotated[int | None, tyro.conf.arg(name="class")] = None
    text: Path | None = None
    frames: int | None = None
    count: int = 1
    seed: int = 0
    sampler: Literal["ddim", "euler", "ddpm"] | None = None
    steps: int | None = None
    mask_steps: int | None = None
    history_guidance: float | None = None
    class_guidance: float | None = None
    window: int | None = None
    sink: int | None = None
    temperature: tuple[float, float] | None = None
    token_temperature: tuple[float, float] | None = None
    history_noise: tuple[float, float] | None = None
    interpolate: bool | None = None
    weights: Literal["ema", "model"] = "ema"
    tokenizer_weights: Path | None = None
    trust_pickle: bool = False
    fps: float = 10.0
    format: Literal["mp4", "png", "npz"] = "mp4"
    overwrite: bool = False
    save_every: int | None = None
    resume: bool = False
    device: Device = "auto"

    def run(self) -> None:
        from mimo.checkpoint import step_folders
        from mimo.sampling.loading import load
        from mimo.sampling.request import UNFINISHED, Request, sample

        require_folder(self.out)
        loaded = load(
            self.checkpoint,
            weights=self.weights,
            tokenizer_weights=self.tokenizer_weights,
            trust_pickle=self.trust_pickle,
            device=find_device(self.device),
        )
        options = (
            "sampler",
            "steps",
            "mask_steps",
            "history_guidance",
            "class_guidance",
            "window",
            "sink",
            "temperature",
            "token_temperature",
            "history_noise",
            "interpolate",
        )
        chosen = {name: getattr(self, name) for name in options if getattr(self, name) is not None}
        if chosen.get("class_guidance", 1) != 1 and self.label is None and not loaded.model.config.num_actions:
            told = "--text" if loaded.model.config.text_dim else "--class"
            if self.text is None:
                raise InputError(f"--class-guidance {self.class_guidance:g}: expected a {told} to guide to")
        for name in ("mask_steps", "token_temperature"):
            if name in chosen and not loaded.model.config.token_depth:
                raise InputError(f"--{name.replace('_', '-')} {chosen[name]}: this model has no token head")
        config = changed(loaded.sample_config, **chosen)
        request = Request(**{field.name: getattr(self, field.name) for field in fields(Request)})
        try:
            sample(loaded, config, self.out, request)
        except KeyboardInterrupt:
            if (self.save_every or self.resume) and step_folders(saved := self.out / UNFINISHED):
                raise KeyboardInterrupt(f": --resume continues the run in {saved}") from None
            raise
