"""The GRPO family of losses as pure functions of flat token vectors. No padding, no configuration but the recipe's.

All per-token inputs are 1-D over the loss tokens of a micro-batch; ``segment`` says which row (sample) a token belongs
to. A row always lies whole in one micro-batch. Denominators come from outside (``Normaliser``), so the losses of
the micro-batches of one optimizer step add up to the loss of the whole mini-batch however it was packed.

Every term equals TRL 1.16's ``GRPOTrainer._compute_loss`` at one gradient accumulation step, in value and gradient;
the tests run both. The old log-probabilities are the behaviour policy's, whatever engine it ran in, so the ratio covers
staleness and the difference between engine and learner together. With ``importance_sampling_correction`` they are the
learner's own, computed before the step, and what is between these and the engine's is a weight of its own.

Shape letters: ``N`` loss tokens, ``S`` rows of the micro-batch.
"""

from __future__ import annotations

import math
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
    old_logprobs: torch.Tensor | None = None
    """Of the learner's own policy at the start of the step; needed with ``importance_sampling_correction``. None: the
    ratio is to the behaviour policy."""
    high_entropy: torch.Tensor | None = None
    """Bool: where the loss acts; needed when ``top_entropy_quantile`` is below 1."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not isinstance(value, torch.Tensor):
                continue
            if value.shape != self.logprobs.shape:
                raise ValueError(
                    f"PolicyTokens.{name} has shape {tuple(value.shape)} but logprobs has "
                    f"{tuple(self.logprobs.shape)}; expected one entry per loss token"
                )


def grpo_loss(tokens: PolicyTokens, config: GRPO, *, normaliser: Normaliser) -> tuple[torch.Tensor, Metrics]:
    """This micro-batch's share of the loss (a float32 scalar to call ``backward`` on) and its metrics.

    Raises ``ValueError`` when the tokens lack what a term of ``config`` needs.
    """
    _check_inputs(tokens, config)
    logprobs, behaviour = tokens.logprobs.float(), tokens.behaviour_logprobs.float()
    old = behaviour if tokens.old_logprobs is None else tokens.old_logprobs.float()
    log_ratio = logprobs - old
    level = "sequence" if config.loss_type == "gspo" else config.importance_sampling_level
    ratio = importance_ratio(log_ratio, tokens, level)
    correction = engine_correction(old - behaviour, tokens, config)
    loss = policy_loss(log_ratio, ratio, correction, tokens, config)
    log_to_behaviour = (logprobs - behaviour).detach()
    metrics = _metrics(tokens, log_to_behaviour, ratio.detach(), config)
    if config.off_policy_mask_threshold is not None:
        keep = off_policy_mask(log_to_behaviour, tokens, config.off_policy_mask_threshold)
        loss = loss * keep
        metrics["off_policy_masked"] = _mean(1 - keep)
    if config.top_entropy_quantile < 1.0 and tokens.high_entropy is not None:
        loss = loss * tokens.high_entropy
    if correction is not None:
        metrics |= _engine_metrics(old - behaviour, correction, config)
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


def engine_correction(log_ratio: torch.Tensor, tokens: PolicyTokens, config: GRPO) -> torch.Tensor | None:
    """Weight ``w`` from the engine's distribution to the learner's old one, [N], or None where nothing is corrected.

    ``log_ratio`` is ``log pi_old - log pi_engine``. ``w`` is its exponential per token, or for the whole row that of
    the sum (``sequence``) or of the mean (``geometric``); ``truncate`` clamps it to ``[clip_min, clip_max]``, ``mask``
    makes it 0 outside. TRL 1.16 ``vllm_importance_sampling_mode``, which lacks ``geometric``. A row's sum grows with
    its length, so ``sequence`` changes or drops long rows more often; its mean does not.
    """
    if config.importance_sampling_correction is None:
        return None
    level, how = config.importance_sampling_correction.split("_")
    if level == "sequence":
        log_ratio = segment_sum(log_ratio, tokens)[tokens.segment]
    elif level == "geometric":
        log_ratio = segment_mean(log_ratio, tokens)[tokens.segment]
    weight = log_ratio.detach().exp()
    low, high = config.importance_sampling_clip_min, config.importance_sampling_clip_max
    if how == "truncate":
        return weight.clamp(min=low, max=high)
    return weight.masked_fill((weight < low) | (weight > high), 0.0)


def policy_loss(
    log_ratio: torch.Tensor,
    ratio: torch.Tensor,
    correction: torch.Tensor | None,
    tokens: PolicyTokens,
    config: GRPO,
) -> torch.Tensor:
    """The surrogate of ``config.loss_type`` per token, [N], corrected for the engine, before masks and reduction."""
    logprobs, advantages = tokens.logprobs.float(), tokens.advantages.float()
    if config.loss_type == "vespo":
        return vespo_surrogate(log_ratio.detach(), correction, tokens, config)
    if config.loss_type == "cispo":
        loss = cispo_surrogate(ratio, logprobs, advantages, cap=_epsilon_high(config))
    elif config.loss_type == "sapo":
        loss = sapo_surrogate(
            ratio, advantages, tau_pos=config.sapo_temperature_pos, tau_neg=config.sapo_temperature_neg
        )
    else:
        loss = clipped_surrogate(ratio, advantages, low=config.epsilon, high=_epsilon_high(config), delta=config.delta)
    return loss if correction is None else loss * correction


def clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, *, low: float, high: float, delta: float | None
) -> torch.Tensor:
    """``-min( min(r, delta) A, clip(r, 1 - low, 1 + high) A )``, [N].

    PPO's clip (arXiv 1707.06347) as GRPO uses it (arXiv 2402.03300), with clip-higher (DAPO,
    arXiv 2503.14476) and the two-sided bound ``delta``, which acts on negative advantages only
    (INTELLECT-2, arXiv 2505.07291). From ``delta = 1 + high`` on it is the dual clip of arXiv 1912.09729, Eq. 5, with
    ``c = delta``: ``max(min(r A, clip(r) A), c A)`` for ``A < 0``.
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


