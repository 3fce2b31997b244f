"""The config of a run: a tree of sections named as the rooms, checked before anything heavy is imported.

Values come in the order defaults, YAML file, command line (`--train.lr 1e-4`); an unknown key is an error.
"""

import difflib
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from cogvlm_hpe.dialogue import DEFAULT_PROMPTS, AnswerFormat, Task
from launcher.errors import UsageError

BestBy = Literal["geodesic_deg", "mae_deg", "grounding_accuracy", "what_accuracy", "facing_accuracy"]
MIN_VISIBLE = 0.5
"""Heads less visible than this are neither taught nor judged, unless a config says otherwise."""


@dataclass
class ModelConfig:
    """The base model and how it is spoken to.

    Args:
        base: folder of the base (config.json, *.safetensors), or the name of a packaged one: tiny
        tokenizer: folder with the tokenizer, when it is not the base's
        dtype: number format of the weights while training; bf16 keeps float32 masters in the optimizer
        random_init: start from random weights; only config and tokenizer are read from base
        answer_format: how a pose is written: offset {{000..360,000..180,000..360}} or signed degrees
        prompts: one question per task, over the defaults; {box} and {expression} are filled in
    """

    base: str
    tokenizer: str | None = None
    dtype: Literal["bf16", "fp32"] = "bf16"
    random_init: bool = False
    answer_format: AnswerFormat = "offset"
    prompts: dict[Task, str] = field(default_factory=lambda: dict(DEFAULT_PROMPTS))

    def __post_init__(self) -> None:
        self.prompts = {**DEFAULT_PROMPTS, **self.prompts}


@dataclass
class AdapterConfig:
    """LoRA by peft. Leave the whole section out (null) to train every parameter.

    Args:
        rank: width of the factors, so how much they can learn
        alpha: the delta is scaled by alpha / rank (alpha / sqrt(rank) with rslora)
        dropout: dropout before the factors
        rslora: rank-stabilised scaling, see alpha
        targets: which linear layers: {language,vision,vit}.{attention,mlp}, glue
        scope: all tokens, or text: the image prefix keeps the base weights and needs no gradient
        init: adapter folder or checkpoint whose factors this stage starts from
        stack: adapter folder or checkpoint that stays as it is; new factors train beside it, what is saved holds both
    """

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    targets: list[str] = field(default_factory=lambda: ["language.attention"])
    scope: Literal["all", "text"] = "text"
    init: str | None = None
    stack: str | None = None


@dataclass
class SetConfig:
    """One shard set of a mix.

    Args:
        path: folder of the set
        ratio: its share of the images, relative to the other sets
        ask: which questions are asked about its images
    """

    path: str
    ratio: float = 1.0
    ask: list[Task] = field(default_factory=lambda: ["pose", "where"])


@dataclass
class JudgedSetConfig:
    """One shard set on which a run is judged while it trains.

    Args:
        path: folder of the set
        ask: which questions are asked about its images
    """

    path: str
    ask: list[Task] = field(default_factory=lambda: ["pose", "where"])


@dataclass
class AugmentConfig:
    """How far images may be changed, with their boxes, poses and camera.

    Args:
        rotate_deg: turn by up to so many degrees either way
        crop: keep at least this share of both sides; 1 for no crop
        colour: change brightness, contrast and saturation by up to this share
    """

    rotate_deg: float = 0.0
    crop: float = 1.0
    colour: float = 0.0


@dataclass
class ShardsConfig:
    """The data of a run.

    Args:
        train: the mix
        val: sets to judge on, see train.evaluate_every
        batch: images in one global batch, over all ranks; a multiple of the ranks
        seed: order of the samples and choice of the questions
        workers: reader processes a rank
        questions: at most so many questions an image
        min_visible: heads with a smaller visible fraction are not asked about
        flip: mirror half of the images, with their poses, boxes and left/right words
        augment: other changes of the images
        block_shards: shuffle within blocks of so many shards, for slow disks and remote sets; 0 for a full shuffle
        bucket_batches: within every so many batches, bring images of about as many heads together; 0 for chance
        on_bad_sample: fail, or skip: the sample leaves a hole of weight 0 and is counted
    """

    train: list[SetConfig]
    val: list[JudgedSetConfig] = field(default_factory=list)
    batch: int = 64
    seed: int = 1
    workers: int = 0
    questions: int = 8
    min_visible: float = MIN_VISIBLE
    flip: bool = True
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    block_shards: int = 0
    bucket_batches: int = 0
    on_bad_sample: Literal["fail", "skip"] = "fail"


