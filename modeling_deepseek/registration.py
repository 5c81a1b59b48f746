"""Makes transformers' Auto classes give this package's classes, without importing them (or torch) before they are
asked for.

transformers resolves a model type to class *names* and looks these up in a module of its own. The names here are the
same, so it is enough to put this package, whose attributes load on first use, in that module's place. `register` does
so at once where the Auto classes are loaded already, and otherwise the moment they are.
"""

import sys
from functools import partial
from types import ModuleType
from typing import Any

from .on_import import OnImport

CONFIGS = {
    "deepseek_v2": "DeepseekV2Config",
    "deepseek_v3": "DeepseekV3Config",
    "kimi_k2": "DeepseekV3Config",  # Kimi-K2's own model type; it is read, and written, as V3
}
AUTO_MAPPINGS = {
    "MODEL_MAPPING": "Model",
    "MODEL_FOR_CAUSAL_LM_MAPPING": "ForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": "ForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING": "ForTokenClassification",
}
CONFIGURATION_AUTO = "transformers.models.auto.configuration_auto"
MODELING_AUTO = "transformers.models.auto.modeling_auto"
_MISSING = object()

# What `unregister` puts back: (dict, key, what stood there).
_replaced: list[tuple[dict, str, Any]] = []
# What waits for the Auto classes to be imported: one, or none.
_finders: list[OnImport] = []


def _replace(mapping: dict, key: str, value: Any) -> None:
    _replaced.append((mapping, key, mapping.get(key, _MISSING)))
    mapping[key] = value


def _register_configs(auto: ModuleType, package: ModuleType) -> None:
    mapping = auto.CONFIG_MAPPING
    # A new dict: the one that is there is shared with mappings that go from a class name back to a model type, and
    # kimi_k2 would take the place of deepseek_v3 in them.
    _replace(vars(mapping), "_mapping", {**mapping._mapping, **CONFIGS})
    for model_type in CONFIGS:
        _replace(mapping._modules, model_type, package)


def _register_models(auto: ModuleType, package: ModuleType) -> None:
    for mapping_name, suffix in AUTO_MAPPINGS.items():
        mapping = getattr(auto, mapping_name)
        for model_type in ("deepseek_v2", "deepseek_v3"):
            _replace(mapping._model_mapping, model_type, CONFIGS[model_type].removesuffix("Config") + suffix)
            _replace(mapping._modules, model_type, package)


_REGISTER = {CONFIGURATION_AUTO: _register_configs, MODELING_AUTO: _register_models}


def register_auto_classes(package: ModuleType | None = None) -> None:
    """From now on `AutoConfig`, `AutoModel`, `AutoModelForCausalLM`, `...ForSequenceClassification` and
    `...ForTokenClassification` give this package's classes for deepseek_v2, deepseek_v3 and kimi_k2."""
    unregister_auto_classes()
    package = package or sys.modules[__package__]
    register = {name: partial(function, package=package) for name, function in _REGISTER.items()}
    _finders.append(OnImport(register))
    sys.meta_path.insert(0, _finders[0])
    for name, function in register.items():
        if name in sys.modules:
            function(sys.modules[name])


def unregister_auto_classes() -> None:
    """Takes back what `import modeling_deepseek` changed: the Auto classes give transformers' own classes again.
    `register_auto_classes` turns it on again. Models that exist are not touched."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in _finders]
    _finders.clear()
    while _replaced:
        mapping, key, before = _replaced.pop()
        if before is _MISSING:
            mapping.pop(key, None)
        else:
            mapping[key] = before
