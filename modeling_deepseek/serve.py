"""`transformers serve`, with the classes of this package behind its OpenAI-compatible endpoints:

    python -m modeling_deepseek.serve deepseek-ai/DeepSeek-V2-Lite --continuous-batching

All arguments are those of `transformers serve`. That command itself takes the class of this name from transformers,
whatever the Auto classes or the code beside the checkpoint say, and so this process shows it ours under the name.

What that server ignores is ignored here: temperature and top_p count only where the model's generation configuration
samples, `n` not at all, and with `--continuous-batching` neither `stop` does, nor any sampling parameter of a request
after the first, which sets them for all.
"""

import sys

import transformers
from transformers.cli.transformers import main as transformers_main

from .modeling_deepseek import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM


def main() -> None:
    for model_class in (DeepseekV2ForCausalLM, DeepseekV3ForCausalLM):
        setattr(transformers, model_class.__name__, model_class)
    sys.argv[1:1] = ["serve"]
    transformers_main()


if __name__ == "__main__":
    main()
