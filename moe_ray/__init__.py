"""Train, evaluate and serve Mixture-of-Experts language models on a Ray cluster."""
