"""Losses against automatic differentiation, attention against torch's."""

from __future__ import annotations

import pytest
import torch
from hvp_core.errors import CurvatureError
from hvp_core.losses.loss import CrossEntropy, Logistic, Loss, SquaredError
from hvp_core.model.data import token_batch
from hvp_core.model.huggingface import attention
from hvp_core.precision import exact, layer_norm
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


CASES: dict[str, tuple[Loss, Tensor, Tensor]] = {
    "cross-entropy": (
        CrossEntropy(),
        draw(2, 4, 5),
        torch.tensor([[0, 4, -100, 2], [-100, 1, 1, 3]]),
    ),
    "squared error": (SquaredError(), draw(3, 2), draw(3, 2, seed=1)),
    "logistic": (Logistic(), draw(4, 2), (draw(4, 2, seed=1) > 0).double()),
}


@pytest.mark.parametrize("name", CASES)
def test_a_loss_has_the_derivatives_it_says(name: str) -> None:
    loss, z, target = CASES[name]
    z_dot = draw(*z.shape, seed=2)
    gradient = torch.func.grad(lambda y: loss.value(y, target))
    expected, expected_dot = torch.func.jvp(gradient, (z,), (z_dot,))[:2]
    torch.testing.assert_close(loss.gradient(z, target), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(loss.curve(z, z_dot, target), expected_dot, rtol=1e-12, atol=1e-14)


def test_cross_entropy_counts_the_labels_that_are_there() -> None:
    loss, z, target = CASES["cross-entropy"]
    assert loss.weight(target) == 6
    theirs = nn.functional.cross_entropy(z.flatten(0, 1), target.flatten(), reduction="sum")
    torch.testing.assert_close(loss.value(z, target), theirs)


def test_cross_entropy_of_huge_logits_is_finite() -> None:
    z = torch.tensor([[1e4, -1e4]])
    target = torch.tensor([1])
    assert float(CrossEntropy().value(z, target)) == 2e4
    assert bool(CrossEntropy().gradient(z, target).isfinite().all())


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_torchs(groups: int, masked: bool) -> None:
    q, k, v = (
        draw(2, 4, 5, 6),
        draw(2, 4 // groups, 5, 6, seed=1),
        draw(2, 4 // groups, 5, 3, seed=2),
    )
    mask = None
    if masked:
        mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
        mask[0, :, :, :2] = False  # the first two rows may look nowhere
    layer = nn.Module()
    layer.is_causal = True  # type: ignore[assignment]
    found, _ = attention.attention(layer, q, k, v, mask, scaling=0.3)
    with sdpa_kernel(SDPBackend.MATH):
        expected = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=0.3, enable_gqa=True
        )
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-12, atol=1e-14)


def test_attention_sinks_are_refused() -> None:
    q = draw(1, 1, 2, 2)
    with pytest.raises(CurvatureError, match="s_aux"):
        attention.attention(nn.Module(), q, q, q, None, s_aux=draw(1))


def test_the_layer_norm_in_parts_is_the_layer_norm() -> None:
    x, w, b = draw(3, 4), draw(4, seed=1), draw(4, seed=2)
    theirs = nn.functional.layer_norm(x, [4], w, b, 1e-3)
    torch.testing.assert_close(layer_norm(x, [4], w, b, 1e-3), theirs, rtol=1e-13, atol=1e-14)
    with exact():
        torch.testing.assert_close(
            nn.functional.layer_norm(x, [4], w, b, 1e-3), theirs, rtol=1e-13, atol=1e-14
        )


def test_float64_is_not_rounded_where_a_model_asks_for_float32() -> None:
    x = draw(3)
    with exact():
        assert x.to(torch.float32).dtype == torch.float64
        assert x.float().dtype == torch.float64
        assert x.softmax(-1, dtype=torch.float32).dtype == torch.float64
        assert x.float().half().dtype == torch.float16
        assert torch.ones(2, dtype=torch.long).float().dtype == torch.float32
    assert x.float().dtype == torch.float32


def test_targets_are_shifted_and_the_last_position_has_none() -> None:
    batch = token_batch(torch.tensor([[5, 6, 7]]))
    assert batch.targets.tolist() == [[6, 7, -100]]


@pytest.mark.parametrize(
    ("ids", "labels", "mask", "reason"),
    [
        (torch.zeros(0, 4).long(), None, None, "BATCH_EMPTY"),
        (torch.zeros(2, 1).long(), None, None, "BATCH_EMPTY"),
        (torch.zeros(4).long(), None, None, "BATCH_EMPTY"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 2).long(), None, "SHAPE_MISMATCH"),
        (torch.zeros(2, 3).long(), None, torch.ones(3, 2), "SHAPE_MISMATCH"),
        (torch.zeros(2, 3).long(), torch.full((2, 3), -100), None, "NO_TARGETS"),
        (torch.zeros(1, 3).long(), torch.tensor([[4, -100, -100]]), None, "NO_TARGETS"),
    ],
)
def test_a_batch_that_means_nothing_is_refused(
    ids: Tensor, labels: Tensor | None, mask: Tensor | None, reason: str
) -> None:
    with pytest.raises(CurvatureError) as caught:
        token_batch(ids, labels, mask)
    assert caught.value.reason == reason


def test_padding_is_no_target_and_nothing_that_follows_it_if_there_are_no_labels() -> None:
    ids = torch.arange(10).view(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    ignored = -100
    assert token_batch(ids, None, mask).targets.tolist() == [
        [ignored, ignored, 3, 4, ignored],
        [6, 7, ignored, ignored, ignored],
    ]
    assert token_batch(ids, ids, mask).targets[0].tolist() == [1, 2, 3, 4, ignored]
    with pytest.raises(CurvatureError, match="NO_TARGETS"):
        token_batch(ids, None, torch.zeros_like(mask))