def vespo_surrogate(
    log_ratio: torch.Tensor, correction: torch.Tensor | None, tokens: PolicyTokens, config: GRPO
) -> torch.Tensor:
    """``-sg[phi(w)] A log pi``, [N], with ``phi(w) = e^lam w^k e^(-lam w)`` and the row's whole ratio
    ``w = prod_t r_t``, so that no term is normalised by length (VESPO, arXiv 2602.10693).

    ``k`` and ``lam`` go by the sign of A. A correction for the engine multiplies ``w``. TRL ``get_gamma_weights``, with
    its bounds: each log-ratio within 20, ``log w`` and the correction's logarithm within [log 1e-8, 20].
    """
    floor = math.log(1e-8)
    log_w_S = segment_sum(log_ratio.clamp(-20.0, 20.0), tokens)
    if correction is not None:
        log_correction = correction.log().clamp(floor, 20.0)
        by_token = (config.importance_sampling_correction or "").startswith("token")
        log_w_S = log_w_S + (segment_sum if by_token else segment_mean)(log_correction, tokens)
    log_w = log_w_S.clamp(floor, 20.0)[tokens.segment]
    advantages = tokens.advantages.float()
    good = advantages >= 0
    k = torch.where(good, config.vespo_k_pos, config.vespo_k_neg)
    lam = torch.where(good, config.vespo_lambda_pos, config.vespo_lambda_neg).clamp(min=1e-4)
    phi = (lam + k * log_w - lam * log_w.exp()).exp()
    return -phi * advantages * tokens.logprobs.float()


