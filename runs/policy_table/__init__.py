"""Policies and predictions for FlexGen's machine beside what the paper measured."""
