"""The checks of `client.verify`, on the server's own products in the precision that is asked for.

Each identity holds for every smooth loss, or for every model with the invariance, and joins numbers
that come by different ways: products with products, products with losses at displaced parameters
(which nothing but the model's own forward pass computes), and products with the gradient.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import numpy as np

from hvp_client._verification import (
    LADDER,
    Check,
    Rescaling,
    Tolerance,
    Verification,
    judged,
    of_differences,
    rescalings,
    sign_of,
    tolerance,
)
from hvp_client.awaited.operator import AsyncOperator
from hvp_client.awaited.vector import AsyncVector, combine

_FACTOR = 1.25  # by which parameters are rescaled to see that the loss stays
_MOST = 1 << 25  # elements of a rescaled pair: they travel


async def verify(
    H: AsyncOperator, G: AsyncOperator | None, whole: AsyncOperator, *, seed: int
) -> Verification:
    """Check a Hessian and a Gauss-Newton matrix of one loss.

    Args:
        H: The Hessian.
        G: The Gauss-Newton matrix, with the same settings; None where the model has no outputs.
        whole: The Hessian in full precision, of whose losses differences are taken.
        seed: Seed of the random vectors.

    Returns:
        The checks. Cost: some 7 products, a gradient, and 55 forward passes; and for each pair of
        parameters that the model may be rescaled in 2 products and a gradient with them alone.
    """
    loss = await H.loss()
    allowed = tolerance(H.dtype.name, H.precision)
    async with AsyncExitStack() as stack:
        checks = [each async for each in _of_products(stack, H, G, whole, allowed, seed)]
    sizes = {each.name: each.num_elements for each in H.parameter_tensors}
    for each in rescalings(H.parameter_names):
        if sum(sizes[name] for name in (*each.up, *each.down)) <= _MOST:
            checks += await _rescaled(H, each, loss, allowed)
    return Verification(
        checks=tuple(checks),
        loss=loss,
        num_parameters=H.shape[0],
        dtype=H.dtype.name,
        precision=H.precision,
    )


async def _of_products(
    stack: AsyncExitStack,
    H: AsyncOperator,
    G: AsyncOperator | None,
    whole: AsyncOperator,
    allowed: Tolerance,
    seed: int,
) -> AsyncIterator[Check]:
    # v is random; u is the unit vector along Hv, so that no number drowns in random directions.
    v = await stack.enter_async_context(await H.random_vector(seed=seed, distribution="sphere"))
    hv = await stack.enter_async_context(await (H @ v))
    size = await hv.norm()
    if size == 0:
        yield judged("Hv is zero: nothing to compare", 0.0, allowed.algebra)
        return
    u = await stack.enter_async_context(await (hv / size))
    hu = await stack.enter_async_context(await (H @ u))
    size_u = await hu.norm()
    yield judged("u·Hv = v·Hu", abs(size - await v.dot(hu)) / size, allowed.algebra)

    both = await stack.enter_async_context(await combine(H._session, [(2.0, v), (-3.0, u)]))
    of_both = await stack.enter_async_context(await (H @ both))
    rest = await stack.enter_async_context(
        await combine(H._session, [(1.0, of_both), (-2.0, hv), (3.0, hu)])
    )
    error = await rest.norm() / (2 * size + 3 * size_u)
    yield judged("H(2v - 3u) = 2Hv - 3Hu", error, allowed.algebra)

    g = await stack.enter_async_context(await H.gradient())
    squared = await g.norm() ** 2
    if squared > 0:
        error = abs(await H.slope(g) - squared) / squared
        yield judged("slope along ∇L = ∇L·∇L", error, allowed.algebra, f"|∇L| = {squared**0.5:.3g}")
    async for check in _of_differences(whole, v, u, (size, size_u), await u.dot(hu), allowed):
        yield check
    if G is None:
        return
    gu = await stack.enter_async_context(await (G @ u))
    form, product, bound = await G.quadratic(u), await u.dot(gu), await gu.norm()
    if bound > 0:
        yield judged("forward u·Gu = u·(Gu)", abs(form - product) / bound, allowed.algebra)
        yield judged("u·Gu is not negative", max(0.0, -product) / bound, allowed.algebra)


async def _of_differences(
    whole: AsyncOperator,
    v: AsyncVector,
    u: AsyncVector,
    sizes: tuple[float, float],
    curvature: float,
    allowed: Tolerance,
) -> AsyncIterator[Check]:
    loss = await whole.loss()
    # Steps that change the loss by this much, were the curvature as large as |Hv|.
    steps = tolerance(whole.dtype.name, whole.precision)
    change = 2 * steps.change * max(abs(loss), 1e-6)
    unit_v, unit_u = (math.sqrt(change / size) for size in sizes)
    points = [(0.0, sign * h * unit_u) for h in LADDER for sign in (1, -1)]
    signs = ((1, 1), (1, -1), (-1, 1), (-1, -1))
    points += [(a * h * unit_v, b * h * unit_u) for h in LADDER for a, b in signs]
    losses = await whole._losses([v, u], points)
    second = [
        (plus - 2 * loss + minus) / (h * unit_u) ** 2
        for h, plus, minus in zip(LADDER, losses[0::2], losses[1::2], strict=False)
    ]
    note = f"{curvature:.6g} by products"
    yield of_differences(
        "second difference of L along u = u·Hu",
        second, curvature, sizes[1], allowed.differences, note,
    )  # fmt: skip
    rest = losses[2 * len(LADDER) :]
    mixed = [
        (rest[i] - rest[i + 1] - rest[i + 2] + rest[i + 3]) / (4 * h**2 * unit_v * unit_u)
        for h, i in zip(LADDER, range(0, len(rest), 4), strict=True)
    ]
    yield of_differences(
        "mixed difference of L along v and u = u·Hv",
        mixed, sizes[0], sizes[0], allowed.differences, f"{sizes[0]:.6g} by products",
    )  # fmt: skip


async def _rescaled(
    H: AsyncOperator, pair: Rescaling, loss: float, allowed: Tolerance
) -> list[Check]:
    """The identities of a rescaling θ ↦ exp(tG)θ: g·Gθ = 0 and H(Gθ) = −Gg.

    Returns:
        The checks; none where the loss shows that the model has no such invariance.
    """
    part = await H.restrict(*pair.up, *pair.down)
    sizes = [(each.name, each.num_elements) for each in part.parameter_tensors]
    sign, theta = sign_of(pair, sizes), (await (await part.parameters()).numpy()).astype(float)
    up, down = np.where(sign > 0, theta, 0.0), np.where(sign < 0, theta, 0.0)
    async with part._columns(np.stack([up, down], axis=1)) as directions:
        points = [(_FACTOR - 1, 1 / _FACTOR - 1), (_FACTOR - 1, 0.0)]
        together, alone = await part._losses(directions, points)
        changed, least = abs(together - loss) / abs(loss), allowed.algebra / 10
        if not changed <= least or not abs(alone - loss) / abs(loss) > 10 * least:
            return []
        products = await part._apply(directions)
        of_up, of_down = [(await each.numpy()).astype(float) for each in products]
        for each in products:
            await each.delete()
    async with await part.gradient() as gradient:
        g = (await gradient.numpy()).astype(float)
    note = f"{pair.title}: {pair.up[0].rpartition('.')[0]}"
    size = float(np.linalg.norm(of_up) + np.linalg.norm(of_down))
    error = float(np.linalg.norm(of_up - of_down + sign * g))
    checks = []
    # Both slopes may drown in rounding, which sums over the elements as a random walk does.
    walk = np.linalg.norm(g) * np.linalg.norm(theta) / math.sqrt(len(g))
    scale = float(abs(g @ up) + abs(g @ down) + walk)
    if scale > 0:
        checks.append(
            judged("∇L·Gθ = 0", abs(float(g @ (up - down))) / scale, allowed.algebra, note)
        )
    if size > 0:
        checks.append(judged("H(Gθ) = -G∇L", error / size, allowed.algebra, note))
    return checks
