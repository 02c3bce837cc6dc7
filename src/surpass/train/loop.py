"""The training loop: collect, update, write down, evaluate, save; and go on after an interruption."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from surpass.config import RunConfig
from surpass.evaluate.evaluation import evaluate
from surpass.evaluate.summary import Evaluation
from surpass.methods.base import Method
from surpass.records import Rollouts
from surpass.roles.role import Role
from surpass.roles.sync import Frozen
from surpass.rollout.sampling import sequence_seed
from surpass.train.buffer import save_rollouts
from surpass.train.build import Built, build
from surpass.train.checkpoint import (
    Position,
    restore,
    save_checkpoint,
    save_model,
)
from surpass.train.folder import describe, starting_point
from surpass.train.interrupt import Interrupted, interrupts
from surpass.train.optimiser import learning_rate, make_optimiser, set_learning_rate
from surpass.train.progress import Bar, training_bar
from surpass.train.settings import resolved, write_config
from surpass.train.step import update
from surpass.train.tracking import Journal, batch_metrics


def train(
    config: RunConfig,
    method: Method,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    bar: Callable[[int, str], Any] = training_bar,
) -> Path:
    """Train `config.student` with `method` and give the folder of the finished model.

    resume: go on from the newest checkpoint of `config.output`; the run then ends in the same weights as one that was
    never interrupted. overwrite: start anew where a run stands already. Raises ValueError for settings and files that
    cannot work, NonFiniteError, CheckpointError, and Interrupted after a signal.
    """
    console = console or Console(stderr=True)
    folder = Path(config.output)
    settings = resolved(config, method)
    checkpoint = starting_point(folder, settings, resume, overwrite)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    torch.manual_seed(config.seed)
    built = build(config, method)
    run = built.run
    if config.model.gradient_checkpointing:
        model: Any = run.student.causal_lm  # transformers renamed it; both names do the same
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    accelerator = Accelerator(
        cpu=config.model.device == "cpu",
        log_with=list(config.train.trackers) or None,
        project_dir=str(folder),
    )
    optimiser = make_optimiser(run.student.model, config.optimiser)
    journal = Journal(folder, accelerator)
    if config.train.trackers:
        accelerator.init_trackers("surpass", config={k: str(v) for k, v in settings.items()})
    for note in built.notes:
        console.print(note)
    position, buffer = Position(config=settings), None
    moving = {r.name: r.policy for r in _all_roles(built) if not r.shares_student and not _is_frozen(r)}
    if checkpoint is not None:
        position, buffer = restore(checkpoint, run.student, optimiser, moving)
        assert run.stream is not None
        run.stream.load_state_dict(position.stream)
        method.load_state_dict(position.method)
        run.tokens.update(position.tokens)
        run.updates = position.updates
        run.engine.update(run.updates)
        journal.rewind(position.updates, position.step)
        console.print(f"resumed from {checkpoint} at step {position.step} of {config.train.steps}")
    else:
        describe(built, folder, console)
        write_config(folder, settings)
    loop = _Loop(config, method, built, accelerator, optimiser, journal, position, buffer, moving, folder)
    with (
        interrupts(loop),
        bar(config.train.max_tokens or config.train.steps, method.__class__.__name__) as progress,
    ):
        loop.go(progress)
    model = save_model(run.student, folder / "model", folder / "checkpoints")
    if config.train.trackers:
        accelerator.end_training()
    return model


class _Loop:
    """The state of a running loop; `go` reads from top to bottom."""

    def __init__(
        self,
        config: RunConfig,
        method: Method,
        built: Built,
        accelerator: Accelerator,
        optimiser: torch.optim.Optimizer,
        journal: Journal,
        position: Position,
        buffer: Rollouts | None,
        moving: dict[str, Any],
        folder: Path,
    ) -> None:
        self.config, self.method, self.built, self.run = config, method, built, built.run
        self.accelerator, self.optimiser, self.journal = accelerator, optimiser, journal
        self.position, self.buffer, self.moving, self.folder = position, buffer, moving, folder
        self.stop: int | None = None
        self.counted = Counter(self.run.tokens)

    def go(self, bar: Bar) -> None:
        settings, run = self.config.train, self.run
        bar.advance_to(self.position.step)
        for step in range(self.position.step, settings.steps):
            run.step, started = step, time.perf_counter()
            run.metrics.clear()
            run.metrics.update(self.position.metrics)  # of the batch that was interrupted, if there was one
            if self.spent() >= 1:
                break
            rate = learning_rate(self.config.optimiser, step, settings.steps, self.spent())
            set_learning_rate(self.optimiser, rate)
            if self.buffer is None:
                assert run.stream is not None
                bar.doing("writing")
                if step == 0:
                    self.method.prepare(run)
                self.buffer = self.method.collect(run, run.stream.next(settings.prompts_per_step))
            collected = time.perf_counter() - started
            parts = update_rows(len(self.buffer), settings.epochs, settings.minibatches, run.seed, step)
            described = batch_metrics(self.buffer) | run.metrics
            bar.doing("learning")
            for i in range(self.position.update, len(parts)):
                self._update(parts[i], described, i == 0, collected, started, bar)
                self.position.update = i + 1
                if self.stop is not None and i + 1 < len(parts):
                    self._leave()
            self.buffer, self.position.update, self.position.metrics = None, 0, {}
            self.position.step = step + 1
            bar.advance_to(sum(run.tokens.values()) if settings.max_tokens else step + 1)
            last = step + 1 == settings.steps or self.spent() >= 1
            if self.built.eval_prompts and (
                last or (self.config.eval.every and (step + 1) % self.config.eval.every == 0)
            ):
                self.evaluate()
            if self.stop is not None and not last:
                self._leave()
            if last or (settings.save_every and (step + 1) % settings.save_every == 0):
                self.save()

    def spent(self) -> float:
        """Share of the token budget used so far; 0 where there is none."""
        budget = self.config.train.max_tokens
        return sum(self.run.tokens.values()) / budget if budget else 0.0

    def _update(
        self,
        rows: torch.Tensor,
        described: dict[str, float],
        first: bool,
        collected: float,
        started: float,
        bar: Bar,
    ) -> None:
        settings, run = self.config.train, self.run
        assert self.buffer is not None
        batch = self.buffer.select(rows)
        keep = bool(first and settings.sample_every and run.step % settings.sample_every == 0)
        result = update(
            run,
            self.method,
            batch,
            self.optimiser,
            self.accelerator,
            self.config.optimiser.max_grad_norm,
            on_non_finite=self._save_bad_batch,
            want_signals=keep,
        )
        for role in _all_roles(self.built):
            role.sync.after_update(role.policy, run.student, run.updates)
        run.engine.update(run.updates)
        run.tokens["trained"] += int(sum(int(batch.mask(s).sum()) for s in _streams(batch)))
        row = {
            "step": run.step + 1,
            "update": run.updates,
            **result.metrics,
            **described,
            "learning_rate": self.optimiser.param_groups[0]["lr"],
            **{
                f"tokens/{name}": run.tokens[name] - self.counted[name]
                for name in ("generated", "scored", "trained")
            },
            "time/collect": collected,
            "step_time": time.perf_counter() - started,
        }
        self.counted = Counter(run.tokens)
        self.journal.metrics(row)
        bar.show(row)
        if keep:
            self.journal.samples(
                run.step + 1, batch, result.signals, run.student.tokenizer, settings.samples_kept
            )

    def evaluate(self) -> Evaluation:
        """Held-out prompts, without privileged context; one row per domain in evaluations.jsonl."""
        built, settings, run = self.built, self.config.eval, self.run
        assert built.judge is not None
        result = evaluate(
            run.engine,
            built.eval_prompts,
            built.eval_ids,
            built.judge,
            run.student.tokenizer,
            n=settings.samples,
            sampling=run.sampling,
            ks=settings.ks,
            seed=run.seed,
            out=self.folder / "evaluations" / f"step_{self.position.step:06d}",
        )
        for row in result.rows(step=self.position.step):
            self.journal.evaluation(row)
        return result

    def save(self) -> Path:
        """A checkpoint of this very moment."""
        run, position = self.run, self.position
        assert run.stream is not None
        position.updates, position.tokens = run.updates, dict(run.tokens)
        position.stream, position.method = run.stream.state_dict(), self.method.state_dict()
        position.metrics = dict(run.metrics) if self.buffer is not None else {}
        return save_checkpoint(
            self.folder / "checkpoints",
            run.student,
            self.optimiser,
            position,
            self.moving,
            self.buffer,
            self.config.train.keep_checkpoints,
        )

    def _leave(self) -> None:
        where = self.save()
        assert self.stop is not None
        print(
            f"\nstopped by {signal.Signals(self.stop).name}; saved {where}. Go on with the same command and --resume",
            flush=True,
        )
        raise Interrupted(128 + self.stop)

    def _save_bad_batch(self, batch: Rollouts) -> str:
        where = self.folder / f"bad_batch_step_{self.run.step + 1:06d}"
        where.mkdir(parents=True, exist_ok=True)
        save_rollouts(batch, where)
        return str(where)


def update_rows(count: int, epochs: int, minibatches: int, seed: int, step: int) -> list[torch.Tensor]:
    """Row indices `[M]` of every optimiser update on a batch of `count` answers.

    One update takes the batch as it is; several shuffle it anew each epoch, from (seed, step, epoch) alone. Raises
    ValueError where there are more mini-batches than answers.
    """
    if minibatches > count:
        raise ValueError(f"train.minibatches is {minibatches}, but the batch has only {count} answers")
    if epochs * minibatches == 1:
        return [torch.arange(count)]
    parts = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(sequence_seed(seed, step, "order", epoch))
        parts += torch.randperm(count, generator=generator).tensor_split(minibatches)
    return parts


def _streams(batch: Rollouts) -> list[str]:
    return ["trained"] if "trained" in batch.masks else ["student", "teacher", "data"]


def _all_roles(built: Built) -> list[Role]:
    run = built.run
    roles = [*run.teachers.values(), *run.roles.values(), *([run.reference] if run.reference else [])]
    return list({id(role): role for role in roles}.values())


def _is_frozen(role: Role) -> bool:
    return isinstance(role.sync, Frozen)
