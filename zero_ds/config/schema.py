"""The typed configuration of a run: every key of a recipe, with its default and its meaning.

`config.loading` reads recipes into these types, `config.resume` says which keys may differ on a resume.
"""

from __future__ import annotations

from math import ceil, isqrt
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from zero_ds.config.datasets import registered_datasets
from zero_ds.config.resume import fingerprint
from zero_ds.runtime.errors import ConfigError, did_you_mean
from zero_ds.runtime.files import home_path


def _with_home(path: str) -> str:
    """Returns a path with `~` replaced by the home folder, which a shell does not do after `key=`."""
    return str(home_path(path)) if path.startswith("~") else path


def _name_of_zero(value: Any) -> Any:
    """Refuses a stage in the place of a config's name."""
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(f"it is the name of a file in ds_configs/ or the path of one; did you mean zero{value}?")
    return value


def _as_switch(value: Any) -> Any:
    """Reads the words that pydantic reads as true or false where a key is nothing but that."""
    words = {"on": True, "yes": True, "off": False, "no": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


LocalPath = Annotated[str, AfterValidator(_with_home)]
Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Part = Annotated[float, Field(gt=0, le=1)]
Column = Literal["id", "image", "question", "answer", "caption", "conversations", "system"]
MERGING = ("pixel_shuffle", "pooling")
"""Values of `adapter.kind` that make one image token of several patches."""
CAPTION_PROMPT = "Describe the image."
"""Question before the caption of an image, unless a recipe has another."""


class Section(BaseModel):
    """Base of every part of the configuration: unknown keys are errors, and values are frozen once checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Rejects true and false for a number, which pydantic reads as 1 and 0."""
        if isinstance(value, bool) and _is_number(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("it is a number, and neither true nor false")
        return value


def _is_number(annotation: Any) -> bool:
    """Returns whether a field holds a number, or nothing."""
    if get_origin(annotation) in (dict, tuple, Literal):
        return False
    inner = get_args(annotation)
    return any(map(_is_number, inner)) if inner else annotation in (int, float)


class EncoderConfig(Section):
    path: str
    """Folder or hub id of the vision encoder."""
    train_last_layers: int | None = Field(default=None, ge=1)
    """Number of last layers of the encoder to train, with everything after them; empty: all layers."""
    feature_layer: int = -1
    """Index of the vision encoder's hidden states that feed the adapter; -1 is the last, -2 is LLaVA-1.5's choice."""
    patch_norm: bool = False
    """Applies the encoder's final norm to the patch tokens, as in the paper's reference implementation."""
    image_size: int | None = Field(default=None, ge=1)
    """Height and width of the images that the encoder reads, in pixels: a multiple of its patches, to which position
    embeddings are interpolated; empty: the size that the encoder's own files say."""


class AdapterConfig(Section):
    kind: Literal["mlp", "linear", "pixel_shuffle", "pooling"] = "mlp"
    """Layers between vision encoder and decoder: Linear, GELU, Linear (`mlp`, the paper's), or one Linear (`linear`).
    With `pixel_shuffle` and `pooling`, squares of patches become one image token before them: their features side by
    side, or their mean."""
    factor: int | None = Field(default=None, ge=1)
    """Height and width, in patches, of the squares that `pixel_shuffle` and `pooling` merge; empty: 2."""
    boundary_tokens: bool = False
    """Marks the start and the end of the image tokens with learned embeddings, as in the reference implementation."""
    match_embeddings: bool = False
    """Scales the adapter so that image tokens start with the standard deviation of word embeddings."""
    width: int | None = Field(default=None, ge=1)
    """Hidden size that the adapter was trained for, if not this decoder's; a linear aligner then follows it (A.8)."""

    @model_validator(mode="before")
    @classmethod
    def _factor_is_stated(cls, values: Any) -> Any:
        """Writes the default factor of kinds that merge patches into the configuration, which is then whole."""
        if isinstance(values, dict) and values.get("kind") in MERGING and values.get("factor") is None:
            return {**values, "factor": 2}
        return values

    @model_validator(mode="after")
    def _factor_has_effect(self) -> AdapterConfig:
        if self.factor not in (None, 1) and self.kind not in MERGING:
            raise ValueError(
                f"adapter.kind={self.kind} makes an image token of every patch, so adapter.factor={self.factor} has no "
                f"effect; choose adapter.kind={' or '.join(MERGING)}, or adapter.factor=null"
            )
        return self

    @property
    def square(self) -> int:
        """Height and width, in patches, of the squares that become one image token; 1 where every patch is one."""
        return (self.factor or 1) if self.kind in MERGING else 1

    @property
    def described(self) -> str:
        """The kind in words, with the size of its squares; equal for adapters whose tensors mean the same."""
        return self.kind if self.kind not in MERGING else f"{self.kind} of {self.square} x {self.square} patches"

    def image_tokens(self, patches: int) -> int:
        """Returns the number of positions that an image, or a tile of one, takes in a sequence.

        No other code counts them. A grid that the squares do not fill has squares at its right and lower edge that
        are partly empty: 27 x 27 patches become 14 x 14 tokens by `factor` 2, and 9 x 9 by 3.

        patches: number of patch tokens of the vision encoder.

        Raises:
            ConfigError: the patches are not a square grid, or the squares are larger than it.
        """
        if self.square > 1:
            side = isqrt(patches)
            if side**2 != patches:
                raise ConfigError(
                    f"adapter.kind={self.kind} merges squares of a square grid, and the vision encoder makes {patches} "
                    "patches of an image; choose adapter.kind=mlp."
                )
            if self.square > side:
                raise ConfigError(
                    f"adapter.factor={self.square} is larger than the vision encoder's grid of {side} x {side} patches"
                    f"; choose at most {side}."
                )
            patches = ceil(side / self.square) ** 2
        return patches + (2 if self.boundary_tokens else 0)


class SourceConfig(Section):
    path: str
    """Data file (JSON, JSON lines, Parquet, Arrow, WebDataset shard), folder of such files, or hub id of a data set."""
    files: str | None = None
    """Pattern of the files to take from a folder or hub data set, such as `data/math-*`; empty: all of them."""
    subset: str | None = None
    """Subset of a folder or hub data set, which the hub calls config or `name`; empty: all of them."""
    split: str | None = None
    """Split of a folder or hub data set, such as train; empty: all of them."""
    revision: str | None = None
    """Branch, tag or hash of a hub data set; empty: its main branch."""
    columns: dict[Column, str] = {}
    """Columns, or keys of records, by their meaning, such as `{image: img, question: q, answer: a}`."""
    root: str | None = None
    """Folder of the images, which no image path may leave, or a zip or tar file (or a pattern of such files) in which
    they are; empty: the data file's own folder."""
    allowed_roots: tuple[str, ...] = ()
    """Further folders into which image paths may lead, such as those that links in `root` join."""
    full_path: bool = False
    """Follows absolute image paths, wherever they lead, in records with a `full_path`."""
    limit: int | None = Field(default=None, ge=1)
    """Number of samples to use, from the first one on; empty: all of them."""
    images_only: bool = False
    """Skips samples without an image, such as the 40K of LLaVA-1.5-665K."""
    weight: Rate | None = None
    """Share of the samples of an epoch, relative to the other sources', which then need a weight as well."""
    repeat: Rate = 1.0
    """Number of times that an epoch of the run goes over the source; a fraction takes a part of it each time."""
    count: int | None = Field(default=None, ge=1)
    """Number of samples that an epoch of the run takes from the source."""
    stream: bool = False
    """Reads Parquet or tar shards when their turn comes, in random order, and not all of them at the first start."""

    @model_validator(mode="after")
    def _streamed_whole(self) -> SourceConfig:
        if self.stream and self.images_only:
            raise ValueError("images_only reads all samples at the start, and stream reads them later; drop one")
        return self

    @model_validator(mode="after")
    def _one_share(self) -> SourceConfig:
        if (self.weight is not None) + (self.repeat != 1) + (self.count is not None) > 1:
            raise ValueError("weight, repeat and count exclude each other; keep one of them")
        return self

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """Looks up registered data sets.

        A string is the name of one, or else a path. A mapping with `name` starts from that one's entries, which its
        other keys replace. Beside a `path`, another `name` is the subset, as the hub calls it.
        """
        known = registered_datasets()
        if isinstance(value, str):
            return known.get(value, {"path": value})
        if isinstance(value, dict) and "name" in value:
            name = value["name"]
            if isinstance(name, str) and name not in known and "path" in value and "subset" not in value:
                return {**{key: entry for key, entry in value.items() if key != "name"}, "subset": name}
            if not isinstance(name, str) or name not in known:
                raise ValueError(f"unknown data set '{name}'{did_you_mean(str(name), list(known))}")
            own = {key: entry for key, entry in value.items() if key != "name"}
            return {**known[name], **own}
        return value


class DataConfig(Section):
    sources: tuple[SourceConfig, ...] = ()
    """Data sets, mixed by evenly spaced insertion with their own order kept; a string can name a registered one."""
    shuffle: bool = False
    """Whether each data set is put into a random order by the run's seed before it is mixed and limited."""
    bad_samples: Literal["error", "skip"] = "error"
    """Effect of a sample that cannot be used (a missing image, an unknown role): the run ends, or skips it."""
    max_bad_samples: int = Field(default=1000, ge=0)
    """Number of skipped samples above which a run ends."""
    max_length: int = Field(default=2048, ge=8)
    """Longest sample in tokens, including image tokens; a longer one loses whole turns from its end."""
    image_prompt: Literal["fixed", "random", "off"] = "fixed"
    """Sentence around the image placeholder: the paper's, a random wording of it, or none."""
    caption_prompt: str = Field(default=CAPTION_PROMPT, min_length=1)
    """Question that is asked about an image whose sample is a caption."""
    image_grid: tuple[tuple[Annotated[int, Field(ge=1, le=6)], Annotated[int, Field(ge=1, le=6)]], ...] = ()
    """Tilings (rows, columns) in which large images are shown in addition; empty: every image once, as a whole."""
    image_background: str = "white"
    """Colour on which transparent parts of images are laid: a name, or #rrggbb."""
    supervise: Literal["auto", "response", "special_tokens", "full"] = "auto"
    """Tokens with loss: responses, these and the template's special tokens, or all text; auto: the stage's (A.5)."""
    system_prompt: str | None = None
    """System message of conversations without their own; null keeps the chat template's default."""
    chat_template: str | None = None
    """File with a chat template that replaces the tokenizer's, or the name of one in the package (llama-3: the paper's
    printed prompt, without a system block); every export of the run keeps it."""
    special_tokens: tuple[str, ...] = ()
    """Special tokens that data may use, such as those of places in an image (* stands for any characters); others that
    are typed stay text."""
    grouping: Literal["off", "length", "modality"] = "off"
    """Groups samples of similar length into batches, within windows of a few batches; modality: images apart also."""
    packing: bool = False
    """Puts several samples into a row of at most max_length: hardly any padding, the same losses and gradients."""
    prepared: LocalPath | None = None
    """Folder with the tokens of the samples, which `zero-ds data prepare` has written; empty: tokenise on the fly."""
    workers: int = Field(default=0, ge=0)
    """Number of worker processes of the loader on each rank."""

    @field_validator("sources")
    @classmethod
    def _weights_of_all(cls, value: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        """Rejects weights of some sources only."""
        weighted = [source.path for source in value if source.weight is not None]
        if weighted and len(weighted) < len(value):
            other = next(source.path for source in value if source.weight is None)
            raise ValueError(f"{weighted[0]} has a weight and {other} has none; give every source one")
        return value

    @field_validator("image_background")
    @classmethod
    def _is_color(cls, value: str) -> str:
        """Rejects values that are not an opaque colour."""
        from PIL import ImageColor

        try:
            opaque = len(ImageColor.getrgb(value)) == 3
        except ValueError:
            opaque = False
        if not opaque:
            raise ValueError(f"'{value}' is not a colour; write a name such as white, or #rrggbb")
        return value


class OptimizerConfig(Section):
    learning_rate: Rate = 1e-4
    """Peak learning rate of trained parts."""
    learning_rates: dict[Literal["encoder", "adapter", "aligner", "translator", "early", "decoder", "lora"], Rate] = {}
    """Peak learning rates of single parts that differ from `learning_rate`."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    """Share of the steps in which the rate rises linearly; afterwards it falls to zero along a cosine."""
    max_grad_norm: float = Field(default=1.0, gt=0)


class DistillConfig(Section):
    """Options beyond the paper: the translators also learn from the target's outputs for the same input."""

    logits: float = Field(default=0.0, ge=0)
    """Weight of KL(target || surrogate) over the vocabulary, at the supervised tokens."""
    hidden: float = Field(default=0.0, ge=0)
    """Weight of the relative squared error between a translator's output and the target's hidden states there."""
    next_token: float = Field(default=1.0, ge=0, le=1)
    """Share of the next-token loss that the translators learn from. With 0 they learn from the target alone, while
    adapter and vision encoder keep the paper's loss."""
    every: int = Field(default=1, ge=1)
    """Number of steps between two in which the target's late layers run. Their loss then counts that many times."""
    positions: Part = 1.0
    """Share of the supervised tokens, drawn again in every step, at which `logits` compares predictions."""

    @property
    def active(self) -> bool:
        return bool(self.logits or self.hidden)


class AlignConfig(Section):
    """A loss in the space of words, beyond the paper: image tokens are drawn to the words of their answers."""

    weight: Weight = 0.0
    """Weight of the loss that is added to the next-token loss; the stages `words` and `words-encoder` have no other."""
    scale: float = Field(default=20.0, gt=0)
    """Factor of the cosine between an image's mean token and a word embedding, before the softmax over words."""
    spread: Weight = 0.1
    """Weight of the penalty that holds the size of image tokens at that of word embeddings."""
    words: int = Field(default=4096, ge=2)
    """Largest number of words, the most frequent of those in the answers of the data."""
    samples: int = Field(default=20000, ge=1)
    """Largest number of samples, at even distances, in whose answers the words are counted."""


class TranslateConfig(Section):
    """Translators trained offline, from hidden states of the target on disk (`zero-ds translate`); beyond the paper."""

    hidden: Weight = 1.0
    """Weight of the relative squared error between a translator's output and the target's hidden states there."""
    logits: Weight = 1.0
    """Weight of KL(target || surrogate) over the vocabulary."""
    next_token: Weight = 0.0
    """Weight of the next-token loss."""
    positions: Part = 1.0
    """Share of the positions, drawn again in every step, at which `logits` and `next_token` are computed."""
    tokens: int | None = Field(default=None, ge=1)
    """Largest number of tokens of the texts, whose hidden states are on disk; empty: all of data.sources."""
    sample: int = Field(default=0, ge=0)
    """Number of conversations that the target writes itself, in addition to data.sources."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the texts that is not trained on, on which the translators are judged."""
    lookups: LocalPath | None = None
    """File of questions whose answer is a word of the text that they begin with (docs/surrogates.md); empty: none."""
    states: LocalPath | None = None
    """Folder of the hidden states, which several runs with the same target and texts may share; empty: next to `out`,
    with `.states` after its name."""
    store: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of hidden states on disk; auto: the run's precision."""

    @model_validator(mode="after")
    def _learns(self) -> TranslateConfig:
        if not (self.hidden or self.logits or self.next_token):
            raise ValueError("hidden, logits and next_token are all 0, so nothing is learned; set one of them")
        return self


class LoraConfig(Section):
    """Low-rank adapters that train in place of the decoder's own weights, by PEFT (A.2)."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    modules: tuple[str, ...] = ("q_proj", "k_proj")
    """Names of the linear layers inside a decoder layer."""
    layers: tuple[int, ...] | None = None
    """Numbers of the adapted decoder layers; null: all of them."""

    @field_validator("modules", "layers")
    @classmethod
    def _not_empty(cls, value: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        if value is not None and not value:
            raise ValueError("that adapts nothing; name at least one, or leave the key out")
        return value


class DynamicLossConfig(Section):
    """Dynamic loss weights (A.7): short responses weigh more compared with long ones of the global batch."""

    order: float = Field(default=0.0, ge=0)
    """Exponent of the weights, 0.5 in the paper; with 0 every token has the same weight."""
    normalize: Literal["paper", "mean"] = "paper"
    """Scale of the weights. paper: as printed, they average to the mean length of a response; mean: that of the loss
    without weights."""


class CheckpointConfig(Section):
    every_steps: int | None = Field(default=None, ge=1)
    """Number of steps between checkpoints. There is always one at the end of the run."""
    every_minutes: float | None = Field(default=30.0, gt=0)
    """Longest time between checkpoints in minutes."""
    keep: int = Field(default=2, ge=1)
    """Number of checkpoints kept; older ones are deleted once a newer one is complete."""
    best: bool = False
    """Saves a checkpoint whenever the held-out loss is the lowest so far, and keeps it; `best` in the run folder is a
    link to it."""
    writers: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Largest number of ranks that write, each a file of its own. auto: as many as have 64 MiB to write. Only ranks
    that share the run folder with rank 0 write."""
    asynchronous: Literal["auto", True, False] = "auto"
    """Whether files are written while training goes on, from a copy in host memory. auto: where a rank writes at least
    64 MiB and free memory holds the copy twice."""


class ValidationConfig(Section):
    """The loss on samples that the run does not train on."""

    sources: tuple[SourceConfig, ...] = ()
    """Data sets whose loss is measured, as data.sources."""
    share: Share = 0.0
    """Share of data.sources that is held out of training, at even distances, and measured as well."""
    every_steps: int | None = Field(default=None, ge=1)
    """Number of steps between measurements; empty: only after the last step."""
    limit: int | None = Field(default=None, ge=1)
    """Number of samples that are measured, at even distances; empty: all of them."""

    @property
    def active(self) -> bool:
        return bool(self.sources or self.share)


class PreviewConfig(Section):
    every_steps: int | None = Field(default=None, ge=1)
    """Number of steps after which the model answers the first samples of the data again, for TensorBoard and
    answers.jsonl; empty: never."""
    samples: int = Field(default=4, ge=1)
    """Number of samples to answer."""
    tokens: int = Field(default=24, ge=1)
    """Longest answer in tokens, each of which costs a forward pass."""


class ProfileConfig(Section):
    steps: int = Field(default=0, ge=0)
    """Number of steps that torch's profiler records on rank 0, for RUN/profile; 0: none."""
    skip: int = Field(default=5, ge=1)
    """Number of steps before the first recorded one, in which caches fill and code is compiled."""
    stop: bool = False
    """Ends the run after the recorded steps, without a checkpoint."""


class RunConfig(Section):
    """Everything that a training run depends on."""

    stage: str
    """Row of the stage table (training/stages.py): words, words-encoder, translator, pretrain, pretrain-early, adapter,
    encoder, align or decoder."""
    target: str
    """Folder or hub id of the full language model."""
    trust_remote_code: bool = False
    """Permission to run code that the target's folder brings, for a type that transformers does not know. Such code
    can do anything that you can do."""
    surrogate: str | None = None
    """Folder of the surrogate that `zero-ds surrogate` has built."""
    decoder: Literal["auto", "surrogate", "target"] = "auto"
    """Decoder that is trained against; auto follows the stage table (Table A.2)."""
    encoder: EncoderConfig | None = None
    """Vision encoder. Empty: the language model trains alone, on text (stages translator and decoder)."""
    adapter: AdapterConfig = AdapterConfig()
    init_from: tuple[str, ...] = ()
    """Results of earlier stages, or adapters in PEFT's format, that this run starts from; later ones win."""
    continue_from: str | None = None
    """Run that this one continues with more (or less) to train, as a decoder run continues an encoder run. Its weights
    are loaded last, and what trains in both runs keeps its optimizer state. The learning-rate schedule starts over."""
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    distill: DistillConfig = DistillConfig()
    align: AlignConfig = AlignConfig()
    translate: TranslateConfig = TranslateConfig()
    dynamic_loss: DynamicLossConfig = DynamicLossConfig()
    losses: dict[str, Weight] = {}
    """Weights of terms that are added to the next-token loss, by their names in model/losses.py."""
    lora: LoraConfig | None = None
    """Low-rank adapters, which train where the stage would train the decoder."""
    global_batch: int = Field(default=128, ge=1)
    """Number of samples per optimizer step, over all ranks and accumulation steps."""
    micro_batch: int = Field(default=1, ge=1)
    """Number of samples per rank and forward pass."""
    epochs: float = Field(default=1.0, gt=0)
    """Number of passes over the data."""
    max_steps: int | None = Field(default=None, ge=1)
    """Number of optimizer steps; overrides `epochs`, and repeats the data if it is shorter."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Number format. auto: bf16 where the device multiplies it fast (GPUs since Ampere, CPUs with AVX512-BF16 or AMX),
    otherwise fp32."""
    attention: str = "sdpa"
    """Implementation of attention in the decoder: sdpa, eager, flash_attention_2, or any other name that the installed
    transformers knows (flash_attention_3, flex_attention, kernels-community/NAME)."""
    kernels: Literal["torch", "liger"] = "torch"
    """Kernels of the decoder. liger: fused norms, rotary embedding and gated MLPs on a GPU, equal up to rounding."""
    frozen_weights: Literal["native", "int8"] = "native"
    """Number format of frozen decoder layers. int8: linear layers in 8 bits, half of bf16's memory; ZeRO 0 to 2."""
    compile: bool = False
    """Compiles the decoder's layers with torch; needs a C++ compiler and parameters that are whole on each rank."""
    activation_checkpointing: Annotated[Literal["auto", True, False], BeforeValidator(_as_switch)] = "auto"
    """Decoder layers that are recomputed in the backward pass: all, none, or (auto) as few as `zero-ds plan` finds."""
    short_backward: bool = True
    """Ends the backward pass of a global batch without images at the first trained layer; same numbers."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    deterministic: bool = False
    """Whether torch uses deterministic algorithms alone: the same bits again on the same GPUs, but more slowly."""
    zero: Annotated[LocalPath, BeforeValidator(_name_of_zero)] = "zero3"
    """Name of a file in ds_configs/, or path of a DeepSpeed JSON file."""
    nvme_path: LocalPath | None = None
    """Folder on a fast local disk, for DeepSpeed configs that offload to one."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    preview: PreviewConfig = PreviewConfig()
    validation: ValidationConfig = ValidationConfig()
    profile: ProfileConfig = ProfileConfig()
    log_every: int = Field(default=10, ge=1)
    """Number of steps between lines of the log."""
    out: LocalPath
    """Folder of the run: resolved config, logs, checkpoints."""

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.decoder == "surrogate" and not self.surrogate:
            raise ValueError("decoder is 'surrogate' but no surrogate is given; set surrogate=FOLDER")
        if self.checkpoint.best and not self.validation.active:
            raise ValueError("checkpoint.best needs a held-out loss; set validation.sources or validation.share")
        if self.validation.every_steps and not self.validation.active:
            raise ValueError("validation.every_steps needs samples; set validation.sources or validation.share")
        return self

    @property
    def starts(self) -> tuple[str, ...]:
        """All earlier results that this run takes weights from, in the order in which they are loaded.

        `~` is the home folder here, while the entries themselves stay as written: they are part of the fingerprint.
        """
        named = self.init_from if self.continue_from is None else (*self.init_from, self.continue_from)
        return tuple(_with_home(path) for path in named)

    def dump(self) -> str:
        """Returns the resolved configuration as YAML, which is enough to repeat the run."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def fingerprint(self) -> str:
        """Returns a hash of everything that changes the run's numbers by more than rounding (`config.resume`)."""
        return fingerprint(self.model_dump(mode="json"))
