"""Configs: every mistake is one line that names the thing and the remedy."""

import dataclasses
import re
from pathlib import Path

import pytest

from cogvlm_hpe import config as configs
from cogvlm_hpe.dialogue import DEFAULT_PROMPTS
from cogvlm_hpe.train.command import parse, parse_file
from launcher.errors import UsageError

PACKAGED = Path(configs.__file__).parent / "configs"
GOOD = """
run_dir: runs/x
model: {base: tiny, dtype: fp32}
adapter: {rank: 4, targets: [language.attention], scope: text}
shards: {train: [{path: some/set, ask: [pose]}], batch: 8}
train: {max_steps: 10, micro_batch: 2}
"""


@pytest.fixture
def written(tmp_path: Path):
    def write(text: str = GOOD) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_file_then_command_line(written) -> None:
    config, flags = parse(["--config", written(), "--train.lr", "3e-4", "--resume"])
    assert (config.train.lr, config.train.max_steps, config.adapter.rank) == (3e-4, 10, 4)
    assert (flags.resume, flags.allow_change, flags.check) == (True, False, False)


@pytest.mark.parametrize("path", sorted({*PACKAGED.rglob("*.yaml")} - {PACKAGED / "merge.yaml"}), ids=lambda p: p.stem)
def test_packaged_configs_are_valid(path: Path) -> None:
    configs.check(parse_file(path))


@pytest.mark.parametrize(
    ("more", "names"),
    [
        (["--train.leaning_rate", "1"], "leaning_rate"),
        (["--train.lr", "quick"], "quick"),
        (["--train.zero_stage", "4"], "zero_stage"),
        (["--model.answer_format", "words"], "answer_format"),
        (["--train.micro_batch", "0"], "train.micro_batch 0"),
        (["--train.stop_after", "0"], "train.stop_after 0: must be at least 1; null"),
        (["--shards.train", "[]"], "shards.train is empty"),
        (["--adapter.targets", "[vision.mlp]"], "use scope all"),
        (["--adapter.rank", "0"], "adapter.rank 0"),
        (["--adapter.dropout", "1"], "adapter.dropout 1"),
        (["--adapter.init", "a", "--adapter.stack", "b"], "leave one out"),
        (["--model.random_init", "true"], "random_init"),
        (["--train.zero_stage", "0", "--model.dtype", "bf16"], "zero_stage 0"),
        (["--train.evaluate_every", "5"], "shards.val"),
        (["--train.timeout_s", "0"], "train.timeout_s 0"),
        (["--evaluate.best", "luck"], "best"),
        (["--train.deepspeed", '{"gradient_clipping": 2}'], "decided by train.clip"),
        (["--train.deepspeed", '{"zero_optimization": {"stage": 1}}'], "decided by train.zero_stage"),
        (["--train.deepspeed", '{"zero_optimization": 3}'], "must be a section"),
        (["--train.deepspeed", '{"zero_optimisation": {}}'], r"zero_optimisation: no key .*is it zero_optimization\?"),
        (["--train.deepspeed", '{"tensor_parallel": {}}'], "tensor_parallel: decided by the ranks"),
        (["--train.lr", "0"], "train.lr 0"),
        (["--train.betas", "[0.9, 1]"], r"train.betas \[0.9, 1.0\]"),
        (["--train.clip", "-1"], "train.clip -1"),
        (["--train.warmup_steps", "-1"], "train.warmup_steps -1"),
        (["--model.prompts", '{"pose": "Where does it look?"}'], "model.prompts.pose .* put {box} in it"),
        (["--model.prompts", '{"where": "Where?"}'], "put {expression} in it"),
        (["--shards.workers", "-1"], "shards.workers -1"),
        (["--evaluate.max_new_tokens", "0"], "evaluate.max_new_tokens 0"),
        (["--train.auxiliary", '{"guidance": 1, "guided_heads": 0}'], "guided_heads 0"),
        (["--shards.val", '[{"path": "x", "ask": []}]'], "empty `ask`"),
    ],
)
def test_mistakes_on_the_command_line(written, more: list[str], names: str) -> None:
    with pytest.raises(UsageError, match=names) as caught:
        parse(["--config", written(), *more])
    assert "\n" not in str(caught.value)


def test_prompts_lie_over_the_default_ones(written) -> None:
    config, _ = parse(["--config", written(GOOD.replace("dtype: fp32", "prompts: {pose: 'And {box}?'}"))])
    assert config.model.prompts == {**DEFAULT_PROMPTS, "pose": "And {box}?"}
    assert list(config.model.prompts) == list(DEFAULT_PROMPTS)


def test_help_tells_of_every_key_its_meaning_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--train.clip CLIP largest norm of the gradient; 0 for no clipping (type: float, default: 1.0)" in said
    assert "--adapter.help, --shards.train.help" in said
    bare = re.findall(r"(--[\w.]+) \S+ \((?:required, )?type:", said)
    assert not bare, "keys without a meaning"


def test_unknown_key_in_the_file_is_named(written) -> None:
    with pytest.raises(UsageError, match="bach"):
        parse(["--config", written(GOOD.replace("batch: 8}", "bach: 8}"))])


def test_missing_file_is_named() -> None:
    with pytest.raises(UsageError, match=r"nowhere\.yaml"):
        parse(["--config", "nowhere.yaml"])


def test_what_a_resumed_run_may_change(written) -> None:
    config = parse(["--config", written()])[0]
    faster = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch=1, stop_after=3))
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, lr=1.0))
    assert configs.changes(config, faster) == []
    assert configs.changes(config, other) == ["train.lr: 0.0001 -> 1.0"]


def test_ranks_and_micro_batches_must_divide_the_batch(written) -> None:
    config = parse(["--config", written()])[0]
    assert [configs.check_world(config, size) for size in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(UsageError, match="multiple of the 3 ranks"):
        configs.check_world(config, 3)
    with pytest.raises(UsageError, match=r"train\.micro_batch 2"):
        configs.check_world(config, 8)


def test_the_set_of_keys_changes_only_on_purpose(written) -> None:
    keys = sorted(configs.flatten(parse(["--config", written()])[0]))
    assert keys == [
        "adapter.alpha", "adapter.dropout", "adapter.init", "adapter.rank", "adapter.rslora", "adapter.scope",
        "adapter.stack", "adapter.targets", "evaluate.batch", "evaluate.best", "evaluate.decode", "evaluate.limit",
        "evaluate.max_new_tokens", "evaluate.questions", "model.answer_format", "model.base", "model.dtype",
        "model.prompts.facing", "model.prompts.pose", "model.prompts.tags", "model.prompts.what",
        "model.prompts.where", "model.random_init", "model.tokenizer", "run_dir", "shards.augment.colour",
        "shards.augment.crop", "shards.augment.rotate_deg", "shards.batch", "shards.block_shards",
        "shards.bucket_batches", "shards.flip", "shards.min_visible", "shards.on_bad_sample", "shards.questions",
        "shards.seed", "shards.train", "shards.val", "shards.workers", "train.async_save", "train.auxiliary",
        "train.betas", "train.clip", "train.evaluate_every", "train.gradient_checkpointing", "train.keep",
        "train.log_every", "train.lr", "train.max_steps", "train.micro_batch", "train.min_lr_ratio",
        "train.optimizer", "train.profile", "train.save_every", "train.seed", "train.stop_after", "train.timeout_s",
        "train.warmup_steps", "train.weight_decay", "train.zero_stage",
    ]  # fmt: skip
