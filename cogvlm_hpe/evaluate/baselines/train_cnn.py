"""`cogvlm-hpe train-cnn`: the crop network that the language model is compared with, from the same shards."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cogvlm_hpe.evaluate.command import positive
from launcher.errors import UsageError, UserError

if TYPE_CHECKING:
    import torch

    from cogvlm_hpe.evaluate.baselines.cnn import PoseCNN
    from launcher.comm import Comm
    from shards.stream import Item, Stream

HELP = "train a network on head crops, for comparison: one rank's work, as `train`"
EPILOG = """starting it
  cogvlm-hpe train-cnn --shards DIR --out DIR                                    one rank
  deepspeed --num_gpus 2 --module cogvlm_hpe train-cnn --shards DIR --out DIR    data parallel
then `cogvlm-hpe evaluate --model OUT --shards DIR --out DIR` judges it."""
_LOG_EVERY = 50
_BRIGHTNESS = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of train-cnn."""
    add = parser.add_argument
    add("--shards", type=Path, nargs="+", required=True, metavar="DIR", help="training sets, in equal shares")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to make; must not exist")
    add("--steps", type=positive, default=2000, metavar="N", help="optimizer steps (default: %(default)s)")
    add("--batch", type=positive, default=32, metavar="N", help="images of a step, of all ranks (default: %(default)s)")
    add("--lr", type=float, default=2e-3, help="peak learning rate, AdamW (default: %(default)s)")
    add("--seed", type=int, default=1, help="of weights and order (default: %(default)s)")
    add("--workers", type=int, default=0, metavar="N", help="reader processes per rank (default: %(default)s)")
    add(
        "--min-visible",
        type=float,
        default=0.5,
        help="heads less visible than this are left out (default: %(default)s)",
    )
    add("--backbone", choices=("resnet", "convnext"), default="resnet", help="default: %(default)s")
    widths, depths = (32, 64, 96, 160), (1, 1, 1, 1)
    for flag, numbers, what in (("--widths", widths, "channels"), ("--depths", depths, "blocks")):
        said = f"{what} of each stage (default: {','.join(map(str, numbers))})"
        add(flag, type=_numbers, default=numbers, metavar="N,N,…", help=said)
    add("--crop-px", type=positive, default=64, metavar="S", help="side of a head's crop (default: %(default)s)")
    add("--margin", type=float, default=0.2, help="added to each side of the box, in sides (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """All ranks. Train and save. Raises UsageError or UserError for the user's mistakes."""
    if args.out.exists():
        raise UsageError(f"--out {args.out}: exists already; choose another folder or remove it")

    from cogvlm_hpe.evaluate.baselines.cnn import CNNConfig, PoseCNN, save_cnn
    from cogvlm_hpe.train.setup import set_threads
    from launcher.comm import from_torch
    from launcher.world import discover

    world = discover()
    comm = from_torch(world)
    threads = set_threads(world)
    config = CNNConfig(args.backbone, args.widths, args.depths, args.crop_px, args.margin)
    import torch

    torch.manual_seed(args.seed)
    model = PoseCNN(config)
    stream = _open_stream(args, comm)
    error_deg = _train(model, stream, args, comm)
    if comm.rank == 0:
        parameters = sum(p.numel() for p in model.parameters())
        keys = ("shards", "steps", "batch", "lr", "seed", "min_visible")
        notes = {
            key: [str(p) for p in value] if isinstance(value := getattr(args, key), list) else value for key in keys
        }
        save_cnn(args.out, model, notes | {"ranks": comm.size, "threads": threads, "parameters": parameters})
        print(f"wrote {args.out}: {parameters:,} parameters, training error {error_deg:.1f} deg at the end")
    comm.barrier()
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(positive, text.split(",")))


