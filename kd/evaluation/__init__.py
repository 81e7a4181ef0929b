"""Evaluation: COCO figures, error analysis, model cost, pictures of what is distilled."""
