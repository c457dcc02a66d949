"""Recommenders that are computed from the training events in closed form: baselines for trained nets.

A fitted method scores the items for any history, also of users without training events::

    method = EASE().fit(indptr, indices, None, num_items)
    items, scores = top_k(method.score_block(history, recency_weights(history, 0.8)), num_items, 10, history)

They run on the CPU and need scipy.
"""

try:
    import scipy  # noqa: F401
except ImportError as error:
    raise ImportError("recommenders in closed form need scipy: pip install 'bigmodel[recommendation]'") from error

from bigmodel.tasks.recommendation.closed_form.ease import EASE
from bigmodel.tasks.recommendation.closed_form.item_knn import ItemKNN
from bigmodel.tasks.recommendation.closed_form.matrix import ClosedForm, recency_weights
from bigmodel.tasks.recommendation.closed_form.popularity import Popularity
from bigmodel.tasks.recommendation.closed_form.user_knn import UserKNN

__all__ = ["EASE", "ClosedForm", "ItemKNN", "Popularity", "UserKNN", "recency_weights"]
