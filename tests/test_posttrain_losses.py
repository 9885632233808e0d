"""Every loss against TRL's own trainer, in value and in the gradient of every parameter; the head against float64."""

import dataclasses
import os
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from posttrain.config import GRPO, Optim
from posttrain.learner.learner import Learner
from posttrain.learner.logprobs import token_logprobs
from posttrain.learner.losses import (
    Normaliser,
    PolicyTokens,
    clipped_surrogate,
    engine_correction,
    grpo_loss,
    high_entropy_mask,
    reduce_tokens,
)
from posttrain.learner.objectives import GrpoObjective
from posttrain.stages.grpo import learn
from posttrain.types import Sample, TokenArrays, Tokens

PAD, VOCAB, BUDGET = 0, 31, 9
PROMPT_LENGTHS, COMPLETION_LENGTHS = (3, 1, 4, 2, 3, 2, 2), (5, 9, 1, 7, 3, 4, 6)
ROWS = len(PROMPT_LENGTHS)
MASKED = 5


def tiny_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        eos_token_id=1,
        initializer_range=0.3,  # far from uniform, so that log-probabilities differ between tokens
    )
    return LlamaForCausalLM(config).train()


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> GRPOTrainer:
    vocabulary = {"<pad>": PAD, "<eos>": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    )
    args = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        per_device_train_batch_size=ROWS,
        num_generations=ROWS,
        max_completion_length=BUDGET,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
    )
    trainer = GRPOTrainer(
        model=tiny_model(0),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["w2 w3"] * ROWS}),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@pytest.fixture(scope="module")
