"""Distillation losses written out in float64 numpy, one loop for each sum of the definition, to test `kdfast.distill.losses`.

Slow on purpose and read from the definitions alone: nothing here is shared with the library. Arguments are numpy arrays
(lists of them for stage maps), student first, teacher second.
"""

from math import exp, expm1, log, sqrt

import numpy as np

# ---------------------------------------------------------------------------------------------------- small pieces


def float64(x):
    return np.asarray(x, dtype=np.float64)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def reduced(per_example, reduction):
    return np.array(per_example) if reduction == "none" else mean(per_example)


def logsumexp(z):
    top = max(z)
    return top + log(sum(exp(v - top) for v in z))


def log_softmax(z):
    total = logsumexp(z)
    return [v - total for v in z]


def softmax(z):
    return [exp(v) for v in log_softmax(z)]


def kl(log_p, log_q):
    """KL(p ‖ q) of two distributions given by their logarithms; a term with p = 0 is 0."""
    return sum(exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True) if exp(a) > 0)


def cross_entropy(z, y):
    return -log_softmax(z)[y]


def without(z, y):
    return [v for c, v in enumerate(z) if c != y]


def log_target_or_not(z, y):
    """(log p_y, log(1 − p_y)), the second as the share of the other classes: it never subtracts from 1."""
    return [z[y] - logsumexp(z), logsumexp(without(z, y)) - logsumexp(z)]


def l2_norm(v):
    return sqrt(sum(a * a for a in v))


def unit(v):
    """v / ‖v‖, and the zero vector stays zero."""
    norm = l2_norm(v)
    return [a / norm for a in v] if norm > 0 else [0.0 for _ in v]


def dot(u, v):
    return sum(a * b for a, b in zip(u, v, strict=True))


def pooled(f, height, width):
    """Average pooling of (B, C, H, W) to (B, C, height, width); H and W must be multiples."""
    B, C, H, W = f.shape
    assert H % height == 0 and W % width == 0, "the reference only pools whole blocks"
    a, b = H // height, W // width
    out = np.zeros((B, C, height, width))
    for i, c, y, x in np.ndindex(out.shape):
        out[i, c, y, x] = mean(f[i, c, y * a + u, x * b + v] for u in range(a) for v in range(b))
    return out


def pooled_to_the_smaller(f_s, f_t):
    height, width = min(f_s.shape[2], f_t.shape[2]), min(f_s.shape[3], f_t.shape[3])
    return pooled(f_s, height, width), pooled(f_t, height, width)


def mse(a, b):
    return mean((x - y) ** 2 for x, y in zip(a.flatten(), b.flatten(), strict=True))


# ------------------------------------------------------------------------------------------------- response-based


def kd(student, teacher, T=4):
    """Hinton, Vinyals & Dean 2015, Distilling the Knowledge in a Neural Network."""
    student, teacher = float64(student), float64(teacher)
    return T**2 * mean(kl(log_softmax(t / T), log_softmax(s / T)) for s, t in zip(student, teacher, strict=True))


def hard(student, teacher):
    """Touvron et al. 2021, Training Data-Efficient Image Transformers (DeiT), hard-label distillation."""
    student, teacher = float64(student), float64(teacher)
    return mean(cross_entropy(s, list(t).index(max(t))) for s, t in zip(student, teacher, strict=True))


def standardize(logits):
    """Sun et al. 2024, Logit Standardization in Knowledge Distillation."""
    logits = float64(logits)
    out = np.zeros_like(logits)
    for i, z in enumerate(logits):
        m = mean(z)
        std = sqrt(sum((v - m) ** 2 for v in z) / (len(z) - 1))
        for c, v in enumerate(z):
            out[i, c] = (v - m) / (1e-7 + std)
    return out


def dkd(student, teacher, target, T=4, alpha=1, beta=8, reduction="mean"):
    """Zhao et al. 2022, Decoupled Knowledge Distillation."""
    student, teacher = float64(student), float64(teacher)
    values = []
    for s, t, y in zip(student / T, teacher / T, target, strict=True):
        of_the_target = kl(log_target_or_not(t, y), log_target_or_not(s, y))
        of_the_others = kl(log_softmax(without(t, y)), log_softmax(without(s, y)))
        values.append(T**2 * (alpha * of_the_target + beta * of_the_others))
    return reduced(values, reduction)


