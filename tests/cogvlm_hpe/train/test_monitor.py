"""What a run says of itself, over interruptions."""

import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cogvlm_hpe.train.monitor import Monitor
from launcher.comm import single


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    """In metrics.jsonl and in TensorBoard; what came after the checkpoint is cut off."""
    for first_step, last in ((0, 5), (3, 6)):
        monitor = Monitor(tmp_path, single(), first_step)
        for step in range(first_step + 1, last + 1):
            monitor.scalars(step, {"train/loss": 10.0 * first_step + step, "train/grad_norm": float("nan")})
        monitor.close()
    wanted = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 34.0), (5, 35.0), (6, 36.0)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"global_step": step, "train/loss": value} for step, value in wanted]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == wanted


def test_config_choices_and_distributions_are_in_tensorboard(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, single(), 0)
    monitor.text("config", "```yaml\ntrain: {lr: 0.1}\n```")
    monitor.histogram(3, "adapter/norms_glue", [0.5, 1.0, 2.0])
    monitor.hparams({"train.lr": 0.1, "adapter.targets": ["glue"], "adapter.init": None}, {"reached/geodesic_deg": 7.0})
    monitor.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    [config] = events.Tensors("config/text_summary")
    assert b"train: {lr: 0.1}" in config.tensor_proto.string_val[0]
    assert [event.step for event in events.Histograms("adapter/norms_glue")] == [3]
    chosen = events.summary_metadata["_hparams_/session_start_info"].plugin_data
    assert chosen.plugin_name == "hparams" and b"train.lr" in chosen.content and b"['glue']" in chosen.content
    assert [event.value for event in events.Scalars("reached/geodesic_deg")] == [7.0]


def test_a_line_that_was_cut_short_counts_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = ['{"global_step": 0, "evaluate/x": 0.5}', "\0" * 30 + "}", '{"global_step": 1, "train/y": 2.0}']
    path.write_text("\n".join([*lines, '{"global_step": 2, "evalua']))
    monitor = Monitor(tmp_path, single(), 1)
    assert monitor.at_start("evaluate/x") == 0.5 and monitor.at_start("train/y") is None
    assert [monitor.judged(step) for step in (0, 1, 2)] == [True, False, False]
    monitor.scalars(2, {"evaluate/x": 0.75})
    monitor.close()
    assert [json.loads(line)["global_step"] for line in path.read_text().splitlines()] == [0, 1, 2]
