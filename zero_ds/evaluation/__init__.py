"""Evaluation on held-out questions: records, the runs with their control, scores, intervals, and their summary."""
