"""What differs between model families, as one small interface.

Nothing outside `families/` knows channel counts, latent scales, packing, templates or text widths.
`Family` objects are cheap and import no torch until a method needs it.

Shapes: B samples, C latent channels, H x W image pixels, h x w latent pixels, T text tokens,
D text width.
Every size is [height, width].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from qwen_lora.models import ModelFolder


@dataclass(frozen=True)
class EncodedCaption:
    """One caption's conditioning."""

    prompt_embeds: torch.Tensor  # [T, D], compute dtype, CPU, trimmed to its true length
    prompt_mask: (
        torch.Tensor
    )  # [T] bool, CPU; all True for families that never mask inside a prompt


@dataclass(frozen=True)
class EncodedLatents:
    """Normalised latents of a batch, on the CPU in float32."""

    mean: torch.Tensor  # [B, C, h, w], the posterior's mode
    std: torch.Tensor  # [B, C, h, w], the posterior's spread in the same normalised units


@dataclass(frozen=True)
class TokenCount:
    tokens: int  # kept by the encoder: what prompt_embeds will have as T
    truncated: int  # tokens cut off the end of the caption


def among(index: int, chosen: int, of: int) -> bool:
    """Whether number `index` is one of so many that are chosen, spread evenly."""
    return (index + 1) * chosen // of > index * chosen // of


@dataclass(frozen=True)
class Recompute:
    """What the backward pass computes anew instead of keeping it: nothing, all but the results of
    matrix products and attention (selective), or whole blocks (some: `blocks` of them, spread
    evenly; full)."""

    kind: Literal["none", "selective", "some", "full"] = "full"
    blocks: int = 0

    @classmethod
    def parse(cls, text: str) -> Recompute:
        """none, selective, full, or the number of blocks, as it is written or printed. Raises
        ValueError."""
        text = text.removesuffix(" blocks")
        if text.isdecimal():
            return cls("some", int(text))
        if text in ("none", "selective", "full"):
            return cls(text)  # type: ignore[arg-type]
        raise ValueError("must be none, selective, full or a number of blocks")

    def applies_to(self, index: int, of: int) -> bool:
        if self.kind == "some":
            return among(index, self.blocks, of)
        return self.kind != "none"

    def budget(self, of: int) -> float:
        """For compiled blocks, of which there are `of`: the share of what nothing recomputed would
        keep that they may keep. A number of blocks is the memory that recomputing them whole would
        leave, for all blocks alike."""
        if self.kind == "some":
            return 1 - min(self.blocks, of) / of
        return 0.0 if self.kind == "full" else 1.0

    def __str__(self) -> str:
        return f"{self.blocks} blocks" if self.kind == "some" else self.kind


@dataclass(frozen=True)
class ForwardOptions:
    """How a transformer with its LoRA runs in training. None changes the mathematics."""

    own: bool = True  # this project's forward pass; False: diffusers'
    recompute: Recompute = Recompute()
    compiled: bool = False  # torch.compile, once for all blocks
    # How many blocks' base weights stay on the device; the others are in host memory and are copied
    # for each use. None: as they were loaded.
    blocks_on_device: int | None = None
    offload_activations: bool = False  # what recomputed blocks keep, to host memory meanwhile
    activations_on_device: int = 0  # blocks, spread evenly, whose activations stay all the same


class PromptTokenizer(Protocol):
    def count(self, captions: Sequence[str]) -> list[TokenCount]:
        """Token counts without the text encoder; equal to what `PromptEncoder.encode` returns."""
        ...


class PromptEncoder(Protocol):
    text_width: int  # D

    def encode(self, captions: Sequence[str]) -> list[EncodedCaption]:
        """Encode one batch of captions in the model's own template. One forward pass."""
        ...


class LatentEncoder(Protocol):
    def encode(self, pixels: torch.Tensor) -> EncodedLatents:
        """Encode one batch. pixels: [B, 3, H, W] float32 in [-1, 1], any device."""
        ...


