"""How far apart classes, or domains, lie in feature space: pure functions with gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.errors import require

TINY = 1e-8


def fisher_ratio(features: Tensor, labels: Tensor) -> Tensor:
    """Between-class over within-class scatter, tr S_B / tr S_W, of L2-normalised features (NTP's Fisher term).

    With f̂ = f/‖f‖, class means μ_c over n_c samples and the mean μ of all,

        tr S_B = Σ_c n_c·‖μ_c − μ‖² ,  tr S_W = Σ_i ‖f̂_i − μ_{y_i}‖² .

    Lies in [0, ∞): 0 where all classes share one mean; minimising it collapses the classes into each other. Not changed
    by the scale of the features. A class with one sample has no scatter within, and would make the ratio as large as
    chance will have it: such samples are left out (0 where none stay). `features`: (n, …), flattened; `labels`: (n,)
    int64. Returns a float32 scalar.
    """
    flat, index, counts = _by_class(F.normalize(_flat(features), dim=1, eps=TINY), labels)
    if len(counts) == 0:
        return flat.sum()
    sums = torch.zeros(len(counts), flat.shape[1], device=flat.device).index_add(0, index, flat)
    means = sums / counts.unsqueeze(1)
    between = (counts * (means - flat.mean(0)).square().sum(1)).sum()
    within = (flat - means[index]).square().sum()
    ratio: Tensor = between / (within + TINY)
    return ratio


def mmd(first: Tensor, second: Tensor, kernels: int = 5, factor: float = 2.0) -> Tensor:
    """Squared maximum mean discrepancy between two samples, biased estimate, a sum of Gaussian kernels (Gretton et al.,
    JMLR 2012; as NTL uses it).

    With k(a, b) = Σ_j exp(−‖a − b‖²/b_j), b_j = b̄·factor^(j − ⌊kernels/2⌋), j = 0 … kernels − 1, and b̄ the mean squared
    distance over all pairs of the two samples together (without gradient):

        MMD² = mean k(x, x′) + mean k(y, y′) − 2·mean k(x, y) .

    Lies in [0, 2·kernels]; 0 for equal samples. `first`: (n, …), `second`: (m, …), flattened.
    """
    x, y = _flat(first), _flat(second)
    kernel, n = _gaussians(torch.cat([x, y]), kernels, factor), len(x)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


def class_mmd(features: Tensor, labels: Tensor, kernels: int = 5, factor: float = 2.0) -> Tensor:
    """`mmd` between classes, the mean over all pairs of them: unbiased, so 0 on average where classes are drawn alike.

    With k as there, b̄ over all samples given, and K_cd the mean of k over the pairs of a sample of class c and one of
    class d, for c = d without those of a sample and itself,

        2 ÷ (C·(C − 1)) · Σ_{c < d} ( K_cc + K_dd − 2·K_cd ) .

    Sees whatever differs, spread and shape as well as the mean, which is all that `fisher_ratio` sees; not changed by
    the scale of the features. Lies in (−2·kernels, 2·kernels]. Classes with one sample are left out, and 0 is returned
    where fewer than two others stay. `features`: (n, …), flattened; `labels`: (n,) int64. Returns a float32 scalar.
    """
    return (_between_classes(labels) * _gaussians(_flat(features), kernels, factor)).sum()


def _between_classes(labels: Tensor) -> Tensor:
    """What each pair of samples counts for in `class_mmd`, (n, n): the formula's means written out, so that a GPU never
    waits to hear how many classes there are."""
    same = labels.unsqueeze(1) == labels.unsqueeze(0)
    counts = same.sum(1).float()  # of each sample's class
    several = (counts > 1).float()
    share = several / counts
    classes = share.sum()  # those with several samples
    within = 2 * several / (counts * (counts - 1)).clamp(min=1) / classes.clamp(min=1)
    between = -2 * torch.outer(share, share) / (classes * (classes - 1)).clamp(min=1)
    weights = torch.where(same, within.unsqueeze(1), between).fill_diagonal_(0)
    return weights * (classes > 1.5)


def _gaussians(samples: Tensor, kernels: int, factor: float) -> Tensor:
    """k of every pair, (n, n): `samples` (n, units)."""
    require(kernels >= 1 and factor > 0, f"mmd needs kernels ≥ 1 and factor > 0, but got {kernels} and {factor}")
    every = samples - samples.mean(0).detach()  # distances stay, and less is lost in differences of squares
    squares = every.square().sum(1)
    with torch.autocast(every.device.type, enabled=False):  # a difference of squares in bf16 has few digits left
        distances = (squares.unsqueeze(1) + squares.unsqueeze(0) - 2 * every @ every.T).clamp(min=0)
    count = len(every)
    middle = distances.detach().sum() / max(1, count * count - count) + TINY
    widths = [middle * factor ** (j - kernels // 2) for j in range(kernels)]
    return torch.stack([torch.exp(-distances / w) for w in widths]).sum(0)


def a_distance(first: Tensor, second: Tensor, folds: int = 5) -> float:
    """Proxy A-distance between two samples (Ben-David et al., NeurIPS 2006): 2·(1 − 2·ε), with ε the error of a linear
    classifier (logistic regression on standardised features, `folds`-fold cross-validation) that tells them apart.

    2 where they are separable; about 0, by chance below, where they are alike. `first`: (n, …), `second`: (m, …),
    flattened; ε is the mean over both classes' own errors, so that sizes need not be equal. Without gradient.
    """
    from sklearn.linear_model import LogisticRegression  # a second to import: not in every worker
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    least = min(len(first), len(second))
    require(2 <= folds <= least, f"a_distance needs 2 ≤ folds ≤ {least}, the smaller sample, but got {folds}")
    x = torch.cat([_flat(first), _flat(second)]).detach().cpu().numpy()
    y = torch.cat([torch.zeros(len(first)), torch.ones(len(second))]).numpy()
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced"))
    right = cross_val_score(classifier, x, y, cv=folds, scoring="balanced_accuracy").mean()
    return float(2 * (2 * right - 1))


def _by_class(flat: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Without the classes that have one sample: what is left of `flat`, its classes as 0 … C − 1, and how many samples
    each of these has."""
    _, index, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    several = counts[index] > 1
    _, index = torch.unique(index[several], return_inverse=True)
    return flat[several], index, counts[counts > 1]


def _flat(features: Tensor) -> Tensor:
    require(features.ndim >= 2, f"features must have shape (n, …), but got {tuple(features.shape)}")
    return features.flatten(1).float()