def high_entropy_mask(entropies: torch.Tensor, threshold: torch.Tensor | float) -> torch.Tensor:
    """Bool: the tokens that fork the text, those whose entropy is at least ``threshold`` (arXiv 2506.01939, Eq. 5).

    TRL ``get_high_entropy_mask``, where the threshold is the ``1 - top_entropy_quantile`` quantile.
    """
    return entropies >= threshold


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

    ``grpo``, ``gspo``, ``sapo``: mean over rows of the row's token mean. ``luspo``: mean over rows of the row's token
    sum (arXiv 2602.05261). ``dr_grpo``: sum / (rows x completion budget) (arXiv 2503.20783). ``dapo``, ``cispo``,
    ``vespo``, ``bnpo``: sum / loss tokens of the mini-batch. TRL's bnpo divides by the tokens of each micro-batch
    instead, which depends on how rows were packed; with one micro-batch both agree.
    """
    if loss_type in ("grpo", "gspo", "sapo"):
        return segment_mean(loss, tokens).sum() / max(normaliser.num_rows, 1)
    if loss_type == "luspo":
        return loss.sum() / max(normaliser.num_rows, 1)
    if loss_type == "dr_grpo":
        return loss.sum() / max(normaliser.num_rows * normaliser.max_completion_tokens, 1)
    return loss.sum() / max(normaliser.num_tokens, 1)


def entropy_bonus(entropies: torch.Tensor, normaliser: Normaliser) -> torch.Tensor:
    """Mean entropy per loss token in nats, whatever the loss type's own reduction; subtracted from the loss."""
    return entropies.sum() / max(normaliser.num_tokens, 1)


def segment_mean(values: torch.Tensor, tokens: PolicyTokens) -> torch.Tensor:
    """Mean over each row's tokens, [S]; 0 for a row without tokens."""
    return segment_sum(values, tokens) / segment_sum(torch.ones_like(values), tokens).clamp(min=1)


def segment_sum(values: torch.Tensor, tokens: PolicyTokens) -> torch.Tensor:
    """Sum over each row's tokens, [S]."""
    return values.new_zeros(tokens.num_segments).index_add(0, tokens.segment, values)


def _metrics(tokens: PolicyTokens, log_to_behaviour: torch.Tensor, ratio: torch.Tensor, config: GRPO) -> Metrics:
    """What every GRPO step reports. Clip fractions count tokens whose gradient the clip stopped or capped."""
    metrics = {
        "ratio": _mean(ratio),
        # K3 under the behaviour policy, which drew the tokens: KL(behaviour || policy).
        "kl_behaviour": _mean(log_to_behaviour.exp() - log_to_behaviour - 1),
    }
    if tokens.entropies is not None:
        metrics["entropy"] = _mean(tokens.entropies.float())
    positive, negative = tokens.advantages > 0, tokens.advantages < 0
    if config.loss_type == "cispo":
        metrics["clip_fraction_high"] = _mean(((ratio > _epsilon_high(config)) & positive).float())
    elif config.loss_type not in ("sapo", "vespo"):
        metrics["clip_fraction_low"] = _mean(((ratio < 1 - config.epsilon) & negative).float())
        metrics["clip_fraction_high"] = _mean(((ratio > 1 + _epsilon_high(config)) & positive).float())
    return metrics


def _engine_metrics(log_ratio: torch.Tensor, correction: torch.Tensor, config: GRPO) -> Metrics:
    """How far engine and learner are apart, before the correction, and the share of tokens that lost their weight or
    were clamped."""
    weight = log_ratio.exp()
    at_edge = (correction == config.importance_sampling_clip_max) | (correction <= config.importance_sampling_clip_min)
    return {
        "engine_ratio": _mean(weight),
        "kl_engine": _mean(weight - log_ratio - 1),
        "engine_corrected": _mean(at_edge.float()),
    }


def _mean(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = values.detach()
    return values.sum(), torch.tensor(float(values.numel()), device=values.device)


def _epsilon_high(config: GRPO) -> float:
    return config.epsilon if config.epsilon_high is None else config.epsilon_high


def _check_inputs(tokens: PolicyTokens, config: GRPO) -> None:
    for field, used, needed, off in (
        ("beta", config.beta != 0.0, "ref_logprobs", 0),
        ("entropy_coef", config.entropy_coef != 0.0, "entropies", 0),
        ("importance_sampling_correction", config.importance_sampling_correction is not None, "old_logprobs", None),
        ("top_entropy_quantile", config.top_entropy_quantile < 1.0, "high_entropy", 1),
    ):
        if used and getattr(tokens, needed) is None:
            raise ValueError(
                f"GRPO.{field} = {getattr(config, field)} needs PolicyTokens.{needed}; pass them or set it to {off}"
            )
