"""Recipe values: everything a user chooses, typed, validated and documented where it is declared.

All values are frozen pydantic models that forbid unknown fields; a recipe pickles, compares and prints.
GRPO's fields carry the names of TRL's ``GRPOConfig``, so that settings move over unchanged.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SkipValidation, model_validator

from posttrain.conversation.effort import check_effort
from posttrain.errors import RecipeError
from posttrain.protocols import (
    Environment,
    GroupReward,
    JudgeMonitor,
    JudgeTaskSource,
    Reward,
    Substrate,
    TaskSource,
    Teacher,
    TeacherLibrary,
)
from posttrain.tasks import TasksInMode
from posttrain.types import Sampling, Task

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Value(BaseModel):
    """Base of all recipe values."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some fields changed."""
        return type(self).model_validate({**{name: getattr(self, name) for name in type(self).model_fields}, **changes})


class Lora(Value):
    """Low-rank adapters (arXiv 2106.09685) through peft; the base weights stay frozen."""

    rank: Positive = 16
    alpha: float = 32.0
    dropout: Fraction = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"


class Model(Value):
    """The base model every specialist and the student start from."""

    path: str
    """A local folder, a hub name, ``package:IMPORT/sub/path`` for a checkpoint inside an installed Python
    package, or any of these ending in ``.gguf`` (converted once to a plain checkpoint in the cache)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type of forward passes; ``auto`` is bfloat16 where the CPU or GPU multiplies it natively and the
    model is big enough to gain. Master weights are float32 always."""
    lora: Lora | None = None
    swiglu_limit: float | None = Field(default=None, gt=0)
    """Clamps the feed-forward layers' gate from above and their linear part on both sides (10.0 in DeepSeek-V4)."""
    fake_quantization: Literal["mxfp4"] | None = None
    """Compute with the experts' weights, in a dense model with those of the feed-forward layers, in MXFP4; float32
    masters are trained. Engines, judges and teachers of this run's checkpoints use the same values."""
    chat: Literal["template", "v4"] = "template"
    """How conversations are written: by the tokenizer's chat template, or in DeepSeek-V4's wire format with DSML tool
    calls (``posttrain.conversation.v4``). A model that lacks tokens of it gets them, in a copy in the cache."""


class AnticipatoryRouting(Value):
    """Choose experts by older weights for a while after a spike of the gradient's norm (DeepSeek-V4)."""

    lag_steps: Positive = 1
    """Age of the weights that choose. So many copies of what is trained are kept."""
    hold_steps: Positive = 50
    """How many steps a spike switches it on for."""
    window: int = Field(default=32, ge=2)
    """Steps whose norms a spike is measured against."""
    threshold: float = Field(default=5.0, gt=0)
    """A spike exceeds their mean by this many standard deviations, and by half."""


class Optim(Value):
    """AdamW and its schedule; names as in ``transformers.TrainingArguments``."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """``muon`` for matrices, with AdamW for embeddings, head, norms and stacked experts at the same learning rate."""
    muon_momentum: Fraction = 0.95
    learning_rate: float = Field(default=1e-5, gt=0)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.99
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this global norm."""
    anticipatory_routing: AnticipatoryRouting | None = None
    """For mixture-of-experts models; in GRPO only where ``keep_routing`` does not know the engine's choice."""


class SFT(Value):
    """Supervised fine-tuning through TRL's ``SFTTrainer`` on the domain's demonstrations."""

    num_demonstrations: Positive = 256
    max_steps: Positive = 50
    batch_size: Positive = 16
    """Demonstrations per optimizer step."""
    max_length: Positive = 1024
    optim: Optim = Optim(learning_rate=1e-4, lr_scheduler_type="linear", warmup_steps=5)
    save_steps: Positive = 50

    @model_validator(mode="after")
    def _trainers_own_optimizer(self) -> Self:
        if self.optim.optimizer != "adamw" or self.optim.anticipatory_routing is not None:
            raise RecipeError(
                f"sft.optim: optimizer = {self.optim.optimizer!r}, anticipatory_routing = "
                f"{self.optim.anticipatory_routing}; expected 'adamw' and None, as SFT runs in TRL's trainer"
            )
        return self


