"""Reverse KL from hidden states against float64 full logits, and against TRL's chunked kernel."""

from __future__ import annotations

import pytest
import torch
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from posttrain.divergence import cpu_tiles, reverse_kl, reverse_kl_sum
from posttrain.divergence.cpu_tiles import CpuTiles
from posttrain.divergence.reference import reverse_kl_reference
from posttrain.divergence.triton_tiles import TritonTiles

N, V, D, E = 23, 57, 8, 12

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def random_case(scale: float = 1.0, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return normal(N, D) * scale, normal(V, D), normal(N, E) * scale, normal(V, E)


def identical_case() -> Case:
    hidden, head, _, _ = random_case()
    return hidden, head, hidden.clone(), head.clone()


def disjoint_case() -> Case:
    """Student and teacher each put all their mass on one token, and not the same one."""
    hidden = torch.zeros(N, D)
    hidden[:, 0] = 100.0
    student_head, teacher_head = torch.zeros(V, D), torch.zeros(V, D)
    student_head[3, 0], teacher_head[4, 0] = 1.0, 1.0
    return hidden, student_head, hidden.clone(), teacher_head


CASES = {
    "random": random_case(),
    "flat": random_case(scale=0.01),
    "peaked": random_case(scale=10.0),
    "identical": identical_case(),
    "disjoint": disjoint_case(),
}


def weights_for(case: Case) -> torch.Tensor:
    return torch.linspace(0.0, 2.0, len(case[0]))


def reference_gradients(case: Case, weights: torch.Tensor, temperature: float) -> tuple[torch.Tensor, ...]:
    hidden, head = (tensor.double().requires_grad_() for tensor in case[:2])
    kl = reverse_kl_reference(hidden, head, case[2], case[3], temperature=temperature)
    loss = (kl * weights.double()).sum()
    return (loss.detach(), kl.detach(), *torch.autograd.grad(loss, (hidden, head)))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("name", CASES)
def test_sum_and_per_position_forms_match_float64_logits(name: str, temperature: float) -> None:
    case = CASES[name]
    weights = weights_for(case)
    want_loss, want_kl, *want_gradients = reference_gradients(case, weights, temperature)
    hidden, head = case[0].clone().requires_grad_(), case[1].clone().requires_grad_()

    loss, kl = reverse_kl_sum(
        hidden, head, case[2], case[3], weights_N=weights, temperature=temperature, chunk_tokens=7
    )
    gradients = torch.autograd.grad(loss, (hidden, head))
    weighted = reverse_kl(hidden, head, case[2], case[3], weights_N=weights, temperature=temperature, chunk_tokens=7)
    two_pass_gradients = torch.autograd.grad(weighted.sum(), (hidden, head))

    assert kl.dtype == torch.float32
    assert not kl.requires_grad
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(kl.double(), want_kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weighted.double(), want_kl * weights, rtol=1e-5, atol=1e-5)
    for got in (gradients, two_pass_gradients):
        for found, want in zip(got, want_gradients, strict=True):
            torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=2e-5 * max(1.0, want.abs().max().item()))


def test_gradient_is_scaled_by_what_follows_the_loss() -> None:
    case = CASES["random"]
    hidden, head = case[0].clone().requires_grad_(), case[1].clone().requires_grad_()
    once = torch.autograd.grad(reverse_kl_sum(hidden, head, *case[2:])[0], (hidden, head))
    thrice = torch.autograd.grad(reverse_kl_sum(hidden, head, *case[2:])[0] * 3, (hidden, head))
    for one, three in zip(once, thrice, strict=True):
        torch.testing.assert_close(three, one * 3)


def test_identical_models_have_zero_divergence_and_gradient() -> None:
    case = CASES["identical"]
    hidden = case[0].clone().requires_grad_()
    loss, kl = reverse_kl_sum(hidden, *case[1:])
    loss.backward()
    assert kl.abs().max().item() < 1e-6
    assert hidden.grad is not None
    assert hidden.grad.abs().max().item() < 1e-6


def test_one_hot_models_on_different_tokens_have_the_known_value() -> None:
    _, kl = reverse_kl_sum(*CASES["disjoint"])
    # log p - log q at the student's token is 100 nats, as the teacher's logit there is 100 below its top.
    torch.testing.assert_close(kl, torch.full_like(kl, 100.0))


