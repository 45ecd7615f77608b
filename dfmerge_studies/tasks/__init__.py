"""Tasks: data, prompts, tokenised inputs, choice scoring, metrics."""