class GRPO(Value):
    """Group relative policy optimisation; fields named as in TRL's ``GRPOConfig``."""

    max_steps: Positive = 100
    groups_per_step: Positive = 8
    """Tasks per rollout step; each gives ``num_generations`` rollouts."""
    num_generations: int = Field(default=8, ge=2)
    max_refills: int = Field(default=0, ge=0)
    """How often a step plays other tasks in place of those whose rollouts all earned the same, which teach nothing and
    then leave the update altogether (DAPO's dynamic sampling, arXiv 2503.14476)."""
    num_iterations: Positive = 1
    """Passes over each rollout batch (mu in the paper)."""
    minibatches_per_step: Positive = 1
    """Optimizer steps per pass; samples are shuffled over mini-batches."""
    loss_type: Literal["grpo", "gspo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"] = "dapo"
    """As in TRL, and ``gspo``: ``grpo`` with the ratio of whole sequences (arXiv 2507.18071). Where it divides by
    tokens, tokens of rollouts without any gradient are not counted, as if dynamic sampling (arXiv 2503.14476) had left
    them out."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Whether each token has a ratio of its own or the geometric mean of its sequence."""
    importance_sampling_correction: (
        Literal[
            "token_truncate",
            "token_mask",
            "sequence_truncate",
            "sequence_mask",
            "geometric_truncate",
            "geometric_mask",
        ]
        | None
    ) = None
    """None: the ratio is to the engine's own log-probabilities, which covers all differences at once. Otherwise the
    ratio and its clip are to the learner's policy at the start of the step, one more forward pass, and the loss is
    weighted by that policy over the engine's, clamped or masked: for several updates per step with an engine that
    computes differently, such as one in lower precision. TRL's ``vllm_importance_sampling_mode``; ``geometric`` goes by
    the mean over a sequence instead of its sum, which rises with length."""
    importance_sampling_clip_min: float = Field(default=0.0, ge=0)
    importance_sampling_clip_max: float = Field(default=3.0, gt=0)
    """Bounds of the correction's weight."""
    scale_rewards: Literal["group", "batch", "none"] = "none"
    """Divisor of the centred reward; V3.2 centres only."""
    epsilon: float = Field(default=0.2, gt=0)
    epsilon_high: float | None = None
    """Upper clip; None means ``epsilon`` (for cispo it is the absolute cap of the ratio)."""
    delta: float | None = None
    """Upper bound of the ratio for negative advantages: the two-sided clip of INTELLECT-2, which from
    ``1 + epsilon_high`` on is the dual clip of arXiv 1912.09729 (3.0 there)."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL to the reference: the model at the start of the stage, or as it was last synchronised."""
    sync_ref_model: bool = False
    """Move the reference after every ``ref_model_sync_steps`` optimizer steps to ``alpha policy + (1 - alpha)
    reference``, with ``alpha = ref_model_mixup_alpha`` (arXiv 2404.09656); 1 replaces it, as R1-Zero did every 400."""
    ref_model_mixup_alpha: Fraction = 0.6
    ref_model_sync_steps: Positive = 512
    use_bias_correction_kl: bool = True
    """Multiply K3 by the importance ratio, which makes its gradient unbiased (V3.2)."""
    off_policy_mask_threshold: float | None = None
    """Drop negative-advantage sequences whose mean log-ratio to the behaviour policy exceeds this (V3.2)."""
    keep_sampling_mask: bool = True
    """Where sampling was truncated, compare policies over the tokens it chose from (V3.2); False: over all tokens,
    though the sampler's log-probabilities are not."""
    keep_routing: bool = True
    """In a mixture-of-experts model, send tokens to the experts that they went to in the engine (V3.2); without effect
    on other models. False: wherever the learner's own rounding sends them."""
    mask_truncated_completions: bool = False
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    entropy_coef: float = 0.0
    """Weight of the mean entropy of all loss tokens, which is added to what is maximised."""
    top_entropy_quantile: float = Field(default=1.0, gt=0, le=1)
    """Share of the step's loss tokens that the policy loss acts on: those of the highest entropy at the start of the
    step, one more forward pass (arXiv 2506.01939, which takes 0.2). KL and entropy terms act on all."""
    max_staleness: int = Field(default=0, ge=0)
    """Steps that rollouts may run ahead of the learner. 0: every token of a step is drawn by the weights it updates.
    Otherwise rollouts and learning overlap, new weights reach rollouts in flight, a step takes the first groups that
    are complete, oldest first, and tokens older than this many steps carry no loss."""
    optim: Optim = Optim(learning_rate=2e-5)
    tokens_per_micro_batch: Positive = 4096
    """Token budget of one packed forward pass; the number of micro-batches follows from the work."""
    save_steps: Positive = 25

    @model_validator(mode="after")
    def _synchronises_what_it_uses(self) -> Self:
        if self.sync_ref_model and self.beta == 0:
            raise RecipeError(
                "grpo.sync_ref_model is on with beta = 0, which uses no reference; set beta, or sync_ref_model to false"
            )
        return self

    @model_validator(mode="after")
    def _cispo_has_a_cap(self) -> Self:
        if self.loss_type == "cispo" and (self.epsilon_high is None or self.epsilon_high < 1):
            raise RecipeError(
                f"grpo.epsilon_high = {self.epsilon_high} with loss_type = 'cispo': expected the absolute cap of the "
                "ratio, a number >= 1 such as 5.0, since a smaller one scales every token down; set epsilon_high"
            )
        return self