def rows() -> list[SimpleNamespace]:
    """Ragged rows of a behaviour policy a bit off, and a lot off in the first (good) and the last (bad) row.

    One row is masked throughout.
    """
    generator = torch.Generator().manual_seed(7)
    advantages = (1.3, -0.7, 0.4, -1.1, 0.0, 0.8, -0.9)
    made = []
    for index, (prompt, completion) in enumerate(zip(PROMPT_LENGTHS, COMPLETION_LENGTHS, strict=True)):
        mask = torch.ones(completion)
        off_policy = index in (0, ROWS - 1)
        mask[completion // 2 :: 4] = float(completion < 4)  # a tool token in the middle of the longer rows
        mask *= float(index != MASKED)
        made.append(
            SimpleNamespace(
                prompt=torch.randint(2, VOCAB, (prompt,), generator=generator),
                completion=torch.randint(2, VOCAB, (completion,), generator=generator),
                mask=mask,
                noise=torch.randn(completion, generator=generator) * (2.0 if off_policy else 0.3) + off_policy,
                ref_noise=torch.randn(completion, generator=generator) * 0.5,
                advantage=advantages[index],
            )
        )
    model = tiny_model(0)
    for row in made:
        with torch.no_grad():
            logprobs, _ = score(model, row)
        row.behaviour, row.ref = logprobs + row.noise, logprobs + row.ref_noise
        row.engine = row.behaviour + torch.randn(len(logprobs), generator=generator) * 0.3
        row.batch = made
    return made


def score(model: LlamaForCausalLM, row: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of one row's completion, alone and without padding."""
    ids = torch.cat([row.prompt, row.completion])
    hidden = model.model(input_ids=ids[None]).last_hidden_state[0]
    return token_logprobs(hidden[len(row.prompt) - 1 : -1], model.lm_head.weight, row.completion, chunk_tokens=4)


def padded(tensors: list[torch.Tensor], width: int, *, left: bool = False) -> torch.Tensor:
    pads = [tensor.new_full((width - len(tensor),), PAD) for tensor in tensors]
    pairs = zip(pads, tensors, strict=True)
    return torch.stack([torch.cat([pad, tensor] if left else [tensor, pad]) for pad, tensor in pairs])


def trl_loss(trainer: GRPOTrainer, rows: list[SimpleNamespace], config: GRPO) -> tuple[torch.Tensor, dict]:
    """Loss and gradients of the real ``GRPOTrainer._compute_loss`` on padded rows."""
    inputs = trl_inputs(trainer, rows, config)
    trainer.model.load_state_dict(tiny_model(0).state_dict())
    trainer.model.train().zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in trainer.model.named_parameters()}


def trl_inputs(trainer: GRPOTrainer, rows: list[SimpleNamespace], config: GRPO) -> dict:
    """Sets the trainer to ``config``; returns the batch that it takes."""
    trainer.loss_type, trainer.importance_sampling_level = config.loss_type, config.importance_sampling_level
    if config.loss_type == "gspo":
        trainer.loss_type, trainer.importance_sampling_level = "grpo", "sequence"
    trainer.top_entropy_quantile = config.top_entropy_quantile
    trainer.beta, trainer.off_policy_mask_threshold = config.beta, config.off_policy_mask_threshold
    trainer.epsilon_low = config.epsilon
    trainer.epsilon_high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    trainer.args.delta, trainer.args.use_bias_correction_kl = config.delta, config.use_bias_correction_kl
    trainer.args.sapo_temperature_pos = config.sapo_temperature_pos
    trainer.args.sapo_temperature_neg = config.sapo_temperature_neg
    trainer.entropy_coef, trainer._entropy_bonus_enabled = config.entropy_coef, config.entropy_coef != 0.0
    prompt, completion = max(PROMPT_LENGTHS), max(COMPLETION_LENGTHS)
    inputs = {
        "prompt_ids": padded([row.prompt for row in rows], prompt, left=True),
        "prompt_mask": padded([torch.ones(len(row.prompt)).long() for row in rows], prompt, left=True),
        "completion_ids": padded([row.completion for row in rows], completion),
        "completion_mask": padded([torch.ones(len(row.completion)).long() for row in rows], completion),
        "tool_mask": padded([row.mask for row in rows], completion),
        "old_per_token_logps": padded([row.behaviour for row in rows], completion),
        "ref_per_token_logps": padded([row.ref for row in rows], completion),
        "advantages": torch.tensor([row.advantage for row in rows]),
        "num_items_in_batch": torch.stack([row.mask.sum() for row in rows]).sum(),
    }
    # TRL corrects for its own engine only.
    mode = config.importance_sampling_correction
    trainer.use_vllm, trainer.vllm_importance_sampling_correction = mode is not None, mode is not None
    if mode is not None:
        inputs["sampling_per_token_logps"] = padded([row.engine for row in rows], completion)
        inputs["importance_sampling_ratio"] = trl_correction(inputs, config)
    return inputs


def trl_correction(inputs: dict, config: GRPO) -> torch.Tensor:
    """The lines of ``GRPOTrainer._generate_and_score_completions`` that do this."""
    level, how = config.importance_sampling_correction.split("_")
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    difference = (inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]) * mask
    if level == "sequence":
        difference = difference.sum(dim=-1, keepdim=True)
    elif level == "geometric":  # not in TRL
        difference = difference.sum(dim=-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    ratio, low, high = difference.exp(), config.importance_sampling_clip_min, config.importance_sampling_clip_max
    if how == "truncate":
        return ratio.clamp(min=low, max=high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def flat_tokens(model: LlamaForCausalLM, rows: list[SimpleNamespace], config: GRPO) -> PolicyTokens:
    """The loss tokens of the rows, one after another."""
    keep = torch.cat([row.mask for row in rows]).bool()
    scored = [score(model, row) for row in rows]
    lengths = torch.tensor([len(row.completion) for row in rows])
    old = torch.cat([row.behaviour for row in rows])[keep]
    corrects = config.importance_sampling_correction is not None
    return PolicyTokens(
        logprobs=torch.cat([logprobs for logprobs, _ in scored])[keep],
        entropies=torch.cat([entropies for _, entropies in scored])[keep],
        behaviour_logprobs=torch.cat([row.engine for row in rows])[keep] if corrects else old,
        old_logprobs=old if corrects else None,
        high_entropy=high_entropy(model, rows, config)[keep],
        ref_logprobs=torch.cat([row.ref for row in rows])[keep],
        advantages=torch.tensor([row.advantage for row in rows]).repeat_interleave(lengths)[keep],
        segment=torch.arange(len(rows)).repeat_interleave(lengths)[keep],
        num_segments=len(rows),
    )


@torch.no_grad()
def high_entropy(model: LlamaForCausalLM, rows: list[SimpleNamespace], config: GRPO) -> torch.Tensor:
    """By the quantile over all loss tokens of the batch, whichever rows are asked for."""
    everything = torch.cat([score(model, row)[1][row.mask.bool()] for row in rows[0].batch])
    threshold = torch.quantile(everything, 1 - config.top_entropy_quantile)
    return high_entropy_mask(torch.cat([score(model, row)[1] for row in rows]), threshold)


def our_loss(micro_batches: list[list[SimpleNamespace]], config: GRPO) -> tuple[torch.Tensor, dict, list]:
    """Loss and gradients summed over micro-batches of packed rows."""
    rows = [row for batch in micro_batches for row in batch]
    normaliser = Normaliser(
        num_rows=len(rows), num_tokens=int(sum(row.mask.sum() for row in rows)), max_completion_tokens=BUDGET
    )
    model, total, metrics = tiny_model(0), torch.zeros(()), []
    for batch in micro_batches:
        loss, measured = grpo_loss(flat_tokens(model, batch, config), config, normaliser=normaliser)
        loss.backward()
        total += loss.detach()
        metrics.append(measured)
    return total, {name: parameter.grad for name, parameter in model.named_parameters()}, metrics


def relative_error(found: dict, expected: dict) -> float:
    """Largest error of a parameter's gradient, relative to the norm of the whole gradient."""
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    return float(max((found[name] - expected[name]).norm() for name in expected) / norm)


LOSS_TYPES = ["grpo", "gspo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
VARIANTS = {
    "plain": {},
    "sequence": {"importance_sampling_level": "sequence"},
    "clip_higher": {"epsilon": 0.1, "epsilon_high": 0.28},
    "delta": {"delta": 1.5},
    "kl": {"beta": 0.1, "use_bias_correction_kl": False},
    "kl_unbiased": {"beta": 0.1, "use_bias_correction_kl": True},
    "kl_unbiased_sequence": {"beta": 0.1, "importance_sampling_level": "sequence"},
    "off_policy_mask": {"off_policy_mask_threshold": 0.5},
    "entropy": {"entropy_coef": 0.05},
    "top_entropy": {"top_entropy_quantile": 0.4, "beta": 0.1},
    "token_truncate": {"importance_sampling_correction": "token_truncate", "importance_sampling_clip_max": 1.2},
    "token_mask": {"importance_sampling_correction": "token_mask", "importance_sampling_clip_min": 0.6},
    "sequence_truncate": {
        "importance_sampling_correction": "sequence_truncate",
        "importance_sampling_clip_min": 0.7,
        "importance_sampling_clip_max": 1.5,
    },
    "sequence_mask": {
        "importance_sampling_correction": "sequence_mask",
        "importance_sampling_clip_max": 2.0,
        "off_policy_mask_threshold": 0.5,
    },
    "geometric_mask": {"importance_sampling_correction": "geometric_mask", "importance_sampling_clip_max": 1.1},
    "v32": {"beta": 0.1, "off_policy_mask_threshold": 0.5, "delta": 2.0, "entropy_coef": 0.01},
}


def settings(loss_type: str, **fields: Any) -> GRPO:
    """For cispo ``epsilon_high`` is the cap of the ratio itself, so its values are other ones."""
    return GRPO(loss_type=loss_type, **{**fields, **({"epsilon_high": 1.2} if loss_type == "cispo" else {})})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_equals_trl_in_loss_and_gradient(trainer, rows, loss_type, variant):
    config = settings(loss_type, **VARIANTS[variant])
    expected, expected_gradient = trl_loss(trainer, rows, config)
    found, gradient, _ = our_loss([rows], config)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert relative_error(gradient, expected_gradient) < 1e-5


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("plain", "clip_higher", "entropy")])
def test_every_variant_changes_the_gradient(rows, variant):
    """Guards the parity above: a variant that did nothing on this batch would be compared with itself."""
    _, plain, _ = our_loss([rows], GRPO())
    _, gradient, _ = our_loss([rows], GRPO(**VARIANTS[variant]))
    assert relative_error(gradient, plain) > 1e-3


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_packing_does_not_change_the_step(rows, loss_type):
    config = settings(loss_type, beta=0.1, off_policy_mask_threshold=0.5, entropy_coef=0.01)
    whole, whole_gradient, whole_metrics = our_loss([rows], config)
    for micro_batches in (
        [[row] for row in rows],
        [[rows[3], rows[0]], [rows[5]], [rows[6]], [rows[1], rows[4], rows[2]]],
    ):
        packed, gradient, metrics = our_loss(micro_batches, config)
        assert float(packed) == pytest.approx(float(whole), rel=1e-5)
        assert relative_error(gradient, whole_gradient) < 1e-5
        for name, (numerator, denominator) in whole_metrics[0].items():
            parts = [measured[name] for measured in metrics]
            assert float(sum(part[0] for part in parts)) == pytest.approx(float(numerator), rel=1e-4, abs=1e-6)
            assert float(sum(part[1] for part in parts)) == float(denominator)


def flat(logprobs: list[float], behaviour: list[float], advantages: list[float], **fields) -> PolicyTokens:
    return PolicyTokens(
        logprobs=torch.tensor(logprobs, requires_grad=True),
        behaviour_logprobs=torch.tensor(behaviour),
        advantages=torch.tensor(advantages),
        segment=torch.arange(len(logprobs)),
        num_segments=len(logprobs),
        **fields,
    )


ONE_EACH = Normaliser(num_rows=4, num_tokens=4, max_completion_tokens=1)


def samples_of(rows: list[SimpleNamespace], name: str) -> list[Sample]:
    """With the log-probabilities of that name as the engine's."""
    samples = []
    for index, row in enumerate(rows):
        zeros = torch.zeros(len(row.prompt))
        arrays = TokenArrays(
            token_ids=torch.cat([row.prompt, row.completion]).numpy().astype(np.int32),
            loss_mask=torch.cat([zeros, row.mask]).numpy().astype(np.bool_),
            logprobs=torch.cat([zeros, getattr(row, name)]).numpy(),
            versions=np.zeros(len(row.prompt) + len(row.completion), np.int32),
        )
        sample = Sample(id=f"s{index}", task_id="t", domain="d", tokens=Tokens.of(arrays), advantage=row.advantage)
        samples.append(sample)
    return samples


@pytest.mark.parametrize("variant", ["plain", "v32", "token_truncate", "top_entropy"])
def test_several_inner_epochs_equal_trls(trainer, rows, variant):
    """Three passes over one batch: from the second on the policy is no longer the one that the step began with.

    Which tokens have a high entropy is known at the start here and found anew in each pass there.
    """
    passes = 1 if variant == "top_entropy" else 3
    config = GRPO(num_iterations=passes, loss_type="grpo", **VARIANTS[variant])
    model, corrects = tiny_model(0), config.importance_sampling_correction is not None
    learner = Learner(
        tiny_model(0), optim=Optim(learning_rate=1e-2), num_steps=3, tokens_per_micro_batch=20, keep_reference=True
    )
    for row in rows:
        with torch.no_grad():
            row.here = score(model, row)[0]
            row.ref = row.here
        row.old = row.here if corrects else row.behaviour
    objective = GrpoObjective(config=config, max_completion_tokens=BUDGET, reference=learner.reference)
    found = learn(learner, objective, samples_of(rows, "engine" if corrects else "behaviour"), config, seed="")

    inputs = trl_inputs(trainer, rows, config)
    inputs["old_per_token_logps"] = padded([row.old for row in rows], max(COMPLETION_LENGTHS))
    if corrects:
        inputs["importance_sampling_ratio"] = trl_correction(inputs, config)
    trainer.model.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0)
    losses, norms = [], []
    for _ in range(passes):
        optimizer.zero_grad()
        loss = trainer._compute_loss(trainer.model.train(), inputs)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0).item())
        optimizer.step()
        losses.append(loss.item())
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert found["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-4)
    assert len({round(loss, 4) for loss in losses}) == passes


RATIOS = torch.linspace(0.05, 6.0, 60, dtype=torch.float64)


@pytest.mark.parametrize("advantage", [1.7, -1.7])
def test_delta_from_one_plus_epsilon_high_on_is_dual_clip(advantage):
    """arXiv 1912.09729, Eq. 5, written out in float64 with its maximum over the clipped and the bounded term."""
    losses = []
    for dual in (True, False):
        ratio = RATIOS.clone().requires_grad_()
        a = torch.full_like(ratio, advantage)
        if dual:
            inner = torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a)
            loss = -torch.where(a < 0, torch.maximum(inner, 3.0 * a), inner)
        else:
            loss = clipped_surrogate(ratio, a, low=0.2, high=0.28, delta=3.0)
        loss.sum().backward()
        losses.append((loss, ratio.grad))
    assert bool((losses[0][0].detach() == -3.0 * advantage).any()) == (advantage < 0), "the bound was reached"
    for found, expected in zip(*losses, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["truncate", "mask"])
