"""A small model from nothing: corpus, tokenizer, weights. It makes the teacher and the base student that are bundled.

    corpus (tokenizer, documents)  ->  model (random weights, trained, taught to draft)  ->  eval (its scores, its card)

The corpus is reasoning-gym problems with the worked solutions of `worked.py`, without the items of `eval`'s own
reasoning-gym tasks. A DeepSeek model trains with its MTP loss and the update of its routers' bias. A killed run goes on
from its last checkpoint.
"""

import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from distill.recipe import CorpusPart, Engine, PretrainRecipe
from distill.run_dir import RunDir, fingerprint, fresh_folder, replacing, write_json
from distill.stages import Outcome, Say, Stage, run_stages
from distill.worked import worked
from eval.reasoning_gym_tasks import ROWS, SEED, problems
from eval.runner import Progress

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"  # noqa: RUF001  # as in DeepSeek's tokenizers
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"  # noqa: RUF001
TAGS = ("<think>", "</think>")


def documents(parts: Sequence[CorpusPart], seed: int) -> Iterator[tuple[str, str]]:
    """(context, text) of each document, in a seeded order: the loss counts on the text alone.

    `solution`: the question as a turn of a chat, then thought and boxed answer. `quiz`: question and answer as plain
    text. `notes`: the steps of a solution without their question. A question of `eval`'s own items is left out in every
    form, and so is a problem whose worked answer is not the package's.
    """
    streams = [_part(part, seed) for part in parts]
    left = [part.documents for part in parts]
    order = random.Random(seed)
    while sum(left):
        (chosen,) = order.choices(range(len(parts)), weights=left)
        left[chosen] -= 1
        yield next(streams[chosen])


def _part(part: CorpusPart, seed: int) -> Iterator[tuple[str, str]]:
    held_out = {row["question"].strip() for row in problems(part.dataset, ROWS, SEED)}
    # The package draws the i-th problem of a seed whatever the size, so there are always more; repeats are the
    # smaller tasks' own (there are 3,600 pairs of numbers up to 60).
    for row in problems(part.dataset, 2**31, seed):
        question = row["question"].strip()
        if question in held_out:
            continue
        steps, answer = worked(part.dataset, question)
        if answer != row["answer"]:
            continue
        if part.form == "solution":
            yield f"{USER}{question}{ASSISTANT}<think>\n", f"{steps}\n</think>\n\n\\boxed{{{answer}}}"
        elif part.form == "quiz":
            yield "", f"{question}\n{answer}"
        else:
            yield "", steps


