"""From a config to a run that is ready to loop.

The order matters: 1. ranks meet; 2. base, which ZeRO-3 splits as it is read; 3. adapter; 4. weights of the run's own
checkpoint; 5. engine, whose masters are made from those weights; 6. optimizer state, for which Adam needs one step at
rate 0; 7. stream from the next step.
"""

import json
import os
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from tokenizers import Tokenizer

from cogvlm_hpe import config as configs
from cogvlm_hpe.config import RunConfig, ShardsConfig
from cogvlm_hpe.model.fingerprint import fingerprint
from cogvlm_hpe.model.folders import read_notes, resolve_base
from cogvlm_hpe.model.fresh import fresh_model
from cogvlm_hpe.model.load import DTYPES, Loaded, load_base
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.model.tokenizer import load_tokenizer
from cogvlm_hpe.model.weights import open_weights, read_config
from cogvlm_hpe.train import adapter, checkpoint
from cogvlm_hpe.train.ask import Asker
from cogvlm_hpe.train.batch import Collator
from cogvlm_hpe.train.engine import Engine, check_zero, deepspeed_config, prepare_deepspeed
from cogvlm_hpe.train.evaluation import Judge
from cogvlm_hpe.train.hold import hold
from cogvlm_hpe.train.loop import Run
from cogvlm_hpe.train.module import TrainedModule
from cogvlm_hpe.train.monitor import Monitor, write_run_json
from cogvlm_hpe.train.partition import is_split, load_partitioned, piece, rank_device, set_piece
from cogvlm_hpe.train.watch import Work, device_name, peak_flops
from launcher.comm import Comm
from launcher.errors import UserError
from launcher.files import write_text_atomic
from launcher.watchdog import Watchdog
from launcher.world import World
from shards.augment import Augment
from shards.index import ShardSet, open_set
from shards.plan import Plan
from shards.shuffle import quality
from shards.stream import Note, Stream

CONFIG_FILE = "config.yaml"


def set_threads(world: World) -> int:
    """Fix the threads of this rank: OMP_NUM_THREADS, or an equal share of the machine's cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(asked) if asked.isdigit() else max(1, len(os.sched_getaffinity(0)) // world.local_size)
    torch.set_num_threads(threads)
    return threads


def find_resume(run_dir: Path, comm: Comm, resume: bool) -> Path | None:
    """All ranks. The checkpoint to go on from: rank 0 looks, all follow. Raises UserError on a run already there."""
    found = comm.broadcast(checkpoint.newest(run_dir))
    if found is not None and not resume:
        raise UserError(f"{run_dir}: holds a run already ({found.name}); give --resume to go on, or another run_dir")
    return found


def setup(config: RunConfig, world: World, comm: Comm, *, resume: bool, allow_change: bool) -> Run:
    """All ranks. Build everything the loop needs. Raises UserError or UsageError for what the user can mend."""
    start_s, run_dir = time.time(), Path(config.run_dir)
    set_threads(world)
    accumulation = configs.check_world(config, world.size)
    held = hold(run_dir, comm)
    from_folder = find_resume(run_dir, comm, resume)
    if from_folder is not None and not allow_change:
        refuse_changes(run_dir, config)
    sets = [open_set(entry.path) for entry in config.shards.train]
    plan = make_plan(config.shards, sets)
    base = resolve_base(config.model.base)
    tokenizer = load_tokenizer(config.model.tokenizer or base, read_config(base).vocab_size)
    prepare_deepspeed()
    check_zero(config)
    torch.manual_seed(config.train.seed)
    base_fingerprint = "" if config.model.random_init else same_base(base, comm)
    model = make_model(config, base, accumulation)  # 2
    describe = describe_files(config, base, base_fingerprint, tokenizer, model)
    put_adapters(model, config, base, describe, fresh=from_folder is None)  # 3
    module = TrainedModule(model, config.train.auxiliary)
    take_readouts(module, base)
    saved = take_weights(module, from_folder, describe)  # 4
    if saved is not None and not allow_change:
        refuse_other_sets(saved, plan, run_dir)
    engine = Engine(module, config, comm, accumulation)  # 5
    image_size, eos = model.config.vision_config["image_size"], model.config.eos_token_id
    collator = Collator(image_size, eos, model.config.pad_token_id)
    if saved is not None:
        wake_optimizer(engine, collator, accumulation)  # 6
        engine.load(saved.weights, saved.optimizer)
    first_step = saved.step if saved is not None else 0
    monitor = open_monitor(config, world, comm, start_s, first_step, held)
    describe_start(monitor, config, module, sets, plan)
    asker = make_asker(config, tokenizer, eos)
    stream = make_stream(config.shards, sets, plan, comm, image_size, asker, first_step)  # 7
    writer = checkpoint.Writer(run_dir, describe, config.train.keep, config.evaluate.best, config.train.async_save)
    judge = (
        Judge(config, Loaded(model, tokenizer, describe.notes), engine, comm) if config.train.evaluate_every else None
    )
    watchdog = Watchdog(comm, config.train.timeout_s, run_dir)
    work = Work.of(config, model.config) if comm.rank == 0 and peak_flops(device_name()) else None
    prefix_tokens = model.config.image_tokens + 3  # bos, boi and eoi
    return Run(
        config, comm, engine, collator, plan, stream, monitor, writer, judge, work, prefix_tokens, watchdog, first_step
    )


def make_plan(shards: ShardsConfig, sets: list[ShardSet]) -> Plan:
    """Which samples make which global batch."""
    ratios = [entry.ratio for entry in shards.train]
    options = {"block_shards": shards.block_shards, "bucket_batches": shards.bucket_batches}
    return Plan.of(sets, ratios, shards.seed, shards.batch, **options)


def make_stream(
    shards: ShardsConfig, sets: list[ShardSet], plan: Plan, comm: Comm, image_size: int, note: Note, first_step: int
) -> Stream:
    """This rank's images, and what the readers write about them, from `first_step` on."""
    return Stream(
        sets,
        plan,
        comm.rank,
        comm.size,
        image_size=image_size,
        start=first_step,
        workers=shards.workers,
        on_bad_sample=shards.on_bad_sample,
        augment=Augment(shards.flip, **asdict(shards.augment)),
        note=note,
        pin=True,
    )


