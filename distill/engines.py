"""A recipe's model, opened: the samplers of `eval`, in this process or behind endpoints. Each imports what it needs."""

from pathlib import Path

from distill.recipe import Engine
from eval.samplers import Sampler


def open_engine(engine: Engine) -> Sampler:
    """The model, ready to be asked. ValueError where it cannot be loaded.

    An endpoint is not asked anything yet: `Sampler.check`, which whoever asks it calls first, raises ConnectionError
    where none answers, and ValueError where another model is served.
    """
    if engine.engine == "endpoint":
        from eval.endpoint_sampler import EndpointSampler

        return EndpointSampler(
            engine.base_urls,
            engine.model,
            api_key_env=engine.api_key_env,
            concurrency=engine.concurrency,
            timeout=engine.timeout,
            retries=engine.retries,
            revision=engine.revision,
            tokenizer=engine.tokenizer,
            context_length=engine.context_length,
            extra_body=engine.extra_body,
        )
    from eval.local_sampler import TransformersSampler  # registers this project's own models too

    sampler = TransformersSampler.from_pretrained(
        engine.model,
        revision=engine.revision,
        dtype=engine.dtype,
        device_map=engine.device_map,
        trust_remote_code=engine.trust_remote_code,
        batch_size=engine.batch_size,
        context_length=engine.context_length,
    )
    if engine.chat_template is not None:
        sampler.tokenizer.chat_template = Path(engine.chat_template).read_text(encoding="utf-8")
    return sampler