@dataclass
class AuxiliaryConfig:
    """Extra losses that help a small model to see and to look; never part of the reported loss.

    Args:
        dense: weight of what stands at each patch (kind, colour, box, head axes); 0 for none
        guidance: weight of attention that should fall on what the question is about
        guided_layer: decoder layer whose heads are guided, from 0
        guided_heads: how many of its heads
        tower_only: train vision tower and adapter on the dense loss alone; the decoder stays as it is
    """

    dense: float = 0.3
    guidance: float = 0.3
    guided_layer: int = 2
    guided_heads: int = 2
    tower_only: bool = False


@dataclass
class TrainConfig:
    """The loop.

    Args:
        max_steps: length of the run and of its schedule, in global steps
        stop_after: end this start after so many steps, with a checkpoint and exit code 85
        optimizer: adamw; or muon: Muon for matrices and AdamW for the rest, in fp32 without ZeRO
        lr: peak learning rate
        min_lr_ratio: the cosine schedule ends at lr times this
        warmup_steps: steps in which the rate rises from 0 to lr
        weight_decay: times the rate, this share of every trained parameter is taken off at a step
        betas: AdamW's: how much of its two moments stays at a step
        clip: largest norm of the gradient; 0 for no clipping
        zero_stage: DeepSpeed ZeRO 0-3
        micro_batch: images a rank takes at once; gradients are accumulated up to shards.batch
        gradient_checkpointing: recompute layers in the backward pass
        seed: of fresh weights and of dropout
        auxiliary: extra losses for a small model; a pretrained CogVLM needs none (null)
        deepspeed: more of DeepSpeed's own config, such as offload; what other keys decide is refused here
        save_every: steps between checkpoints
        async_save: write checkpoints beside the next steps
        keep: checkpoints kept, the newest ones; the best one is kept besides
        evaluate_every: steps between judgements on shards.val, one before the first step; 0 for none
        log_every: steps between lines in the log and points in TensorBoard
        timeout_s: longest time without a step, save or batch judged; then the silent ranks are named, and the run ends
        profile: write a trace of three steps, after two, for TensorBoard or Perfetto
    """

    max_steps: int = 1000
    stop_after: int | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    min_lr_ratio: float = 0.1
    warmup_steps: int = 100
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    zero_stage: Literal[0, 1, 2, 3] = 2
    micro_batch: int = 2
    gradient_checkpointing: bool = False
    seed: int = 1
    auxiliary: AuxiliaryConfig | None = None
    deepspeed: dict[str, Any] = field(default_factory=dict)
    save_every: int = 200
    async_save: bool = False
    keep: int = 2
    evaluate_every: int = 0
    log_every: int = 10
    timeout_s: float = 900.0
    profile: bool = False


@dataclass
class EvaluateConfig:
    """Judging while training, by the evaluator's own decoding and scores.

    Args:
        batch: images a rank takes at once
        limit: images of each set of shards.val: its first ones in key order
        questions: questions decoded at once
        max_new_tokens: end of an answer
        decode: greedy, or expectation: a valid pose is the mean over the distribution of its digits
        best: the score that makes a checkpoint the best one
    """

    batch: int = 16
    limit: int = 128
    questions: int = 64
    max_new_tokens: int = 48
    decode: Literal["greedy", "expectation"] = "greedy"
    best: BestBy = "geodesic_deg"


@dataclass
class RunConfig:
    """A whole training run.

    Args:
        run_dir: folder of the run: its checkpoints, metrics and log
        adapter: LoRA; null to train every parameter
    """

    run_dir: str
    model: ModelConfig
    shards: ShardsConfig
    adapter: AdapterConfig | None = None
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