def make_model(config: RunConfig, base: Path, accumulation: int) -> CogVLMForCausalLM:
    """All ranks. The base with its weights, of which under ZeRO-3 a rank reads its part, or with fresh ones."""
    dtype = DTYPES[config.model.dtype]
    if config.model.random_init:
        model = fresh_model(read_config(base))
    elif config.train.zero_stage == 3:
        model = load_partitioned(open_weights(base), dtype, deepspeed_config(config, accumulation))
    else:
        model = load_base(base, dtype, rank_device(), own=config.adapter is None)
    model.train()
    if config.train.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def put_adapters(
    model: CogVLMForCausalLM, config: RunConfig, base: Path, describe: checkpoint.Describe, *, fresh: bool
) -> None:
    """New factors beside the base's layers, and beside those the ones they are stacked on; noted in `describe`.

    Where the run starts afresh they start from adapter.init. Raises UserError or UsageError where adapters do not fit.
    """
    if config.adapter is None:
        return
    needed = fresh or config.adapter.stack is not None
    given = adapter.read_input(config.adapter, describe.notes["base_fingerprint"]) if needed else None
    describe.lora = adapter.add_lora(model, config.adapter, str(base.resolve()))
    if given is not None and config.adapter.stack:
        adapter.stack_on(model, given, base)
        describe.before = given.factors
    elif given is not None:
        adapter.start_from(model, given)


def take_readouts(module: TrainedModule, base: Path) -> None:
    """Go on with the dense read-outs of the stage before, where the base is its checkpoint."""
    path = base / checkpoint.AUXILIARY
    if module.dense is not None and path.is_file():
        from safetensors.torch import load_file

        module.load_state_dict(load_file(path), strict=False)


def same_base(base: Path, comm: Comm) -> str:
    """All ranks. The base's fingerprint.

    Raises UserError where ranks see different weights: frozen ones are not sent from one to another.
    """
    own = fingerprint(base)
    found = comm.gather(own)
    if comm.agree(found is not None and len(set(found)) > 1):
        raise UserError(f"{base}: the ranks' files differ; give every machine the same ones")
    return own


def take_weights(module: TrainedModule, folder: Path | None, describe: checkpoint.Describe) -> checkpoint.Saved | None:
    """Load a checkpoint's weights into the module, before the engine makes its masters from them.

    Raises UserError where it was made on another base, or holds other parameters.
    """
    if folder is None:
        return None
    saved = checkpoint.read(folder, describe.before)
    if read_notes(folder).get("base_fingerprint") != describe.notes.get("base_fingerprint"):
        raise UserError(f"{folder}: made on another base than model.base (fingerprints differ); name its own one")
    parameters = adapter.trainable(module)
    checkpoint.check_names(saved, list(parameters), folder)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if is_split(parameter):
                start, stop = piece(parameter)
                set_piece(parameter, saved.weights[name].flatten()[start:stop])
            else:
                parameter.copy_(saved.weights[name])
    return saved


def wake_optimizer(engine: Engine, collator: Collator, accumulation: int) -> None:
    """All ranks. One optimizer step at rate 0 on an empty batch: Adam makes its state, no weight changes."""
    engine.set_lr(0.0)
    blank = collator.blank()
    for _ in range(accumulation):
        total, _, extra = engine.engine(blank)
        engine.backward(total if extra is None else total + extra)
        engine.step()


