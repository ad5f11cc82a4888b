"""The typed configuration of a run: YAML recipe + dotted overrides -> `RunConfig`.

A recipe is one YAML file that describes a whole run; `extends:` names recipes that it starts from, later ones winning.
Every key is known: an unknown one is an error that names its nearest neighbour, at any depth.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from zero_ds.runtime.errors import ConfigError, did_you_mean

Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of every part of the configuration: unknown keys are refused, values are frozen once checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class EncoderConfig(Section):
    path: str
    """Folder or hub id of the vision encoder."""
    train_last_layers: int | None = Field(default=None, ge=1)
    """Train only the last n layers of the encoder (and what follows them); empty trains all of it."""
    feature_layer: int = -1
    """Index into the encoder's hidden states that feeds the adapter; -1 is the last one, -2 LLaVA-1.5's choice."""
    patch_norm: bool = False
    """Apply the encoder's final norm to the patch tokens, as the paper's reference implementation does."""


class AdapterConfig(Section):
    boundary_tokens: bool = False
    """Put a learned start- and end-of-image embedding around the image tokens, as the reference implementation does."""
    match_embeddings: bool = False
    """Scale the adapter's initial weights so that image tokens start with the standard deviation of word embeddings."""
    width: int | None = Field(default=None, ge=1)
    """Hidden size that the adapter was trained for, if not this decoder's; then a linear aligner follows it (A.8)."""


class SourceConfig(Section):
    path: str
    """Data file (JSON, JSON lines, Parquet), folder of such files, or hub id of a data set."""
    files: str | None = None
    """Which files of a folder or hub data set, such as `data/math-*`; all of them if empty."""
    root: str | None = None
    """Folder of the images; the data file's own folder if empty. No image path may leave it."""
    full_path: bool = False
    """Follow absolute image paths, wherever they lead, in records that say `full_path`."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first n samples."""
    images_only: bool = False
    """Leave out samples without a picture, such as the 40K of LLaVA-1.5-665K."""

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """A word, or `name`, calls a registered data set, of which other keys replace entries; or it is a path."""
        known = registered_data()
        if isinstance(value, str):
            return known.get(value, {"path": value})
        if isinstance(value, dict) and "name" in value:
            name, own = value["name"], {key: entry for key, entry in value.items() if key != "name"}
            if not isinstance(name, str) or name not in known:
                raise ValueError(f"there is no data set '{name}'{did_you_mean(str(name), list(known))}")
            return {**known[name], **own}
        return value


def registered_data() -> dict[str, Any]:
    """Name -> entry of the data sets that recipes call by name; `datasets.yaml` in the working folder comes first.

    Raises:
        ConfigError: a file that cannot be read.
    """
    entries: dict[str, Any] = {}
    for path in (Path(__file__).parent.parent / "data/datasets.yaml", Path("datasets.yaml")):
        if path.is_file():
            entries |= _read_yaml(path, what="list of data sets")
    return {name: entry if isinstance(entry, dict) else {"path": entry} for name, entry in entries.items()}


