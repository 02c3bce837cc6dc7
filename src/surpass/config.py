"""The configuration of a run: typed, complete, and the same from YAML, from the command line and from Python."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from surpass.models.policy import Dtype, Lora

Reduction = Literal["token_mean", "sequence_mean", "sequence_sum", "constant_length", "joint"]


@dataclass
class ModelConfig:
    """How checkpoints are loaded. Student, teachers and reference share these settings."""

    dtype: Dtype = "float32"
    """Precision of the student's weights."""
    role_dtype: Dtype | None = None
    """Precision of teachers and references; None: the student's."""
    device: str = "cpu"
    """Where models live: `cpu`, `cuda`, `cuda:1`."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation of transformers; `auto`: the one it chooses for the architecture."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more time. Rollouts keep their KV cache."""
    trust_remote_code: bool = False
    """Run modelling code shipped with a checkpoint. Off unless you trust its author."""
    lora: Lora = field(default_factory=Lora)
    """Train low-rank adapters instead of all weights."""


@dataclass
class DataConfig:
    """Which prompts, and how they are rendered."""

    preset: str | None = None
    """Known data set whose fields, verifier and instruction apply: gsm8k, math, aime, hmmt, deepmath, eurus-code."""
    fields: dict[str, str] = field(default_factory=dict)
    """Names of your columns, for example `prompt: question`. Unset ones follow the ecosystem's conventions."""
    split: str = "train"
    """Split of a hub data set or embedded task."""
    limit: int | None = None
    """Read at most this many prompts of each source."""
    ratios: dict[str, float] = field(default_factory=dict)
    """Share of each domain in every batch; empty: as the files have them."""
    shuffle: bool = True
    """New order every epoch, derived from the seed."""
    max_prompt_tokens: int | None = None
    """Longest prompt; None: what the model reads less `rollout.max_new_tokens`."""
    overlong: Literal["error", "drop"] = "error"
    """What to do with longer prompts. Dropped ones are counted."""
    template_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template, for example `enable_thinking: false`."""
    teacher_template: Literal["same", "student", "own"] = "same"
    """Chat template teachers read: `same` refuses teachers whose own differs from the student's, `student` has them read
    the student's rendering, `own` renders the prompt with theirs."""


@dataclass
class RolloutConfig:
    """Who writes the answers, and how."""

    engine: Literal["local"] = "local"
    """`local`: continuous batching on the student's own weights."""
    temperature: float = 1.0
    """Of sampling. The loss has its own (`loss.temperature`)."""
    top_p: float = 1.0
    """Nucleus sampling; below 1 the law is truncated and methods with importance ratios refuse it."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0: all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one."""
    max_new_tokens: int = 256
    """Longest answer in tokens; a longer one is cut and counted in `completions/clipped_ratio`."""
    min_new_tokens: int = 0
    """EOS is not sampled before this many tokens."""
    stop: list[str] = field(default_factory=list)
    """Texts that end an answer."""
    max_rows: int = 512
    """Sequences decoded side by side."""
    max_tokens: int | None = None
    """Most tokens the key/value cache holds; null: as many as `max_rows` sequences need. Bounds memory, not answers."""


@dataclass
class LossConfig:
    """Shared by every term of the loss."""

    temperature: float = 1.0
    """Divides the logits of student, teachers and reference alike in log-probs and divergences."""


@dataclass
class JudgeConfig:
    """How good are the answers?"""

    verifier: str | None = None
    """math, exact, choice or embedded; None: the preset's, or the embedded task's."""
    rewards: dict[str, float] = field(default_factory=dict)
    """Further reward functions with their weights: `module:function` or `file.py:function`."""
    time_limit: float = 5.0
    """Seconds one verification may take before its worker is replaced."""
    on_failure: Literal["skip", "zero", "raise"] = "skip"
    """A verifier that times out or raises: leave the answer out, call it wrong, or stop the run."""
    workers: int = 1
    """Worker processes for verifiers that may hang."""


@dataclass
class OptimiserConfig:
    """AdamW and its schedule."""

    learning_rate: float = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: constant, or decaying to 0 at the last step."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    beta1: float = 0.9
    """First-moment decay."""
    beta2: float = 0.999
    """Second-moment decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""


@dataclass
class TrainConfig:
    """The loop."""

    steps: int = 100
    """Rollout batches (for data methods: data batches)."""
    max_tokens: int | None = None
    """Stop after the step in which generated + scored + trained tokens reach this many; null: only `steps` counts."""
    prompts_per_step: int = 64
    """Prompts of one batch; each is answered `method.samples` times."""
    epochs: int = 1
    """Passes over each rollout batch."""
    minibatches: int = 1
    """Optimiser updates per pass. More than one update per batch is off-policy: the surrogate's ratios matter."""
    token_budget: int = 16384
    """Prompt + response tokens (padding included) of one forward. Never changes the gradient."""
    save_every: int = 0
    """Checkpoint every this many steps; 0: only at the end and when interrupted."""
    keep_checkpoints: int = 2
    """Older checkpoints are removed."""
    sample_every: int = 10
    """Keep completions with their per-token signals every this many steps; 0: never."""
    samples_kept: int = 8
    """How many completions each time."""
    threads: int = 0
    """CPU threads of torch; 0: leave as they are."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Besides metrics.jsonl, which is always written."""


@dataclass
class EvalConfig:
    """Evaluation during and after training."""

    prompts: str | dict[str, str] | None = None
    """Held-out prompts (same forms as `prompts`); None: no evaluation."""
    every: int = 0
    """Evaluate every this many steps; 0: only after the last."""
    samples: int = 8
    """Answers per prompt."""
    ks: list[int] = field(default_factory=lambda: [1, 8])
    """Which pass@k."""
    limit: int | None = None
    """At most this many prompts per source."""
    split: str = "eval"
    """Split of a hub data set or embedded task."""


@dataclass
class RunConfig:
    """Everything a run depends on, except the method's own fields (`method.*`)."""

    student: str
    """Checkpoint directory or hub id; the weights that are trained."""
    prompts: str | dict[str, str] = ""
    """JSONL / JSON / Parquet file, hub id, `embedded:NAME`, or one of these per domain."""
    output: str = "runs/latest"
    """Folder of the run."""
    teacher: str | None = None
    """One teacher for every prompt."""
    teachers: dict[str, str] = field(default_factory=dict)
    """A teacher per domain: `--teachers.math DIR --teachers.code DIR`."""
    reference: str | None = "student"
    """`student`: its initial weights. A path: for example the teacher's own pre-RL checkpoint (reward correction)."""
    seed: int = 0
    """Every random choice of the run derives from it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