def test_geometric_correction_equals_its_formula_and_does_not_depend_on_length(how):
    """The share of rows that a sequence's sum leaves alone falls with length, that of its mean does not."""
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for length in (4, 400):
        log_ratio = torch.randn(200, length, generator=generator) * 0.3 / 2**0.5
        rows = torch.arange(200).repeat_interleave(length)
        flat_ratio = log_ratio.flatten()
        tokens = PolicyTokens(
            logprobs=flat_ratio,
            behaviour_logprobs=flat_ratio,
            advantages=flat_ratio,
            segment=rows,
            num_segments=200,
        )
        for level in ("sequence", "geometric"):
            config = GRPO(
                importance_sampling_correction=f"{level}_{how}",
                importance_sampling_clip_min=0.5,
                importance_sampling_clip_max=2.0,
            )
            found = engine_correction(flat_ratio, tokens, config)
            exponent = log_ratio.double().sum(-1) if level == "sequence" else log_ratio.double().mean(-1)
            weight = exponent.exp()
            inside = (weight >= 0.5) & (weight <= 2)
            expected = weight.clamp(0.5, 2.0) if how == "truncate" else torch.where(inside, weight, 0.0)
            torch.testing.assert_close(found.double(), expected[rows], rtol=1e-4, atol=1e-6)
            kept[level, length] = inside.float().mean()
    assert kept["geometric", 400] == kept["geometric", 4] == 1
    assert kept["sequence", 400] < 0.25 < 0.75 < kept["sequence", 4]