class DataConfig(Section):
    sources: tuple[SourceConfig, ...] = ()
    """Data files, mixed by evenly spaced insertion in the order of their own samples; a word names a registered one."""
    bad_samples: Literal["error", "skip"] = "error"
    """What a sample does that cannot be used (a missing picture, an unknown role): end the run, or be left out."""
    max_bad_samples: int = Field(default=1000, ge=0)
    """A run ends when more samples than this were skipped."""
    max_length: int = Field(default=2048, ge=8)
    """Longest sequence in tokens, image tokens included; a longer sample loses whole turns from its end."""
    image_prompt: Literal["fixed", "random", "off"] = "fixed"
    """The wrapper around the image placeholder: the paper's sentence, a random one of its wordings, or none."""
    image_grid: tuple[tuple[Annotated[int, Field(ge=1, le=6)], Annotated[int, Field(ge=1, le=6)]], ...] = ()
    """Tilings (rows, columns) that show large pictures in parts as well; empty: every picture once, as a whole."""
    supervise: Literal["auto", "response", "special_tokens", "full"] = "auto"
    """What carries loss: responses, also the template's special tokens, or all text; auto: the stage decides (A.5)."""
    system_prompt: str | None = None
    """System message of every conversation; empty keeps the chat template's own default."""
    chat_template: str | None = None
    """File with a chat template that replaces the tokenizer's own, kept by every export of the run."""
    grouping: Literal["off", "length", "modality"] = "off"
    """Samples of like length share a batch, within windows of a few batches; modality: pictures and text apart, too."""
    packing: bool = False
    """Put several samples into a row of at most max_length: hardly any padding, the same losses and gradients."""
    workers: int = Field(default=0, ge=0)
    """Worker processes of the loader on each rank."""


class OptimizerConfig(Section):
    learning_rate: Rate = 1e-4
    """Peak learning rate of every trained part."""
    learning_rates: dict[Literal["encoder", "adapter", "aligner", "translator", "early", "decoder", "lora"], Rate] = {}
    """Peak learning rates of single parts, where they differ from `learning_rate`."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    """Share of all steps in which the rate rises linearly; it then falls to zero along a cosine."""
    max_grad_norm: float = Field(default=1.0, gt=0)


class DistillConfig(Section):
    """Options beyond the paper: hold the translators to what the target does with the same input (distill.py)."""

    logits: float = Field(default=0.0, ge=0)
    """Weight of KL(target || surrogate) over the vocabulary, at the supervised tokens."""
    hidden: float = Field(default=0.0, ge=0)
    """Weight of the relative squared error between a translator's output and the target's hidden states there."""
    next_token: float = Field(default=1.0, ge=0, le=1)
    """Share of the next-token loss that the translators learn from; with 0 they learn from the target alone, while
    adapter and encoder keep the paper's loss."""

    @property
    def active(self) -> bool:
        return bool(self.logits or self.hidden)


