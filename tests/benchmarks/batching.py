"""Rows of the benchmark table: `generate_batch` on ragged prompts and answers against `generate` on the same prompts in
padded batches of the same width. The tokens must be the same."""

import random
from collections.abc import Iterator

import torch
from rows import DEVICE, REPOSITORY, Row, timed
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

from eval.benchmark import load
from eval.reasoning_gym_tasks import REASONING_GYM
from modeling_deepseek import DeepseekV3Config, DeepseekV3ForCausalLM

REQUESTS, WIDTH, LONGEST = 64, 16, 128

# V3's proportions at a size of which a laptop decodes some hundred tokens a second: 24M parameters.
FAIR = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "q_lora_rank": None,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "initializer_range": 0.05,
    "max_position_embeddings": 2048,
}


def random_workload() -> tuple[torch.nn.Module, list[list[int]], GenerationConfig]:
    """Prompts of 8 to 256 random tokens; one token in fifty ends a text, so that texts end after 1 to 128."""
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM._from_config(DeepseekV3Config(**FAIR)).to(DEVICE).eval()
    noise = random.Random(1)
    prompts = [[noise.randrange(2, 8192) for _ in range(noise.randint(8, 256))] for _ in range(REQUESTS)]
    ends = noise.sample(range(2, 8192), 160)
    return model, prompts, GenerationConfig(max_new_tokens=LONGEST, do_sample=False, eos_token_id=ends, pad_token_id=0)


def teacher_workload() -> tuple[torch.nn.Module, list[list[int]], GenerationConfig]:
    """The bundled teacher on its own kinds of questions."""
    folder = REPOSITORY / "recipes/tiny_teacher"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE).eval()
    tasks = ("rg_spell_backward", "rg_letter_counting", "rg_chain_sum", "rg_gcd", "rg_leg_counting")
    samples = [sample for task in tasks for sample in load(REASONING_GYM[task])[:13]]
    random.Random(2).shuffle(samples)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": sample.question}], add_generation_prompt=True)
        for sample in samples[:REQUESTS]
    ]
    return model, [prompt.input_ids for prompt in prompts], GenerationConfig(max_new_tokens=LONGEST, do_sample=False)


def padded(model, prompts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
    """What `generate` adds to each prompt, without padding, in batches of `WIDTH` as they come."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [model.generation_config.eos_token_id]
    texts = []
    for start in range(0, len(prompts), WIDTH):
        batch = prompts[start : start + WIDTH]
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
        rows = model.generate(ids.to(DEVICE), attention_mask=mask.to(DEVICE), generation_config=config)[:, longest:]
        for row in rows.tolist():
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            texts.append(row[: end + 1])
    return texts


def near_tie(model, prompt: list[int], text: list[int], expected: list[int]) -> bool:
    """Whether the two logits at the first token in which the texts differ are closer than float32 products of other
    shapes are to each other."""
    place = next(place for place, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + text[:place]], device=DEVICE)).logits[0, -1]
    return abs(logits[text[place]] - logits[expected[place]]).item() < 1e-4


def continuous_batching(alternate) -> Iterator[Row]:
    settings = ContinuousBatchingConfig(max_requests_per_batch=WIDTH)
    for name, workload in (("24M parameters", random_workload), ("tiny teacher", teacher_workload)):
        model, prompts, config = workload()

        def ours(model=model, prompts=prompts, config=config) -> list[list[int]]:
            results = model.generate_batch(prompts, config, settings)
            return [result.generated_tokens for result in results.values()]

        texts = ours()
        for prompt, text, expected in zip(prompts, texts, padded(model, prompts, config), strict=True):
            assert text == expected or near_tie(model, prompt, text, expected)
        lengths = [len(text) for text in texts]
        timing = alternate(ours, lambda m=model, p=prompts, c=config: padded(m, p, c), runs=3, warmup=0)
        shape = f"prompts {min(map(len, prompts))}-{max(map(len, prompts))}, answers {min(lengths)}-{max(lengths)}"
        yield timed(f"generate_batch, {name}, {shape}, {WIDTH} at a time", timing, "faster than padded generate")


ROWS = {"continuous batching": continuous_batching}