AT_OLD = ["plain", "sequence", "delta", "off_policy_mask", "token_truncate", "sequence_mask", "geometric_mask"]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_at_theta_old_every_ratio_is_one_and_every_mask_keeps(rows, loss_type):
    """And the policy's gradient is that of ``-A log pi``, whatever the variant."""
    tokens = flat_tokens(tiny_model(0), rows, GRPO())
    here = tokens.logprobs.detach()
    normaliser = Normaliser(num_rows=ROWS, num_tokens=len(here), max_completion_tokens=BUDGET)
    for variant in AT_OLD:
        logprobs = here.clone().requires_grad_()
        at_old = dataclasses.replace(tokens, logprobs=logprobs, behaviour_logprobs=here, old_logprobs=here)
        loss, metrics = grpo_loss(at_old, settings(loss_type, **VARIANTS[variant]), normaliser=normaliser)
        shares = {name: float(numerator / denominator) for name, (numerator, denominator) in metrics.items()}
        zero = {name: share for name, share in shares.items() if name not in ("ratio", "engine_ratio", "entropy")}
        assert zero == dict.fromkeys(zero, 0.0)
        assert shares["ratio"] == shares.get("engine_ratio", 1.0) == 1.0
        loss.backward()
        plain = here.clone().requires_grad_()
        reduce_tokens(-at_old.advantages * plain, at_old, loss_type, normaliser).backward()
        torch.testing.assert_close(logprobs.grad, plain.grad, rtol=1e-6, atol=1e-8)