def pearson(a, b):
    a, b = [v - mean(a) for v in a], [v - mean(b) for v in b]
    return dot(a, b) / (l2_norm(a) * l2_norm(b) + 1e-8)


def dist(student, teacher, T=1, beta=1, gamma=1):
    """Huang et al. 2022, Knowledge Distillation from a Stronger Teacher (DIST)."""
    p_s = [softmax(s / T) for s in float64(student)]
    p_t = [softmax(t / T) for t in float64(teacher)]
    B, C = len(p_s), len(p_s[0])
    inter = 1 - mean(pearson(p_s[i], p_t[i]) for i in range(B))
    intra = 1 - mean(pearson([p_s[i][c] for i in range(B)], [p_t[i][c] for i in range(B)]) for c in range(C))
    return T**2 * (beta * inter + gamma * intra)


def nkd(student, teacher, target, T=1, gamma=1.5, reduction="mean"):
    """Yang et al. 2023, From Knowledge Distillation to Self-Knowledge Distillation (NKD)."""
    student, teacher = float64(student), float64(teacher)
    values = []
    for s, t, y in zip(student, teacher, target, strict=True):
        of_the_target = -softmax(t)[y] * log_softmax(s)[y]
        of_the_others = -dot(softmax(without(t / T, y)), log_softmax(without(s / T, y)))
        values.append(of_the_target + gamma * T**2 * of_the_others)
    return reduced(values, reduction)


def wsld_weights(student, teacher, target):
    """The factor of each example in `wsld`: 1 − exp(−CE_s / (CE_t + 1e-7)), no temperature."""
    rows = zip(float64(student), float64(teacher), target, strict=True)
    return [-expm1(-cross_entropy(s, y) / (cross_entropy(t, y) + 1e-7)) for s, t, y in rows]


def wsld(student, teacher, target, T=4, reduction="mean", weights=None):
    """Zhou et al. 2021, Rethinking Soft Labels for Knowledge Distillation (WSLD); `weights` holds them fixed."""
    weights = wsld_weights(student, teacher, target) if weights is None else weights
    rows = zip(float64(student) / T, float64(teacher) / T, weights, strict=True)
    return reduced([T**2 * w * -dot(softmax(t), log_softmax(s)) for s, t, w in rows], reduction)


# -------------------------------------------------------------------------------------------------- feature-based


def fitnet(student, teacher):
    """Romero et al. 2015, FitNets: Hints for Thin Deep Nets."""
    return mse(float64(student), float64(teacher))


def attention(f, p):
    """(B, C, H, W) → B rows of H·W: channel mean of the powers, each row of length 1."""
    B, C, H, W = f.shape
    return [unit([mean(f[i, c, y, x] ** p for c in range(C)) for y in range(H) for x in range(W)]) for i in range(B)]


def at(students, teachers, p=2):
    """Zagoruyko & Komodakis 2017, Paying More Attention to Attention."""
    total = 0.0
    for f_s, f_t in zip(students, teachers, strict=True):
        f_s, f_t = pooled_to_the_smaller(float64(f_s), float64(f_t))
        total += mse(np.array(attention(f_s, p)), np.array(attention(f_t, p)))
    return total


def mean_squared_products(f, g):
    """Mean over the batch and over all pairs (a channel of f, a channel of g) of <a, b>²."""
    pairs = [(i, c, d) for i in range(len(f)) for c in range(len(f[i])) for d in range(len(g[i]))]
    return mean(dot(f[i][c], g[i][d]) ** 2 for i, c, d in pairs)


def nst(students, teachers):
    """Huang & Wang 2017, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer."""
    total = 0.0
    for f_s, f_t in zip(students, teachers, strict=True):
        f_s, f_t = pooled_to_the_smaller(float64(f_s), float64(f_t))
        s = [[unit(channel.flatten()) for channel in example] for example in f_s]
        t = [[unit(channel.flatten()) for channel in example] for example in f_t]
        total += mean_squared_products(t, t) + mean_squared_products(s, s) - 2 * mean_squared_products(s, t)
    return total


def ofd(student, teacher, margin):
    """Heo et al. 2019, A Comprehensive Overhaul of Feature Distillation (OFD)."""
    student, teacher, margin = float64(student), float64(teacher), float64(margin)
    total = 0.0
    for i, c, y, x in np.ndindex(student.shape):
        s, t, m = student[i, c, y, x], teacher[i, c, y, x], margin[0, c, 0, 0]
        if t > 0:
            total += (s - t) ** 2
        elif t > m:
            total += (s - t) ** 2 if s > t else 0.0
        else:
            total += (s - m) ** 2 if s > m else 0.0
    return total / len(student)