def character_tokenizer(phrases: Sequence[str], chat_template: str, context: int) -> Any:
    """A byte-level tokenizer without merges, one token a character, and one for each tag and each of `phrases`.

    Letters and digits stay single, since spelling and arithmetic are what is thought about. Any text can be written;
    what is not ASCII takes a token a byte.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = (PAD, BOS, EOS, USER, ASSISTANT)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate((*special, *alphabet))}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    # The tags are ordinary tokens, as in R1's tokenizer: decoding keeps them.
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in (*TAGS, *phrases)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=context
    )
    fast.chat_template = chat_template
    return fast


def encoded(tokenizer: Any, context: str, text: str) -> dict[str, list[int]]:
    """BOS, context, text, EOS; -100 as the label of what is not text or EOS."""
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    before = bos + tokenizer.encode(context, add_special_tokens=False)
    after = tokenizer.encode(text, add_special_tokens=False) + eos
    return {"input_ids": before + after, "labels": [-100] * len(before) + after}


def new_model(recipe: PretrainRecipe, tokenizer: Any) -> Any:
    """Random weights of `recipe.model`, seeded; the ids of the special tokens are the tokenizer's."""
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    import modeling_deepseek  # noqa: F401  # registers its Auto classes

    fields = dict(recipe.model)
    config = AutoConfig.for_model(
        fields.pop("model_type"),
        **fields,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    set_seed(recipe.training["seed"])
    return AutoModelForCausalLM.from_config(config)


def run_pretrain(recipe: PretrainRecipe, run: RunDir, *, progress: Progress | None = None, say: Say) -> str:
    """Runs what is not done; returns what is incomplete, "" for nothing. The model is `RUN/model`, in Hub layout."""
    fields = recipe.model_dump(exclude={"evaluate", "description", "dtype"})
    listed = [
        Stage("corpus", partial(write_corpus, recipe, run), 1, [fields["corpus"], fields["tokenizer"]], (),
              ("corpus", "tokenizer"), (recipe.tokenizer.chat_template,)),
        Stage("model", partial(train, recipe, run), 1, [fields, recipe.dtype], ("corpus",), ("model", "log.json")),
    ]  # fmt: skip
    if recipe.evaluate is not None:
        settings = recipe.evaluate.model_dump(exclude={"models", "batch_size"})
        work = partial(evaluate_model, recipe, run, progress)
        listed.append(Stage("eval", work, 1, settings, ("model",), ("eval/results.json", "card")))
    return run_stages(listed, recipe, run, say=say)


def write_corpus(recipe: PretrainRecipe, run: RunDir) -> Outcome:
    """The tokenizer, and every document as token ids and labels."""
    from datasets import Dataset

    template = Path(recipe.tokenizer.chat_template).read_text(encoding="utf-8")
    tokenizer = character_tokenizer(recipe.tokenizer.phrases, template, recipe.context)
    with replacing(run / "tokenizer") as part:
        tokenizer.save_pretrained(part)
    rows = [encoded(tokenizer, *document) for document in documents(recipe.corpus.parts, recipe.corpus.seed)]
    longest = max(len(row["input_ids"]) for row in rows)
    if longest > recipe.context:
        raise ValueError(f"a document has {longest} tokens, and context={recipe.context} holds fewer: raise it")
    with replacing(run / "corpus") as part:
        Dataset.from_list(rows).save_to_disk(part)
    tokens = sum(len(row["input_ids"]) for row in rows)
    return Outcome({"documents": len(rows), "tokens": tokens, "longest": longest})


def train(recipe: PretrainRecipe, run: RunDir) -> Outcome:
    """From random weights to `RUN/model`; a killed run goes on from its last checkpoint."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    training = fresh_folder(run / "training", fingerprint(recipe.model_dump(exclude={"evaluate", "description"})))
    model = new_model(recipe, tokenizer)
    state = _fit(model, tokenizer, recipe, run, training / "all", {})
    model.to(getattr(torch, recipe.dtype))
    log, more = state.log_history, {}
    if recipe.drafting is not None:
        taught = train_drafting(model, tokenizer, recipe, run, training / "drafting")
        log, more = log + taught.log_history, {"drafting_steps": taught.global_step}
    with replacing(run / "model") as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    write_json(run / "log.json", log)
    loss = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None)
    return Outcome({"parameters": model.num_parameters(), "steps": state.global_step, **more, "final_loss": loss})


def train_drafting(model: Any, tokenizer: Any, recipe: PretrainRecipe, run: RunDir, folder: Path) -> Any:
    """Trains the MTP modules on their own output, beside the model as it will be stored, which stays as it is.

    The loss of pretraining shows a module true states only; what it drafts beyond its first token, it drafts from its
    own.
    """
    assert recipe.drafting is not None, "only a recipe with drafting has this part"
    stored = next(model.parameters()).dtype
    model.float().requires_grad_(False)
    for module in model.model.layers[model.config.num_hidden_layers :]:
        module.requires_grad_(True)
    model.config.mtp_passes = recipe.drafting.passes
    state = _fit(model, tokenizer, recipe, run, folder, recipe.drafting.training)
    model.requires_grad_(True)
    model.to(stored)
    return state


def _fit(model: Any, tokenizer: Any, recipe: PretrainRecipe, run: RunDir, folder: Path, changes: dict) -> Any:
    """A training by transformers' Trainer, with `changes` to the recipe's arguments; its final state."""
    from datasets import load_from_disk
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    from modeling_deepseek import DeepseekTrainerCallback

    trainer = Trainer(
        model,
        args=TrainingArguments(output_dir=str(folder), report_to=[], **{**recipe.training, **changes}),
        train_dataset=load_from_disk(run / "corpus"),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    if recipe.model["model_type"].startswith("deepseek"):
        DeepseekTrainerCallback.attach(trainer)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.exists() else None)
    return trainer.state


def evaluate_model(recipe: PretrainRecipe, run: RunDir, progress: Progress | None) -> Outcome:
    """The finished model on the recipe's tasks; the scores go to the model's card."""
    from distill.engines import open_engine
    from eval.report import markdown_table, score_rows
    from eval.runner import evaluate

    settings = recipe.evaluate
    assert settings is not None, "only a recipe with evaluate has this stage"
    engine = Engine(engine="transformers", model=str(run / "model"), dtype="float32", batch_size=settings.batch_size)
    results = evaluate(
        open_engine(engine), settings.tasks, settings.protocol, run / "eval", k=settings.k, limit=settings.limit,
        seed=recipe.training.get("seed", 42), overrides=settings.overrides, data=settings.data, progress=progress,
    )  # fmt: skip
    with replacing(run / "card") as part:
        part.mkdir()
        (part / "README.md").write_text(card(recipe, run, markdown_table(score_rows(results))), encoding="utf-8")
    return Outcome({"tasks": len(results.tasks), "samples": sum(sum(one.verdicts.values()) for one in results.tasks)})


def card(recipe: PretrainRecipe, run: RunDir, scores: str) -> str:
    """The model's card: what it is, how it was made, what it scores."""
    done = run.manifest()
    made, corpus = done["model"], done["corpus"]
    assert recipe.evaluate is not None, "the card is written after the evaluation"
    settings = ", ".join(f"{name} {value}" for name, value in recipe.evaluate.overrides.items())
    taught = ""
    if recipe.drafting is not None:
        taught = f" Its MTP modules then had {made.counts['drafting_steps']:,} steps of their own, on their own output."
    return f"""---
license: apache-2.0
library_name: transformers
---
# {recipe.name}

{recipe.description.strip()}

{made.counts["parameters"]:,} parameters ({recipe.model["model_type"]}), {recipe.dtype}; trained from nothing on
{corpus.counts["documents"]:,} documents ({corpus.counts["tokens"]:,} tokens) in {made.counts["steps"]:,} steps by
`distill run recipes/{recipe.name}.yaml`, which makes it again.{taught}

Measured with `eval`, protocol {recipe.evaluate.protocol} ({settings}), on 200 held-out questions of each task:

{scores}
"""