def test_metrics_count_what_they_name():
    tokens = flat([-1.0, -1.0, -1.0, -1.0], [-2.0, -0.5, -1.0, -0.1], [1.0, -1.0, 1.0, 1.0], entropies=torch.ones(4))
    _, metrics = grpo_loss(tokens, GRPO(off_policy_mask_threshold=-0.6), normaliser=ONE_EACH)
    shares = {name: float(numerator / denominator) for name, (numerator, denominator) in metrics.items()}
    ratio = (tokens.logprobs - tokens.behaviour_logprobs).detach().exp()
    assert shares["clip_fraction_high"] == 0.25  # the first token: ratio e, positive advantage
    assert shares["clip_fraction_low"] == 0.25  # the second: ratio 0.61, negative advantage
    assert shares["off_policy_masked"] == 0.25  # the second: the only negative one
    assert shares["entropy"] == 1.0
    assert shares["ratio"] == pytest.approx(float(ratio.mean()))
    assert shares["kl_behaviour"] == pytest.approx(float((ratio - ratio.log() - 1).mean()))


def test_unbiased_kl_gradient_on_policy_is_the_log_ratio():
    """At theta = theta_behaviour the corrected K3 has gradient log(pi / ref), the plain one 1 - ref / pi."""
    logprobs, ref = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -0.2, -0.5])
    for corrected, expected in ((True, logprobs - ref), (False, 1 - (ref - logprobs).exp())):
        tokens = flat(logprobs.tolist(), logprobs.tolist(), [0.0] * 3, ref_logprobs=ref)
        config = GRPO(beta=1.0, use_bias_correction_kl=corrected)
        normaliser = Normaliser(num_rows=3, num_tokens=1, max_completion_tokens=1)
        loss, _ = grpo_loss(tokens, config, normaliser=normaliser)
        loss.backward()
        torch.testing.assert_close(tokens.logprobs.grad, expected)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_no_tokens_give_zero(loss_type, level):
    empty = dataclasses.replace(
        flat([], [], [], ref_logprobs=torch.zeros(0), entropies=torch.zeros(0)),
        segment=torch.zeros(0, dtype=torch.int64),
        num_segments=2,
    )
    config = settings(
        loss_type,
        importance_sampling_level=level,
        beta=0.1,
        entropy_coef=0.1,
        off_policy_mask_threshold=0.1,
    )
    loss, _ = grpo_loss(empty, config, normaliser=Normaliser(num_rows=0, num_tokens=0, max_completion_tokens=0))
    loss.backward()
    assert loss.item() == 0.0


