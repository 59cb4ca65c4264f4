"""qwen-lora: cache a captioned image folder once, then train LoRA adapters from the cache."""

__version__ = "0.1.0"
