"""The callback scores the checkpoint as `evaluate` does, and training goes on as if it were not there."""

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from eval.callback import EvaluationCallback
from eval.local_sampler import TransformersSampler
from eval.runner import evaluate
from tests.eval.arithmetic import COLOURS, SUMS, colours, protocol, sums
from tests.eval.models import tiny_lm, tiny_tokenizer

ITEMS = {"sums": sums(3), "colours": colours(4)}
SHORT = dict(max_tokens=8, open_thought=False)


def trainer(tmp_path, *callbacks, steps=4, **arguments):
    tokens = torch.randint(5, 500, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()
    rows = Dataset.from_dict({"input_ids": tokens, "labels": tokens})
    options = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=steps, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, learning_rate=1e-2, seed=3,
        logging_steps=1, disable_tqdm=True, **arguments,
    )  # fmt: skip
    return Trainer(
        tiny_lm(), args=options, train_dataset=rows, eval_dataset=rows, callbacks=list(callbacks),
    )  # fmt: skip


def callback(tmp_path, **options):
    settings = protocol(**SHORT)
    return EvaluationCallback([SUMS, COLOURS], settings, tiny_tokenizer(), items=ITEMS, **options)


def test_scores_are_logged_and_are_those_of_the_checkpoint(tmp_path):
    ours = callback(tmp_path)
    run = trainer(tmp_path, ours, load_best_model_at_end=True, metric_for_best_model="eval_colours")
    run.train()
    assert [step for step, _ in ours.results] == [2, 4]
    logged = {line["step"]: line for line in run.state.log_history if "eval_sums" in line}
    for step, results in ours.results:
        task = results.task("colours")
        line = logged[step]
        assert line["eval_colours"] == task.score.value
        assert (line["eval_colours_low"], line["eval_colours_high"]) == task.score.interval
        assert line["eval_sums_truncated"] == results.task("sums").rates["truncated"]
    assert run.state.best_metric == max(results.task("colours").score.value for _, results in ours.results)
    assert (tmp_path / "out" / "evaluation" / "step-2" / "results.json").is_file()

    model = tiny_lm()
    model.load_state_dict(type(model).from_pretrained(tmp_path / "out" / "checkpoint-4").state_dict())
    alone = evaluate(
        TransformersSampler(model, tiny_tokenizer()),
        [SUMS, COLOURS],
        protocol(**SHORT),
        tmp_path / "alone",
        items=ITEMS,
    )
    assert alone.tasks == ours.results[-1][1].tasks


def test_training_goes_on_as_without_it(tmp_path):
    with_it, without = trainer(tmp_path / "a", callback(tmp_path)), trainer(tmp_path / "b")
    for run in (with_it, without):
        run.train()
    for (name, one), other in zip(with_it.model.state_dict().items(), without.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert with_it.model.training == without.model.training


def test_the_model_comes_back_as_it_was(tmp_path):
    model = tiny_lm().train()
    model.config.use_cache = False
    callback(tmp_path).evaluate(model, tmp_path / "out")
    assert model.training
    assert model.config.use_cache is False


def test_sharded_weights_are_refused(tmp_path):
    class Arguments:
        fsdp = "full_shard"

    with pytest.raises(ValueError, match="cannot evaluate sharded weights"):
        callback(tmp_path).on_train_begin(Arguments(), None, None)


def test_a_model_that_does_not_generate_is_refused(tmp_path):
    model = torch.nn.Linear(2, 2)
    model.config = tiny_lm().config
    with pytest.raises(ValueError, match="Linear does not generate"):
        callback(tmp_path).evaluate(model, tmp_path / "out")