def test_missing_inputs_are_named():
    tokens = flat([-1.0], [-1.0], [1.0])
    with pytest.raises(ValueError, match="ref_logprobs"):
        grpo_loss(tokens, GRPO(beta=0.1), normaliser=ONE_EACH)
    with pytest.raises(ValueError, match="entropies"):
        grpo_loss(tokens, GRPO(entropy_coef=0.1), normaliser=ONE_EACH)
    with pytest.raises(ValueError, match="old_logprobs; pass them or set it to None"):
        grpo_loss(tokens, GRPO(importance_sampling_correction="token_mask"), normaliser=ONE_EACH)
    with pytest.raises(ValueError, match="high_entropy; pass them or set it to 1"):
        grpo_loss(tokens, GRPO(top_entropy_quantile=0.2), normaliser=ONE_EACH)
    with pytest.raises(ValueError, match="advantages has shape"):
        dataclasses.replace(tokens, advantages=torch.zeros(2))


def head_problem(num_tokens: int = 11, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(num_tokens, 8, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(23, 8, generator=generator).to(dtype).requires_grad_()
    return hidden, head, torch.randint(0, 23, (num_tokens,), generator=generator)


def reference_logprobs(hidden, head, targets, temperature):
    logp = torch.log_softmax(hidden.double() @ head.double().T / temperature, -1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 11, 64])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chunked_logprobs_equal_float64(chunk_tokens, temperature):
    weights = torch.linspace(-1, 2, 11), torch.linspace(0.5, -0.3, 11)
    gradients = []
    for function in (
        lambda *args: token_logprobs(*args, temperature=temperature, chunk_tokens=chunk_tokens),
        lambda *args: reference_logprobs(*args, temperature),
    ):
        hidden, head, targets = head_problem()
        logprobs, entropy = function(hidden, head, targets)
        ((logprobs * weights[0]).sum() + (entropy * weights[1]).sum()).backward()
        gradients.append((logprobs.float(), entropy.float(), hidden.grad, head.grad))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_chunked_logprobs_pass_gradcheck(cap):
    hidden, head, targets = head_problem(5, torch.float64)
    settings = {"temperature": 0.7, "logit_cap": cap, "chunk_tokens": 2}
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, targets, **settings), (hidden, head))


