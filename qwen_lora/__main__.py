"""`python -m qwen_lora` is the command `qwen-lora`."""

from qwen_lora.cli import main

main()
