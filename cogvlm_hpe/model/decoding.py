"""Answers to many questions on shared image prefixes: greedy, and the distribution over an angle's digits.

Shapes: I images, P prefix tokens, R branches (questions), Q slots of packed prompts, K questions on the image that has
the most, A heads, E head width, D width, G angles of an answer, C codes.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from cogvlm_hpe.model.attention import Where
from cogvlm_hpe.model.experts import TextRouting
from cogvlm_hpe.model.layout import FIRST_TEXT_POSITION, BranchLayout, branch_seen, pack_branches
from launcher.comm import Comm, single

if TYPE_CHECKING:
    from cogvlm_hpe.model.modeling import CogVLMForCausalLM, Prefix

CODES = 361
"""Values that three digits of an angle can have: 000 to 360."""


def greedy(
    model: "CogVLMForCausalLM",
    prefix: "Prefix",
    image_index: Sequence[int],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    comm: Comm | None = None,
) -> list[list[int]]:
    """Most likely next tokens until eos, which is left out, or a prompt's limit; as many lists as prompts.

    With `comm` its ranks go step by step together until the last one is done, as ZeRO-3 needs: all of them call.
    """
    comm = comm or single()
    if not prompts:
        return []
    eos, device = model.config.eos_token_id, model.device
    each = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    limits = torch.tensor(each, device=device)
    longest = comm.max(int(limits.max()))
    ids, layout = _pack(prompts, image_index, len(prefix.patches), device)
    decoder = _Decoder(model, prefix, layout, torch.as_tensor(image_index), longest)
    last = decoder.prompts(ids)
    answers: list[Tensor] = []
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for number in range(longest):
        token = model.lm_head(last).argmax(dim=-1).masked_fill(done, eos)
        answers.append(token)
        done = done | (token == eos) | (number + 1 >= limits)
        if not comm.agree(not bool(done.all())):
            break
        last = decoder.step(token, number)
    table = torch.stack(answers, dim=1).tolist()
    return [row[: row.index(eos)] if eos in row else row for row in table]


def _pack(
    texts: Sequence[Sequence[int]], image_index: Sequence[int], n_images: int, device: torch.device
) -> tuple[Tensor, BranchLayout]:
    length = max(len(text) for text in texts)
    ids = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts])
    mask = torch.arange(length) < torch.tensor([len(text) for text in texts])[:, None]
    layout = pack_branches(torch.as_tensor(image_index), mask, n_images)
    return ids.flatten()[layout.token_of_slot].to(device), layout.to(device)


class _Decoder:
    """One buffer of keys and values a layer: [prefix; prompts; K new tokens a step]."""

    def __init__(
        self, model: "CogVLMForCausalLM", prefix: "Prefix", layout: BranchLayout, image_index: Tensor, steps: int
    ) -> None:
        self.decoder, self.layout = model.model, layout
        n_images, self.n_prefix, device = len(prefix.patches), prefix.tokens, model.device
        counts = torch.bincount(image_index, minlength=n_images)
        self.columns = int(counts.max())
        order = image_index.argsort(stable=True)
        number = torch.empty_like(order)
        number[order] = torch.arange(len(order)) - (counts.cumsum(0) - counts)[image_index[order]]
        self.cell = (image_index * self.columns + number).to(device)  # (R,) flat index into (I, K)
        branch = torch.full((n_images * self.columns,), -2, device=device)  # -2: no branch, and no empty slot either
        branch[self.cell] = torch.arange(len(image_index), device=device)
        own = branch.view(n_images, -1, 1) == layout.branch_of_slot[:, None]  # (I, K, Q)
        self.before = F.pad(own, (self.n_prefix, 0), value=True)[:, None]  # (I, 1, K, P + Q)
        self.same = torch.eye(self.columns, dtype=torch.bool, device=device).expand(n_images, 1, -1, -1)
        room = layout.slots + steps * self.columns
        self.buffers = [tuple(F.pad(t, (0, 0, 0, room)) for t in pair) for pair in prefix.layers]
        start = torch.zeros(n_images * self.columns, dtype=torch.long, device=device)
        start[self.cell] = layout.position.flatten()[layout.last_slot] + 1
        self.position = start.view(n_images, -1)

    def prompts(self, ids_IQ: Tensor) -> Tensor:
        """Hidden state (R, D) of each prompt's last token."""
        seen = branch_seen(self.layout.branch_of_slot, self.n_prefix)
        hidden = self._run(ids_IQ, self.layout.position, seen, self.n_prefix)
        return hidden.flatten(0, 1)[self.layout.last_slot]

    def step(self, token: Tensor, number: int) -> Tensor:
        """Hidden state (R, D) after the `number`-th answer token (R,)."""
        ids = torch.zeros(self.position.numel(), dtype=torch.long, device=token.device)
        ids[self.cell] = token
        seen = torch.cat([self.before, *[self.same] * (number + 1)], dim=3)
        start = self.n_prefix + self.layout.slots + number * self.columns
        hidden = self._run(ids.view_as(self.position), self.position + number, seen, start)
        return hidden.flatten(0, 1)[self.cell]

    def _run(self, ids: Tensor, position: Tensor, seen: Tensor, start: int) -> Tensor:
        rope, routing, kernel = self.decoder.rope(position), TextRouting(), Where(seen)
        x = self.decoder.embed_tokens(ids)
        for layer, buffer in zip(self.decoder.layers, self.buffers, strict=True):
            x, _, _ = layer(x, rope, routing, _AfterBuffer(buffer, start, kernel))
        return self.decoder.norm(x)


