"""Tests of HELM's side of the package."""