class LoraConfig(Section):
    """Low-rank adapters on the decoder in place of its own weights, by PEFT (A.2)."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    modules: tuple[str, ...] = ("q_proj", "k_proj")
    """Names of the linear layers inside a decoder layer."""
    layers: tuple[int, ...] | None = None
    """Numbers of the decoder layers; empty: all of them."""


class DynamicLossConfig(Section):
    """Dynamic loss weights (A.7): short responses get more weight beside long ones of the global batch."""

    order: float = Field(default=0.0, ge=0)
    """Exponent of the weights, 0.5 in the paper; 0 weights every token alike."""
    normalize: Literal["paper", "mean"] = "paper"
    """paper: as printed, weights average to the mean length of a response; mean: the loss keeps its scale."""


class CheckpointConfig(Section):
    every_steps: int | None = Field(default=None, ge=1)
    """Commit every n steps, besides the commit at the end of the run."""
    every_minutes: float | None = Field(default=30.0, gt=0)
    keep: int = Field(default=2, ge=1)
    """Commits kept; older ones are deleted once a newer one is complete."""


class PreviewConfig(Section):
    every_steps: int | None = Field(default=None, ge=1)
    """Let the model answer the first samples of the data every n steps, for TensorBoard and answers.jsonl."""
    samples: int = Field(default=4, ge=1)
    tokens: int = Field(default=24, ge=1)
    """Longest answer; each token costs a forward pass."""


WITHOUT_EFFECT = (
    *("out", "log_every", "checkpoint", "preview", "data.workers", "data.bad_samples", "data.max_bad_samples", "zero"),
    *("data.packing", "nvme_path", "micro_batch", "activation_checkpointing", "short_backward", "kernels", "compile"),
)
"""Entries of a run that change no more of its numbers than their rounding, so that they may differ on a resume."""
YOUNGER = {"frozen_weights": "native"}  # of entries that old commits lack: with these values a run is what it was


class RunConfig(Section):
    """Everything that a training run depends on."""

    stage: str
    """Row of the stage table (stages.py): translator, pretrain, pretrain-early, adapter, encoder, align or decoder."""
    target: str
    """Folder or hub id of the full language model."""
    surrogate: str | None = None
    """Folder of the surrogate made by `zero-ds surrogate`."""
    decoder: Literal["auto", "surrogate", "target"] = "auto"
    """Which of the two is trained against; auto follows the stage table (Table A.2)."""
    encoder: EncoderConfig | None = None
    adapter: AdapterConfig = AdapterConfig()
    init_from: tuple[str, ...] = ()
    """Results of earlier stages, or adapters in PEFT's format, that this run starts from, later ones winning."""
    continue_from: str | None = None
    """A run that this one continues with more (or less) to train, such as an encoder run by a decoder run: its weights
    last, and for what trains in both its optimizer state, too. The learning-rate schedule begins anew."""
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    distill: DistillConfig = DistillConfig()
    dynamic_loss: DynamicLossConfig = DynamicLossConfig()
    lora: LoraConfig | None = None
    """Train low-rank adapters where the stage would train the decoder."""
    global_batch: int = Field(default=128, ge=1)
    """Samples per optimizer step over all ranks and accumulation steps."""
    micro_batch: int = Field(default=1, ge=1)
    """Samples per rank and forward pass."""
    epochs: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after n optimizer steps; overrides `epochs`, and repeats the data where it is shorter."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the device multiplies it fast (GPUs since Ampere, CPUs with AVX512-BF16 or AMX), else fp32."""
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    kernels: Literal["torch", "liger"] = "torch"
    """liger: fused norms, rotary embedding and gated MLPs in the decoder, on a GPU; the same but for rounding."""
    frozen_weights: Literal["native", "int8"] = "native"
    """int8: linear layers of frozen decoder layers in 8 bits, half of bf16's memory; under ZeRO stages 0 to 2."""
    compile: bool = False
    """Let torch compile the decoder's layers; needs a C++ compiler, and parameters that are whole on every rank."""
    activation_checkpointing: Literal["auto", True, False] = "auto"
    """Recompute decoder layers in the backward pass: all, none, or (auto) as few as fit by `zero-ds plan`."""
    short_backward: bool = True
    """Without a picture in the global batch the backward pass ends at the first layer that learns; the same numbers."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    zero: str = "zero3"
    """Name of a file in ds_configs/, or path of a DeepSpeed JSON file."""
    nvme_path: str | None = None
    """Folder on a fast local disk, for DeepSpeed configs that swap to one."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    preview: PreviewConfig = PreviewConfig()
    log_every: int = Field(default=10, ge=1)
    out: str
    """Folder of the run: resolved config, logs, commits."""

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.decoder == "surrogate" and not self.surrogate:
            raise ValueError("decoder is 'surrogate' but no surrogate is given; set surrogate=FOLDER")
        return self

    @property
    def starts(self) -> tuple[str, ...]:
        """Every earlier result that this run takes weights from, in the order in which they are loaded."""
        return self.init_from if self.continue_from is None else (*self.init_from, self.continue_from)

    def dump(self) -> str:
        """The resolved configuration as YAML, enough to repeat the run."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def fingerprint(self) -> str:
        """Hash of everything that changes the run's numbers by more than rounding."""
        content = self.model_dump(mode="json")
        for name in (*WITHOUT_EFFECT, *(key for key, value in YOUNGER.items() if content[key] == value)):
            *path, last = name.split(".")
            del functools.reduce(dict.__getitem__, path, content)[last]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _read_yaml(path: Path, what: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no {what} {path}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{what} {path} cannot be read: {str(error).splitlines()[0]}.") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{what} {path} must hold a mapping of keys to values.")
    return tree
