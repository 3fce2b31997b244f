"""The judge's answers in heads/s: questions on a shared image prefix beside one `generate` a head; 2 ranks beside 1.

  ours       what `cogvlm-hpe evaluate` runs: one pass over the images of a batch, all their heads decoded together
  generate   transformers' `generate` on our model with its key-value cache, one head at a time
  ranks      mpirun with the judge's own loop over a shard set: reading, answers, sums over ranks, rows to rank 0

python benchmarks/evaluate.py [--tokens 257] [--questions 1,4,8] [--images 2] [--repeats 3] [--ranks 2] [--set 40]
CPU, float32, one thread a rank: hidden 512 x 8 layers, vocabulary 32,000, tower 256 x 4, random weights; every answer
is 16 tokens long. Medians of alternating repeats; both ways must give the same text. The ranks judge a set of --set
images with 1 to 8 heads each, 4 images a batch, dealt as the judge deals them; their time is that of the slowest, from
the moment all have read the model. Two things bound what ranks can gain, whatever program they run:

  dealt      the heads of the fullest rank: images differ, and so do ranks
  machine    as many processes that know nothing of each other, each judging all that one rank alone judges: caches,
             memory and clock are theirs in common

The rest is ours: what ranks wait for each other, and the rows on their way to rank 0. Where several ranks need more CPU
seconds than one for the same heads, the cores slow each other.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg
import torch

from cogvlm_hpe.dialogue import DEFAULT_PROMPTS
from cogvlm_hpe.evaluate.answer import Decoding
from cogvlm_hpe.evaluate.decode import decode_all, decode_batch, questions
from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.model.load import Loaded
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.model.pixels import normalise
from cogvlm_hpe.model.tokenizer import train_tokenizer
from launcher import comm as comms
from shards.index import open_set
from shards.plan import Slot, consecutive_batches
from shards.record import Head, Image, Record
from shards.stream import Item
from shards.write import Sample, build

ANSWER_TOKENS = 16
BATCH = 4
UPRIGHT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def make_model(image_tokens: int) -> Loaded:
    """A model that never ends an answer early."""
    tokenizer = train_tokenizer([*DEFAULT_PROMPTS.values(), "0123456789 [[ ]] {{ }} , . ?"])
    vision = {"hidden_size": 256, "num_hidden_layers": 4, "num_heads": 4, "intermediate_size": 1024}
    vision |= {"image_size": 14 * round((image_tokens - 1) ** 0.5), "num_positions": image_tokens}
    torch.manual_seed(0)
    model = CogVLMForCausalLM(
        CogVLMConfig(
            vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
            vision_config=vision,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight[tokenizer.get_vocab_size() :] = 0.0  # tokens that have no text
        model.lm_head.weight[model.config.eos_token_id] = 0.0
    return Loaded(model, tokenizer, {"prompts": dict(DEFAULT_PROMPTS), "answer_format": "offset"})


def make_heads(number: int) -> list[Head]:
    """`number` heads in an image of 200 x 150 px."""
    boxes = [(10.0 * i, 5.0 * i, 10.0 * i + 40, 5.0 * i + 50) for i in range(number)]
    return [Head(box, UPRIGHT) for box in boxes]


def make_items(loaded: Loaded, images: int, heads: int) -> list[Item]:
    """`images` pictures of noise with `heads` heads each."""
    side = loaded.model.config.vision_config["image_size"]
    generator = torch.Generator().manual_seed(heads)
    record = Record(Image(200, 150, "noise", "0", ""), make_heads(heads))
    pixels = torch.randint(0, 256, (images, 3, side, side), generator=generator, dtype=torch.uint8)
    return [Item(Slot(0, i, 0, i), f"image-{i}", image, record) for i, image in enumerate(pixels)]


def ours(loaded: Loaded, items: list[Item]) -> list[str]:
    """The judge's own way."""
    return [row["text"] for row in decode_batch(loaded, items, ["pose"], Decoding(ANSWER_TOKENS))]


