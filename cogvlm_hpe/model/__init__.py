"""CogVLM for transformers 5, under the parameter names of the published checkpoints.

Importing this package (`import cogvlm_hpe` does) makes the model known to transformers' Auto classes as model_type
"cogvlm", and imports neither torch nor transformers: each class is imported when it is asked for, or right after
transformers' own module of Auto classes, where it registers itself.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cogvlm_hpe.model.configuration import CogVLMConfig as CogVLMConfig
    from cogvlm_hpe.model.modeling import CogVLMForCausalLM as CogVLMForCausalLM
    from cogvlm_hpe.model.processor import CogVLMProcessor as CogVLMProcessor
    from cogvlm_hpe.model.processor import CogVLMTokenizer as CogVLMTokenizer

__all__ = ["CogVLMConfig", "CogVLMForCausalLM", "CogVLMProcessor", "CogVLMTokenizer"]

_HOMES = {
    "CogVLMConfig": "cogvlm_hpe.model.configuration",
    "CogVLMForCausalLM": "cogvlm_hpe.model.modeling",
    "CogVLMProcessor": "cogvlm_hpe.model.processor",
    "CogVLMTokenizer": "cogvlm_hpe.model.processor",
}
_FOLLOW = {
    "transformers.models.auto.configuration_auto": "cogvlm_hpe.model.configuration",
    "transformers.models.auto.modeling_auto": "cogvlm_hpe.model.modeling",
    "transformers.models.auto.tokenization_auto": "cogvlm_hpe.model.processor",
    "transformers.models.auto.processing_auto": "cogvlm_hpe.model.processor",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_loading: list[str] = []  # modules of transformers and of this room that are being executed, one inside the other
_due: list[str] = []


class _Follower(MetaPathFinder):
    """Imports ours right after transformers' modules, which it leaves to be found as ever.

    Where those import each other, or are imported by one of ours, ours wait for the outermost: they need all its names.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The usual one, whose module is followed by ours; None for any other module."""
        watched = name in _FOLLOW or name.startswith(f"{__name__}.")
        spec = PathFinder.find_spec(name, path, target) if watched else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def and_ours(module: ModuleType) -> None:
            _loading.append(name)
            try:
                execute(module)
            finally:
                _loading.remove(name)
            if name in _FOLLOW:
                _due.append(_FOLLOW[name])
            while _due and not _loading:
                import_module(_due.pop(0))

        spec.loader.exec_module = and_ours  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Follower())
for _theirs, _ours in _FOLLOW.items():
    if _theirs in sys.modules:
        import_module(_ours)
