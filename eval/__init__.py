"""Evaluators of run directories and of published weights."""
