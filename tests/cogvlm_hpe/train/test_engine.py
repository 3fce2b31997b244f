"""What DeepSpeed is told before it is imported."""

import pytest
import torch

from cogvlm_hpe.train.engine import prepare_deepspeed
from launcher.errors import UsageError


def test_deepspeed_is_not_sent_to_the_cpu_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(UsageError, match="DS_ACCELERATOR=cpu: .* unset it"):
        prepare_deepspeed()
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    prepare_deepspeed()
