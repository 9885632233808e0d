"""The GRPO family of losses as pure functions of flat token vectors. No padding, no configuration but the recipe's.

All per-token inputs are 1-D over the loss tokens of a micro-batch; ``segment`` says which row (sample) a token belongs
to. A row always lies whole in one micro-batch. Denominators come from outside (``Normaliser``), so the losses of
the micro-batches of one optimizer step add up to the loss of the whole mini-batch however it was packed.

Every term equals TRL 1.16's ``GRPOTrainer._compute_loss`` at one gradient accumulation step, in value and gradient;
the tests run both. The old log-probabilities are the behaviour policy's, whatever engine it ran in, so the ratio covers
staleness and the difference between engine and learner together.

Shape letters: ``N`` loss tokens, ``S`` rows of the micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from posttrain.config import GRPO

Metrics = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Name -> (numerator, denominator), detached scalars. Add both over micro-batches and processes, then divide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Normaliser:
    """Denominators of the whole mini-batch (one optimizer step, over all processes)."""

    num_rows: int
    """All samples, including those whose tokens carry no loss, such as masked truncated ones."""
    num_tokens: int
    """Loss tokens."""
    max_completion_tokens: int
    """The generation budget of one sample; only dr_grpo divides by it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTokens:
    """The loss tokens of one micro-batch. Vectors are [N]."""

    logprobs: torch.Tensor
    """Of the policy being trained; the only input a gradient flows to, besides ``entropies``."""
    behaviour_logprobs: torch.Tensor
    """Of the policy that sampled, as its engine reported them; finite."""
    advantages: torch.Tensor
    """The advantage of the token's sample."""
    segment: torch.Tensor
    """Row of each token, int64 in [0, num_segments)."""
    num_segments: int
    ref_logprobs: torch.Tensor | None = None
    """Of the model at the start of the stage; needed when ``beta`` is not 0."""
    entropies: torch.Tensor | None = None
    """Of the policy being trained, in nats; needed when ``entropy_coef`` is not 0."""

    def __post_init__(self) -> None:
        for name in ("behaviour_logprobs", "advantages", "segment", "ref_logprobs", "entropies"):
            value = getattr(self, name)
            if value is not None and value.shape != self.logprobs.shape:
                raise ValueError(
                    f"PolicyTokens.{name} has shape {tuple(value.shape)} but logprobs has "
                    f"{tuple(self.logprobs.shape)}; expected one entry per loss token"
                )


def grpo_loss(tokens: PolicyTokens, config: GRPO, *, normaliser: Normaliser) -> tuple[torch.Tensor, Metrics]:
    """This micro-batch's share of the loss (a float32 scalar to call ``backward`` on) and its metrics.

    Raises ``ValueError`` when ``beta`` or ``entropy_coef`` is set but the tokens lack what they need.
    """
    _check_inputs(tokens, config)
    logprobs, advantages = tokens.logprobs.float(), tokens.advantages.float()
    log_ratio = logprobs - tokens.behaviour_logprobs.float()
    ratio = importance_ratio(log_ratio, tokens, config.importance_sampling_level)
    loss = policy_loss(ratio, logprobs, advantages, config)
    metrics = _metrics(tokens, log_ratio.detach(), ratio.detach(), config)
    if config.off_policy_mask_threshold is not None:
        keep = off_policy_mask(log_ratio.detach(), tokens, config.off_policy_mask_threshold)
        loss = loss * keep
        metrics["off_policy_masked"] = _mean(1 - keep)
    if config.beta != 0.0 and tokens.ref_logprobs is not None:
        kl = reference_kl(logprobs, tokens.ref_logprobs.float(), ratio if config.use_bias_correction_kl else None)
        loss = loss + config.beta * kl
        metrics["kl_ref"] = _mean(kl)
    total = reduce_tokens(loss, tokens, config.loss_type, normaliser)
    if config.entropy_coef != 0.0 and tokens.entropies is not None:
        total = total - config.entropy_coef * entropy_bonus(tokens.entropies.float(), normaliser)
    return total, metrics


def importance_ratio(log_ratio: torch.Tensor, tokens: PolicyTokens, level: str) -> torch.Tensor:
    """``pi_theta / pi_behaviour`` per token, [N].

    ``sequence`` gives every token of a row the row's geometric mean, ``exp(mean_t log_ratio_t)`` (GSPO,
    arXiv 2507.18071). TRL ``_compute_loss``, ``log_importance_weights``.
    """
    if level == "sequence":
        log_ratio = segment_mean(log_ratio, tokens)[tokens.segment]
    return log_ratio.exp()


def policy_loss(ratio: torch.Tensor, logprobs: torch.Tensor, advantages: torch.Tensor, config: GRPO) -> torch.Tensor:
    """The surrogate of ``config.loss_type`` per token, [N], before masks and reduction."""
    if config.loss_type == "cispo":
        return cispo_surrogate(ratio, logprobs, advantages, cap=_epsilon_high(config))
    if config.loss_type == "sapo":
        return sapo_surrogate(
            ratio, advantages, tau_pos=config.sapo_temperature_pos, tau_neg=config.sapo_temperature_neg
        )
    return clipped_surrogate(ratio, advantages, low=config.epsilon, high=_epsilon_high(config), delta=config.delta)


def clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, *, low: float, high: float, delta: float | None
) -> torch.Tensor:
    """``-min( min(r, delta) A, clip(r, 1 - low, 1 + high) A )``, [N].

    PPO's clip (arXiv 1707.06347) as GRPO uses it (arXiv 2402.03300), with clip-higher (DAPO,
    arXiv 2503.14476) and the two-sided bound ``delta``, which acts on negative advantages only
    (INTELLECT-2, arXiv 2505.07291).
    """
    clipped = ratio.clamp(1 - low, 1 + high)
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.min(bounded * advantages, clipped * advantages)


