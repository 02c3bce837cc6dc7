"""From a configuration to a `Run`: load, wire and check everything, failing early and in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec

from surpass.config import RunConfig
from surpass.judge.build import build_judge
from surpass.judge.judge import Judge
from surpass.judge.verifiers import verifier_for
from surpass.methods.base import Method, RoleSpec
from surpass.methods.run import Run
from surpass.models.policy import Policy, add_lora, load_policy
from surpass.models.tokenizers import check_same_tokens
from surpass.prompts.limits import check_lengths
from surpass.prompts.sources import load_prompts
from surpass.prompts.stream import PromptStream
from surpass.prompts.templates import check_same_template, render
from surpass.prompts.views import View
from surpass.records import Prompt, Ragged
from surpass.roles.role import Role, snapshot
from surpass.roles.sync import CopyEvery, Ema, Frozen, Live, Sync
from surpass.rollout.engine import Engine, Sampling
from surpass.rollout.local import LocalEngine
from surpass.tasks import critique, task_named


def check_config(config: RunConfig, method: Method) -> None:
    """Raise ValueError for whatever can be known to fail before anything is loaded."""
    needs = method.needs()
    if config.teacher and config.teachers:
        raise ValueError(
            "give either --teacher (one for all prompts) or --teachers.DOMAIN (one per domain), not both"
        )
    if "teacher" in method.roles() and (config.teacher or config.teachers):
        raise ValueError(
            "this method makes its teacher of the student itself, so --teacher and --teachers would have no effect; leave "
            "them out, or choose a method that reads them (opd, exopd)"
        )
    if needs.teacher and not (config.teacher or config.teachers or "teacher" in method.roles()):
        raise ValueError("this method needs a teacher: --teacher PATH, or --teachers.DOMAIN PATH for several")
    if needs.reference and config.reference is None:
        raise ValueError(
            "these settings read a reference (for example lambda other than 1), and there is none: set --reference student "
            "(its initial weights) or --reference PATH (for example the teacher's checkpoint before its RL)"
        )
    if not config.prompts:
        raise ValueError(
            "no prompts: set --prompts FILE, a hub id, embedded:NAME, or --prompts.DOMAIN FILE per domain"
        )
    missing = [name for name in config.train.trackers if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"train.trackers names {', '.join(missing)}, which is not installed: pip install 'surpass[{','.join(missing)}]', "
            "or leave it out (metrics.jsonl is written in any case)"
        )
    rollout = config.rollout
    truncated = rollout.top_p < 1 or rollout.top_k > 0 or rollout.min_p > 0
    if needs.sampler_law and truncated:
        raise ValueError(
            "this method weighs tokens by their probability under the student, but sampling is truncated "
            f"(top_p {rollout.top_p}, top_k {rollout.top_k}, min_p {rollout.min_p}), so the tokens follow another law; "
            "set rollout.top_p 1, rollout.top_k 0 and rollout.min_p 0"
        )
    if needs.sampler_law and rollout.temperature != config.loss.temperature:
        raise ValueError(
            f"this method needs answers sampled under the law it trains: rollout.temperature is {rollout.temperature} "
            f"and loss.temperature is {config.loss.temperature}; make them equal"
        )


@dataclass
class Built:
    """A run ready to start. eval_ids: the held-out prompts as the student reads them.

    notes: what was decided or dropped on the way, for the log.
    """

    run: Run
    eval_prompts: list[Prompt]
    eval_ids: Ragged
    judge: Judge | None
    notes: list[str] = field(default_factory=list)


def build(config: RunConfig, method: Method) -> Built:
    """Load models, prompts and judge. Raises ValueError (bad settings or files) before any training."""
    check_config(config, method)
    notes: list[str] = []
    loaded: dict[str, Policy] = {}

    def load(path: str) -> Policy:
        if path not in loaded:
            settings = config.model
            policy = load_policy(
                path,
                dtype=settings.role_dtype or settings.dtype,
                device=settings.device,
                attention=settings.attention,
                trust_remote_code=settings.trust_remote_code,
            )
            policy.model.eval().requires_grad_(False)
            loaded[path] = policy
        return loaded[path]

    student = _load_student(config)
    needs = method.needs()
    prompts = read_prompts(config, config.prompts, config.data.split, config.data.limit)
    prompts, rendered = _fit(prompts, student, config, notes)
    teachers = {}
    if needs.teacher and "teacher" not in method.roles():
        paths = {"default": config.teacher} if config.teacher else config.teachers
        for domain, path in paths.items():
            name = "teacher" if domain == "default" else f"teacher/{domain}"
            teachers[domain] = Role(
                name, load(path), view=_teacher_view(config), template_args=config.data.template_args
            )
        if needs.routed:
            check_domains(prompts, teachers)
    reference = None
    if needs.reference:
        assert config.reference is not None
        reference = _reference(config, student, load)
    roles = {name: _build_role(name, spec, student, config) for name, spec in method.roles().items()}
    if "teacher" in roles and not teachers:
        teachers = {"default": roles.pop("teacher")}
    for role in [*teachers.values(), *roles.values(), *([reference] if reference else [])]:
        if role.policy is not student:
            shared = min(student.vocabulary, role.policy.vocabulary)
            check_same_tokens(student.tokenizer, role.policy.tokenizer, shared, role.name)
            if config.data.teacher_template == "same":
                check_same_template(
                    student.tokenizer, role.policy.tokenizer, config.data.template_args, other_name=role.name
                )
    judge = make_judge(config, prompts) if needs.reward else None

    def engine_for(policy: Policy) -> Engine:
        return LocalEngine(policy, max_rows=config.rollout.max_rows, max_tokens=config.rollout.max_tokens)

    run = Run(
        student=student,
        engine=engine_for(student),
        sampling=make_sampling(config),
        judge=judge,
        teachers=teachers,
        reference=reference,
        roles=roles,
        stream=PromptStream(
            prompts, seed=config.seed, ratios=config.data.ratios or None, shuffle=config.data.shuffle
        ),
        template_args=config.data.template_args,
        temperature=config.loss.temperature,
        token_budget=config.train.token_budget,
        seed=config.seed,
        off_policy=config.train.epochs * config.train.minibatches > 1,
        steps=config.train.steps,
        engine_for=engine_for,
        critic=_critic if all(_task_of(p) for p in prompts) else None,
        rendered=rendered,
    )
    if judge is not None:
        judge.start()  # workers come up while the first answers are written
    eval_prompts: list[Prompt] = []
    eval_rendered: dict[str, list[int]] = {}
    eval_judge = judge
    if config.eval.prompts:
        eval_prompts = read_prompts(config, config.eval.prompts, config.eval.split, config.eval.limit)
        eval_prompts, eval_rendered = _fit(eval_prompts, student, config, notes)
        eval_judge = make_judge(config, eval_prompts)
    eval_ids = Ragged.from_list([eval_rendered[p.id] for p in eval_prompts])
    return Built(run, eval_prompts, eval_ids, eval_judge, notes)


def make_sampling(config: RunConfig) -> Sampling:
    """The sampling law of the configuration."""
    rollout = config.rollout
    return Sampling(
        max_new_tokens=rollout.max_new_tokens,
        min_new_tokens=rollout.min_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        stop=tuple(rollout.stop),
    )


def read_prompts(
    config: RunConfig, source: str | dict[str, str], split: str, limit: int | None
) -> list[Prompt]:
    """All prompts of one source, or of one per domain."""
    sources = source if isinstance(source, dict) else {"": source}
    prompts = [
        prompt
        for domain, path in sources.items()
        for prompt in load_prompts(
            path,
            preset=config.data.preset,
            fields=config.data.fields,
            domain=domain or None,
            split=split,
            limit=limit,
            seed=config.seed,
        )
    ]
    if len({p.id for p in prompts}) < len(prompts):  # ids are unique within a source, not across several
        prompts = [replace(p, id=f"{p.domain}/{p.id}") for p in prompts]
    return prompts


def verifiers_of(config: RunConfig, prompts: list[Prompt]) -> dict[str, str]:
    """Verifier by domain: the configured one for all, else those of the preset and of embedded tasks."""
    if config.judge.verifier:
        return {"default": config.judge.verifier}
    return verifier_for(prompts, config.data.preset)


def make_judge(config: RunConfig, prompts: list[Prompt]) -> Judge:
    """The judge of the configuration for these prompts. Raises ValueError where nothing would judge some of them."""
    settings = config.judge
    return build_judge(
        prompts,
        verifiers_of(config, prompts),
        settings.rewards,
        on_failure=settings.on_failure,
        time_limit=settings.time_limit,
        workers=settings.workers,
    )


def check_domains(prompts: Iterable[Prompt], teachers: Iterable[str]) -> None:
    """Raise ValueError for prompts whose domain no teacher speaks on."""
    known = set(teachers)
    if known == {"default"}:
        return
    unknown = sorted({p.domain for p in prompts} - known)
    if unknown:
        raise ValueError(
            f"there are prompts of domain {', '.join(map(repr, unknown))}, but teachers for {sorted(known)} only; name a "
            "teacher for each (--teachers.DOMAIN PATH), or set the prompts' domain (--prompts.DOMAIN FILE)"
        )


def _load_student(config: RunConfig) -> Policy:
    settings = config.model
    policy = load_policy(
        config.student,
        dtype=settings.dtype,
        device=settings.device,
        attention=settings.attention,
        trust_remote_code=settings.trust_remote_code,
    )
    return add_lora(policy, settings.lora)


def _fit(
    prompts: list[Prompt], student: Policy, config: RunConfig, notes: list[str]
) -> tuple[list[Prompt], dict[str, list[int]]]:
    """Prompts that leave room for an answer, and their token ids by prompt id; dropped ones are counted in the notes."""
    room = student.max_length - config.rollout.max_new_tokens
    limit = min(config.data.max_prompt_tokens or room, room)
    if limit < 1:
        raise ValueError(
            f"rollout.max_new_tokens is {config.rollout.max_new_tokens}, but {student.name!r} reads {student.max_length} "
            "tokens in all, so no prompt fits; lower it"
        )
    rendered = [render(p, student.tokenizer, template_args=config.data.template_args) for p in prompts]
    fitting = check_lengths(prompts, rendered, limit, config.data.overlong)
    if fitting.dropped:
        notes.append(str(fitting))
    return fitting.prompts, {p.id: ids for p, ids in zip(fitting.prompts, fitting.ids, strict=True)}


def _teacher_view(config: RunConfig) -> View | None:
    return View("own_template") if config.data.teacher_template == "own" else None


def _reference(config: RunConfig, student: Policy, load: Callable[[str], Policy]) -> Role:
    """The student's initial weights (free with LoRA: its adapter off), or another checkpoint."""
    if config.reference != "student":
        assert config.reference is not None
        return Role("reference", load(config.reference))
    if config.model.lora.rank:
        return Role("reference", student, adapter=False)
    return Role("reference", snapshot(student))


def _build_role(name: str, spec: RoleSpec, student: Policy, config: RunConfig) -> Role:
    """A role made of the student itself."""
    view = View(spec.view) if spec.view else None  # type: ignore[arg-type]
    template_args = config.data.template_args
    if spec.source == "live":
        return Role(name, student, view, Live(), template_args=template_args)
    if spec.source == "initial" and config.model.lora.rank:
        return Role(name, student, view, adapter=False, template_args=template_args)
    sync: Sync = Frozen()
    if spec.keep is not None:
        sync = Ema(spec.keep)
    if spec.updates is not None:
        sync = CopyEvery(spec.updates)
    policy = snapshot(student)
    if spec.keep is not None:
        policy.model.float()  # in bfloat16 a small step of a moving average rounds to nothing
    return Role(name, policy, view, sync, template_args=template_args)


def _task_of(prompt: Prompt) -> str:
    """Name of the embedded task a prompt was made by; empty for other prompts."""
    return next((tag.removeprefix("embedded:") for tag in prompt.tags if tag.startswith("embedded:")), "")


def _critic(prompt: Prompt, text: str) -> str:
    """Embedded tasks say which step of an answer is wrong."""
    return critique(task_named(_task_of(prompt)), prompt, text)