def make_asker(config: RunConfig, tokenizer: Tokenizer, eos: int) -> Asker:
    """The rules by which this run's records become questions."""
    return Asker(
        tokenizer,
        config.model,
        [entry.ask for entry in config.shards.train],
        at_most=config.shards.questions,
        min_visible=config.shards.min_visible,
        seed=config.shards.seed,
        eos=eos,
    )


def describe_files(
    config: RunConfig, base: Path, base_fingerprint: str, tokenizer: Tokenizer, model: CogVLMForCausalLM
) -> checkpoint.Describe:
    """What goes into every checkpoint beside its tensors, but for what the adapters will say."""
    said: dict[str, Any] = {"answer_format": config.model.answer_format, "prompts": dict(config.model.prompts)}
    if config.adapter is not None:
        said |= {"scope": config.adapter.scope, "base_fingerprint": base_fingerprint}
        key, folder = adapter.input_of(config.adapter)
        said |= {key: str(Path(folder).resolve())} if folder else {}
    if config.model.tokenizer:
        said["tokenizer"] = str(Path(config.model.tokenizer).resolve())
    return checkpoint.Describe({"stage": Path(config.run_dir).name, **said}, None, model.config, tokenizer)


def open_monitor(
    config: RunConfig, world: World, comm: Comm, start_s: float, first_step: int, held: IO[str] | None
) -> Monitor:
    """All ranks. The run folder with its config and a line for this start in run.json, and what writes into it."""
    run_dir, threads = Path(config.run_dir), torch.get_num_threads()
    hosts = comm.gather(platform.node())
    if hosts is not None:
        write_text_atomic(run_dir / CONFIG_FILE, dump(config))
        write_run_json(run_dir, world, hosts, threads, start_s, first_step)
    monitor = Monitor(run_dir, comm, first_step, held)
    origin = f"resumed from {checkpoint.folder_of(run_dir, first_step)}" if first_step else "from the start"
    monitor.say(f"{world.size} ranks × {threads} threads ({world.kind}), {origin}")
    for folder in checkpoint.torn(run_dir):
        monitor.say(f"{folder}: no manifest, so no checkpoint; left out")
    return monitor


def describe_start(
    monitor: Monitor, config: RunConfig, module: TrainedModule, sets: list[ShardSet], plan: Plan
) -> None:
    """What trains, and on what: of each set its size and share, and how often the run will see it."""
    texts = {"trainable": adapter.trainable_text(module), "sets": sets_text(sets, plan, config.train.max_steps)}
    for tag, text in texts.items():
        for line in text.splitlines():
            monitor.say(line)
        monitor.text(tag, f"```\n{text}\n```")
    monitor.text("config", f"```yaml\n{dump(config)}```")


def sets_text(sets: list[ShardSet], plan: Plan, steps: int) -> str:
    """A line for each set; where shards are shuffled in blocks another one, how well that mixes."""
    lines = []
    for number, (one, epochs) in enumerate(zip(sets, plan.epochs_at(steps), strict=True)):
        share, heads = plan.ratios[number] / sum(plan.ratios), int(one.n_heads.sum())
        told = f"{len(one):,} images, {heads:,} heads, {share:.1%} of the stream, {epochs:.3g} epochs"
        lines.append(f"{one.path}: {told}")
        if plan.block_shards:
            lines.append(f"{one.path}: {quality(plan.shuffles[number], (plan.seed, number, 0))}")
    return "\n".join(lines)


def dump(config: RunConfig) -> str:
    """The resolved config as YAML."""
    value = asdict(config)
    value["train"]["betas"] = list(value["train"]["betas"])
    return yaml.safe_dump(value, sort_keys=False)


def refuse_changes(run_dir: Path, config: RunConfig) -> None:
    """Raise UserError where `config` would make a resumed run another run."""
    from cogvlm_hpe.train.command import parse_file

    path = run_dir / CONFIG_FILE
    if path.is_file():
        changed = configs.changes(parse_file(path), config)
        if changed:
            raise UserError(
                f"{run_dir}: cannot be resumed exactly with {'; '.join(changed)}; undo it, or give --allow-change"
            )


def refuse_other_sets(saved: checkpoint.Saved, plan: Plan, run_dir: Path) -> None:
    """Raise UserError where the shard sets are not what they were: the same step would see other samples."""
    before, now = saved.loader, json.loads(json.dumps(plan.state(saved.step)))
    if "digests" not in before:
        now.pop("digests", None)  # older checkpoints do not tell which build of a set they have seen
    changed = [f"{key}: {before.get(key)} -> {value}" for key, value in now.items() if before.get(key) != value]
    if changed:
        raise UserError(
            f"{run_dir}: cannot be resumed exactly, the shard sets have changed ({'; '.join(changed)}); "
            "bring the old ones back, or give --allow-change"
        )
