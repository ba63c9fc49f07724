"""The recipe's section about the model: its parts, how it sees an image, what trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from utils.setting import MISSING, setting


@dataclass(frozen=True)
class LoraConfig:
    """LoRA on the language model's linear layers."""

    r: int = setting(8, "rank; 0: no LoRA; below 0: the layers train in full instead")
    alpha: int = setting(16, "scale times rank", 1)
    dropout: float = setting(0.05, "dropout before the factors", 0, 1, below=True)
    target_modules: tuple[str, ...] = setting(("q_proj", "v_proj"), "linear layers that get LoRA")


@dataclass(frozen=True)
class TowerConfig:
    """How the vision tower sees an image. null: as the folder of the weights says, else as the tower was built."""

    size: int | None = setting(
        None, "side of its view; for a side that it was not built for, its position table is resized", 1
    )
    pad: bool | None = setting(None, "show the full image, with padding that nothing attends to, not its centre")
    stats: Literal["sam", "tower"] | None = setting(
        None, "mean and deviation that normalise a padded view: SAM's (as released) or the tower's own"
    )
    pool: int | None = setting(None, "average this many patches per side into one image token", 1)
    position_resize: Literal["released", "correct"] | None = setting(
        None, "how the position table is resized: as released (off by one row) or correctly"
    )
    min_pixels: int | None = setting(
        None, "Qwen-VL, InternVL: fewest pixels of an image after it is resized; smaller ones are enlarged", 1
    )
    max_pixels: int | None = setting(
        None, "Qwen-VL, InternVL: most pixels of an image after it is resized; InternVL: of all tiles together", 1
    )
    resize: Literal["once", "twice"] | None = setting(
        None, "Qwen-VL: resize once, or twice as Sa2VA does in inference: first to the nearest multiples of 28 pixels"
    )
    preprocessor: str | None = setting(
        None, "image-processor file: the size of the view, and mean and deviation where nothing is padded", path=True
    )
    new_projector: bool = setting(
        False, "a new projector, two layers, twice as wide between: in place of a base's, or for a plain language model"
    )
    train_projector: bool = setting(False, "train the projector")
    train: bool = setting(False, "train the tower itself, which all published systems keep frozen")
    feature_layer: int | None = setting(
        None, "its hidden state that is projected: -2 is the last but one layer's output; null: the family's usual one"
    )


@dataclass(frozen=True)
class CacheConfig:
    """Embeddings of the frozen mask encoder, kept on disk (fp16, 2 MiB per image) for later epochs and evaluations.

    An evaluation keeps them only where its own command line says so.
    """

    folder: str = setting(MISSING, "where they lie; processes and runs may share it", path=True)
    max_gib: float = setting(20.0, "size of the folder; least recently used embeddings go first", 0, above=True)


@dataclass(frozen=True)
class ModelConfig:
    """The model: its weights, how it sees images, what trains and how it is computed."""

    version: str = setting(
        "",
        "base LLaVA, plain LLaMA (`tower.new_projector`) or finished checkpoint: a folder, or a name on the hub",
    )
    vision_tower: str | None = setting(
        "openai/clip-vit-large-patch14",
        "folder or hub name of CLIP, SigLIP, DINOv2 or DINOv3; null: the one inside or named by `version`",
    )
    checkpoint_file: str | None = setting(
        None,
        "a training program's file of all weights (a bare .bin) over those of `version`",
    )
    checkpoint_alpha: float | None = setting(
        None, "alpha of the LoRA in `checkpoint_file`, which no file holds; null: `lora.alpha`", 0, above=True
    )
    mask_head: str | None = setting(
        None, "mask head under any system: sam, sam2, sam3 or pixel; null: the finished folder's, else the system's"
    )
    vision_pretrained: str | None = setting(
        None, "weights of the mask head (SAM, SAM 2, SAM 3), file or folder; null: those inside `version`"
    )
    conv_type: str | None = setting(
        None, "conversation template; null: that of the tokenizer's family, e.g. llava_v1 or qwen_chat"
    )
    tokenization: Literal["transformers-4.31", "transformers-4.44"] | None = setting(
        None,
        "library release whose ids around LLaMA's added tokens are reproduced; null: the folder's, else 4.31",
    )
    tokenizer_legacy: bool | None = setting(
        True, "a blank before text that follows one of LLaMA's added tokens; null: as the folder's files say"
    )
    model_max_length: int = setting(
        512, "longest row, after the image is expanded, that may be trained on; 0: no limit", 0
    )
    image_size: int | None = setting(
        None, "side of the mask encoder's view; null: what it was built for (SAM: 1024, which cannot be another)", 1
    )
    text_projection: Literal["mlp", "linear", "norm_mlp"] = setting(
        "mlp",
        "layers from a state to mask prompts: mlp (published by most), linear (LISA's ablation), norm_mlp (UniPixel)",
    )
    prompts_per_token: int = setting(
        1, "mask prompts that the state of a mask token gives; published by UniPixel: 2", 1
    )
    out_dim: int | None = setting(None, "width of the mask prompt; null: what the mask head takes (SAM: 256)", 1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "bf16",
        "number format of weights and activations; auto: bf16 on devices with instructions for it, else fp32",
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = setting(
        "auto", "attention kernel; auto: flash attention where it is installed and can run, else sdpa"
    )
    pack_rows: bool = setting(
        True, "dialogues of one image share their common prefix (with flash attention only padding is saved)"
    )
    pack_length: int = setting(
        0, "with pack_rows: several images share a sequence of up to this many positions; 0: one sequence per image", 0
    )
    draft_tokens: int = setting(
        32, "tokens of an answer that are drafted from its question at once and verified in one pass; 0: none", 0
    )
    use_mm_start_end: bool = setting(
        True, "wrap the image in <im_start> and <im_end> (Qwen and InternVL always have a wrap of their own)"
    )
    train_mask_decoder: bool = setting(True, "train the mask decoder")
    train_language: bool = setting(
        True, "without LoRA (lora.r = 0): train the language model in full, not only its vocabulary"
    )
    train_vocabulary: Literal["full", "new_tokens"] = setting(
        "full", "rows of the input and output vocabulary that train: all (published), or those of the added tokens"
    )
    gradient_checkpointing: bool = setting(True, "recompute the language model's layers in the backward pass")
    decoder_checkpointing: bool = setting(True, "decode masks again in the backward pass: 100 MB less per mask (fp32)")
    compile: str = setting(
        "", "torch.compile backend of the language model's layers in training, e.g. inductor; empty: none"
    )
    liger: bool = setting(False, "Liger's kernels in the language model's layers in training (NVIDIA GPU)")
    load_in_8bit: bool = setting(False, "8-bit language model (inference)")
    load_in_4bit: bool = setting(False, "4-bit language model; training adapters on it is QLoRA")
    allow_missing: bool = setting(False, "continue when a checkpoint lacks a needed weight or has unexpected ones")
    embedding_cache: CacheConfig | None = setting(
        None, "keep what the frozen encoder that masks are decoded from gives on disk; null: do not"
    )
    tower: TowerConfig = setting(TowerConfig(), "the vision tower's input and training")
    head_options: dict[str, Any] = setting(
        dict, "options of the mask head, among them decoder_heads: attention heads, which no tensor shape shows"
    )
    lora: LoraConfig = setting(LoraConfig(), "low-rank adapters")
