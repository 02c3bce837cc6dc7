"""What a run would cost and whether it would start, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from surpass.config import RunConfig
from surpass.methods.base import Method
from surpass.models.policy import load_config
from surpass.models.tokenizers import check_same_tokens
from surpass.prompts.templates import check_same_template, render
from surpass.train.build import check_config, check_domains, read_prompts

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelSize:
    """One model of the run. parameters: all of them; active: those that take part for one token (fewer in a MoE)."""

    name: str
    path: str
    parameters: int
    active: int
    bytes: int


@dataclass
class Plan:
    """memory: bytes by part. flops: floating-point operations of one step by phase. tokens: of one step, at most."""

    models: list[ModelSize] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    roles: list[str] = field(default_factory=list)
    prompts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def plan(config: RunConfig, method: Method) -> Plan:
    """Everything that can be known from configurations, tokenizers and prompts. Never raises for a problem it can list."""
    out = Plan()
    needs = method.needs()
    _try(out, lambda: check_config(config, method))
    paths = _paths(config, method)
    configs = {}
    for name, path in paths.items():
        _try(out, lambda name=name, path=path: configs.update({name: load_config(path)}))
    sizes = {name: _size(name, paths[name], c, _dtype(config, name)) for name, c in configs.items()}
    out.models = list(sizes.values())
    out.roles = [name for name in paths if name != "student"]
    _tokenizers(out, config, paths)
    _prompts(out, config, paths)
    if "student" in sizes:
        _costs(out, config, method, sizes, configs["student"])
    if needs.reward:
        out.roles.append("judge")
    return out


def _paths(config: RunConfig, method: Method) -> dict[str, str]:
    """Which checkpoints the settings read."""
    needs = method.needs()
    paths = {"student": config.student}
    if needs.teacher and config.teacher:
        paths["teacher"] = config.teacher
    if needs.teacher:
        paths |= {f"teacher/{domain}": path for domain, path in config.teachers.items()}
    if needs.reference and config.reference:
        initial = config.reference == "student"
        if not (
            initial and config.model.lora.rank
        ):  # a LoRA student is its own reference with the adapter off
            paths["reference"] = config.student if initial else config.reference
    return paths


def _dtype(config: RunConfig, name: str) -> str:
    return config.model.dtype if name == "student" else config.model.role_dtype or config.model.dtype


def _size(name: str, path: str, config: Any, dtype: str) -> ModelSize:
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(p.numel() for p in model.parameters())
    text = config.get_text_config()
    experts, used = getattr(text, "num_experts", None) or 0, getattr(text, "num_experts_per_tok", None) or 0
    routed = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    active = parameters - routed + (routed * used // experts if experts else 0)
    return ModelSize(name, path, parameters, active, parameters * BYTES[dtype])


def _tokenizers(out: Plan, config: RunConfig, paths: dict[str, str]) -> None:
    student = _try(out, lambda: AutoTokenizer.from_pretrained(paths["student"]))
    if student is None:
        return
    for name, path in paths.items():
        if name == "student" or path == paths["student"]:
            continue
        other = _try(out, lambda path=path: AutoTokenizer.from_pretrained(path))
        if other is None:
            continue
        shared = min(len(student), len(other))
        _try(
            out, lambda name=name, other=other, shared=shared: check_same_tokens(student, other, shared, name)
        )
        if config.data.teacher_template == "same":
            _try(
                out,
                lambda name=name, other=other: check_same_template(
                    student, other, config.data.template_args, other_name=name
                ),
            )


def _prompts(out: Plan, config: RunConfig, paths: dict[str, str]) -> None:
    if not config.prompts:
        return
    prompts = _try(out, lambda: read_prompts(config, config.prompts, config.data.split, config.data.limit))
    tokenizer = _try(out, lambda: AutoTokenizer.from_pretrained(paths["student"]))
    if prompts is None or tokenizer is None:
        return
    if config.teachers:
        _try(out, lambda: check_domains(prompts, config.teachers))
    lengths = _try(
        out, lambda: [len(render(p, tokenizer, template_args=config.data.template_args)) for p in prompts]
    )
    if lengths is None:
        return
    domains = sorted({p.domain for p in prompts})
    out.prompts = {
        "count": len(prompts),
        "longest": max(lengths),
        "mean": sum(lengths) / len(lengths),
        "domains": domains,
    }
    model = _try(out, lambda: load_config(paths["student"]))
    limit = (
        int(getattr(model.get_text_config(), "max_position_embeddings", 0) or 1 << 30) if model else 1 << 30
    )
    room = config.data.max_prompt_tokens or limit - config.rollout.max_new_tokens
    too_long = sum(length > room for length in lengths)
    if too_long and config.data.overlong == "error":
        out.problems.append(
            f"{too_long} of {len(lengths)} prompts are longer than {room} tokens (the model reads {limit}, answers take up to "
            f"{config.rollout.max_new_tokens}); set data.overlong drop, or a smaller rollout.max_new_tokens"
        )
    if too_long == len(lengths) and config.data.overlong == "drop":
        out.problems.append(f"every prompt is longer than {room} tokens and would be dropped")


def _costs(out: Plan, config: RunConfig, method: Method, sizes: dict[str, ModelSize], model: Any) -> None:
    """Upper bounds: every answer at its full length."""
    text, needs = model.get_text_config(), method.needs()
    student, dtype = sizes["student"], BYTES[config.model.dtype]
    answers = config.train.prompts_per_step * method.samples
    prompt = int(out.prompts.get("mean", 0))
    generated = answers * config.rollout.max_new_tokens if needs.rollouts else 0
    read = answers * (prompt + config.rollout.max_new_tokens)
    scorers = [size for name, size in sizes.items() if name != "student" and not name.startswith("teacher/")]
    routed = [size for name, size in sizes.items() if name.startswith("teacher/")]
    out.tokens = {
        "generated": generated,
        "trained": answers * config.rollout.max_new_tokens * config.train.epochs,
    }
    out.tokens["scored"] = answers * config.rollout.max_new_tokens * (len(scorers) + bool(routed))
    backward = 8 if config.model.gradient_checkpointing else 6
    out.flops = {"rollout": 2.0 * student.active * (generated + answers * prompt / max(1, method.samples))}
    for size in scorers:
        out.flops[f"scoring by {size.name}"] = 2.0 * size.active * read
    for size in routed:
        out.flops[f"scoring by {size.name}"] = 2.0 * size.active * read / len(routed)
    out.flops["update"] = float(backward) * student.active * read * config.train.epochs
    trainable = (
        student.parameters if not config.model.lora.rank else _lora_parameters(text, config.model.lora.rank)
    )
    out.memory = {
        "student weights": student.bytes,
        "gradients": trainable * dtype,
        "AdamW moments": 2 * trainable * dtype,
    }
    distinct = {size.path: size for name, size in sizes.items() if name != "student"}
    for size in distinct.values():
        out.memory[f"{size.name} weights"] = size.bytes
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    columns = prompt + config.rollout.max_new_tokens
    if needs.rollouts:
        rows = min(config.rollout.max_rows, answers)
        out.memory["KV cache"] = 2 * rows * columns * text.num_hidden_layers * heads * width * dtype
    budget = max(config.train.token_budget, columns)
    # Per token and layer: about 14 hidden-sized and 3 MLP-sized activations are kept for backward; one with recomputation.
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    per_layer = text.hidden_size if config.model.gradient_checkpointing else 14 * text.hidden_size + 3 * inner
    out.memory["activations (estimate)"] = budget * text.num_hidden_layers * per_layer * dtype


def _lora_parameters(text: Any, rank: int) -> int:
    """Adapters on every linear layer of a decoder block, estimated from its widths."""
    heads = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    query = heads * text.num_attention_heads
    kv = heads * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    hidden = text.hidden_size
    per_layer = 2 * (hidden + query) + 2 * (hidden + kv) + 3 * (hidden + inner)
    return rank * per_layer * text.num_hidden_layers


def _try(out: Plan, action: Any) -> Any:
    """The action's result, or None with its error listed as a problem."""
    try:
        return action()
    except (ValueError, OSError, KeyError) as error:
        out.problems.append(str(error))
        return None


def total_memory(plan: Plan) -> int:
    """Bytes of all parts together."""
    return sum(plan.memory.values())
