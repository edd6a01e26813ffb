"""Nested dicts by path, and back."""

from omnifusion_jax.nested import flat, nested


def test_leaves_have_paths_and_paths_make_trees():
    tree = {"a": {"b": 1, "c": {"d": None}}, "e": [1, 2]}
    leaves = {"a/b": 1, "a/c/d": None, "e": [1, 2]}
    assert flat(tree, "/") == leaves and nested(leaves, "/") == tree
    assert flat([{"a": 1}, {"b": {}}]) == {"0.a": 1}
    assert flat(3) == {"": 3} and flat({}) == nested({}) == {}