def _open_stream(args: argparse.Namespace, comm: "Comm") -> "Stream":
    from cogvlm_hpe.evaluate.baselines.crops import CropView
    from shards.index import open_set
    from shards.plan import Plan
    from shards.stream import Stream

    sets = [open_set(path) for path in args.shards]
    if len(args.widths) != len(args.depths):
        raise UsageError(
            f"--widths {len(args.widths)} stages, --depths {len(args.depths)}: give one number a stage each"
        )
    if args.batch % comm.size:
        raise UsageError(f"--batch {args.batch}: must be a multiple of the {comm.size} ranks")
    plan = Plan([len(s) for s in sets], [1.0] * len(sets), args.seed, args.batch)
    view = CropView(args.crop_px, args.margin)
    return Stream(sets, plan, comm.rank, comm.size, view, workers=args.workers)


def _train(model: "PoseCNN", stream: "Stream", args: argparse.Namespace, comm: "Comm") -> float:
    """All ranks. The mean training error in degrees over the last steps."""
    import torch

    from cogvlm_hpe.evaluate.baselines.cnn import geodesic_loss
    from cogvlm_hpe.train.schedule import learning_rate
    from launcher.progress import Progress

    engine = _engine(model, args, comm)
    batches: Iterator[Any] = iter(stream)
    seen, total, error_deg = 0, 0.0, float("nan")
    with Progress(comm).bar("train-cnn", args.steps) as bar:
        for step in range(args.steps):
            crops, truth = prepare(next(batches)[1], args.seed, args.min_visible, args.crop_px)
            heads = int(comm.sum(len(crops)))
            rate = learning_rate(step, peak=args.lr, warmup_steps=50, max_steps=args.steps, min_ratio=0.01)
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
            # A rank without heads still runs one blank crop, so that all ranks make the same calls.
            given = crops if len(crops) else torch.zeros(1, 3, args.crop_px, args.crop_px, dtype=torch.uint8)
            predicted = engine(given.to(engine.device))[: len(crops)]
            losses = geodesic_loss(predicted, truth.to(engine.device))
            # The engine averages over ranks; this sums to the mean over the heads of the global batch.
            engine.backward(losses.sum() * comm.size / max(1, heads))
            engine.step()
            seen, total = seen + heads, total + float(comm.sum(float(losses.detach().sum())))
            bar.advance()
            if (step + 1) % _LOG_EVERY == 0 or step + 1 == args.steps:
                error_deg = float(np.degrees(total / max(1, seen)))
                bar.update(f"error {error_deg:.1f} deg")
                seen, total = 0, 0.0
    if not np.isfinite(error_deg):
        raise UserError(
            "the network did not train (error is not a number); lower --lr, and look for heads in the shards"
        )
    return error_deg


def prepare(
    items: "Sequence[Item]", seed: int, min_visible: float, crop_px: int
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Crops (H, 3, S, S) uint8 and rotations (H, 3, 3) of the heads of a batch, half of the images mirrored.

    What happens to an image depends on its place in the stream alone.
    """
    import torch

    from shards.pose import flip_rotation

    crops, truth = [], []
    for item in items:
        generator = np.random.default_rng([seed, item.slot.position])
        mirrored, bright = generator.random() < 0.5, 1.0 + _BRIGHTNESS * (2.0 * generator.random() - 1.0)
        for number, head in enumerate(item.record.heads if item.record else ()):
            if head.rotation is None or head.visible < min_visible:
                continue
            crop = (item.image[number].float() * bright).clamp(0, 255).to(torch.uint8)  # type: ignore[index]
            crops.append(crop.flip(-1) if mirrored else crop)
            truth.append(torch.from_numpy(flip_rotation(head.matrix) if mirrored else head.matrix).float())
    if not crops:
        return torch.empty(0, 3, crop_px, crop_px, dtype=torch.uint8), torch.empty(0, 3, 3)
    return torch.stack(crops), torch.stack(truth)


def _engine(model: "PoseCNN", args: argparse.Namespace, comm: "Comm") -> Any:
    from cogvlm_hpe.train.engine import prepare_deepspeed

    prepare_deepspeed()
    import deepspeed
    import torch

    if comm.size > 1 and torch.cuda.is_available():  # there is none for CPUs
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    settings = {
        "train_micro_batch_size_per_gpu": args.batch // comm.size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine
