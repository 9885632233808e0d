"""Divergences from hidden states against float64 full logits, and against TRL's losses."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.experimental.gkd import GKDTrainer
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from posttrain.divergence import TeacherLogits, cpu_tiles, divergence_sum, divergence_sum_by_teacher
from posttrain.divergence.cpu_tiles import CpuTiles
from posttrain.divergence.measure import Measure
from posttrain.divergence.reference import divergence_reference
from posttrain.divergence.triton_tiles import TritonTiles

ROOT = Path(__file__).parent.parent
N, V, D, E = 23, 57, 8, 12

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Requests = dict[str, tuple[Case, dict[str, Any]]]


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
    "extreme": random_case(scale=50.0),
    "disjoint": disjoint_case(),
}


def weights_for(case: Case) -> torch.Tensor:
    return torch.linspace(0.0, 2.0, len(case[0]))


FORMS: dict[str, dict[str, Any]] = {
    "reverse_kl": {},
    "forward_kl": {"divergence": "forward_kl"},
    "jsd": {"divergence": "jsd"},
    "mostly_student_jsd": {"divergence": "jsd", "beta": 0.1},
    "capped": {"teacher_logit_cap": 5.0},
    "capped_forward_kl": {"divergence": "forward_kl", "teacher_logit_cap": 5.0},
    "capped_jsd": {"divergence": "jsd", "beta": 0.7, "teacher_logit_cap": 5.0},
}


def reference_gradients(case: Case, weights: torch.Tensor, **form: Any) -> tuple[torch.Tensor, ...]:
    hidden, head = (tensor.double().requires_grad_() for tensor in case[:2])
    divergence = divergence_reference(hidden, head, case[2], case[3], **form)
    loss = (divergence * weights.double()).sum()
    return (loss.detach(), divergence.detach(), *torch.autograd.grad(loss, (hidden, head)))


def with_gradients(case: Case, **arguments: Any) -> tuple[torch.Tensor, ...]:
    """Loss, divergences, and the gradients of the student's hidden states and head."""
    student = [tensor.clone().requires_grad_() for tensor in case[:2]]
    loss, divergence = divergence_sum(*student, *case[2:], **arguments)
    return (loss.detach(), divergence, *torch.autograd.grad(loss, student))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_match_float64_logits(name: str, form: str, temperature: float) -> None:
    case, settings = CASES[name], FORMS[form] | {"temperature": temperature}
    weights = weights_for(case)
    want_loss, want_divergence, *want_gradients = reference_gradients(case, weights, **settings)

    loss, divergence, *gradients = with_gradients(case, weights_N=weights, chunk_tokens=7, **settings)

    assert divergence.dtype == torch.float32
    assert not divergence.requires_grad
    assert divergence.min().item() >= -1e-6
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(divergence.double(), want_divergence, rtol=1e-5, atol=1e-5)
    logit_rounding = (case[0] @ case[1].T).abs().max().item() * 1e-6
    for found, want in zip(gradients, want_gradients, strict=True):
        atol = max(2e-5, 2e-5 * want.abs().max().item(), logit_rounding)
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=atol)


def test_gradient_is_scaled_by_what_follows_the_loss() -> None:
    case = CASES["random"]
    hidden, head = case[0].clone().requires_grad_(), case[1].clone().requires_grad_()
    once = torch.autograd.grad(divergence_sum(hidden, head, *case[2:])[0], (hidden, head))
    thrice = torch.autograd.grad(divergence_sum(hidden, head, *case[2:])[0] * 3, (hidden, head))
    for one, three in zip(once, thrice, strict=True):
        torch.testing.assert_close(three, one * 3)


@pytest.mark.parametrize("form", ["reverse_kl", "forward_kl", "jsd", "mostly_student_jsd"])
def test_identical_models_have_zero_divergence_and_gradient(form: str) -> None:
    _, divergence, by_hidden, _ = with_gradients(CASES["identical"], **FORMS[form])
    assert divergence.abs().max().item() < 1e-6
    assert by_hidden.abs().max().item() < 1e-6


def test_one_hot_models_on_different_tokens_have_the_known_values() -> None:
    case = CASES["disjoint"]
    # Each one's log-probability of the other's token is -100 nats.
    for form in ("reverse_kl", "forward_kl"):
        divergence = divergence_sum(*case, **FORMS[form])[1]
        torch.testing.assert_close(divergence, torch.full_like(divergence, 100.0))
    jsd = divergence_sum(*case, divergence="jsd", beta=0.1)[1]
    torch.testing.assert_close(jsd, torch.full_like(jsd, -0.1 * math.log(0.1) - 0.9 * math.log(0.9)))


