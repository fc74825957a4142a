"""Training: fine-tuning a LoRA adapter on a frozen, packed model."""
