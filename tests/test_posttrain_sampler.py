"""Truncated sampling against a slow reference, and against what the learner recomputes from the same logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from posttrain.engine.sampler import draw, stream_key, uniforms
from posttrain.learner.logprobs import token_logprobs
from posttrain.types import KeptTokens, Sampling

samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.6]),
    top_k=st.sampled_from([0, 0, 1, 3, 40]),
    top_p=st.sampled_from([1.0, 1.0, 0.3, 0.9]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5]),
)


def numbers(count: int) -> np.ndarray:
    return uniforms(np.full(count, stream_key(0, "many")), np.arange(count))


def reference(logits: torch.Tensor, sampling: Sampling) -> tuple[list[int], torch.Tensor]:
    """Kept ids, likeliest first, and the distribution over the vocabulary, one token at a time in float64."""
    p = (logits.double() / sampling.temperature).softmax(0)
    ids = sorted(range(len(p)), key=lambda token: (-float(p[token]), token))
    if sampling.top_k:
        ids = ids[: sampling.top_k]
    whole = sum(float(p[token]) for token in ids)
    if sampling.top_p < 1:
        mass, count = 0.0, 0
        while count < len(ids) and mass < sampling.top_p * whole:
            mass += float(p[ids[count]])
            count += 1
        ids = ids[:count]
    ids = [token for token in ids if float(p[token]) >= sampling.min_p * float(p[ids[0]])]
    law = torch.zeros_like(p)
    law[ids] = p[ids] / p[ids].sum()
    return ids, law


def is_clear(logits: torch.Tensor, sampling: Sampling) -> bool:
    """Whether rounding in float32 cannot move a token over a threshold of top-p or min-p."""
    bent = (-1e-5, 1e-5)
    kept = reference(logits, sampling)[0]
    top_ps = [min(sampling.top_p * (1 + e), 1.0) if sampling.top_p < 1 else 1.0 for e in bent]
    near = [
        Sampling(temperature=sampling.temperature, top_k=sampling.top_k, top_p=p, min_p=sampling.min_p * (1 + e))
        for p in top_ps
        for e in bent
    ]
    return all(reference(logits, s)[0] == kept for s in near)


@settings(max_examples=60, deadline=None)
@given(sampling=samplings, vocabulary=st.sampled_from([3, 90, 700]), seed=st.integers(0, 1000), coarse=st.booleans())
def test_kept_tokens_and_log_probabilities_equal_the_reference(
    sampling: Sampling, vocabulary: int, seed: int, coarse: bool
) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * 2
    # Coarse logits tie, as those of a model in bfloat16 do.
    logits = (logits * 2).round() / 2 if coarse else logits
    assume(is_clear(logits, sampling))
    draws = draw(logits.expand(16, -1), [sampling] * 16, numbers(16))
    ids, law = reference(logits, sampling)
    for token, logprob, kept in zip(draws.tokens_B.tolist(), draws.logprobs_B.tolist(), draws.kept_B, strict=True):
        assert abs(logprob - math.log(law[token])) < 1e-6 * max(1, -logprob)
        if len(ids) == vocabulary:
            assert kept is None
        else:
            assert kept is not None
            assert kept.dtype == np.int32
            assert kept.tolist() == ids


@settings(max_examples=25, deadline=None)
@given(sampling=samplings, seed=st.integers(0, 1000))
def test_frequencies_follow_the_law(sampling: Sampling, seed: int) -> None:
    logits = torch.randn(600, generator=torch.Generator().manual_seed(seed)) * 3
    assume(is_clear(logits, sampling))
    count = 8000
    draws = draw(logits.expand(count, -1), [sampling] * count, numbers(count))
    law = reference(logits, sampling)[1]
    observed = torch.bincount(draws.tokens_B, minlength=600).double()
    assert (observed[law == 0] == 0).all()
    often = law * count >= 5
    chi2 = ((observed - law * count) ** 2 / (law * count))[often].sum().item()
    degrees = int(often.sum())
    # Laurent and Massart (2000), lemma 1: beyond this with probability e^-20.
    assert chi2 < degrees + 2 * math.sqrt(20 * degrees) + 40


@pytest.mark.parametrize("fields", [{"top_k": 700}, {"top_p": 0.97}, {"min_p": 0.2}, {"top_p": 0.99, "min_p": 0.3}])
def test_flat_rows_that_no_first_look_settles(fields: dict[str, float]) -> None:
    logits = torch.randn(2, 9000, generator=torch.Generator().manual_seed(1)) * 0.3
    logits[1] *= 20
    sampling = Sampling(**fields)
    draws = draw(logits, [sampling] * 2, numbers(2))
    for row in range(2):
        ids, law = reference(logits[row], sampling)
        assert draws.kept_B[row].tolist() == ids
        assert draws.logprobs_B[row].item() == pytest.approx(math.log(law[draws.tokens_B[row]]), abs=2e-6)


def test_equal_logits_are_kept_in_the_order_of_their_ids() -> None:
    logits = torch.zeros(1, 5000)
    logits[0, 4000] = 1.0
    for count, expected in ((1, [4000]), (4, [4000, 0, 1, 2]), (600, [4000, *range(599)])):
        kept = draw(logits, [Sampling(top_k=count)], numbers(1)).kept_B[0]
        assert kept.tolist() == expected


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = (torch.randn(6, 3000, generator=torch.Generator().manual_seed(2)) * 2).bfloat16()
    mixed = [
        Sampling(top_p=0.9),
        Sampling(),
        Sampling(top_k=5),
        Sampling(temperature=0, top_k=5),
        Sampling(min_p=0.01),
        Sampling(top_k=1500, top_p=0.999),
    ]
    together = draw(logits, mixed, numbers(6))
    assert [kept is None for kept in together.kept_B] == [False, True, False, True, False, False]
    for i, sampling in enumerate(mixed):
        alone = draw(logits[i : i + 1], [sampling], numbers(6)[i : i + 1])
        assert alone.tokens_B[0] == together.tokens_B[i]
        np.testing.assert_array_equal(alone.kept_B[0], together.kept_B[i])
        if sampling.truncates:
            assert alone.logprobs_B[0] == together.logprobs_B[i]
            assert int(together.tokens_B[i]) in together.kept_B[i]


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
@pytest.mark.parametrize("fields", [{}, {"top_k": 8}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.9}])
def test_the_learner_recomputes_the_samplers_log_probability(fields: dict[str, float], temperature: float) -> None:
    generator = torch.Generator().manual_seed(4)
    hidden, head = torch.randn(40, 16, generator=generator), torch.randn(900, 16, generator=generator)
    draws = draw(hidden @ head.T, [Sampling(temperature=temperature, **fields)] * 40, numbers(40))
    kept = KeptTokens.of(draws.kept_B)
    assert (kept is None) == (not fields)
    arguments = {}
    if kept is not None:
        ids, offsets = torch.from_numpy(kept.ids), torch.from_numpy(kept.offsets)
        arguments = {"kept_ids_K": ids, "kept_offsets_N1": offsets}
    logprobs, _ = token_logprobs(hidden, head, draws.tokens_B, temperature=temperature, chunk_tokens=7, **arguments)
    torch.testing.assert_close(logprobs, draws.logprobs_B, rtol=1e-5, atol=1e-5)