def test_direction_is_student_then_teacher() -> None:
    """A student that covers one of the teacher's two modes loses ln 2; the other way round it is far more."""
    hidden = torch.ones(1, 1)
    one_mode, two_modes = torch.tensor([[20.0], [0.0], [0.0]]), torch.tensor([[20.0], [20.0], [0.0]])
    for form, seeking, covering in (("reverse_kl", 0.6931, 10 - 0.6931), ("forward_kl", 10 - 0.6931, 0.6931)):
        found = divergence_sum(hidden, one_mode, hidden, two_modes, **FORMS[form])[1].item()
        assert found == pytest.approx(seeking, abs=1e-3)
        found = divergence_sum(hidden, two_modes, hidden, one_mode, **FORMS[form])[1].item()
        assert found == pytest.approx(covering, abs=1e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk_tokens", [1, 5, N, 4 * N])
def test_size_of_a_tile_does_not_change_the_result(chunk_tokens: int, form: str) -> None:
    found = with_gradients(CASES["random"], chunk_tokens=chunk_tokens, **FORMS[form])
    want = with_gradients(CASES["random"], **FORMS[form])
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["reverse_kl", "jsd"])
def test_teachers_in_turn_give_the_sum_of_each(form: str, dtype: torch.dtype) -> None:
    student_hidden, student_head, *first = (tensor.to(dtype) for tensor in random_case())
    second = random_case(seed=1)[2:]
    cuts, caps = [0, 2, 2, N], [None, 5.0, 5.0]
    parts = [
        (slice(start, stop), hidden[start:stop].to(dtype), head.to(dtype), cap)
        for start, stop, (hidden, head), cap in zip(cuts, cuts[1:], (first, first, second), caps, strict=False)
    ]
    weights = weights_for(random_case())
    results = []
    for by_teacher in (True, False):
        hidden, head = (tensor.clone().requires_grad_() for tensor in (student_hidden, student_head))
        if by_teacher:
            teachers = (TeacherLogits(hidden_NE=h, head_VE=w, logit_cap=cap) for _, h, w, cap in parts)
            found = divergence_sum_by_teacher(hidden, head, teachers, **FORMS[form], weights_N=weights)
            losses, values = ([each] for each in found)
        else:
            losses, values = zip(
                *(
                    divergence_sum(
                        hidden[rows], head, h, w, **FORMS[form], weights_N=weights[rows], teacher_logit_cap=cap
                    )
                    for rows, h, w, cap in parts
                ),
                strict=True,
            )
        loss = torch.stack(losses).sum()
        loss.backward()
        results.append((loss.detach(), torch.cat(values), hidden.grad, head.grad))
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_inputs_are_exact_in_value_and_close_in_gradient(form: str) -> None:
    """Logits of bfloat16 inputs are not rounded for either KL; only the gradient products are bfloat16."""
    case: Case = tuple(tensor.bfloat16() for tensor in random_case(scale=3.0))  # type: ignore[assignment]
    weights = weights_for(case)
    _, want_divergence, *want_gradients = reference_gradients(case, weights, **FORMS[form])
    _, divergence, *gradients = with_gradients(case, weights_N=weights, chunk_tokens=9, **FORMS[form])
    rtol = 1e-3 if "jsd" in form else 1e-5
    torch.testing.assert_close(divergence.double(), want_divergence, rtol=rtol, atol=1e-5)
    for found, want in zip(gradients, want_gradients, strict=True):
        assert found.dtype == torch.bfloat16
        assert ((found.double() - want).norm() / want.norm()).item() < 1e-2


@pytest.mark.parametrize(("temperature", "cap"), [(1.0, None), (2.0, None), (0.7, 5.0)])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_agrees_with_trl(beta: float, temperature: float, cap: float | None) -> None:
    """With its chunked loss of the GOLD trainer, and with the one on full logits of the GKD trainer."""
    case = CASES["random"]
    form: dict[str, Any] = {"divergence": "jsd", "beta": beta, "temperature": temperature, "teacher_logit_cap": cap}
    loss, divergence, *gradients = with_gradients(case, **form)
    student = [tensor.clone().requires_grad_() for tensor in case[:2]]
    settings = beta, temperature, 1.0, None, 1.0, cap
    chunked, _ = ChunkedDivergenceFunction.apply(*student, None, *case[2:], None, *settings)
    torch.testing.assert_close(divergence, chunked)
    for found, want in zip(gradients, torch.autograd.grad(chunked.sum(), student), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)

    logits, teacher_logits = case[0] @ case[1].T, case[2] @ case[3].T
    if cap is not None:
        teacher_logits = cap * torch.tanh(teacher_logits / cap)
    full = GKDTrainer.generalized_jsd_loss(logits, teacher_logits, beta=beta, temperature=temperature, reduction="sum")
    torch.testing.assert_close(loss, full)


def test_float32_arithmetic_survives_autocast() -> None:
    case = CASES["peaked"]
    want = divergence_sum(*case)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = divergence_sum(*case)[1]
    torch.testing.assert_close(found, want, rtol=0, atol=0)


def test_a_second_backward_is_refused_rather_than_wrong() -> None:
    inputs = [tensor.bfloat16().requires_grad_() for tensor in random_case()]
    loss, _ = divergence_sum(*inputs)
    torch.autograd.grad(loss, inputs[:2], retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, inputs[:2])


def test_frozen_student_parts_get_no_gradient() -> None:
    case = CASES["random"]
    hidden = case[0].clone().requires_grad_()
    head = case[1].clone()
    divergence_sum(hidden, head, *case[2:])[0].backward()
    assert hidden.grad is not None
    assert head.grad is None
    with torch.no_grad():
        assert not divergence_sum(hidden, head, *case[2:])[0].requires_grad


def test_no_positions_give_a_zero_loss_that_still_backpropagates() -> None:
    case = CASES["random"]
    hidden = case[0][:0].clone().requires_grad_()
    head = case[1].clone().requires_grad_()
    loss, kl = divergence_sum(hidden, head, case[2][:0], case[3])
    loss.backward()
    assert loss.item() == 0.0
    assert kl.shape == (0,)
    assert head.grad is not None
    assert head.grad.abs().sum().item() == 0.0


def test_shapes_that_do_not_fit_are_refused() -> None:
    hidden, head, teacher_hidden, teacher_head = CASES["random"]
    with pytest.raises(ValueError, match="vocabulary entries"):
        divergence_sum(hidden, head, teacher_hidden, teacher_head[:-1])
    with pytest.raises(ValueError, match="positions"):
        divergence_sum(hidden, head, teacher_hidden[:-1], teacher_head)
    with pytest.raises(ValueError, match="teacher_hidden"):
        divergence_sum(hidden, head, hidden, teacher_head)
    with pytest.raises(ValueError, match="weights have shape"):
        divergence_sum(hidden, head, teacher_hidden, teacher_head, weights_N=torch.ones(N - 1))
    with pytest.raises(ValueError, match="temperature"):
        divergence_sum(hidden, head, teacher_hidden, teacher_head, temperature=0.0)


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
    elif name == "near":  # about 1e-4 nats apart
        teacher_hidden, teacher_head = hidden.clone(), head + 0.003 * normal(vocabulary, 24)
    return tuple(tensor.to(device, dtype) for tensor in (hidden, head, teacher_hidden, teacher_head))  # type: ignore[return-value]