class Mixture(Value):
    """What changes in a distillation, by domain; what is not named stays as it was."""

    weights: Mapping[str, Annotated[float, Field(gt=0)]] = {}
    """w_i of the objective."""
    shares: Mapping[str, Annotated[float, Field(ge=0)]] = {}
    """Relative shares of the rollouts; 0 leaves a domain out."""
    # Not checked here, as in ``Domain``.
    teachers: Mapping[str, SkipValidation[Teacher]] = {}
    """By DOMAIN, or by DOMAIN.EFFORT where effort modes have teachers of their own."""


class Distill(Value):
    """Multi-teacher on-policy distillation: L = sum_i w_i KL(student || teacher_i), exact over the vocabulary,
    on the student's own rollouts (DeepSeek-V4, Eq. 29)."""

    teachers: TeacherLibrary
    """How specialists are loaded as teachers and their states cached."""
    start: Literal["base", "sft_mean"] = "base"
    """Where the student starts: at the base, or at the mean of the SFT models of the domains that have one, by
    ``Domain.weight``, which draws answers of the specialists' form from the first step on."""
    max_steps: Positive = 100
    rollouts_per_step: Positive = 64
    """Over all domains; each domain's share follows its ``share``."""
    num_generations: Positive = 1
    """Rollouts of one task, which ``reward_coef`` compares; a divisor of ``rollouts_per_step``."""
    schedule: Mapping[int, Mixture] = {}
    """Changes of weights, shares and teachers, by the number of steps after which they begin. A rollout keeps the
    weight and the teacher that held when it was asked for, so that with ``max_staleness`` both mixtures are in one step
    for a while."""
    loss: Literal["full_vocabulary", "sampled_token", "teacher_top_k"] = "full_vocabulary"
    """``full_vocabulary`` is the exact divergence. The others are what is used elsewhere, to compare with:
    ``sampled_token`` a policy gradient with log pi_T - log pi_theta of the token drawn as its advantage, in the form of
    MiMo-V2-Flash (MOPD, arXiv 2606.30406); ``teacher_top_k`` the divergence over the teacher's ``top_k`` likeliest
    tokens and one bucket for all others."""
    top_k: Positive = 64
    """Of ``teacher_top_k``; 64 as in NeMo-RL."""
    advantage_clip: float | None = Field(default=5.0, gt=0)
    """Bound of ``sampled_token``'s advantages, in nats (Kimi K3's R_max, whose value is not public); None for none."""
    importance_bounds: tuple[float, float] = (0.5, 5.0)
    """``sampled_token`` and ``reward_coef`` weigh a token by pi_theta / mu, mu the engine that drew it, within these
    bounds and by 0 outside of them (MiMo-V2-Flash; the values are IcePop's). A divergence over the vocabulary asks
    nothing of the token drawn, but the text before it was drawn by mu: with ``max_staleness`` it is weighed by the
    product of pi_theta / mu over the tokens before it in the rollout, cut off at these bounds."""
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """KL(student || teacher), KL(teacher || student), or the generalised Jensen-Shannon divergence (GKD,
    arXiv 2306.13649). ``sampled_token`` estimates the first only.

    A student that follows a reverse KL does not learn what it does not draw. Where its first answers are far from what
    the teachers say, the KL may stay high to the end (``kl/DOMAIN``); it falls with ``start = "sft_mean"``, or with
    ``jsd`` (benchmarks/results/merge_methods).
    """
    jsd_beta: float = Field(default=0.5, gt=0, lt=1)
    """The teacher's share of ``jsd``'s mixture; as in TRL, towards 0 it is forward and towards 1 reverse KL."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides both logits."""
    reduction: Literal["token", "sequence"] = "token"
    """Mean over the tokens of a step, or over its rollouts of each one's token mean, which gives a token of a short
    rollout more weight."""
    rescale_domains: bool = False
    """Multiply a domain's loss by clip(sigma_all / sigma_d, 0.25, 4), sigma the standard deviation of
    log pi_T - log mu over the tokens drawn in all domains and in this one, so that no teacher outweighs the others by
    the scale of what it says (DN-MOPD, https://github.com/LiXin97/DN-MOPD). A running estimate from the steps before,
    where DN-MOPD uses the step itself. Costs one more product with the teacher's head."""
    reward_coef: float = Field(default=0.0, ge=0)
    """Weight of a policy gradient on the domain's own reward, with the group-relative advantages of GRPO (the alpha of
    MOPD's outcome reward); 0 plays without scoring. A rollout that cannot be scored is distilled all the same."""
    scale_rewards: Literal["group", "batch", "none"] = "none"
    """As in ``GRPO``."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the exact KL to the model at the start of the stage."""
    max_staleness: int = Field(default=0, ge=0)
    """Steps that rollouts may run ahead of the learner, as in ``GRPO``."""
    rollouts_from: Literal["student", "teachers"] = "student"
    """Who plays the rollouts that are learned from. ``teachers`` is off-policy distillation, as of V3.2's specialist
    data: each domain's specialist plays its tasks."""
    optim: Optim = Optim(learning_rate=2e-5)
    tokens_per_micro_batch: Positive = 4096
    loss_chunk_tokens: Positive | None = None
    """Loss positions per [tokens x vocabulary] tile; None takes as many as fill 256 MiB, or 1 GiB on a GPU."""
    save_steps: Positive = 25

    @model_validator(mode="after")
    def _bounds_hold_one(self) -> Self:
        low, high = self.importance_bounds
        if not 0 <= low <= 1 <= high:
            raise RecipeError(
                f"distill.importance_bounds = {self.importance_bounds}: expected a lower bound in [0, 1] and an upper "
                "one >= 1, since the weight of a token drawn by the current policy is 1; change them"
            )
        return self

    @model_validator(mode="after")
    def _groups_fill_a_step(self) -> Self:
        if self.rollouts_per_step % self.num_generations or (self.reward_coef > 0 and self.num_generations < 2):
            raise RecipeError(
                f"distill.num_generations = {self.num_generations}, rollouts_per_step = {self.rollouts_per_step}, "
                f"reward_coef = {self.reward_coef}: expected a divisor of rollouts_per_step, and at least 2 with a "
                "reward, whose advantages compare the rollouts of a task; change them"
            )
        return self

    @model_validator(mode="after")
    def _changes_happen(self) -> Self:
        late = [step for step in self.schedule if not 0 < step < self.max_steps]
        if late:
            raise RecipeError(
                f"distill.schedule has a change after {late[0]} steps: expected 1 to {self.max_steps - 1}, within the "
                f"stage's max_steps = {self.max_steps}; what holds from the start belongs into the domains"
            )
        return self

    @model_validator(mode="after")
    def _one_token_shows_one_divergence(self) -> Self:
        if self.loss == "sampled_token" and self.divergence != "reverse_kl":
            raise RecipeError(
                f"distill.divergence = {self.divergence!r} with loss = 'sampled_token': expected 'reverse_kl', the "
                "only divergence whose gradient a token drawn by the student estimates; change one of them"
            )
        return self

    @model_validator(mode="after")
    def _samples_its_own_tokens(self) -> Self:
        asked = {
            "loss = 'sampled_token'": self.loss == "sampled_token",
            "reward_coef": self.reward_coef > 0,
            "max_staleness": self.max_staleness > 0,
            "rescale_domains": self.rescale_domains,
            "teachers in its schedule": any(mixture.teachers for mixture in self.schedule.values()),
        }
        wanted = [name for name, is_wanted in asked.items() if is_wanted]
        if wanted and self.rollouts_from == "teachers":
            raise RecipeError(
                f"distill.rollouts_from = 'teachers' with {wanted[0]}: expected rollouts of the student, whose tokens "
                "it is about; change one of the two"
            )
        return self


