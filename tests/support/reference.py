"""The literal formulas of the merge methods, in float64, straight from the activations `X`.

Written to be read next to the papers, and to share nothing with the package: no factors, no eigenproblems, no
streaming, no import of `hf_esm`. Every function takes tensors of any dtype and returns float64.

Shapes: an update `delta` is `[d_out, d_in]` as in `torch.nn.Linear`, the inputs `X` of that map `[n, d_in]`; lists
run over the `T` tasks. Papers: *Model Merging in the Essential Subspace* (arXiv 2602.20208), *Essential Subspace
Merging for Multi-Task Learning* (arXiv 2606.19164), *Task Singular Vectors* (arXiv 2412.00081), *No Task Left Behind*
(Iso-C and Iso-CTS, arXiv 2502.04959), TIES (arXiv 2306.01708), DARE (arXiv 2311.03099), RegMean (arXiv 2212.09849),
Model Breadcrumbs (arXiv 2312.06795), DELLA (arXiv 2406.11617), SCE (arXiv 2408.07990), Model Stock (arXiv 2403.19522).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


CUTOFF = 1e-6  # singular values below this fraction of the largest one are zero


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD `U [p, m], S [m], Vᵀ [m, q]`, all `m = min(p, q)` singular values, zeros included."""
    return torch.linalg.svd(matrix.double(), full_matrices=False)


def numerical_rank(singular_values: Tensor) -> int:
    """How many singular values are not numerically zero."""
    return int((singular_values > CUTOFF * max(singular_values.tolist(), default=0.0)).sum())