class LatentDecoder(Protocol):
    def decode(self, latents: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Latents of one image, [1, C, h, w] float32 as in the records, to [1, 3, H, W] float32 in
        [-1, 1] on the CPU. The weights are on `device` only meanwhile, otherwise on the CPU."""
        ...


class Family(Protocol):
    """One architecture's answers. Stage 1 uses the encoders, stage 2 the transformer alone."""

    name: str  # "qwen-image"; stands in every shard set's fingerprint
    pipeline_class: str  # `_class_name` in model_index.json
    transformer_class: str  # `_class_name` in transformer/config.json
    image_multiple: int  # image sides are multiples of this many pixels
    latent_channels: int  # C
    latent_scale: int  # pixels per latent pixel, each side

    # ---- stage 1 ----------------------------------------------------------------------------

    def encoder_facts(self, model: ModelFolder) -> dict[str, Any]:
        """What shapes the tensors besides weights and dtypes: named config keys, the template, the
        token limits, tokenizer file hashes. JSON values; `vae` and `text` are separate keys, since
        latent ids depend on the first and text ids on the second."""
        ...

    def text_width(self, model: ModelFolder) -> int:
        """D of the prompt embeddings, from the text encoder's config alone."""
        ...

    def load_tokenizer(self, model: ModelFolder) -> PromptTokenizer: ...

    def load_prompt_encoder(
        self,
        model: ModelFolder,
        *,
        device: torch.device,
        dtype: torch.dtype,
        quantization: str = "none",
        offload: bool = False,
        prefix_cache: bool = True,
    ) -> PromptEncoder:
        """Load only the text encoder (no vision tower, no lm_head). `offload` streams the layers
        from host memory through accelerate; `quantization` is none, int8 or nf4; `prefix_cache`
        computes what all captions begin with once."""
        ...

    def load_latent_encoder(
        self, model: ModelFolder, *, device: torch.device, dtype: torch.dtype
    ) -> LatentEncoder: ...

    # ---- stage 2 ----------------------------------------------------------------------------

    def transformer_facts(self, config: Mapping[str, Any]) -> dict[str, int]:
        """`latent_channels` and `text_width` that a transformer config implies, for the check
        against a shard set before any weight is read."""
        ...

    def load_transformer(
        self,
        model: ModelFolder,
        *,
        device: torch.device,
        dtype: torch.dtype,
        base_precision: str = "bf16",
        low_precision_products: str = "none",
        modulation_table: Path | None = None,
        blocks_on_device: int | None = None,
        mesh: DeviceMesh | None = None,
    ) -> torch.nn.Module:
        """The frozen transformer in eval mode. base_precision fp8, int8 or nf4 replaces Linears of
        the blocks while loading; any other value leaves `dtype`. low_precision_products: none,
        forward or both, with fp8 and int8. With a file that `make_modulation_table` made, the
        weights that it stands for are not loaded. Of the blocks all but `blocks_on_device` go to
        host memory one by one; None: all stay. With a `mesh` each of its processes holds a part of
        the blocks' weights; all of them then have to run the transformer equally often."""
        ...

    def block_count(self, config: Mapping[str, Any]) -> int:
        """How many blocks a transformer config asks for."""
        ...

    def empty_transformer(
        self,
        model: ModelFolder,
        *,
        blocks: int,
        dtype: torch.dtype,
        base_precision: str = "bf16",
        low_precision_products: str = "none",
        tabled: bool = False,
    ) -> torch.nn.Module:
        """What `load_transformer` would make, on the meta device and with so many blocks: it can
        be run for its shapes. Only the transformer's config is read."""
        ...

    def compiled_bytes(
        self,
        transformer: torch.nn.Module,
        latent_size: tuple[int, int],
        text_tokens: Sequence[int],
        budget: float,
    ) -> int:
        """What a compiled block in the middle keeps for the backward pass besides its inputs, of
        what `empty_transformer` made with a LoRA on it. text_tokens: of each sample; budget:
        `Recompute.budget`."""
        ...

    def stored_bytes(self, transformer: torch.nn.Module) -> int:
        """Of the base weights of what `empty_transformer` made, as they would be held."""
        ...

    def low_precision_product(
        self, kind: str, side: int, device: torch.device
    ) -> Callable[[], torch.Tensor]:
        """One product of two square factors as a base in fp8 or int8 runs it with
        `low_precision_products`, without the element-wise work around it. Raises InputError where
        such products do not run."""
        ...

    def make_modulation_table(
        self, model: ModelFolder, path: Path, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Write what the time-dependent layers give at every noise level that a run in `dtype` can
        draw into the empty file `path`. Raises InputError for a dtype with too many."""
        ...

    def prepare_training(self, transformer: torch.nn.Module, options: ForwardOptions) -> None:
        """Choose how `velocity` runs a transformer that has its LoRA."""
        ...

    def to_tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] as the transformer takes them, [B, n, P]: the same numbers in its order."""
        ...

    def token_velocity(
        self,
        transformer: Callable[..., Any],
        tokens: torch.Tensor,
        latent_size: tuple[int, int],
        sigmas: torch.Tensor,
        prompt_embeds: Sequence[torch.Tensor],
        prompt_masks: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """`velocity` of what `to_tokens` gave for noised latents of [h, w], in float32 or the
        compute dtype. Returns tokens [B, n, P] float32."""
        ...

    def velocity(
        self,
        transformer: Callable[..., Any],
        latents: torch.Tensor,
        sigmas: torch.Tensor,
        prompt_embeds: Sequence[torch.Tensor],
        prompt_masks: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Predicted velocity for noised latents.

        latents: [B, C, h, w] float32; sigmas: [B] float32, already rounded to the compute dtype, on
        the CPU or with the latents;
        prompt_embeds: B tensors [T_i, D]; prompt_masks: B tensors [T_i] bool.
        Returns [B, C, h, w] float32. No attention mask is built when all T_i are equal and true.
        """
        ...

    def lora_target_modules(
        self, transformer: torch.nn.Module, targets: str | Sequence[str]
    ) -> list[str]:
        """Full module names for a named set (`attention`, `attention+text`, `all-linear`,
        `all-linear+mod`) or a list of name endings, without modules that get no gradient.
        Raises InputError for an ending that matches nothing."""
        ...

    def timestep_shift(
        self, scheduler_config: Mapping[str, Any], latent_size: tuple[int, int]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The scheduler's own shift for one latent size [h, w], as a function on sigmas."""
        ...

    def inference_sigmas(
        self, scheduler_config: Mapping[str, Any], latent_size: tuple[int, int], steps: int
    ) -> torch.Tensor:
        """The noise levels that the pipeline samples at, [steps + 1] float32: from about 1 down,
        the last one is 0. steps: at least 2."""
        ...

    def guided_velocity(
        self, conditional: torch.Tensor, unconditional: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Classifier-free guidance as the pipeline does it; all [B, C, h, w] float32."""
        ...

    def load_latent_decoder(self, model: ModelFolder, *, dtype: torch.dtype) -> LatentDecoder:
        """The VAE's decoder, on the CPU. Only exact previews ask for it."""
        ...

    def attention_shape(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """(heads, width of a head) of a transformer's config."""
        ...

    def image_tokens(self, latent_size: tuple[int, int]) -> int:
        """Transformer tokens of one image, for planning."""
        ...

    def pipeline(self) -> Any:
        """The diffusers pipeline class, for sampling and for saving LoRA files."""
        ...