class WeightAverage(Value):
    """No training: the mean of the specialists' weights (model soups, arXiv 2203.05482), by ``Domain.weight``."""

    scale: float = Field(default=1.0, gt=0)
    """Multiplies the mean task vector, specialist minus base (task arithmetic, arXiv 2212.04089); 1 is the mean."""


class Ties(Value):
    """No training: TIES-merging (arXiv 2306.01708). Of each task vector, specialist minus base, the largest entries are
    kept; each weight moves by the mean, by ``Domain.weight``, of those with the sign of their sum."""

    density: float = Field(default=0.2, gt=0, le=1)
    """Share of entries kept of each task vector."""
    scale: float = Field(default=1.0, gt=0)
    """Multiplies the merged task vector (lambda in the paper)."""


class MixedRL(Value):
    """One GRPO run over the tasks and rewards of all domains, in place of a merge (V3.2's last stage).

    It starts from the base, as the student of a distillation does. Judge prompts take no part in it.
    """

    grpo: GRPO
    """``groups_per_step`` are over all domains; each domain's share follows its ``share``."""


class Evaluation(Value):
    """Held-out comparison of base, SFT, specialist and student."""

    num_tasks: Positive = 200
    """Held-out tasks per domain."""
    num_samples: Positive = 4
    """Sampled rollouts per task, in each effort mode of its domain."""
    greedy: bool = True
    """Whether each task is played once with greedy decoding, too, in each of these modes."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    bootstrap_resamples: Positive = 2000


class Workers(Value):
    """How rollouts are spread over Ray actors and what is done when something hangs or breaks."""

    num_actors: Positive = 1
    """Engines, each with a rollout worker of its own."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates: the embedded engine, or vLLM (``pip install posttrain[vllm]``), for GPUs."""
    engine_options: Mapping[str, Any] = {}
    """Arguments for vLLM's ``AsyncEngineArgs``. Where the policy is its own judge each actor has two engines: give
    each less than half of the memory with ``gpu_memory_utilization``."""
    cpus_per_actor: float = Field(default=1.0, gt=0)
    gpus_per_actor: float = Field(default=0.0, ge=0)
    """vLLM splits the model over them (tensor parallel)."""
    threads_per_actor: int = Field(default=0, ge=0)
    """Torch threads in an actor; 0 takes all cores of the node."""
    num_learners: Positive = 1
    """Learner processes on this machine that share each mini-batch of GRPO and distillation, each with a GPU of its
    own or its part of the cores, a copy of the weights, and teachers of its own for the samples it gets. The loss is
    one process's."""
    max_batch_size: Positive = 64
    """Rows decoded together by one engine."""
    max_batch_tokens: Positive = 1 << 17
    """Cached states of one engine, rows times the longest row; rows beyond it wait."""
    max_concurrent_episodes: Positive = 64
    max_concurrent_sandboxes: Positive = 16
    episode_deadline_s: float = Field(default=600.0, gt=0)
    """Time of one episode in which the model does not speak: its box, its tools, its environment."""
    reward_deadline_s: float = Field(default=300.0, gt=0)
    max_retries: int = Field(default=2, ge=0)
    """Extra attempts at an episode that failed for a reason that is not the policy's."""
    hang_timeout_s: float = Field(default=120.0, gt=0)
    """An engine or worker that does not answer, or has work and makes no progress, for this long is replaced, and its
    rollouts go on."""
    breaker_threshold: float = Field(default=0.5, gt=0, le=1)
    """Share of rollouts that the machinery fails at which a stage pauses rather than train on what is left."""
    breaker_patience_s: float = Field(default=600.0, ge=0)
    """How long it pauses, trying one group now and then, before it gives up; the run can be resumed."""
    min_group_size: int = Field(default=2, ge=2)
    """A group with fewer scored rollouts than this leaves the step."""