def cispo_surrogate(
    ratio: torch.Tensor, logprobs: torch.Tensor, advantages: torch.Tensor, *, cap: float
) -> torch.Tensor:
    """``-sg[min(r, cap)] A log pi``, [N]: clips the weight, never the gradient (arXiv 2506.13585)."""
    return -ratio.clamp(max=cap).detach() * advantages * logprobs


def sapo_surrogate(ratio: torch.Tensor, advantages: torch.Tensor, *, tau_pos: float, tau_neg: float) -> torch.Tensor:
    """``-(4 / tau) sigmoid(tau (r - 1)) A``, [N], tau by the sign of A: a soft gate for a clip (arXiv 2511.20347)."""
    tau = torch.where(advantages > 0, tau_pos, tau_neg)
    return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages


def off_policy_mask(log_ratio: torch.Tensor, tokens: PolicyTokens, threshold: float) -> torch.Tensor:
    """1 to keep, 0 to drop, [N]: drops negative-advantage rows whose mean ``-log_ratio`` exceeds ``threshold``.

    DeepSeek-V3.2 (arXiv 2512.02556), Eq. 9; TRL ``get_off_policy_mask``. The mask multiplies
    the surrogate, not the KL.
    """
    row_kl = segment_mean(-log_ratio, tokens)[tokens.segment]
    return ((tokens.advantages >= 0) | (row_kl <= threshold)).to(log_ratio.dtype)


def reference_kl(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, ratio: torch.Tensor | None = None) -> torch.Tensor:
    """K3 estimate of KL(policy || reference) per token, [N]: ``exp(d) - d - 1`` with ``d = ref - current``.

    Multiplied by ``ratio`` when one is given, with its gradient, which makes the gradient of the estimate
    unbiased under the behaviour policy (DeepSeek-V3.2, arXiv 2512.02556). K3: http://joschu.net/blog/kl-approx.html.
    """
    difference = ref_logprobs - logprobs
    kl = difference.exp() - difference - 1
    return kl if ratio is None else kl * ratio


def reduce_tokens(loss: torch.Tensor, tokens: PolicyTokens, loss_type: str, normaliser: Normaliser) -> torch.Tensor:
    """Token losses to a scalar.

    ``grpo``, ``sapo``: mean over rows of the row's token mean. ``dr_grpo``: sum / (rows x completion budget)
    (arXiv 2503.20783). ``dapo``, ``cispo``, ``bnpo``: sum / loss tokens of the mini-batch. TRL's bnpo divides by
    the tokens of each micro-batch instead, which depends on how rows were packed; with one micro-batch both agree.
    """
    if loss_type in ("grpo", "sapo"):
        return segment_mean(loss, tokens).sum() / max(normaliser.num_rows, 1)
    if loss_type == "dr_grpo":
        return loss.sum() / max(normaliser.num_rows * normaliser.max_completion_tokens, 1)
    return loss.sum() / max(normaliser.num_tokens, 1)


def entropy_bonus(entropies: torch.Tensor, normaliser: Normaliser) -> torch.Tensor:
    """Mean entropy per loss token in nats, whatever the loss type's own reduction; subtracted from the loss."""
    return entropies.sum() / max(normaliser.num_tokens, 1)


def segment_mean(values: torch.Tensor, tokens: PolicyTokens) -> torch.Tensor:
    """Mean over each row's tokens, [S]; 0 for a row without tokens."""
    sums = values.new_zeros(tokens.num_segments).index_add(0, tokens.segment, values)
    counts = values.new_zeros(tokens.num_segments).index_add(0, tokens.segment, torch.ones_like(values))
    return sums / counts.clamp(min=1)


def _metrics(tokens: PolicyTokens, log_ratio: torch.Tensor, ratio: torch.Tensor, config: GRPO) -> Metrics:
    """What every GRPO step reports. Clip fractions count tokens whose gradient the clip stopped or capped."""
    token_ratio = log_ratio.exp()
    metrics = {
        "ratio": _mean(ratio),
        # K3 under the behaviour policy, which drew the tokens: KL(behaviour || policy).
        "kl_behaviour": _mean(token_ratio - log_ratio - 1),
    }
    if tokens.entropies is not None:
        metrics["entropy"] = _mean(tokens.entropies.float())
    positive, negative = tokens.advantages > 0, tokens.advantages < 0
    if config.loss_type == "cispo":
        metrics["clip_fraction_high"] = _mean(((ratio > _epsilon_high(config)) & positive).float())
    elif config.loss_type != "sapo":
        metrics["clip_fraction_low"] = _mean(((ratio < 1 - config.epsilon) & negative).float())
        metrics["clip_fraction_high"] = _mean(((ratio > 1 + _epsilon_high(config)) & positive).float())
    return metrics


def _mean(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = values.detach()
    return values.sum(), torch.tensor(float(values.numel()), device=values.device)


def _epsilon_high(config: GRPO) -> float:
    return config.epsilon if config.epsilon_high is None else config.epsilon_high


def _check_inputs(tokens: PolicyTokens, config: GRPO) -> None:
    if config.beta != 0.0 and tokens.ref_logprobs is None:
        raise ValueError(f"GRPO.beta = {config.beta} needs PolicyTokens.ref_logprobs; pass them or set beta to 0")
    if config.entropy_coef != 0.0 and tokens.entropies is None:
        raise ValueError(
            f"GRPO.entropy_coef = {config.entropy_coef} needs PolicyTokens.entropies; pass them or set it to 0"
        )