def generate(loaded: Loaded, items: list[Item]) -> list[str]:
    """One call of `generate` a head."""
    model, tokenizer, texts = loaded.model, loaded.tokenizer, []
    n_image = model.config.image_tokens + 2
    for item in items:
        assert item.record is not None and item.image is not None
        for row in questions(item.key, item.record, ["pose"], loaded.notes):
            query = tokenizer.encode(row["question"], add_special_tokens=False).ids
            ids = torch.tensor([[model.config.bos_token_id, *[0] * n_image, *query]])
            types = torch.tensor([[0, *[1] * n_image, *[0] * len(query)]])
            with torch.no_grad():
                out = model.generate(
                    input_ids=ids, token_type_ids=types, attention_mask=torch.ones_like(ids),
                    pixel_values=normalise(item.image[None]), max_new_tokens=ANSWER_TOKENS, do_sample=False,
                )  # fmt: skip
            texts.append(tokenizer.decode(out[0, ids.shape[1] :].tolist(), skip_special_tokens=True).strip())
    return texts


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes."""
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def compare(args: argparse.Namespace) -> None:
    """The table of k."""
    loaded = make_model(args.tokens)
    print(f"{args.tokens - 1} image tokens, {args.images} images a batch, heads/s")
    print(f"{'k':>3} {'ours':>9} {'generate':>9} {'ratio':>7}")
    for k in args.questions:
        items = make_items(loaded, args.images, k)
        same = ours(loaded, items) == generate(loaded, items)  # warms both up, too
        ways = (partial(ours, loaded, items), partial(generate, loaded, items))
        times = [[seconds(way) for way in ways] for _ in range(args.repeats)]
        a, b = (statistics.median(column) for column in zip(*times, strict=True))
        n = k * args.images
        print(f"{k:>3} {n / a:>9.2f} {n / b:>9.2f} {b / a:>6.2f}x{'' if same else '  answers differ'}", flush=True)


class Crowd:
    """A source of noise with 1 to 8 heads an image."""

    name, licence, split, scope = "crowd", "CC0-1.0", "test", {}

    def __init__(self, images: int) -> None:
        self._images = images

    def __len__(self) -> int:
        return self._images

    def sample(self, i: int) -> Sample:
        """Image i."""
        generator = np.random.default_rng(i)
        pixels = generator.integers(0, 256, (150, 200, 3), dtype=np.uint8)
        record = Record(Image(200, 150, self.name, str(i), ""), make_heads(int(generator.integers(1, 9))))
        return Sample(f"crowd-{i:06d}", simplejpeg.encode_jpeg(pixels), "jpg", record)


def as_rank(args: argparse.Namespace) -> None:
    """All ranks. Judge the set, each its share or with --alone each all of it; rank 0 prints the slowest's seconds."""
    comm, shard_set = comms.mpi(), open_set(args.as_rank)
    loaded = make_model(args.tokens)
    own = comms.single() if args.alone else comm
    judge = partial(decode_all, [loaded], shard_set, own, ["pose"], Decoding(ANSWER_TOKENS), batch=BATCH)
    judge(limit=BATCH * own.size)
    comm.barrier()
    start_cpu_s = time.process_time()
    took_s = comm.max(seconds(judge))
    cpu_s = comm.sum(time.process_time() - start_cpu_s)
    if comm.rank == 0:
        print(took_s, cpu_s)


def timed(ranks: int, words: list[object]) -> list[float]:
    """Seconds that `ranks` processes of this program take for the set, and CPU seconds of all together."""
    start = [Path(sys.executable).with_name("mpirun"), "-np", ranks, sys.executable, __file__, *words]
    # Without a stdin of its own mpirun stops where a background job may not read the terminal.
    done = subprocess.run(
        list(map(str, start)), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
    )  # fmt: skip
    return [float(number) for number in done.stdout.split()[-2:]]


def scale(args: argparse.Namespace) -> None:
    """1 rank beside several, and beside as many on their own; alternating."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "crowd"
        build(Crowd(args.set), place, comms.single(), 16)
        words = ["--tokens", args.tokens, "--as-rank", place]
        ways = ((1, words), (args.ranks, words), (args.ranks, [*words, "--alone"]))
        times = [[timed(ranks, flags) for ranks, flags in ways] for _ in range(args.repeats)]
        heads = [open_set(place).n_heads[i] for i in open_set(place).key_order()]
    (one, one_cpu), (many, many_cpu), (alone, _) = np.median(times, axis=0).tolist()
    loads = [sum(heads[i] for batch in dealt for i in batch) for dealt in deal(len(heads), args.ranks)]
    dealt, machine = sum(heads) / max(loads), args.ranks * one / alone
    possible, reached = machine * dealt / args.ranks, one / many
    print(f"1 rank {sum(heads) / one:.2f} heads/s, {args.ranks} ranks {sum(heads) / many:.2f} heads/s: {reached:.2f}x")
    print(f"CPU seconds: {one_cpu:.1f} of 1 rank, {many_cpu:.1f} of {args.ranks} together")
    print(f"dealt {dealt:.2f}x, machine {machine:.2f}x, both {possible:.2f}x: {reached / possible:.0%} of it reached")


def deal(images: int, ranks: int) -> list[list[range]]:
    """The batches of each rank, as the judge deals them."""
    batches = consecutive_batches(images, BATCH)
    return [batches[rank::ranks] for rank in range(ranks)]


def main() -> None:
    """Read the flags and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=257, help="image tokens, the class token included")
    parser.add_argument("--questions", type=lambda text: [int(k) for k in text.split(",")], default=[1, 4, 8])
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--set", type=int, default=40, help="images that the ranks judge")
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.as_rank:
        as_rank(args)
    else:
        compare(args)
        scale(args)


if __name__ == "__main__":
    main()
