"""Triton kernels of attention and its tangents; the equations are in `rule`.

Each kernel computes the first derivatives (PRIMAL), their tangents for up to two PROBES, or both
in one pass over tiles of S, which it forms again from Q, K and L. What has no tangent in it (P, dP,
dS) serves both probes. No sum crosses programs, so results do not depend on the order in which
these run.

Exponentials are in base 2: `unit` turns a raw product q·k, or its cap, into base-2 logits.
"""

from __future__ import annotations

__all__ = ["Rows", "backward_keys", "backward_queries", "forward", "row_sums"]

from hvp_core.attention.flash_parts import (
    LOG2E,
    Rows,
    key_range,
    load,
    load_rows,
    looks_at,
    scaled,
    schedule,
    span,
    store,
    store_rows,
    tanh,
)
from hvp_core.attention.flash_triton import tl, triton


@triton.jit
def forward(
    q, k, v, q_dot, k_dot, v_dot, q_dot2, k_dot2, v_dot2,
    o, o_dot, o_dot2, lse, lse_dot, lse_dot2, start, stop,
    scale, softcap, window, heads, group, s, t, all_heads, chunk,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    PRIMAL: tl.constexpr, PROBES: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """O, L and Ȯ, L̇ of BM queries. Without PRIMAL, O and L are inputs.

    Tile products: PRIMAL 2, or else 1, and 4 for each of PROBES.
    """
    q_dots, k_dots, v_dots = (q_dot, q_dot2), (k_dot, k_dot2), (v_dot, v_dot2)
    o_dots, lse_dots = (o_dot, o_dot2), (lse_dot, lse_dot2)
    tile, index = schedule(tl.cdiv(s, BM), all_heads, chunk)
    b, h = index // heads, index % heads
    hk = h // group
    m0 = tile * BM
    if CAUSAL:
        m0 = (tl.cdiv(s, BM) - 1 - tile) * BM  # the last queries see most keys
    offset = t - s
    first, last = span(start, stop, b, t)
    some_first, some_last, all_first, all_last = key_range(
        first, last, m0, offset, window, BM, CAUSAL
    )
    some_first = some_first // BN * BN
    query = m0 + tl.arange(0, BM)
    q_tile = load(q, b, h, m0, s, BM, D, BD, TMA)
    q_dot_tiles, us, shifts, acc_dots = (), (), (), ()
    for n in tl.static_range(PROBES):
        q_dot_tiles += (load(q_dots[n], b, h, m0, s, BM, D, BD, TMA),)
        us += (tl.zeros([BM], tl.float32),)
        shifts += (tl.zeros([BM], tl.float32),)
        acc_dots += (tl.zeros([BM, BE], tl.float32),)
    if PRIMAL:
        top = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, BE], tl.float32)
    else:
        log2_total = load_rows(lse, b, h, heads, m0, s, BM) * LOG2E
        # A query with no key: −∞ here would make −∞ + ∞ of its masked logits.
        log2_total = tl.where(log2_total == float("-inf"), 0.0, log2_total)
    for i in range(0, tl.cdiv(some_last - some_first, BN)):
        n0 = some_first + i * BN
        k_tile = load(k, b, hk, n0, t, BN, D, BD, TMA)
        z = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        z_dots = ()
        for n in tl.static_range(PROBES):
            z_dot = tl.dot(q_dot_tiles[n], tl.trans(k_tile), input_precision=PRECISION)
            k_dot_tile = load(k_dots[n], b, hk, n0, t, BN, D, BD, TMA)
            z_dot = tl.dot(q_tile, tl.trans(k_dot_tile), z_dot, input_precision=PRECISION)
            z_dots += (z_dot * scale,)
        unit = scale * LOG2E
        if softcap is not None:
            z = tanh(z * (scale / softcap))
            unit = softcap * LOG2E
            z_dots = scaled(z_dots, 1.0 - z * z, PROBES)
        if (n0 < all_first) | (n0 + BN > all_last):
            key = n0 + tl.arange(0, BN)
            keep = looks_at(query[:, None], key[None, :], first, last, offset, window, CAUSAL)
            z = tl.where(keep, z, float("-inf"))
        if PRIMAL:
            new = tl.maximum(top, tl.max(z, 1) * unit)
            new_finite = tl.where(new == float("-inf"), 0.0, new)
            p = tl.exp2(z * unit - new_finite[:, None])
            fade = tl.exp2(top - new_finite)
            top = new
            total = total * fade + tl.sum(p, 1)
        else:
            p = tl.exp2(z * unit - log2_total[:, None])
        v_tile = load(v, b, hk, n0, t, BN, E, BE, TMA)
        p_low = p.to(v_tile.dtype)
        new_us, new_shifts, new_acc_dots = (), (), ()
        for n in tl.static_range(PROBES):
            z_dot, u, shift, acc_dot = z_dots[n], us[n], shifts[n], acc_dots[n]
            if i == 0:
                # ṡ less any constant of its row gives the same tangent, and a smaller P∘ṡ to round.
                weight = tl.sum(p, 1)
                shift = tl.sum(p * z_dot, 1) / tl.where(weight > 0.0, weight, 1.0)
            p_dot = p * (z_dot - shift[:, None])
            if PRIMAL:
                u = u * fade
                acc_dot = acc_dot * fade[:, None]
            u += tl.sum(p_dot, 1)
            p_dot_low = p_dot.to(v_tile.dtype)
            acc_dot = tl.dot(p_dot_low, v_tile, acc_dot, input_precision=PRECISION)
            v_dot_tile = load(v_dots[n], b, hk, n0, t, BN, E, BE, TMA)
            acc_dot = tl.dot(p_low, v_dot_tile, acc_dot, input_precision=PRECISION)
            new_us += (u,)
            new_shifts += (shift,)
            new_acc_dots += (acc_dot,)
        us, shifts, acc_dots = new_us, new_shifts, new_acc_dots
        if PRIMAL:
            acc = tl.dot(p_low, v_tile, acc * fade[:, None], input_precision=PRECISION)
    if PRIMAL:
        found = total > 0.0
        share = tl.where(found, 1.0 / tl.where(found, total, 1.0), 0.0)
        o_tile = acc * share[:, None]
        store(o, o_tile, b, h, m0, s, BM, E)
        log_total = tl.where(found, (top + tl.log2(total)) / LOG2E, float("-inf"))
        store_rows(lse, log_total, b, h, heads, m0, s, BM)
    elif PROBES:
        o_tile = load(o, b, h, m0, s, BM, E, BE, False).to(tl.float32)
    for n in tl.static_range(PROBES):
        u, acc_dot = us[n], acc_dots[n]
        if PRIMAL:
            u = u * share
            acc_dot = acc_dot * share[:, None]
        store(o_dots[n], acc_dot - u[:, None] * o_tile, b, h, m0, s, BM, E)
        store_rows(lse_dots[n], u + shifts[n], b, h, heads, m0, s, BM)