class JudgeTraining(Value):
    """Judge prompts among the generate prompts of a domain's GRPO: the policy learns to judge in the run it is judged
    in (DeepSeek-V4's generative reward model)."""

    tasks: JudgeTaskSource
    """Where judge prompts with known answers come from."""
    reward: Reward
    """What a judge reply earns."""
    groups_per_step: Positive = 2
    """Judge prompts per step, besides ``grpo.groups_per_step``; 10 to 30 % of all is usual."""
    num_generations: int = Field(default=8, ge=2)
    """Replies per prompt, spread evenly over its presentation orders."""
    max_tokens: Positive = 256
    """Budget of one reply; how tokens are drawn is the domain's ``sampling``."""
    weight: float = Field(default=1.0, gt=0)
    """Multiplies the advantages of judge replies."""
    anchor_share: Fraction = 0.25
    """Share of judge prompts that come from golden sets and pairs rather than from the run's own rollouts."""
    pool_size: Positive = 256
    """Newest prompts kept of the run's own rollouts, for each answer."""
    max_refills: int = Field(default=1, ge=0)
    """How often a step plays other prompts in place of those that all replies got right, or all wrong."""
    monitor: JudgeMonitor | None = None
    """What is measured on a frozen set before the first step and every ``monitor_steps``."""
    monitor_steps: Positive = 10
    max_bias: float = Field(default=0.1, gt=0)
    """The monitor's ``bias`` (mean score less the true share) above which the report warns of a lenient judge."""


