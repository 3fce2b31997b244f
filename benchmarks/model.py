"""A LoRA training step of ours beside two others, in one run: answers/s, tokens/s and ratios.

  shared all, text   ours: k questions share their image's prefix; the adapter acts on all tokens, or on text only
  separate           a sequence for each question through our own plain call, logits at every position
  published          the same by the published code's algorithm, written here: boolean-mask scatter to the experts in
                     each layer, dense float masks, float32 softmax over padding, logits everywhere

python benchmarks/model.py [--tokens 257,1226] [--questions 1,4,8] [--repeats 5] [--threads 2] [--gpu]
CPU: hidden 512 x 8 layers, vocabulary 32,000, tower 256 x 4, float32. A round runs every way once; what is printed are
medians over the rounds, of seconds and of the ratios within a round. Sequences one by one cost k times one sequence.
--gpu adds true widths in bf16, as many layers as fit.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.nn import functional as F

from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.model.experts import rotate
from cogvlm_hpe.model.layout import IGNORE, plain_positions, vision_tokens
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.train.plan import flop_counter

TEXT_TOKENS, PROMPT_TOKENS = 76, 58  # a pose question with its box, and its answer, in Llama's tokens
PADDING = 16  # what a batch of unequal questions costs the published code

OURS, OTHERS = ("shared all", "shared text"), ("separate", "published")
# Others' seconds over ours that are asked for: tokens (None: any), questions, other, ours, ratio.
AIMS = (
    (None, 1, "published", "shared all", 1.3),
    (1226, 8, "separate", "shared all", 4.0),
    (1226, 8, "separate", "shared text", 8.0),
)

Step = Callable[[], Tensor]
Way = tuple[str, int]
"""What is timed: a name of OURS with its questions, or one of OTHERS with one sequence."""


@dataclass
class Measured:
    """Rounds of one image size; sequences one by one were timed for one question."""

    tokens: int
    seconds: dict[Way, list[float]]
    flops: dict[Way, int]

    def ratio(self, other: str, ours: str, k: int) -> float:
        """Seconds of k sequences over those of our step: the median over the rounds."""
        pairs = zip(self.seconds[other, 1], self.seconds[ours, k], strict=True)
        return statistics.median(k * theirs / mine for theirs, mine in pairs)

    def flop_ratio(self, other: str, ours: str, k: int) -> float:
        """The same if every operation took its share of time: what fewer operations alone give."""
        return k * self.flops[other, 1] / self.flops[ours, k]

    def rate(self, way: Way) -> float:
        """FLOP/s."""
        return self.flops[way] / statistics.median(self.seconds[way])


def make_model(image_tokens: int, scope: str, **widths: object) -> CogVLMForCausalLM:
    """A model with a LoRA of rank 16 on the language experts' attention."""
    side = round(image_tokens**0.5)
    small = {"hidden_size": 256, "num_hidden_layers": 4, "num_heads": 4, "intermediate_size": 1024}
    vision = widths.pop("vision", small) | {"image_size": 14 * side, "num_positions": image_tokens + 1}
    config = CogVLMConfig(vision_config=vision, **widths)
    torch.manual_seed(0)
    model = CogVLMForCausalLM(config).requires_grad_(False)
    targets = r".*language_expert_(query_key_value|dense)"
    inject_adapter_in_model(LoraConfig(r=16, target_modules=targets, init_lora_weights=False), model)
    model.adapter_scope = scope
    return model


