"""Methods in closed form against constants, loops from their definitions, and each other."""

import math
import tracemalloc

import numpy as np
import pytest
import torch

from bigmodel.tasks.recommendation.closed_form import (
    EASE,
    ItemKNN,
    Popularity,
    UserKNN,
    ease,
    item_knn,
    matrix,
    recency_weights,
    user_knn,
)
from bigmodel.tasks.recommendation.ranking import rank

X = np.array([[1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 1, 0]])


def arrays(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of a matrix [U, I] as events."""
    users, items = x.nonzero()
    return np.concatenate([[0], np.bincount(users, minlength=len(x)).cumsum()]), items + 1, x[users, items]


def histories(x: np.ndarray) -> torch.Tensor:
    """The rows' items, padded on the left."""
    rows = [row.nonzero()[0] + 1 for row in x]
    longest = max(map(len, rows))
    return torch.tensor([[0] * (longest - len(row)) + row.tolist() for row in rows])


def values_of(x: np.ndarray) -> torch.Tensor:
    """What they are worth."""
    history = histories(x)
    return torch.from_numpy(np.take_along_axis(np.pad(x, ((0, 0), (1, 0))), history.numpy(), 1)).float()


def ratings(num_users: int, num_items: int, seed: int = 0) -> np.ndarray:
    """Ratings 1 to 5, 0 for most."""
    rng = np.random.default_rng(seed)
    x = rng.integers(1, 6, (num_users, num_items)) * (rng.random((num_users, num_items)) < 0.3)
    x[:, 0] = 0  # an item that nobody has
    return x


def all_scores(method, history, **given) -> np.ndarray:
    """Scores [B, I] of all items, put together from two blocks."""
    block, last = method.score_block(history, **given), method_items(method) + 1
    return torch.cat([block(1, 3), block(3, last)], 1).numpy()


def method_items(method) -> int:
    if isinstance(method, EASE):
        return method.num_items
    if isinstance(method, Popularity):
        return len(method.counts) - 1
    return (method.similarity if isinstance(method, ItemKNN) else method.matrix).shape[1] - 1


def test_popularity() -> None:
    indptr, items, _ = arrays(X)
    method = Popularity().fit(np.append(indptr, indptr[-1] + 2), np.append(items, [2, 2]), None, 4)
    assert all_scores(method, histories(X[:2])).tolist() == [[3, 4, 2, 0]] * 2  # twice by one user is once


EXPECTED = [[0, 0.5, 0.5], [0.363636, 0, 0], [0.545455, 0, 0]]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_ease_of_the_paper_s_equation(dtype) -> None:
    method = EASE(1.0, dtype).fit(*arrays(X)[:2], None, 3)
    np.testing.assert_allclose(method.weights[1:, 1:], EXPECTED, atol=1e-6)
    np.testing.assert_allclose(all_scores(method, histories(X))[0], [0.363636, 0.5, 0.5], atol=1e-6)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("shape", [(40, 15), (15, 40)])  # by items, by users
def test_ease_against_its_definition(dtype, shape, monkeypatch) -> None:
    monkeypatch.setattr(ease, "_NUMBERS_AT_ONCE", 100)
    x = (ratings(*shape) > 0).astype(float)
    p = np.linalg.inv(x.T @ x + 2.5 * np.eye(shape[1]))
    b = -p / np.diag(p)
    np.fill_diagonal(b, 0)
    method = EASE(2.5, dtype).fit(*arrays(x)[:2], None, shape[1])
    assert (method.by_item is None) == (shape[0] > shape[1])
    unseen = (ratings(5, shape[1], seed=1) > 0).astype(float)
    np.testing.assert_allclose(
        all_scores(method, histories(unseen)), unseen @ b, atol=1e-6 if dtype == "float64" else 1e-4
    )


def test_item_knn_constants() -> None:
    similarity = ItemKNN().fit(*arrays(X)[:2], None, 3).similarity.toarray()
    np.testing.assert_allclose(similarity[1, 2:], [0.666667, 0.816497], atol=1e-6)
    np.testing.assert_allclose(similarity[2, 3], 0.408248, atol=1e-6)
    np.testing.assert_array_equal(similarity, similarity.T)
    assert not similarity.diagonal().any()


@pytest.mark.parametrize("given", [None, "ratings"])
@pytest.mark.parametrize("at_once", [1, 100, 1 << 20])
def test_item_knn_against_a_loop(given, at_once, monkeypatch) -> None:
    monkeypatch.setattr(item_knn, "_SIMILARITIES_AT_ONCE", at_once)
    k, shrinkage, x = 4, 3.0, ratings(30, 12)
    indptr, items, values = arrays(x)
    method = ItemKNN(k, shrinkage).fit(indptr, items, None if given is None else values, 12)
    x = x if given else (x > 0).astype(int)
    w = np.zeros((12, 12))
    for i in range(12):
        row = []
        for j in range(12):
            product, norms = 0, [0, 0]
            for u in range(30):
                product += x[u, i] * x[u, j]
                norms[0] += x[u, i] ** 2
                norms[1] += x[u, j] ** 2
            if i != j and product:
                row.append((product / (math.sqrt(norms[0]) * math.sqrt(norms[1]) + shrinkage), j))
        for similarity, j in sorted(row, key=lambda pair: (-np.float32(pair[0]), pair[1]))[:k]:
            w[i, j] = similarity
    unseen = ratings(6, 12, seed=1)
    np.testing.assert_allclose(method.similarity.toarray()[1:, 1:], w, rtol=1e-6)
    scores = all_scores(method, histories(unseen), values=values_of(unseen))
    np.testing.assert_allclose(scores, unseen @ w, rtol=1e-5)
    items = torch.arange(1, 13).flip(0).expand(6, -1)
    rated = method.rate(histories(unseen), values_of(unseen), items).numpy()[:, ::-1]
    for b, j in np.ndindex(6, 12):
        pairs = [(w[i, j], unseen[b, i]) for i in range(12) if unseen[b, i] and w[i, j]]
        mean = sum(a * r for a, r in pairs) / sum(a for a, _ in pairs) if pairs else math.nan
        np.testing.assert_allclose(rated[b, j], mean, rtol=1e-5)
    assert np.isnan(rated).any()
    np.testing.assert_allclose(all_scores(method, histories(unseen)), (unseen > 0) @ w, rtol=1e-5)


def test_user_knn_constants() -> None:
    x = np.array([[1, 5, 5], [1, 4, 1], [1, 3, 2], [0, 5, 2]])
    method = UserKNN(3).fit(*arrays(x), 3)
    score = method.score_block(torch.tensor([[1]]))(2, 3).item()
    assert score == pytest.approx(1.6970562748, abs=1e-6)  # of 5, 4, 3: the last user is no neighbour
    method = UserKNN(2, prediction="mean").fit(*arrays(x), 3)  # the two nearest: 4 and 3
    w = [1 / math.sqrt(18), 1 / math.sqrt(14)]
    score = method.score_block(torch.tensor([[1]]))(2, 3).item()
    assert score == pytest.approx((4 * w[0] + 3 * w[1]) / (w[0] + w[1]), rel=1e-6)


def loop_over_users(x, rows, own, similarity, prediction, k):
    """Scores of users with ratings `own` [B, I], themselves row `rows` of x or -1."""
    scores = np.zeros(own.shape)
    for b, mine in enumerate(own):
        neighbors = []
        for v, theirs in enumerate(x):
            if v == rows[b]:
                continue
            if similarity == "cosine":
                w = mine @ theirs / max(math.sqrt(mine @ mine) * math.sqrt(theirs @ theirs), 1e-12)
            else:
                both = (mine > 0) & (theirs > 0)
                flat = both.sum() < 2 or len(set(mine[both])) == 1 or len(set(theirs[both])) == 1
                w = 0 if flat else np.corrcoef(mine[both], theirs[both])[0, 1]
            neighbors.append((np.float32(w), -v))
        best = [(float(w), -v) for w, v in sorted(neighbors, reverse=True)[:k] if w > 1e-6]
        for i in range(own.shape[1]):
            pairs = [(w, x[v, i]) for w, v in best if x[v, i]]
            if pairs and prediction == "mean":
                scores[b, i] = sum(w * r for w, r in pairs) / sum(w for w, _ in pairs)
            elif pairs:
                scores[b, i] = sum(r for _, r in pairs) / math.sqrt(sum(r * r for _, r in pairs))
    return scores


@pytest.mark.parametrize("similarity", ["cosine", "pearson"])
@pytest.mark.parametrize("prediction", ["norm", "mean"])
def test_user_knn_against_a_loop(similarity, prediction, monkeypatch) -> None:
    monkeypatch.setattr(user_knn, "_SIMILARITIES_AT_ONCE", 100)
    x = ratings(25, 20)
    method = UserKNN(25, similarity, prediction).fit(*arrays(x), 20)
    own = np.concatenate([x[:4], ratings(4, 20, seed=1)])
    rows = np.array([0, 1, 2, 3, -1, -1, -1, -1])
    found = all_scores(method, histories(own), values=values_of(own), users=torch.from_numpy(rows))
    expected = loop_over_users(x, rows, own, similarity, prediction, 25)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    items = torch.tensor([[20, 1, 7]]).expand(8, -1)  # nobody has item 1
    rated = method.rate(histories(own), values_of(own), items, torch.from_numpy(rows))
    expected = np.where(expected == 0, np.nan, expected)[:, [19, 0, 6]]
    np.testing.assert_allclose(rated.numpy(), expected, rtol=1e-5)
    assert Popularity().rate(histories(own), values_of(own), items) is None


def test_ease_takes_one_matrix(monkeypatch) -> None:
    monkeypatch.setattr(ease, "_NUMBERS_AT_ONCE", 20_000)
    events = arrays((ratings(1000, 900) > 4).astype(float))
    tracemalloc.start()
    EASE().fit(*events[:2], None, 900)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    sparse = 4 * 16 * len(events[1])  # the events themselves, by rows and by columns, and while they are sorted
    assert peak < 1.2 * 901**2 * 8 + sparse


@pytest.mark.parametrize("make", [Popularity, EASE, lambda: EASE(dtype="float32"), ItemKNN, UserKNN])
@pytest.mark.parametrize("shape", [(40, 15), (15, 40)])
def test_what_was_fitted_is_saved(make, shape, tmp_path) -> None:
    x = ratings(*shape)
    method, again = make().fit(*arrays(x), shape[1]), make()
    torch.save(method.state_dict(), tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    np.testing.assert_array_equal(all_scores(again, histories(x)), all_scores(method, histories(x)))
    assert all_scores(method, histories(x)).any()


def test_recency() -> None:
    values = recency_weights(torch.tensor([[0, 3, 5, 2], [4, 1, 0, 0]]), 0.5)
    assert values.tolist() == [[0, 0.25, 0.5, 1], [0.5, 1, 0, 0]]
    with pytest.raises(ValueError, match="recency_decay 0: must be"):
        recency_weights(torch.zeros(1, 1), 0)


def test_the_last_of_repeated_events_counts_and_scores_are_ranked() -> None:
    method = ItemKNN().fit(np.array([0, 3, 5]), np.array([1, 2, 1, 1, 3]), np.array([9.0, 2, 1, 1, 1]), 3)
    twice = ItemKNN().fit(np.array([0, 2, 4]), np.array([2, 1, 1, 3]), np.array([2.0, 1, 1, 1]), 3)
    assert (method.similarity != twice.similarity).nnz == 0
    worthless = ItemKNN().fit(np.array([0, 3, 5]), np.array([2, 1, 3, 1, 3]), np.array([2.0, 1, 0, 1, 0]), 3)
    assert worthless.similarity.nnz == 2  # an item that all rated 0 has no neighbours
    ranks = rank(method.score_block(torch.tensor([[0, 1]])), 3, torch.tensor([[3]]), torch.tensor([[0, 1]]))
    assert ranks.item() in (1, 2)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            EASE(),
            "EASE in float64 over 5 users needs .* GB of main memory, but 0.0 GB are .*dtype float32",
        ),
        (EASE(dtype="float32"), "available: ItemKNN much less"),
        (ItemKNN(), "ItemKNN with 100 neighbours of 9 items needs .* --model.method.num_neighbors"),
    ],
)
def test_what_does_not_fit_is_refused(method, message, monkeypatch) -> None:
    monkeypatch.setattr(matrix, "available_memory", lambda: 1e6)
    with pytest.raises(ValueError, match=message):
        method.fit(*arrays(ratings(5, 9))[:2], None, 9)