# What a resumed run may change without becoming another run: speed, place and bookkeeping.
_FREE_KEYS = {
    "run_dir",
    "shards.workers",
    "train.stop_after",
    "train.zero_stage",
    "train.micro_batch",
    "train.gradient_checkpointing",
    "train.save_every",
    "train.async_save",
    "train.keep",
    "train.evaluate_every",
    "train.log_every",
    "train.timeout_s",
    "train.profile",
    "train.deepspeed",
    "shards.val",
}
_OWN_DEEPSPEED_KEYS = {
    "train_batch_size": "shards.batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "shards.batch and train.micro_batch",
    "gradient_clipping": "train.clip",
    "optimizer": "train.lr and its neighbours",
    "scheduler": "train.warmup_steps and train.max_steps",
    "bf16": "model.dtype",
    "bfloat16": "model.dtype",
    "fp16": "model.dtype",
    "amp": "model.dtype",
    "tensor_parallel": "the ranks, each of which holds the whole model or, by train.zero_stage, a part",
}
# What else DeepSpeed 0.19 reads; it takes any other key without a word.
_DEEPSPEED_KEYS = (
    "activation_checkpointing aio autotuning checkpoint comet comms_logger communication_data_type compile csv_monitor "
    "data_types datastates_ckpt disable_allgather disable_python_gc dump_state eigenvalue expert_parallel "
    "flops_profiler gradient_allreduce_op gradient_predivide_factor hybrid_engine load_universal_checkpoint log_level "
    "memory_breakdown nebula pipeline prescale_gradients progressive_layer_drop seq_parallel_communication_data_type "
    "sparse_gradients steps_per_print tensorboard timers torch_autocast wall_clock_breakdown wandb "
    "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization"
).split()


def flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted key to value, sections opened, lists kept whole."""

    def walk(prefix: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        out: dict[str, Any] = {}
        for key, inner in value.items():
            out |= walk(f"{prefix}.{key}" if prefix else key, inner)
        return out

    return walk("", asdict(config))


def changes(saved: RunConfig, now: RunConfig) -> list[str]:
    """Keys whose change breaks the exactness of a resumed run, each as `key: old -> new`."""
    before, after = flatten(saved), flatten(now)
    keys = sorted(key for key in before.keys() | after.keys() if not _is_free(key))
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys if before.get(key) != after.get(key)]


def _is_free(key: str) -> bool:
    return key in _FREE_KEYS or key.startswith(("evaluate.", "train.deepspeed."))


def check(config: RunConfig) -> None:
    """Rules between keys. Raises UsageError naming the key, the value and the remedy."""
    shards, train, adapter, evaluate = config.shards, config.train, config.adapter, config.evaluate
    for name, value in (
        ("shards.batch", shards.batch),
        ("shards.questions", shards.questions),
        ("train.max_steps", train.max_steps),
        ("train.micro_batch", train.micro_batch),
        ("train.save_every", train.save_every),
        ("train.keep", train.keep),
        ("train.log_every", train.log_every),
        ("evaluate.batch", evaluate.batch),
        ("evaluate.limit", evaluate.limit),
        ("evaluate.questions", evaluate.questions),
        ("evaluate.max_new_tokens", evaluate.max_new_tokens),
    ):
        if value < 1:
            raise UsageError(f"{name} {value}: must be at least 1")
    if shards.workers < 0:
        raise UsageError(f"shards.workers {shards.workers}: must be 0 (the rank reads itself) or more")
    if train.stop_after is not None and train.stop_after < 1:
        raise UsageError(f"train.stop_after {train.stop_after}: must be at least 1; null for no stop")
    if not shards.train:
        raise UsageError("shards.train is empty: name at least one shard set")
    for entry in shards.train:
        if entry.ratio <= 0:
            raise UsageError(f"shards.train {entry.path}: ratio {entry.ratio} must be above 0")
    if adapter:
        _check_adapter(adapter)
    _check_prompts(config.model.prompts)
    _check_rates(train)
    if train.zero_stage == 0 and config.model.dtype == "bf16":
        raise UsageError("train.zero_stage 0 with model.dtype bf16: keeps no float32 masters; take stage 1 or fp32")
    if train.optimizer == "muon" and (train.zero_stage or config.model.dtype != "fp32"):
        raise UsageError("train.optimizer muon: needs whole matrices; take train.zero_stage 0 and model.dtype fp32")
    auxiliary = train.auxiliary
    if auxiliary and auxiliary.tower_only and auxiliary.dense <= 0:
        raise UsageError(f"train.auxiliary.dense {auxiliary.dense}: tower_only trains on nothing else, so above 0")
    if auxiliary and auxiliary.guided_heads < 1:
        raise UsageError(f"train.auxiliary.guided_heads {auxiliary.guided_heads}: must be at least 1")
    if config.model.random_init and adapter:
        raise UsageError("model.random_init with an adapter: a random base is trained whole; leave `adapter` out")
    _check_watching(config)
    _check_deepspeed(config)


def _check_adapter(adapter: AdapterConfig) -> None:
    if adapter.rank < 1 or adapter.alpha <= 0:
        raise UsageError(f"adapter.rank {adapter.rank}, adapter.alpha {adapter.alpha}: must be above 0")
    if not 0 <= adapter.dropout < 1:
        raise UsageError(f"adapter.dropout {adapter.dropout}: must be at least 0 and below 1")
    if adapter.init and adapter.stack:
        raise UsageError(
            "adapter.init and adapter.stack: new factors start from one adapter or beside it; leave one out"
        )
    if adapter.scope == "text":
        wrong = [t for t in adapter.targets if not t.startswith("language.")]
        if wrong:
            raise UsageError(f"adapter.targets {wrong}: adapter.scope text leaves image tokens alone; use scope all")


def _check_prompts(prompts: dict[Task, str]) -> None:
    for task, text in prompts.items():
        for mark in ("{box}", "{expression}"):
            if mark in DEFAULT_PROMPTS[task] and mark not in text:
                raise UsageError(f"model.prompts.{task} {text!r}: says nowhere what is asked about; put {mark} in it")


def _check_rates(train: TrainConfig) -> None:
    if train.lr <= 0:
        raise UsageError(f"train.lr {train.lr}: must be above 0")
    if not all(0 <= beta < 1 for beta in train.betas):
        raise UsageError(f"train.betas {list(train.betas)}: must be at least 0 and below 1")
    if train.clip < 0:
        raise UsageError(f"train.clip {train.clip}: must be 0 (no clipping) or more")
    if train.warmup_steps < 0:
        raise UsageError(f"train.warmup_steps {train.warmup_steps}: must be 0 (none) or more")


def _check_watching(config: RunConfig) -> None:
    train = config.train
    if train.timeout_s <= 0:
        raise UsageError(f"train.timeout_s {train.timeout_s}: must be above 0")
    if train.evaluate_every < 0:
        raise UsageError(f"train.evaluate_every {train.evaluate_every}: must be 0 (never) or more")
    if not all(entry.ask for entry in config.shards.val):
        raise UsageError("shards.val: a set with an empty `ask`; name what is asked, as [pose, where]")
    if train.evaluate_every and not config.shards.val:
        raise UsageError(f"train.evaluate_every {train.evaluate_every}: name the sets to judge on in shards.val")
    if train.evaluate_every and train.zero_stage == 3 and config.evaluate.decode != "greedy":
        raise UsageError("evaluate.decode expectation with train.zero_stage 3: ranks would part; take greedy")


def _check_deepspeed(config: RunConfig) -> None:
    train = config.train
    for key in train.deepspeed:
        if key in _OWN_DEEPSPEED_KEYS:
            raise UsageError(f"train.deepspeed.{key}: decided by {_OWN_DEEPSPEED_KEYS[key]}; set it there")
        if key not in _DEEPSPEED_KEYS:
            near = difflib.get_close_matches(key, _DEEPSPEED_KEYS, 1)
            raise UsageError(
                f"train.deepspeed.{key}: no key that DeepSpeed reads; {f'is it {near[0]}?' if near else 'take it out'}"
            )
    zero = train.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UsageError(f"train.deepspeed.zero_optimization {zero!r}: must be a section of keys")
    if "stage" in zero:
        raise UsageError("train.deepspeed.zero_optimization.stage: decided by train.zero_stage; set it there")
    on_disk = (zero.get("offload_param") or {}).get("device") == "nvme"
    if on_disk and config.adapter is None:
        raise UsageError(
            "train.deepspeed.zero_optimization.offload_param.device nvme: a whole model in training cannot be gone on "
            "with from there; take cpu, or train an adapter"
        )


def check_world(config: RunConfig, size: int) -> int:
    """Micro-batches a step on `size` ranks. Raises UsageError where batch, ranks and micro-batch do not divide."""
    batch, micro = config.shards.batch, config.train.micro_batch
    if batch % size:
        raise UsageError(f"shards.batch {batch}: must be a multiple of the {size} ranks")
    per_rank = batch // size
    if per_rank % micro:
        raise UsageError(f"train.micro_batch {micro}: must divide the {per_rank} images a rank has a step")
    return per_rank // micro