def test_capped_logprobs_are_those_of_capped_logits():
    hidden, head, targets = head_problem(11, torch.float64)
    found, _ = token_logprobs(hidden, head, targets, temperature=0.7, logit_cap=2.0, chunk_tokens=4)
    logits = 2 * torch.tanh(hidden @ head.T / 2)
    torch.testing.assert_close(found, (logits / 0.7).log_softmax(-1).gather(-1, targets[:, None])[:, 0])


def kept_problem(counts, targets):
    """Random kept ids, 0 to all of the vocabulary of 23 per token, the target among them where there are some."""
    rng = np.random.default_rng(5)
    rows = []
    for count, target in zip(counts, targets.tolist(), strict=True):
        others = [token for token in rng.permutation(23).tolist() if token != target]
        rows.append([*others[: count - 1], target] if count else [])
    offsets = np.cumsum([0, *counts])
    return {
        "kept_ids_K": torch.tensor([token for row in rows for token in row], dtype=torch.int32),
        "kept_offsets_N1": torch.from_numpy(offsets),
    }


def masked_reference(hidden, head, targets, kept, temperature):
    """A plain masked softmax, with minus infinity."""
    logits = hidden @ head.T / temperature
    mask = torch.ones_like(logits, dtype=torch.bool)
    bounds = kept["kept_offsets_N1"].tolist()
    for row, (start, stop) in enumerate(pairwise(bounds)):
        if stop > start:
            mask[row] = False
            mask[row, kept["kept_ids_K"][start:stop].long()] = True
    logp = logits.masked_fill(~mask, -torch.inf).log_softmax(-1)
    plogp = logp.exp() * logp.masked_fill(~mask, 0)
    return logp.gather(-1, targets[:, None]).squeeze(-1), -plogp.sum(-1)


KEPT_COUNTS = [0, 3, 1, 23, 5, 0, 0, 0, 0, 2, 7]


