"""Measure the rates of this machine."""