def cat(student, teacher, size=2, normalize=False):
    """Guo et al. 2023, Class Attention Transfer Based Knowledge Distillation (CAT-KD)."""
    s, t = pooled(float64(student), size, size), pooled(float64(teacher), size, size)
    if normalize:
        for i, c in np.ndindex(s.shape[:2]):
            s[i, c] = np.array(unit(s[i, c].flatten())).reshape(size, size)
            t[i, c] = np.array(unit(t[i, c].flatten())).reshape(size, size)
    return mse(s, t)


def review(students, teachers):
    """Chen et al. 2021, Distilling Knowledge via Knowledge Review (ReviewKD), its hierarchical context loss."""
    total = 0.0
    for f_s, f_t in zip(students, teachers, strict=True):
        f_s, f_t = float64(f_s), float64(f_t)
        weights, values = [1.0], [mse(f_s, f_t)]
        for k in (4, 2, 1):
            if k < f_s.shape[2]:
                weights.append(weights[-1] / 2)
                values.append(mse(pooled(f_s, k, k), pooled(f_t, k, k)))
        total += dot(weights, values) / sum(weights)
    return total


# ------------------------------------------------------------------------------------------------- relation-based


def sp(student, teacher):
    """Tung & Mori 2019, Similarity-Preserving Knowledge Distillation."""

    def similarities(f):
        return [unit([dot(a, b) for b in f]) for a in f]

    g_s, g_t = similarities(float64(student)), similarities(float64(teacher))
    B = len(g_s)
    return sum((g_t[i][j] - g_s[i][j]) ** 2 for i in range(B) for j in range(B)) / B**2


def smooth_l1(a, b):
    gap = abs(a - b)
    return 0.5 * gap**2 if gap < 1 else gap - 0.5


def relative_distances(f):
    B = len(f)
    d = [[0.0 if i == j else sqrt(max(dot(f[i] - f[j], f[i] - f[j]), 1e-12)) for j in range(B)] for i in range(B)]
    scale = mean(v for row in d for v in row if v > 0)
    return [[v / scale for v in row] for row in d]


def angle_cosines(f):
    """Cosine of the angle at i between the directions to j and to k, for every i, j, k."""
    B = len(f)
    e = [[unit(f[j] - f[i]) for j in range(B)] for i in range(B)]
    return [[[dot(e[i][j], e[i][k]) for k in range(B)] for j in range(B)] for i in range(B)]


def rkd(student, teacher, distance=25, angle=50):
    """Park et al. 2019, Relational Knowledge Distillation; a batch of one has no relation: 0."""
    student, teacher = float64(student), float64(teacher)
    B = len(student)
    if B == 1:
        return 0.0
    d_s, d_t = relative_distances(student), relative_distances(teacher)
    of_distances = mean(smooth_l1(d_s[i][j], d_t[i][j]) for i, j in np.ndindex(B, B))
    a_s, a_t = angle_cosines(student), angle_cosines(teacher)
    of_angles = mean(smooth_l1(a_s[i][j][k], a_t[i][j][k]) for i, j, k in np.ndindex(B, B, B))
    return distance * of_distances + angle * of_angles


def pkt(student, teacher):
    """Passalis & Tefas 2018, Learning Deep Representations with Probabilistic Knowledge Transfer (PKT)."""

    def probabilities(f):
        x = [[v / (l2_norm(row) + 1e-7) for v in row] for row in f]
        s = [[(dot(a, b) + 1) / 2 for b in x] for a in x]
        return [[v / sum(row) for v in row] for row in s]

    s, t = probabilities(float64(student)), probabilities(float64(teacher))
    B = len(s)
    return mean(t[i][j] * log((t[i][j] + 1e-7) / (s[i][j] + 1e-7)) for i, j in np.ndindex(B, B))


def cc(student, teacher):
    """Peng et al. 2019, Correlation Congruence for Knowledge Distillation; a batch of one has no neighbour: 0."""
    student, teacher = float64(student), float64(teacher)
    B = len(student)
    if B == 1:
        return 0.0
    gap = [[abs(a - b) for a, b in zip(s, t, strict=True)] for s, t in zip(student, teacher, strict=True)]
    return mean(dot(gap[i], gap[i + 1]) for i in range(B - 1))