def texts(k: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels (k, TEXT_TOKENS)."""
    ids = torch.randint(3, 30000, (k, TEXT_TOKENS), generator=torch.Generator().manual_seed(0))
    return ids, torch.where(torch.arange(TEXT_TOKENS) < PROMPT_TOKENS, IGNORE, ids)


def shared(model: CogVLMForCausalLM, pixels: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    """Ours: all questions in one call."""
    index = torch.zeros(len(ids), dtype=torch.long)
    return model(pixel_values=pixels, image_index=index, branch_input_ids=ids, branch_labels=labels).loss


def rows(model: CogVLMForCausalLM, ids: Tensor, labels: Tensor, padding: int) -> tuple[Tensor, ...]:
    """Questions as plain rows: ids, types, mask and labels."""
    n = model.config.image_tokens + 3
    whole = F.pad(ids, (n, padding))
    whole[:, 0] = 1
    types = torch.zeros_like(whole)
    types[:, 1:n] = 1
    mask = torch.ones_like(whole)
    mask[:, n + ids.shape[1] :] = 0
    return whole, types, mask, F.pad(labels, (n, padding), value=IGNORE)


def separate(model: CogVLMForCausalLM, pixels: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    """Our plain call."""
    whole, types, mask, wanted = rows(model, ids, labels, 0)
    return model(whole.to(pixels.device), types, mask, pixels, wanted.to(pixels.device)).loss


def published(model: CogVLMForCausalLM, pixels: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    """The algorithm of the published remote code, on the same weights."""
    device = pixels.device
    whole, types, mask, wanted = (t.to(device) for t in rows(model, ids, labels, PADDING))
    decoder, length = model.model, whole.shape[1]
    x = decoder.embed_tokens(whole)
    tokens, _ = decoder.vision(pixels)
    x = x.index_put([types.bool()], tokens.flatten(0, 1).to(x.dtype))
    rope = decoder.rope(plain_positions(types, mask))
    lowest = torch.finfo(x.dtype).min
    dense = torch.full((length, length), lowest, device=device, dtype=x.dtype).triu(1)[None, None]
    dense = dense.masked_fill((mask == 0)[:, None, None, :], lowest)
    for layer in decoder.layers:
        x = x + scatter_attention(layer.self_attn, layer.input_layernorm(x), types, rope, dense)
        y = layer.post_attention_layernorm(x)
        x = x + scatter(y, types, layer.mlp.language_mlp, layer.mlp.vision_mlp, y.shape[-1])
    logits = model.lm_head(decoder.norm(x)).float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten(), ignore_index=IGNORE)


def scatter(x: Tensor, types: Tensor, language: Callable, vision: Callable, width: int) -> Tensor:
    """Each expert on its tokens by boolean masks, made again at each use."""
    at = vision_tokens(types)
    out = torch.zeros(*x.shape[:2], width, dtype=x.dtype, device=x.device)
    out[at] = vision(x[at])
    out[~at] = language(x[~at])
    return out


def scatter_attention(attention: object, x: Tensor, types: Tensor, rope: tuple, dense: Tensor) -> Tensor:
    """Matmul, float32 softmax over a dense mask, matmul."""
    width = x.shape[-1]
    qkv = scatter(
        x, types, attention.language_expert_query_key_value, attention.vision_expert_query_key_value, 3 * width
    )
    q, k, v = qkv.view(*x.shape[:2], 3, attention.n_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = rotate(q, rope), rotate(k, rope)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + dense
    heads = scores.softmax(dim=-1, dtype=torch.float32).to(x.dtype) @ v
    merged = heads.transpose(1, 2).reshape(x.shape)
    return scatter(merged, types, attention.language_expert_dense, attention.vision_expert_dense, width)


def check_agreement(models: dict[str, CogVLMForCausalLM], pixels: Tensor, k: int) -> None:
    """One shared call must give the mean loss of k sequences; ends the program where it does not."""
    every = models["all"]
    ids, labels = texts(k)
    with torch.no_grad():
        together = float(shared(every, pixels, ids, labels))
        alone = [float(separate(every, pixels, ids[[row]], labels[[row]])) for row in range(k)]
        first = float(published(every, pixels, ids[:1], labels[:1]))
    gap = max(abs(together - statistics.mean(alone)), abs(first - alone[0]))
    if gap > (0.05 if pixels.is_cuda else 1e-3):
        sys.exit(f"the ways disagree: together {together}, one by one {alone}, published {first}")


def make_steps(
    models: dict[str, CogVLMForCausalLM], pixels: Tensor, questions: list[int]
) -> dict[Way, tuple[Step, CogVLMForCausalLM]]:
    """Forward and backward of every way."""

    def step(way: Callable, model: CogVLMForCausalLM, k: int) -> tuple[Step, CogVLMForCausalLM]:
        ids, labels = texts(k)
        return lambda: way(model, pixels, ids, labels).backward(), model

    steps = {("separate", 1): step(separate, models["all"], 1), ("published", 1): step(published, models["all"], 1)}
    for k in questions:
        steps |= {(f"shared {scope}", k): step(shared, model, k) for scope, model in models.items()}
    return steps


def seconds(step: Step, model: CogVLMForCausalLM) -> float:
    """One forward and backward."""
    model.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start_s = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start_s


def measure(models: dict[str, CogVLMForCausalLM], pixels: Tensor, questions: list[int], repeats: int) -> Measured:
    """A round to warm up and count operations, then `repeats` rounds in which the ways take turns."""
    check_agreement(models, pixels, max(questions))
    steps = make_steps(models, pixels, questions)
    found = Measured(models["all"].config.image_tokens + 1, {way: [] for way in steps}, {})
    for way, (step, model) in steps.items():
        with flop_counter() as counter:
            seconds(step, model)
        found.flops[way] = counter.get_total_flops()
    for number in range(repeats):
        start_s = time.perf_counter()
        for way, (step, model) in steps.items():
            found.seconds[way].append(seconds(step, model))
        taken_s = time.perf_counter() - start_s
        print(f"{found.tokens} tokens: round {number + 1} of {repeats}, {taken_s:.0f} s", file=sys.stderr, flush=True)
    return found


def show(found: Measured, questions: list[int]) -> None:
    """The table of one image size."""
    print("\nanswers/s (and tokens/s, a shared prefix counted for each question); others' seconds over ours")
    names = " ".join(f"{name:>16}" for name in (*OURS, *OTHERS))
    print(f"{'':>{10 + 17 * 4}} {'separate over':>15} {'published over':>15}")
    print(f"{'image':>6} {'k':>2}  {names} {'all':>7} {'text':>7} {'all':>7} {'text':>7}")
    for k in questions:
        taken_s = {name: statistics.median(found.seconds[name, k]) / k for name in OURS}
        taken_s |= {name: statistics.median(found.seconds[name, 1]) for name in OTHERS}
        tokens = found.tokens + 2 + TEXT_TOKENS
        rates = " ".join(f"{f'{1 / s:.2f} ({tokens / s:.0f})':>16}" for s in taken_s.values())
        ratios = " ".join(f"{found.ratio(other, ours, k):>7.2f}" for other in OTHERS for ours in OURS)
        print(f"{found.tokens:>6} {k:>2}  {rates} {ratios}", flush=True)


def judge(found: Measured, questions: list[int]) -> None:
    """Each aim that this image size has, whether it is met, and what limits it where it is not."""
    for tokens, k, other, ours, aim in AIMS:
        if tokens not in (None, found.tokens) or k not in questions:
            continue
        ratio, by_flops = found.ratio(other, ours, k), found.flop_ratio(other, ours, k)
        said = f"{other} over {ours}, k = {k}, {found.tokens} tokens: {ratio:.2f}, aim {aim:.1f}"
        print(f"{said}: {'met' if ratio >= aim else 'MISSED'}; operations alone give {by_flops:.2f}")
        if ratio < aim:
            print(f"  {limit(found, other, ours, k, by_flops < aim)}")


def limit(found: Measured, other: str, ours: str, k: int, by_arithmetic: bool) -> str:
    """One line on what keeps a ratio below its aim."""
    if by_arithmetic:
        prefix = (k * found.flops[ours, 1] - found.flops[ours, k]) / (k - 1) if k > 1 else found.flops[ours, 1]
        share = prefix / found.flops[ours, k]
        return f"limited by arithmetic: the image's prefix is {share:.0%} of the operations of our step"
    mine, theirs = found.rate((ours, k)) / 1e9, found.rate((other, 1)) / 1e9
    return f"limited by speed of small operations: ours does {mine:.0f} GFLOP/s, {other} {theirs:.0f}"


def on_cpu(args: argparse.Namespace) -> None:
    """The small widths."""
    torch.set_num_threads(args.threads)
    widths = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
    for tokens in args.tokens:
        models = {scope: make_model(tokens - 1, scope, **widths) for scope in ("all", "text")}
        pixels = torch.randn(1, 3, *[models["all"].config.vision_config["image_size"]] * 2)
        found = measure(models, pixels, args.questions, args.repeats)
        show(found, args.questions)
        judge(found, args.questions)


def on_gpu(args: argparse.Namespace) -> None:
    """True widths in bf16 and as many layers as fit; MFU against the matrix rate measured here."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    for _ in range(20):
        a @ a
    torch.cuda.synchronize()
    peak = 20 * 2 * 8192**3 / (time.perf_counter() - start_s)
    print(f"\n{torch.cuda.get_device_name()}: bf16 matrices {peak / 1e12:.0f} TFLOP/s")
    # A decoder layer is 0.81 GB, a vision layer 0.14 GB in bf16; two copies (scopes), and activations beside them.
    free_gb = torch.cuda.mem_get_info()[0] / 1e9
    layers = max(1, min(32, int((free_gb * 0.45 - 4) / 2 / 0.95)))
    vision = {"num_hidden_layers": 2 * layers - 1}
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        models = {scope: make_model(1225, scope, num_hidden_layers=layers, vision=vision) for scope in ("all", "text")}
        torch.set_default_dtype(torch.float32)
    pixels = torch.randn(1, 3, 490, 490, device="cuda", dtype=torch.bfloat16)
    found = measure(models, pixels, args.questions, args.repeats)
    show(found, args.questions)
    for way in found.seconds:
        print(f"{layers} layers, {way[0]}, k = {way[1]}: MFU {found.rate(way) / peak:.1%}")


def numbers(text: str) -> list[int]:
    """`1,4,8`."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=numbers, default="257,1226", help="image tokens, boi included")
    parser.add_argument("--questions", type=numbers, default="1,4,8", help="questions an image")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="the GPU part too")
    args = parser.parse_args()
    args.questions = sorted({1, *args.questions})  # the aims and what limits them are told from one question
    on_cpu(args)
    if args.gpu:
        on_gpu(args)


if __name__ == "__main__":
    main()