def test_available_memory_is_plausible() -> None:
    assert 1e7 < matrix.available_memory() < 1e14


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (([0, 2], [1, 5], None, 4), "items 1 to 5, but must be in 1 to 4"),
        (([0, 2], [0, 3], None, 4), "items 0 to 3"),
        (([0, 2, 1, 2], [1, 2], None, 4), "indptr must ascend"),
        (([0, 1], [1, 2], None, 4), "indptr must ascend from 0 to the number of events, 2"),
        (([0, 2], [1, 2], [1.0, math.nan], 4), r"values \[2\] must be finite"),
        (([0, 0], [], None, 4), "no training events"),
    ],
)
def test_bad_events_are_refused(events, message) -> None:
    indptr, items, values, num_items = events
    with pytest.raises(ValueError, match=message):
        UserKNN().fit(np.array(indptr), np.array(items), values, num_items)


def test_bad_options_are_refused() -> None:
    for make, message in (
        (lambda: EASE(0), "l2 0: must be above 0"),
        (lambda: EASE(1, "float16"), "dtype 'float16': must be"),
        (lambda: ItemKNN(0), "num_neighbors 0: must be"),
        (lambda: ItemKNN(1, -1.0), r"shrinkage -1.0: must be"),
        (lambda: UserKNN(1, "euclid"), "similarity 'euclid': must be cosine or pearson"),
        (lambda: UserKNN(1, prediction="sum"), "prediction 'sum': must be"),
        (lambda: UserKNN(1, "pearson").fit(*arrays(X)[:2], None, 3), "needs ratings.*--model.values ratings"),
        (
            lambda: UserKNN(1, "pearson").fit(*arrays(X), 3).score_block(torch.tensor([[1]])),
            "needs a history with ratings",
        ),
        (lambda: EASE().fit(*arrays(X)[:2], None, 3).score_block(torch.tensor([[4]])), "histories have items 4 to 4"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("neighbors_of", ["history", "recommended"])
def test_neighbours_are_of_items_of_the_history_or_of_recommended_ones(neighbors_of):
    draw = np.random.default_rng(0)
    events = draw.random((30, 13)) < 0.3
    events[:, 0] = False
    events[0] = [False] + [True] * 12
    indptr, indices = np.concatenate([[0], events.sum(1).cumsum()]), np.nonzero(events)[1]
    method = ItemKNN(3, shrinkage=1.0, neighbors_of=neighbors_of).fit(indptr, indices, None, 12)
    x = events.astype(float)
    norms = np.sqrt(x.sum(0))
    w = np.zeros((13, 13))
    for one in range(1, 13):
        similar = {j: (x[:, one] @ x[:, j]) / (norms[one] * norms[j] + 1) for j in range(1, 13) if j != one}
        for j in sorted(similar, key=lambda j: (-np.float32(similar[j]), j))[:3]:
            w[(one, j) if neighbors_of == "history" else (j, one)] = similar[j]
    history = torch.tensor([[0, 2, 5, 7], [1, 3, 4, 12]])
    expected = np.stack([sum(w[i] for i in row if i) for row in history.tolist()])
    np.testing.assert_allclose(method.score_block(history)(1, 13).numpy(), expected[:, 1:], rtol=1e-5)
