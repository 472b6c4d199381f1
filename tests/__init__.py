"""Tests of flexgen_helm; the tree mirrors the package."""
