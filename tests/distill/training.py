"""Rows of a dataset, tokenizers of four families of chat templates, and tiny bases to fine-tune."""

# ruff: noqa: RUF001  # the wide bars of DeepSeek's tokens are meant

import json
import random
from pathlib import Path

import torch
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from distill.dataset import Row
from tests.tiny import tiny_model

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
OURS = Path(__file__).parents[2] / "recipes" / "templates" / "deepseek_r1.jinja"
TAGS = ("<think>", "</think>")

# Template, special tokens with BOS (or None) and EOS first, whether the tags are tokens. As the published tokenizers.
FAMILIES = {
    "r1-distill": (
        TEMPLATES / "deepseek_r1_distill.jinja",
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        True,
    ),
    "ours": (OURS, ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"), True),
    "qwen3": (TEMPLATES / "qwen3.jinja", (None, "<|im_end|>", "<|im_start|>", "<|endoftext|>"), True),
    "llama3": (
        TEMPLATES / "llama3.jinja",
        ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
        False,
    ),
    "chatml": (TEMPLATES / "qwen2_5.jinja", (None, "<|im_end|>", "<|im_start|>", "<|endoftext|>"), False),
}


def family_tokenizer(family: str, *, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, and the special tokens of the family. As published, one that has a BOS also adds it."""
    template, (bos, eos, *others), tags = FAMILIES[family]
    special = [token for token in (bos, eos, *others) if token]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: at for at, token in enumerate((*special, *alphabet))}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    if tags:
        backend.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    if bos and adds_bos:
        backend.post_processor = TemplateProcessing(single=f"{bos} $A", pair=None, special_tokens=[(bos, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos)
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def row(number: int = 1, **changes: str) -> Row:
    """A sum, thought about in a line for each of its terms."""
    draw = random.Random(number)
    terms = [draw.randrange(1, 10) for _ in range(draw.randrange(2, 6))]
    steps = [f"{sum(terms[: at + 1])} after {term}" for at, term in enumerate(terms)]
    values = {
        "messages": json.dumps([{"role": "user", "content": "Add " + " + ".join(map(str, terms)) + "."}]),
        "thought": "\n".join(steps),
        "response": f"The sum is \\boxed{{{sum(terms)}}}.",
        "answer": f"\\boxed{{{sum(terms)}}}",
    }
    return Row(
        id=f"{number:016x}/0", problem_id=f"{number:016x}", domain="math", source="sums", tokens=None, licence="MIT",
        **{**values, **changes},
    )  # fmt: skip


def rows(count: int) -> list[Row]:
    return [row(number) for number in range(count)]


def _model(kind: str, vocabulary: int):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True))
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes))
    return tiny_model("v3", vocab_size=vocabulary, max_position_embeddings=512, num_nextn_predict_layers=1)


def save_base(folder: Path, kind: str = "qwen2", family: str = "ours", dtype: torch.dtype = torch.float32) -> str:
    """A base model in the Hub's layout; its generation config has settings of its own."""
    tokenizer = family_tokenizer(family)
    model = _model(kind, len(tokenizer)).to(dtype)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 3]
    model.generation_config.update(do_sample=True, temperature=0.6)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
