"""Distillation's losses against float64 and against enumeration of what the student could have drawn."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.divergence.reference import divergence_reference
from posttrain.errors import RecipeError
from posttrain.learner.distill_losses import (
    bucket_divergence,
    gated_policy_gradient,
    prefix_importance,
    sampled_token_advantages,
)
from posttrain.learner.distillation import DistillObjective
from posttrain.learner.logprobs import bucket_logprobs, top_k_logprobs
from posttrain.learner.packing import PackedBatch, Totals
from posttrain.types import KeptTokens, Sample, Tokens
from tests.test_posttrain_learner import (
    VOCABULARY,
    distill_objective,
    make_learner,
    make_samples,
    slow_kl,
    tiny_llama,
    token_ids,
    token_logprobs,
)

N, D, V, K = 7, 6, 19, 4


def problem(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, a head, and distinct ids of each position."""
    generator = torch.Generator().manual_seed(1)
    hidden, head = (torch.randn(rows, D, generator=generator).to(dtype).requires_grad_() for rows in (N, V))
    ids = torch.stack([torch.randperm(V, generator=generator)[:K] for _ in range(N)])
    return hidden, head, ids


def plain_buckets(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    p = logits.softmax(-1)
    picked = p.gather(-1, ids)
    return torch.cat([picked, 1 - picked.sum(-1, keepdim=True)], -1).log()


@pytest.mark.parametrize("chunk_tokens", [1, 3, 64])
def test_bucket_logprobs_equal_float64(chunk_tokens: int) -> None:
    weights = torch.linspace(-1, 2, N * (K + 1), dtype=torch.float64).view(N, K + 1)
    results = []
    for function in (
        lambda h, w, ids: bucket_logprobs(h, w, ids, temperature=0.7, chunk_tokens=chunk_tokens),
        lambda h, w, ids: plain_buckets(h @ w.T / 0.7, ids),
    ):
        hidden, head, ids = problem()
        logprobs = function(hidden, head, ids)
        (logprobs * weights).sum().backward()
        results.append((logprobs, hidden.grad, head.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_bfloat16_buckets_are_exact_to_the_products_and_a_tiny_rest_is_not_lost() -> None:
    hidden, head, ids = problem(torch.bfloat16)
    exact = plain_buckets(hidden.detach().double() @ head.detach().double().T, ids)
    torch.testing.assert_close(bucket_logprobs(hidden, head, ids).double(), exact, rtol=1e-5, atol=1e-5)
    certain = torch.tensor([[60.0, 0.0, 0.0, 0.0]])
    rest = bucket_logprobs(torch.ones(1, 1), certain.T, torch.tensor([[0]]))[0, 1]
    assert rest.item() == pytest.approx(torch.tensor(3.0).log().item() - 60)


def test_the_teachers_likeliest_tokens_are_those_of_its_capped_logits() -> None:
    hidden, head, _ = problem()
    logits = 3 * torch.tanh(hidden @ head.T / 3) / 0.7
    ids, logprobs = top_k_logprobs(hidden, head, K, temperature=0.7, logit_cap=3.0, chunk_tokens=2)
    assert torch.equal(ids, logits.topk(K).indices)
    torch.testing.assert_close(logprobs, plain_buckets(logits, ids).detach())
    assert top_k_logprobs(hidden, head, 1000)[1].shape == (N, V)


def kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    log_p, log_q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def test_buckets_bound_the_divergence_from_below_and_reach_it() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 50, V, dtype=torch.float64) * 2
    exact, previous = kl(student, teacher), torch.zeros(50, dtype=torch.float64)
    for k in range(1, V):
        ids = teacher.topk(k).indices
        found = bucket_divergence(plain_buckets(student, ids), plain_buckets(teacher, ids))
        assert (found >= previous - 1e-12).all()
        previous = found
    torch.testing.assert_close(previous, exact)


def descend(loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A student's distribution after gradient descent from a uniform one."""
    logits = torch.zeros(V, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=2.0)
    for _ in range(600):
        optimizer.zero_grad()
        loss(logits).backward()
        optimizer.step()
    return logits.detach().softmax(-1)


def test_without_the_bucket_of_the_rest_the_student_leaves_the_teachers_support() -> None:
    torch.manual_seed(3)
    teacher = torch.randn(V, dtype=torch.float64)
    ids = teacher.topk(K).indices[None]
    teacher_1B = plain_buckets(teacher[None], ids)
    mass = teacher_1B[0, :-1].exp().sum()

    def truncated(logits: torch.Tensor) -> torch.Tensor:
        return bucket_divergence(plain_buckets(logits[None], ids)[:, :-1], teacher_1B[:, :-1]).sum()

    def whole(logits: torch.Tensor) -> torch.Tensor:
        return bucket_divergence(plain_buckets(logits[None], ids), teacher_1B).sum()

    left = descend(truncated)
    assert truncated(left.log()) < 0
    assert left[ids[0]].sum() < 0.6 * mass
    stayed = descend(whole)
    torch.testing.assert_close(stayed[ids[0]], teacher_1B[0, :-1].exp(), rtol=1e-3, atol=1e-4)


def test_the_sampled_token_estimates_the_exact_gradient_without_bias() -> None:
    """Averaged over all tokens as often as the student, or an older one, draws them."""
    torch.manual_seed(4)
    student, teacher, older = torch.randn(3, V, dtype=torch.float64)
    student.requires_grad_()
    (exact,) = torch.autograd.grad(kl(student, teacher), student)
    for drawn_by in (student.detach(), older):
        log_p, log_mu = student.log_softmax(-1), drawn_by.log_softmax(-1)
        advantages = sampled_token_advantages(teacher.log_softmax(-1), log_p)
        loss, weight = gated_policy_gradient(log_p, log_mu, advantages, 0.0, 1e9)
        (estimate,) = torch.autograd.grad((log_mu.exp() * loss).sum(), student)
        torch.testing.assert_close(estimate, exact)
        assert float((log_mu.exp() * weight).sum()) == pytest.approx(1.0)
    _, gated = gated_policy_gradient(log_p, log_mu, advantages, 0.5, 2.0)
    ratio = (log_p - log_mu).exp()
    assert torch.equal(gated == 0, (ratio < 0.5) | (ratio > 2.0))


def with_loss(objective: DistillObjective, loss: str, **changes: object) -> DistillObjective:
    return replace(objective, config=objective.config.replace(loss=loss, **changes))


def test_all_but_one_buckets_are_the_full_vocabulary() -> None:
    samples = make_samples(tiny_llama(), teachers=("a", "b"))
    objective = distill_objective(samples, {"a": tiny_llama(seed=3), "b": tiny_llama(seed=4, width=24)})
    exact = make_learner(tiny_llama()).update(samples, objective)
    found = make_learner(tiny_llama()).update(samples, with_loss(objective, "teacher_top_k", top_k=10_000))
    few = make_learner(tiny_llama()).update(samples, with_loss(objective, "teacher_top_k", top_k=2))
    for name in ("loss", "kl/math", "kl/code", "grad_norm"):
        assert found[name] == pytest.approx(exact[name], rel=1e-4)
    for metrics in (exact, found, few):
        assert (metrics["clamped_share"], metrics["nonfinite_share"]) == (0.0, 0.0)
    assert 0 < few["kl"] < exact["kl"]


@pytest.mark.parametrize("loss", ["sampled_token", "teacher_top_k"])
def test_the_other_losses_vanish_at_the_teacher_and_lead_to_it(loss: str) -> None:
    model = tiny_llama()
    samples = make_samples(model, teachers=("a",))
    objective = with_loss(distill_objective(samples, {"a": tiny_llama()}), loss)
    at_the_teacher = make_learner(tiny_llama()).update(samples, objective)
    # The cache holds bfloat16.
    assert at_the_teacher["kl"] == pytest.approx(0, abs=2e-3)
    objective = with_loss(distill_objective(samples, {"a": tiny_llama(seed=3)}), loss, advantage_clip=1.0)
    learner = make_learner(model)
    exact = replace(objective, config=objective.config.replace(loss="full_vocabulary"))
    before = learner.evaluate(samples, exact)["kl"]
    metrics = [learner.update(samples, objective) for _ in range(4)]
    assert learner.evaluate(samples, exact)["kl"] < before
    if loss == "sampled_token":
        assert 0 < metrics[0]["clamped_share"] < 1
        assert metrics[0]["importance_weight"] == 1.0


def test_a_step_of_the_other_losses_does_not_depend_on_the_token_budget() -> None:
    samples = make_samples(tiny_llama(seed=1), teachers=("a", "b"))
    teachers = {"a": tiny_llama(seed=3), "b": tiny_llama(seed=4)}
    for loss in ("sampled_token", "teacher_top_k"):
        objective = with_loss(distill_objective(samples, teachers), loss)
        whole, packed = (make_learner(tiny_llama(), budget=size).update(samples, objective) for size in (4096, 10))
        for name in ("loss", "kl", "grad_norm"):
            assert packed[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6)


class Largest(TorchDispatchMode):
    """The most elements that any result has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_top_k_never_holds_all_tokens_times_the_vocabulary() -> None:
    hidden, head = torch.randn(512, D, requires_grad=True), torch.randn(400, D, requires_grad=True)
    with Largest() as largest:
        ids, teacher = top_k_logprobs(hidden, head, K, chunk_tokens=16)
        bucket_divergence(bucket_logprobs(hidden, head, ids, chunk_tokens=16), teacher).sum().backward()
    assert largest.elements < 512 * 400 / 20


def test_bounds_that_leave_out_the_current_policy_are_refused() -> None:
    samples = make_samples(tiny_llama(), count=2, teachers=("a",))
    with pytest.raises(ValueError, match=r"importance_bounds = \(1.5, 2.0\)"):
        with_loss(distill_objective(samples, {"a": tiny_llama()}), "sampled_token", importance_bounds=(1.5, 2.0))


@pytest.mark.parametrize("loss", ["full_vocabulary", "teacher_top_k"])
def test_every_direction_of_the_divergence_is_trained_on(loss: str) -> None:
    """With as many buckets as tokens both losses are the same, in value and gradient, and each direction another."""
    samples = make_samples(tiny_llama(), teachers=("a",))
    objective = distill_objective(samples, {"a": tiny_llama(seed=3)})
    cap = {"logit_cap_of": lambda _: 1.5}
    norms = {}
    for divergence in ("reverse_kl", "forward_kl", "jsd"):
        changes = {"divergence": divergence, "jsd_beta": 0.3, "top_k": 10_000}
        for capped in (False, True):
            chosen = replace(with_loss(objective, loss, **changes), **(cap if capped else {}))
            learner = make_learner(tiny_llama())
            found = learner.update(samples, chosen)
            with torch.no_grad():
                expected = [
                    reference(tiny_llama(), objective, sample, divergence, 1.5 if capped else None)
                    for sample in samples
                ]
            assert found["kl"] == pytest.approx(torch.cat(expected).mean().item(), rel=1e-4)
            norms[divergence, capped] = found["grad_norm"]
    assert len({round(norm, 3) for norm in norms.values()}) == len(norms)


def reference(model, objective: DistillObjective, sample, divergence, cap) -> torch.Tensor:
    """The divergence at each loss token in float64, from whole logits."""
    hidden = model.get_decoder()(token_ids(sample, model)).last_hidden_state[0, :-1]
    return divergence_reference(
        hidden[torch.tensor(sample.load().loss_mask[1:])],
        model.lm_head.weight,
        objective.states.get(sample.id),
        objective.head_of(sample.teacher),
        divergence=divergence,
        beta=0.3,
        teacher_logit_cap=cap,
    )


@pytest.mark.parametrize("loss", ["full_vocabulary", "sampled_token", "teacher_top_k"])
def test_the_mean_is_over_tokens_or_over_rollouts_of_their_token_means(loss: str) -> None:
    samples = make_samples(tiny_llama(), teachers=("a",))
    objective = with_loss(distill_objective(samples, {"a": tiny_llama(seed=3)}), loss)
    by_rollout = with_loss(objective, loss, reduction="sequence")
    alone = [make_learner(tiny_llama()).update([sample], objective)["loss"] for sample in samples]
    lengths = [sample.num_loss_tokens for sample in samples]
    whole, split = (make_learner(tiny_llama(), budget=size).update(samples, by_rollout) for size in (4096, 40))
    assert whole["loss"] == pytest.approx(sum(alone) / len(alone), rel=1e-4)
    assert (split["loss"], split["grad_norm"]) == pytest.approx((whole["loss"], whole["grad_norm"]), rel=1e-4)
    by_token = make_learner(tiny_llama()).update(samples, objective)["loss"]
    mean = sum(a * n for a, n in zip(alone, lengths, strict=True)) / sum(lengths)
    assert by_token == pytest.approx(mean, rel=1e-4)


def test_an_evaluation_is_exact_whatever_is_trained_on() -> None:
    samples = make_samples(tiny_llama(), teachers=("a",))
    objective = distill_objective(samples, {"a": tiny_llama(seed=3)})
    exact = make_learner(tiny_llama()).update(samples, objective)["kl"]
    for changes in ({"loss": "sampled_token"}, {"loss": "teacher_top_k"}, {"divergence": "jsd"}):
        chosen = replace(objective, config=objective.config.replace(**changes))
        assert make_learner(tiny_llama()).evaluate(samples, chosen)["kl"] == pytest.approx(exact, rel=1e-5)


def test_the_weight_of_a_position_is_that_of_the_text_before_it() -> None:
    """Over all texts of three tokens as often as an older policy writes them."""
    torch.manual_seed(5)
    tokens = 3
    policy, older = (torch.randn(1 + tokens + tokens**2, tokens, dtype=torch.float64).log_softmax(-1) for _ in "ab")
    value = torch.randn(1 + tokens + tokens**2, dtype=torch.float64)
    sums = {"policy": torch.zeros(3, dtype=torch.float64), "weighted": torch.zeros(3, dtype=torch.float64)}
    for text in itertools.product(range(tokens), repeat=3):
        states = [0, 1 + text[0], 1 + tokens + tokens * text[0] + text[1]]
        log_p, log_mu = policy[states, list(text)], older[states, list(text)]
        twice = (log_p - log_mu).repeat(2)
        weights = prefix_importance(twice, torch.tensor([0, 0, 0, 1, 1, 1]), 0.0, 1e9)
        assert torch.allclose(weights[:3], weights[3:])
        sums["policy"] += log_p.sum().exp() * value[states]
        sums["weighted"] += log_mu.sum().exp() * weights[:3] * value[states]
    torch.testing.assert_close(sums["weighted"], sums["policy"])
    cut = prefix_importance(torch.tensor([3.0, -9.0, 0.0]), torch.zeros(3, dtype=torch.int64), 0.5, 2.0)
    assert cut.tolist() == [1.0, 2.0, 0.5]


def older_samples(samples: list[Sample], shift: float) -> list[Sample]:
    """The same tokens, as drawn by a policy to which each was ``exp(shift)`` times as likely."""
    moved = []
    for sample in samples:
        arrays = sample.load()
        moved.append(replace(sample, tokens=Tokens.of(replace(arrays, logprobs=arrays.logprobs + np.float32(shift)))))
    return moved


def test_stale_rollouts_are_weighed_and_fresh_ones_left_alone() -> None:
    samples = make_samples(tiny_llama(), teachers=("a",))
    objective = distill_objective(samples, {"a": tiny_llama(seed=3)})
    for loss in ("full_vocabulary", "teacher_top_k"):
        corrected = with_loss(objective, loss, max_staleness=1, importance_bounds=(0.5, 2.0))
        plain = make_learner(tiny_llama()).update(samples, with_loss(objective, loss))
        fresh = make_learner(tiny_llama()).update(samples, corrected)
        assert fresh["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert fresh["importance_weight"] == pytest.approx(1.0, abs=1e-5)
        stale, packed = (
            make_learner(tiny_llama(), budget=size).update(older_samples(samples, 0.1), corrected)
            for size in (4096, 30)
        )
        lengths = [sample.num_loss_tokens for sample in samples]
        weights = torch.cat([(-0.1 * torch.arange(n)).exp().clamp(min=0.5) for n in lengths])
        assert stale["importance_weight"] == pytest.approx(weights.mean().item(), rel=1e-4)
        assert stale["kl"] == pytest.approx(plain["kl"], rel=1e-5)
        assert stale["loss"] < plain["loss"]
        assert packed["loss"] == pytest.approx(stale["loss"], rel=1e-4)


def test_the_task_reward_and_the_start_join_with_their_coefficients() -> None:
    """A distillation with both has the sum of the three losses' gradients."""
    model = tiny_llama()
    samples = make_samples(model, teachers=("a",))
    # At its own start a student is at distance 0 from it; the learner below has moved on.
    objective = distill_objective(samples, {"a": tiny_llama(seed=3)})
    config = objective.config.replace(reward_coef=0.5, num_generations=2, beta=0.25)
    reference = make_learner(tiny_llama(seed=9), keep_reference=True).reference

    def gradients(objective: DistillObjective, samples: list[Sample]) -> dict[str, torch.Tensor]:
        learner = make_learner(tiny_llama())
        batch = PackedBatch.collate(samples)
        loss, metrics = objective.loss(learner._policy.forward(batch), batch, Totals.of(samples))
        loss.backward()
        found = {name: parameter.grad for name, parameter in learner._policy.trained().items()}
        return found | {name: pair[0] / pair[1] for name, pair in metrics.items()}

    both = gradients(replace(objective, config=config, reference=reference), samples)
    plain = gradients(objective, samples)
    silent = [replace(sample, weight=0.0) for sample in samples]
    rewarded = gradients(replace(objective, config=config.replace(beta=0.0)), silent)
    held = gradients(replace(objective, config=config.replace(reward_coef=0.0), reference=reference), silent)
    expected = make_learner(tiny_llama())
    loss = sum(-sample.advantage * token_logprobs(expected._policy.model, sample).sum() for sample in samples)
    (0.5 * loss / sum(sample.num_loss_tokens for sample in samples)).backward()
    for name, parameter in expected._policy.trained().items():
        torch.testing.assert_close(rewarded[name], parameter.grad, rtol=1e-3, atol=1e-5)
        assert held[name].abs().max() > 0
        torch.testing.assert_close(both[name], plain[name] + rewarded[name] + held[name], rtol=1e-3, atol=1e-5)
    exact = torch.cat([slow_kl(tiny_llama(), tiny_llama(seed=9), sample) for sample in samples]).mean()
    assert both["kl_ref"] == pytest.approx(exact.item(), rel=1e-4)
    with pytest.raises(RecipeError, match="keep_reference=True"):
        replace(objective, config=config)


def test_unscored_rollouts_leave_the_reward_and_stay_in_the_distillation() -> None:
    samples = [replace(sample, advantage=0.0) for sample in make_samples(tiny_llama(), teachers=("a",))]
    objective = distill_objective(samples, {"a": tiny_llama(seed=3)})
    rewarded = replace(objective, config=objective.config.replace(reward_coef=1.0, num_generations=2))
    with_reward, without = (make_learner(tiny_llama()).update(samples, each) for each in (rewarded, objective))
    assert with_reward["loss"] == pytest.approx(without["loss"], rel=1e-6)
    assert with_reward["grad_norm"] == pytest.approx(without["grad_norm"], rel=1e-5)


def test_log_ratios_are_measured_by_domain_for_their_scale() -> None:
    samples = make_samples(tiny_llama(), teachers=("a",))
    teacher = tiny_llama(seed=3)
    objective = distill_objective(samples, {"a": teacher})
    rescaled = replace(objective, config=objective.config.replace(rescale_domains=True))
    metrics = make_learner(tiny_llama(), budget=40).update(samples, rescaled)
    with torch.no_grad():
        ratios = [token_logprobs(teacher, s) - torch.tensor(s.load().logprobs[s.load().loss_mask]) for s in samples]
    for domain, mine in (("math", torch.cat(ratios[0::2])), ("code", torch.cat(ratios[1::2]))):
        assert metrics[f"log_ratio/{domain}"] == pytest.approx(mine.mean().item(), rel=2e-2)
        assert metrics[f"log_ratio_sq/{domain}"] == pytest.approx((mine**2).mean().item(), rel=2e-2)


@pytest.mark.parametrize("loss", ["sampled_token", "full_vocabulary"])
def test_teachers_and_temperatures_may_share_a_micro_batch(loss: str) -> None:
    """With what was kept in truncated sampling, and with the log-ratios, which all go by the token drawn."""
    samples = make_samples(tiny_llama(seed=1), teachers=("a", "b", "c"))
    rng = np.random.default_rng(0)
    for index, each in enumerate(samples[::2]):
        arrays = each.load()
        kept = [np.unique([token, *rng.integers(0, VOCABULARY, 5)]) for token in arrays.token_ids]
        offsets = np.cumsum([0, *map(len, kept)])
        arrays = replace(arrays, kept=KeptTokens(ids=np.concatenate(kept).astype(np.int32), offsets=offsets))
        samples[2 * index] = replace(each, tokens=Tokens.of(arrays))
    objective = with_loss(
        distill_objective(samples, {name: tiny_llama(seed=seed) for seed, name in enumerate("abc", 3)}),
        loss,
        rescale_domains=True,
    )
    objective = replace(objective, temperatures={"code": 0.5})
    whole, packed = (make_learner(tiny_llama(), budget=size).update(samples, objective) for size in (4096, 10))
    assert (whole["micro_batches"], packed["micro_batches"]) == (1, len(samples))
    for name in ("loss", "kl/math", "kl/code", "grad_norm", "log_ratio/code", "log_ratio_sq/math"):
        assert packed[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6)
    other = make_learner(tiny_llama()).update(samples, replace(objective, temperatures={}))
    assert other["log_ratio/code"] != pytest.approx(whole["log_ratio/code"], rel=1e-2)


@pytest.mark.parametrize("loss", ["full_vocabulary", "teacher_top_k", "sampled_token"])
def test_a_micro_batch_holds_one_head_at_a_time_and_asks_for_each_once(loss: str) -> None:
    samples = make_samples(tiny_llama(), teachers=("a", "b", "c"))
    models = {name: tiny_llama(seed=seed) for seed, name in enumerate("abc", 3)}
    objective = with_loss(distill_objective(samples, models), loss)
    alive: list[weakref.ref[torch.Tensor]] = []
    asked = []

    def head_of(name: str) -> torch.Tensor:
        assert not any(head() is not None for head in alive)
        asked.append(name)
        head = objective.head_of(name).clone()
        alive.append(weakref.ref(head))
        return head

    make_learner(tiny_llama(), budget=4096).update(samples, replace(objective, head_of=head_of))
    assert asked == ["a", "b", "c"]
