"""`transformers serve`, with the classes of this package behind its OpenAI-compatible endpoints:

    python -m modeling_deepseek.serve deepseek-ai/DeepSeek-V2-Lite --continuous-batching

All arguments are those of `transformers serve`. That command itself takes the class of this name from transformers,
whatever the Auto classes or the code beside the checkpoint say, and so this process shows it ours under the name.

A request that the model cannot serve with `--continuous-batching` (too long a prompt) is answered by status 400 and the
reason, as clients of such endpoints expect; that server by itself has 500 for all errors.

What that server ignores is ignored here: temperature and top_p count only where the model's generation configuration
samples, `n` not at all, and with `--continuous-batching` neither `stop` does, nor any sampling parameter of a request
after the first, which sets them for all.
"""

import functools
import sys
from typing import Any

import transformers
from transformers.cli.serving import server
from transformers.cli.transformers import main as transformers_main

from .modeling_deepseek import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM
from .paged import RequestError


def answering_bad_requests(build_server: Any) -> Any:
    """`build_server`, whose application says what is wrong with a request."""

    @functools.wraps(build_server)
    def build(*args: Any, **kwargs: Any) -> Any:
        async def bad_request(_: Any, error: Exception) -> Any:
            return server.JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, 400)

        app = build_server(*args, **kwargs)
        app.add_exception_handler(RequestError, bad_request)
        return app

    return build


def main() -> None:
    server.build_server = answering_bad_requests(server.build_server)
    for model_class in (DeepseekV2ForCausalLM, DeepseekV3ForCausalLM):
        setattr(transformers, model_class.__name__, model_class)
    sys.argv[1:1] = ["serve"]
    transformers_main()


if __name__ == "__main__":
    main()
