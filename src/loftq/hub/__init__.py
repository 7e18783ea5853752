"""How quantized models meet transformers and PEFT."""