def esd(inputs: Tensor, delta: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Essential subspace decomposition: `X Δᵀ = U S Vᵀ`; `E = V[:, :r]`, `λ_i = s_i²/(n − 1)`, `C = Eᵀ Δ`.

    Returns directions `E [d_out, r]`, eigenvalues `λ [r]`, coordinates `C [r, d_in]`; never more than the numerical
    rank that there is. A single row has `n` in place of `n − 1`.
    """
    _, s, vh = svd(inputs.double() @ delta.double().T)
    r = min(numerical_rank(s), len(s) if rank is None else rank)
    directions = vh[:r].T
    return directions, s[:r] ** 2 / max(len(inputs) - 1, 1), directions.T @ delta.double()


def polar(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`U Vᵀ` of the SVD `U S Vᵀ`, on the numerical range only, and `mean(S)` over all `min(p, q)` singular values."""
    u, s, vh = svd(matrix)
    r = numerical_rank(s)
    return u[:, :r] @ vh[:r], s.mean()


def relative_power(values: Tensor, exponent: float) -> Tensor:
    """`(v_i / mean v)^p`; 1 where the mean is 0, and where `p` is 0."""
    if exponent == 0 or values.mean() == 0:
        return torch.ones_like(values)
    return (values / values.mean()) ** exponent


def shrink(inputs: Tensor, shrinkage: float) -> Tensor:
    """The inputs, extended by the rows of `√(shrinkage · ‖X‖²_F / d_in) · I`; `XᵀX` is drawn to the identity."""
    x = inputs.double()
    ridge = (shrinkage * x.square().sum() / x.shape[1]).sqrt()
    return torch.cat([x, ridge * torch.eye(x.shape[1], dtype=torch.float64)]) if shrinkage else x


def esm(
    deltas: list[Tensor],
    inputs: list[Tensor],
    gamma: float = 0.0,
    task_exponent: float = 0.0,
    dimension_exponent: float = 0.0,
    factor: float = 1.2,
    shrinkage: float = 3.0,
    keep_singular_values: bool = True,
    match_norm: bool = True,
    rank_share: float = 0.75,
    sum_subtracted: float = 0.13,
    all_columns: bool = False,
    weights: list[float] | None = None,
) -> Tensor:
    """ESM of one weight, before the scale between layers and α: the merged update `Δ_M [d_out, d_in]`.

    1. `r = ⌊d_out / T⌋`, at least 1.
    2. ESD of every task, truncated to `r`: `E_t, λ_t, C_t`.
    3. `w_t = (λ_t / mean λ_t)^γ`, `w_t ← w_t / mean w_t`; columns of `E_t` and rows of `C_t` times `w_t`.
    4. `C_t ← C_t · (‖Δ_t‖_F / mean_s ‖Δ_s‖_F)^p`; after stacking, column j of `C` times `(‖c_j‖ / mean_i ‖c_i‖)^p`.
    5. `E = [E_1 … E_T]`, `C = [C_1; …; C_T]`.
    6. `E_ortho = polar(E) · mean S(E)`, `C_ortho = polar(C) · mean S(C)`.
    7. `Δ_M = factor · E_ortho C_ortho`.

    What the product adds, and is off in the published settings:
    - `shrinkage` λ: the inputs are extended by the rows of `√(λ ‖X‖²_F / d_in) · I` before the ESD.
    - `keep_singular_values`: `r = ⌊min(d) / T⌋`; each task's `C_t = P_t S_t Q_t` (SVD), and in place of 6 and 7
      `Δ_M = factor · polar([E_t P_t]) diag(S) polar([Q_t])`.
    - `match_norm`: `Δ_M` is scaled to the norm `√(Σ ‖Δ_t‖²_F)` (before `factor`).
    - `rank_share`: `r` is that share of it, rounded down before dividing by T: `⌊⌊share · d⌋ / T⌋`.
    - not `all_columns`: a task has no more columns than its output shift has energy. With it, all r of them, as in the
      published code; those without energy get weight 0 in 3 and are zero (with γ = 0 they would be arbitrary).
    - `sum_subtracted`: that multiple of `Σ Δ_t`, its norm cut to `√(Σ ‖Δ_t‖²_F)`, is taken off in the end.
    - `weights` of the tasks: after 6, task t's rows of `C_ortho` (of `polar([Q_t])`) times `weights[t]`, after the
      factor of `match_norm` is known; the sum is `Σ w_t Δ_t`.
    """
    weights = weights or [1.0] * len(deltas)
    side = min(deltas[0].shape) if keep_singular_values else deltas[0].shape[0]
    r = max(int(side * rank_share) // len(deltas), 1)
    task_scales = relative_power(torch.stack([delta.double().norm() for delta in deltas]), task_exponent)
    directions, coordinates, weights_of_rows = [], [], []
    for delta, x, task_scale, weight in zip(deltas, inputs, task_scales, weights):
        e, eigenvalues, c = esd(shrink(x, shrinkage), delta, r)
        if all_columns:
            empty = r - len(eigenvalues)
            e = torch.cat([e, e.new_zeros(len(e), empty)], dim=1)
            eigenvalues, c = (
                torch.cat([eigenvalues, e.new_zeros(empty)]),
                torch.cat([c, c.new_zeros(empty, c.shape[1])]),
            )
        if len(eigenvalues) == 0:  # this task does not change what the map puts out
            continue
        w = relative_power(eigenvalues, gamma)
        w = w / w.mean()
        directions.append(e * w)
        coordinates.append(c * w[:, None] * task_scale)
        weights_of_rows.append(weight)
    if not any(e.any() for e in directions):
        return torch.zeros(deltas[0].shape, dtype=torch.float64)
    columns = relative_power(torch.cat(coordinates).norm(dim=0), dimension_exponent)
    coordinates = [c * columns for c in coordinates]
    if keep_singular_values:
        turned = []
        for e, c in zip(directions, coordinates):
            p, s, q = svd(c)
            k = numerical_rank(s)
            turned.append((e @ p[:, :k], s[:k], q[:k]))
        (left, _), (right, _) = (
            polar(torch.cat([u for u, _, _ in turned], 1)),
            polar(torch.cat([q for *_, q in turned])),
        )
        left, rows = left @ torch.diag(torch.cat([s for _, s, _ in turned])), [len(s) for _, s, _ in turned]
    else:
        (e, e_mean), (c, c_mean) = polar(torch.cat(directions, dim=1)), polar(torch.cat(coordinates))
        left, right, rows = e * e_mean, c * c_mean, [len(c) for c in coordinates]
    merged = left @ right
    row_weights = torch.cat([torch.full((n,), w, dtype=torch.float64) for n, w in zip(rows, weights_of_rows)])
    matched = 1.0
    if match_norm and merged.any():
        matched = sum(delta.double().square().sum() for delta in deltas).sqrt() / merged.norm()
    merged = factor * matched * (left @ torch.diag(row_weights) @ right)
    total = sum(w * delta.double() for w, delta in zip(weights, deltas))
    norm = sum(delta.double().square().sum() for delta in deltas).sqrt()
    if total.norm() > norm:
        total = norm * total / total.norm()
    return merged - sum_subtracted * total


def esm_published(
    deltas: list[Tensor],
    inputs: list[Tensor],
    gamma: float = 0.15,
    task_exponent: float = 0.0,
    dimension_exponent: float = 0.0,
    factor: float = 1.0,
) -> Tensor:
    """ESM of one weight as the published code writes it down: a whole orthonormal `V [d_out, d_out]` per task, its
    first `⌊d_out / T⌋` columns, and means over all of them; eigenvalues below a relative cutoff are zero. γ is not
    0."""
    d_out, tasks = deltas[0].shape[0], len(deltas)
    r = max(d_out // tasks, 1)
    norms = torch.stack([delta.double().norm() for delta in deltas])
    columns, rows = [], []
    for delta, x, scale in zip(deltas, inputs, (norms / norms.mean()) ** task_exponent):
        _, s, vh = torch.linalg.svd(x.double() @ delta.double().T, full_matrices=True)
        eigenvalues = torch.zeros(d_out, dtype=torch.float64)
        eigenvalues[: numerical_rank(s)] = s[: numerical_rank(s)] ** 2 / max(len(x) - 1, 1)
        e, eigenvalues = vh.T[:, :r], eigenvalues[:r]
        w = (eigenvalues / eigenvalues.mean()) ** gamma
        w = w / w.mean()
        columns.append(e * w)
        rows.append((e * w).T @ delta.double() * scale)
    e, c = torch.cat(columns, dim=1), torch.cat(rows)
    of_inputs = c.norm(dim=0)
    (e, e_mean), (c, c_mean) = polar(e), polar(c * (of_inputs / of_inputs.mean()) ** dimension_exponent)
    return factor * (e * e_mean) @ (c * c_mean)


def esm_stacked(deltas: list[list[Tensor]], inputs: list[Tensor], **settings: float) -> list[Tensor]:
    """ESM of several maps of one input (q, k, v) as one weight: `deltas[t]` are task t's updates, stacked along the
    output, merged, and split again."""
    heights = [delta.shape[0] for delta in deltas[0]]
    return list(esm([torch.cat(parts) for parts in deltas], inputs, **settings).split(heights))


def tsv_m(deltas: list[Tensor], keep_scale: bool = False, weights: list[float] | None = None) -> Tensor:
    """TSV-M of one weight: top `k = ⌊min(d)/T⌋` (at least 1) triplets of every update, stacked;
    `Δ_M = polar(U) diag(S) polar(Vᵀ)`, times both means of singular values where `keep_scale`; each task's entries of
    `diag(S)` times its weight."""
    k = max(min(deltas[0].shape) // len(deltas), 1)
    parts = []
    for delta, weight in zip(deltas, weights or [1.0] * len(deltas)):
        u, s, vh = svd(delta)
        r = min(k, numerical_rank(s))
        parts.append((u[:, :r], weight * s[:r], vh[:r]))
    s = torch.cat([s for _, s, _ in parts])
    if len(s) == 0:
        return torch.zeros(deltas[0].shape, dtype=torch.float64)
    u, u_mean = polar(torch.cat([u for u, _, _ in parts], dim=1))
    vh, v_mean = polar(torch.cat([vh for _, _, vh in parts]))
    merged = u @ torch.diag(s) @ vh
    return merged * u_mean * v_mean if keep_scale else merged


def rescaled(mask: Tensor) -> Tensor:
    """A mask divided by its mean."""
    return mask / mask.mean()


def relaxed_mask(logits: Tensor, uniform: Tensor, temperature: float = 0.5) -> Tensor:
    """Concrete's `m = σ((log u − log(1−u) + logit)/τ)`, rescaled to mean 1 (arXiv 2312.06173)."""
    return rescaled(torch.sigmoid((torch.log(uniform) - torch.log(1 - uniform) + logits) / temperature))


def concrete(
    base: dict[str, Tensor],
    updates: dict[str, list[Tensor]],
    entropy: Callable[[dict[str, Tensor]], Tensor],
    uniform: Callable[[int], dict[str, Tensor]],
    *,
    steps: int,
    learning_rate: float,
    mask: str,
    coefficient: float = 0.3,
    groups: str = "",
    inner_rate: float = 1.0,
    coefficient_steps: int = 0,
    coefficient_rate: float = 1e-3,
) -> dict[str, Tensor]:
    """The published loop: logits from 0 under Adam; of AdaMerging one step of the coefficients, clamped to [0, 1],
    from their start before each, and then their own steps under the final mask.

    Args:
        entropy: `Σ_t` mean entropy of the tasks' models, as a function of the merged weights.
        uniform: `u` of a step; of step `steps` that of the final draw (`mask="relaxed"`, else σ(logit)).
        groups: of coefficients: none that are learned, or one per `"task"` or per task and `"layer"`.
    """
    logits = {name: torch.zeros_like(weight).requires_grad_(True) for name, weight in base.items()}
    count = len(next(iter(updates.values())))

    def start() -> dict[str, Tensor]:
        whole = torch.full((count,), coefficient, dtype=torch.float64).requires_grad_(bool(groups))
        return {n: whole.detach().clone().requires_grad_(True) if groups == "layer" else whole for n in base}

    def merged(masks: dict[str, Tensor], coefficients: dict[str, Tensor]) -> dict[str, Tensor]:
        used = {name: c.clamp(0, 1) if groups else c for name, c in coefficients.items()}
        return {n: w + sum(c * (masks[n] * u) for c, u in zip(used[n], updates[n])) for n, w in base.items()}

    def distinct(coefficients: dict[str, Tensor]) -> list[Tensor]:
        return list({id(c): c for c in coefficients.values()}.values())

    outer, inner = torch.optim.Adam(list(logits.values()), lr=learning_rate), start()
    inner_adam = torch.optim.Adam(distinct(inner), lr=inner_rate) if groups else None
    for step in range(steps):
        u = uniform(step)
        if inner_adam is not None:
            for c in distinct(inner):
                c.data.fill_(coefficient)
            inner_adam.zero_grad()
            fixed = {name: relaxed_mask(logits[name], u[name]).detach() for name in base}
            entropy(merged(fixed, inner)).backward()
            inner_adam.step()
        outer.zero_grad()
        masks = {name: relaxed_mask(logits[name], u[name]) for name in base}
        entropy(merged(masks, {name: c.detach() for name, c in inner.items()})).backward()
        outer.step()
    u, coefficients = uniform(steps), start()
    last = {n: relaxed_mask(x, u[n]) if mask == "relaxed" else rescaled(x.sigmoid()) for n, x in logits.items()}
    last = {name: m.detach() for name, m in last.items()}
    if groups:
        adam = torch.optim.Adam(distinct(coefficients), lr=coefficient_rate)
        for _ in range(coefficient_steps):
            adam.zero_grad()
            entropy(merged(last, coefficients)).backward()
            adam.step()
    return {name: weight.detach() for name, weight in merged(last, coefficients).items()}


def sti(deltas: list[Tensor]) -> float:
    """Singular task interference: `‖(UᵀU − I) Σ (VᵀV − I)‖₁` of the top `⌊min(d)/T⌋` triplets, V as columns."""
    k = max(min(deltas[0].shape) // len(deltas), 1)
    parts = [svd(delta) for delta in deltas]
    u = torch.cat([u[:, :k] for u, _, _ in parts], dim=1)
    s = torch.cat([s[:k] for _, s, _ in parts])
    v = torch.cat([vh[:k].T for *_, vh in parts], dim=1)
    eye = torch.eye(len(s), dtype=torch.float64)
    return float(((u.T @ u - eye) @ torch.diag(s) @ (v.T @ v - eye)).abs().sum())


def mean(deltas: list[Tensor]) -> Tensor:
    """`1/T Σ Δ_t`."""
    return sum(delta.double() for delta in deltas) / len(deltas)


def weighted_mean(deltas: list[Tensor], weights: list[float]) -> Tensor:
    """`Σ w_t Δ_t / Σ w_t`; over T where the weights sum to 0."""
    return sum(w * delta.double() for w, delta in zip(weights, deltas)) / (sum(weights) or len(deltas))


def task_arithmetic(deltas: list[Tensor]) -> Tensor:
    """`Σ Δ_t`; its α is 0.3."""
    return sum(delta.double() for delta in deltas)


def ties(deltas: list[Tensor], density: float = 0.2) -> Tensor:
    """TIES of whole updates, each one tensor: keep the `⌊density · N⌋` largest entries of each (at least one), elect
    the sign of their sum, and average the entries that have it."""
    trimmed = []
    for delta in deltas:
        kept = max(int(density * delta.numel()), 1)
        threshold = delta.abs().flatten().sort(descending=True).values[kept - 1]
        trimmed.append(torch.where(delta.abs() >= threshold, delta.double(), torch.zeros(())))
    elected = sum(trimmed).sign()
    agreeing = [torch.where(delta.sign() == elected, delta, torch.zeros(())) for delta in trimmed]
    counts = sum((delta != 0).double() for delta in agreeing)
    return torch.where(counts > 0, sum(agreeing) / counts, torch.zeros((), dtype=torch.float64))


def dare(deltas: list[Tensor], masks: list[Tensor], density: float = 0.1) -> Tensor:
    """`Σ (mask_t ∘ Δ_t) / density`; its α is 0.3."""
    return sum(delta.double() * mask / density for delta, mask in zip(deltas, masks))


def disjoint_mean(deltas: list[Tensor]) -> Tensor:
    """Entry by entry: the mean of the numbers that are not 0 and have the sign of the sum; 0 where there are none."""
    merged = torch.zeros(deltas[0].numel(), dtype=torch.float64)
    for place, numbers in enumerate(zip(*(delta.double().flatten().tolist() for delta in deltas))):
        agreeing = [x for x in numbers if x * sum(numbers) > 0]
        merged[place] = sum(agreeing) / max(len(agreeing), 1)
    return merged.view(deltas[0].shape)


def breadcrumbs(deltas: list[Tensor], density: float, gamma: float) -> Tensor:
    """The sum of updates, each without its `⌊γ N⌋` largest entries (no more than leave `⌊density · N⌋`, at least one),
    and of the rest only the `⌊density · N⌋` largest; no two entries of an update have one magnitude."""
    total = torch.zeros(deltas[0].numel(), dtype=torch.float64)
    for delta in deltas:
        flat = delta.double().flatten()
        kept = max(int(density * len(flat)), 1)
        dropped = min(int(gamma * len(flat)), len(flat) - kept)
        for place in flat.abs().sort(descending=True).indices[dropped : dropped + kept]:
            total[place] += flat[place]
    return total.view(deltas[0].shape)


def della_shares(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """How likely an entry is kept: from `density − ε/2` for the smallest magnitude of a row, evenly with the rank, to
    `density + ε/2` for the largest; `density` where a row has one entry."""
    rows = delta.double().reshape(delta.shape[0], -1) if delta.dim() > 1 else delta.double().reshape(1, -1)
    shares = torch.full_like(rows, density)
    for row, values in enumerate(rows.abs().tolist()):
        for place, value in enumerate(values):
            rank = sum(other < value for other in values)
            if len(values) > 1:
                shares[row, place] += epsilon * (rank / (len(values) - 1) - 0.5)
    return shares.view(delta.shape)


def sce(deltas: list[Tensor], density: float = 1.0) -> Tensor:
    """Select the `⌊τ n⌋` entries (at least one) of the `n` with a variance over the experts, by it, or all if `n = 0`;
    weight the experts by the squares of what is selected; leave out signs that differ from that of the sum."""
    stacked = torch.stack([delta.double().flatten() for delta in deltas])
    variances = ((stacked - stacked.mean(0)) ** 2).mean(0)
    variances[(stacked == stacked[0]).all(0)] = 0
    varying = int((variances > 0).sum())
    if varying:
        selected = variances.sort(descending=True).indices[: max(int(density * varying), 1)]
        mask = torch.zeros(len(variances), dtype=torch.float64)
        mask[selected] = 1
        stacked = stacked * mask
    squares = [float((row**2).sum()) for row in stacked]
    shares = [square / sum(squares) if sum(squares) else 1.0 for square in squares]
    merged = torch.zeros(len(variances), dtype=torch.float64)
    for place, numbers in enumerate(stacked.T.tolist()):
        agreeing = [(share, x) for share, x in zip(shares, numbers) if x * sum(numbers) > 0]
        if agreeing:
            merged[place] = sum(share * x for share, x in agreeing) / sum(share for share, _ in agreeing)
    return merged.view(deltas[0].shape)


def cosine(a: Tensor, b: Tensor) -> float:
    """The cosine between two tensors; 0 if one is zero."""
    product = float(a.double().norm() * b.double().norm())
    return float((a.double() * b.double()).sum()) / product if product else 0.0


def model_stock(deltas: list[Tensor]) -> Tensor:
    """`t · mean Δ`, `t = N cos θ / (1 + (N − 1) cos θ)`, `cos θ` the mean over all pairs, 0 if that is negative."""
    n = len(deltas)
    pairs = [(a, b) for a in range(n) for b in range(a)]
    c = max(sum(cosine(deltas[a], deltas[b]) for a, b in pairs) / len(pairs), 0.0) if pairs else 1.0
    return n * c / (1 + (n - 1) * c) * mean(deltas)


def slerp(first: Tensor, second: Tensor, t: float, straight_above: float = 1 - 1e-15) -> Tensor:
    """`sin((1 − t) θ) / sin θ · v_1 + sin(t θ) / sin θ · v_2`; linear where `|cos θ|` is larger than a bound."""
    c = cosine(first, second)
    if abs(c) > straight_above:
        return (1 - t) * first.double() + t * second.double()
    angle = math.acos(c)
    shares = [math.sin(share * angle) / math.sin(angle) for share in (1 - t, t)]
    return shares[0] * first.double() + shares[1] * second.double()


def karcher(tensors: list[Tensor], shares: list[float], steps: int = 2000) -> Tensor:
    """`Σ a_t ‖W_t‖` times the unit tensor `u` that minimises `Σ a_t · angle(u, W_t)²`, by gradient descent."""
    units = [tensor.double() / tensor.double().norm() for tensor in tensors]
    u = sum(a * unit for a, unit in zip(shares, units))
    u = (u / u.norm()).requires_grad_()
    for _ in range(steps):
        loss = sum(a * torch.acos((u / u.norm() * unit).sum().clamp(-1, 1)) ** 2 for a, unit in zip(shares, units))
        (gradient,) = torch.autograd.grad(loss, u)
        if gradient.norm() < 1e-9:
            break
        u = (u - 0.3 * gradient).detach()
        u = (u / u.norm()).requires_grad_()
    return sum(a * float(tensor.double().norm()) for a, tensor in zip(shares, tensors)) * u.detach()


def counted_embedding(deltas: list[Tensor], counts: list[Tensor]) -> Tensor:
    """Each row's mean update, weighted by the shares of the counts plus a tenth of the mean share."""
    merged = torch.zeros_like(deltas[0], dtype=torch.float64)
    for row in range(len(merged)):
        shares = [float(count[row]) / max(float(count.sum()), 1.0) + 0.1 / len(count) for count in counts]
        merged[row] = sum(s * delta[row].double() for s, delta in zip(shares, deltas)) / sum(shares)
    return merged


def rows_of_tokens(
    tables: dict[str, dict[str, Tensor]], vocabulary: list[str], sources: dict[str, tuple[Tensor, bool]]
) -> dict[str, Tensor]:
    """Row of every token as mergekit documents them, with the mean of the experts as the method.

    Each model gets a row for every token: where it has the token, its own; else that of the token's source, or the
    base's, or the mean of all that there are. Then the experts' rows are merged.

    Args:
        tables: by model, the base first, row of every token.
        sources: by token, the row that its source names, and whether it is forced on all models.
    """
    base, *experts = tables
    rows = {}
    for token in vocabulary:
        there_are = [table[token].double() for table in tables.values() if token in table]
        substitute, force = sources.get(token, (tables[base].get(token), False))
        if substitute is None:
            substitute = sum(there_are) / len(there_are)
        of_experts = [substitute if force or token not in tables[t] else tables[t][token] for t in experts]
        rows[token] = sum(row.double() for row in of_experts) / len(experts)
    return rows


def regmean(
    deltas: list[Tensor],
    inputs: list[Tensor],
    off_diagonal: float = 0.9,
    ridge: float = 0.0,
    weights: list[float] | None = None,
) -> Tensor:
    """`(Σ w_t Δ_t G_t) (Σ |w_t| G_t)⁺`, `G_t = XᵀX / tr XᵀX`, off-diagonal entries times a factor, plus
    `ridge · tr(G_t) / d_in` on the diagonal. A task whose inputs are all zero does not count."""
    width = deltas[0].shape[1]
    weighted, total = torch.zeros(deltas[0].shape, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for delta, x, weight in zip(deltas, inputs, weights or [1.0] * len(deltas)):
        gram = x.double().T @ x.double()
        if gram.trace() == 0:
            continue
        gram = gram / gram.trace()
        gram = off_diagonal * gram + (1 - off_diagonal) * torch.diag(gram.diagonal())
        gram = gram + ridge / width * torch.eye(width, dtype=torch.float64)
        weighted, total = weighted + weight * delta.double() @ gram, total + abs(weight) * gram
    return weighted @ torch.linalg.pinv(total, rtol=CUTOFF**2, hermitian=True)


def iso_c(deltas: list[Tensor], published: bool = False) -> Tensor:
    """SVD of `Σ Δ_t`, every singular value replaced by the mean of all; zero ones stay zero, and count in the mean
    only where `published`."""
    u, s, vh = svd(sum(delta.double() for delta in deltas))
    r = numerical_rank(s)
    return u[:, :r] @ vh[:r] * s[:r].sum() / (len(s) if published else max(r, 1))


def iso_cts(deltas: list[Tensor], common_space_fraction: float = 0.8, published: bool = False) -> Tensor:
    """The top `k_c` triplets of the sum; the top `(m − k_c) / T` of each `Δ_t − U_c U_cᵀ Δ_t`; stacked, both sides
    orthogonalised, every singular value their mean over `m`. `k_c = ⌊fraction · m⌋`, adjusted so that the rest is the
    nearest multiple of T that there is room for. `m` is the numerical rank of the sum; `min(d)` where `published`."""
    u, s, vh = svd(sum(delta.double() for delta in deltas))
    side, tasks = len(s) if published else max(numerical_rank(s), 1), len(deltas)
    own = round((side - int(common_space_fraction * side)) / tasks)
    own = min(own, side // tasks)
    common = min(side - own * tasks, numerical_rank(s))
    parts = [(u[:, :common], s[:common], vh[:common])]
    for delta in deltas:
        rest = delta.double() - u[:, :common] @ (u[:, :common].T @ delta.double())
        if rest.norm() <= CUTOFF * max(float(other.double().norm()) for other in deltas):
            continue
        a, b, c = svd(rest)
        k = min(own, numerical_rank(b))
        parts.append((a[:, :k], b[:k], c[:k]))
    left, _ = polar(torch.cat([a for a, _, _ in parts], dim=1))
    right, _ = polar(torch.cat([c for *_, c in parts]))
    return left @ right * sum(b.sum() for _, b, _ in parts) / side


def merge_weight(
    deltas: list[Tensor], inputs: list[Tensor] | None = None, keep_scale: bool = False, **settings: float
) -> Tensor:
    """What ESM does with one parameter of any kind: ESM where its inputs are known, TSV-M of another matrix
    (`keep_scale` as there), the mean of anything else."""
    if deltas[0].dim() != 2:
        return mean(deltas)
    return tsv_m(deltas, keep_scale) if inputs is None else esm(deltas, inputs, **settings)


def layer_scales(norms: list[float], exponent: float) -> list[float]:
    """`β_ℓ = (‖Δ_M^ℓ‖_F / mean ‖Δ_M‖_F)^exponent` over the weights of one type; 1 where the mean is 0."""
    return relative_power(torch.tensor(norms, dtype=torch.float64), exponent).tolist()


def lines(sums: list[Tensor], merged: list[Tensor], tasks: int) -> float:
    """LiNeS' scale of the first block: `‖Σ_t Δ_t‖₁ / (T ‖Δ_M‖₁)`, each norm over the whole model."""
    whole, found = (torch.cat([part.double().flatten() for part in parts]) for parts in (sums, merged))
    return float(whole.abs().sum() / found.abs().sum() / tasks)


def recombine(base: Tensor, delta: Tensor, alpha: float, layer_scale: float = 1.0) -> Tensor:
    """`W_M = W0 + α · β · Δ_M`."""
    return base.double() + alpha * layer_scale * delta.double()


def mean_iou(answers: list[Tensor], labels: list[Tensor], classes: int) -> float:
    """Of maps `[H, W]`, -100 where no class is asked for: per class the intersection over the union of its pixels in
    all maps, mean over the classes that are in one.
    """
    found = []
    for k in range(classes):
        intersection = union = 0
        for answer, label in zip(answers, labels, strict=True):
            for a, b in zip(answer.flatten().tolist(), label.flatten().tolist(), strict=True):
                intersection += a == k == b
                union += b != -100 and k in (a, b)
        if union:
            found.append(intersection / union)
    return sum(found) / len(found)


def kinship(base: list[Tensor], tuned: list[Tensor]) -> tuple[float, float]:
    """Medians over matrices of `⟨W0, W⟩ / (‖W0‖ ‖W‖)` and of `‖W − W0‖ / ‖W0‖`."""
    pairs = [(w0.double(), w.double()) for w0, w in zip(base, tuned, strict=True)]
    cosines = [(w0 * w).sum() / (w0.norm() * w.norm()) for w0, w in pairs]
    sizes = [(w - w0).norm() / w0.norm() for w0, w in pairs]
    return tuple(torch.stack(values).quantile(0.5).item() for values in (cosines, sizes))


def wudi(deltas: list[Tensor], ridge: float = 0.0, weights: list[float] | None = None) -> Tensor:
    """The minimiser of `Σ_t |w_t| ‖(Δ − s_t Δ_t) Δ_tᵀ‖² / ‖Δ_t‖² + ridge · T / d_in · ‖Δ − Σ_t w_t Δ_t‖²`, `s_t` the
    sign of `w_t`, that is nearest to `Σ_t w_t Δ_t`, as stacked least squares. An update that is zero has no term."""
    weights = weights or [1.0] * len(deltas)
    deltas = [delta.double() for delta in deltas]
    total = sum(w * delta for w, delta in zip(weights, deltas))
    terms = [(w, delta) for w, delta in zip(weights, deltas) if w and delta.norm() > 0]
    if not terms:
        return total
    scale = (ridge * len(deltas) / deltas[0].shape[1]) ** 0.5
    left = [abs(w) ** 0.5 * delta / delta.norm() for w, delta in terms]
    right = [a @ ((1 if w > 0 else -1) * delta - total).T for a, (w, delta) in zip(left, terms)]
    left.append(scale * torch.eye(total.shape[1], dtype=torch.float64))
    right.append(torch.zeros(total.T.shape, dtype=torch.float64))
    stacked = torch.cat(left)
    return total + (torch.linalg.pinv(stacked, rtol=CUTOFF) @ torch.cat(right)).T


def wudi_published(deltas: list[Tensor], steps: int, learning_rate: float) -> Tensor:
    """The published loop: Adam on the loss as it is written, from the sum of the updates."""
    stacked = torch.stack([delta.double() for delta in deltas])
    merged = torch.nn.Parameter(stacked.sum(0))
    adam = torch.optim.Adam([merged], lr=learning_rate)
    sizes = stacked.flatten(1).square().sum(1)[:, None, None]
    for _ in range(steps):
        adam.zero_grad()
        (((merged[None] - stacked) @ stacked.transpose(1, 2)).square() / sizes).sum().backward()
        adam.step()
    return merged.detach()


def cat(deltas: list[Tensor], inputs: list[Tensor], removed: int, trade_off: float) -> Tensor:
    """`Σ_i (Π_{k≠i} (I − B_k B_kᵀ)) Δ_i`, with `B_k` the top eigenvectors, of positive eigenvalues, of
    `Σ_{i≠k} Δ_i (G_k − λ G_i) Δ_iᵀ`, `G = XᵀX / n`."""
    deltas = [delta.double() for delta in deltas]
    grams = [x.double().T @ x.double() / max(len(x), 1) for x in inputs]
    projections = []
    for k, gram in enumerate(grams):
        conflict, size = torch.zeros(len(deltas[0]), len(deltas[0]), dtype=torch.float64), 0.0
        for i, delta in enumerate(deltas):
            if i != k:
                size += float((delta @ gram @ delta.T).trace() + trade_off * (delta @ grams[i] @ delta.T).trace())
                conflict = conflict + delta @ (gram - trade_off * grams[i]) @ delta.T
        values, vectors = torch.linalg.eigh((conflict + conflict.T) / 2)
        top = [j for j in reversed(range(len(values))) if values[j] > CUTOFF**2 * size][:removed]
        projections.append(torch.eye(len(values), dtype=torch.float64) - vectors[:, top] @ vectors[:, top].T)
    merged = torch.zeros_like(deltas[0])
    for i, delta in enumerate(deltas):
        for k, projection in enumerate(projections):
            delta = projection @ delta if k != i else delta
        merged = merged + delta
    return merged


def cat_of_vectors(deltas: list[Tensor], removed: int) -> Tensor:
    """`Σ_i m_i ∘ Δ_i`, where `m_i` is 0 at the `removed` largest entries of `Σ_{j≠k} Δ_j²` of every other task `k`."""
    merged = torch.zeros_like(deltas[0]).double()
    for i, delta in enumerate(deltas):
        delta = delta.double().clone()
        for k in range(len(deltas)):
            if k != i:
                squares = sum(other.double() ** 2 for j, other in enumerate(deltas) if j != k)
                delta[squares.argsort(descending=True)[:removed]] = 0
        merged = merged + delta
    return merged


def knots(deltas: list[Tensor], merge: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """`U · merge(S V_1, …, S V_T)` of the SVD `U S [V_1 … V_T]` of the updates side by side."""
    u, s, vh = svd(torch.cat([delta.double() for delta in deltas], dim=1))
    r = numerical_rank(s)
    if not r:
        return torch.zeros_like(deltas[0]).double()
    return u[:, :r] @ merge(list((s[:r, None] * vh[:r]).split(deltas[0].shape[1], dim=1)))