def reference_by_logits(case: Case, **form: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergences, and the gradient of their weighted sum by the student's logits."""
    logits = (case[0].double() @ case[1].double().T).requires_grad_()
    eye = torch.eye(len(case[1]), dtype=torch.float64, device=logits.device)
    divergence = divergence_reference(logits, eye, *case[2:], **form)
    loss = (divergence * weights_for(case).to(logits.device)).sum()
    return divergence.detach(), torch.autograd.grad(loss, logits)[0]


def assert_close_by_logits(
    found: tuple[torch.Tensor, torch.Tensor | None], case: Case, tolerance: float, **form: Any
) -> None:
    (divergence, gradient), (want_divergence, want_gradient) = found, reference_by_logits(case, **form)
    assert gradient is not None
    # float32 sums, but the Jensen-Shannon divergence is one of rounded numbers.
    rtol = 1e-3 if form.get("divergence") == "jsd" else 1e-4
    torch.testing.assert_close(divergence.double(), want_divergence, rtol=rtol, atol=2e-5)
    # Relative to the gradient, or to next to nothing where there is none.
    size = max(want_gradient.norm().item(), weights_for(case).norm().item() / 1e5)
    assert (gradient.double() - want_gradient).norm().item() < tolerance * size


def check_tiles(kind: type[TritonTiles] | type[CpuTiles], case: Case, tolerance: float, **form: Any) -> None:
    hidden, head, teacher_hidden, teacher_head = case
    weights = weights_for(case).to(hidden.device)
    tiles = kind(len(hidden) + 5, head, teacher_head, Measure(**form))
    found = tiles.divergence_and_logit_gradient(hidden, teacher_hidden, weights_C=weights)
    assert_close_by_logits(found, case, tolerance, **form)
    few = hidden[:3], teacher_hidden[:3]
    again, no_gradient = tiles.divergence_and_logit_gradient(*few, weights_C=None)
    assert no_gradient is None
    # A GPU's sums are split by the number of positions.
    rounding = 1e-5 if hidden.is_cuda else 0
    torch.testing.assert_close(again, found[0][:3], rtol=rounding, atol=rounding)


@pytest.mark.parametrize(("temperature", "cap"), [(1.0, None), (1.7, None), (1.7, 5.0)])
@pytest.mark.parametrize("name", ["random", "shifted", "peaked", "identical"])
def test_triton_tiles_match_float64_logits(name: str, temperature: float, cap: float | None) -> None:
    """On a GPU if there is one, and otherwise in Triton's interpreter, whose products cannot be of bfloat16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = half_precision_case(name, torch.float16, device)
    check_tiles(TritonTiles, case, 1e-3, temperature=temperature, teacher_logit_cap=cap)


@pytest.mark.skipif(not cpu_tiles.is_available(), reason="needs a CPU with AVX-512 for bfloat16, and a C++ compiler")
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["random", "shifted", "peaked", "identical", "near"])
def test_cpu_tiles_match_float64_logits(name: str, form: str, temperature: float) -> None:
    case = half_precision_case(name, torch.bfloat16)
    check_tiles(CpuTiles, case, 4e-3, temperature=temperature, **FORMS[form])


def test_a_state_that_is_not_a_number_is_not_hidden() -> None:
    case = half_precision_case("random", torch.bfloat16)
    case[0][4, 0] = torch.nan
    case[2][7, 0] = torch.inf
    _, kl = divergence_sum(*case)
    assert (~kl.isfinite()).nonzero().flatten().tolist() == [4, 7]


def test_without_kernels_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = half_precision_case("random", torch.bfloat16)
    found = []
    for available in (True, False):
        if not available:
            monkeypatch.setattr(cpu_tiles, "is_available", lambda: False)
        student = [tensor.clone().requires_grad_() for tensor in case[:2]]
        loss, kl = divergence_sum(*student, *case[2:], chunk_tokens=32)
        found.append((kl, *torch.autograd.grad(loss, student)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        assert ((one - other).norm() / other.norm()).item() < 1e-2


@pytest.fixture(scope="module")
def shard_answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Requests, list[dict[tuple[int, str], Any]]]:
    """Requests by name, and what each of three processes answered by group size and name."""
    folder = tmp_path_factory.mktemp("shards")
    half: Case = tuple(tensor.bfloat16() for tensor in random_case(scale=3.0))  # type: ignore[assignment]
    requests: Requests = {}
    for name, form in FORMS.items():
        settings = form | {"temperature": 0.7, "weights_N": weights_for(half), "chunk_tokens": 9}
        requests |= {name: (CASES["random"], settings), f"{name} of bfloat16": (half, settings)}
    torch.save(requests, folder / "requests.pt")
    torch.save(half_precision_case("random", torch.float16), folder / "tiles.pt")
    command = [sys.executable, "-m", "tests.vocabulary_shards"]
    processes = [subprocess.Popen([*command, str(rank), str(folder)], cwd=ROOT) for rank in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    return requests, [torch.load(folder / f"answers-{rank}.pt") for rank in range(3)]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_slices_of_the_vocabulary_give_what_the_whole_gives(form: str, size: int, shard_answers: Any) -> None:
    requests, answers = shard_answers
    for name in (form, f"{form} of bfloat16"):
        case, settings = requests[name]
        want = with_gradients(case, **settings)
        found = [answers[rank][size, name] for rank in range(size)]
        by_head = torch.cat([of_rank[3] for of_rank in found])
        for loss, divergence, by_hidden, _ in found:
            rtol = 1e-3 if "jsd" in name and case[0].dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(loss, want[0], rtol=rtol, atol=1e-5)
            torch.testing.assert_close(divergence, want[1], rtol=rtol, atol=1e-5)
            for one, other in ((by_hidden, want[2]), (by_head, want[3])):
                error = (one.double() - other.double()).norm() / other.double().norm()
                assert error.item() < (1e-2 if case[0].dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_triton_tiles_over_slices_of_the_vocabulary_match_float64_logits(size: int, shard_answers: Any) -> None:
    _, answers = shard_answers
    found = [answers[rank][size, "tiles"] for rank in range(size)]
    case, gradient = half_precision_case("random", torch.float16), torch.cat([gradient for _, gradient in found], 1)
    for divergence, _ in found:
        assert_close_by_logits((divergence, gradient), case, 1e-3, temperature=0.7)


def test_processes_with_other_positions_are_refused_in_all_of_them(shard_answers: Any) -> None:
    for rank, answers in enumerate(shard_answers[1]):
        assert f"this process has {N - rank} positions" in answers[3, "other positions"]