@triton.jit
def row_sums(
    o, o_dot, o_bar, o_bar_dot, delta, delta_dot, heads, s,
    E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, DUAL: tl.constexpr,
):  # fmt: skip
    """D = Σ dO∘O and Ḋ = Σ (ḋO∘O + dO∘Ȯ) of BM queries, each input read once."""
    tiles = tl.cdiv(s, BM)
    index = tl.program_id(0) // tiles
    m0 = tl.program_id(0) % tiles * BM
    b, h = index // heads, index % heads
    o_tile = load(o, b, h, m0, s, BM, E, BE, False).to(tl.float32)
    o_bar_tile = load(o_bar, b, h, m0, s, BM, E, BE, False).to(tl.float32)
    store_rows(delta, tl.sum(o_tile * o_bar_tile, 1), b, h, heads, m0, s, BM)
    if DUAL:
        o_dot_tile = load(o_dot, b, h, m0, s, BM, E, BE, False).to(tl.float32)
        o_bar_dot_tile = load(o_bar_dot, b, h, m0, s, BM, E, BE, False).to(tl.float32)
        both = o_bar_dot_tile * o_tile + o_bar_tile * o_dot_tile
        store_rows(delta_dot, tl.sum(both, 1), b, h, heads, m0, s, BM)


@triton.jit
def backward_keys(
    q, k, v, q_dot, k_dot, v_dot, q_dot2, k_dot2, v_dot2, o_bar, o_bar_dot, o_bar_dot2,
    lse, lse_dot, lse_dot2, delta, delta_dot, delta_dot2,
    dk, dv, dk_dot, dv_dot, dk_dot2, dv_dot2, start, stop,
    scale, softcap, window, heads, group, parts, s, t, all_heads, chunk,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    PRIMAL: tl.constexpr, PROBES: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """DK (KEYS), dV (VALUES) and their tangents for BN keys, summed over group / parts heads.

    Everything is transposed, (BN, BM): then P and dS are left operands as they come out of the
    products before. Tile products, KEYS and VALUES: PRIMAL 4, or else 2, and 8 for each of PROBES.
    """
    q_dots, k_dots, v_dots = (q_dot, q_dot2), (k_dot, k_dot2), (v_dot, v_dot2)
    o_bar_dots, lse_dots = (o_bar_dot, o_bar_dot2), (lse_dot, lse_dot2)
    delta_dots, dk_dots, dv_dots = (delta_dot, delta_dot2), (dk_dot, dk_dot2), (dv_dot, dv_dot2)
    tile, index = schedule(tl.cdiv(t, BN), all_heads, chunk)
    heads_out = heads // group * parts
    b, h_out = index // heads_out, index % heads_out
    hk = h_out // parts
    heads_here = group // parts
    n0 = tile * BN
    offset = t - s
    first, last = span(start, stop, b, t)
    # Queries that look at some, and at all, of these keys.
    some_first, some_last, all_first, all_last = b * 0, b * 0 + s, b * 0, b * 0 + s
    if CAUSAL:
        some_first = tl.maximum(some_first, n0 - offset) // BM * BM
        all_first = tl.maximum(all_first, n0 + BN - 1 - offset)
    if window is not None:
        some_last = tl.minimum(some_last, n0 + BN - 1 - offset + window)
        all_last = tl.minimum(all_last, n0 - offset + window)
    if start is not None:
        some_last = tl.where((n0 < last) & (n0 + BN > first), some_last, some_first)
        all_last = tl.where((n0 >= first) & (n0 + BN <= last), all_last, 0)
    count = tl.maximum(tl.cdiv(some_last - some_first, BM), 0)
    key = n0 + tl.arange(0, BN)
    k_tile = load(k, b, hk, n0, t, BN, D, BD, TMA)
    k_dot_tiles, v_dot_tiles, dk_dot_accs, dv_dot_accs = (), (), (), ()
    for n in tl.static_range(PROBES):
        k_dot_tiles += (load(k_dots[n], b, hk, n0, t, BN, D, BD, TMA),)
    if KEYS:
        v_tile = load(v, b, hk, n0, t, BN, E, BE, TMA)
        if PRIMAL:
            dk_acc = tl.zeros([BN, BD], tl.float32)
        for n in tl.static_range(PROBES):
            v_dot_tiles += (load(v_dots[n], b, hk, n0, t, BN, E, BE, TMA),)
            dk_dot_accs += (tl.zeros([BN, BD], tl.float32),)
    if VALUES:
        if PRIMAL:
            dv_acc = tl.zeros([BN, BE], tl.float32)
        for _ in tl.static_range(PROBES):
            dv_dot_accs += (tl.zeros([BN, BE], tl.float32),)
    # One loop over the heads' queries: an inner loop for each head would drain the pipeline.
    for i in range(0, count * heads_here):
        h = h_out * heads_here + i // count
        m0 = some_first + i % count * BM
        q_tile = load(q, b, h, m0, s, BM, D, BD, TMA)
        z = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        unit = scale * LOG2E
        q_dot_tiles, z_dots = (), ()
        for n in tl.static_range(PROBES):
            z_dot = tl.dot(k_dot_tiles[n], tl.trans(q_tile), input_precision=PRECISION)
            q_dot_tile = load(q_dots[n], b, h, m0, s, BM, D, BD, TMA)
            z_dot = tl.dot(k_tile, tl.trans(q_dot_tile), z_dot, input_precision=PRECISION)
            z_dots += (z_dot * scale,)
            q_dot_tiles += (q_dot_tile,)
        slope_dots = ()
        if softcap is not None:
            z = tanh(z * (scale / softcap))
            unit = softcap * LOG2E
            slope = 1.0 - z * z
            z_dots = scaled(z_dots, slope, PROBES)
            for n in tl.static_range(PROBES):
                slope_dots += (z * z_dots[n] * (-2.0 / softcap),)
        log2_total = load_rows(lse, b, h, heads, m0, s, BM) * LOG2E
        p = tl.exp2(z * unit - log2_total[None, :])
        if (m0 < all_first) | (m0 + BM > all_last):
            query = m0 + tl.arange(0, BM)
            keep = looks_at(query[None, :], key[:, None], first, last, offset, window, CAUSAL)
            p = tl.where(keep & (query[None, :] < s), p, 0.0)
        o_bar_tile = load(o_bar, b, h, m0, s, BM, E, BE, TMA)
        p_low = p.to(q_tile.dtype)
        o_bar_dot_tiles, p_dots, dv_sums, ds_dots, dk_sums = (), (), (), (), ()
        for n in tl.static_range(PROBES):
            o_bar_dot_tiles += (load(o_bar_dots[n], b, h, m0, s, BM, E, BE, TMA),)
            l_dot = load_rows(lse_dots[n], b, h, heads, m0, s, BM)
            p_dots += (p * (z_dots[n] - l_dot[None, :]),)
        if VALUES:
            if PRIMAL:
                dv_acc = tl.dot(p_low, o_bar_tile, dv_acc, input_precision=PRECISION)
            for n in tl.static_range(PROBES):
                low = p_dots[n].to(q_tile.dtype)
                total = tl.dot(low, o_bar_tile, dv_dot_accs[n], input_precision=PRECISION)
                total = tl.dot(p_low, o_bar_dot_tiles[n], total, input_precision=PRECISION)
                dv_sums += (total,)
            dv_dot_accs = dv_sums
        if KEYS:
            dp = tl.dot(v_tile, tl.trans(o_bar_tile), input_precision=PRECISION)
            dp -= load_rows(delta, b, h, heads, m0, s, BM)[None, :]
            ds = p * dp
            for n in tl.static_range(PROBES):
                dp_dot = tl.dot(v_dot_tiles[n], tl.trans(o_bar_tile), input_precision=PRECISION)
                o_bar_dot_tile = tl.trans(o_bar_dot_tiles[n])
                dp_dot = tl.dot(v_tile, o_bar_dot_tile, dp_dot, input_precision=PRECISION)
                dp_dot -= load_rows(delta_dots[n], b, h, heads, m0, s, BM)[None, :]
                ds_dot = p_dots[n] * dp + p * dp_dot
                if softcap is not None:
                    ds_dot = ds_dot * slope + ds * slope_dots[n]
                ds_dots += (ds_dot,)
            if softcap is not None:
                ds *= slope
            ds_low = ds.to(q_tile.dtype)
            if PRIMAL:
                dk_acc = tl.dot(ds_low, q_tile, dk_acc, input_precision=PRECISION)
            for n in tl.static_range(PROBES):
                low = ds_dots[n].to(q_tile.dtype)
                total = tl.dot(low, q_tile, dk_dot_accs[n], input_precision=PRECISION)
                total = tl.dot(ds_low, q_dot_tiles[n], total, input_precision=PRECISION)
                dk_sums += (total,)
            dk_dot_accs = dk_sums
    if KEYS:
        if PRIMAL:
            store(dk, dk_acc * scale, b, h_out, n0, t, BN, D)
        for n in tl.static_range(PROBES):
            store(dk_dots[n], dk_dot_accs[n] * scale, b, h_out, n0, t, BN, D)
    if VALUES:
        if PRIMAL:
            store(dv, dv_acc, b, h_out, n0, t, BN, E)
        for n in tl.static_range(PROBES):
            store(dv_dots[n], dv_dot_accs[n], b, h_out, n0, t, BN, E)


@triton.jit
def backward_queries(
    q, k, v, q_dot, k_dot, v_dot, q_dot2, k_dot2, v_dot2, o_bar, o_bar_dot, o_bar_dot2,
    lse, lse_dot, lse_dot2, delta, delta_dot, delta_dot2, dq, dq_dot, dq_dot2, start, stop,
    scale, softcap, window, heads, group, s, t, all_heads, chunk,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    PRIMAL: tl.constexpr, PROBES: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """DQ and ḋQ of BM queries. Tile products: PRIMAL 3, or else 2, and 6 for each of PROBES."""
    q_dots, k_dots, v_dots = (q_dot, q_dot2), (k_dot, k_dot2), (v_dot, v_dot2)
    o_bar_dots, lse_dots = (o_bar_dot, o_bar_dot2), (lse_dot, lse_dot2)
    delta_dots, dq_dots = (delta_dot, delta_dot2), (dq_dot, dq_dot2)
    tile, index = schedule(tl.cdiv(s, BM), all_heads, chunk)
    b, h = index // heads, index % heads
    hk = h // group
    m0 = tile * BM
    if CAUSAL:
        m0 = (tl.cdiv(s, BM) - 1 - tile) * BM
    offset = t - s
    first, last = span(start, stop, b, t)
    some_first, some_last, all_first, all_last = key_range(
        first, last, m0, offset, window, BM, CAUSAL
    )
    some_first = some_first // BN * BN
    query = m0 + tl.arange(0, BM)
    q_tile = load(q, b, h, m0, s, BM, D, BD, TMA)
    o_bar_tile = load(o_bar, b, h, m0, s, BM, E, BE, TMA)
    log2_total = load_rows(lse, b, h, heads, m0, s, BM) * LOG2E
    d_row = load_rows(delta, b, h, heads, m0, s, BM)
    if PRIMAL:
        dq_acc = tl.zeros([BM, BD], tl.float32)
    q_dot_tiles, o_bar_dot_tiles, l_dot_rows, d_dot_rows, dq_dot_accs = (), (), (), (), ()
    for n in tl.static_range(PROBES):
        q_dot_tiles += (load(q_dots[n], b, h, m0, s, BM, D, BD, TMA),)
        o_bar_dot_tiles += (load(o_bar_dots[n], b, h, m0, s, BM, E, BE, TMA),)
        l_dot_rows += (load_rows(lse_dots[n], b, h, heads, m0, s, BM),)
        d_dot_rows += (load_rows(delta_dots[n], b, h, heads, m0, s, BM),)
        dq_dot_accs += (tl.zeros([BM, BD], tl.float32),)
    for i in range(0, tl.cdiv(some_last - some_first, BN)):
        n0 = some_first + i * BN
        k_tile = load(k, b, hk, n0, t, BN, D, BD, TMA)
        z = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        unit = scale * LOG2E
        k_dot_tiles, z_dots = (), ()
        for n in tl.static_range(PROBES):
            z_dot = tl.dot(q_dot_tiles[n], tl.trans(k_tile), input_precision=PRECISION)
            k_dot_tile = load(k_dots[n], b, hk, n0, t, BN, D, BD, TMA)
            z_dot = tl.dot(q_tile, tl.trans(k_dot_tile), z_dot, input_precision=PRECISION)
            z_dots += (z_dot * scale,)
            k_dot_tiles += (k_dot_tile,)
        slope_dots = ()
        if softcap is not None:
            z = tanh(z * (scale / softcap))
            unit = softcap * LOG2E
            slope = 1.0 - z * z
            z_dots = scaled(z_dots, slope, PROBES)
            for n in tl.static_range(PROBES):
                slope_dots += (z * z_dots[n] * (-2.0 / softcap),)
        p = tl.exp2(z * unit - log2_total[:, None])
        if (n0 < all_first) | (n0 + BN > all_last):
            key = n0 + tl.arange(0, BN)
            keep = looks_at(query[:, None], key[None, :], first, last, offset, window, CAUSAL)
            p = tl.where(keep, p, 0.0)
        v_tile = load(v, b, hk, n0, t, BN, E, BE, TMA)
        dp = tl.dot(o_bar_tile, tl.trans(v_tile), input_precision=PRECISION) - d_row[:, None]
        ds = p * dp
        ds_dots, dq_sums = (), ()
        for n in tl.static_range(PROBES):
            p_dot = p * (z_dots[n] - l_dot_rows[n][:, None])
            dp_dot = tl.dot(o_bar_dot_tiles[n], tl.trans(v_tile), input_precision=PRECISION)
            v_dot_tile = load(v_dots[n], b, hk, n0, t, BN, E, BE, TMA)
            dp_dot = tl.dot(o_bar_tile, tl.trans(v_dot_tile), dp_dot, input_precision=PRECISION)
            ds_dot = p_dot * dp + p * (dp_dot - d_dot_rows[n][:, None])
            if softcap is not None:
                ds_dot = ds_dot * slope + ds * slope_dots[n]
            ds_dots += (ds_dot,)
        if softcap is not None:
            ds *= slope
        ds_low = ds.to(k_tile.dtype)
        if PRIMAL:
            dq_acc = tl.dot(ds_low, k_tile, dq_acc, input_precision=PRECISION)
        for n in tl.static_range(PROBES):
            low = ds_dots[n].to(k_tile.dtype)
            total = tl.dot(low, k_tile, dq_dot_accs[n], input_precision=PRECISION)
            total = tl.dot(ds_low, k_dot_tiles[n], total, input_precision=PRECISION)
            dq_sums += (total,)
        dq_dot_accs = dq_sums
    if PRIMAL:
        store(dq, dq_acc * scale, b, h, m0, s, BM, D)
    for n in tl.static_range(PROBES):
        store(dq_dots[n], dq_dot_accs[n] * scale, b, h, m0, s, BM, D)