class _AfterBuffer:
    """Attention to a buffer's first tokens and the new ones, which are written behind them."""

    def __init__(self, buffer: tuple[Tensor, ...], start: int, kernel: Where) -> None:
        self.buffer, self.start, self.kernel = buffer, start, kernel

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        end = self.start + k.shape[2]
        for whole, new in zip(self.buffer, (k, v), strict=True):
            whole[:, :, self.start : end] = new
        return self.kernel(q, *(whole[:, :, :end] for whole in self.buffer))


def code_distributions(
    model: "CogVLMForCausalLM",
    prefix: "Prefix",
    image_index: Sequence[int],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    digits: Sequence[int],
) -> Tensor:
    """(R, G, C) probability of each code 000-360 of each three-digit number in the answers, given what precedes it.

    Answers must all have G such numbers (`digits` are the token ids of 0 to 9). One pass: behind each answer stands
    a tree of every first digit and every first pair of digits of each number, masked so that a node sees what
    precedes its number, and its own parent. Probabilities are those of three digits, made to sum to one over the codes.
    """
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    starts = [find_numbers(text, len(prompt), digits) for text, prompt in zip(texts, prompts, strict=True)]
    trees = [_tree(text, at, digits) for text, at in zip(texts, starts, strict=True)]
    ids, layout = _pack([tree[0] for tree in trees], image_index, len(prefix.patches), model.device)
    position, own = layout.position.flatten().cpu(), torch.zeros(*ids.shape, ids.shape[1], dtype=torch.bool)
    for number, (_, steps, seen) in enumerate(trees):
        image, first = divmod(int(layout.slot_of_token[number, 0]), layout.slots)
        place = slice(first, first + len(steps))
        position[image * layout.slots + first :][: len(steps)] = FIRST_TEXT_POSITION + steps
        own[image, place, place] = seen
    all_seen = F.pad(own, (prefix.tokens, 0), value=True)[:, None].to(model.device)
    hidden, _ = model.model.run_branches(ids, position.view(ids.shape).to(model.device), Where(all_seen), prefix)
    at = torch.tensor([_readers(len(text), found) for text, found in zip(texts, starts, strict=True)])  # (R, G, 1+4+40)
    slots = layout.slot_of_token[:, 0, None, None] + at.to(model.device)
    logits = model.lm_head(hidden.flatten(0, 1)[slots]).float()
    log_p = logits.log_softmax(dim=-1)[..., list(digits)]
    first, second, third = log_p[..., 0, :4], log_p[..., 1:5, :], log_p[..., 5:, :].unflatten(-2, (4, 10))
    joint = first[..., :, None, None] + second[..., :, :, None] + third
    return joint.flatten(-3)[..., :CODES].softmax(dim=-1)


def find_numbers(text: Sequence[int], start: int, digits: Sequence[int]) -> list[int]:
    """Where three digits in a row begin, from `start` on; `digits` are the token ids of 0 to 9."""
    found, at, known = [], start, set(digits)
    while at + 3 <= len(text):
        if known.issuperset(text[at : at + 3]):
            found.append(at)
            at += 3
        else:
            at += 1
    return found


def _tree(text: Sequence[int], starts: Sequence[int], digits: Sequence[int]) -> tuple[list[int], Tensor, Tensor]:
    """Tokens, steps from the prompt's start and mask of a text with its trees: four nodes, then forty, a number."""
    tokens, steps = list(text), list(range(len(text)))
    parents: list[list[int]] = []  # of each node: its place among the tokens, and its parent's
    for start in starts:
        base = len(tokens)
        tokens += [digits[i] for i in range(4)] + [digits[j] for _ in range(4) for j in range(10)]
        steps += [start] * 4 + [start + 1] * 40
        parents += [[start, base + i, base + i] for i in range(4)]
        parents += [[start, base + 4 + 10 * i + j, base + i] for i in range(4) for j in range(10)]
    seen = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    seen[: len(text), : len(text)] = torch.ones(len(text), len(text), dtype=torch.bool).tril()
    for start, place, parent in parents:
        seen[place, :start] = True
        seen[place, [place, parent]] = True
    return tokens, torch.tensor(steps), seen


def _readers(length: int, starts: Sequence[int]) -> list[list[int]]:
    """Of each number, the places whose hidden states predict its first, second and third digit: 1 + 4 + 40."""
    return [[start - 1, *range(length + 44 * n, length + 44 * (n + 1))] for n, start in enumerate(starts)]
