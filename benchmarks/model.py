"""Questions that share one image prefix, beside the same questions as separate sequences: training steps in one run.

python benchmarks/model.py [--questions 1,4,8] [--images 8] [--repeats 5]
Prints answers/s of both and their ratio; the medians of alternating repeats, one thread, float32, the tiny model.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from cogvlm_hpe.model.layout import IGNORE
from cogvlm_hpe.model.load import read_config, resolve_base
from cogvlm_hpe.model.modeling import CogVLMForCausalLM

TEXT_TOKENS, PROMPT_TOKENS = 40, 26  # a pose question and its answer


def step(model: CogVLMForCausalLM, pixels: torch.Tensor, index: torch.Tensor, rows: int) -> None:
    """Forward and backward over `rows` questions."""
    ids = torch.full((rows, TEXT_TOKENS), 7)
    labels = ids.clone()
    labels[:, :PROMPT_TOKENS] = IGNORE
    model(pixel_values=pixels, image_index=index, branch_input_ids=ids, branch_labels=labels).loss.backward()


def answers_per_s(work: Callable[[], None], answers: int) -> float:
    """Answers a second of one repeat."""
    start_s = time.perf_counter()
    work()
    return answers / (time.perf_counter() - start_s)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", default="1,4,8", help="questions an image")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = CogVLMForCausalLM(read_config(resolve_base("tiny")))
    print(f"{'questions':>9} {'shared/s':>9} {'separate/s':>11} {'ratio':>6}")
    for k in map(int, args.questions.split(",")):
        pixels = torch.randn(args.images, 3, 112, 112)
        answers = args.images * k
        each = torch.arange(args.images).repeat_interleave(k)

        def shared(pixels: torch.Tensor = pixels, index: torch.Tensor = each) -> None:
            step(model, pixels, index, len(index))

        def separate(pixels: torch.Tensor = pixels[each], n: int = answers) -> None:
            step(model, pixels, torch.arange(n), n)

        shared(), separate()
        pairs = [(answers_per_s(shared, answers), answers_per_s(separate, answers)) for _ in range(args.repeats)]
        ratio = statistics.median(a / b for a, b in pairs)
        ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{k:>9} {ours:>9.1f} {theirs:>11.1f} {ratio:>6.2f}")


if __name__ == "__main__":
    main()