@pytest.mark.parametrize("chunk_tokens", [1, 4, 11, 64])
def test_kept_tokens_equal_a_plain_masked_softmax_in_value_and_gradient(chunk_tokens):
    weights = torch.linspace(-1, 2, 11).double(), torch.linspace(0.5, -0.3, 11).double()
    results = []
    for function in (
        lambda h, w, y, kept: token_logprobs(h, w, y, temperature=0.7, chunk_tokens=chunk_tokens, **kept),
        lambda h, w, y, kept: masked_reference(h, w, y, kept, 0.7),
    ):
        hidden, head, targets = head_problem(11, torch.float64)
        logprobs, entropy = function(hidden, head, targets, kept_problem(KEPT_COUNTS, targets))
        ((logprobs * weights[0]).sum() + (entropy * weights[1]).sum()).backward()
        results.append((logprobs, entropy, hidden.grad, head.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert results[0][0][2] == 0, "the only token that could be drawn is certain"


def test_kept_tokens_pass_gradcheck():
    hidden, head, targets = head_problem(5, torch.float64)
    kept = kept_problem([2, 0, 9, 23, 1], targets)
    assert torch.autograd.gradcheck(
        lambda h, w: token_logprobs(h, w, targets, temperature=0.7, chunk_tokens=2, **kept), (hidden, head)
    )


def test_bfloat16_head_gradient_is_summed_in_float32():
    """600 equal small terms after a large one: summed in bfloat16 they would be lost."""
    hidden, head = torch.full((601, 8), 2.0**-9, dtype=torch.bfloat16), torch.zeros(23, 8, requires_grad=True)
    hidden[0] = 2.0
    targets = torch.zeros(601, dtype=torch.int64)
    logprobs, entropy = token_logprobs(hidden, head, targets, chunk_tokens=1, want_entropy=False)
    logprobs.sum().backward()
    expected = hidden.double().sum(0) * (1 - 1 / 23)
    assert entropy is None
    assert head.grad.dtype == torch.float32
    torch.testing.assert_close(head.grad[0].double(), expected, rtol=5e-3, atol=0)
    assert float((head.grad[0] - 2 * (1 - 1 / 23)).min()) > 0.5


def test_autocast_decides_the_type_of_the_product():
    hidden, head, targets = head_problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, _ = token_logprobs(hidden, head, targets)
    rounded, _ = token_logprobs(hidden.bfloat16(), head.bfloat16(), targets)
    assert logprobs.dtype == torch.float32
    assert torch.equal(logprobs, rounded)


class LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("count", [0, 3])
def test_no_tensor_of_tokens_times_vocabulary_exists(count):
    tokens, vocabulary, width, chunk = 256, 500, 4, 16
    hidden, head = torch.randn(tokens, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    kept = {"kept_ids_K": torch.arange(count).repeat(tokens), "kept_offsets_N1": torch.arange(tokens + 1) * count}
    saved: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t)
    with LargestTensor() as seen, hooks:
        targets = torch.zeros(tokens, dtype=torch.int64)
        logprobs, entropy = token_logprobs(hidden, head, targets, chunk_tokens=chunk, **kept)
        (logprobs + entropy).sum().backward()
    assert seen.numel == chunk * vocabulary
    assert max(saved) == head.numel()


def test_frozen_head_and_no_tokens():
    hidden, head, targets = head_problem()
    token_logprobs(hidden, head.detach(), targets)[0].sum().backward()
    assert hidden.grad is not None
    hidden, head, targets = head_problem(0)
    logprobs, entropy = token_logprobs(hidden, head, targets)
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == (0,)
    assert float(head.grad.abs().sum()) == 0.0


def test_bad_head_arguments_are_refused():
    hidden, head, targets = head_problem()
    with pytest.raises(ValueError, match="expected \\[N, D\\]"):
        token_logprobs(hidden, head, targets[:-1])
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(hidden, head, targets, temperature=0.0)
    with pytest.raises(ValueError, match="11 kept offsets for 11 tokens"):
        token_logprobs(hidden, head, targets, kept_ids_K=targets, kept_offsets_N1=targets)