class Effort(Value):
    """How one effort mode of a domain is played; what is None is the domain's own."""

    sampling: Sampling | None = None
    max_sequence_tokens: Positive | None = None
    """Context window of the mode, prompt and all turns."""
    length_penalty: Reward | None = None
    """Added to the domain's reward in this mode, such as ``rewards.length.OverlongPenalty``; in training only."""
    share: float = Field(default=1.0, gt=0)
    """Relative share of this mode in the merge, and where a task has fewer rollouts than there are modes."""
    grpo: GRPO | None = None
    """Trains a specialist of this mode alone, from the domain's SFT. Either all modes of a domain have a specialist
    each, by this or by ``teacher``, or one is trained in all of them by the domain's ``grpo``."""
    # Not checked here, as in ``Domain``.
    teacher: SkipValidation[Teacher | None] = None
    """A ready-made specialist of this mode."""

    @property
    def has_specialist(self) -> bool:
        """Whether the mode has a specialist of its own."""
        return self.grpo is not None or self.teacher is not None

    @model_validator(mode="after")
    def _one_source_of_skill(self) -> Self:
        if self.grpo is not None and self.teacher is not None:
            raise RecipeError(
                "effort: grpo and teacher are both set; expected either the training of this mode's specialist or a "
                "ready-made one; remove one of the two"
            )
        return self