def test_direction_is_student_then_teacher() -> None:
    """A student that covers one of the teacher's two modes loses ln 2; the other way round it is far more."""
    hidden = torch.ones(1, 1)
    one_mode, two_modes = torch.tensor([[20.0], [0.0], [0.0]]), torch.tensor([[20.0], [20.0], [0.0]])
    seeking = reverse_kl(hidden, one_mode, hidden, two_modes).item()
    covering = reverse_kl(hidden, two_modes, hidden, one_mode).item()
    assert seeking == pytest.approx(0.6931, abs=1e-3)
    assert covering == pytest.approx(10.0 - 0.6931, abs=1e-3)


@pytest.mark.parametrize("chunk_tokens", [1, 5, N, 4 * N])
def test_chunk_size_does_not_change_the_result(chunk_tokens: int) -> None:
    case = CASES["random"]
    hidden, head = case[0].clone().requires_grad_(), case[1].clone().requires_grad_()
    loss, kl = reverse_kl_sum(hidden, head, *case[2:], chunk_tokens=chunk_tokens)
    want_loss, want_kl = reverse_kl_sum(hidden, head, *case[2:], chunk_tokens=N)
    torch.testing.assert_close(kl, want_kl)
    for found, want in zip(
        torch.autograd.grad(loss, (hidden, head)), torch.autograd.grad(want_loss, (hidden, head)), strict=True
    ):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("name", CASES)
def test_never_negative_beyond_rounding(name: str) -> None:
    assert reverse_kl(*CASES[name]).min().item() >= -1e-6


def test_bfloat16_inputs_are_exact_in_value_and_close_in_gradient() -> None:
    """Logits of bfloat16 inputs are not rounded; only the gradient products are bfloat16."""
    case = tuple(tensor.bfloat16() for tensor in random_case(scale=3.0))
    weights = weights_for(case)  # type: ignore[arg-type]
    _, want_kl, *want_gradients = reference_gradients(case, weights, 1.0)  # type: ignore[arg-type]
    hidden, head = case[0].clone().requires_grad_(), case[1].clone().requires_grad_()
    loss, kl = reverse_kl_sum(hidden, head, case[2], case[3], weights_N=weights, chunk_tokens=9)
    torch.testing.assert_close(kl.double(), want_kl, rtol=1e-5, atol=1e-5)
    for found, want in zip(torch.autograd.grad(loss, (hidden, head)), want_gradients, strict=True):
        assert found.dtype == torch.bfloat16
        error = (found.double() - want).norm() / want.norm()
        assert error.item() < 1e-2


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_agrees_with_trl(temperature: float) -> None:
    case = CASES["random"]
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in case[:2]] for _ in range(2))
    kl = reverse_kl(*ours, *case[2:], temperature=temperature)
    trl_kl, _ = ChunkedDivergenceFunction.apply(*theirs, None, *case[2:], None, 1.0, temperature)  # beta = 1
    torch.testing.assert_close(kl, trl_kl)
    for found, want in zip(torch.autograd.grad(kl.sum(), ours), torch.autograd.grad(trl_kl.sum(), theirs), strict=True):
        torch.testing.assert_close(found, want)


def test_float32_arithmetic_survives_autocast() -> None:
    case = CASES["peaked"]
    want = reverse_kl_sum(*case)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = reverse_kl_sum(*case)[1]
    torch.testing.assert_close(found, want, rtol=0, atol=0)


def test_frozen_student_parts_get_no_gradient() -> None:
    case = CASES["random"]
    hidden = case[0].clone().requires_grad_()
    head = case[1].clone()
    reverse_kl_sum(hidden, head, *case[2:])[0].backward()
    assert hidden.grad is not None
    assert head.grad is None
    with torch.no_grad():
        assert not reverse_kl_sum(hidden, head, *case[2:])[0].requires_grad


def test_no_positions_give_a_zero_loss_that_still_backpropagates() -> None:
    case = CASES["random"]
    hidden = case[0][:0].clone().requires_grad_()
    head = case[1].clone().requires_grad_()
    loss, kl = reverse_kl_sum(hidden, head, case[2][:0], case[3])
    loss.backward()
    assert loss.item() == 0.0
    assert kl.shape == (0,)
    assert head.grad is not None
    assert head.grad.abs().sum().item() == 0.0


def test_shapes_that_do_not_fit_are_refused() -> None:
    hidden, head, teacher_hidden, teacher_head = CASES["random"]
    with pytest.raises(ValueError, match="vocabulary entries"):
        reverse_kl(hidden, head, teacher_hidden, teacher_head[:-1])
    with pytest.raises(ValueError, match="positions"):
        reverse_kl(hidden, head, teacher_hidden[:-1], teacher_head)
    with pytest.raises(ValueError, match="teacher_hidden"):
        reverse_kl(hidden, head, hidden, teacher_head)
    with pytest.raises(ValueError, match="weights have shape"):
        reverse_kl_sum(hidden, head, teacher_hidden, teacher_head, weights_N=torch.ones(N - 1))
    with pytest.raises(ValueError, match="temperature"):
        reverse_kl(hidden, head, teacher_hidden, teacher_head, temperature=0.0)


