"""`EvaluationCallback`: the model in training, on the benchmarks and by the graders that will judge it in the end."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from eval.benchmark import Benchmark
from eval.local_sampler import TransformersSampler
from eval.protocols import Protocol
from eval.report import text
from eval.results import Results
from eval.runner import evaluate
from eval.sample import Sample


class EvaluationCallback(TrainerCallback):
    """Runs `eval.runner.evaluate` whenever the trainer evaluates, and logs each task's score with its interval.

        Trainer(..., args=TrainingArguments(eval_strategy="steps", metric_for_best_model="eval_gsm8k", ...),
                callbacks=[EvaluationCallback(["gsm8k"], "deepseek-r1", tokenizer, limit=200, k=1)])

    The scores stand among the trainer's metrics as `eval_<task>`, `eval_<task>_low`, `eval_<task>_high` and
    `eval_<task>_truncated`, in [0, 1], so that they choose the best checkpoint and stop early like any other; samples,
    verdicts and results are under `out/step-<n>` (default: `<output_dir>/evaluation`).

    Training is not disturbed: weights, modes and random states are as before. Under data parallelism the first process
    evaluates and the others wait.

    Raises ValueError when training begins with sharded weights (FSDP, ZeRO-3), which one process alone cannot run.
    """

    def __init__(
        self,
        tasks: Sequence[str | Benchmark],
        protocol: str | Path | Protocol,
        tokenizer: PreTrainedTokenizerBase,
        *,
        out: str | Path | None = None,
        batch_size: int = 16,
        k: int | None = None,
        limit: int | None = None,
        seed: int = 0,
        overrides: Mapping[str, Any] | None = None,
        data: Path | str | Mapping[str, Path] | None = None,
        items: Mapping[str, Sequence[Sample]] | None = None,
    ) -> None:
        self.tasks, self.protocol, self.tokenizer, self.out, self.batch_size = (
            tasks,
            protocol,
            tokenizer,
            out,
            batch_size,
        )
        self.options: dict[str, Any] = dict(k=k, limit=limit, seed=seed, overrides=overrides, data=data, items=items)
        self.results: list[tuple[int, Results]] = []
        """(global step, results) of each evaluation so far, on the first process."""

    def on_train_begin(self, args, state, control, **kwargs):
        if getattr(args, "fsdp", None) or _is_zero3(args):
            raise ValueError(
                "EvaluationCallback cannot evaluate sharded weights (FSDP, ZeRO-3); save checkpoints, and evaluate "
                "them with `deepseek-eval run --model CHECKPOINT`"
            )

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        scores: dict[str, float] = {}
        if state.is_world_process_zero:
            out = Path(self.out or Path(args.output_dir) / "evaluation") / f"step-{state.global_step}"
            results = self.evaluate(model, out)
            self.results.append((state.global_step, results))
            print(f"\nstep {state.global_step}: {text(results)}\n")
            for task in results.tasks:
                scores[f"eval_{task.task}"] = task.score.value
                scores[f"eval_{task.task}_low"], scores[f"eval_{task.task}_high"] = task.score.interval
                scores[f"eval_{task.task}_truncated"] = task.rates["truncated"]
        if args.world_size > 1:  # every process chooses the best checkpoint, so every one needs the scores
            shared = [scores]
            torch.distributed.broadcast_object_list(shared, src=0)
            scores = shared[0]
        if metrics is not None:
            metrics.update(scores)
        if state.is_world_process_zero and state.log_history:
            state.log_history[-1].update(scores)

    def evaluate(self, model: torch.nn.Module, out: Path) -> Results:
        """One evaluation, outside of training too. The model comes back as it was."""
        model = getattr(model, "module", model)  # DDP
        was_training = model.training
        out.mkdir(parents=True, exist_ok=True)
        try:
            model.eval()
            sampler = TransformersSampler(_plain(model), self.tokenizer, batch_size=self.batch_size)
            return evaluate(sampler, self.tasks, self.protocol, out, **self.options)
        finally:
            model.train(was_training)


def _is_zero3(args: Any) -> bool:
    plugin = getattr(args, "deepspeed_plugin", None)
    return plugin is not None and getattr(plugin, "zero_stage", 0) == 3


def _plain(model: Any) -> PreTrainedModel:
    """What can be sampled from: a PreTrainedModel, or a PEFT model that behaves as one."""
    if not hasattr(model, "prepare_inputs_for_generation"):
        raise ValueError(f"{type(model).__name__} does not generate: it is no causal language model of transformers")
    return model