class Domain(Value):
    """One skill: its tasks, how they are played and scored, and how its specialist is trained."""

    tasks: TaskSource
    reward: Reward | GroupReward
    environment: Environment
    sampling: Sampling = Sampling()
    sft: SFT | None = None
    grpo: GRPO | None = None
    judge_training: JudgeTraining | None = None
    """Judge prompts with known answers among those of ``grpo``; None trains generation only."""
    # Not checked here: on Python 3.11 an isinstance check would read the fingerprint, and so the checkpoint.
    teacher: SkipValidation[Teacher | None] = None
    """A ready-made specialist, instead of training one here."""
    weight: float = Field(default=1.0, gt=0)
    """w_i of the OPD objective."""
    share: float = Field(default=1.0, gt=0)
    """Relative share of this domain's rollouts in OPD."""
    max_sequence_tokens: Positive = 1024
    """Window of a whole episode, prompt and all turns; the model's own where that is shorter."""
    efforts: Mapping[str, Effort] = {}
    """How long to think, by mode of ``posttrain.conversation.effort``, of tasks that do not say it themselves: the
    rollouts of a group, and the demonstrations, take the modes in turn. Empty leaves it to the chat format."""

    @model_validator(mode="after")
    def _modes_fit_together(self) -> Self:
        for effort in self.efforts:
            temperature = self.sampling_at(check_effort(effort)).temperature
            if temperature != self.sampling.temperature:
                raise RecipeError(
                    f"domain: efforts[{effort!r}].sampling.temperature = {temperature}: expected that of the domain, "
                    f"{self.sampling.temperature}, since the learner has one; change it"
                )
        generations = self.grpo.num_generations if self.grpo is not None else 2 * len(self.efforts)
        if self.efforts and (generations % len(self.efforts) or generations < 2 * len(self.efforts)):
            raise RecipeError(
                f"domain: grpo.num_generations = {generations} with {len(self.efforts)} efforts: expected a multiple "
                "of their number, two a mode at least, since each has a baseline of its own; change it"
            )
        return self

    def modes_of(self, task: Task) -> tuple[str | None, ...]:
        """The effort modes a task is played in: its own, or those of the domain."""
        return (task.effort,) if task.effort is not None or not self.efforts else tuple(self.efforts)

    def draw_mode(self, task: Task, rng: random.Random) -> str | None:
        """One of these modes, by their shares."""
        modes = self.modes_of(task)
        weights = [self.efforts[mode].share if mode in self.efforts else 1.0 for mode in modes if mode is not None]
        return rng.choices(modes, weights)[0] if len(modes) > 1 else modes[0]

    def sampling_at(self, effort: str | None) -> Sampling:
        """How tokens are drawn in an effort mode."""
        mode = self.efforts.get(effort or "")
        return self.sampling if mode is None or mode.sampling is None else mode.sampling

    def window_at(self, effort: str | None) -> int:
        """The window of an episode in an effort mode."""
        mode = self.efforts.get(effort or "")
        return self.max_sequence_tokens if mode is None else mode.max_sequence_tokens or self.max_sequence_tokens

    @property
    def has_specialist_per_effort(self) -> bool:
        """Whether each effort mode has a specialist of its own, rather than the domain one for all of them."""
        return any(effort.has_specialist for effort in self.efforts.values())

    def in_mode(self, effort: str) -> Domain:
        """The domain as the specialist of one effort mode has it: only that mode, with its GRPO or its teacher."""
        mode = self.efforts[effort]
        return self.replace(
            tasks=TasksInMode(tasks=self.tasks, effort=effort),
            efforts={effort: mode.replace(grpo=None, teacher=None)},
            sft=None if mode.teacher is not None else self.sft,
            grpo=mode.grpo,
            teacher=mode.teacher,
        )

    @model_validator(mode="after")
    def _specialists_share_no_mode(self) -> Self:
        if not self.has_specialist_per_effort:
            return self
        without = [name for name, effort in self.efforts.items() if not effort.has_specialist]
        if without:
            raise RecipeError(
                f"domain: efforts[{without[0]!r}] has neither grpo nor teacher, while other modes have: expected a "
                "specialist for each mode, or one for all by the domain's own grpo; set one of the two or remove the "
                "others"
            )
        if self.grpo is not None or self.teacher is not None:
            raise RecipeError(
                f"domain: {'grpo' if self.grpo is not None else 'teacher'} is set and so are specialists of its "
                f"efforts {sorted(self.efforts)}: expected one for all modes or one for each; remove one of the two"
            )
        if self.sft is not None and all(effort.teacher is not None for effort in self.efforts.values()):
            raise RecipeError(
                "domain: sft is set and every effort has a ready-made teacher: expected an effort with grpo that "
                "starts from it; remove sft"
            )
        return self

    @model_validator(mode="after")
    def _one_source_of_skill(self) -> Self:
        if self.teacher is not None and (self.sft is not None or self.grpo is not None):
            raise RecipeError(
                "domain: teacher is set together with sft or grpo; expected either a ready-made teacher or stages "
                "that train one; remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _judges_within_grpo(self) -> Self:
        if self.judge_training is not None and self.grpo is None:
            raise RecipeError("domain: judge_training is set without grpo, whose steps it joins; set grpo or remove it")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Specialty:
    """What one specialist is for: a domain, or one effort mode of it."""

    domain_name: str
    effort: str | None
    """None: all modes of the domain."""
    domain: Domain
    """The domain as this specialist has it."""
    share: float
    """Of the domain, between 0 and 1."""

    @property
    def place(self) -> str:
        """Where the recipe has its settings."""
        place = f"domains.{self.domain_name}"
        return place if self.effort is None else f"{place}.efforts.{self.effort}"


class Recipe(Value):
    """A whole run as a value: specialists, their merge, and the proof."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    model: Model
    domains: Mapping[str, Domain] = Field(min_length=1)
    distill: Distill | WeightAverage | Ties | MixedRL | None = None
    """How the student comes to be. Distillation is the method; the others are there to compare it with."""
    evaluation: Evaluation = Evaluation()
    workers: Workers = Workers()
    substrate: Substrate | None = None
    """Kind of sandbox for tools and for running code; None when no domain needs one."""
    judge_lag_steps: Positive = 10
    """Age, in learner steps, of the policy snapshot that answers as judge."""
    seed: int = 0

    @model_validator(mode="after")
    def _scheduled_domains_exist(self) -> Self:
        if not isinstance(self.distill, Distill) or not self.distill.schedule:
            return self
        shares = {name: domain.share for name, domain in self.domains.items()}
        for step, mixture in sorted(self.distill.schedule.items()):
            strangers = ({*mixture.weights} | {*mixture.shares}) - {*self.domains}
            if strangers:
                raise RecipeError(
                    f"distill.schedule[{step}] names {min(strangers)!r}; expected domains: {sorted(self.domains)}"
                )
            strangers = {*mixture.teachers} - {*self.specialties()}
            if strangers:
                raise RecipeError(
                    f"distill.schedule[{step}].teachers names {min(strangers)!r}; expected names of specialists: "
                    f"{sorted(self.specialties())}"
                )
            shares |= mixture.shares
            if not any(shares.values()):
                raise RecipeError(f"distill.schedule[{step}].shares: all are 0; expected a domain to learn from")
        if self.distill.rollouts_per_step < len(self.domains) * self.distill.num_generations:
            raise RecipeError(
                f"distill.rollouts_per_step = {self.distill.rollouts_per_step} with a schedule: expected room for a "
                f"group of every domain, {len(self.domains) * self.distill.num_generations}; raise it"
            )
        return self

    @model_validator(mode="after")
    def _student_has_a_start(self) -> Self:
        wants_mean = isinstance(self.distill, Distill) and self.distill.start == "sft_mean"
        if wants_mean and all(domain.sft is None for domain in self.domains.values()):
            raise RecipeError(
                "distill.start = 'sft_mean' and no domain has sft: expected one at least; set it, or start from 'base'"
            )
        return self

    @model_validator(mode="after")
    def _specialists_have_names(self) -> Self:
        for name, domain in self.domains.items():
            for effort in domain.efforts if domain.has_specialist_per_effort else ():
                if specialist_name(name, effort) in self.domains:
                    raise RecipeError(
                        f"domains.{specialist_name(name, effort)} has the name of the specialist of domains.{name} at "
                        f"effort {effort!r}; expected names that tell them apart; rename the domain"
                    )
        return self

    def specialties(self) -> dict[str, Specialty]:
        """By the specialist's name, which its stages and its teacher have too: DOMAIN, or DOMAIN.EFFORT where each
        effort mode of the domain has its own."""
        found = {}
        for name, domain in self.domains.items():
            if not domain.has_specialist_per_effort:
                found[name] = Specialty(domain_name=name, effort=None, domain=domain, share=1.0)
                continue
            whole = sum(mode.share for mode in domain.efforts.values())
            for effort, mode in domain.efforts.items():
                found[specialist_name(name, effort)] = Specialty(
                    domain_name=name, effort=effort, domain=domain.in_mode(effort), share=mode.share / whole
                )
        return found

    def specialist_of(self, task: Task) -> str:
        """Name of the specialist of a task's domain and effort mode."""
        per_effort = self.domains[task.domain].has_specialist_per_effort
        return specialist_name(task.domain, task.effort) if per_effort else task.domain

    def grpo_settings(self) -> list[GRPO]:
        """Of all stages that train with it."""
        trained = [specialty.domain.grpo for specialty in self.specialties().values()]
        found = [grpo for grpo in trained if grpo is not None]
        return [*found, self.distill.grpo] if isinstance(self.distill, MixedRL) else found


def specialist_name(domain: str, effort: str | None) -> str:
    """Of the specialist of one effort mode."""
    return f"{domain}.{effort}"
