"""Recommendation: interactions of users and items in, a model that ranks all items for a user out."""
