"""A LoRA training step of ours beside two others, in one run: answers/s, tokens/s and ratios.

  shared all, text   ours: k questions share their image's prefix; the adapter acts on all tokens, or on text only
  separate           k separate sequences through our own plain call, logits at every position
  published          k separate sequences by the published code's algorithm, written here: boolean-mask scatter to
                     the experts in each layer, dense float masks, float32 softmax over padding, logits everywhere

python benchmarks/model.py [--tokens 257,1226] [--questions 1,4,8] [--repeats 3] [--threads 1] [--gpu]
CPU: hidden 512 x 8 layers, vocabulary 32,000, tower 256 x 4, float32; medians of alternating repeats.
--gpu adds true widths in bf16, as many layers as fit.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.nn import functional as F

from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.model.experts import rotate
from cogvlm_hpe.model.layout import IGNORE, plain_positions, vision_tokens
from cogvlm_hpe.model.modeling import CogVLMForCausalLM

TEXT_TOKENS, PROMPT_TOKENS = 76, 58  # a pose question with its box, and its answer, in Llama's tokens
PADDING = 16  # what a batch of unequal questions costs the published code

NAMES = ("shared all", "shared text", "separate", "published")

Step = Callable[[], Tensor]


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
    ids = torch.randint(3, 30000, (k, TEXT_TOKENS), generator=torch.Generator().manual_seed(k))
    return ids, torch.where(torch.arange(TEXT_TOKENS) < PROMPT_TOKENS, IGNORE, ids)


def shared(model: CogVLMForCausalLM, pixels: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    """Ours: all questions in one call."""
    index = torch.zeros(len(ids), dtype=torch.long)
    return model(pixel_values=pixels, image_index=index, branch_input_ids=ids, branch_labels=labels).loss


def rows(model: CogVLMForCausalLM, ids: Tensor, labels: Tensor, padding: int) -> tuple[Tensor, ...]:
    """One question as a plain row: ids, types, mask and labels."""
    n = model.config.image_tokens + 3
    before = F.pad(torch.ones(1, n - 1, dtype=torch.long), (1, TEXT_TOKENS + padding))
    whole = F.pad(ids[None], (n, padding))
    whole[0, 0] = 1
    return (
        whole,
        before,
        F.pad(torch.ones_like(ids[None]), (n, padding), value=0)
        | (F.pad(torch.ones(1, n, dtype=torch.long), (0, TEXT_TOKENS + padding))),
        F.pad(labels[None], (n, padding), value=IGNORE),
    )


def separate(model: CogVLMForCausalLM, pixels: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    """Our plain call; the caller sums over the questions."""
    whole, types, mask, wanted = rows(model, ids, labels, 0)
    return model(whole, types, mask, pixels, wanted).loss


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


def one_by_one(way: Callable, model: CogVLMForCausalLM, pixels: Tensor, ids: Tensor, labels: Tensor) -> Step:
    """k calls, their gradients summed."""

    def step() -> Tensor:
        total = torch.zeros(())
        for row in range(len(ids)):
            loss = way(model, pixels, ids[row], labels[row]) / len(ids)
            loss.backward()
            total = total + loss.detach().cpu()
        return total

    return step


def together(model: CogVLMForCausalLM, pixels: Tensor, ids: Tensor, labels: Tensor) -> Step:
    """One call."""

    def step() -> Tensor:
        loss = shared(model, pixels, ids, labels)
        loss.backward()
        return loss.detach().cpu()

    return step


def compare(models: dict[str, CogVLMForCausalLM], pixels: Tensor, k: int, repeats: int) -> None:
    """One line of the table; the losses of all ways must agree."""
    every, text = models["all"], models["text"]
    ids, labels = texts(k)
    ways: dict[str, tuple[Step, CogVLMForCausalLM]] = {
        "shared all": (together(every, pixels, ids, labels), every),
        "shared text": (together(text, pixels, ids, labels), text),
        "separate": (one_by_one(separate, every, pixels, ids, labels), every),
    }
    if k == 1:  # what it costs does not change with k
        ways["published"] = (one_by_one(published, every, pixels, ids, labels), every)
    losses = {name: float(step()) for name, (step, _) in ways.items()}
    gap = max(abs(losses[name] - losses["shared all"]) for name in ways if name != "shared text")
    assert gap < (0.05 if pixels.is_cuda else 1e-3), f"the ways disagree: {losses}"
    taken = {name: [] for name in ways}
    for _ in range(repeats):
        for name, (step, model) in ways.items():
            taken[name].append(seconds(step, model))
    median = {name: statistics.median(values) for name, values in taken.items()}
    n = every.config.image_tokens + 3
    line = f"{n - 2:>6} {k:>2} "
    for name in NAMES:
        rate = f"{k / median[name]:.2f} ({k * (n + TEXT_TOKENS) / median[name]:.0f})" if name in median else "-"
        line += f" {rate:>16}"
    for other in ("separate", "published"):
        for ours in ("shared all", "shared text"):
            line += f" {median[other] / median[ours]:>7.2f}" if other in median else f" {'-':>7}"
    print(line, flush=True)


def header() -> None:
    """What the columns are."""
    print("answers/s (and tokens/s, a shared prefix counted for each question); ratios: others' seconds over ours")
    names = " ".join(f"{name:>16}" for name in NAMES)
    print(f"{'':>{10 + 17 * len(NAMES)}} {'separate over':>15} {'published over':>15}")
    print(f"{'image':>6} {'k':>2}  {names} {'all':>7} {'text':>7} {'all':>7} {'text':>7}")


def on_cpu(args: argparse.Namespace) -> None:
    """The small widths."""
    torch.set_num_threads(args.threads)
    header()
    widths = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
    for tokens in map(int, args.tokens.split(",")):
        models = {scope: make_model(tokens - 1, scope, **widths) for scope in ("all", "text")}
        pixels = torch.randn(1, 3, *[models["all"].config.vision_config["image_size"]] * 2)
        for k in map(int, args.questions.split(",")):
            compare(models, pixels, k, args.repeats)


def on_gpu(args: argparse.Namespace) -> None:
    """True widths in bf16 and as many layers as fit; MFU against the matrix rate measured here."""
    from torch.utils.flop_counter import FlopCounterMode

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    for _ in range(20):
        a @ a
    torch.cuda.synchronize()
    rate = 20 * 2 * 8192**3 / (time.perf_counter() - start_s)
    print(f"{torch.cuda.get_device_name()}: bf16 matrices {rate / 1e12:.0f} TFLOP/s")
    header()
    # A decoder layer is 0.81 GB, a vision layer 0.14 GB in bf16; two copies (scopes), and activations beside them.
    free_gb = torch.cuda.mem_get_info()[0] / 1e9
    layers = max(1, min(32, int((free_gb * 0.45 - 4) / 2 / 0.95)))
    vision = {"num_hidden_layers": 2 * layers - 1}
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        models = {scope: make_model(1225, scope, num_hidden_layers=layers, vision=vision) for scope in ("all", "text")}
        torch.set_default_dtype(torch.float32)
    pixels = torch.randn(1, 3, 490, 490, device="cuda", dtype=torch.bfloat16)
    for k in map(int, args.questions.split(",")):
        compare(models, pixels, k, args.repeats)
    for scope, model in models.items():
        step = together(model, pixels, *texts(8))
        with FlopCounterMode(display=False) as counter:
            step()
        taken_s = statistics.median(seconds(step, model) for _ in range(args.repeats))
        print(f"{layers} layers, k = 8, scope {scope}: MFU {counter.get_total_flops() / taken_s / rate:.1%}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="257,1226", help="image tokens, boi included")
    parser.add_argument("--questions", default="1,4,8", help="questions an image")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gpu", action="store_true", help="the GPU part too")
    args = parser.parse_args()
    on_cpu(args)
    if args.gpu:
        on_gpu(args)


if __name__ == "__main__":
    main()
