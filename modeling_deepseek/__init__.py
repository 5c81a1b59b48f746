"""DeepSeek V2, V3 and R1 as transformers models.

    import modeling_deepseek                                       # the Auto classes now give the classes below
    model = AutoModelForCausalLM.from_pretrained("deepseek-ai/DeepSeek-V3")

What a forward pass goes through, and the file of each step:

    config.json -> configuration_deepseek
    checkpoint  -> conversion (experts, FP8, MTP) [-> quantization] -> modeling_deepseek.DeepseekForCausalLM
    tokens -> embedding -> [ layers.RMSNorm -> mla (rope; expanded | absorbed; cache of latents)
                             layers.RMSNorm -> layers.MLP | moe (route -> experts + shared) ] x layers -> head -> logits
    labels -> loss + mtp (lambda) + moe.load_balancing_loss (alpha);  after a step: moe bias update (trainer_callback)

Importing changes one thing for other code in the process: the Auto classes give these classes for the model types
deepseek_v2, deepseek_v3 and kimi_k2, also for transformers' own configurations of these types, which are converted.
`unregister_auto_classes()` takes it back. transformers' own classes stay importable and work as before.

Nothing is loaded before it is used: importing this package costs milliseconds and does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .registration import register_auto_classes, unregister_auto_classes

if TYPE_CHECKING:
    from .adapter_targets import target_modules
    from .configuration_deepseek import PRESETS, DeepseekV2Config, DeepseekV3Config
    from .conversion import CheckpointError
    from .counts import ParameterCount, count_parameters
    from .inference_cost import ServingEstimate, estimate_serving, what_fits
    from .modeling_deepseek import (
        DeepseekV2ForCausalLM,
        DeepseekV2ForSequenceClassification,
        DeepseekV2ForTokenClassification,
        DeepseekV2Model,
        DeepseekV2PreTrainedModel,
        DeepseekV3ForCausalLM,
        DeepseekV3ForSequenceClassification,
        DeepseekV3ForTokenClassification,
        DeepseekV3Model,
        DeepseekV3PreTrainedModel,
    )
    from .moe import max_violation
    from .paged import GenerationBatchError
    from .trainer_callback import DeepseekTrainerCallback
    from .training_cost import TrainingEstimate, estimate_training

_HOME = {
    "PRESETS": "configuration_deepseek",
    "DeepseekV2Config": "configuration_deepseek",
    "DeepseekV3Config": "configuration_deepseek",
    "CheckpointError": "conversion",
    "ParameterCount": "counts",
    "count_parameters": "counts",
    "ServingEstimate": "inference_cost",
    "TrainingEstimate": "training_cost",
    "estimate_serving": "inference_cost",
    "estimate_training": "training_cost",
    "what_fits": "inference_cost",
    "max_violation": "moe",
    "target_modules": "adapter_targets",
    "GenerationBatchError": "paged",
    "DeepseekTrainerCallback": "trainer_callback",
}
_HOME |= {
    f"Deepseek{family}{kind}": "modeling_deepseek"
    for family in ("V2", "V3")
    for kind in ("PreTrainedModel", "Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification")
}

__all__ = [
    "PRESETS",
    "CheckpointError",
    "DeepseekTrainerCallback",
    "DeepseekV2Config",
    "DeepseekV2ForCausalLM",
    "DeepseekV2ForSequenceClassification",
    "DeepseekV2ForTokenClassification",
    "DeepseekV2Model",
    "DeepseekV2PreTrainedModel",
    "DeepseekV3Config",
    "DeepseekV3ForCausalLM",
    "DeepseekV3ForSequenceClassification",
    "DeepseekV3ForTokenClassification",
    "DeepseekV3Model",
    "DeepseekV3PreTrainedModel",
    "GenerationBatchError",
    "ParameterCount",
    "ServingEstimate",
    "TrainingEstimate",
    "count_parameters",
    "estimate_serving",
    "estimate_training",
    "max_violation",
    "register_auto_classes",
    "target_modules",
    "unregister_auto_classes",
    "what_fits",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


register_auto_classes()
