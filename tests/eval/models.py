"""Tiny models of several families that write varied text, and the tokenizer they share."""

import random
from functools import cache

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from tests.tiny import tiny_model

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FAMILIES = ("llama", "qwen2", "deepseek")


@cache
def _bpe(vocabulary: int) -> str:
    """A byte-level BPE of 256 bytes and some merges, trained on counting, so that words are several tokens."""
    text = [f"Question {n}: what is {n} plus {n * 7}? The answer is {n * 8}.\nA. {n}\nB. {n + 1}\n" for n in range(200)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 8, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(vocabulary: int = 512, *, adds_bos: bool = False, special_tags: bool = False):
    """`adds_bos` makes `encode` begin with <s>; `special_tags` declares the tags of the thought special."""
    backend = Tokenizer.from_str(_bpe(vocabulary))
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<|end|>")])
    backend.add_tokens([AddedToken(token, special=special_tags) for token in ("<think>", "</think>")])
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        backend.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=CHAT_TEMPLATE
    )


def tiny_lm(family: str = "llama", *, seed: int = 0, ends: float = 0.0, vocabulary: int = 512, **overrides):
    """A causal LM in float32, eval mode. Its head prefers `</s>` by `ends` in the logits, so that answers end early,
    each at its own length."""
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
        "max_position_embeddings": 2048,
        **overrides,
    }
    torch.manual_seed(seed)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**{"num_key_value_heads": 2, **sizes}))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**{"num_key_value_heads": 2, **sizes}))
    elif family == "deepseek":
        model = tiny_model("v3", seed=seed, vocab_size=vocabulary, max_position_embeddings=2048, **overrides)
    else:
        raise ValueError(f"family={family!r}")
    tokenizer = tiny_tokenizer(vocabulary)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    if ends:
        head = torch.nn.Linear(model.lm_head.in_features, vocabulary)
        head.weight, head.bias = model.lm_head.weight, torch.nn.Parameter(torch.zeros(vocabulary))
        head.bias.data[tokenizer.eos_token_id] = ends
        model.lm_head = head
    return model.eval()


def prompts(count: int, seed: int = 0) -> list[str]:
    """Questions of different lengths, some behind the same worked examples."""
    generator = random.Random(seed)
    shots = "".join(f"Question {n}: what is {n} plus {n}? The answer is {n + n}.\n" for n in range(5))
    out = []
    for number in range(count):
        question = f"Question {number}: " + " ".join(
            str(generator.randrange(1000)) for _ in range(generator.randrange(1, 20))
        )
        out.append(shots + question if number % 2 else question)
    return out
