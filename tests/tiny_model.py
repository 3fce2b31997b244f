"""A CogVLM of a few thousand weights for tests, taught for seconds to answer in the right formats."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from cogvlm_hpe.config import ModelConfig
from cogvlm_hpe.dialogue import DEFAULT_PROMPTS, Task
from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.model.pixels import normalise
from cogvlm_hpe.model.tokenizer import FILE_NAME, train_tokenizer
from cogvlm_hpe.train.ask import Asker
from cogvlm_hpe.train.batch import Collator
from shards.index import open_set
from shards.stream import read_all

_SIDE_PX = 28


def write_tiny_model(
    folder: Path, shard_set: Path, steps: int = 120, tasks: Sequence[Task] = ("pose", "where")
) -> Path:
    """A base folder whose model has seen `shard_set` for `steps` steps; it answers in format, and mostly wrongly."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    words = [*DEFAULT_PROMPTS.values(), "0123456789 [[ ]] {{ }} , . ?", "the red box on the left front back up down"]
    tokenizer = train_tokenizer(words)
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_heads": 2,
        "intermediate_size": 48,
        "image_size": _SIDE_PX,
        "patch_size": 14,
        "num_positions": 5,
    }
    model = CogVLMForCausalLM(
        CogVLMConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.08,
            vision_config=vision,
        )
    )
    _teach(model, tokenizer, shard_set, steps, tasks)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / FILE_NAME))
    return folder


def _teach(model: CogVLMForCausalLM, tokenizer, shard_set: Path, steps: int, tasks: Sequence[Task]) -> None:
    eos, pad = model.config.eos_token_id, model.config.pad_token_id
    asker = Asker(tokenizer, ModelConfig(base=""), [tasks], at_most=8, min_visible=0.5, seed=0, eos=eos)
    [(_, items)] = read_all(open_set(shard_set), 0, 1, batch=8, image_size=_SIDE_PX, limit=8)
    noted = [replace(item, note=asker(item)) for item in items]
    batch = Collator(_SIDE_PX, eos, pad)(noted, torch.stack([item.image for item in items if item.image is not None]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = model(
            pixel_values=normalise(batch.images),
            image_index=batch.image_index,
            branch_input_ids=batch.input_ids,
            branch_labels=batch.labels,
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def small_config() -> CogVLMConfig:
    """A CogVLM of 73,000 weights whose every size is another one, some of them odd: pieces of them need padding."""
    vision = {
        "hidden_size": 25,
        "num_hidden_layers": 2,
        "num_heads": 1,
        "intermediate_size": 35,
        "image_size": 70,
        "patch_size": 14,
        "num_positions": 26,
    }
    return CogVLMConfig(
        vocab_size=41,
        hidden_size=32,
        intermediate_size=45,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
        vision_config=vision,
    )
