# ruff: noqa: TID253
"""Pictures of a few prompts while training goes on. The ranks share the prompts.

Latents become RGB through the shard set's linear map, so no VAE is loaded; `preview_vae` decodes
with the model's own instead.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from qwen_lora.families.base import Family, LatentDecoder
from qwen_lora.shards.previews import PreviewPrompt
from qwen_lora.train.cost.shapes import Shape
from qwen_lora.train.draw import draw_latents, drawing_mode
from qwen_lora.train.preview_files import PreviewFiles
from qwen_lora.train.preview_plan import PreviewPlan
from qwen_lora.train.ranks import Ranks
from qwen_lora.train.short_memory import ShortMemory

if TYPE_CHECKING:
    from qwen_lora.models import ModelFolder
    from qwen_lora.train.assemble import Trainable
    from qwen_lora.train.run_folder import RunFolder

MAP_MAX_SIDE = 512  # pixels stored of a picture by the linear map, which shows no finer detail


@dataclass(frozen=True)
class Previews:
    """Draws a plan's pictures. transformer: the unwrapped one that is trained."""

    plan: PreviewPlan
    ranks: Ranks
    transformer: torch.nn.Module
    family: Family
    scheduler_config: Mapping[str, Any]
    files: PreviewFiles
    memory: ShortMemory
    decoder: LatentDecoder | None = None  # None: the linear map
    in_step: bool = False  # every rank has to run the transformer equally often

    def run(self, step: int, should_stop: Callable[[], int]) -> list[Image.Image] | None:
        """Draw every prompt and publish the pictures; rank 0 gets them, other ranks an empty list.

        None when a stop was asked for on any rank. Raises on every rank what one of them met.
        """
        prompts, world = self.plan.prompts, self.ranks.world
        pictures: list[bytes] = []
        with drawing_mode(self.transformer):
            for first in range(0, len(prompts), world):
                number = first + self.ranks.rank
                own, failure = b"", None
                try:
                    if number < len(prompts):
                        own = _png(self._picture(prompts[number]))
                    elif self.in_step:
                        self._picture(prompts[first])  # with the others, for nothing
                except Exception as error:
                    if self.in_step:  # the others are in the middle of it: the lifeline tells them
                        raise
                    failure = error
                if self.ranks.agree(failure, should_stop()):
                    return None
                gathered = self.ranks.gather_json(base64.b64encode(own).decode())
                pictures += [base64.b64decode(data) for data in gathered if data]
        self.ranks.on_main(lambda: self.files.write(step, pictures, self._facts(step)))
        return [Image.open(io.BytesIO(data)) for data in pictures] if self.ranks.is_main else []

    def _picture(self, prompt: PreviewPrompt) -> Image.Image:
        drawing, unconditional = self.plan.drawing, self.plan.unconditional
        height, width = (side * self.family.latent_scale for side in drawing.latent_size)
        longest = max(len(prompt.prompt_embeds), len(unconditional[0]))
        return self.memory.without_gradients(
            f"a preview of {height} x {width} px",
            Shape(drawing.latent_size, (longest,)),
            lambda: self._draw(prompt),
            "a smaller preview_size; or preview_steps: 0",
        )

    def _draw(self, prompt: PreviewPrompt) -> Image.Image:
        latents = draw_latents(  # [C, h, w]
            self.transformer,
            self.family,
            self.scheduler_config,
            self.plan.drawing,
            (prompt.prompt_embeds, prompt.prompt_mask),
            self.plan.unconditional,
            self.ranks.device,
        )
        return self._decode(latents)

    def _decode(self, latents: torch.Tensor) -> Image.Image:
        if self.decoder is not None:
            decoded = self.decoder.decode(latents[None], self.ranks.device)[0]  # [3, H, W]
            scaled = (decoded / 2 + 0.5).clamp(0, 1) * 255
            pixels: NDArray[np.uint8] = scaled.round().to(torch.uint8).permute(1, 2, 0).numpy()
            return Image.fromarray(np.ascontiguousarray(pixels))
        assert self.plan.rgb is not None
        finite = np.nan_to_num(latents.numpy(), nan=0, posinf=0, neginf=0)
        picture = Image.fromarray(self.plan.rgb.apply(finite))
        picture.thumbnail((MAP_MAX_SIDE, MAP_MAX_SIDE), Image.Resampling.LANCZOS)
        return picture

    def _facts(self, step: int) -> dict[str, Any]:
        drawing = self.plan.drawing
        return {
            "step": step,
            "prompts": [prompt.prompt for prompt in self.plan.prompts],
            "size": [side * self.family.latent_scale for side in drawing.latent_size],
            "inference_steps": drawing.steps,
            "guidance": drawing.guidance,
            "seed": drawing.seed,
            "decoder": "linear map" if self.decoder is None else "vae",
        }


def build_previews(
    ranks: Ranks,
    run: RunFolder,
    model: ModelFolder,
    trainable: Trainable,
    plan: PreviewPlan | None,
    in_step: bool = False,
) -> Previews | None:
    """What draws `plan`; loads the VAE's decoder when the plan has no linear map."""
    if plan is None:
        return None
    decoder = None
    if plan.rgb is None:
        # float16 is too narrow for a VAE's activations.
        dtype = torch.float32 if trainable.dtype is torch.float16 else trainable.dtype
        decoder = ranks.everywhere(lambda: model.family.load_latent_decoder(model, dtype=dtype))
    return Previews(
        plan,
        ranks,
        trainable.transformer,
        model.family,
        model.config("scheduler"),
        run.previews,
        trainable.memory,
        decoder,
        in_step,
    )


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
