"""Fine-tuning a packed model's adapters, and the baselines it is compared with, on transformers' Trainer."""