def half_precision_case(name: str, dtype: torch.dtype, device: str = "cpu") -> Case:
    """Half-precision inputs the kernels take: widths in eights, and sizes that no block divides."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    vocabulary = 300
    hidden, head = normal(70, 24), 0.3 * normal(vocabulary, 24)
    teacher_hidden, teacher_head = normal(70, 40), 0.3 * normal(vocabulary, 40)
    if name == "shifted":  # a constant between the two models' logits, which no softmax sees
        hidden[:, 0], head[:, 0] = 4.0, 8.0
    elif name == "peaked":
        hidden *= 12
    elif name == "identical":
        teacher_hidden, teacher_head = hidden.clone(), head.clone()
    return tuple(tensor.to(device, dtype) for tensor in (hidden, head, teacher_hidden, teacher_head))  # type: ignore[return-value]


def check_tiles(kind: type[TritonTiles] | type[CpuTiles], case: Case, temperature: float, tolerance: float) -> None:
    hidden, head, teacher_hidden, teacher_head = case
    weights = weights_for(case).to(hidden.device)
    want_kl = reverse_kl_reference(*case, temperature=temperature)
    logits = (hidden.double() @ head.double().T).requires_grad_()
    eye = torch.eye(len(head), dtype=torch.float64, device=hidden.device)
    by_logits = reverse_kl_reference(logits, eye, teacher_hidden, teacher_head, temperature=temperature)
    (want_gradient,) = torch.autograd.grad((by_logits * weights).sum(), logits)
    tiles = kind(len(hidden) + 5, head, teacher_head)

    kl, gradient = tiles.kl_and_logit_gradient(hidden, teacher_hidden, weights_C=weights, temperature=temperature)

    assert gradient is not None
    # float32 sums: logits here go up to some hundreds.
    torch.testing.assert_close(kl.double(), want_kl, rtol=1e-4, atol=2e-5)
    # Relative to the gradient, or to what one wrong token would weigh where there is none.
    size = max(want_gradient.norm().item(), weights.norm().item() / 100)
    assert (gradient.double() - want_gradient).norm().item() < tolerance * size
    few = hidden[:3], teacher_hidden[:3]
    again, no_gradient = tiles.kl_and_logit_gradient(*few, weights_C=None, temperature=temperature)
    assert no_gradient is None
    # A GPU's sums are split by the number of positions.
    rounding = 1e-5 if hidden.is_cuda else 0
    torch.testing.assert_close(again, kl[:3], rtol=rounding, atol=rounding)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("name", ["random", "shifted", "peaked", "identical"])
def test_triton_tiles_match_float64_logits(name: str, temperature: float) -> None:
    """On a GPU if there is one, and otherwise in Triton's interpreter, whose products cannot be of bfloat16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_tiles(TritonTiles, half_precision_case(name, torch.float16, device), temperature, 1e-3)


@pytest.mark.skipif(not cpu_tiles.is_available(), reason="needs a CPU with AVX-512 for bfloat16, and a C++ compiler")
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("name", ["random", "shifted", "peaked", "identical"])
def test_cpu_tiles_match_float64_logits(name: str, temperature: float) -> None:
    check_tiles(CpuTiles, half_precision_case(name, torch.bfloat16), temperature, 4e-3)


def test_a_state_that_is_not_a_number_is_not_hidden() -> None:
    case = half_precision_case("random", torch.bfloat16)
    case[0][4, 0] = torch.nan
    case[2][7, 0] = torch.inf
    _, kl = reverse_kl_sum(*case)
    assert (~kl.isfinite()).nonzero().flatten().tolist() == [4, 7]


def test_without_kernels_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = half_precision_case("random", torch.bfloat16)
    found = []
    for available in (True, False):
        if not available:
            monkeypatch.setattr(cpu_tiles, "is_available", lambda: False)
        student = [tensor.clone().requires_grad_() for tensor in case[:2]]
        loss, kl = reverse_kl_sum(*student, *case[2:], chunk_tokens=32)
        found.append((kl, *torch.autograd.grad(loss, student)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        assert ((one - other).norm() / other.norm()).item() < 1e-2
